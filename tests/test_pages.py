"""What a reader of the executed notebooks would stumble over: formulas and tables that don't render, links that lead
nowhere, outputs that say nothing"""
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent/'nbs'
NOTEBOOKS = sorted(NBS.rglob('*.ipynb'))
RULE = re.compile(r'\s*\|(\s*:?-+:?\s*\|)+\s*')
RAW = dict(numpy=r'\bnp\.\w+\(', warning=r'\w+Warning: ', control='\x1b\\[2K', address='0x[0-9a-f]{6,}',
           object='<(IPython|matplotlib|function|generator|bound|Axes)')
FORMULA = re.compile(r'\$\$.*?\$\$|\$[^$\n]+\$', flags=re.S)
EMPTY = '', '[]', "['']", '{}', 'None', "''"


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def texts(cell):
    "Markdown that a cell holds or shows"
    if cell['cell_type'] == 'markdown': return [''.join(cell['source'])]
    return [''.join(o['data'].get('text/markdown', '')) for o in cell.get('outputs', []) if 'data' in o]


def headings(path):
    "Anchors of a notebook's headings, as GitHub and JupyterLab make them"
    lines = '\n'.join(t for c in read(path)['cells'] if c['cell_type'] == 'markdown' for t in texts(c)).split('\n')
    return {re.sub(r'\s', '-', re.sub(r'[`*]', '', l.lstrip('#').strip())) for l in lines if l.startswith('#')}


def table_faults(text):
    "Tables that are shown as lines of bars"
    for m in re.finditer(r'(?m)(?:^[ ]*\|.*\n?)+', text):
        rows, before = m[0].strip().splitlines(), text[:m.start()]
        if len(rows) < 2 or not RULE.fullmatch(rows[1]): yield f'table without a rule: {rows[0]}'
        if len({len(re.findall(r'(?<!\\)\|', r)) for r in rows}) > 1: yield f'rows of several widths: {rows[0]}'
        if before.strip() and not before.endswith('\n\n'): yield f'table without a blank line before it: {rows[0]}'


def formula_faults(text):
    "Line breaks and formulas that are shown as they were typed"
    words = re.sub(r'`+[^`]*`+', '', text)
    for formula in FORMULA.findall(words):
        if re.search(r'\\\\[a-zA-Z]', formula): yield f'doubled backslash: {formula}'
    plain = FORMULA.sub('', words)
    if m := re.search(r'\\n', plain): yield f'literal line break: {plain[max(0, m.start() - 30):m.end()]}'


def link_faults(text, path):
    "Links to notebooks and headings that aren't there"
    for file, anchor in re.findall(r'\]\(([^)#\s]*\.ipynb)?(?:#([^)]+))?\)', text):
        target = path.parent/file if file else path
        if not target.is_file(): yield f'link to {file}, which is not there'
        elif anchor and anchor not in headings(target): yield f'link to {file}#{anchor}, and there is no such heading'
    for name in re.findall(r'(?<!\[)`(\d\d_\w+)`(?!\])', text):
        if name != path.stem and (NBS/f'{name}.ipynb').is_file(): yield f'{name} is named and not linked'


def output_faults(output):
    "Texts that say nothing to a reader; a picture or a table beside them does"
    if set(output.get('data', {})) - {'text/plain'}: return
    text = ''.join(output.get('text', '')) or ''.join(output.get('data', {}).get('text/plain', ''))
    if text.strip() in EMPTY: yield f'shows only {text.strip() or "nothing"}'
    yield from (f'shows {k}: {text[:80]}' for k, raw in RAW.items() if re.search(raw, text))


def faults(nb, path):
    "Everything found in a notebook, with the number of its cell"
    for i, c in enumerate(nb['cells']):
        found = [f for t in texts(c) for check in (table_faults, formula_faults) for f in check(t)]
        found += [f for t in texts(c) for f in link_faults(re.sub(r'```.*?```', '', t, flags=re.S), path)]
        found += [f for o in c.get('outputs', []) for f in output_faults(o)]
        yield from (f'cell {i}: {f}' for f in found)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_page(path): assert not [*faults(read(path), path)]


def said(*source): return dict(cell_type='markdown', source=list(source))
def shown(**output): return dict(cell_type='code', source=['x'], outputs=[output])


@pytest.mark.parametrize('cell, says', [
    (said('one\\ntwo'), 'literal line break'), (said('$\\\\frac12$'), 'doubled backslash'),
    (said('| a | b |\n| 1 | 2 |'), 'without a rule'), (said('words\n| a |\n|---|\n| 1 |'), 'without a blank line'),
    (said('| a | b |\n|---|---|\n| 1 |'), 'several widths'), (said('[x](99_none.ipynb)'), 'not there'),
    (said('[x](01_core.ipynb#Nothing-like-it)'), 'no such heading'), (said('[x](#Nothing-like-it)'), 'no such heading'),
    (said('see `02_sources`'), 'not linked'), (shown(text=['x.py:1: FutureWarning: old']), 'shows warning'),
    (shown(text=['\x1b[2K\r']), 'shows control'),
    (shown(data={'text/markdown': ['| a |\\n|---|']}), 'literal line break'),
    (shown(text=["['']\n"]), "shows only ['']"),
    (shown(data={'text/plain': ['np.float64(0.5)']}), 'shows numpy'), (shown(text=['<function f>']), 'shows object'),
    (shown(text=['Thing at 0x7f1234567']), 'shows address')], ids=lambda x: x if isinstance(x, str) else '')
def test_faults_are_found(cell, says):
    assert any(says in f for f in faults(dict(cells=[cell]), NOTEBOOKS[0]))


def test_what_renders_is_no_fault():
    cells = [said('words\n\n| a | b |\n|---|:-:|\n| 1 | x\\|y |\n'), said('`\\n` and $\\nabla x$ and $a \\\\ b$'),
             shown(data={'text/plain': ['<Axes>'], 'image/png': ['']})]
    assert not [*faults(dict(cells=cells), NOTEBOOKS[0])]
