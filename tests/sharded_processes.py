"What each of two processes does for the first tests of test_sharded.py: its argument is a folder"
import json
import os
import sys
from pathlib import Path

import conftest
import torch

from test_sharded import adapter, dpo_run, ppo_run
from util import fingerprint, logged

out = Path(sys.argv[1])

def done(name, t):
    "What a run has come to; the weights go to a file"
    if t.args.process_index == 0: torch.save(t.model.state_dict(), out/f'{name}.pt')
    return dict(logs=logged(t), weights=fingerprint(t.model), kinds=t.kinds)

def resumed(run, name, step, **kw):
    "The same run, from one of its checkpoints"
    return done(f'{name}-again', run(out/f'{name}-again', resume=out/name/f'checkpoint-{step}', **kw))

results = {name: done(name, run(out/name, size=4, **kw)) for name, run, kw in (
    ('dpo', dpo_run, {}), ('dpo-lora', dpo_run, adapter()), ('ppo', ppo_run, {}), ('ppo-lora', ppo_run, adapter()))}
results |= {'dpo-again': resumed(dpo_run, 'dpo', 2, size=4), 'ppo-again': resumed(ppo_run, 'ppo', 3, size=4),
            'ppo-lora-again': resumed(ppo_run, 'ppo-lora', 3, size=4, **adapter()),
            'dpo-lora-again': resumed(dpo_run, 'dpo-lora', 2, size=4, **adapter())}
(out/f'results-{os.environ["RANK"]}.json').write_text(json.dumps(results))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)   # a thread of gloo may outlive the interpreter and abort
