"""How many rollouts does PPO from the DPO model (stage mpo) need for the gold score that PPO from the SFT model
(stage ppo) ends with?

    python benchmarks/rollouts_to_gold.py runs/toy-0 runs/toy-1 ...

Reads each run's ppo/log.json and mpo/log.json: gold of each rollout's completions, on the prompts that the
stage trains on, averaged over 5 rollouts.
The DPO updates that come before stage mpo are not counted: they sample nothing."""
import argparse
import json
import statistics
from pathlib import Path

from mpo_nb.ppo_trainer import rollouts_to_gold

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('runs', nargs='+', type=Path, help='run folders')
parser.add_argument('--window', type=int, default=5, help='rollouts that are averaged (5)')
args = parser.parse_args()

rows = {run.name: rollouts_to_gold(*(json.loads((run/stage/'log.json').read_text(encoding='utf-8'))
                                     for stage in ('ppo', 'mpo')), args.window) for run in args.runs}
print('| run | gold of ppo at its end | rollouts of ppo | rollouts of mpo until there | share |\n|---|---|---|---|---|')
for name, r in rows.items():
    share = f"{r['share']:.0%}" if r['mpo'] else ''
    print(f"| {name} | {r['final']:.2f} | {r['ppo']} | {r['mpo'] or 'not reached'} | {share} |")
shares = [r['share'] for r in rows.values() if r['mpo']]
print(f"\nreached in {len(shares)} of {len(rows)} runs"
      + (f", median share {statistics.median(shares):.0%}; "
         f"at most half of ppo's rollouts in {sum(s <= .5 for s in shares)} of {len(rows)}" if shares else ''))
