"""Which engine should draw the rollouts? Sampling 64 completions by `generate` with several caches, by
transformers' continuous batching, and by the loop of `mpo_nb.sampling`.

    python benchmarks/rollouts.py [--rounds 5] [--out FOLDER]

A random Llama (vocabulary 512, width 128, 3 layers), prompts of 8 to 32 tokens, in fp32; completions of 32
and of 128 tokens, all of full length or ending after a third of the limit on average.
The engines take turns; reported are medians after a warm-up, by the clock and in processor time (continuous
batching, many times slower on a CPU, runs once, on the first task). `generate` and `own loop` return token
ids; neither time holds text."""
import argparse, datetime, json, os, statistics, time
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

from mpo_nb import sampling as S
from mpo_nb.core import replacing
from mpo_nb.logprobs import pad_rows
from ppo import eos_chance, gemm_peak, task


def static(model, tok, ids, tokens, draws):
    "`generate` with a cache of its final size from the start"
    config = S._generation_config(tok, tokens, 1.0, greedy=False)
    config.cache_implementation, config.disable_compile = 'static', True
    return with_config(model, tok, ids, config)

def roomy(model, tok, ids, tokens, draws):
    "`generate` with our cache"
    return with_config(model, tok, ids, S._generation_config(tok, tokens, 1.0, greedy=False),
                       past_key_values=S._cache(model))

def with_config(model, tok, ids, config, **kw):
    x, mask = pad_rows(ids, tok.pad_token_id, 'left')
    out = model.generate(x, attention_mask=mask.long(), generation_config=config, **kw)
    return S._up_to_eos(out[:, x.shape[1]:].tolist(), tok.eos_token_id)

def continuous(model, tok, ids, tokens, draws):
    "transformers' continuous batching: paged cache, rows leave and enter the batch at any time"
    config = GenerationConfig(do_sample=True, max_new_tokens=tokens, top_k=0, top_p=1.0,
                              eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    out = model.generate_batch(inputs=ids, generation_config=config, progress_bar=False)
    return [out[k].generated_tokens for k in sorted(out, key=lambda k: int(k.split('_')[-1]))]

ENGINES = {'generate, dynamic cache': lambda m, t, ids, n, u: S._generate(m, t, ids, n, 1.0, u),
           'generate, static cache': static, 'generate, roomy cache': roomy,
           'continuous batching': continuous, 'own loop': lambda m, t, ids, n, u: S._decode(m, t, ids, n, 1.0, u)}


def measure(tokens, mean, rounds):
    tok, model, _, prompts = task(tokens, mean)
    model.eval()
    ids = [tok(p)['input_ids'] for p in prompts[:64]]
    seconds, lengths = {k: [] for k in ENGINES}, {k: [] for k in ENGINES}
    for r in range(rounds + 1):
        for name, engine in ENGINES.items():
            # once is enough: many times slower on a CPU
            if seconds[name] is None or name == 'continuous batching' and (r or tokens > 32 or mean): continue
            torch.manual_seed(r)
            t = time.perf_counter(), time.process_time()
            try: out = engine(model, tok, ids, tokens, torch.rand(64, tokens, dtype=torch.float64))
            except Exception as e:
                print(f'{name}: {type(e).__name__}: {e}'); seconds[name] = None; continue
            seconds[name].append((time.perf_counter() - t[0], time.process_time() - t[1]))
            lengths[name] += map(len, out)
    return {k: dict(**{key: round(statistics.median(x[i] for x in s[1:] or s), 4)
                       for i, key in enumerate(('seconds', 'cpu'))},
                    mean_length=round(statistics.mean(lengths[k]), 1)) for k, s in seconds.items() if s}


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--out', default=Path(__file__).parent.parent/'mpo_nb'/'saved')
    a = p.parse_args()
    transformers.logging.set_verbosity_error()
    result = dict(date=datetime.date.today().isoformat(), machine=dict(cores=os.cpu_count(),
                      threads=torch.get_num_threads(), gemm_gflops_of_a_core=round(gemm_peak() / 1e9, 1)),
                  versions=dict(torch=torch.__version__, transformers=transformers.__version__), settings={})
    with torch.no_grad():
        for tokens in (32, 128):
            for mean in (None, tokens / 3):
                name = f'{tokens} tokens' + (', a third on average' if mean else '')
                result['settings'][name] = times = measure(tokens, mean, a.rounds)
                print(f'{name}:')
                for k, x in times.items():
                    print(f'  {k:24} {x["seconds"] * 1000:6.0f} ms by the clock, '
                          f'{x["cpu"] * 1000:6.0f} ms of the processor   mean length {x["mean_length"]}')
    with replacing(Path(a.out)/'rollouts.json') as tmp: Path(tmp).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
