"""Studies: the same numbers after any number of kills, shared stages trained once, failed cells reported, and the plan;
recipes that add policies, adapters, several processes"""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from mpo_nb.core import UserError
from mpo_nb.pipeline import stages
from mpo_nb.recipe import load_recipe
from mpo_nb.cells import Study, all_variants, cell_folder, load_study, parse_seeds
from mpo_nb.study import compare_policies, notes, plan
from mpo_nb.cli import main

ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
TINY = dict(recipe='toy', model=dict(size=dict(hidden_size=32, num_hidden_layers=1)),
            data=dict(demonstrations=200, pairs=150), sft=dict(max_steps=10, save_steps=4),
            reward=dict(max_steps=6, save_steps=3), eval=dict(prompts=16), dpo=dict(max_steps=4, save_steps=2),
            ppo=dict(rollout_batch_size=16, num_rollouts=2, save_steps=2),
            policies=dict(dpo_easy=dict(method='dpo', data='easy'), mpo=dict(method='ppo', start='dpo_easy', data='hard')))


def write_study(path, **keys):
    path.write_text(yaml.safe_dump(TINY | keys))
    return str(path)


# Everything is imported once; each try is a forked child that is killed after a random time.
DRIVER = '''
import os, random, signal, sys, time
import torch, trl, transformers, datasets, matplotlib.figure
from trl import SFTTrainer, RewardTrainer
import mpo_nb.results, mpo_nb.ppo_trainer, mpo_nb.dpo, mpo_nb.study
from mpo_nb.cli import main
study, whole, killed, kills = *sys.argv[1:4], int(sys.argv[4])

def start(folder):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        code = 1
        try: code = main(['study', study, '--seeds', '10-12', '--output_dir', folder])
        finally: os._exit(code)
    return pid

t0 = time.time()
assert os.waitstatus_to_exitcode(os.waitpid(start(whole), 0)[1]) == 0
took, rng, n = time.time() - t0, random.Random(0), 0
for _ in range(kills):
    pid = start(killed)
    time.sleep(rng.uniform(.02, .25) * took)
    if not os.waitpid(pid, os.WNOHANG)[0]: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); n += 1
assert os.waitstatus_to_exitcode(os.waitpid(start(killed), 0)[1]) == 0
print('killed', n)
'''


@pytest.fixture(scope='module')
def studies(tmp_path_factory):
    "(folder of an undisturbed study of 2 variants x 3 seeds, folder of one that was killed ten times)"
    tmp = tmp_path_factory.mktemp('study')
    path = write_study(tmp/'s.yaml', variants={'shipped': {}, 'cheap': {'policies.mpo.kl_coef': .01}})
    r = subprocess.run([sys.executable, '-c', DRIVER, path, str(tmp/'whole'), str(tmp/'killed'), '10'],
                       capture_output=True, text=True, env=ENV, timeout=900)
    assert r.returncode == 0, r.stdout + r.stderr
    assert int(r.stdout.strip().splitlines()[-1].split()[1]) >= 7, 'too few of the tries were still working when killed'
    return tmp/'whole', tmp/'killed'


def test_killed_ten_times_same_numbers(studies):
    "[fails when a result is shared though its inputs were made anew, and when a half written shelf counts]"
    whole, killed = (pd.read_parquet(f/'study.parquet').drop(columns='seconds') for f in studies)
    assert len(whole) == 2*3*3
    pd.testing.assert_frame_equal(whole, killed)


@pytest.mark.parametrize('which', [0, 1], ids=['undisturbed', 'killed'])
def test_shared_stages_are_trained_once(which, studies):
    "One reward model a seed, for both variants; policies that differ are not shared [fails when keys hold the variant]"
    folder = studies[which]
    ids = lambda name: {json.loads(p.read_text())['id'] for p in folder.glob(f'*/seed-*/{name}/stage.json')}
    assert [len(ids(n)) for n in ('sft', 'reward', 'gaps', 'dpo_easy', 'mpo', 'report')] == [3, 3, 3, 3, 6, 6]
    a, b = (folder/v/'seed-10'/'reward'/'model.safetensors' for v in ('shipped', 'cheap'))
    assert os.path.samefile(a, b)


