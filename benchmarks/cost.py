"""What does each phase of MPO cost on one core? Our own code paths on random Llamas of several shapes, for the
model of cost in nbs/studies/cost.ipynb, which is fitted to some of the shapes and must predict the others.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--rounds 7] [--out FOLDER]

Phases: the DPO step (forward and backward), scoring by a reward model, sampling, what policy, reference and critic
say of a rollout, the PPO update (forward and backward of policy and critic), and the optimizer. All in fp32, with
one thread. The shapes take turns, so that a busy minute spoils one round of all and not all rounds of one; reported
are medians of processor time, which doesn't count what other programs take, after a round that isn't counted."""
import argparse, datetime, json, statistics, time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from mpo_nb import sampling as S
from mpo_nb.actor_critic import ActorCritic, evaluate_samples
from mpo_nb.core import replacing
from mpo_nb.pairs import collate_pairs, shared_logps
from mpo_nb.ppo import Experience, minibatch, outputs_of, ppo_loss, ppo_losses, PPOSettings
from mpo_nb.reward import score_ids

#              vocabulary, width, layers, prompt, completion, rows
FIT = {'a': (512, 128, 4, 32, 32, 16), 'b': (512, 256, 4, 32, 32, 8), 'c': (4096, 256, 2, 64, 32, 8),
       'd': (512, 384, 4, 64, 64, 4), 'e': (8192, 128, 4, 64, 64, 8), 'f': (2048, 512, 3, 64, 32, 8),
       'g': (512, 256, 8, 128, 32, 4), 'h': (4096, 512, 2, 32, 96, 4), 'i': (1024, 640, 2, 32, 32, 8)}
# the last is wider than any that is fitted
CHECK = {'p': (2048, 256, 6, 48, 48, 8), 'q': (1024, 384, 3, 96, 32, 8), 'r': (4096, 512, 4, 64, 64, 4),
         's': (1024, 768, 3, 48, 32, 4)}


class Tok: pad_token_id, eos_token_id = 0, 1   # all that the decode loop asks of a tokenizer

def models(vocab, width, layers, *_):
    "Policy, reference, and a one-label model of the same body"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=8 * width // 3, num_labels=1,
                         num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
                         max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return LlamaForCausalLM(config), LlamaForCausalLM(config), LlamaForSequenceClassification(config)

def rows_of(vocab, n, rows): return torch.randint(2, vocab, (rows, n)).tolist()

def phases(shape):
    "name -> function without arguments that does one phase once"
    vocab, _, _, p, t, rows = shape
    policy, ref, scorer = models(*shape)
    prompts, chosen, rejected = (rows_of(vocab, n, rows) for n in (p, t, t))
    pairs = collate_pairs([dict(prompt_ids=x, chosen_ids=y, rejected_ids=z)
                           for x, y, z in zip(prompts, chosen, rejected)], 0)
    texts = S.Samples([''] * rows, [''] * rows, prompts, chosen, [True] * rows)
    both = ActorCritic(policy, scorer)
    rollout = evaluate_samples(both, ref, texts, 0)
    exp = Experience(**vars(rollout), advantages=torch.randn_like(rollout.values), returns=rollout.values)
    adam = torch.optim.AdamW(policy.parameters(), 1e-9)

    def dpo():
        policy.zero_grad()
        better, worse = shared_logps(policy, pairs)
        torch.nn.functional.softplus(.1 * (worse - better)).mean().backward()
    def update():
        both.zero_grad()
        mb, a = minibatch(exp, range(rows), 0), PPOSettings()
        (ppo_loss(ppo_losses(outputs_of(both, mb), mb), a, 0.) / mb['mask'].sum()).backward()
    draws = torch.rand(rows, t, dtype=torch.float64)
    def sampling():
        with S.inference(policy): S._decode(policy, Tok, prompts, t, draws=draws, min_new_tokens=t)
    # in this order: the optimizer finds the gradients of the update
    return {'DPO step': dpo, 'reward scoring': lambda: score_ids(scorer, [x + y for x, y in zip(prompts, chosen)], 0),
            'sampling': sampling, 'rollout scoring': lambda: evaluate_samples(both, ref, texts, 0),
            'PPO update': update, 'optimizer': adam.step}

def seconds(f):
    start = time.process_time()
    f()
    return time.process_time() - start

def processor():
    "Name of the processor, as Linux gives it"
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return 'unknown'
    return next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), 'unknown')

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--out', default=Path(__file__).parent.parent/'mpo_nb'/'saved', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    shapes = FIT | CHECK
    todo = {name: phases(shape) for name, shape in shapes.items()}
    seen = {name: {k: [] for k in fs} for name, fs in todo.items()}
    for r in range(a.rounds + 1):
        for name, fs in todo.items():
            for k, f in fs.items(): seen[name][k].append(seconds(f))
        print(f'round {r} of {a.rounds}', flush=True)
    middle = {n: {k: round(statistics.median(x[1:]), 6) for k, x in s.items()} for n, s in seen.items()}
    spread = {n: {k: round(statistics.quantiles(x[1:])[2] / statistics.quantiles(x[1:])[0], 3) for k, x in s.items()}
              for n, s in seen.items()}
    result = dict(date=datetime.date.today().isoformat(), machine=dict(processor=processor(), threads=1),
                  versions=dict(torch=torch.__version__, transformers=transformers.__version__), rounds=a.rounds,
                  shapes={n: dict(shape=s, fit=n in FIT, seconds=middle[n], quartile_ratio=spread[n])
                          for n, s in shapes.items()})
    with replacing(a.out/'cost.json') as tmp: tmp.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
