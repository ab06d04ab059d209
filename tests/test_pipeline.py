"The `mpo` command: errors for the user, the run folder, and going on after signals with the same numbers"
import json, os, re, shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from forks import run_code
from mpo_nb.core import UserError
from mpo_nb.keys import recipe_keys
from mpo_nb.recipe import load_recipe, parse_recipe, recipes
from mpo_nb.records import note_again
from mpo_nb.report import report
from mpo_nb.runs import check_folder
from mpo_nb.pipeline import stages
from mpo_nb.cli import main

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TINY = dict(data=dict(pairs=300, demonstrations=300), eval=dict(prompts=24, samples=2), model=dict(size=SIZE),
            sft=dict(max_steps=12, save_steps=4), reward=dict(max_steps=8, save_steps=3),
            dpo=dict(beta=.1, max_steps=8, save_steps=3),
            ppo=dict(num_rollouts=3, save_steps=2, rollout_batch_size=16))
PAPER = dict(dpo=dict(method='dpo', data='all'), dpo_easy=dict(method='dpo', data='easy'),
             ppo=dict(method='ppo', data='all'), mpo=dict(method='ppo', start='dpo_easy', data='hard'))
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')

def write_recipe(path, **keys):
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return str(path)

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A recipe file: the toy world in a few steps"
    base = yaml.safe_load(recipes()['toy'].read_text())
    keys = {k: {**(v if isinstance(v, dict) else {}), **TINY.get(k, {})} if isinstance(v, dict) else v
            for k, v in base.items()} | dict(policies=PAPER)
    return write_recipe(tmp_path_factory.mktemp('recipe')/'tiny.yaml', **keys)

# Everything is imported once; runs are forked children, and one child is killed in every stage.
DRIVER = '''
import gc, os, signal, sys, time
from pathlib import Path
import torch, trl, transformers, datasets, matplotlib.figure
from trl import SFTTrainer, RewardTrainer
import mpo_nb.evaluate, mpo_nb.gap, mpo_nb.ppo_trainer, mpo_nb.dpo
from mpo_nb.recipe import load_recipe
from mpo_nb.pipeline import stages
from mpo_nb.cli import main
from util import without_pictures
gc.freeze()
recipe, whole, killed = sys.argv[1:]

def start(folder):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it,
        signal.signal(signal.SIGHUP, signal.SIG_DFL)               # and what `nohup` starts ignores this one
        code = 1
        try: code = main(['run', recipe, '--output_dir', folder])
        finally: os._exit(code)
    return pid

def working(stage):
    "Is the run in this stage, behind a checkpoint where the stage writes them?"
    run = Path(killed)
    if stage in ('sft', 'reward', 'dpo', 'dpo_easy', 'ppo', 'mpo'):
        return any((run/'checkpoints'/stage).glob('checkpoint-*/complete'))
    return run.is_dir() and any(run.glob(f'.{stage}.*'))

# what ends a stage: polite signals, which the run answers with a checkpoint; the others end by one that is not
signals = dict(reward=signal.SIGHUP, dpo=signal.SIGINT, ppo=signal.SIGTERM)

def end(pid, number):
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert os.waitstatus_to_exitcode(os.waitpid(start(whole), 0)[1]) == 0
without_pictures()
kills = []
for stage in stages(load_recipe(recipe)):
    pid = start(killed)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or (Path(killed)/stage).is_dir(): break     # too late for this stage
        if working(stage):
            number = signals.get(stage, signal.SIGKILL)
            code = end(pid, number)
            assert code == (-number if number == signal.SIGKILL else 128 + number), (stage, code)
            kills.append(stage); done = True
            break
        time.sleep(.001)
    if not done: end(pid, signal.SIGKILL)
assert os.waitstatus_to_exitcode(os.waitpid(start(killed), 0)[1]) == 0
print('killed in', *kills)
'''

@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    "(run folder of an uninterrupted run, one that was killed in each stage, the stages it was killed in)"
    tmp = tmp_path_factory.mktemp('runs')
    r = run_code(DRIVER, tiny, tmp/'whole', tmp/'killed', env=ENV)
    assert r.returncode == 0, r.stdout + r.stderr
    for name in ('SIGHUP', 'SIGINT', 'SIGTERM'):
        assert f'stopped by {name}; the same command goes on from here' in r.stderr, r.stderr
    assert r.stderr.count('stopping at the next step, with a checkpoint') == 3 and 'Traceback' not in r.stderr
    return tmp/'whole', tmp/'killed', r.stdout.strip().splitlines()[-1].split()[2:]

def without_seconds(path):
    e = json.loads((path/'evaluation.json').read_text())
    return {**e, 'stages': list(e['stages'])}

def test_killed_in_each_stage_same_numbers(runs):
    whole, killed, kills = runs
    assert {'sft', 'reward', 'dpo', 'dpo_easy', 'ppo', 'mpo'} <= set(kills)
    assert len(kills) >= 8
    assert without_seconds(whole) == without_seconds(killed)
    for f in ('completions.parquet', 'gaps.parquet'):
        pd.testing.assert_frame_equal(pd.read_parquet(whole/f), pd.read_parquet(killed/f))

