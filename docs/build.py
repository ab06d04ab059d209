"""Build the site: `make docs`, or `python docs/build.py [--out FOLDER]`

The pages are the executed notebooks, API pages made from the modules' source, the keys of a recipe, the help of the
command line, and README's results. Nothing is executed, and no page needs another host when it is read."""
import argparse
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTALL = '# On Colab this installs mpo_nb'
MATHJAX = 'tex-chtml.js', 'output/chtml/fonts'   # of a package, so that pages ask no other host for it


def groups():
    "README's table of notebooks: [(title of the group, [names])]"
    out = [('Tour', [])]
    for line in (ROOT/'README.md').read_text(encoding='utf-8').splitlines():
        if m := re.fullmatch(r'\| \| \*\*(.+)\*\* \| \| \|', line): out.append((m[1], []))
        if m := re.match(r'\| \[!.*\]\(nbs/(\w+)\.ipynb\) \|', line): out[-1][1].append(m[1])
    return out


def slug(anchor):
    "An anchor as Jupyter makes it, in the form that the site's have"
    return re.sub(r'[^\w\- ]', '', anchor.lower())


def as_page(nb):
    "A notebook without what is hidden: the install cell, solutions, and what only serves the tests"
    shown = lambda c: not ''.join(c['source']).startswith('#| hide') and INSTALL not in ''.join(c['source'])
    cells = [c for c in nb['cells'] if c['cell_type'] != 'code' or shown(c)]
    anchors = lambda text: re.sub(r'(\]\([^)\s]*#)([^)\s]+)\)', lambda m: f'{m[1]}{slug(m[2])})', text)
    text = lambda c: c | dict(source=anchors(''.join(c['source'])))
    return nb | dict(cells=[c if c['cell_type'] == 'code' else text(c) for c in cells])


def copy_mathjax(src):
    package = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax'
    for part in MATHJAX:
        to = src/'_static'/'mathjax'/part
        to.parent.mkdir(parents=True, exist_ok=True)
        if (package/part).is_dir(): shutil.copytree(package/part, to)
        else: shutil.copy(package/part, to)


def copy_notebooks(src):
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        to = src/'course'/path.relative_to(ROOT/'nbs')
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(as_page(json.loads(path.read_text(encoding='utf-8')))), encoding='utf-8')
    shutil.copytree(ROOT/'nbs'/'images', src/'course'/'images')


def head(node, lines):
    "A function as far as its docstring, with the comments beside its parameters; a class's fields"
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    if isinstance(node, ast.ClassDef):
        rows = [n for n in node.body if isinstance(n, (ast.AnnAssign, ast.Assign))]
        return lines[start:node.lineno] + [l for n in rows for l in lines[n.lineno - 1:n.end_lineno]]
    return lines[start:node.body[0].lineno - 1]


def entry(title, node, lines):
    "A heading, one level lower for a method, the signature as it is in the source, and the docstring"
    code = '\n'.join(head(node, lines))
    return f'##{"#"*("." in title)} {title}\n\n```python\n{code}\n```\n\n{ast.get_docstring(node) or ""}\n'


def patched_class(node):
    "The class that a `@patch`ed function grows, or None"
    if not any('patch' in ast.unparse(d) for d in node.decorator_list): return None
    return ast.unparse(node.args.args[0].annotation)


def is_public(name): return not name.startswith('_') or name in ('__init__', '__call__')


def api_page(name):
    "Public names of a module in the order of its notebook"
    text = (ROOT/'mpo_nb'/f'{name}.py').read_text(encoding='utf-8')
    tree, lines, out = ast.parse(text), text.splitlines(), []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not is_public(node.name): continue
        grown = patched_class(node)
        out.append(entry(f'{grown}.{node.name}' if grown else node.name, node, lines))
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and is_public(n.name)]
            out += [entry(f'{node.name}.{n.name}', n, lines) for n in methods]
    return f'# mpo_nb.{name}\n\n{ast.get_docstring(tree)}\n\n' + '\n'.join(out)


