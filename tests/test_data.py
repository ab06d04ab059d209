"""Preference data: every kind of bad input, the HH-RLHF and TL;DR contracts, the Hub path, conservation of rows
on the real files"""
import gzip, json, os, subprocess, sys, tracemalloc
from pathlib import Path

import datasets, pandas as pd, pytest
from datasets import Dataset, load_dataset

from mpo_nb import sources
from mpo_nb.core import UserError
from mpo_nb.data import load_preferences, save_preferences, split_by_prompt
from mpo_nb.pairing import TURN, comparison_pair, hh_pair, problem, split_dialogue, tldr_pair
from mpo_nb.sources import data_path, read_source

ROOT = Path(__file__).resolve().parent.parent
GOOD = dict(prompt='2+2?', chosen=' 4', rejected=' 5')
ASK = '\n\nHuman: Tell me.\n\nAssistant:'

def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows)+'\n', encoding='utf-8')
    return path

def fails(source, *words, **kwargs):
    "`source` raises a UserError of one sentence that holds all the words"
    with pytest.raises(UserError) as e: load_preferences(source, **kwargs)
    text = str(e.value)
    for w in words: assert w in text, (w, text)
    assert '\n' not in text and text.endswith('.') and len(text)<600, text

# --- files that cannot be used
# ---------------------------------------------------------------------------------------------

def test_missing_file(tmp_path):
    fails(tmp_path/'none.jsonl', 'none.jsonl', 'does not exist')
    fails(str(tmp_path/'none'), 'does not exist')
    fails('none.parquet', 'none.parquet', 'does not exist')

@pytest.mark.parametrize('name,content', [('a.jsonl', ''), ('a.jsonl', '\n \n'), ('a.json', ''), ('a.json', '[]'),
                                          ('a.csv', ''), ('a.csv', 'prompt,chosen,rejected\n')])
def test_empty_file(tmp_path, name, content):
    (tmp_path/name).write_text(content)
    fails(tmp_path/name, name, 'no rows')

def test_empty_parquet(tmp_path):
    pd.DataFrame(columns=['prompt', 'chosen', 'rejected']).to_parquet(tmp_path/'a.parquet')
    fails(tmp_path/'a.parquet', 'a.parquet', 'no rows')

def test_empty_folder(tmp_path): fails(tmp_path, tmp_path.name, 'no data files')

def test_one_empty_file_in_a_folder(tmp_path):
    write(tmp_path/'a.jsonl', [GOOD]), write(tmp_path/'deep/b.jsonl', [])
    fails(tmp_path, 'b.jsonl', 'no rows')

@pytest.mark.parametrize('line', ['{"prompt": "a", "cho', "{'prompt': 'a'}", 'hello', '{"prompt": "a",}'])
def test_broken_json_line_is_named(tmp_path, line):
    fails(write(tmp_path/'a.jsonl', [GOOD, '', line, GOOD]), 'a.jsonl', 'line 3', 'not valid JSON')

def test_broken_line_in_gz(tmp_path):
    (tmp_path/'a.jsonl.gz').write_bytes(gzip.compress((json.dumps(GOOD)+'\n{"x":').encode()))
    fails(tmp_path/'a.jsonl.gz', 'a.jsonl.gz', 'line 2')

@pytest.mark.parametrize('line', ['[1, 2]', '"text"', '3', 'null'])
def test_line_that_is_no_object(tmp_path, line):
    fails(write(tmp_path/'a.jsonl', [GOOD, line]), 'a.jsonl', 'line 2', 'not a JSON object')

def test_broken_json_file(tmp_path):
    fails(write(tmp_path/'a.json', ['[', json.dumps(GOOD)+',', '{"prompt": ', ']']), 'a.json', 'line 4',
          'not valid JSON')
    fails(write(tmp_path/'b.json', [json.dumps([GOOD, 3])]), 'b.json', 'item 2')
    fails(write(tmp_path/'c.json', [json.dumps(dict(prompt=['a'], chosen=['b'], rejected=['c']))]),
          'c.json', 'not a list')