def test_run_folder(runs):
    whole = runs[0]
    names = {p.name for p in whole.iterdir() if p.name != '.lock'}
    assert names == {*stages(load_recipe('toy'))} | {
        'recipe.yaml', 'environment.json', 'gaps.parquet', 'completions.parquet', 'evaluation.json', 'report.html'}
    assert {'prompt', 'chosen', 'rejected', 'reward_chosen', 'reward_rejected', 'gap',
            'set'} <= set(pd.read_parquet(whole/'gaps.parquet').columns)
    assert {'prompt', 'policy', 'completion', 'score'} <= set(pd.read_parquet(whole/'completions.parquet').columns)
    env = json.loads((whole/'environment.json').read_text())
    assert env['seed'] == 0 and env['packages']['torch'] and str(Path.home()) not in json.dumps(env)

def test_evaluation_contract(runs):
    e = json.loads((runs[0]/'evaluation.json').read_text())
    assert list(e) == ['recipe', 'seed', 'n_prompts', 'judge', 'policies', 'win_rates', 'stages']
    assert list(e['policies']) == ['sft', 'dpo', 'dpo_easy', 'ppo', 'mpo'] and e['n_prompts'] == 24
    assert all(set(p) == {'score', 'score_se', 'kl_to_sft', 'length', 'eos_rate'} for p in e['policies'].values())
    assert e['policies']['sft']['kl_to_sft'] == 0
    assert len(e['win_rates']) == 10
    for w in e['win_rates']:
        assert set(w) == {'a', 'b', 'wins', 'ties', 'losses', 'win_rate',
                          'ci'} and w['wins'] + w['ties'] + w['losses'] == 24
        assert w['ci'][0] <= w['win_rate'] <= w['ci'][1]
    assert (all(set(s) == {'seconds'} for s in e['stages'].values())
            and {'sft', 'reward', 'dpo', 'ppo', 'mpo'} <= set(e['stages']))

def test_report_is_self_contained_and_escaped(runs, tmp_path):
    whole = tmp_path/'run'
    shutil.copytree(runs[0], whole)
    df = pd.read_parquet(whole/'completions.parquet')
    df.loc[df.prompt_id == 0, ['prompt', 'completion']] = '<script>alert(1)</script>'
    df.to_parquet(whole/'completions.parquet')
    html = report(whole)
    assert '<script' not in html and '&lt;script&gt;alert(1)' in html
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', html)
    assert len(links) == 10 and all(l.startswith('data:image/svg+xml;base64,') for l in links)
    assert '://' not in re.sub(r'base64,[^"]*', '', html)


def test_report_shows_every_pair_by_the_functions_of_08_evaluate(runs):
    """Intervals are those of evaluation.json; Holm's p and Bradley-Terry strengths are those of compare_scores
    [fails when a pair is left out]"""
    from mpo_nb.compare import compare_scores
    html, e = (runs[0]/'report.html').read_text(), json.loads((runs[0]/'evaluation.json').read_text())
    c = compare_scores(pd.read_parquet(runs[0]/'completions.parquet'))
    for w, r in zip(e['win_rates'], c.table.itertuples()):
        assert (w['a'], w['b'], w['wins'], w['win_rate']) == (r.a, r.b, r.wins, r.win_rate)
        assert re.search(rf"<td>{w['a']}</td><td>{w['b']}</td><td>{w['wins']}</td>.*<td>{r.p_holm:.2g}</td>", html)
    for name, s in c.ranking.strength.items(): assert f'{name} {s:+.2f}' in html


@pytest.mark.parametrize('command', ['eval', 'judge'])
def test_eval_and_judge_are_commands(command, capsys):
    assert main([command, '--help']) == 0 and f'mpo {command} FILE' in capsys.readouterr().out
    assert (main([command, 'nothing.jsonl', *(['--model', 'm'] if command == 'judge' else [])]) == 2
            and 'nothing.jsonl does not exist' in capsys.readouterr().err)


def test_mpo_eval_reads_a_run_folder(runs, tmp_path, capsys):
    assert main(['eval', str(runs[0]), '--output-dir', str(tmp_path/'out')]) == 0
    assert 'p_holm' in capsys.readouterr().out and (tmp_path/'out'/'index.html').exists()
    assert set(json.loads((tmp_path/'out'/'comparison.json').read_text())['judges']) == {'score', 'reward'}

def test_finished_run_is_not_run_again(runs, tiny, capsys):
    before = {p: p.stat().st_mtime_ns for p in runs[0].rglob('*') if p.is_file() and p.name != '.lock'}
    assert main(['run', tiny, '--output_dir', str(runs[0])]) == 0
    assert 'mpo' in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}

# --- damaged, missing, added files: named before anything is computed (what the machinery does is in test_records)

def cut(p): p.write_bytes(p.read_bytes()[:-9])

DAMAGE = [('data', 'data/demonstrations.parquet', Path.unlink), ('reward', 'reward/reward.json', Path.unlink),
          ('reward', 'reward/config.json', Path.unlink), ('sft', 'sft/model.safetensors', cut),
          ('pairs', 'pairs/train.parquet', cut), ('gaps', 'gaps.parquet', cut), ('dpo_easy', 'dpo_easy/log.json', cut),
          ('eval', 'completions.parquet', cut), ('report', 'evaluation.json', cut), ('report', 'report.html', cut),
          ('mpo', 'mpo/critic/model.safetensors', Path.unlink),
          ('sft', 'sft/adapter_config.json', lambda p: p.write_text('{}'))]

