"""How long does an iteration of PPO take? `mpo_nb.ppo_trainer.PPOTrainer` against TRL 1.12.0's PPOTrainer, the
last that TRL had.

    python benchmarks/ppo.py [--settings fixed trunk early early+trunk long] [--rounds 6] [--trl FOLDER]
    [--out FOLDER]

Same random Llama (vocabulary 512, width 128, 3 layers), reward model and critic, prompts (8 to 32 tokens), 64
episodes an iteration, epochs, response lengths, micro-batches, optimizer and precision (fp32).
Each trainer runs in a process of its own (so that each has its own peak of memory), and they take turns: one
iteration of ours, one of TRL's, and so on. Reported are medians over the rounds after a warm-up,
split into rollout, scoring and update, with a profile of our update, the ratio, and the share of the peak
speed of matrix multiplication that was measured beside them; once by the clock, once in seconds of processor
time: where other programs
run on the same cores, the clock says little and the second ratio is the one to read.

TRL 1.12.0 is installed without its dependencies into FOLDER (default: below the user's cache folder), where
it stands ahead on the path of its own process only."""
import argparse, datetime, json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

TRL = 'trl==1.12.0'
VOCAB, WIDTH, LAYERS, HEADS, EPISODES, PROMPT = 512, 128, 3, 4, 64, (8, 32)
# every response has 32 tokens; separate critic
SETTINGS = {'fixed': dict(tokens=32, epochs=4),
            'trunk': dict(tokens=32, epochs=4, trunk=True),                     # ours: value head on the policy's trunk
            # responses end early, after a third of the limit on average
            'early': dict(tokens=32, epochs=4, mean=32 / 3),
            'early+trunk': dict(tokens=32, epochs=4, mean=32 / 3, trunk=True),
            'long': dict(tokens=128, epochs=1)}                                 # one epoch, 128 tokens
MICRO = 16                                                                      # rows of a micro-batch, in both


# ---- the same task for both

def eos_chance(mean, limit):
    "Probability of EOS at each token such that min(length, limit) is `mean` on average"
    lo, hi = 1e-6, 1.
    for _ in range(60):
        p = (lo + hi) / 2
        lo, hi = (p, hi) if (1 - (1 - p) ** limit) / p > mean else (lo, p)
    return p

def task(tokens, mean=None, **_):
    "Tokenizer, policy, reward model and prompts; the policy's EOS has the wanted chance, or none"
    import math, torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
    words = {w: i for i, w in enumerate(['<pad>', '<eos>', '<unk>'] + [f'w{i}' for i in range(3, VOCAB)])}
    raw = Tokenizer(models.WordLevel(words, unk_token='<unk>'))
    raw.pre_tokenizer = pre_tokenizers.Split(' ', 'removed')
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>',
                                  padding_side='left')
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256,
                         pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1)
    policy, reward = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    p = eos_chance(mean, tokens) if mean else 0
    bias = math.log(p / (1 - p) * (VOCAB - 1)) if p else -1e4
    offset = torch.zeros(VOCAB).index_fill_(0, torch.tensor(1), bias)
    policy.lm_head.register_forward_hook(lambda module, args, out: out + offset)
    lengths = torch.randint(PROMPT[0], PROMPT[1] + 1, (1024,)).tolist()
    return tok, policy, reward, [' '.join(f'w{i}' for i in torch.randint(3, VOCAB, (n,)).tolist()) for n in lengths]

def arguments(folder, tokens, epochs, micro, rounds):
    "What both trainers are told"
    return dict(output_dir=folder, learning_rate=3e-6, num_ppo_epochs=epochs, num_mini_batches=1,
                per_device_train_batch_size=micro, kl_coef=.05, temperature=1., missing_eos_penalty=1.,
                report_to='none', save_strategy='no', use_cpu=True, bf16=False, disable_tqdm=True, seed=0)


# ---- one worker: an iteration whenever the line "go" comes in