def test_damaged_files(tmp_path):
    whole = gzip.compress((json.dumps(GOOD)*50).encode())
    (tmp_path/'cut.jsonl.gz').write_bytes(whole[:-10])
    (tmp_path/'flipped.jsonl.gz').write_bytes(whole[:10]+b'\xff'*10+whole[20:])
    (tmp_path/'plain.jsonl.gz').write_text('not gzip')
    (tmp_path/'latin.jsonl').write_bytes(b'{"prompt": "caf\xe9"}')
    (tmp_path/'no.parquet').write_text('not parquet')
    for f in sorted(tmp_path.iterdir()): fails(f, f.name, 'cannot be read')

def test_json_that_no_parser_takes(tmp_path):
    "Nested too deeply, and a number of 5,000 digits: one sentence, not a traceback"
    for i,value in enumerate(['['*100_000, '9'*5000]):
        for name in (f'{i}.jsonl', f'{i}.json'):
            (tmp_path/name).write_text('{"prompt": ' + value)
            fails(tmp_path/name, name, 'not valid JSON')

@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.csv.gz'])
def test_a_packed_file_may_not_fill_the_memory(tmp_path, monkeypatch, name):
    "It is refused while it is read, not after"
    (tmp_path/name).write_bytes(gzip.compress((b'prompt,chosen\n' if 'csv' in name else b'') + b' '*10**7))
    monkeypatch.setattr(sources, 'MAX_UNPACKED', 10**6)
    monkeypatch.setattr(sources, 'MAX_LINE', 10**9)
    tracemalloc.start()
    fails(tmp_path/name, name, 'unpacks to more than 1 MB')
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()

def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'MAX_LINE', 10**5)
    write(tmp_path/'a.jsonl', [GOOD, 'x'*10**5])
    fails(tmp_path/'a.jsonl', 'a.jsonl, line 2', '100000 characters')

def test_a_name_twice(tmp_path):
    "Of two values under one name a parser would keep the last, without a word"
    write(tmp_path/'a.jsonl', [GOOD, '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}'])
    fails(tmp_path/'a.jsonl', 'a.jsonl, line 2', "'chosen' twice")
    (tmp_path/'a.csv').write_text('prompt,chosen,chosen,rejected\na,b,c,d\n')
    fails(tmp_path/'a.csv', 'a.csv', 'column chosen twice')

def test_an_object_without_fields_can_be_saved(tmp_path):
    "Parquet has no such type"
    pairs = load_preferences(write(tmp_path/'a.jsonl', [{**GOOD, 'info': {}}, {**GOOD, 'info': {'x': [{}]}}]))
    again = load_preferences(save_preferences(pairs, tmp_path/'b.parquet'))
    assert again['info'] == ['{}', '{"x": [{}]}']

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'a.jsonl')
    fails(tmp_path/'a.jsonl', 'neither a file nor a folder')

def test_a_name_that_no_file_can_have(tmp_path): fails(tmp_path/('x'*300 + '.jsonl'), 'does not exist')

def test_ragged_csv(tmp_path):
    (tmp_path/'a.csv').write_text('prompt,chosen,rejected\na,b,c\na,b,c,d\n')
    fails(tmp_path/'a.csv', 'a.csv', 'cannot be read', 'line 3')
    # pandas would take the first column for an index
    (tmp_path/'b.csv').write_text('prompt,chosen,rejected\na,b,c,d\ne,f,g,h\n')
    fails(tmp_path/'b.csv', 'b.csv', 'more fields')

def test_wrong_columns(tmp_path):
    fails(write(tmp_path/'a.jsonl', [dict(question='a', answer='b')]), 'a.jsonl', 'question, answer',
          'prompt, chosen and rejected')
    fails(write(tmp_path/'b.jsonl', [dict(prompt='a', chosen='b')]), 'b.jsonl', 'prompt, chosen')
    fails(write(tmp_path/'c.jsonl', [dict(chosen='no', rejected='dialogue')]), 'c.jsonl',
          'chosen, rejected', 'Assistant:')

def test_wrong_columns_in_a_folder_name_the_file(tmp_path):
    write(tmp_path/'a.jsonl', [GOOD]), write(tmp_path/'deep/b.jsonl', [dict(x=1)])
    fails(tmp_path, 'deep/b.jsonl', 'columns x')

