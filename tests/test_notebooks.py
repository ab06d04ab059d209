"Every notebook is a test: it runs from top to bottom in a process of its own, as `nbdev-test` runs it."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def test_there_are_notebooks():
    "nbdev-test reports success where it finds nothing; we don't."
    assert len(NOTEBOOKS) >= 25


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    # one process each: seeds, default dtypes and environment variables of one notebook must not reach the next
    code = ('import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], '
            'skip_flags=["notest", "slow", "cuda"])[0])')
    run = subprocess.run([sys.executable, '-c', code, str(path)], cwd=path.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
