"""Every notebook is a test: it runs from top to bottom in a process of its own, as `nbdev-test` runs it.

Another processor rounds differently, and a training makes other numbers of that. What a notebook claims has to hold
there, too: MPO_NB_CACHE=$(mktemp -d) ATEN_CPU_CAPABILITY=default pytest tests/test_toy.py tests/test_notebooks.py"""
import os

import pytest
from fastcore.nbio import mk_cell, new_nb, write_nb
from install_cell import NOTEBOOKS
from run_notebook import run_notebook
from twice import differences


def test_there_are_notebooks():
    "nbdev-test reports success where it finds nothing; we don't."
    assert len(NOTEBOOKS) >= 25


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    # one process each: seeds, default dtypes and environment variables of one notebook must not reach the next
    code = run_notebook(path, tmp_path/'log')
    assert code == 0, (tmp_path/'log').read_text(errors='replace')[-9000:]


def write(path, cell):
    write_nb(new_nb([mk_cell(cell)]), path)
    return path


@pytest.mark.parametrize('cell, said', [('assert 1 == 2, "so wrong"', 'so wrong'), ('import os; os._exit(3)', '')])
def test_a_notebook_that_fails_is_seen(cell, said, tmp_path):
    assert run_notebook(write(tmp_path/'bad.ipynb', cell), tmp_path/'log') != 0
    assert said in (tmp_path/'log').read_text()


def test_one_notebook_does_not_reach_the_next(tmp_path):
    "Nor does the way in which it is started [fails when all run in one process, and when PYTHONPATH is the server's]"
    path = os.environ.get('PYTHONPATH')
    cells = dict(a='import os, torch; os.environ["X"] = "1"; torch.set_default_dtype(torch.float64)',
                 b='import os, torch; assert "X" not in os.environ and torch.tensor(1.).itemsize == 4',
                 c=f'import os; assert os.environ.get("PYTHONPATH") == {path!r}')
    for name, cell in cells.items():
        code = run_notebook(write(tmp_path/f'{name}.ipynb', cell), tmp_path/'log')
        assert code == 0, (tmp_path/'log').read_text()


def test_what_two_runs_print_is_compared(tmp_path):
    "Times apart [fails when outputs are not saved, and when nothing is masked]"
    steady = write(tmp_path/'steady.ipynb', 'import time; print(f"{time.perf_counter()} s"); "the same"')
    assert differences(steady) == []
    other = differences(write(tmp_path/'other.ipynb', 'import os; os.urandom(3)'))
    assert len(other) == 2 and all("cell 0: b'" in line for line in other)
