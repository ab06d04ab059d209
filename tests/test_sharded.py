"""DPO and PPO with their weights in pieces (FSDP2) on two CPU processes (gloo), against one process that holds them
whole; and processes that disagree, die or hang."""
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from forks import run_on_two
from mpo_nb.core import UserError
from util import distance, dpo_trainer, logged, ppo_trainer, tiny, toy_pairs, weights

pytestmark = pytest.mark.usefixtures('own_random_state')

# what the flags of `accelerate launch` set that 11b_sharding names
FSDP = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP',
            FSDP_STATE_DICT_TYPE='FULL_STATE_DICT', FSDP_CPU_RAM_EFFICIENT_LOADING='false')

# ---- the runs

class Kinds(TrainerCallback):
    "What the weights are while the trainer trains"
    def on_step_end(self, args, state, control, model=None, **kw):
        self.kinds = sorted({type(p).__name__ for p in model.parameters() if p.requires_grad})

def adapter():
    from peft import LoraConfig
    return dict(trainer=dict(peft_config=LoraConfig(r=4, target_modules='all-linear')))

def trained(t, resume):
    seen = Kinds()
    t.add_callback(seen)
    t.train(resume_from_checkpoint=resume and str(resume))
    t.kinds = seen.kinds
    return t

STEPS = dict(optim='adamw_torch', learning_rate=1e-2, max_grad_norm=1., save_strategy='steps', save_steps=1)

def dpo_run(folder, size, resume=None, trainer=(), **kw):
    "Four AdamW steps of 8 pairs each, `size` pairs a process, and an evaluation behind them"
    ref = None if trainer else tiny(seed=2)
    t = trained(dpo_trainer(folder, tiny(seed=1), ref, toy_pairs(24), per_device_train_batch_size=size, max_steps=4,
                            trainer=dict(eval_dataset=toy_pairs(8, seed=7), **dict(trainer)), **STEPS, **kw), resume)
    t.evaluate()
    return t

def ppo_run(folder, size, resume=None, trainer=(), **kw):
    "Two rollouts of 8 completions, two AdamW updates on each; the reference moves, where it is a model of its own"
    more = {} if trainer else dict(ref_ema=.7)
    return trained(ppo_trainer(folder, tiny(), None if trainer else tiny(seed=4), per_device_train_batch_size=size,
                               num_rollouts=2, num_ppo_epochs=2, trainer=trainer, **STEPS, **more, **kw), resume)

RUNS = {'dpo': dpo_run, 'ppo': ppo_run, 'dpo-lora': dpo_run, 'ppo-lora': ppo_run}

@pytest.fixture(scope='module')
def cut(tmp_path_factory):
    "(folder, results of both processes) of sharded_processes.py"
    out = tmp_path_factory.mktemp('cut')
    for p in run_on_two((Path(__file__).parent/'sharded_processes.py').read_text(), out, env=FSDP):
        assert p.returncode == 0, p.stderr[-3000:]
    return out, [json.loads((out/f'results-{rank}.json').read_text()) for rank in (0, 1)]

# ---- two processes are one

@pytest.mark.parametrize('name', RUNS)
def test_two_processes_in_pieces_end_where_one_does(cut, name, tmp_path):
    "Weights to 2e-5 and all logs; the weights that are trained are in pieces meanwhile, and whole behind it"
    out, (a, b) = cut
    one = RUNS[name](tmp_path, 8, **adapter() if 'lora' in name else {})
    theirs = torch.load(out/f'{name}.pt', weights_only=True)
    assert a[name]['kinds'] == ['DTensor'] and one.kinds == ['Parameter']
    assert a[name]['weights'] == b[name]['weights'] and type(next(iter(theirs.values()))) is torch.Tensor
    assert distance(weights(one.model), theirs) < 2e-5
    assert len(a[name]['logs']) == len(logged(one)) >= 4
    for x, y in zip(logged(one), a[name]['logs']): assert x == pytest.approx(y, abs=2e-4)

