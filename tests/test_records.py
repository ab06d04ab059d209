"""What a run folder holds is what its stages wrote: damage is named, nothing is mixed, `--redo` makes again [each test
names the breaks of the code that it was seen to fail for]"""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mpo_nb.cells import Shelf
from mpo_nb.core import UserError, damage, file_list, file_names, read_json, write_json
from mpo_nb.prepare import outside, source_hashes
from mpo_nb.progress import Progress, checkpoint_damage, last_checkpoint, mark_complete, watch
from mpo_nb.records import check_files, note_again, stage_record, verify
from mpo_nb.recipe import load_recipe
from mpo_nb.runs import Stage, Work, checkpoint_folder, made_from, run_table

# --- a run of three stages that takes no time: draw writes a number, double and total read it

def draw(work):
    write_json(work.out/'number.json', 4)
    write_json(work.out/'sub'/'more.json', 5)
    return {}

def double(work):
    write_json(work.run/'result.json', 2*read_json(work.run/'draw'/'number.json'))
    return {}

def total(work):
    write_json(work.out/'total.json', read_json(work.run/'result.json') + 1)
    return {}

TABLE = {s.name: s for s in (Stage('draw', draw, 50, sources=lambda r: source_hashes(r, 'data.source', 'model.name')),
                             Stage('double', double, 51, reads=('draw',), writes=('result.json',)),
                             Stage('total', total, 52, reads=('double',)))}

TOY = load_recipe('toy')   # reading a recipe takes longer than such a run

@pytest.fixture
def run(tmp_path):
    return run_table(recipe(tmp_path), TABLE, 'off')

def recipe(tmp_path, data=None, model=None):
    r = replace(TOY, output_dir=str(tmp_path/'run'))
    return replace(r, data=replace(r.data, source=data), model=replace(r.model, name=model))

def ids(run): return {n: stage_record(run, n)['id'] for n in TABLE}

def flip(path, at=-1):
    "One bit of a file, its size and time kept"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

DAMAGE = dict(
    flipped=('draw', 'draw/number.json', flip), nested=('draw', 'draw/sub/more.json', flip),
    missing=('draw', 'draw/number.json', Path.unlink), empty=('draw', 'draw/number.json', lambda p: p.write_text('')),
    beside=('double', 'result.json', flip), beside_missing=('double', 'result.json', Path.unlink),
    added=('draw', 'draw/adapter_config.json', lambda p: p.write_text('{}')),
    record_edited=('total', 'total/stage.json',
                   lambda p: p.write_text(p.read_text().replace('"seconds": 0', '"seconds": 9'))),
    record_cut=('double', 'double/stage.json', lambda p: p.write_text(p.read_text()[:90])),
    record_a_list=('draw', 'draw/stage.json', lambda p: p.write_text('[]')))

@pytest.mark.parametrize('kind', DAMAGE)
@pytest.mark.parametrize('unfinished', [False, True])
def test_damage_is_named_and_redo_mends_it(run, tmp_path, kind, unfinished):
    """In a finished run, and in one that has work left; nothing is written until `redo` names the stage, which makes it
    and what reads it again and nothing else [fails when files are compared by size only, when those that a stage wrote
    beside its folder don't count, when the record isn't sealed, and when redo takes only the stage itself]"""
    stage, file, do = DAMAGE[kind]
    before = ids(run)
    if unfinished and stage != 'total': shutil.rmtree(run/'total')
    do(run/file)
    held = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name != '.lock'}
    with pytest.raises(UserError) as e: run_table(recipe(tmp_path), TABLE, 'off')
    assert file in str(e.value) and f'`--redo {stage}`' in str(e.value) and '\n' not in str(e.value)
    assert held == {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name != '.lock'}
    run_table(recipe(tmp_path), TABLE, 'off', redo=[stage])
    now, made_again = ids(run), [*TABLE][[*TABLE].index(stage):]
    assert {n for n in TABLE if now[n] != before[n]} >= set(made_again)
    assert all(now[n] == before[n] for n in TABLE if n not in made_again)
    assert read_json(run/'total'/'total.json') == 9 and set(verify(run).values()) == {''}

def test_removing_the_folder_is_the_same(run, tmp_path):
    (run/'draw'/'number.json').unlink()
    shutil.rmtree(run/'draw')
    run_table(recipe(tmp_path), TABLE, 'off')
    assert set(verify(run).values()) == {''}

def test_hidden_files_of_the_system_do_not_count(run, tmp_path):
    (run/'draw'/'.DS_Store').write_text('x')
    assert file_names(run/'draw') == ['number.json', 'stage.json', 'sub/more.json']
    run_table(recipe(tmp_path), TABLE, 'off')

def test_redo_of_a_stage_there_is_not(run, tmp_path):
    with pytest.raises(UserError, match='`--redo dpo`: there is no such stage: there are draw, double, total'):
        run_table(recipe(tmp_path), TABLE, 'off', redo=['dpo'])