def test_damage_is_named_by_every_command(runs, tiny, tmp_path, capsys):
    """`mpo verify` for every file, `mpo run` for those that are missing, eval, compare and report for those they read
    [fails for each file that a stage's record leaves out, and for each command without its check]"""
    run = tmp_path/'run'
    shutil.copytree(runs[0], run)
    assert main(['verify', str(run)]) == 0 and capsys.readouterr().out.count('as it was written') == len(stages(
        load_recipe(tiny)))
    for stage, file, do in DAMAGE:
        held = (run/file).read_bytes() if (run/file).exists() else None
        do(run/file)
        if do is Path.unlink:
            fails(capsys, tiny, '--output_dir', run, says=[f'{run}: {file} is missing', f'`--redo {stage}`'])
        assert main(['verify', str(run)]) == 1 and f'{stage}: {run}: {file} ' in capsys.readouterr().out
        for command, *others in (('eval', '--output_dir', tmp_path/'e'), ('compare', runs[1]), ('report',)):
            reads = dict(eval=stage == 'eval', compare=stage == 'eval' or file == 'evaluation.json',
                         report=file != 'report.html')[command]
            if reads: fails(capsys, run, *others, says=file, command=command)
        (run/file).unlink() if held is None else (run/file).write_bytes(held)
    assert main(['verify', str(run)]) == 0

def test_a_page_written_again_is_whole(runs, tmp_path, capsys):
    "`mpo report` mends a damaged page, and the record knows the new one [fails when the record isn't updated]"
    run = tmp_path/'run'
    shutil.copytree(runs[0], run)
    (run/'report.html').write_text('')
    assert main(['report', str(run)]) == 0 == main(['verify', str(run)])

def test_redo_gives_the_same_numbers(runs, tiny, tmp_path):
    "From a damaged policy; nothing that doesn't read it is made again"
    run = tmp_path/'run'
    shutil.copytree(runs[0], run)
    cut(run/'dpo'/'model.safetensors')
    held = {p: p.stat().st_mtime_ns for n in ('sft', 'reward', 'dpo_easy', 'mpo') for p in (run/n).iterdir()}
    assert main(['run', tiny, '--output_dir', str(run), '--redo', 'dpo']) == 0
    assert without_seconds(run) == without_seconds(runs[0])
    assert held == {p: p.stat().st_mtime_ns for p in held}

def test_missing_demonstrations_are_no_reason_to_skip_sft(tmp_path, tiny):
    "[fails when the file's being there decides]"
    from mpo_nb.prepare import demonstrations_of
    from mpo_nb.records import write_record
    from mpo_nb.runs import Work
    work = Work(load_recipe(tiny), tmp_path, None, None, None)
    write_record(tmp_path, 'data', tmp_path/'data', (), dict(metrics=dict(demonstrations=300)))
    with pytest.raises(UserError, match='demonstrations.parquet is missing'): demonstrations_of(work)
    write_record(tmp_path, 'data', tmp_path/'data', (), dict(metrics=dict(demonstrations=0)))
    assert demonstrations_of(work) is None