@pytest.mark.parametrize('name', RUNS)
def test_a_run_in_pieces_goes_on_from_a_checkpoint(cut, name):
    "Resumed at step 2 (DPO) or in the middle of a rollout (PPO): the very weights and logs of the run that wasn't"
    _, (a, b) = cut
    for rank in (a, b): assert rank[f'{name}-again'] == rank[name]

# ---- on disk

def test_a_checkpoint_in_pieces_holds_a_whole_model(cut):
    "transformers and PEFT read it, and it is what was trained [fails when pieces are saved, or the critic isn't]"
    from peft import load_peft_weights
    out, _ = cut
    last = {n: torch.load(out/f'{n}.pt', weights_only=True) for n in RUNS}
    assert distance(weights(AutoModelForCausalLM.from_pretrained(out/'dpo'/'checkpoint-4')), last['dpo']) == 0
    policy = {k.removeprefix('policy.'): v for k, v in last['ppo'].items() if k.startswith('policy.')}
    assert distance(weights(AutoModelForCausalLM.from_pretrained(out/'ppo'/'checkpoint-4')), policy) == 0
    critic = load_file(out/'ppo'/'checkpoint-4'/'critic'/'model.safetensors')
    assert distance(critic, {k: last['ppo'][f'critic.{k}'] for k in critic}) == 0
    assert (out/'ppo'/'checkpoint-4'/'reference'/'model.safetensors').is_file()
    for name, head in (('dpo-lora', ''), ('ppo-lora', 'policy.')):
        theirs = {head + k.replace('.weight', '.default.weight'): v
                  for k, v in load_peft_weights(str(out/name/'checkpoint-4'), 'cpu').items()}
        assert theirs and distance(theirs, {k: last[name][k] for k in theirs}) == 0

# ---- processes that don't go together

def one_of_two(folder, what):
    "DPO in a process that may have something of its own, or a fate; what it says in the end"
    second, pairs, policy, kw = os.environ['RANK'] == '1', toy_pairs(24), tiny(seed=1), {}
    if second and what == 'seed': kw = dict(seed=3)
    if second and what == 'rows': pairs = pairs.select(range(16))
    if second and what == 'order': pairs = pairs.select([1, 0, *range(2, 24)])
    if second and what == 'weights': policy = tiny(seed=5)
    class Fate(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if not second or state.global_step < 2: return
            if what == 'dies': os._exit(9)
            if what == 'hangs': time.sleep(5)
            if what == 'fails': raise UserError('a trouble of its own')
    with pytest.raises(UserError) as e:
        dpo_trainer(folder, policy, tiny(seed=2), pairs, per_device_train_batch_size=4, max_steps=4, ddp_timeout=2,
                    trainer=dict(callbacks=[Fate()]), **kw).train()
    print(e.value, flush=True)
    os._exit(0)

def said(tmp_path, what, env=()):
    "What two processes of `one_of_two` say, and their return codes"
    code = 'import conftest, sys; from test_sharded import one_of_two; one_of_two(*sys.argv[1:])'
    out = run_on_two(code, tmp_path, what, env=env, timeout=10)
    return [p.stdout for p in out], [p.returncode for p in out]

@pytest.mark.parametrize('what, named', [('seed', 'setting seed (42 and 3)'), ('rows', 'training data'),
                                         ('order', 'training data'), ('weights', 'sum of the weights')])
def test_processes_that_disagree_say_so(tmp_path, what, named):
    "In both, before anything is computed [fails when `check_agree` isn't called, and when only train() calls it]"
    texts, codes = said(tmp_path, what)
    assert codes == [0, 0] and texts[0] == texts[1] and f'processes 0 and 1 disagree on the {named}' in texts[0]

@pytest.mark.parametrize('what, env', [('dies', {}), ('fails', FSDP), ('hangs', FSDP)])
def test_a_process_that_is_gone_is_not_waited_for(tmp_path, what, env):
    "[hangs without `limit`, and fails without `answering`]"
    texts, codes = said(tmp_path, what, env)
    assert codes[0] == 0 and 'another process has ended or did not answer in time' in texts[0]
    assert texts[0].count('\n') == 1
    if what == 'fails': assert texts[1] == 'a trouble of its own\n'
