"""Whatever stands in a file, a recipe, a command line or a judge's reply: the promised result, or one sentence.

Each test makes FUZZ examples (the quick ones ten times as many), always the same 10 unless the environment says how
many; `make fuzz` makes thousands, others each time."""
import contextlib
import gzip
import io
import json
import os
import time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from mpo_nb.asking import Unreadable, read_verdict
from mpo_nb.cli import COMMANDS, main
from mpo_nb.core import UserError, encodable, printable
from mpo_nb.data import load_preferences, save_preferences
from mpo_nb.keys import recipe_keys

N = int(os.environ.get('FUZZ', 10))
settings.register_profile('fuzz', max_examples=N, deadline=None, derandomize='FUZZ' not in os.environ, database=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile('fuzz')
many = settings(max_examples=10*N)
SECONDS = 20   # that no example may take: a hang, also on a busy machine

# ---- what may stand anywhere

NASTY = ['', ' ', '\0', '\x1b[31mred', '\x9b2J', '\ud800', '\ufeff', '\ufeff=1+1', '＝1', '=cmd|x', '@a', '\u202eback',
         '\r', '\n\n', '\u2028', '9'*5000, '1e999', 'nan', '-inf', 'null', '[', '{'*50, '<script>alert(1)</script>',
         "'; drop", '%s%n', '{}', '../../x', '/dev/null', '~', 'x'*300, '\n\nAssistant:', 'TL;DR:', '&a', '*a', '!!x',
         '- ', '"', "'", '\\', '\t', '#', ': ', 'é', '😀']
texts = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=()), max_size=20),
                  st.text('abc \n', min_size=1, max_size=12))
numbers = st.one_of(st.integers(), st.sampled_from([10**30, -1, 0, 1, 2**63]), st.floats())
scalars = st.one_of(st.none(), st.booleans(), numbers, numbers, texts)
values = st.recursive(scalars, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(texts, v, max_size=3)),
                      max_leaves=6)
names = st.one_of(st.sampled_from(['prompt', 'chosen', 'rejected', 'file', 'row', 'reason', 'subset']), texts)


good = st.text('abc é<&|', min_size=1, max_size=8).map(lambda t: t + '.')

def rows_of(*columns):
    "Rows that have the columns, most with text in them, and may have others or lack some"
    row = st.fixed_dictionaries({c: st.one_of(good, good, good, texts, values) for c in columns})
    whole = st.builds(lambda r, more: {**more, **r}, row, st.dictionaries(names, values, max_size=2))
    other = st.dictionaries(names, values, max_size=3)
    return st.lists(st.one_of(whole, whole, whole, other), min_size=1, max_size=4)

@st.composite
def completions(draw):
    "Two policies' answers to two prompts, with scores; most tables are whole"
    text, score = st.one_of(good, good, texts), draw(st.sampled_from([st.floats(-9, 9), st.floats(), scalars, values]))
    prompts, policies = draw(st.lists(text, min_size=2, max_size=2)), draw(st.lists(text, min_size=2, max_size=2))
    rows = [dict(prompt=p, policy=q, completion=draw(text), score=draw(score)) for p in prompts for q in policies]
    known = st.sampled_from(['kl', 'length', 'ended', 'reference', 'prompt_id', 'judge'])
    more = draw(st.dictionaries(st.one_of(known, texts), values, max_size=2))
    return [{**r, **more} for r in rows][:draw(st.sampled_from([4, 4, 4, 4, 3, 1]))]


def deep(n): return '['*n + ']'*n


@st.composite
def damages(draw):
    "A function of bytes: nothing, a cut, a byte changed, something put between"
    kind, at = draw(st.sampled_from(['none', 'none', 'none', 'cut', 'flip', 'put'])), draw(st.floats(0, .999))
    put = draw(st.one_of(st.binary(max_size=4), st.sampled_from([b'\xff\xfe', b'\xef\xbb\xbf', b'\r', b'\0',
                                                                 deep(2000).encode(), b'"', b'\n', b',,,'])))
    def damage(data):
        i = int(at*len(data))
        return {'none': data, 'cut': data[:i], 'put': data[:i] + put + data[i:],
                'flip': data[:i] + bytes([data[i] ^ 255 if data else 0]) + data[i+1:] if data else data}[kind]
    return damage