def test_chat_messages(tmp_path):
    chat = [dict(role='user', content='a'), dict(role='assistant', content='b')]
    fails(write(tmp_path/'a.jsonl', [dict(prompt='a', chosen=chat, rejected=chat)]), 'a.jsonl', 'chat',
          'apply_chat_template')

def test_unknown_kind(tmp_path):
    (tmp_path/'a.txt').write_text('x')
    fails(tmp_path/'a.txt', 'a.txt', '.jsonl')

def test_all_rows_set_aside(tmp_path):
    fails(write(tmp_path/'a.jsonl',
                [{**GOOD, 'chosen':''}, {**GOOD, 'chosen':' 5'}, {**GOOD, 'rejected':' '}, {**GOOD, 'chosen':''}]),
          'a.jsonl', '4 set aside', '2 chosen is empty', 'row 1', '1 equal completions', 'row 2',
          '1 rejected is empty', 'row 3')

def test_split_and_subset_that_are_not_there(tmp_path):
    write(tmp_path/'x/test.jsonl', [GOOD])
    fails(tmp_path, 'train', 'x/test.jsonl', split='train')
    fails(tmp_path, 'folder y', 'one of x', subset='y')
    fails(tmp_path/'x/test.jsonl', 'one file', 'split', split='train')
    fails(tmp_path/'x/test.jsonl', 'one file', 'subset', subset='x')
    fails(tmp_path, 'max_rows', max_rows=0)

# --- rows that are set aside
# -----------------------------------------------------------------------------------------------

BAD = [({**GOOD, 'prompt':None}, 'prompt is missing'), (dict(prompt='a', chosen='b'), 'rejected is missing'),
       ({**GOOD, 'chosen':7}, 'chosen is not text'), ({**GOOD, 'rejected':['a']}, 'rejected is not text'),
       ({**GOOD, 'prompt':True}, 'prompt is not text'), ({**GOOD, 'prompt':' \n'}, 'prompt is empty'),
       ({**GOOD, 'chosen':''}, 'chosen is empty'), ({**GOOD, 'rejected':'\t'}, 'rejected is empty'),
       ({**GOOD, 'chosen':' 5'}, 'equal completions'),
       ({**GOOD, 'chosen':' 5 '}, 'equal completions'), ({**GOOD, 'chosen':'\ud800'}, 'chosen is not valid Unicode')]

@pytest.mark.parametrize('row,why', BAD)
def test_problem(row, why):
    assert problem(GOOD) is None
    assert problem(row)==why

def test_set_aside_with_reason_row_and_file(tmp_path):
    f = write(tmp_path/'a.jsonl', [GOOD, '', *(r for r,_ in BAD), {**GOOD, 'prompt':'last'}])
    kept, aside = load_preferences(f, aside=True)
    assert kept['prompt'][:]==['2+2?', 'last'] and kept['row'][:]==[1, len(BAD)+3]
    assert list(zip(aside['row'], aside['reason']))==[(n+3, why) for n,(_,why) in enumerate(BAD)]
    assert set(aside['file'])=={'a.jsonl'}
    assert set(load_preferences(f).column_names)=={'prompt', 'chosen', 'rejected', 'file', 'row'}

def test_invalid_unicode_is_set_aside_as_json_text(tmp_path):
    _, aside = load_preferences(write(tmp_path/'a.jsonl', [GOOD, {**GOOD, 'chosen':'\ud800'}]), aside=True)
    assert aside['chosen'][:]==['"\\ud800"']

def test_count_is_logged_in_one_line(tmp_path, caplog):
    f = write(tmp_path/'a.jsonl', [GOOD, {**GOOD, 'chosen':''}, {**GOOD, 'chosen':''}])
    load_preferences(f)
    (record,) = [r for r in caplog.records if r.name=='mpo_nb']
    assert (record.levelname=='WARNING' and record.getMessage()
            =='a.jsonl: 1 pairs kept, 2 set aside: 2 chosen is empty (first: row 2 of a.jsonl)')

def test_no_aside_is_an_empty_set(tmp_path):
    _, aside = load_preferences(write(tmp_path/'a.jsonl', [GOOD]), aside=True)
    assert len(aside)==0 and {'prompt', 'chosen', 'rejected', 'reason', 'file', 'row'} <= set(aside.column_names)