def test_an_old_record_without_a_list(run, tmp_path):
    "A folder of a version that kept no list is not taken for whole"
    write_json(run/'draw'/'stage.json', dict(seconds=1., key='x', id='y', inputs={}))
    with pytest.raises(UserError, match='older version'): run_table(recipe(tmp_path), TABLE, 'off')

# --- nothing is mixed

def test_redo_that_was_stopped(tmp_path):
    """All that reads the stage went with it, so the next start finds nothing of the old data [fails when `redo` takes
    only the stage itself away]"""
    (tmp_path/'a.jsonl').write_text('one')
    run_table(r := recipe(tmp_path, data=str(tmp_path/'a.jsonl')), TABLE, 'off')
    (tmp_path/'a.jsonl').write_text('other')
    def stopped(work): raise UserError('stopped')
    with pytest.raises(UserError, match='stage draw: stopped'):
        run_table(r, TABLE | dict(draw=replace(TABLE['draw'], function=stopped)), 'off', redo=['draw'])
    run_table(r, TABLE, 'off')
    assert set(verify(tmp_path/'run').values()) == {''}

@pytest.mark.parametrize('change', ['altered', 'added', 'gone'])
@pytest.mark.parametrize('key', ['data', 'model'])
def test_changed_inputs_are_named(tmp_path, key, change):
    """A file of the data, or of the model's folder, is another one when the run goes on: its size and time are the
    same [fails when sizes and times are compared, and when the model's folder isn't looked at]"""
    folder = tmp_path/'given'
    folder.mkdir()
    for name in ('a.jsonl', 'b.jsonl'): (folder/name).write_text('{"prompt": "1"}\n')
    r = recipe(tmp_path, **{key: str(folder)})
    run_table(r, TABLE, 'off')
    shutil.rmtree(tmp_path/'run'/'total')
    dict(altered=lambda: flip(folder/'b.jsonl', 12), added=lambda: (folder/'c.jsonl').write_text('x'),
         gone=lambda: (folder/'b.jsonl').unlink())[change]()
    from mpo_nb.prepare import hash_once
    hash_once.cache_clear()   # as in a new process
    name = f"{key}.{'source' if key == 'data' else 'name'}: {'c' if change == 'added' else 'b'}.jsonl"
    with pytest.raises(UserError, match=f'{name} has changed since stage draw was made.*`--redo draw`'):
        run_table(r, TABLE, 'off')
    run_table(r, TABLE, 'off', redo=['draw'])
    assert set(verify(tmp_path/'run').values()) == {''}

def test_changed_packages_are_named(run, tmp_path, monkeypatch):
    "Not where nothing is left to do [fails when only `environment.json` notes the versions]"
    from mpo_nb.records import versions
    monkeypatch.setattr('mpo_nb.runs.versions', lambda: versions() | dict(numpy='9.9'))
    run_table(recipe(tmp_path), TABLE, 'off')
    shutil.rmtree(run/'total')
    environment = (run/'environment.json').read_bytes()
    with pytest.raises(UserError, match='stage draw was made with numpy .*, and here is 9.9'):
        run_table(recipe(tmp_path), TABLE, 'off')
    assert environment == (run/'environment.json').read_bytes()

def test_another_device_is_the_same_version(run, tmp_path, monkeypatch):
    from mpo_nb.records import versions
    public = versions()['torch'].partition('+')[0]
    monkeypatch.setattr('mpo_nb.runs.versions', lambda: versions() | dict(torch=f'{public}+cu128'))
    shutil.rmtree(run/'total')
    run_table(recipe(tmp_path), TABLE, 'off')

def test_a_model_that_is_a_stage_of_another_run(run):
    "[fails when only the run's own folder is compared]"
    assert outside(str(run/'draw')) == run/'draw'
    flip(run/'draw'/'number.json')
    with pytest.raises(UserError, match='number.json was altered'): outside(str(run/'draw'))

def test_shelf(run, tmp_path, monkeypatch):
    "What a study keeps is compared before a cell gets it, and not shared with other packages [fails without either]"
    stage, shelf = TABLE['double'], Shelf(tmp_path/'store')
    shelf.keep(run, stage)
    inputs = stage_record(run, 'double')['inputs']
    assert shelf.fetch(tmp_path/'b', stage, inputs) and (tmp_path/'b'/'result.json').is_file()
    from mpo_nb.records import versions
    with monkeypatch.context() as m:
        m.setattr('mpo_nb.cells.versions', lambda: versions() | dict(numpy='9.9'))
        assert not shelf.fetch(tmp_path/'c', stage, inputs)
    flip(tmp_path/'store'/'result.json')
    with pytest.raises(UserError, match='result.json was altered'): shelf.fetch(tmp_path/'c', stage, inputs)
    assert not (tmp_path/'c').exists()

# --- checkpoints

def checkpoints(folder, *steps):
    for n in steps:
        c = folder/f'checkpoint-{n}'
        c.mkdir(parents=True)
        for f in ('model.safetensors', 'optimizer.pt', 'scheduler.pt'): (c/f).write_text(f'{f} {n}')
        mark_complete(c)