def test_the_page_is_self_contained(studies):
    page = (studies[0]/'index.html').read_text()
    assert '<script' not in page and not re.findall(r'(?:src|href)="(?!data:image|[\w.=+-]+/seed)', page)
    assert 'shipped/seed-10/report.html' in page and (studies[0]/'shipped'/'seed-10'/'report.html').is_file()


def test_two_at_a_time_and_a_failed_cell(tmp_path, capsys):
    "A cell whose loss is not finite is named, the others finish, exit code 1; numbers are those of one at a time"
    path = write_study(tmp_path/'s.yaml', variants={'shipped': {}, 'broken': {'sft.learning_rate': 1e30,
                       'sft.max_grad_norm': 1e30, 'sft.logging_steps': 1}})
    assert main(['study', path, '--seeds', '10', '--jobs', '2', '--output_dir', str(tmp_path/'two')]) == 1
    err = capsys.readouterr().err
    assert re.search(r'failed: broken, seed 10: stage sft, step \d+', err) and 'Traceback' not in err
    assert 'broken, seed 10: stage sft' in (tmp_path/'two'/'index.html').read_text()
    path = write_study(tmp_path/'s.yaml')
    assert main(['study', path, '--seeds', '10', '--output_dir', str(tmp_path/'one')]) == 0
    one, two = (pd.read_parquet(tmp_path/k/'study.parquet').drop(columns='seconds') for k in ('one', 'two'))
    pd.testing.assert_frame_equal(one, two)


def test_a_killed_study_leaves_no_worker(tmp_path):
    "Its workers end by themselves [fails without `end_with_parent`]"
    import psutil, signal, time
    path = write_study(tmp_path/'s.yaml')
    p = subprocess.Popen([sys.executable, '-m', 'mpo_nb.cli', 'study', path, '--seeds', '10-12', '--jobs', '2',
                          '--output_dir', str(tmp_path/'out')], env=ENV, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.glob('out/*/seed-*/sft')) and time.time() < deadline: time.sleep(.1)
    children = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGKILL); p.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive


def test_the_plan(studies, capsys):
    study = load_study(str(studies[0].parent/'s.yaml'))
    p = plan(study, [10, 11, 12], studies[0])
    assert p['todo'] == 0 and p['cells'] == 6 and p['shared'] == 3*6    # data, sft, pairs, reward, gaps, dpo_easy
    more = plan(study, [10, 11, 12, 13], studies[0])
    assert more['todo'] > 0 and more['seconds'] > 0
    before = {f: f.stat().st_mtime_ns for f in studies[0].rglob('*') if f.is_file()}
    assert main(['study', str(studies[0].parent/'s.yaml'), '--seeds', '10-12', '--output_dir', str(studies[0]),
                 '--dry_run']) == 0
    assert '6 cells' in capsys.readouterr().out and before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize('keys, says', [
    (dict(variants=[1]), '`variants` should be'), (dict(variants={'a': 1}), '`variants.a` should be'),
    (dict(variants={'a': {'dpo.betta': 1}}), 'unknown key `dpo.betta`'), (dict(factors={'dpo.beta': 1}), 'a list of values'),
    (dict(variants={'a': {'dpo.beta': -1}}), '`dpo.beta` is -1'), (dict(compare=['mpo']), 'pairs [A, B]'),
    (dict(recipe='toys'), "no recipe 'toys'")])