def test_further_columns_are_kept_in_place(tmp_path):
    rows = [{**GOOD, 'prompt':f'p{i}', 'score':i/2, 'meta':dict(id=i)} for i in range(20)]
    rows[3]['chosen'] = rows[3]['rejected']
    rows[5]['late'] = 'only here'
    ds = load_preferences(write(tmp_path/'a.jsonl', rows))
    for r in ds:
        source = rows[r['row']-1]
        assert (r['prompt'], r['score'], r['meta'],
                r['late']) == (source['prompt'], source['score'], source['meta'], source.get('late'))
    assert len(ds)==19

def test_mixed_types_of_a_further_column_become_json(tmp_path):
    ds = load_preferences(write(tmp_path/'a.jsonl', [{**GOOD, 'tag':1}, {**GOOD, 'tag':'x'}, {**GOOD, 'tag':None}]))
    assert ds['tag'][:]==['1', '"x"', None]

def test_texts_are_untouched(tmp_path):
    row = dict(prompt=' Q:\u2028\r\n é\U0001f600 <b>', chosen='A \n', rejected='  B\x00')
    assert {k:v for k,v in load_preferences(write(tmp_path/'a.jsonl', [row]))[0].items() if k in row}==row

@pytest.mark.parametrize('word', ['None', 'NA', 'null', '1', 'true'])
def test_csv_words_stay_text(tmp_path, word):
    pd.DataFrame([{**GOOD, 'chosen':word}]).to_csv(tmp_path/'a.csv', index=False)
    assert load_preferences(tmp_path/'a.csv')['chosen'][:]==[word]

def test_csv_short_row_is_set_aside(tmp_path):
    (tmp_path/'a.csv').write_text('prompt,chosen,rejected\na,b,c\na,b\n')
    kept, aside = load_preferences(tmp_path/'a.csv', aside=True)
    assert len(kept)==1 and list(zip(aside['row'], aside['reason'])) == [(2, 'rejected is empty')]

# --- kinds of file
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.csv', 'a.csv.gz', 'a.parquet'])
def test_save_and_load(tmp_path, name):
    ds = Dataset.from_list([dict(prompt=f'Frage, "{i}"\n/é', chosen=f' ja {i}', rejected=' nein', gap=i/4)
                            for i in range(5)]).select([3,1,4])
    back = load_preferences(save_preferences(ds, tmp_path/name))
    assert [{k:r[k] for k in ds.column_names} for r in back]==ds.to_list()

def test_source_of_a_saved_set_survives(tmp_path):
    first = load_preferences(write(tmp_path/'a.jsonl', [{**GOOD, 'chosen':''}, GOOD]))
    again = load_preferences(save_preferences(first, tmp_path/'b.jsonl'))
    assert (again['file'][0], again['row'][0])==('a.jsonl', 2)

def test_json_kinds(tmp_path):
    for i,text in enumerate([json.dumps([GOOD, GOOD], indent=1), json.dumps(GOOD)+'\n'+json.dumps(GOOD),
                             '\ufeff'+json.dumps([GOOD, GOOD])]):
        (tmp_path/f'{i}.json').write_text(text, encoding='utf-8')
        assert len(load_preferences(tmp_path/f'{i}.json'))==2, i
    (tmp_path/'one.json').write_text(json.dumps(GOOD))
    assert len(load_preferences(tmp_path/'one.json'))==1

def test_folder(tmp_path):
    (write(tmp_path/'x/train.jsonl', [GOOD]), write(tmp_path/'x/test.jsonl', [GOOD, {**GOOD, 'chosen':''}]),
     write(tmp_path/'train-00001.jsonl', [dict(chosen=f'{ASK} a', rejected=f'{ASK} b')]))
    (write(tmp_path/'.hidden/a.jsonl', ['broken']), write(tmp_path/'dataset_infos.json', ['{}']),
     (tmp_path/'notes.txt').write_text('x'))
    ds, aside = load_preferences(tmp_path, aside=True)
    assert (sorted(zip(ds['file'], ds['subset'], ds['row']))
            ==[('train-00001.jsonl', '', 1), ('x/test.jsonl', 'x', 1), ('x/train.jsonl', 'x', 1)])
    assert (aside['file'][0], aside['row'][0])==('x/test.jsonl', 2)
    assert set(load_preferences(tmp_path, split='train')['file'])=={'train-00001.jsonl', 'x/train.jsonl'}
    assert set(load_preferences(tmp_path, subset='x')['file'])=={'x/test.jsonl', 'x/train.jsonl'}

