"What each of two processes does in `test_two_processes_…` of test_ppo.py: its argument is a folder"
import json
import os
import sys
from pathlib import Path

import conftest
import torch

from mpo_nb.ppo_trainer import save_experience
from util import fingerprint, logged, ppo_trainer, talker, tiny

out = Path(sys.argv[1])

def cows(prompts, completions):
    "The toy task: say cows"
    return [min(c.lower().split().count('cows'), 3) for c in completions]

def one_update():
    "One SGD update on one rollout of 8; each process writes its half"
    t = ppo_trainer(out/'update', talker('llama'), per_device_train_batch_size=3, learning_rate=.1, prompts=1)
    t.train()
    save_experience(t.experience, 0, out/f'experience-{t.args.process_index}.safetensors')
    if t.args.process_index == 0: torch.save(t.model.state_dict(), out/'updated.pt')
    return dict(completions=t.experience.samples.completions, logs=logged(t), weights=fingerprint(t.model))

def learning():
    t = ppo_trainer(out/'learning', tiny('llama'), reward=cows, rollout_batch_size=32, per_device_train_batch_size=16,
                    num_rollouts=20, num_ppo_epochs=2, optim='adamw_torch', learning_rate=.01,
                    max_grad_norm=1., missing_eos_penalty=0., kl_coef=.01, logging_steps=None)
    t.train()
    return dict(scores=logged(t, 'objective/score'), weights=fingerprint(t.model))

def resumed():
    "Stopped in the middle of a rollout: each process needs its own half of it back"
    kw = dict(num_rollouts=2, num_ppo_epochs=2, kl_target=.1, save_strategy='steps', save_steps=1)
    straight, again = (ppo_trainer(out/name, talker('llama'), **kw) for name in ('straight', 'again'))
    straight.train()
    again.train(resume_from_checkpoint=str(out/'straight'/'checkpoint-1'))
    return dict(same=fingerprint(straight.model) == fingerprint(again.model) and logged(straight) == logged(again))

def groups():
    "One leave-one-out update, the KL in the loss: four prompts with four completions each, two prompts a process"
    t = ppo_trainer(out/'groups', talker('llama'), talker('llama', seed=4), advantage_estimator='rloo',
                    num_generations=4, rollout_batch_size=16, per_device_train_batch_size=3, learning_rate=.1,
                    kl_in='loss', kl_coef=.3, kl_estimator='k3')
    t.train()
    save_experience(t.experience, 0, out/f'groups-{t.args.process_index}.safetensors')
    if t.args.process_index == 0: torch.save(t.model.state_dict(), out/'groups.pt')
    return dict(prompts=t.experience.samples.prompts, weights=fingerprint(t.model))

results = dict(one_update=one_update(), learning=learning(), resumed=resumed(), groups=groups())
rank = torch.distributed.get_rank()
(out/f'results-{rank}.json').write_text(json.dumps(results | dict(world_size=torch.distributed.get_world_size())))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)   # a thread of gloo may outlive the interpreter and abort
