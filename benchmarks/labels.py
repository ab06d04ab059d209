"""What do gaps say about human labels? Cross-fitted gaps of HH-RLHF and TL;DR, from a reward model that is linear in
the frozen hidden states of a model that understands text.

    python benchmarks/labels.py MODEL [--layer 20] [--rows N] [--out mpo_nb/saved]

MODEL is a folder or Hub id of a chat model (SmolLM2-135M-Instruct); the data are local files (see 02_sources). HH-RLHF
is written by the model's chat template; TL;DR is one message of the user. Long pairs are set aside and counted. Every
text is read once and kept in the cache folder, so a run that was stopped goes on. Takes half an hour to hours on two
cores. Written: labels.parquet, a row a pair: source, number of the prompt, gap and its spread over the folds, fold,
length of both answers in words, what the other comparisons of the post imply (`implied`), file and row of the text; and
labels.json with counts, date and machine."""
import argparse, datetime, json, os, platform, time
from pathlib import Path

import numpy as np
import pandas as pd

from mpo_nb.chats import as_chats
from mpo_nb.core import replacing
from mpo_nb.data import load_preferences
from mpo_nb.features import Features, fit_feature_reward
from mpo_nb.gap import crossfit_gaps, label_agreement
from mpo_nb.keys import DataKeys
from mpo_nb.logprobs import load_model
from mpo_nb.prepare import fit_lengths
from mpo_nb.sources import data_path
from mpo_nb.training import processor_has_bf16

SOURCES = {'helpful-base': ('hh-rlhf', 'helpful-base'), 'helpful-online': ('hh-rlhf', 'helpful-online'),
           'harmless-base': ('hh-rlhf', 'harmless-base'), 'tldr': ('tldr', None)}
LENGTHS, FOLDS = DataKeys(max_prompt_length=400, max_completion_length=160), 5


def usable(name, tok, rows):
    "Pairs in the model's own spelling that fit, and how many were set aside"
    source, subset = SOURCES[name]
    ds = load_preferences(data_path(source), subset=subset, max_rows=rows)
    chats, refused = as_chats(ds, tok)
    kept, long, _ = fit_lengths(chats, tok, LENGTHS)
    return kept, dict(pairs=len(kept), refused=len(refused), too_long=len(long))

def implied(pairs):
    """What two other comparisons with one answer in common say about each pair, [N]: 1 its own label (chosen over
    some c, c over rejected), -1 the opposite, 0 nothing, or both equally often"""
    said = []
    table = pd.DataFrame({k: pairs[k][:] for k in ('prompt', 'chosen', 'rejected')})
    for _, post in table.groupby('prompt'):
        over, answers = {*zip(post.chosen, post.rejected)}, {*post.chosen, *post.rejected}
        way = lambda a, b: sum((a, c) in over and (c, b) in over for c in answers)
        said += [(i, way(a, b) - way(b, a)) for i, a, b in zip(post.index, post.chosen, post.rejected)]
    return np.sign(pd.Series(dict(said)).sort_index().to_numpy())

def scored(features, pairs):
    "A row a pair"
    features(2*pairs['prompt'][:], pairs['chosen'][:] + pairs['rejected'][:])   # all at once, prompts shared
    gaps = crossfit_gaps(pairs, lambda part, fold: fit_feature_reward(features, part), FOLDS)
    words = lambda k: [len(t.split()) for t in pairs[k]]
    number = pd.factorize(pd.Series(pairs['prompt'][:]))[0]
    return gaps, pd.DataFrame(dict(prompt=number, gap=gaps['gap'][:], spread=gaps['gap_spread'][:],
                                   fold=gaps['fold'][:], chosen_words=words('chosen'),
                                   rejected_words=words('rejected'), implied=implied(pairs),
                                   file=pairs['file'][:], row=pairs['row'][:]))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model'); p.add_argument('--layer', type=int, default=20)
    p.add_argument('--rows', type=int); p.add_argument('--out', default='mpo_nb/saved')
    args = p.parse_args()
    model, tok = load_model(args.model)
    low = 'bfloat16' if processor_has_bf16() else None
    features, tables, told = Features(model, tok, args.layer, dtype=low), [], {}
    for name in SOURCES:
        begun = time.perf_counter()
        pairs, counts = usable(name, tok, args.rows)
        gaps, table = scored(features, pairs)
        tables.append(table.assign(source=name))
        told[name] = counts | dict(accuracy=label_agreement(gaps), seconds=round(time.perf_counter() - begun))
        print(name, told[name], flush=True)
    ran = dict(date=str(datetime.date.today()), machine=f'{platform.machine()}, {os.cpu_count()} cores',
               model=Path(args.model).name, layer=args.layer, folds=FOLDS, sources=told)
    with replacing(Path(args.out)/'labels.parquet') as tmp: pd.concat(tables).to_parquet(tmp, index=False)
    with replacing(Path(args.out)/'labels.json') as tmp: Path(tmp).write_text(json.dumps(ran, indent=1) + '\n')


if __name__ == '__main__': main()