@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.pt', 'scheduler.pt', 'complete'])
@pytest.mark.parametrize('do', [Path.unlink, flip, lambda p: p.write_text('')], ids=['missing', 'flipped', 'empty'])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog, file, do):
    "[fails when `complete` is only a mark, and when the damaged one stays and is saved over]"
    checkpoints(tmp_path, 8, 9, 10)
    do(tmp_path/'checkpoint-10'/file)
    assert last_checkpoint(tmp_path) == str(tmp_path/'checkpoint-9')
    assert not (tmp_path/'checkpoint-10').exists() and (tmp_path/'checkpoint-8').exists()
    if (file, do) != ('complete', Path.unlink): assert 'checkpoint-10' in caplog.text
    if file != 'complete': assert file in caplog.text

def test_no_whole_checkpoint(tmp_path):
    checkpoints(tmp_path, 8, 9)
    for n in (8, 9): (tmp_path/f'checkpoint-{n}'/'optimizer.pt').unlink()
    assert last_checkpoint(tmp_path) is None

def test_folders_that_only_look_like_checkpoints(tmp_path):
    checkpoints(tmp_path, 8)
    for n in ('checkpoint-abc', 'checkpoint-2 (copy)', 'checkpoint-', 'checkpoint-²'): (tmp_path/n).mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path/'checkpoint-8')
    assert len([*tmp_path.iterdir()]) == 5

def test_a_trainer_lists_its_checkpoint(tmp_path):
    "Weights, optimizer, schedule and random state [fails when it is listed before the optimizer is written]"
    from util import dpo_trainer
    progress = Progress(['dpo'], 'off')
    progress.start('dpo')
    trainer = dpo_trainer(tmp_path, save_strategy='steps', save_steps=1, trainer=dict(callbacks=[watch(progress)]))
    trainer.train()
    c = tmp_path/'checkpoint-1'
    assert {'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'model.safetensors', 'trainer_state.json'} <= {
        *json.loads((c/'complete').read_text())}
    assert checkpoint_damage(c) == '' and last_checkpoint(tmp_path) == str(c)

def test_checkpoints_of_other_inputs_are_not_gone_on_from(run, tmp_path):
    "[fails when the mark holds the keys only]"
    r = recipe(tmp_path)
    work = Work(r, run, None, TABLE['total'], None, made_from(r, run, TABLE['total'], TABLE))
    checkpoints(checkpoint_folder(work), 3)
    assert last_checkpoint(checkpoint_folder(work))
    run_table(r, TABLE, 'off', redo=['double'])
    checkpoints(checkpoint_folder(work), 3)
    work.made = made_from(r, run, TABLE['total'], TABLE)
    assert last_checkpoint(checkpoint_folder(work)) is None

# --- nothing is deleted through a link

@pytest.mark.parametrize('at', ['checkpoints', 'checkpoints/total', 'checkpoints/total/checkpoint-5'])
def test_checkpoints_behind_a_link(run, tmp_path, at):
    "[fails without the check: the other folder's checkpoint is removed]"
    other = tmp_path/'other'
    (other/'total'/'checkpoint-500').mkdir(parents=True)
    shutil.rmtree(run/'total')
    (run/at).parent.mkdir(parents=True, exist_ok=True)
    (run/at).symlink_to(other if at == 'checkpoints' else other/'total')
    with pytest.raises(UserError, match='symbolic link'): run_table(recipe(tmp_path), TABLE, 'off')
    assert (other/'total'/'checkpoint-500').is_dir()

def test_redo_of_a_linked_stage_removes_the_link_only(run, tmp_path):
    (run/'total').rename(tmp_path/'elsewhere')
    (run/'total').symlink_to(tmp_path/'elsewhere')
    run_table(recipe(tmp_path), TABLE, 'off', redo=['total'])
    assert (tmp_path/'elsewhere'/'total.json').is_file() and not (run/'total').is_symlink()

# --- looking without running

def test_verify(run, tmp_path):
    assert verify(run) == dict.fromkeys(TABLE, '')
    note = read_json(run/'draw'/'stage.json')
    run_table(recipe(tmp_path), TABLE, 'off', redo=['draw'])
    again = run/'draw'/'stage.json'
    assert note['id'] != read_json(again)['id']
    write_json(again, note)
    flip(run/'total'/'total.json')
    states = verify(run)
    assert states['draw'] == '' and 'before that was made again' in states['double']
    assert 'total.json was altered' in states['total']
    shutil.rmtree(run/'draw')
    assert 'stage draw, which is gone' in verify(run)['double']
    with pytest.raises(UserError, match='no finished stage'): verify(tmp_path/'nothing')

def test_a_file_that_is_written_again_on_purpose(run):
    write_json(run/'result.json', 7)
    note_again(run, 'double', 'result.json')
    check_files(run, ['double'])

def test_files_are_read_in_pieces(tmp_path):
    "[fails when only the first piece is hashed]"
    (tmp_path/'big').write_bytes(bytes(3 << 20))
    listed = file_list(tmp_path)
    flip(tmp_path/'big')
    assert damage(tmp_path, listed) == 'big was altered'
