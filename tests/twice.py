"""Run notebooks twice, each time alone in an empty folder, and compare what they print: `make twice` for all, or
`python tests/twice.py NAME …`. What differs from run to run teaches a reader to distrust the rest."""
import difflib
import json
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from install_cell import NOTEBOOKS
from run_notebook import run_notebook

# clock times, and names that are made anew by every run
MASKED = [r'\d{4}-\d\d-\d\dT[\d:.+]+', r'\d[\d.]*(?=e?-?\d* ?(?:s|ms|seconds|minutes|min)\b)',
          r'(?<=seconds\': )[\d.]+', r'\d\d:\d\d(?::\d\d)?', r'\b[0-9a-f]{16,}\b', r'/tmp/\w+',
          r'0x[0-9a-f]+', r'[\d.]+ ?(?:it/s|s/it)']


def printed(path):
    "Lines of text that the cells of an executed notebook show, times masked"
    lines = []
    for i, c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        for o in c.get('outputs', []):
            data = o.get('data', {})
            text = ''.join(o.get('text') or data.get('text/markdown') or data.get('text/plain') or '')
            for mask in MASKED: text = re.sub(mask, '#', text)
            lines += [f'cell {i}: {line}' for line in text.splitlines()]
    return lines


def execute(path, folder):
    "Lines that a notebook prints when it is run in `folder`"
    folder.mkdir()
    copy = Path(shutil.copy(path, folder))
    if run_notebook(copy, folder/'log', save=True):
        raise RuntimeError(f'{path.name} failed:\n{(folder/"log").read_text(errors="replace")[-3000:]}')
    return printed(copy)


def differences(path):
    with tempfile.TemporaryDirectory() as tmp:
        one, two = (execute(path, Path(tmp)/k) for k in ('one', 'two'))
    return [l for l in difflib.unified_diff(one, two, lineterm='', n=0) if l[:3] not in ('---', '+++') and l[0] != '@']


def main(names):
    if unknown := {*names} - {p.stem for p in NOTEBOOKS}: sys.exit(f'no notebook {sorted(unknown)[0]}')
    chosen = [p for p in NOTEBOOKS if not names or p.stem in names]
    found = False
    with ThreadPoolExecutor(2) as pool:
        for path, diff in zip(chosen, pool.map(differences, chosen)):
            print(f'{path.stem}: {"the same" if not diff else "differs"}', *diff, sep='\n  ', flush=True)
            found = found or bool(diff)
    return int(found)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
