"""Does the noise-rate estimate of 16_gap hold the true rate? Toy worlds that differ in every random number,
about a minute and a half each.

    python benchmarks/noise_rate.py [--seeds 0 1 2 3 4] [--world '{"topics": 6, "harmful": 3}'] [--out
    mpo_nb/saved/noise_rate.json]

Each seed: SFT model, pairs sampled from it and labelled, a reward model on all pairs (in-sample gaps, and
gaps of fresh pairs of held-out prompts), cross-fitted gaps from three folds, second labels for 300 pairs.
Written after each seed, so that a run that is stopped keeps the seeds that are done."""
import argparse, datetime, json, os, time
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from transformers.utils import logging as hf

from mpo_nb.core import replacing
from mpo_nb.gap import DEFAULT_BINS, accuracy_by_gap, add_gaps, crossfit_gaps, label_agreement, split_by_gap
from mpo_nb.noise import noise_rate
from mpo_nb.sampling import sample
from mpo_nb.training import train_sft
from mpo_nb.reward import TOY_SIZE, train_reward
from mpo_nb.worlds import get_world

PAIRS, FRESH, SECOND_LABELS, SFT_STEPS = 2400, 6000, 300, 200
CURVE = -np.inf, -1, -.5, 0, .5, 1, 2, np.inf


def pairs_of(world, sft, tok, n, seed, split):
    "`n` pairs sampled from the SFT model for prompts of one split"
    s = np.random.SeedSequence([seed, split == 'test']).generate_state(4).tolist()
    prompts = world.prompts(n, s[0], split)
    a, b = (sample(sft, tok, prompts, world.max_tokens, seed=k, batch_size=256).completions for k in s[1:3])
    return world.label(prompts, a, b, s[3])


def gold_gap(ds): return np.subtract(ds['gold_chosen'][:], ds['gold_rejected'][:])


def half_wrong(gold): return (gold < 0) + (gold == 0)/2   # a label of two equally good answers is half wrong


def distance(a, b):
    "Mean distance of two curves 'labels right, by gap', over the bins of `b` by their size, where both have pairs"
    a, b = (accuracy_by_gap(d, CURVE) for d in (a, b))
    both = (a.n > 0) & (b.n > 0)
    return float(np.average((a.label_right - b.label_right).abs()[both], weights=b.n[both]))


def one(seed, world):
    "A row of the table"
    start, world = time.perf_counter(), get_world('toy', **world)
    model, tok = world.model(seed, **TOY_SIZE)
    sft, _ = train_sft(model, tok, world.demonstrations(2000, seed), seed=seed, max_steps=SFT_STEPS,
                       learning_rate=3e-3, warmup_steps=20, lr_scheduler_type='cosine',
                       per_device_train_batch_size=32)
    ds, fresh = pairs_of(world, sft, tok, PAIRS, seed, 'train'), pairs_of(world, sft, tok, FRESH, seed, 'test')
    fit = lambda pairs, fold: train_reward(sft, tok, pairs, seed=10*seed + fold, num_train_epochs=3,
                                           learning_rate=1e-3, warmup_steps=10, per_device_train_batch_size=32)[0]
    reward, crossfitted = fit(ds, 9), crossfit_gaps(ds, fit, folds=3, seed=seed)
    in_sample, held_out = add_gaps(ds, reward), add_gaps(fresh, reward)
    gaps, gold, rng = np.array(crossfitted['gap'][:]), gold_gap(ds), np.random.default_rng(seed)
    agrees, some = rng.random(len(ds)) < expit(world.scale*gold), set(rng.permutation(len(ds))[:SECOND_LABELS].tolist())
    again = [bool(a) if i in some else None for i, a in enumerate(agrees)]
    twice, once = (noise_rate(gaps, ds['prompt'][:], again, seed=seed),
                   noise_rate(gaps, ds['prompt'][:], n_boot=50, seed=seed))
    truth = np.array([half_wrong(gold[(gaps > lo) & (gaps <= hi)]).mean()
                      for lo, hi in [(-np.inf, np.inf), *zip(DEFAULT_BINS[:-1], DEFAULT_BINS[1:])]])
    inside = (twice.lo <= truth) & (truth <= twice.hi)
    sets = {k: (gold_gap(d), np.array(d['gap'][:])) for k, d in split_by_gap(crossfitted, easy_fraction=.5).items()}
    right = ({f'{k}_label_right': float(1 - half_wrong(g).mean()) for k, (g, _) in sets.items()}
             | {f'{k}_model_right': float(1 - half_wrong(g*np.sign(x)).mean()) for k, (g, x) in sets.items()})
    return dict(seed=seed, pairs=len(ds), corr_gold=float(np.corrcoef(gaps, gold)[0, 1]),
                agree_in_sample=label_agreement(in_sample), agree_crossfitted=label_agreement(crossfitted),
                agree_held_out=label_agreement(held_out), truth=float(truth[0]), rate=float(twice.rate.iloc[0]),
                lo=float(twice.lo.iloc[0]), hi=float(twice.hi.iloc[0]), hi_single=float(once.hi.iloc[0]),
                bins_covered=int(inside.iloc[1:].sum()), bins=dict(name=list(twice.index[1:]),
                    truth=truth[1:].tolist(), lo=twice.lo[1:].tolist(), hi=twice.hi[1:].tolist()),
                **right, curve_in_sample=distance(in_sample, held_out),
                curve_crossfitted=distance(crossfitted, held_out), seconds=time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=range(5))
    p.add_argument('--world', type=json.loads, default=dict(topics=6, harmful=3),
                   help='arguments of the toy world, JSON')
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'mpo_nb'/'saved'/'noise_rate.json')
    a = p.parse_args()
    hf.set_verbosity_error(), hf.disable_progress_bar()
    head = dict(date=f'{datetime.date.today()}',
                machine=f'{os.cpu_count()} cores, {torch.get_num_threads()} threads used, torch {torch.__version__}',
                world=a.world,
                settings=dict(pairs=PAIRS, fresh=FRESH, second_labels=SECOND_LABELS, sft_steps=SFT_STEPS))
    old = json.loads(a.out.read_text()) if a.out.is_file() else {}
    rows = {r['seed']: r
            for r in old.get('seeds', ())} if all(old.get(k) == head[k] for k in ('world', 'settings')) else {}
    for s in a.seeds:
        rows[s] = one(s, a.world)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(a.out) as tmp:
            Path(tmp).write_text(json.dumps(head | dict(seeds=[rows[k] for k in sorted(rows)]), indent=1) + '\n')
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[s].items() if k != 'bins'}, flush=True)


if __name__ == '__main__': main()
