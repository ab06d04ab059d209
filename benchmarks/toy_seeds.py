"""MPO against its baselines on the toy world, over seeds: `python benchmarks/toy_seeds.py [--seeds 5] [--output_dir runs/seeds]`.

Runs `mpo run toy --seed K` for every seed (finished runs are not run again) and prints the README's table: gold reward of each policy, and paired differences between
policies over seeds with 95% intervals (Student's t over seeds). The figures go to benchmarks/toy_seeds.json."""
import argparse
import json
import os
from datetime import date
from pathlib import Path

from mpo_nb.data import replacing
from mpo_nb.evaluate import across_seeds
from mpo_nb.mpo import load_recipe, run

POLICIES, PAIRS = ['sft', 'dpo', 'dpo_easy', 'ppo', 'mpo'], [('mpo', 'sft'), ('mpo', 'dpo'), ('mpo', 'ppo'), ('ppo', 'dpo'), ('dpo_easy', 'dpo')]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--output_dir', default='runs/seeds')
    a = p.parse_args()
    runs = [run(load_recipe('toy', seed=k, output_dir=f'{a.output_dir}/{k}')) for k in range(a.seeds)]
    results = [json.loads((r/'evaluation.json').read_text()) for r in runs]
    score = {name: {r['seed']: r['policies'][name]['score'] for r in results} for name in POLICIES}
    mean = lambda name, key: sum(r['policies'][name][key] for r in results) / len(results)
    print('| policy | gold, mean over seeds | each seed | KL to SFT | length |\n|---|---|---|---|---|')
    for n in POLICIES: print(f"| {n} | {mean(n, 'score'):.2f} | {', '.join(f'{s:.2f}' for s in score[n].values())} | {mean(n, 'kl_to_sft'):.1f} | {mean(n, 'length'):.1f} |")
    differences = [dict(a=x, b=y, **across_seeds(score[x], score[y])) for x, y in PAIRS]
    print('\n| difference | mean | 95% interval |\n|---|---|---|')
    for d in differences: print(f"| {d['a']} − {d['b']} | {d['diff']:+.2f} | {d['ci'][0]:+.2f} to {d['ci'][1]:+.2f} |")
    seconds = {s: round(sum(r['stages'][s]['seconds'] for r in results) / len(results), 1) for s in results[0]['stages']}
    out = dict(date=str(date.today()), cores=os.cpu_count(), scores=score, differences=differences, mean_seconds=seconds, kl={n: mean(n, 'kl_to_sft') for n in POLICIES})
    with replacing(Path(__file__).with_name('toy_seeds.json')) as tmp: Path(tmp).write_text(json.dumps(out, indent=1))


if __name__ == '__main__': main()