def test_max_rows_is_spread_and_counts_rows_looked_at(tmp_path):
    f = write(tmp_path/'a.jsonl', [{**GOOD, 'prompt':str(i), 'chosen':'' if i%4==0 else ' 4'} for i in range(100)])
    kept, aside = load_preferences(f, max_rows=20, aside=True)
    assert len(kept)+len(aside)==20
    rows = sorted([*kept['row'], *aside['row']])
    assert rows[0]<=5 and rows[-1]>=95 and max(b-a for a,b in zip(rows, rows[1:]))==5
    assert len(load_preferences(f, max_rows=1000))==75

# --- HH-RLHF (known defects 57, 58)
# ------------------------------------------------------------------------------------------

def test_multi_turn_prompt_ends_at_the_last_shared_turn():
    head = f'{ASK} About what?\n\nHuman: Bees.\n\nAssistant:'
    new, why = hh_pair(dict(chosen=f'{head} They dance.', rejected=f'{head} They hum.', id=3))
    assert why is None and new==dict(prompt=head, chosen=' They dance.', rejected=' They hum.', id=3)

@pytest.mark.parametrize('chosen,rejected', [
    (f'{ASK} a\n\nHuman: x\n\nAssistant: b', f'{ASK} c\n\nHuman: x\n\nAssistant: d'),  # an earlier answer differs
    (f'{ASK} a\n\nHuman: x\n\nAssistant: b', f'{ASK} a\n\nHuman: y\n\nAssistant: b'),  # an earlier question differs
    ('\n\nHuman: x\n\nAssistant: b', '\n\nHuman: y\n\nAssistant: c'),                    # nothing is shared
    (f'{ASK} a', f'{ASK} a\n\nHuman: x\n\nAssistant: d')])                               # one is longer by a turn
def test_prompts_that_differ(chosen, rejected):
    row = dict(chosen=chosen, rejected=rejected)
    assert hh_pair(row)==(row, 'prompts differ')

@pytest.mark.parametrize('chosen,rejected,why', [
    (ASK, f'{ASK} b', 'chosen is empty'), (f'{ASK} b', f'{ASK} ', 'rejected is empty'),
    (f'{ASK} b', f'{ASK} b', 'equal completions'), (f'{ASK} b', f'{ASK} b\n', 'equal completions'),
    ('', f'{ASK} b', 'chosen is empty'), (f'{ASK} b', None, 'rejected is missing'),
    (3, f'{ASK} b', 'chosen is not text'), ('x', f'{ASK} b', 'no Assistant turn')])
def test_hh_rows_set_aside(chosen, rejected, why): assert hh_pair(dict(chosen=chosen, rejected=rejected))[1]==why

@pytest.mark.parametrize('a,b,why', [('Paris ', 'London', None), ('The sky', 'The sky is blue', None),
                                     ('Same', 'Same', 'equal completions'), ('', '', 'equal completions')])
def test_answers_that_begin_alike_or_are_equal(a, b, why, tmp_path):
    assert split_dialogue(ASK+a, ASK+b)==(ASK, a, b)
    new, reason = hh_pair(dict(chosen=ASK+a, rejected=ASK+b))
    assert reason==why
    if not why: assert (new['prompt'], new['chosen'], new['rejected'])==(ASK, a, b)
    f = write(tmp_path/'a.jsonl', [dict(prompt='Q', chosen=a, rejected=b), GOOD])  # the same with an explicit prompt
    kept, aside = load_preferences(f, aside=True)
    assert (kept['chosen'][0], kept['rejected'][0])==(a, b) if not why else aside['row'][:]==[1]

# --- TL;DR (known defect 59)
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('prompt',
                         ['SUBREDDIT: a TITLE: b POST: c', 'SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: c\n\nTL;DR:',
                          'SUBREDDIT: a POST: c \n', 'Sum up. TL;DR: '])
