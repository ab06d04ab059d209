"""Records trl112_ppo.json: the tensors of one real update of TRL 1.12.0's PPOTrainer, for `test_numbers_of_trl`.

    pip install --no-deps --target FOLDER trl==1.12.0
    PYTHONPATH=FOLDER:.. python record_trl112.py

Nothing of TRL is changed: two functions that its training loop calls are wrapped, and the wrapper reads the
loop's own variables."""
import json
import sys
import tempfile
from pathlib import Path

import conftest
import torch
import trl
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo import ppo_trainer as source

from util import steer, tiny, toy_tokenizer
from mpo_nb.reward import reward_model_from

ROLLOUT = 'scores', 'logprobs', 'ref_logprobs', 'values', 'kl', 'rewards', 'advantages'
UPDATE = ('new_logprobs', 'mb_logprobs', 'mb_advantage', 'vpred', 'mb_values', 'mb_return', 'ratio', 'pg_loss_max',
          'vf_loss_max')

def run(estimator):
    out, whiten, mean = {}, source.masked_whiten, source.masked_mean
    def keep(names, frame):
        out.update({k: frame.f_locals[k].detach().double().tolist() for k in names if k in frame.f_locals})
    def spy_whiten(values, mask, shift_mean=True):
        white = whiten(values, mask, shift_mean)
        keep(ROLLOUT, sys._getframe(1))                     # of these, `advantages` isn't whitened yet
        out['whitened'] = white.detach().double().tolist()
        return white
    def spy_mean(values, mask, axis=None):
        keep(UPDATE, sys._getframe(1))                      # the last update of the run stays
        return mean(values, mask, axis)
    source.masked_whiten, source.masked_mean = spy_whiten, spy_mean
    tok, policy, ref = toy_tokenizer(), tiny(seed=1), tiny(seed=2)
    for token in (0, 1): steer(policy, token, -1e4)         # neither pad nor EOS: every response has full length
    rm, critic = (reward_model_from(tiny(seed=s), tok, seed=s) for s in (3, 4))
    args = PPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to='none',
                     per_device_train_batch_size=4, gradient_accumulation_steps=1, num_mini_batches=1,
                     num_ppo_epochs=3, total_episodes=4, response_length=6, learning_rate=.02,
                     kl_coef=.3, gamma=.9, lam=.8, cliprange=.1, cliprange_value=.1,
                     temperature=1., kl_estimator=estimator, num_sample_generations=0,
                     gradient_checkpointing=False, seed=0, save_strategy='no', stop_token=None)
    data = Dataset.from_dict({'input_ids': [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]})
    PPOTrainer(args, tok, policy, ref, rm, data, critic, eval_dataset=data).train()
    source.masked_whiten, source.masked_mean = whiten, mean
    return out

if __name__ == '__main__':
    assert trl.__version__ == '1.12.0', trl.__version__
    settings = dict(kl_coef=.3, gamma=.9, lam=.8, cliprange=.1, cliprange_value=.1)
    (Path(__file__).parent/'trl112_ppo.json').write_text(
        json.dumps(dict(source='trl 1.12.0, trl/experimental/ppo/ppo_trainer.py, by record_trl112.py',
                        settings=settings, k1=run('k1'), k3=run('k3'))) + '\n')
