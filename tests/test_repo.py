"Hygiene: what a reader of the repository would stumble over."
import ast
import configparser
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from install_cell import install_cell

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
WIDEST, MOST_CELLS, MEDIAN_LINES = 120, 90, 6
# places of a machine, which a reader of the project doesn't have; put together so that this file doesn't hold them
MACHINE = re.compile('|'.join(re.escape(a + b) for a, b in (
                                  ('/wo', 'rk/'), ('/ro', 'ot/'), ('/ho', 'me/'), ('/tm', 'p/'), ('/Us', 'ers/'))))


def code_cells(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [c for c in nb['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    "Executed, without errors, warnings, widgets, machine paths or megabytes; with a title, a subtitle and a summary."
    text, nb = path.read_text(encoding='utf-8'), json.loads(path.read_text(encoding='utf-8'))
    outputs = [o for c in code_cells(path) for o in c['outputs']]
    assert outputs, 'committed without outputs'
    assert 'widgets' not in nb['metadata'] and 'application/vnd.jupyter.widget' not in text
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert not (found := MACHINE.search(text)), f'holds {found.group(0)!r}'
    assert len(text) < 1_500_000
    first = ''.join(nb['cells'][0]['source'])
    assert first.startswith('# ') and '\n> ' in first, 'opens with an H1 and a > subtitle'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_valid(path):
    import nbformat
    nbformat.validate(nbformat.read(path, 4))


def test_package_is_what_the_notebooks_export(tmp_path):
    "Nobody edited a generated module, and nobody forgot to export."
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for f in files:
        if (ROOT/f).is_file():
            (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/f).write_bytes((ROOT/f).read_bytes())
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path,
                   check=True, capture_output=True)
    for f in (ROOT/'mpo_nb').glob('*.py'):
        assert ((tmp_path/'mpo_nb'/f.name).read_text(encoding='utf-8')
                == f.read_text(encoding='utf-8')), f'{f.name}: run nbdev-export'


def module_of(path):
    "Name of the module that a notebook exports to, or None"
    m = re.search(r'^#\| default_exp (\w+)', '\n'.join(''.join(c['source']) for c in code_cells(path)), re.M)
    return m and m.group(1)


ROOMS = [m for m in map(module_of, NOTEBOOKS) if m]


def tree(module):
    return ast.parse((ROOT/'mpo_nb'/f'{module}.py').read_text(encoding='utf-8'))


def imports(module, nodes=None):
    "(room, names) of every import from another room, wherever it stands, or among `nodes`"
    for node in nodes or ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((a.name.split('.')[1], []) for a in node.names if a.name.startswith('mpo_nb.'))
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or '').startswith('mpo_nb')):
            continue
        room = (node.module or '').removeprefix('mpo_nb').lstrip('.')
        names = [a.name for a in node.names]
        if room: yield room, names
        else: yield from ((n, []) for n in names if n in ROOMS)


def test_there_are_rooms():
    assert len(ROOMS) >= 20 and len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize('module', ROOMS)
def test_a_room_imports_only_from_rooms_above_it(module):
    used = {room for room, _ in imports(module)}
    assert used <= set(ROOMS[:ROOMS.index(module)]), f'{module} imports {used - set(ROOMS[:ROOMS.index(module)])}'


@pytest.mark.parametrize('module', ROOMS)
def test_a_room_imports_public_names_only(module):
    private = {f'{room}.{n}' for room, names in imports(module) for n in names if n.startswith('_')}
    assert not private, f'{module} imports {private}'


@cache
def imported_with(module):
    "Packages that are imported where a room is imported, by it or by rooms that it imports; not those in functions"
    body = tree(module).body
    packages = {a.name.split('.')[0] for node in body if isinstance(node, ast.Import) for a in node.names}
    packages |= {node.module.split('.')[0] for node in body if isinstance(node, ast.ImportFrom) and not node.level}
    return packages.union(*(imported_with(room) for room, _ in imports(module, body)))


@pytest.mark.parametrize('module', ['cli', 'judging', 'human', 'results', 'agreement'])
def test_who_needs_no_model_does_not_wait_for_torch(module):
    "[fails when `compare` takes `Samples` from the room that draws them]"
    assert not imported_with(module) & {'torch', 'transformers', 'trl', 'peft', 'accelerate'}
    assert 'torch' in imported_with('gap')


def test_no_public_name_means_two_things():
    homes = defaultdict(list)
    for module in ROOMS:
        for node in tree(module).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            for n in names:
                patched = (isinstance(node, ast.FunctionDef)
                           and any('patch' in ast.unparse(d) for d in node.decorator_list))
                if not n.startswith('_') and not patched: homes[n].append(module)
    assert not (twice := {n: m for n, m in homes.items() if len(m) > 1}), twice


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_a_readers_size(path):
    "At most 90 cells, small ones, and no code line that scrolls sideways"
    nb, sources = json.loads(path.read_text(encoding='utf-8')), [''.join(c['source']) for c in code_cells(path)]
    assert len(nb['cells']) <= MOST_CELLS
    own = [s for s in sources if install_cell() not in s]   # that cell is generated, and the same everywhere
    assert statistics.median(s.count('\n') + 1 for s in own) <= MEDIAN_LINES
    wide = [l for s in sources for l in s.split('\n') if len(l) > WIDEST]
    assert not wide, wide[0]


HAND_WRITTEN = [p for d in ('tests', 'benchmarks', 'docs') for p in sorted((ROOT/d).glob('*.py'))] + [ROOT/'setup.py']


@pytest.mark.parametrize('path', HAND_WRITTEN, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_no_wide_lines(path):
    wide = [f'line {n}' for n, l in enumerate(path.read_text(encoding='utf-8').split('\n'), 1) if len(l) > WIDEST]
    assert not wide, wide


def test_settings_agree():
    "settings.ini and pyproject.toml say the same where both speak."
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    ini, toml = ini['DEFAULT'], tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))
    project, nbdev = toml['project'], toml['tool']['nbdev']
    assert ini['lib_name'] == project['name'] and ini['description'] == project['description']
    assert f">={ini['min_python']}" == project['requires-python']
    for k in ('nbs_path', 'lib_path', 'tst_flags'): assert ini[k] == nbdev[k]
    assert {'version', 'dependencies', 'optional-dependencies'} <= set(project['dynamic'])


def test_no_pickle_and_no_remote_code():
    for f in (ROOT/'mpo_nb').glob('*.py'):
        text = f.read_text(encoding='utf-8')
        assert not re.search(
            r'^\s*(import|from) pickle|pickle\.load|weights_only\s*=\s*False|trust_remote_code\s*=\s*True',
            text, re.M), f.name


def test_tracked_files_name_no_machine():
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for f in files:
        if f.endswith(('.py', '.md', '.toml', '.ini', '.yaml', '.txt', '.jinja')) or f in ('Makefile', '.ci/run'):
            found = MACHINE.search((ROOT/f).read_text(encoding='utf-8'))
            assert not found or f.startswith('tests/'), f'{f} holds {found.group(0)!r}'
