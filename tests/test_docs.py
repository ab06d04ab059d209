"The pages of the site, before Sphinx: everything has a page, and what is hidden in a notebook is not on it"
import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = [p.stem for p in sorted((ROOT/'nbs').glob('*.ipynb'))]


@pytest.fixture(scope='module')
def build():
    spec = importlib.util.spec_from_file_location('docs_build', ROOT/'docs'/'build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_is_in_the_contents(build):
    assert sorted(n for _, part in build.groups() for n in part) == NAMES


def test_hidden_cells_are_left_out(build):
    "Solutions and the install cell are not on a page; links are turned to the site's anchors"
    nb = json.loads((ROOT/'nbs'/'16_gap.ipynb').read_text(encoding='utf-8'))
    page = json.dumps(build.as_page(nb))
    assert '#| hide' in json.dumps(nb) and '#| hide' not in page and '%pip' not in page and 'crossfit_gaps' in page
    link = dict(cell_type='markdown', source=["[x](06_world_base.ipynb#The-pair's,-or-the-prompt's?)"])
    turned = build.as_page(dict(cells=[link]))['cells'][0]['source']
    assert turned == '[x](06_world_base.ipynb#the-pairs-or-the-prompts)'


@pytest.mark.parametrize('path', sorted((ROOT/'mpo_nb').glob('*.py')), ids=lambda p: p.stem)
def test_every_public_name_is_on_its_api_page(path, build):
    "With the comments beside its parameters [fails when only functions are written, and when signatures are cut]"
    if path.stem.startswith('_'): return
    page, tree = build.api_page(path.stem), ast.parse(path.read_text(encoding='utf-8'))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            assert f' {node.name}\n' in page or f'.{node.name}\n' in page, node.name


def test_shapes_and_units_are_on_the_page(build):
    page = build.api_page('losses')
    assert '# [B] log π(y_w|x), nats, summed over tokens' in page and '### DPOTrainer.' in build.api_page('dpo')
    assert 'torch.nn.functional' not in page            # signatures and docstrings, no bodies


def test_every_key_of_a_recipe_is_explained(build):
    from mpo_nb.keys import recipe_keys
    page = build.recipe_page()
    rows = [l for l in page.splitlines() if l.startswith('| `')]
    assert {k for k in recipe_keys()} <= {l.split('`')[1] for l in rows}
    assert all(l.count('|') - l.count('\\|') == 4 and len(l.split('|')[3].strip()) > 5 for l in rows)


def test_results_come_from_the_readme(build):
    page = build.results_page()
    assert page.startswith('# What we measured') and '](nbs/' not in page


def test_every_promise_names_tests_that_are_there():
    text = (ROOT/'docs'/'guarantees.md').read_text(encoding='utf-8')
    named = {*re.findall(r'`(test_\w+)`', text)}
    tests = [ast.parse(p.read_text(encoding='utf-8')) for p in (ROOT/'tests').glob('test_*.py')]
    there = {n.name for tree in tests for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert len(named) > 30 and named <= there


@pytest.mark.parametrize('path', sorted((ROOT/'docs').glob('g*.md')), ids=lambda p: p.stem)
def test_links_work_in_the_repository_and_on_the_site(path, build):
    text, links = path.read_text(encoding='utf-8'), lambda t: re.findall(r'\]\(([^)#:]+)\)', t)
    assert links(text) and not [l for l in links(text) if not (path.parent/l).is_file()]
    assert all((ROOT/l.replace('course/', 'nbs/')).is_file() for l in links(build.on_site(text)))
