"""How fast are preference pairs scored? `RewardModel.score_pairs` (a prompt read once, batches by length),
`score` (batches by length), and the same model called on batches in the order of the file.

    python benchmarks/scoring.py DATA MODEL [--pairs 2000] [--rounds 2] [--out mpo_nb/saved/scoring.json]

DATA as for `mpo gaps`; MODEL a causal language model, put under a random head: speed doesn't depend on the
weights. The second model is a random Llama with the tokenizer of the first, wider (128, 4 heads of 32, 3
layers) and with room for 1,024 tokens.
All score prompt + chosen and prompt + rejected of the same pairs, tokenizing included, in batches of 64
texts; they take turns, and what is kept is the median. Texts longer than the model's context lose their
beginning, in all three."""
import argparse, datetime, json, logging, os, statistics, sys, time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf

from mpo_nb.core import replacing
from mpo_nb.data import load_preferences
from mpo_nb.logprobs import inference, load_model
from mpo_nb.reward import RewardModel, _right_padded, reward_model_from
from ppo import shares

BATCH = 64


def in_file_order(reward, prompts, completions):
    "The plain way: right-padded batches as they come, the whole model with its head"
    out = []
    with inference(reward.model):
        for i in range(0, len(prompts), BATCH):
            rows = reward._fit([p + c
                                for p, c in zip(*reward.encode_all(prompts[i:i + BATCH], completions[i:i + BATCH]))])
            ids, mask = _right_padded(rows, reward.tok.pad_token_id, reward.model.device)
            out.append(reward.model(input_ids=ids, attention_mask=mask).logits[:, 0].double().cpu().numpy())
    return np.concatenate(out)


def seconds(way, *texts):
    t = time.perf_counter()
    scores = way(*texts)
    return time.perf_counter() - t, scores


def random_llama(tok):
    "Wider and with a longer context than the small checkpoint"
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=128, intermediate_size=512,
                                        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                                        max_position_embeddings=1024, pad_token_id=tok.pad_token_id,
                                        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)).eval()


def profiled(reward, texts):
    "Shares of the kinds of operations in `score_pairs` of 256 pairs"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        reward.score_pairs(*(x[:256] for x in texts), BATCH)
    return shares(p)


def compare(reward, texts, rounds):
    "Seconds of the three ways, and how much faster than the plain one"
    ways = dict(pairs=lambda p, c, r: reward.score_pairs(p, c, r, BATCH),
                texts_by_length=lambda p, c, r: np.stack([reward.score(p, x, BATCH) for x in (c, r)], 1),
                plain=lambda p, c, r: np.stack([in_file_order(reward, p, x) for x in (c, r)], 1))
    runs = {k: [] for k in ways}
    for way in ways.values(): way(*(x[:BATCH] for x in texts))   # warm-up
    for _ in range(rounds):
        for k, way in ways.items(): runs[k].append(seconds(way, *texts))
    for r in runs.values(): np.testing.assert_allclose(r[0][1], runs['plain'][0][1], atol=1e-3)
    t = {k: statistics.median(s for s, _ in r) for k, r in runs.items()}
    heads, ends = reward.encode_all(texts[0]*2, texts[1] + texts[2])
    lengths = [len(h) + len(e) for h, e in zip(heads, ends)]
    return dict(context=reward.max_length, profile=profiled(reward, texts),
                tokens=sum(min(n, reward.max_length) for n in lengths),
                cut_texts=sum(n > reward.max_length for n in lengths), seconds={k: round(x, 2) for k, x in t.items()},
                times_faster_than_plain={k: round(t['plain']/x, 2) for k, x in t.items() if k != 'plain'})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data'), p.add_argument('model')
    p.add_argument('--pairs', type=int, default=2000)
    p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'mpo_nb'/'saved'/'scoring.json')
    a = p.parse_args()
    hf.set_verbosity_error(), hf.disable_progress_bar()
    logging.getLogger('mpo_nb').setLevel(logging.ERROR)   # the plain way would say for each batch that texts are cut
    ds = load_preferences(a.data)
    ds = ds.select(np.random.default_rng(0).permutation(len(ds))[:a.pairs])
    causal, tok = load_model(a.model)
    models = {Path(a.model).name: causal, 'random Llama, 1,024 tokens': random_llama(tok)}
    found = dict(date=f'{datetime.date.today()}', machine=f'{os.cpu_count()} cores, '
                 f'{torch.get_num_threads()} threads used, torch {torch.__version__}', device=str(causal.device),
                 data=Path(a.data).name, pairs=len(ds), batch=BATCH, rounds=a.rounds, models={})
    for name, model in models.items():
        found['models'][name] = compare(RewardModel(reward_model_from(model, tok), tok),
                                        [ds[k][:] for k in ('prompt', 'chosen', 'rejected')], a.rounds)
        print(name, json.dumps(found['models'][name], indent=1))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(a.out) as tmp: Path(tmp).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__': main()