@pytest.mark.parametrize('text', ['TL;DR:  cat', ' cat', 'cat', '\n cat', ' TL;DR: cat', 'TL;DR:cat'])
def test_tldr_contract(tmp_path, prompt, text):
    ds = load_preferences(write(tmp_path/'a.jsonl', [dict(prompt=prompt, chosen=text, rejected=' dog ')]))
    assert (ds['prompt'][0].endswith('TL;DR:') and ds['prompt'][0].count('TL;DR:')==1
            and ds['prompt'][0].startswith(prompt.rstrip()))
    assert (ds['chosen'][0], ds['rejected'][0])==(' cat', ' dog ')

def test_tldr_set_aside():
    post = 'SUBREDDIT: a POST: c'
    assert tldr_pair(dict(prompt=post, chosen='TL;DR: ', rejected='b'))[1]=='chosen is empty'
    assert tldr_pair(dict(prompt=post, chosen='TL;DR: b', rejected=' b'))[1]=='equal completions'

INFO = dict(id='t3_1', post='c', title='b', subreddit='a', site=None, article=None)
def compared(**kw): return {**dict(info=INFO, summaries=[dict(text=' x'), dict(text=' y')], choice=1, worker='w'), **kw}

@pytest.mark.parametrize('row,why', [(compared(), None), (compared(choice=2), 'choice is not one of two summaries'),
                                     (compared(choice=None), 'choice is not one of two summaries'),
    (compared(summaries=[dict(text='x')]), 'choice is not one of two summaries'),
    (compared(summaries='xy'), 'choice is not one of two summaries'),
    (compared(info={**INFO, 'post':None, 'article':'news'}), 'no Reddit post'),
    (compared(info='x'), 'no Reddit post'),
    (compared(summaries=[dict(text=' x'), dict(text='x')]), 'equal completions'),
    (compared(summaries=[dict(text=' x'), {}]), 'chosen is missing')])
def test_openai_comparisons(row, why):
    new, reason = comparison_pair(row)
    assert reason==why
    if why: assert new==row
    else:
        assert new=={**row, 'prompt':'SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: c\n\nTL;DR:', 'chosen':' y', 'rejected':' x'}

# --- the Hub (no network here: load_dataset is replaced, or given a local repository)
# -----------------------------------------

@pytest.fixture
def hub(monkeypatch):
    calls = []
    def fake(path, **kw):
        calls.append((path, {k:v for k,v in kw.items() if v is not None}))
        if path=='Anthropic/hh-rlhf':
            return Dataset.from_list([dict(chosen=f'{ASK} a', rejected=f'{ASK} b'),
                                      dict(chosen=ASK, rejected=f'{ASK} b')])
        if path=='openai/summarize_from_feedback': return Dataset.from_list([compared()])
        if path=='some/empty': return Dataset.from_list([])
        if path=='some/pairs': return Dataset.from_list([GOOD])
        if path=='trl-lib/tldr-preference':
            return Dataset.from_list([dict(prompt='SUBREDDIT: r/a\n\nTL;DR:', chosen=' x', rejected=' y')])
        raise datasets.exceptions.DatasetNotFoundError(
            f"Dataset '{path}' doesn't exist on the Hub\nor cannot be accessed")
    monkeypatch.setattr(datasets, 'load_dataset', fake)
    monkeypatch.delenv('MPO_NB_DATA', raising=False)
    return calls

def test_hub_sources(hub):
    kept, aside = load_preferences('hh-rlhf', aside=True)
    assert (kept['prompt'][0], kept['chosen'][0], kept['file'][0]) == (ASK, ' a', 'Anthropic/hh-rlhf/train')
    assert (aside['reason'][0], aside['row'][0], aside['chosen'][0]) == ('chosen is empty', 2, ASK)
    load_preferences('hh-rlhf', split='test', subset='helpful-base')
    assert load_preferences('tldr', split='validation')['chosen'][:]==[' x']
    assert load_preferences('openai/summarize_from_feedback')['chosen'][:]==[' y']
    load_preferences('some/pairs', subset='cfg', split='train[:1%]')
    assert hub==[('Anthropic/hh-rlhf', dict(split='train')),
                 ('Anthropic/hh-rlhf', dict(split='test', data_dir='helpful-base')),
                 ('trl-lib/tldr-preference', dict(split='validation')),
                 ('openai/summarize_from_feedback',
                  dict(split='train', data_dir='comparisons', revision='refs/convert/parquet')),
                 ('some/pairs', dict(split='train[:1%]', name='cfg'))]