def test_a_full_disk_is_one_sentence(tmp_path, tiny, capsys, monkeypatch):
    "Inside a stage, where torch, safetensors and Python say it each in their own way, and outside of all stages"
    from safetensors import SafetensorError
    said = [OSError(28, 'No space left on device', 'x'), SafetensorError('I/O error: No space left on device'),
            RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')]
    for e in said:
        def full(*_, e=e): raise e
        monkeypatch.setattr('mpo_nb.runs.write_record', full)
        assert main(['run', tiny, '--output_dir', str(tmp_path/'run')]) == 2
        assert 'mpo: stage data: ' in (err := capsys.readouterr().err) and 'Traceback' not in err
    def full(*_): raise OSError(28, 'No space left on device', 'recipe.yaml')
    monkeypatch.setattr('mpo_nb.runs.claim', full)
    fails(capsys, tiny, '--output_dir', tmp_path/'run', says='recipe.yaml: no space left on device; make room')

# --- errors: exit code 2, one sentence on stderr, no traceback, nothing written

def fails(capsys, *argv, says, command='run'):
    capsys.readouterr()
    assert main([command, *map(str, argv)]) == 2
    out = capsys.readouterr()
    assert out.err.count('\n') == 1 and out.err.startswith('mpo: ') and 'Traceback' not in out.err, out.err
    for s in [says] if isinstance(says, str) else says: assert s in out.err, out.err

def test_run_folder_of_another_recipe(runs, tiny, capsys):
    before = {p: p.stat().st_mtime_ns for p in runs[0].rglob('*')}
    fails(capsys, tiny, '--output_dir', runs[0], '--seed', 1, '--dpo.beta', .7,
          says=['another recipe', 'seed (0 there, 1 here)', 'dpo.beta (0.1 there, 0.7 here)'])
    assert before == {p: p.stat().st_mtime_ns for p in runs[0].rglob('*')}

def test_folder_that_is_no_run(tmp_path, tiny, capsys):
    (tmp_path/'thesis.tex').write_text('dear')
    fails(capsys, tiny, '--output_dir', tmp_path, says='no run folder')
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']

def test_two_runs_in_one_folder(tmp_path, tiny, capsys):
    from filelock import FileLock
    (tmp_path/'run').mkdir()
    with FileLock(tmp_path/'run'/'.lock'):
        fails(capsys, tiny, '--output_dir', tmp_path/'run', says='another run is working')

@pytest.mark.parametrize('argv, says', [
    (['toy', '--dpo.betta', '1'], 'unknown key `dpo.betta`; did you mean `dpo.beta`?'),
    (['toy', '--sft.args.learning_rat', '1'], '`sft.args.learning_rat`'),
    (['toy', '--sft.args.hub_token', 'hf_abc'], '`sft.args.hub_token` is a secret'),
    (['toy', '--policies.mpo.args', '{push_to_hub_token: hf_abc}'], 'policies.mpo.args.push_to_hub_token` is a secret'),
    (['toy', '--dpo.args.resume_from_checkpoint', 'x'], '`dpo.args.resume_from_checkpoint` is decided by the run'),
    (['toy', '--dpo.lr_scheduler_type', 'steep'], '`dpo`'),
    (['toy', '--ppo.num_ppo_epochs', '0'], '`ppo.num_ppo_epochs` is 0'),
    (['toy', '--dpo.loss_type', 'hing'], 'hing'),
    (['toy', '--sft.per_device_train_batch_size', '0'], '`sft.per_device_train_batch_size` is 0'),
    (['toy', '--dpo', '1'], '`dpo` is a section'),
    (['toy', '--dpo.beta', 'much'], "`dpo.beta` should be float, not 'much'"),
    (['toy', '--policies.mpo.step', '3'], '`policies.mpo`: unknown key `ppo.step`'),
    (['toy', '--policies.mpo.num_rollouts', 'many'], '`policies.mpo`: `ppo.num_rollouts` should be'),
    (['toy', '--policies.mpo.lam', '2'], '`policies.mpo.lam` is 2.0: it must be in [0, 1]'),
    (['toy', '--policies.mpo.start', 'dpo_hard'], "is 'dpo_hard', and there is no such policy"),
    (['toy', '--policies.dpo_easy.start', 'mpo'], 'dpo_easy → mpo → dpo_easy is a circle'),
    (['toy', '--policies.gaps', '{method: dpo}'], "'gaps' is the name of a stage"),
    (['toy', '--policies.mpo.data', 'harder'], "is 'harder', and there is no such set"),
    (['toy', '--gap.sets.fresh', '{sampled: dpo_hard}', '--policies.dpo.data', 'fresh'],
     "`gap.sets.fresh.sampled` is 'dpo_hard', and there is no such policy"),
    (['toy', '--gap.sets.fresh', '{sampled: mpo}', '--policies.dpo_easy.data', 'fresh'],
     'dpo_easy → mpo → dpo_easy is a circle'),
    (['toy', '--policies', '{}'], '`policies` is empty'),
    (['toy', '--only', '[mpoo]'], 'there is no such policy'),
    (['toy', '--dpo.learning_rate', '.nan'], '`dpo.learning_rate` is nan: it must be finite and above 0'),
    (['toy', '--ppo.num_rollouts', '0'], '`ppo.num_rollouts` is 0: it must be at least 1'),
    (['toy', '--gap.threshold', '.nan', '--gap.easy_fraction', 'null'], '`gap.threshold` is nan: it must be finite'),
    (['toy', '--eval.temperature', '0'], '`eval.temperature` is 0'),
    (['toy', '--model.size.hidden_size', '30'], 'no multiple of num_attention_heads'),
    (['toy', '--model.size.width', '30'], '`model.size.width` is no size'),
    (['toy', '--name', '../../up'], 'plain word'),
    (['toy', '--output_dir', '../up'], 'leads out of the current folder'),
    (['toy', '--output_dir', 'a\0b'], 'NUL'),
    (['toy', '--output_dir', 'x' * 300], 'too long'),
    (['toy', '--model.lora.r', '4'], 'nothing to adapt'),
    (['toy', '--model.quantize', '4bit'], 'give `model.lora`, too'),
    (['toy', '--eval.judge', '{llm: {modell: m}}'], 'modell'),
    (['toy', '--gap.folds', '1'], 'at least 2'),
    (['toy', '--gap.folds', '3', '--reward.name', 'somewhere'], 'leave one of the two out'),
    (['toy', '--gap.folds', '3', '--gap.scores', 'gold'], '`gap.scores`) is not trained'),
    (['hh-rlhf', '--model', 'm', '--gap.scores', 'gold'], '`gap.scores` is gold, and only worlds'),
    (['toy', '--gap.scores', 'golden'], '`gap.scores` should be'),
    (['toy', '--ppo.scores', 'golden'], '`ppo.scores` should be'),
    (['hh-rlhf', '--model', 'm', '--ppo.scores', 'gold'], '`ppo.scores` is gold, and only worlds'),
    (['hh-rlhf', '--model', 'm', '--policies.mpo.scores', 'gold'], '`policies.mpo.scores` is gold, and only worlds'),
    (['toy', '--reward.pairs', '9'], 'at least 10'),
    (['toy', '--reward.pairs', '90', '--gap.folds', '3'], '`reward.pairs` is 90, and with `gap.folds`'),
    (['toy', '--gap.disagree', 'maybe'], '`gap.disagree` should be'),
    (['toy', '--seed'], 'seed'),
    (['toy', 'hh-rlhf'], 'hh-rlhf'),
    (['toy', '--policies.mpo.kl_coef', '"'], '`policies.mpo.kl_coef`, line 1: not valid YAML'),
    (['toy', '--betta\n', '1'], r'unknown key `betta\n`'),
    (['toys'], "no recipe 'toys'"),
    (['nowhere.yaml'], 'nowhere.yaml does not exist'),
    (['--seed', '1', 'toy'], 'first say which recipe'),
    (['toy', '--data', 'x.jsonl'], 'leave `--data` out'),
    (['toy', '--gap.threshold', '1'], 'one of them'),
    (['toy', '--world.args.topics', '99'], 'topics'),
    (['stories', '--model', './no-such-model'], './no-such-model'),
    (['hh-rlhf', '--model', '/no/such/model'], '/no/such/model'),
    (['toy', '--reward.name', '/no/such/model'], '/no/such/model'),
])
def test_wrong_arguments(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, *argv, says=says)

@pytest.mark.parametrize('text, says', [
    ('dpo: {betta: 1}', 'unknown key `dpo.betta`'), ('dpo: 1', '`dpo` is a section'),
    ('a: &x [1]\nb: *x', 'aliases'), ('policies: {1: {method: dpo}}', 'the key 1 below `policies` is not text'),
    ('seed: ' + '[' * 1000, 'levels'), ('seed: [1', 'line 1'), ('', 'nothing'), ('- a', 'something else'),
    ('dpo: {beta: much}', "`dpo.beta` should be float, not 'much'"), ('seed: null', '`seed`'),
    ('data: {source: a.jsonl}', 'no model')])
def test_wrong_recipe_file(text, says, capsys, tmp_path):
    (tmp_path/'mine.yaml').write_text(text)
    fails(capsys, tmp_path/'mine.yaml', '--output_dir', tmp_path/'run', says=says)
    assert not (tmp_path/'run').exists()

@pytest.fixture(scope='module')
def local_model(tmp_path_factory):
    "Another architecture with another tokenizer: a tiny GPT-2 over bytes"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(['<pad>', '<eos>', *alphabet])}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='<eos>')
    folder = tmp_path_factory.mktemp('model')/'gpt'
    tok.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=128,
                               bos_token_id=None, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A user's file of 200 rows, one of them unusable"
    path = tmp_path_factory.mktemp('rows')/'mine.jsonl'
    row = lambda i: dict(prompt=f'What is {i} and one?', chosen=f' It is {i + 1}.',
                         rejected=f' {i} or so.' if i != 7 else f' It is {i + 1}.')
    path.write_text('\n'.join(json.dumps(row(i)) for i in range(200)) + '\n')
    return path