def test_wrong_studies(keys, says, tmp_path, capsys):
    assert main(['study', write_study(tmp_path/'s.yaml', **keys), '--output_dir', str(tmp_path/'out')]) == 2
    assert says in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_another_study_is_refused(studies, tmp_path, capsys):
    shutil.copytree(studies[0], tmp_path/'out')
    other = write_study(tmp_path/'s.yaml', dpo=dict(max_steps=3))
    assert main(['study', other, '--seeds', '10', '--output_dir', str(tmp_path/'out')]) == 2
    assert 'holds another study' in capsys.readouterr().err


def test_notes_come_before_numbers():
    "Missing cells, unequal seeds and seeds of the tuning are named"
    study = Study('s', {}, dict(a={}, b={}), tuned_on=[0, 1])
    df = pd.DataFrame([dict(variant=v, seed=s, policy='mpo', score=1.) for v, s in (('a', 1), ('a', 2), ('b', 1))])
    text = ' '.join(notes(study, [1, 2], df, {('b', 2): 'out of memory'}))
    assert 'b, seed 2: out of memory' in text and 'Seeds [1]' in text and 'unequal numbers of seeds' in text


def test_holm_over_the_family():
    "Corrected p values are statsmodels' over all rows, and differences use seeds that both policies have"
    from scipy import stats
    from statsmodels.stats.multitest import multipletests
    study = Study('s', {}, dict(a={}), compare=[('mpo', 'dpo'), ('mpo', 'sft')])
    score = dict(mpo=[1., 1.2, 1.1, 1.4], dpo=[.9, 1.3, .9, 1.1], sft=[0., .1, -.1, .2])
    df = pd.DataFrame([dict(variant='a', seed=s, policy=p, score=x) for p, xs in score.items() for s, x in enumerate(xs)])
    table = compare_policies(study, df)
    p = [stats.ttest_rel(score['mpo'], score[b]).pvalue for b in ('dpo', 'sft')]
    assert table.p.tolist() == pytest.approx(p) and table.p_holm.tolist() == pytest.approx(multipletests(p, method='holm')[1])


def test_grid_and_seeds():
    assert len(all_variants({'a': {}, 'b': {}}, {'dpo.beta': [1, 2], 'seed_': [0]})) == 4
    assert parse_seeds('1,3-5') == [1, 3, 4, 5]
    with pytest.raises(UserError): parse_seeds('5-1')
    assert cell_folder('x', '../up, and/over', 3) == Path('x/up_and_over/seed-3')


# --- one more policy, fewer policies

def test_one_more_policy_moves_no_other(tmp_path):
    "Added to a finished folder: nothing but it, the evaluation and the report is made; other policies' samples stay"
    run = str(tmp_path/'run')
    recipe = write_study(tmp_path/'r.yaml')
    base = {k: v for k, v in TINY.items() if k != 'recipe'}
    recipe = str(tmp_path/'r.yaml')
    Path(recipe).write_text(yaml.safe_dump(yaml.safe_load(Path(load_path('toy')).read_text()) | base))
    assert main(['run', recipe, '--output_dir', run, '--only', '[dpo_easy]']) == 0
    assert not (tmp_path/'run'/'mpo').exists()
    assert main(['run', recipe, '--output_dir', run]) == 0
    ids = {p.parent.name: json.loads(p.read_text())['id'] for p in (tmp_path/'run').glob('*/stage.json')}
    before = pd.read_parquet(tmp_path/'run'/'completions.parquet')
    assert main(['run', recipe, '--output_dir', run, '--gap.sets.random', '{like: easy}',
                 '--policies.control', '{method: ppo, start: dpo_easy, reference: sft, data: random}']) == 0
    now = {p.parent.name: json.loads(p.read_text())['id'] for p in (tmp_path/'run').glob('*/stage.json')}
    assert {k for k in now if ids.get(k) != now[k]} == {'control', 'eval', 'report'}
    after = pd.read_parquet(tmp_path/'run'/'completions.parquet')
    same = after[after.policy != 'control'].reset_index(drop=True)
    pd.testing.assert_frame_equal(before, same)


def load_path(name):
    from mpo_nb.recipe import recipe_file
    return recipe_file(name)