def as_bytes(rows, kind):
    "The rows as a file of this kind; None where it cannot hold them"
    out = io.BytesIO()
    try:
        if kind == 'parquet': pq.write_table(pa.Table.from_pylist(rows), out)
        elif kind == 'csv': out.write(pd.DataFrame(rows).to_csv(index=False).encode('utf-8', 'surrogatepass'))
        else:
            lines = [json.dumps(r, ensure_ascii=False) for r in rows]
            text = '\n'.join(lines) if kind == 'jsonl' else f'[{",".join(lines)}]'
            out.write(text.encode('utf-8', 'surrogatepass'))
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError): return None
    return out.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    "A new folder, where the test also stands"
    monkeypatch.chdir(new := tmp_path_factory.mktemp('fuzz'))
    return new

@contextlib.contextmanager
def in_time():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS

def one_sentence(text):
    "Not empty, one line, nothing in it that a terminal would obey"
    assert text.strip() and len(text.strip().splitlines()) == 1 and printable(text.strip()) == text.strip(), text

def outcome(argv):
    "Exit code and output of `mpo`; one sentence on stderr where the code is 2"
    out, err = io.StringIO(), io.StringIO()
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main(argv)
    assert code in (0, 2)
    if code: one_sentence(err.getvalue()); assert err.getvalue().startswith('mpo: ')
    return code, out.getvalue()


# ---- data files

@many
@given(rows=rows_of('prompt', 'chosen', 'rejected'), kind=st.sampled_from(['jsonl', 'json', 'csv', 'parquet']),
       zipped=st.booleans(), damage=damages(), to=st.sampled_from(['jsonl', 'csv', 'parquet']))
def test_any_data_file(folder, rows, kind, zipped, damage, to):
    "Pairs with text in their three fields, which are the same when they are saved and loaded again, or one sentence"
    if (data := as_bytes(rows, kind)) is None: return
    data, gz = damage(data), '.gz' if zipped and kind != 'parquet' else ''
    path = folder/f'rows.{kind}{gz}'
    path.write_bytes(gzip.compress(data) if gz else data)
    try:
        with in_time(): pairs, aside = load_preferences(path, aside=True)
    except UserError as e: return one_sentence(str(e))
    assert all(r[k].strip() for r in pairs for k in ('prompt', 'chosen', 'rejected')) and all(aside['reason'])
    fields = ['prompt', 'chosen', 'rejected']
    again = load_preferences(save_preferences(pairs, folder/f'saved.{to}'))
    assert [[r[k] for k in fields] for r in again] == [[r[k] for k in fields] for r in pairs]


# ---- recipes and command lines

KEYS = sorted(recipe_keys())
plain = st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(texts, scalars, max_size=2))
below = st.sampled_from(['policies.mpo.kl_coef', 'gap.sets.a.like', 'variants', 'model.size.layers'])
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), below, texts)

def nested(flat):
    "{'dpo.beta': 1} as {'dpo': {'beta': 1}}"
    out = {}
    for k, v in flat.items():
        *path, last = k.split('.')
        d = out
        for p in path: d = d.setdefault(p, {}) if isinstance(d.setdefault(p, {}), dict) else {}
        d[last] = v
    return out

def print_config(argv, folder):
    "A recipe that is accepted prints as one that is accepted, and prints the same"
    code, printed = outcome(['run', *argv, '--print_config'])
    if code: return
    again = folder/'again.yaml'
    again.write_text(printed)
    assert outcome(['run', str(again), '--print_config']) == (0, printed)