def test_hub_never_asks_to_trust_remote_code(hub):
    load_preferences('hh-rlhf'); load_preferences('some/pairs')
    assert not any('trust_remote_code' in kw for _,kw in hub)

def test_hub_errors(hub):
    fails('no/such', 'no/such', 'DatasetNotFoundError', "doesn't exist")
    fails('tlrd', 'tlrd', 'no file or folder here')
    fails('some/empty', 'some/empty', 'no rows')

def test_local_copy_stands_in_for_the_hub(hub, tmp_path, monkeypatch):
    write(tmp_path/'hh-rlhf/x/test.jsonl', [dict(chosen=f'{ASK} a', rejected=f'{ASK} b')])
    monkeypatch.setenv('MPO_NB_DATA', str(tmp_path))
    assert load_preferences('hh-rlhf')['file'][:]==['x/test.jsonl'] and not hub
    load_preferences('tldr')
    assert hub  # no copy of this one

def test_openai_repository_layout(tmp_path, monkeypatch):
    "The layout of the Hub's parquet conversion, read by the real `load_dataset` with our arguments"
    for split in ('train', 'validation'):
        (tmp_path/'repo/comparisons'/split).mkdir(parents=True)
        Dataset.from_list([compared(split=split)]).to_pandas().to_parquet(
            tmp_path/'repo/comparisons'/split/'0000.parquet')
    real = load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', lambda path, revision=None,
                        **kw: real(str(tmp_path/'repo'), cache_dir=tmp_path/'cache', **kw))
    assert load_preferences('openai/summarize_from_feedback', split='validation')['split'][:]==['validation']

# --- splits
# ------------------------------------------------------------------------------------------------------------------

def many(n=400, share=80):
    return Dataset.from_list([dict(prompt=f'p{i%share}', chosen=f' {i}', rejected=' x', id=i) for i in range(n)])

def test_no_prompt_in_two_splits():
    parts = split_by_prompt(many(), test=.25, valid=.25)
    assert list(parts)==['train', 'valid', 'test']
    sets = [set(p['prompt']) for p in parts.values()]
    assert not sets[0]&sets[1] and not sets[0]&sets[2] and not sets[1]&sets[2]
    assert sorted(i for p in parts.values() for i in p['id'])==list(range(400))

def test_split_sizes(): assert abs(len(split_by_prompt(many(5000, 5000), test=.2)['test'])-1000) < 100

def test_split_depends_on_prompt_and_seed_only():
    ds, test = many(), set(split_by_prompt(many(), test=.2)['test']['prompt'])
    assert set(split_by_prompt(ds.shuffle(seed=1), test=.2, valid=.3)['test']['prompt'])==test
    assert set(split_by_prompt(ds, test=.2, seed=1)['test']['prompt'])!=test
    assert set(split_by_prompt(ds.select(range(40)), test=.2)['test']['prompt'])==test & {f'p{i}' for i in range(40)}
    assert list(split_by_prompt(ds, test=.2))==['train', 'test']

def test_split_is_the_same_in_another_process():
    code = ("from datasets import Dataset; from mpo_nb.data import split_by_prompt; "
            "print(*split_by_prompt(Dataset.from_dict({'prompt':[f'p{i}' for i in "
            "range(40)]}), test=.3)['test']['prompt'])")
    outs = [subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED':h}, capture_output=True,
                           text=True, check=True).stdout for h in '12']
    assert outs[0]==outs[1] and 3<len(outs[0].split())<25

@pytest.mark.parametrize('kw,word', [(dict(test=1.0), 'less than 1'), (dict(test=.6, valid=.5), 'less than 1'),
                                     (dict(test=-.1), 'less than 1'), (dict(test=1e-9), 'test would be empty')])
def test_split_errors(kw, word):
    with pytest.raises(UserError, match=word): split_by_prompt(many(), **kw)

