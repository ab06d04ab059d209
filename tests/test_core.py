"Tools that everybody uses: files that only grow or are whole, printable texts, a light import"
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpo_nb.core import UserError, append_jsonl, file_lock, printable, read_json, read_jsonl, replacing

ROWS = [dict(i=0, text='plain'), dict(i=1, text='Maß 🙂 \ud83d'), dict(i=2, text='a\r\n\u2028b')]


def run(code, *args):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)


# ---- files that only grow

def test_rows_come_back_as_they_were(tmp_path):
    "Half a surrogate pair and every kind of line break [fails when the file is written as plain UTF-8]"
    path = tmp_path/'new'/'a.jsonl'
    assert read_jsonl(path) == []
    append_jsonl(path, ROWS[:1]); append_jsonl(path, ROWS[1:])
    assert read_jsonl(path) == ROWS and path.read_bytes().count(b'\n') == 3


def test_cut_anywhere_in_the_last_line_and_written_on(tmp_path):
    "[fails when the half line is left in, and when a line that lacks only its break is cut off]"
    path = tmp_path/'a.jsonl'
    append_jsonl(path, ROWS)
    whole = path.read_bytes()
    start = whole.rstrip(b'\n').rfind(b'\n') + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        known = ROWS if cut == len(whole) - 1 else ROWS[:2]
        assert read_jsonl(path) == known
        append_jsonl(path, [dict(i=9)])
        assert read_jsonl(path) == [*known, dict(i=9)] and path.read_bytes().endswith(b'\n{"i": 9}\n')


@pytest.mark.parametrize('line', [b'{"i": 1', b'[]', b'17', b'\xff\xfe', b'\0\0', b'{"j": 1}', b'{"i": "x"}',
                                  b'{"i": ' + b'['*100_000, b'{"i": ' + b'9'*5000 + b'}'], ids=lambda b: repr(b[:9]))
def test_damage_inside_is_an_error_with_its_line(tmp_path, line):
    def check(row):
        if row['i'] > 10: raise ValueError('too large')
    (tmp_path/'a.jsonl').write_bytes(b'{"i": 0}\n\n' + line + b'\n{"i": 2}\n')
    with pytest.raises(UserError, match=r'a\.jsonl, line 3, is not a count \(.+\): mend'):
        read_jsonl(tmp_path/'a.jsonl', check, 'a count')


def test_a_whole_last_line_that_is_unfit_is_an_error_too(tmp_path):
    "It isn't half of anything, so somebody wrote it [fails when any unfit last line is left out]"
    (tmp_path/'a.jsonl').write_bytes(b'{"i": 0}\n{"j": 0}')
    with pytest.raises(UserError, match="line 2, is not a JSON object .'i'"):
        read_jsonl(tmp_path/'a.jsonl', lambda r: r['i'])


FULL = '''
import resource, sys
from mpo_nb.core import append_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for n in (10, 1000): append_jsonl(sys.argv[1], [dict(n=n), dict(text="x"*n)])
'''

@pytest.mark.skipif(sys.platform == 'win32', reason='needs resource limits')
def test_a_full_disk_leaves_whole_calls_only(tmp_path):
    "[fails when what was written before the error stays]"
    p = run(FULL, tmp_path/'a.jsonl')
    assert p.returncode == 1 and 'OSError' in p.stderr
    assert (tmp_path/'a.jsonl').read_text() == '{"n": 10}\n{"text": "xxxxxxxxxx"}\n'


def test_rows_that_never_reach_the_disk_are_taken_back(tmp_path, monkeypatch):
    "[fails when nobody waits for the disk]"
    def fails(fd): raise OSError(5, 'Input/output error')
    append_jsonl(tmp_path/'a.jsonl', ROWS)
    monkeypatch.setattr(os, 'fsync', fails)
    with pytest.raises(OSError, match='Input/output'): append_jsonl(tmp_path/'a.jsonl', ROWS)
    assert read_jsonl(tmp_path/'a.jsonl') == ROWS


def test_rows_that_json_cannot_hold_write_nothing(tmp_path):
    for bad in ([dict(a=1), dict(a={1})], [dict(a=1), [2]]):
        with pytest.raises(TypeError): append_jsonl(tmp_path/'a.jsonl', bad)
    assert not (tmp_path/'a.jsonl').exists()


WRITER = '''
import sys
from mpo_nb.core import append_jsonl, read_jsonl
path, start = sys.argv[1:]
for i in range(int(start) if start else len(read_jsonl(path)), 10**9):
    append_jsonl(path, [dict(i=i, text="x"*(i % 7)*3000)])
    print(i, flush=True)
'''

def test_killed_at_random_moments_no_confirmed_row_is_lost(tmp_path):
    "SIGKILL ten times [fails when a row is confirmed before it is flushed, and when half a line stays]"
    path, rng, confirmed = tmp_path/'a.jsonl', random.Random(0), []
    for _ in range(10):
        with subprocess.Popen([sys.executable, '-c', WRITER, path, ''], stdout=subprocess.PIPE, text=True) as p:
            confirmed += [int(p.stdout.readline()) for _ in range(5)]
            time.sleep(rng.uniform(0, .01))
            os.kill(p.pid, signal.SIGKILL)
            confirmed += map(int, p.stdout.read().split())
        said = [r['i'] for r in read_jsonl(path)]
        assert said[:len(confirmed)] == confirmed and len(said) <= len(confirmed) + 1
        confirmed = said
    assert confirmed == list(range(len(confirmed))) and len(confirmed) >= 50