USER = ({k: TINY[k] for k in ('eval', 'sft', 'reward', 'dpo', 'ppo')}
        | dict(gap=dict(easy_fraction=.5, folds=2),
               policies=PAPER | dict(dpo_easy=PAPER['dpo_easy'] | dict(max_steps=5))))

@pytest.mark.parametrize('kind', ['pad', 'eos'])
def test_tokenizer_without_token(kind, local_model, rows, capsys, tmp_path):
    shutil.copytree(local_model, tmp_path/'m')
    for f in ('tokenizer_config.json', 'special_tokens_map.json'):
        if (tmp_path/'m'/f).exists():
            cfg = json.loads((tmp_path/'m'/f).read_text())
            cfg.pop(f'{kind}_token')
            (tmp_path/'m'/f).write_text(json.dumps(cfg))
    recipe = write_recipe(tmp_path/'r.yaml',
                          data=dict(source=str(rows), max_prompt_length=40, max_completion_length=24),
                          model=dict(name=str(tmp_path/'m')), **USER)
    fails(capsys, recipe, '--output_dir', tmp_path/'run', says=[f'no {kind} token', f'model.{kind}_token'])
    fails(capsys, recipe, '--output_dir', tmp_path/'run', f'--model.{kind}_token', '<unheard>', says='<unheard>')

def test_reward_model_with_two_labels(local_model, tmp_path, capsys, tiny):
    from transformers import AutoConfig, AutoModelForSequenceClassification
    AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(local_model, num_labels=2)).save_pretrained(tmp_path/'rm')
    fails(capsys, tiny, '--output_dir', tmp_path/'run', '--reward.name', tmp_path/'rm', says='has 2 labels')

def test_too_long_for_the_model(local_model, rows, capsys, tmp_path):
    recipe = write_recipe(tmp_path/'r.yaml', data=dict(source=str(rows)), model=dict(name=str(local_model)), **USER)
    fails(capsys, recipe, '--output_dir', tmp_path/'run', says='reads at most 128 tokens: give smaller ones')

