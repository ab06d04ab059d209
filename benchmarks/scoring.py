"""How fast are preference pairs scored? `RewardModel.score` (sorted by length) against the same model called on batches in the order of the file.

    python benchmarks/scoring.py DATA MODEL [PAIRS]

DATA as for `mpo gaps`; MODEL a causal language model, put under a random head: speed doesn't depend on the weights. Both score prompt + chosen and prompt + rejected of the same pairs,
in batches of 64, in turn, five times each; what is printed is the median and the ratio."""
import os, statistics, sys, time

import numpy as np
import torch
from transformers.utils import logging as hf

from mpo_nb.data import load_preferences
from mpo_nb.logprobs import inference, load_model
from mpo_nb.reward import RewardModel, _right_padded, reward_model_from

BATCH, ROUNDS = 64, 5


def in_file_order(reward, prompts, completions):
    "The plain way: right-padded batches as they come, the whole model with its head"
    out = []
    with inference(reward.model):
        for i in range(0, len(prompts), BATCH):
            rows = reward._fit([reward.encode(p, c) for p, c in zip(prompts[i:i + BATCH], completions[i:i + BATCH])])
            ids, mask = _right_padded(rows, reward.tok.pad_token_id, reward.model.device)
            out.append(reward.model(input_ids=ids, attention_mask=mask).logits[:, 0].double().numpy())
    return np.concatenate(out)


def seconds(score, ds):
    t = time.perf_counter()
    res = [score(ds['prompt'][:], ds[k][:]) for k in ('chosen', 'rejected')]
    return time.perf_counter() - t, np.concatenate(res)


def main(data, model, pairs=2000):
    hf.set_verbosity_error()
    causal, tok = load_model(model)
    reward, ds = RewardModel(reward_model_from(causal, tok), tok), load_preferences(data, max_rows=int(pairs))
    ways = dict(sorted=lambda p, c: reward.score(p, c, BATCH), plain=lambda p, c: in_file_order(reward, p, c))
    runs = {k: [] for k in ways}
    for _ in range(ROUNDS):
        for k, way in ways.items(): runs[k].append(seconds(way, ds))
    np.testing.assert_allclose(*(r[0][1] for r in runs.values()), atol=1e-3)
    t = {k: statistics.median(s for s, _ in r) for k, r in runs.items()}
    tokens = sum(min(len(reward.encode(p, c)), reward.max_length or sys.maxsize) for k in ('chosen', 'rejected') for p, c in zip(ds['prompt'][:], ds[k][:]))
    print(f'{len(ds)} pairs, {tokens} tokens; {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}')
    print('  '.join(f'{k} {x:.1f} s ({tokens/x:.0f} tokens/s)' for k, x in t.items()), f' ratio {t["plain"]/t["sorted"]:.2f}')


if __name__ == '__main__': main(*sys.argv[1:])
