"""The first code cell of every notebook, so that it runs on Colab: `make cells` writes it, from settings.ini.

It stands in the cell of `#| default_exp` where there is one. torch is pinned to the version that is there (read from
its metadata, not imported): another one would be a download of gigabytes, and the old one may be loaded already."""
import configparser
import json
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
SHARED = '''# On Colab this installs mpo_nb and keeps the torch that is there; where mpo_nb is installed it does nothing
import importlib.util
from importlib.metadata import version
if importlib.util.find_spec('mpo_nb') is None:
    %pip install -q "{source}" torch=={{version('torch')}}
    assert importlib.util.find_spec('mpo_nb'), 'not installed: see what pip says above (no network? an old Python?)'
    from mpo_nb.core import runtime; print(runtime())'''


def install_cell():
    "Its text, without the line of `#| default_exp`"
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    s = ini['DEFAULT']
    source = f"{s['lib_name']}[peft,judge] @ git+https://github.com/{s['user']}/{s['repo']}@{s['branch']}"
    return SHARED.format(source=source)


def with_install_cell(cells):
    "The cells of a notebook, the first code cell as it should be"
    i = next(i for i, c in enumerate(cells) if c['cell_type'] == 'code')
    first, rest = cells[i], cells[i + 1:]
    lines = ''.join(first['source']).split('\n')
    export = [l for l in lines if l.startswith('#| default_exp')]
    if lines != export and SHARED.split('\n')[0] not in lines:   # code of the notebook's own: the cell goes before it
        first, rest, export = dict(first, id=uuid.uuid4().hex[:8], outputs=[], execution_count=None), cells[i:], []
    source = '\n'.join([*export, install_cell()]).splitlines(True)
    return [*cells[:i], dict(first, source=source), *rest]


def main():
    for path in NOTEBOOKS:
        nb = json.loads(path.read_text(encoding='utf-8'))
        nb['cells'] = with_install_cell(nb['cells'])
        path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
