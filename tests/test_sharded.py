"""DPO and PPO with their weights in pieces (FSDP2) on two CPU processes (gloo), against one process that holds them
whole; and processes that disagree, die or hang."""
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from forks import run_on_two
from mpo_nb.core import UserError
from util import distance, dpo_trainer, fingerprint, logged, ppo_trainer, tiny, toy_pairs, weights

pytestmark = pytest.mark.usefixtures('own_random_state')

# what `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false` sets
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
