"Hygiene: what a reader of the repository would stumble over."
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
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


def test_modules_import_only_from_lower_numbers():
    order = {}
    for nb in NOTEBOOKS:
        source = '\n'.join(''.join(c['source']) for c in code_cells(nb))
        if m := re.search(r'^#\| default_exp (\w+)', source, re.M): order[m.group(1)] = (nb.stem, source)
    names = list(order)
    for i, name in enumerate(names):
        exported = (ROOT/'mpo_nb'/f'{name}.py').read_text(encoding='utf-8')
        used = set(re.findall(r'^\s*from (?:mpo_nb)?\.(\w+) import', exported, re.M))
        assert used <= set(names[:i]), f'{name} imports {used - set(names[:i])}'


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