def write_api(src, notebooks):
    "A page for each notebook that is a module; the modules' names"
    (src/'api').mkdir()
    modules = {n.split('_', 1)[1]: n for n in notebooks}
    modules = {m: n for m, n in modules.items() if (ROOT/'mpo_nb'/f'{m}.py').is_file()}
    for name, notebook in modules.items():
        page = api_page(name).replace('\n\n', f'\n\n*Explained in [{notebook}](../course/{notebook}.ipynb).*\n\n', 1)
        (src/'api'/f'{name}.md').write_text(page, encoding='utf-8')
    return [*modules]


def key_rows(section, prefix):
    "Table rows of a section of the recipe"
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value): continue
        bound, default = f.metadata.get('bound'), json.dumps(value)
        text = f.metadata.get('help', '').replace('|', '\\|') + (f' (must be {bound.says})' if bound else '')
        yield f'| `{prefix}{f.name}` | `{default}` | {text} |'


def recipe_page():
    "Every key of a recipe with its default and its meaning; the shipped recipes and studies"
    from mpo_nb.keys import Recipe
    r, out = Recipe(), ['# Recipes\n\nEvery key can be given on the command line: `mpo run toy --dpo.beta 0.2`.\n']
    for title, section, prefix in [('Top', r, ''), *((f.name, getattr(r, f.name), f'{f.name}.') for f in fields(r)
                                                      if is_dataclass(getattr(r, f.name)))]:
        intro = '' if title == 'Top' else f'{type(section).__doc__}.\n\n'
        out.append('\n'.join([f'## {title}\n\n{intro}| key | default | meaning |', '|---|---|---|',
                              *key_rows(section, prefix)]))
    for kind in ('recipes', 'studies'):
        out.append(f'## Shipped {kind}\n')
        out += [f'### {p.name}\n\n```yaml\n{p.read_text(encoding="utf-8")}```\n'
                for p in sorted((ROOT/'mpo_nb'/kind).glob('*.yaml'))]
    return '\n\n'.join(out)


def help_of(*args):
    "What `mpo … --help` prints"
    command = [sys.executable, '-m', 'mpo_nb.cli', *args, '--help']
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f'```text\n{text.strip()}\n```\n'


def cli_page():
    from mpo_nb.cli import COMMANDS
    return '# The command line\n\n' + help_of() + '\n'.join(f'## mpo {c}\n\n{help_of(c)}' for c in COMMANDS)


def readme(start, end):
    "A part of the README, with its links turned to the site"
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    return text[text.index(start):text.index(end)].replace('](nbs/', '](course/')


def on_site(text):
    "A page of this folder, whose links work in the repository, with the links of the site"
    return text.replace('](../nbs/', '](course/')


def results_page(): return readme('## What we measured', '## What to expect')[1:]


def index_page():
    first = readme('# mpo_nb', '## Two commands').replace('(#what-we-measured)', '(results.md)')
    return first + (ROOT/'docs'/'start.md').read_text(encoding='utf-8')


def toctree(caption, entries):
    return f'\n```{{toctree}}\n:caption: {caption}\n:hidden:\n\n' + '\n'.join(entries) + '\n```\n'


def assemble(src):
    "All sources of the site"
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(ROOT/'docs', src, ignore=shutil.ignore_patterns('*.py', 'start.md', '__pycache__'))
    shutil.copy(ROOT/'docs'/'conf.py', src)
    for page in src.glob('*.md'): page.write_text(on_site(page.read_text(encoding='utf-8')), encoding='utf-8')
    copy_notebooks(src)
    course = groups()
    names = write_api(src, [n for _, part in course for n in part])
    for name, page in dict(index=index_page, recipes=recipe_page, cli=cli_page, results=results_page).items():
        (src/f'{name}.md').write_text(page(), encoding='utf-8')
    trees = [toctree(title, [f'course/{n}' for n in part]) for title, part in course]
    studies = sorted(p.stem for p in (ROOT/'nbs'/'studies').glob('*.ipynb'))
    trees += [toctree('Studies', ['results', *(f'course/studies/{n}' for n in studies)]),
              toctree('Reference', ['glossary', 'guarantees', 'recipes', 'cli', *(f'api/{n}' for n in names)])]
    with open(src/'index.md', 'a', encoding='utf-8') as f: f.write(''.join(trees))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=ROOT/'build'/'site')
    out = p.parse_args().out
    src = out.parent/f'{out.name}-src'
    assemble(src)
    copy_mathjax(src)
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', src, out]
    return subprocess.run(command).returncode


if __name__ == '__main__': sys.exit(main())