def _append_many(path, who):
    for i in range(50): append_jsonl(path, [dict(who=who, i=i, text='y'*20_000)])

def test_two_processes_append_whole_lines(tmp_path):
    "[fails without the lock: the one takes the other's row for half a line]"
    ctx = multiprocessing.get_context('spawn')
    ps = [ctx.Process(target=_append_many, args=(tmp_path/'a.jsonl', who)) for who in 'ab']
    for p in ps: p.start()
    for p in ps: p.join()
    rows = read_jsonl(tmp_path/'a.jsonl')
    assert [p.exitcode for p in ps] == [0, 0]
    assert all([r['i'] for r in rows if r['who'] == who] == list(range(50)) for who in 'ab')


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path/'a.jsonl'
    with file_lock(path):
        with pytest.raises(UserError, match='another process'):
            with file_lock(path): pass
        append_jsonl(path, ROWS, lock=False)
    append_jsonl(path, ROWS)
    assert read_jsonl(path) == ROWS*2


# ---- files that are whole or not there

@pytest.mark.parametrize('folder', [False, True])
@pytest.mark.parametrize('exists', [False, True])
@pytest.mark.parametrize('crash', [False, True])
def test_replacing(tmp_path, folder, exists, crash):
    def put(p, text):
        if folder: p.mkdir(); p = p/'f'
        p.write_text(text)
    target = tmp_path/'a'/'out'
    if exists: target.parent.mkdir(); put(target, 'old')
    try:
        with replacing(target) as new:
            assert new.parent.parent==target.parent
            put(new, 'new')
            if crash: raise KeyboardInterrupt
    except KeyboardInterrupt: pass
    text = (target/'f' if folder else target).read_text() if target.exists() else None
    assert text==(('old' if exists else None) if crash else 'new')
    assert [p.name for p in target.parent.iterdir()]==(['out'] if target.exists() else [])


def test_replacing_nothing_leaves_the_old(tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'d/f').write_text('old')
    with pytest.raises(FileNotFoundError, match='nothing was written'):
        with replacing(tmp_path/'d'): pass
    assert (tmp_path/'d/f').read_text()=='old'


def test_folder_is_put_back_when_the_rename_fails(tmp_path, monkeypatch):
    (tmp_path/'d').mkdir(); (tmp_path/'d/f').write_text('old')
    rename = Path.rename
    def fails_for_the_new(self, target):
        if self.name=='d' and Path(target)==tmp_path/'d': raise OSError('no')
        return rename(self, target)
    monkeypatch.setattr(Path, 'rename', fails_for_the_new)
    with pytest.raises(OSError, match='no'):
        with replacing(tmp_path/'d') as new: new.mkdir()
    assert (tmp_path/'d/f').read_text()=='old' and [p.name for p in tmp_path.iterdir()]==['d']


def test_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path/'out').write_text('old')
    code = (f"import os, signal\nfrom mpo_nb.core import replacing\nwith replacing({str(tmp_path/'out')!r}) as new:\n"
            f"    new.write_text('ne'); os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, '-c', code]).returncode==-9
    assert (tmp_path/'out').read_text()=='old'


# ---- messages

def test_printable_leaves_nothing_that_steers_a_terminal():
    texts = [chr(c) for c in [*range(0x20), *range(0x7f, 0xa0), 0x61c, 0x200e, 0x200f, *range(0x2028, 0x202f),
                              *range(0x2066, 0x206a), 0xd83d]]
    for c in texts:
        safe = printable(f'a{c}b')
        assert safe.startswith('a\\') and safe.isprintable() and safe.encode()
        assert printable(c, keep=c) == c
    for text in ('Maß 日本語 👩‍🔬 \\ é العربية', '', 'x' * 1000): assert printable(text) == text
    assert printable(17) == '17'


def test_a_user_error_is_printable():
    e = UserError('no column \x1b[2J\u202e: give\nprompt')
    assert str(e) == r'no column \x1b[2J\u202e: give\nprompt' and str(UserError()) == ''   # one line, too


def test_json_that_is_not_whole_is_one_sentence(tmp_path):
    for text in (b'', b'{"a": ', b'\xff', b'['*100_000):
        (tmp_path/'a.json').write_bytes(text)
        with pytest.raises(UserError, match=r'a\.json is not valid JSON'): read_json(tmp_path/'a.json')
    with pytest.raises(FileNotFoundError): read_json(tmp_path/'b.json')


def test_the_import_is_light():
    code = 'import sys, json, mpo_nb.core; print(json.dumps([*sys.modules]))'
    loaded = json.loads(run(code).stdout)
    assert not {'torch', 'datasets', 'pandas', 'numpy', 'transformers', 'pyarrow', 'matplotlib'} & set(loaded)