def test_no_row_fits_then_mended_in_the_same_folder(local_model, rows, capsys, tmp_path):
    recipe = write_recipe(tmp_path/'r.yaml',
                          data=dict(source=str(rows), max_prompt_length=3, max_completion_length=24),
                          model=dict(name=str(local_model)), **USER)
    caught = main(['run', recipe, '--output_dir', str(tmp_path/'run')])
    err = capsys.readouterr().err
    assert caught == 2 and 'none of 199 pairs fits' in err and 'Traceback' not in err
    # nothing was finished: another try may use the folder
    mended = load_recipe(recipe, data=dict(max_prompt_length=40))
    check_folder(mended, tmp_path/'run', stages(mended))

def test_missing_data_file(local_model, capsys, tmp_path):
    recipe = write_recipe(tmp_path/'r.yaml', data=dict(source=str(tmp_path/'none.jsonl'),
                                                       max_prompt_length=40, max_completion_length=24),
                          model=dict(name=str(local_model)), **USER)
    assert main(['run', recipe, '--output_dir', str(tmp_path/'run')]) == 2
    err = capsys.readouterr().err
    assert 'none.jsonl' in err and 'Traceback' not in err

def test_nan_stops_with_stage_and_step(tmp_path, capsys, tiny):
    assert main(['run', tiny, '--output_dir', str(tmp_path/'run'), '--sft.learning_rate', '1e30',
                 '--sft.logging_steps', '1', '--sft.max_grad_norm', '1e30']) == 2
    err = capsys.readouterr().err
    assert re.search(r'mpo: stage sft, step \d+: .*(nan|inf|not finite)', err) and 'Traceback' not in err

def test_users_own_file(local_model, rows, tmp_path):
    recipe = write_recipe(tmp_path/'mine.yaml',
                          data=dict(source=str(rows), max_prompt_length=40, max_completion_length=24, test=.2),
                          model=dict(name=str(local_model)), **USER)
    r = run_code('import sys; from mpo_nb.cli import main; sys.exit(main())', 'run', recipe, cwd=tmp_path, env=ENV)
    assert r.returncode == 0, r.stderr
    run = tmp_path/'runs'/'mine'
    e = json.loads((run/'evaluation.json').read_text())
    assert 'half' in e['judge'] and set(e['policies']) == {'sft', 'dpo', 'dpo_easy', 'ppo', 'mpo'}
    parts = {k: set(pd.read_parquet(run/'data'/f'{k}.parquet').prompt) for k in ('train', 'judge', 'test')}
    assert not (parts['train'] & parts['judge'] or parts['train'] & parts['test'] or parts['judge'] & parts['test'])
    gaps = pd.read_parquet(run/'gaps.parquet')
    assert set(gaps.fold) == {0, 1} and gaps.groupby('prompt').fold.nunique().max() == 1      # cross-fitted
    assert [json.loads((run/s/'log.json').read_text())[-1]['step'] for s in ('dpo', 'dpo_easy')] == [8, 5]
    aside = pd.read_parquet(run/'data'/'set_aside_broken.parquet')
    assert aside.reason.tolist() == ['equal completions'] and 'row' in aside
    assert 'report.html' in r.stdout and 'mpo' in r.stdout

def test_a_reward_model_of_frozen_features(tiny, tmp_path):
    """From data to report with a linear reward model, whose folder is small and moves with its run; damage to the model
    that it reads is named [fails when the model's path is kept as it was given]"""
    from mpo_nb.features import load_reward, FeatureReward
    argv = ['--reward.layer', '1', '--gap.folds', '2', '--only', '[mpo]', '--output_dir', str(tmp_path/'run')]
    assert main(['run', tiny, *argv]) == 0
    shutil.move(tmp_path/'run', tmp_path/'moved')
    reward = load_reward(tmp_path/'moved'/'reward')
    assert isinstance(reward, FeatureReward) and reward.features.layer == 1
    assert sum(p.stat().st_size for p in (tmp_path/'moved'/'reward').iterdir()) < 20_000
    df = pd.read_parquet(tmp_path/'moved'/'completions.parquet').query('policy == "mpo"').head(5)
    assert reward(df.prompt.tolist(), df.completion.tolist()) == pytest.approx(df.reward, abs=1e-4)
    (tmp_path/'moved'/'sft'/'config.json').unlink()
    with pytest.raises(UserError, match='config.json'): load_reward(tmp_path/'moved'/'reward')

def test_a_layer_that_is_not_there(local_model, rows, tmp_path, capsys):
    data = dict(source=str(rows), max_prompt_length=40, max_completion_length=24)
    recipe = write_recipe(tmp_path/'r.yaml', data=data, model=dict(name=str(local_model)), reward=dict(layer=7),
                          gap=dict(easy_fraction=.5))
    assert main(['run', recipe, '--output_dir', str(tmp_path/'run')]) == 2
    assert re.search(r'`reward.layer` is 7: .* has \d layers', capsys.readouterr().err)

