"""How fast is DPO, and how much memory does it take? `mpo_nb.dpo.DPOTrainer` against TRL 1.16's DPOTrainer with
an explicit copy of the model as reference, TRL's other settings at their defaults.

    python benchmarks/dpo.py [--shapes small prompt vocabulary hh] [--rounds 5] [--data FOLDER] [--model
    FOLDER] [--out FOLDER]

Same random Llama, pairs, batch size, optimizer and precision (fp32); no gradient checkpointing on either
side. Each trainer lives in a process of its own (so each has its own peak of memory), and they take turns:
one epoch of ours, one of TRL's, and so on.
Reported are medians over the rounds, after one that isn't counted, of pairs per second: the pairs divided by
the time of making the trainer (tokenising; for us also the reference log-probs of all pairs, which are
computed anew each time) and of training for one epoch (for TRL with its reference pass).
Seconds are those of the clock and, beside them, those of the processor, which don't suffer from what else
runs on the machine. Peak memory is the peak of the process minus what it held after the imports. The share of
the peak of matrix multiplication counts the multiplications that a plain implementation would need
for the real tokens: 2 per weight and token, three times for training and once for the reference, the LM head
at completion tokens only, attention left out.

Shape hh takes real pairs of HH-RLHF (harmless-base) and a real checkpoint: FOLDERs by argument, or
`MPO_NB_DATA` and the folder models/stories260K beside it. Without them it is left out, and says so."""
import argparse, datetime, json, os, resource, statistics, subprocess, sys, tempfile, time
from contextlib import nullcontext
from pathlib import Path

#                 vocabulary, width, prompt, completion, batch, pairs
SHAPES = {'small':      (512, 128, 32, 32, 32, 1024),
          'prompt':     (512, 128, 128, 32, 32, 512),
          'vocabulary': (32000, 256, 128, 64, 8, 64),
          'hh':         (None, None, None, None, 8, 192)}


# ---- the same task for both

def random_task(vocab, width, prompt, completion, n):
    "Tokenizer (a word a token), random 3-layer Llama, pairs with lengths uniform from 1 to the limit, EOS included"
    import random, torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '<eos>', '<unk>'] + [
                                              f'w{i}' for i in range(3, vocab)])}, unk_token='<unk>'))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>')
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=8 * width // 3,
                                         num_hidden_layers=3, num_attention_heads=4,
                                         num_key_value_heads=4, max_position_embeddings=512,
                                         pad_token_id=0, eos_token_id=1, bos_token_id=None))
    rng = random.Random(0)
    text = lambda limit: ' '.join(f'w{rng.randrange(3, vocab)}' for _ in range(rng.randint(1, limit)))
    return tok, model, [dict(prompt=text(prompt), chosen=' ' + text(completion - 1),
                             rejected=' ' + text(completion - 1)) for _ in range(n)]

def real_task(data, model, n):
    "Pairs of HH-RLHF that fit into the model's 512 tokens"
    from mpo_nb.data import load_preferences
    from mpo_nb.logprobs import load_model
    model, tok = load_model(model)
    ds = load_preferences(str(Path(data)/'hh-rlhf'/'harmless-base'/'test.jsonl.gz'), max_rows=2 * n)
    fits = lambda r: max(len(tok(r['prompt'] + r[k])['input_ids'])
                         for k in ('chosen', 'rejected')) < model.config.max_position_embeddings
    return tok, model, [{k: r[k] for k in ('prompt', 'chosen', 'rejected')} for r in ds if fits(r)][:n]

def task(shape, data, model):
    *size, batch, n = SHAPES[shape]
    return *(real_task(data, model, n) if shape == 'hh' else random_task(*size, n)), batch


# ---- one worker: an epoch whenever the line "go" comes in

def say(**kw): print('@' + json.dumps(kw), flush=True)

def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def worker(who, shape, data, checkpoint):
    import copy, torch
    import datasets
    from datasets import Dataset
    from transformers.utils import logging as hf
    from mpo_nb.training import quiet, trainer_defaults
    from ppo import shares
    if who == 'trl': from trl import DPOConfig, DPOTrainer
    else: from mpo_nb.dpo import DPOConfig, DPOTrainer
    hf.set_verbosity_error(); datasets.disable_progress_bars()
    baseline = peak_mb()
    tok, model, rows, batch = task(shape, data, checkpoint)
    pairs = Dataset.from_list(rows)
    more = {} if who == 'trl' else dict(cache_reference=False)
    say(ready=True, n=len(rows), threads=torch.get_num_threads())
    for line in sys.stdin:
        policy, ref = copy.deepcopy(model), dict(ref_model=copy.deepcopy(model)) if who == 'trl' else {}
        with tempfile.TemporaryDirectory() as folder, quiet():
            args = DPOConfig(**trainer_defaults(output_dir=folder, per_device_train_batch_size=batch,
                                                num_train_epochs=1, max_length=512, learning_rate=1e-5, **more))
            marks = [(time.perf_counter(), time.process_time())]
            trainer = DPOTrainer(policy, args=args, train_dataset=pairs, processing_class=tok, **ref)
            marks.append((time.perf_counter(), time.process_time()))
            with (torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if who == 'profile'
                  else nullcontext()) as profiler:
                trainer.train()
            if who == 'profile': say(shares=shares(profiler)); continue
            marks.append((time.perf_counter(), time.process_time()))
        make, train = ([b - a for a, b in zip(x, y)] for x, y in zip(marks, marks[1:]))
        say(clock=[make[0], train[0]], processor=[make[1], train[1]], peak_mb=peak_mb() - baseline,
            loss=trainer.state.log_history[-1]['train_loss'])