class Watch:
    """Seconds of the three parts of an iteration by the clock and of all cores, one JSON line each time; waits
    for its turn between two"""
    def __init__(self): self.marks, self.tokens = {}, 0
    def mark(self, name): self.marks.setdefault(name, (time.perf_counter(), time.process_time()))
    def turn(self):
        if self.marks:
            self.mark('end')
            at = [self.marks[k] for k in ('start', 'sampled', 'scored', 'end')]
            parts = {name + kind: at[i + 1][c] - at[i][c] for c, kind in enumerate(('', '_cpu'))
                     for i, name in enumerate(('rollout', 'scoring', 'update'))}
            say(seconds=at[3][0] - at[0][0], cpu=at[3][1] - at[0][1], **parts, tokens=self.tokens,
                peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if sys.stdin.readline().strip() != 'go': raise KeyboardInterrupt
        self.marks = {}
        self.mark('start')

def say(**kw): print('@' + json.dumps(kw), flush=True)

def ours(folder, watch, tokens, epochs, micro, rounds, trunk=False, **how):
    "PPOTrainer of this project; the parts are told apart at `sample` and at the end of `_rollout`"
    from datasets import Dataset
    from mpo_nb import ppo_trainer
    from mpo_nb.reward import RewardModel
    tok, policy, reward, prompts = task(tokens, **how)
    reward = RewardModel(reward, tok)
    args = ppo_trainer.PPOConfig(**arguments(folder, tokens, epochs, micro, rounds), rollout_batch_size=EPISODES,
                                 max_new_tokens=tokens, num_rollouts=rounds + 1, gradient_checkpointing=False,
                                 **(dict(share_trunk=True) if trunk else {}))
    trainer = ppo_trainer.PPOTrainer(policy, None, reward, None if trunk else reward, args,
                                     train_dataset=Dataset.from_dict({'prompt': prompts}), processing_class=tok)
    sample, rollout = ppo_trainer.sample, trainer._rollout
    def sampled(*a, **kw):
        out = sample(*a, **kw)
        watch.mark('sampled'); watch.tokens = sum(map(len, out.completion_ids))
        return out
    def scored(k):
        watch.turn(); rollout(k); watch.mark('scored')
    ppo_trainer.sample, trainer._rollout = sampled, scored
    return trainer

def trl(folder, watch, tokens, epochs, micro, rounds, mean=None, **_):
    "TRL's PPOTrainer; the parts are told apart at `batch_generation` and at the first micro-batch"
    import copy
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    from transformers import PrinterCallback
    tok, policy, reward, prompts = task(tokens, mean)
    args = PPOConfig(**arguments(folder, tokens, epochs, micro, rounds),
                     gradient_accumulation_steps=EPISODES // micro, response_length=tokens,
                     total_episodes=EPISODES * (rounds + 1), stop_token='eos' if mean else None,
                     num_sample_generations=0, gradient_checkpointing=False, logging_steps=1)
    data = Dataset.from_dict({'input_ids': tok(prompts)['input_ids']})
    ref = copy.deepcopy(policy)
    trainer = PPOTrainer(args, tok, policy, ref, reward, data, copy.deepcopy(reward))
    trainer.remove_callback(PrinterCallback)
    generation, accumulate, loader = ppo_trainer.batch_generation, trainer.accelerator.accumulate, trainer.dataloader
    def sampled(*a, **kw):
        out = generation(*a, **kw)
        watch.mark('sampled')
        new = out[0][:, a[1].shape[1]:]
        watch.tokens = int(((new == tok.eos_token_id).cumsum(1) - (new == tok.eos_token_id).long() == 0).sum())
        return out
    def scored(model):
        watch.mark('scored')
        return accumulate(model)
    class Turns:
        def __iter__(self):
            while True:
                for batch in loader: watch.turn(); yield batch
    ppo_trainer.batch_generation, trainer.accelerator.accumulate, trainer.dataloader = sampled, scored, Turns()
    return trainer

class Profiled:
    "In place of a `Watch`: profiles the update of the third iteration"
    def __init__(self):
        from torch.profiler import ProfilerActivity, profile
        self.n, self.tokens, self.profiler = 0, 0, profile(activities=[ProfilerActivity.CPU])
    def mark(self, name):
        if name == 'scored' and self.n == 3: self.profiler.start()
    def turn(self):
        if self.n == 3: self.profiler.stop(); raise KeyboardInterrupt
        self.n += 1

KINDS = {'matrix products': ('mm', 'addmm', 'bmm'), 'attention': (
             '_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_flash_attention_for_cpu_backward')}

def shares(profiler):
    "Kind of operation -> its share of the time of all operations"
    times = {e.key.removeprefix('aten::'): e.self_cpu_time_total for e in profiler.key_averages()}
    return {kind: round(sum(times.get(k, 0) for k in ops) / sum(times.values()), 3) for kind, ops in KINDS.items()}

def update_profile(setting, micro):
    "Our update: share of its operations' time by kind, and places of its micro-batches beside those that hold a token"
    with tempfile.TemporaryDirectory() as folder:
        watch, places = Profiled(), dict(all=0, real=0)
        trainer = ours(folder, watch, micro=micro, rounds=3, **SETTINGS[setting])
        made = trainer._micro_batch
        def counted(rows):
            mb = made(rows)
            for k, n in (('all', mb['attention_mask'].numel()), ('real', int(mb['attention_mask'].sum()))):
                places[k] += n
            return mb
        trainer._micro_batch = counted
        try: trainer.train()
        except KeyboardInterrupt: pass
    return dict(shares=shares(watch.profiler), real_places=round(places['real'] / places['all'], 3),
                places_per_row=round(places['all'] / (3 * SETTINGS[setting]['epochs'] * EPISODES), 1))

def work(who, setting, micro, rounds):
    import torch, transformers
    transformers.logging.set_verbosity_error()
    if who == 'profile': return say(**update_profile(setting, micro))
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch()
        trainer = dict(ours=ours, trl=trl)[who](folder, watch, micro=micro, rounds=rounds, **SETTINGS[setting])
        say(ready=True, before=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            threads=torch.get_num_threads())
        try: trainer.train()
        except KeyboardInterrupt: return
        watch.turn()


# ---- the one that calls the turns

def installed(folder):
    "TRL 1.12.0 in a folder of its own"
    if not (Path(folder)/'trl').is_dir():
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(folder), TRL],
                       check=True)
    return folder