@given(flat=st.dictionaries(keys, plain, max_size=3), damage=damages())
def test_any_recipe(folder, flat, damage):
    "Its values, all of them, or one sentence"
    try: text = yaml.safe_dump(nested(flat), allow_unicode=True)
    except yaml.YAMLError: return
    path = folder/'recipe.yaml'
    path.write_bytes(damage(text.encode('utf-8', 'surrogatepass')))
    print_config([str(path)], folder)

@given(options=st.lists(st.tuples(keys, plain), max_size=3), equals=st.booleans())
def test_any_command_line(folder, options, equals):
    "The shipped recipe with the values that were given, or one sentence"
    written = lambda v: v if isinstance(v, str) else json.dumps(v)
    pairs = [(f'--{k}', written(v)) for k, v in options]
    given = [f'{k}={v}' for k, v in pairs] if equals else [x for p in pairs for x in p]
    print_config(['toy', *given], folder)

words = st.sampled_from([*COMMANDS, '--help', '-h', '--redo', '--seeds', '--jobs'])

@many
@given(words=st.lists(st.one_of(texts, words), max_size=3))
def test_any_words(words):
    "What is no command, no file and no option is one sentence"
    outcome(words)


# ---- judges, people, completions

marks = st.sampled_from(['[[A]]', '[[B]]', '[[tie]]', '[[a]] or [[b]]', '[[tıe]]', 'verdict:', 'Final verdict: ', '\n',
                         '**', '{"reason": "x", "verdict": "A"}', '{"verdict":', '```', '```json\n', 'A',
                         deep(3000), '[[A]] '*40])

@many
@given(reply=st.lists(st.one_of(marks, texts), max_size=8).map(''.join))
def test_any_reply_of_a_judge(reply):
    "A verdict and its reason, or `Unreadable`, in no time"
    try:
        with in_time(): verdict, reason = read_verdict(reply)
    except Unreadable as e: return one_sentence(str(e))
    assert verdict in ('A', 'B', 'tie') and isinstance(reason, str)

@given(rows=completions(), kind=st.sampled_from(['jsonl', 'json', 'csv', 'parquet']), damage=damages())
def test_any_completions(folder, rows, kind, damage):
    "A page that shows texts as texts, and a sheet for people, or one sentence"
    if (data := as_bytes(rows, kind)) is None: return
    path = folder/f'completions.{kind}'
    path.write_bytes(damage(data))
    code, _ = outcome(['eval', str(path), '--output_dir', str(folder/'eval')])
    if not code:
        for page in (folder/'eval').glob('*.html'): assert '<script>alert(' not in page.read_text(encoding='utf-8')
    (folder/'sheet.csv').unlink(missing_ok=True)   # of the example before
    outcome(['human', str(path), '--out', str(folder/'sheet.csv')])
    outcome(['judge', str(path), '--model', 'm', '--dry_run'])

said = st.one_of(st.sampled_from(['left', 'right', 'tie', 'both bad', 'skip', '', 'a', 'b', 'LEFT ']),
                 texts.map(encodable))

@given(verdicts=st.lists(said, min_size=2, max_size=2), reason=texts, damage=damages())
def test_any_votes(folder, verdicts, reason, damage):
    "Verdicts that `mpo eval` reads, or one sentence"
    rows = [dict(prompt=p, policy=q, completion=f'{q} to {p}') for p in ('a', 'b') for q in ('mpo', 'dpo')]
    (folder/'c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder/'sheet.csv').unlink(missing_ok=True)   # of the example before
    assert outcome(['human', 'c.jsonl', '--out', 'sheet.csv'])[0] == 0
    sheet = pd.read_csv(folder/'sheet.csv').astype(object).assign(verdict=verdicts, comment=encodable(reason))
    (folder/'sheet.csv').write_bytes(damage(encodable(sheet.to_csv(index=False)).encode()))
    code, _ = outcome(['human', 'c.jsonl', '--votes', 'sheet.csv', '--out', 'verdicts.csv'])
    if not code: assert outcome(['eval', 'c.jsonl', '--verdicts', 'verdicts.csv'])[0] == 0