# ---- in turn

class Worker:
    def __init__(self, *args):
        self.p = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--worker', *map(str, args)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info = self.listen()
    def listen(self):
        for line in self.p.stdout:
            if line.startswith('@'): return json.loads(line[1:])
        raise RuntimeError('a worker ended')
    def epoch(self):
        self.p.stdin.write('go\n'); self.p.stdin.flush()
        return self.listen()
    def close(self): self.p.stdin.close(); self.p.wait()

def gemm_peak():
    "Multiplications and additions a second, best of 5 products of 2048 x 2048"
    import torch
    a, best = torch.rand(2048, 2048), 0.
    for _ in range(5):
        t = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - t))
    return best

def needed(tok, model, rows):
    "Floating-point operations of the real tokens for one epoch with its reference pass"
    from datasets import Dataset
    from mpo_nb.pairs import encode_pairs, pair_length
    pairs = encode_pairs(Dataset.from_list(rows), tok)[0]
    head = model.get_output_embeddings().weight.numel()
    body = (sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
            - (0 if model.config.tie_word_embeddings else head))
    completion = sum(len(r['chosen_ids']) + len(r['rejected_ids']) for r in pairs)
    return 4 * 2 * (body * sum(map(pair_length, pairs)) + head * completion)

def profile(shape, data, model):
    "Shares of the kinds of operations in an epoch of ours"
    w = Worker('profile', shape, data, model)
    try: return w.epoch()['shares']
    finally: w.close()

def compare(shape, rounds, data, model):
    workers = {who: Worker(who, shape, data, model) for who in ('ours', 'trl')}
    runs = {who: [] for who in workers}
    for i in range(rounds + 1):
        for who, w in workers.items():
            r = w.epoch()
            if i: runs[who].append(r)   # the first is a warm-up
    n, flops, peak = workers['ours'].info['n'], needed(*task(shape, data, model)[:3]), gemm_peak()
    for w in workers.values(): w.close()
    out = dict(shape=SHAPES[shape], pairs=n, threads=workers['ours'].info['threads'], gemm_gflops=peak / 1e9,
               profile=profile(shape, data, model))
    for who, rs in runs.items():
        med = lambda f: statistics.median(f(r) for r in rs)
        out[who] = dict(pairs_per_s=n / med(lambda r: sum(r['clock'])),
                        train_pairs_per_s=n / med(lambda r: r['clock'][1]),
                        pairs_per_cpu_s=n / med(lambda r: sum(r['processor'])), peak_mb=max(r['peak_mb'] for r in rs),
                        gemm_share=flops / med(lambda r: sum(r['clock'])) / peak, runs=rs)
    for k in ('pairs_per_s', 'train_pairs_per_s', 'pairs_per_cpu_s', 'peak_mb'):
        out[f'ratio_{k}'] = out['ours'][k] / out['trl'][k]
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    data = Path(os.environ.get('MPO_NB_DATA', '../shared/data'))
    p.add_argument('--shapes', nargs='+', default=[*SHAPES], choices=[*SHAPES])
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--data', default=data, type=Path)
    p.add_argument('--model', type=Path)
    p.add_argument('--out', default=Path(__file__).parent.parent/'mpo_nb'/'saved', type=Path)
    a = p.parse_args()
    model = a.model or a.data.parent/'models'/'stories260K'
    import torch, transformers, trl
    from mpo_nb.core import replacing
    result = dict(date=datetime.date.today().isoformat(), cores=os.cpu_count(),
                  memory_gb=round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30),
                  load_before=os.getloadavg()[0], torch=torch.__version__, transformers=transformers.__version__,
                  trl=trl.__version__, rounds=a.rounds, shapes={})
    for shape in a.shapes:
        if shape == 'hh' and not (a.data.is_dir() and model.is_dir()):
            print('hh is left out: no data or no checkpoint at hand')
            continue
        r = result['shapes'][shape] = compare(shape, a.rounds, a.data, model)
        print(f"{shape}: ours {r['ours']['pairs_per_s']:.1f}, TRL {r['trl']['pairs_per_s']:.1f} pairs/s, "
              f"ratio {r['ratio_pairs_per_s']:.2f} (processor time {r['ratio_pairs_per_cpu_s']:.2f}); "
              f"peak memory {r['ours']['peak_mb']:.0f} and {r['trl']['peak_mb']:.0f} MB, ratio "
              f"{r['ratio_peak_mb']:.2f}; GEMM share {r['ours']['gemm_share']:.0%} and {r['trl']['gemm_share']:.0%}",
              flush=True)
        # after each shape: a run that is stopped keeps what it has
        with replacing(a.out/'dpo.json') as tmp: tmp.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: worker(*sys.argv[2:])
    else: main()