def start(who, setting, micro, rounds, folder):
    path = os.pathsep.join(filter(None, [str(folder) if who == 'trl' else '', os.environ.get('PYTHONPATH', '')]))
    env = os.environ | dict(PYTHONPATH=path, HF_HUB_OFFLINE='1', TRL_EXPERIMENTAL_SILENCE='1', PYTHONWARNINGS='ignore')
    p = subprocess.Popen([sys.executable, __file__, '--worker', who, setting, str(micro), str(rounds)], env=env,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return p, answer(p)

def answer(p):
    for line in p.stdout:
        if line.startswith('@'): return json.loads(line[1:])
    raise SystemExit(f'a worker ended: {p.args}')

def iteration(p):
    p.stdin.write('go\n'); p.stdin.flush()
    return answer(p)

def gemm_peak(n=1024):
    """Operations (multiplications and additions of fp32 matrices) in a second of processor time: the best of
    several tries"""
    import torch
    a, best = torch.randn(n, n), 0
    for _ in range(20):
        t = time.process_time(); a @ a
        best = max(best, 2 * n ** 3 / (time.process_time() - t))
    return best

def needed(tokens, epochs, mean=None, trunk=False, **_):
    """Floating-point operations that an iteration needs on real tokens: rollout, reference, reward, critic, and
    three times the forward for each update; attention left out"""
    # weights of a layer: 4 of attention, 12 of the gated MLP, in units of WIDTH²
    body, head = LAYERS * 16 * WIDTH ** 2, VOCAB * WIDTH
    rows, completion = EPISODES * (sum(PROMPT) / 2 + (mean or tokens)), EPISODES * (mean or tokens)
    lm, value = 2 * (rows * body + completion * head), 2 * rows * body * (not trunk)
    return 2 * lm + 2 * rows * body + value + 3 * epochs * (lm + value)

def middle(runs): return {k: statistics.median(r[k] for r in runs) for k in runs[0]}

def compare(setting, micro, rounds, folder):
    workers, runs = {}, {'ours': [], 'trl': []}
    for who in runs: workers[who], first = start(who, setting, micro, rounds, folder); runs[who].append(first)
    for _ in range(rounds):
        for who, p in workers.items(): runs[who].append(iteration(p))
    for p in workers.values(): p.stdin.close(); p.wait()
    out = dict(profile=start('profile', setting, micro, rounds, folder)[1])
    for who, (first, warm, *rest) in runs.items():
        out[who] = middle(rest) | dict(peak=max(r['peak'] for r in rest), before=first['before'],
                                       all_seconds=[round(r['seconds'], 4) for r in rest])
    out['threads'] = runs['ours'][0]['threads']
    out['ratio'], out['ratio_cpu'] = (out['trl'][k] / out['ours'][k] for k in ('seconds', 'cpu'))
    return out

def show(name, r, peak):
    print(f'\n{name}: {SETTINGS[name]}, micro-batches of {r["micro"]}')
    for who in ('ours', 'trl'):
        x = r[who]
        for k, kind in (('seconds', ''), ('cpu', '_cpu')):
            print(f'  {who:4} {x[k]:.3f} s {"of the processor" if kind else "by the clock"} (rollout '
                  f'{x["rollout" + kind]:.3f}, scoring {x["scoring" + kind]:.3f}, update {x["update" + kind]:.3f})',
                  end='')
            print(f', {EPISODES / x[k]:.1f} episodes/s' if not kind else '')
        print(f'       mean length {x["tokens"] / EPISODES:.1f}, {r["flop"] / x["cpu"] / peak:.0%} of the GEMM peak '
              f'(processor time), peak memory {x["peak"]:.0f} MiB ({x["before"]:.0f} before the run)')
    print('       our update: ' + ', '.join(f'{k} {x:.0%}' for k, x in r['profile']['shares'].items())
          + f' of the operations\' time; {r["profile"]["places_per_row"]} places a row, '
          f'{r["profile"]["real_places"]:.0%} of them tokens')
    print(f'  ratio {r["ratio"]:.2f} by the clock, {r["ratio_cpu"]:.2f} in processor time')

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
    p.add_argument('--rounds', type=int, default=6, help='iterations of each, of which the first is a warm-up')
    p.add_argument('--micro', type=int, default=MICRO)
    p.add_argument('--trl',
                   default=os.environ.get('TRL_FOLDER', Path.home()/'.cache'/'mpo_nb'/TRL.replace('==', '-')),
                   help='folder of TRL 1.12.0; installed there if it is missing')
    p.add_argument('--out', default=Path(__file__).parent.parent/'mpo_nb'/'saved')
    a = p.parse_args()
    import torch, transformers
    from mpo_nb.core import replacing
    folder, peak = installed(Path(a.trl)), gemm_peak()
    machine = dict(cores=os.cpu_count(), threads=torch.get_num_threads(), gemm_gflops_of_a_core=round(peak / 1e9, 1))
    result = dict(date=datetime.date.today().isoformat(), machine=machine,
                  versions=dict(torch=torch.__version__, transformers=transformers.__version__, trl='1.12.0'),
                  settings={})
    for name in a.settings:
        r = result['settings'][name] = dict(SETTINGS[name], micro=a.micro, flop=needed(**SETTINGS[name]),
                                            **compare(name, a.micro, a.rounds, folder))
        show(name, r, peak)
        with replacing(Path(a.out)/'ppo.json') as tmp: Path(tmp).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else: main()
