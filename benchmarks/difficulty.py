"""Does difficulty belong to the pair or to the prompt? The same small reward model on HH-RLHF, TL;DR and the toy world

    python benchmarks/difficulty.py [--out mpo_nb/saved/difficulty.json]

Bradley-Terry on counts of words and word pairs, cross-fitted over five folds of groups (posts of TL;DR, first requests
of HH-RLHF, prompts of the toy world). It knows little, and the same little everywhere: what is compared is how much of
the variance of |gap| is between groups. HH-RLHF and TL;DR are read from local files (see 02_sources)."""
import argparse, datetime, json, platform, re, zlib
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from statsmodels.stats.proportion import proportion_confint

from mpo_nb.core import replacing
from mpo_nb.data import load_preferences
from mpo_nb.gap import prompt_folds
from mpo_nb.world_base import intraclass_correlation
from mpo_nb.worlds import get_world

COLUMNS, PENALTY, FOLDS = 2**15, 30., 5
TOY = dict(topics=6, harmful=2, turns=1, careless=2.5, names=10)


def counts(texts):
    "Sparse [N, COLUMNS]: log(1 + count) of words and pairs of words, hashed"
    rows, columns, values = [], [], []
    for i, text in enumerate(texts):
        words = re.findall(r"[a-z']+|[.,!?]", text.lower())
        for k, n in Counter(words + [f'{a} {b}' for a, b in zip(words, words[1:])]).items():
            rows.append(i); columns.append(zlib.crc32(k.encode()) % COLUMNS); values.append(np.log1p(n))
    return csr_matrix((values, (rows, columns)), shape=(len(texts), COLUMNS))


def fitted(x):
    "Weights of a Bradley-Terry model, given features of chosen less those of rejected"
    def loss(w):
        m = x @ w
        return np.logaddexp(0, -m).sum() + PENALTY/2 * w @ w, -(x.T @ expit(-m)) + PENALTY * w
    return minimize(loss, np.zeros(COLUMNS), jac=True, method='L-BFGS-B', options=dict(maxiter=60)).x


def crossfitted(chosen, rejected, groups):
    "[N] gaps of pairs by models that saw no pair of their group"
    x, fold, gaps = counts(chosen) - counts(rejected), prompt_folds(groups, FOLDS), np.zeros(len(chosen))
    for k in range(FOLDS): gaps[fold == k] = x[fold == k] @ fitted(x[fold != k])
    return gaps


def summary(chosen, rejected, groups, draws=200):
    "What is saved of a data set; the interval comes from drawing groups"
    gaps, size = crossfitted(chosen, rejected, groups), Counter(groups)
    several = np.flatnonzero([size[g] > 1 for g in groups])
    rows = {}
    for i in several: rows.setdefault(groups[i], []).append(i)
    rng, names = np.random.default_rng(0), list(rows)
    def icc(drawn):
        index = [(i, k) for k, g in enumerate(drawn) for i in rows[g]]
        return float(intraclass_correlation(np.abs(gaps[[i for i, _ in index]]), [k for _, k in index]))
    boots = [icc([names[j] for j in rng.integers(len(names), size=len(names))]) for _ in range(draws)]
    right = int((gaps > 0).sum())
    return dict(pairs=len(gaps), groups=len(size), pairs_of_groups_with_several=len(several),
                accuracy=right/len(gaps), accuracy_ci=proportion_confint(right, len(gaps), method='wilson'),
                icc=icc(names), icc_ci=np.quantile(boots, [.025, .975]).tolist(),
                gap_quantiles=np.quantile(np.abs(gaps)/np.abs(gaps).mean(), np.linspace(.1, .9, 9)).round(3).tolist())


def real(name):
    ds, _ = load_preferences(name, aside=True)
    prompts = ds['prompt'][:]
    groups = prompts if name == 'tldr' else [p.split('\n\nAssistant:')[0] for p in prompts]
    return ds['chosen'][:], ds['rejected'][:], groups


def toy(by_prompt, prompts=1300, each=6):
    "As many groups as TL;DR has, and as many pairs in each; answers of the demonstrators"
    world = get_world('toy', **TOY, by_prompt=by_prompt)
    asked = [p for p in world.prompts(prompts, 0) for _ in range(each)]
    ds = world.label(asked, world.demonstrate(asked, 1), world.demonstrate(asked, 2), 3)
    return ds['chosen'][:], ds['rejected'][:], ds['prompt'][:]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='mpo_nb/saved/difficulty.json')
    args = parser.parse_args()
    found = {}
    for name in ('hh-rlhf', 'tldr'): found[name] = summary(*real(name))
    for dial in (0, .25, .5, .75, 1): found[f'toy, by_prompt {dial:g}'] = summary(*toy(dial))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(args.out)) as tmp:
        Path(tmp).write_text(json.dumps(dict(date=str(datetime.date.today()), machine=platform.machine(),
                                             world=TOY, data=found), indent=1) + '\n')
    for name, row in found.items():
        lo, hi = row['icc_ci']
        print(f"{name:22} {row['pairs']:5} pairs, {row['groups']:4} groups, accuracy {row['accuracy']:.3f}, "
              f"ICC of |gap| {row['icc']:.2f} [{lo:.2f}, {hi:.2f}]")
