"""On Colab a notebook stands alone: its first cell installs the package. Colab's machine is stood in for by an
environment that has the libraries and no mpo_nb, the repository by a wheel of this tree; nothing is downloaded.
`make colab` runs all notebooks in this way, and `make test` two."""
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from install_cell import NOTEBOOKS, ROOT, install_cell, with_install_cell

RUN = '''
import json, sys, textwrap
from importlib.metadata import version
from IPython.core.interactiveshell import InteractiveShell
before, shell = version('torch'), InteractiveShell.instance()
for cell in json.load(open(sys.argv[1], encoding='utf-8'))['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code' or '#| slow' in source: continue
    if '%pip' in source:
        install, *rest = source.partition('    assert importlib')
        shell.run_cell(install).raise_error()
        if 'torch' in sys.modules: sys.exit('torch was imported before or by the installation')
        source = textwrap.dedent(''.join(rest))
    shell.run_cell(source).raise_error()
import mpo_nb
print(before == version('torch'), mpo_nb.__file__)
'''


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_install_cell_is_the_first(path):
    "[fails when a notebook is new, or the repository's name in settings.ini has changed: run `make cells`]"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert with_install_cell(cells) == cells


def test_a_notebook_without_the_cell_gets_it_once():
    cells = [dict(cell_type='markdown', source=['# T']), dict(cell_type='code', id='a', source=['import mpo_nb'])]
    new = with_install_cell(cells)
    assert [''.join(c['source']) for c in new] == ['# T', install_cell(), 'import mpo_nb']
    assert with_install_cell(new) == new


def test_the_cell_takes_no_code_away():
    "[fails when all that stands beside `#| default_exp` is written over]"
    both = '#| default_exp room\nx = 1'
    new = with_install_cell([dict(cell_type='code', id='a', source=[both])])
    assert [''.join(c['source']) for c in new] == [install_cell(), both]


@pytest.fixture(scope='module')
def colab(tmp_path_factory):
    "(python of an environment without mpo_nb, wheel of this tree)"
    tmp = tmp_path_factory.mktemp('colab')
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for f in files:   # a copy: building leaves files in the folder
        if (ROOT/f).is_file() and not f.startswith(('nbs/', 'tests/')):
            (tmp/'tree'/f).parent.mkdir(parents=True, exist_ok=True)
            (tmp/'tree'/f).write_bytes((ROOT/f).read_bytes())
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp,
                    tmp/'tree'], check=True)
    subprocess.run([sys.executable, '-m', 'venv', tmp/'env'], check=True)
    own = next((tmp/'env'/'lib').glob('python*'))/'site-packages'
    left_out = 'mpo_nb', '__editable__', 'pip', '__pycache__'
    for entry in Path(sysconfig.get_paths()['purelib']).iterdir():
        if not entry.name.startswith(left_out) and not (own/entry.name).exists(): (own/entry.name).symlink_to(entry)
    return tmp/'env'/'bin'/'python', next(tmp.glob('*.whl'))


ALL = [p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in NOTEBOOKS]


@pytest.mark.parametrize('name', ALL if os.environ.get('COLAB') == 'all' else ['40_keys', 'studies/speed'])
def test_a_notebook_alone_in_a_folder(name, colab, tmp_path):
    "It installs the package, runs to its end, and torch is as it was [fails without the first cell]"
    python, wheel = colab
    text = (ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8')
    source = install_cell().split(' @ ')[1].split('"')[0]
    assert text.count(source) == 1
    (tmp_path/'one.ipynb').write_text(text.replace(source, wheel.as_uri()), encoding='utf-8')
    (tmp_path/'run.py').write_text(RUN)
    subprocess.run([python, '-m', 'pip', 'uninstall', '-q', '-y', 'mpo_nb'], capture_output=True)
    # IPython adds the packages of an active environment
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    env |= dict(PIP_NO_INDEX='1', MPLBACKEND='agg')
    p = subprocess.run([python, 'run.py', 'one.ipynb'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    assert re.search(r'(?m)^mpo_nb \S+ with torch \S+ on \S', p.stdout)
    same, where = p.stdout.splitlines()[-1].split(' ', 1)
    assert same == 'True' and where.startswith(str(python.parent.parent))


def test_an_installation_that_fails_says_so(colab, tmp_path):
    "Without a network a reader is told where to look, not of a missing module [fails without the cell's assertion]"
    python, _ = colab
    cells = [dict(cell_type='code', source=[install_cell()])]
    (tmp_path/'one.ipynb').write_text(json.dumps(dict(cells=cells)))
    (tmp_path/'run.py').write_text(RUN)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')} | dict(PIP_NO_INDEX='1')
    env |= dict(GIT_CONFIG_COUNT='1', GIT_CONFIG_KEY_0='url.file:///nowhere/.insteadOf', GIT_CONFIG_VALUE_0='https://')
    subprocess.run([python, '-m', 'pip', 'uninstall', '-q', '-y', 'mpo_nb'], capture_output=True)
    p = subprocess.run([python, 'run.py', 'one.ipynb'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert p.returncode != 0 and 'not installed: see what pip says above' in p.stdout + p.stderr
