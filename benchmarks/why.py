"""Two questions to the finished runs of a study on the toy world: how much do the reward model's scores of two answers
to one prompt differ on easy and on hard prompts, and on which requests did each policy gain?

    python benchmarks/why.py runs/claims-study [--out mpo_nb/saved]

A prompt is easy or hard by one of its pairs, and the variance is taken from another pair of it: by its own pair a hard
prompt would have a small one by definition. For the second question the held-out prompts are put in thirds by the mean
|gap| of the training pairs with the same request, whatever greeting and name stand around it."""
import argparse, re
from pathlib import Path

import numpy as np
import pandas as pd

from mpo_nb.core import replacing

# sentences around a request
AROUND = re.compile(r'(Please help me|I have a question|Excuse me|Hello|Hi|Good \w+|I am \w+)[.!?]\s*')


def request(prompt):
    "What a prompt of the toy world asks for, in its last turn"
    return AROUND.sub('', prompt.rpartition('Human:')[2].split('\n\nAssistant:')[0]).strip()

def variances(gaps):
    "A row for the easy prompts and one for the hard ones: variance of reward and gold between two answers of a prompt"
    several = gaps[gaps.groupby('prompt').prompt.transform('size') == 2].sort_values('prompt', kind='stable')
    first, other = several.iloc[::2].reset_index(), several.iloc[1::2].reset_index()
    table = pd.DataFrame(dict(set=first.set, reward=other.gap**2/2,
                              gold=(other.gold_chosen - other.gold_rejected)**2/2))
    return table.groupby('set').agg(reward=('reward', 'mean'), gold=('gold', 'mean'), prompts=('gold', 'size'))

def gains(gaps, completions):
    "Mean gold of each policy on easy, middle and hard requests"
    difficulty = gaps.gap.abs().groupby(gaps.prompt.map(request)).mean()
    of_prompt = completions.prompt.map(request).map(difficulty)
    third = pd.qcut(of_prompt.rank(method='dense'), 3, labels=['hard', 'middle', 'easy'])
    return completions.groupby(['policy', third.rename('third').astype(str)]).agg(gold=('score', 'mean'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('study'); p.add_argument('--out', default='mpo_nb/saved')
    args = p.parse_args()
    tables = dict(why_variance=[], why_gain=[])
    for cell in sorted(Path(args.study).glob('shipped/seed-*')):
        if not (cell/'report').is_dir(): continue   # not finished
        gaps, completions = (pd.read_parquet(cell/f'{k}.parquet') for k in ('gaps', 'completions'))
        seed = int(cell.name.split('-')[1])
        tables['why_variance'].append(variances(gaps).reset_index().assign(seed=seed))
        tables['why_gain'].append(gains(gaps, completions).reset_index().assign(seed=seed))
    for name, parts in tables.items():
        with replacing(Path(args.out)/f'{name}.parquet') as tmp: pd.concat(parts).to_parquet(tmp, index=False)
    print(f'{len(parts)} seeds')


if __name__ == '__main__': main()