# --- saving
# ----------------------------------------------------------------------------------------------------------------------

def test_failed_save_overwrites_nothing(tmp_path, monkeypatch):
    def full_disk(df, path, **kw):
        Path(path).write_text('half')
        raise OSError('No space left on device')
    monkeypatch.setattr(pd.DataFrame, 'to_parquet', full_disk)
    f = write(tmp_path/'a.parquet', ['old'])
    with pytest.raises(OSError, match='No space'): save_preferences(Dataset.from_list([GOOD]), f)
    assert f.read_text()=='old\n' and list(tmp_path.iterdir())==[f]

# --- the real files
# ----------------------------------------------------------------------------------------------------------

def real(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = data_path(name)
    if path is None: pytest.skip(f'{name} is not on this machine: set MPO_NB_DATA to the folder that holds it')
    return path

@pytest.mark.parametrize('name,n', [('hh-rlhf', 2312+2354+1137), ('tldr', 8164)])
def test_real_rows_are_conserved(name, n, monkeypatch):
    path = real(name, monkeypatch)
    kept, aside = load_preferences(path, aside=True)
    source = {(f,i):r for f,rows in read_source(path).items() for i,r in rows}
    assert len(kept)+len(aside)==n==len(source)
    assert {*zip(kept['file'], kept['row']), *zip(aside['file'], aside['row'])}==set(source)
    assert len(aside)<.01*n and not set(aside['reason'])-{'prompts differ', 'equal completions', 'chosen is empty',
                                                          'rejected is empty'}

def test_real_hh(monkeypatch):
    path = real('hh-rlhf', monkeypatch)
    kept, aside = load_preferences(path, aside=True)
    source = {(f,i):r for f,rows in read_source(path).items() for i,r in rows}
    assert set(kept['subset'])=={'harmless-base', 'helpful-base', 'helpful-online'}
    for r in kept:
        row = source[r['file'], r['row']]
        assert (r['prompt'].endswith(TURN) and r['prompt']+r['chosen']==row['chosen']
                and r['prompt']+r['rejected']==row['rejected'])
        assert r['prompt']==row['chosen'][:row['chosen'].rindex(TURN)
                                          +len(TURN)]==row['rejected'][:row['rejected'].rindex(TURN)+len(TURN)]
        assert (r['chosen'][0]==r['rejected'][0]==' ' and r['chosen'].strip() and r['rejected'].strip()
                and r['chosen'].strip()!=r['rejected'].strip())
    for r in aside:  # the reason, found another way: the texts after the last turn
        (p,c), (q,d) = ((t[:t.rindex(TURN)], t[t.rindex(TURN)+len(TURN):].strip())
                        for t in (r['chosen'], r['rejected']))
        assert r['reason']==('prompts differ' if p!=q else 'equal completions' if c==d else 'chosen is empty' if not c
                             else 'rejected is empty'), (r['file'], r['row'])

def test_real_tldr(monkeypatch):
    ds = load_preferences(real('tldr', monkeypatch))
    assert all(p.endswith('\n\nTL;DR:') and p.count('TL;DR:')==1 for p in ds['prompt']) and len(set(ds['prompt']))==1323
    assert all(c[0]==' ' and not c[1].isspace() and 'TL;DR:' not in c[:9] for k in ('chosen', 'rejected')
               for c in ds[k])
    parts = split_by_prompt(ds, test=.1, valid=.1)
    assert sum(len(set(p['prompt'])) for p in parts.values())==1323 and .05<len(set(parts['test']['prompt']))/1323<.15

@pytest.mark.parametrize('name', ['02_sources', '03_pairing', '04_data'])
def test_notebook_runs_without_the_real_data(name, tmp_path):
    "A user's clone has no shared/data: the cells that need it show nothing, and the notebook passes"
    code = (f"from nbdev.test import test_nb as run; ok, "
            f"seconds = run({str(ROOT/'nbs'/f'{name}.ipynb')!r}); raise SystemExit(not ok)")
    p = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'MPO_NB_DATA':str(tmp_path/'none')}, cwd=ROOT,
                       capture_output=True, text=True)
    assert p.returncode==0, p.stdout[-2000:]+p.stderr[-2000:]