def test_a_layer_that_a_fresh_model_has_not(tiny, tmp_path, capsys):
    "[fails with an IndexError where only a model's file is asked]"
    assert main(['run', tiny, '--reward.layer', '9', '--output_dir', str(tmp_path/'run')]) == 2
    err = capsys.readouterr().err
    assert 'layer 9 of a model with 2 layers' in err and 'Traceback' not in err

CHATML = ("{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")

def test_a_chat_model_is_asked_in_its_own_spelling(local_model, tmp_path):
    """Text of the user's is rendered once, by the template; a pair that it refuses is set aside, and `data.chat` false
    leaves the text as it is [fails when pairs are not rendered before they are measured]"""
    from transformers import AutoTokenizer
    from mpo_nb.checks import recipe_tokenizer
    from mpo_nb.prepare import fitting_pairs
    tok = AutoTokenizer.from_pretrained(local_model)
    refuse = "{% if 'TERRIBLE' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}"
    tok.chat_template = refuse + CHATML
    shutil.copytree(local_model, tmp_path/'chat'); tok.save_pretrained(tmp_path/'chat')
    rows = [dict(prompt=f'\n\nHuman: {q}\n\nAssistant:', chosen=' Dogs eat meat.', rejected=' No.')
            for q in ('Tell me about dogs.', 'Tell me of TERRIBLE dogs.')]
    pd.DataFrame(rows).to_json(tmp_path/'rows.jsonl', orient='records', lines=True)
    recipe = write_recipe(tmp_path/'r.yaml', data=dict(source=str(tmp_path/'rows.jsonl'), max_prompt_length=64,
                                                       max_completion_length=24), model=dict(name=str(tmp_path/'chat')))
    r = load_recipe(recipe)
    kept, counts = fitting_pairs(r, tmp_path, recipe_tokenizer(r))
    assert kept['prompt'] == [f'<user>Tell me about dogs.{tok.eos_token}<assistant>']
    assert kept['chosen'] == ['Dogs eat meat.'] and kept['rejected'] == ['No.']
    (why, n), = counts['set_aside'].items()
    assert n == 1 and why.endswith('refuses a chat: not that')
    assert len(pd.read_parquet(tmp_path/'set_aside_refused.parquet')) == 1
    r = load_recipe(recipe, data=dict(chat=False))
    assert fitting_pairs(r, tmp_path, recipe_tokenizer(r))[0]['prompt'] == [row['prompt'] for row in rows]

# --- gaps alone

LENGTHS = ['--data.max_prompt_length', '40', '--data.max_completion_length', '24']

def test_gaps_of_own_file(local_model, rows, tmp_path, capsys):
    "From a language model: cross-fitted, every row in one set or set aside with its reason"
    folder = tmp_path/'gaps'
    argv = ['gaps', str(rows), '--model', str(local_model), *LENGTHS, '--output_dir', str(folder),
            '--reward.max_steps', '3', '--gap.easy_fraction', '0.25']
    assert main(argv) == 0
    gaps, aside = pd.read_parquet(folder/'gaps.parquet'), pd.read_parquet(folder/'score'/'set_aside_broken.parquet')
    assert set(gaps.fold) == {0, 1} and gaps.groupby('prompt').fold.nunique().max() == 1
    assert (len(gaps) + len(aside) == len(rows.read_text().splitlines())
            and aside.reason.tolist() == ['equal completions'])
    assert ((gaps.set == 'easy').sum() <= round(.25*len(gaps))
            and (gaps.gap == gaps.reward_chosen - gaps.reward_rejected).all())
    out = capsys.readouterr().out
    assert f'{len(gaps)} pairs' in out and '1 set aside' in out and not (folder/'checkpoints'/'score').exists()
    fails(capsys, *argv[1:-1], '0.5', says='another recipe', command='gaps')

def test_gaps_with_a_finished_reward_model(runs, tmp_path):
    "As --model or as --reward.name: the same numbers as scoring by hand; a second call scores anew"
    from mpo_nb.reward import RewardModel
    whole = runs[0]
    pairs = pd.read_parquet(whole/'pairs'/'test.parquet').head(40)
    pairs.loc[0, 'prompt'] = '\n\nHuman: <script>alert(1)</script>\n\nAssistant:'
    pairs.to_parquet(tmp_path/'p.parquet')
    for i, key in enumerate(('--model', '--reward.name', '--reward.name')):
        folder = tmp_path/f'g{min(i, 1)}'
        assert main(['gaps', str(tmp_path/'p.parquet'), key, str(whole/'reward'), '--data.max_prompt_length', '64',
                     '--output_dir', str(folder)]) == 0
        gaps = pd.read_parquet(folder/'gaps.parquet')
        rm = RewardModel.load(whole/'reward')
        aside = json.loads((folder/'score'/'stage.json').read_text())['metrics']['set_aside']
        assert (len(gaps) + sum(aside.values()) == len(pairs) and gaps.reward_chosen.tolist()
                == pytest.approx(rm(gaps.prompt.tolist(), gaps.chosen.tolist()).tolist(), abs=1e-5))
        page = (folder/'report.html').read_text()
        assert '<script>' not in page and '://' not in page.replace('http://www.w3.org', '') and 'runs/' not in page

def test_gaps_with_second_labels(runs, tmp_path, capsys, monkeypatch):
    """Estimate in the report, on the terminal and in score/noise.json: that of `noise_rate` on the same gaps;
    text and numbers are read; bad ones are named before anything is trained [fails when the labels come in
    another order, when a bad value isn't looked for, and when it is looked for after training only]"""
    from mpo_nb.noise import noise_rate
    whole = runs[0]
    pairs = pd.read_parquet(whole/'pairs'/'train.parquet').head(60)
    labels = [None if i % 3 else bool(i % 4) for i in range(60)]
    argv = lambda name: ['gaps', str(tmp_path/name), '--model', str(whole/'reward'), '--data.max_prompt_length', '64',
                         '--output_dir', str(tmp_path/'g'), '--gap.second_label', 'again']
    written = {'bool.parquet': labels, 'number.csv': [None if a is None else int(a) for a in labels],
               'text.csv': ['' if a is None else str(a) for a in labels]}
    found = []
    for name, again in written.items():
        d = pairs[['prompt', 'chosen', 'rejected']].assign(again=again)
        d.to_parquet(tmp_path/name) if name.endswith('parquet') else d.to_csv(tmp_path/name, index=False)
        shutil.rmtree(tmp_path/'g', ignore_errors=True)
        assert main(argv(name)) == 0
        found.append(json.loads((tmp_path/'g'/'score'/'noise.json').read_text()))
        assert ('20 second labels' in capsys.readouterr().out
                and 'How many labels are wrong?' in (tmp_path/'g'/'report.html').read_text())
    assert found[0] == found[1] == found[2] and found[0]['second_labels'] == 20
    gaps = pd.read_parquet(tmp_path/'g'/'gaps.parquet').sort_values('source_row')
    assert gaps.chosen.tolist() == pairs.chosen.tolist()
    expected = noise_rate(gaps.gap.tolist(), gaps.prompt.tolist(), labels,
                          seed=12).iloc[0]
    assert found[0]['rows'][0]['gap'] == 'all' and found[0]['rows'][0]['rate'] == pytest.approx(expected.rate, abs=1e-6)
    d = pairs[['prompt', 'chosen', 'rejected']].assign(again=['maybe'] + [''] * 59)
    d.to_csv(tmp_path/'bad.csv', index=False); d.assign(again='').to_csv(tmp_path/'none.csv', index=False)
    monkeypatch.setattr('mpo_nb.scoring.fit_reward', lambda *a: pytest.fail('trained first'))
    for name, key, says in (('bad.csv', 'again', "'maybe' (bad.csv, row 1)"), ('none.csv', 'again', 'holds no label'),
                            ('bad.csv', 'twice', "no column 'twice'")):
        assert main([*argv(name)[:-1], key, '--model', str(whole/'sft'), '--output_dir',
                     str(tmp_path/f'{key}{name}')]) == 2
        assert says in capsys.readouterr().err
    assert (main(['run', 'toy', '--gap.second_label', 'again', '--output_dir', str(tmp_path/'run')]) == 2
            and '`mpo gaps` only' in capsys.readouterr().err)

@pytest.mark.parametrize('argv, says',
                         [(['--model', 'm'], 'first say which data'), (['no-such-file.jsonl'], 'no model'),
                          (['x.jsonl', '--model', './nowhere'], 'nowhere'),
                                        (['x.jsonl', '--gap.treshold', '1'], 'gap.threshold')])
def test_gaps_wrong_arguments(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, *argv, says=says, command='gaps')

# --- recipes

@pytest.mark.parametrize('name', sorted(recipes()))
def test_shipped_recipes_parse(name):
    r = load_recipe(name)
    assert r.name == name and r.output_dir == f'runs/{name}' and [*stages(r)][-1] == 'report'

def test_every_key_is_explained(capsys):
    assert main(['run', '--help']) == 0
    out = capsys.readouterr().out
    assert all(f'--{k}' in out and f.metadata['help'] for k, f in recipe_keys().items())

def test_recipe_overrides():
    r = parse_recipe('toy', ['--dpo.beta', '0.2', '--model=here', '--dpo.args.adam_beta2', '0.9'])
    assert (r.dpo.beta, r.model.name, r.dpo.args) == (.2, 'here', dict(adam_beta2=.9))
    assert load_recipe('toy', dpo=dict(beta=.2)).dpo.beta == .2

def test_compare(runs, capsys, tmp_path):
    other = tmp_path/'other'
    shutil.copytree(runs[0], other)
    for f, change in (('evaluation.json', ('"seed": 0', '"seed": 1')), ('recipe.yaml', ('\nseed: 0', '\nseed: 1'))):
        (other/f).write_text((other/f).read_text().replace(*change))
    note_again(other, 'report', 'evaluation.json')
    assert main(['compare', str(runs[0]), str(other)]) == 0
    out = capsys.readouterr().out
    assert 'mpo minus it' in out and 'seed 1' in out
    for argv, says in (([runs[0]], 'at least two'), ([runs[0], runs[0]], 'already'), ([tmp_path], 'evaluation.json')):
        assert main(['compare', *map(str, argv)]) == 2
        assert says in capsys.readouterr().err
