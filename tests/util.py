"Tiny random models, tokenizers, trainers and plain references for the tests."
import copy
import hashlib
import json
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (AutoModelForCausalLM, GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig,
                          PreTrainedTokenizerFast, Qwen2Config, TrainerCallback)

from forks import run_code
from mpo_nb.toy_language import ABSURD, word_tokenizer
from mpo_nb.worlds import get_world

KINDS = 'gpt2', 'llama', 'neox', 'qwen2', 'gemma'

# ---- runs

def without_pictures(set=setattr):
    "Pages without their figures, whose drawing takes a third of a tiny run: for runs whose pages nobody looks at"
    import mpo_nb.report, mpo_nb.study
    empty = 'data:image/svg+xml;base64,'
    for module in (mpo_nb.report, mpo_nb.study): set(module, 'drawn', lambda *args, **kw: empty)
    set(mpo_nb.report, 'as_image', lambda fig: empty)

# ---- tokenizers

@cache
def toy_world(): return get_world('toy')

def absurd(text):
    "Does the text hold one of the absurd objects? The seeds of these tests were chosen for a vocabulary without them"
    return any(f' {o}.' in text for os in ABSURD.values() for o in os)

@cache
def toy_tokenizer():
    return word_tokenizer(toy_world().all_prompts() + [f' {s}' for s in toy_world().book if not absurd(f' {s}')])

def pad_is_eos(tok):
    "The same tokenizer with its EOS token as pad token"
    tok = copy.deepcopy(tok)
    tok.pad_token = tok.eos_token
    return tok

@cache
def bpe(kind):
    """A small BPE tokenizer like that of `gpt2` (byte level, no BOS), `llama` (BOS, word marks) or `closing`
    (llama that also ends every text with EOS)"""
    texts = ['Answer: hello world, the answer is here. '] * 20 + ['the world of answers\n\nAssistant: hello'] * 20
    tok, special = Tokenizer(models.BPE(unk_token='<unk>')), ['<pad>', '<s>', '</s>', '<unk>']
    if kind == 'gpt2':
        tok.pre_tokenizer, tok.decoder, alphabet = (pre_tokenizers.ByteLevel(add_prefix_space=False),
                                                    decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet())
    else:
        tok.pre_tokenizer, tok.decoder, alphabet = (pre_tokenizers.Metaspace(), decoders.Metaspace(),
                                                    [chr(c) for c in range(32, 127)] + ['\n'])
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special,
                                                       initial_alphabet=alphabet, show_progress=False))
    if kind != 'gpt2':
        tok.post_processor = processors.TemplateProcessing(single='<s> $A </s>' if kind == 'closing' else '<s> $A',
                                                           special_tokens=[('<s>', 1), ('</s>', 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>',
                                   unk_token='<unk>', clean_up_tokenization_spaces=False,
                                   **({} if kind == 'gpt2' else dict(bos_token='<s>')))

# ---- models

def tiny(kind='llama', vocab=None, seed=0, dropout=0., **kw):
    """A random causal language model of some 10,000 weights, large enough that its logits differ by nats; every
    dropout it has is `dropout`"""
    vocab = vocab or len(toy_tokenizer())
    common = dict(vocab_size=vocab, initializer_range=.3, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    llama = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                 max_position_embeddings=96, attention_dropout=dropout)
    config = {'gpt2': lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=96, resid_pdrop=dropout,
                                         embd_pdrop=dropout, attn_pdrop=dropout, **common | kw),
              'llama': lambda: LlamaConfig(**dict(tie_word_embeddings=True) | llama | common | kw),
              'neox': lambda: GPTNeoXConfig(hidden_dropout=dropout, classifier_dropout=dropout, **llama | common | kw),
              'qwen2': lambda: Qwen2Config(num_key_value_heads=1, **llama | common | kw),
              'gemma': lambda: GemmaConfig(num_key_value_heads=1, head_dim=8, **llama | common | kw)}[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()

def steer(model, token, by, at=None):
    """Add `by` to the logit of `token`, at every forward call or only at call number `at` (from 1); returns a
    list whose length is the number of calls"""
    calls = []
    def hook(module, args, out):
        calls.append(1)
        if at is not None and len(calls) != at: return out
        return out + by * nn.functional.one_hot(torch.tensor(token), out.shape[-1]).to(out)
    model.get_output_embeddings().register_forward_hook(hook)
    return calls

class TableLM(nn.Module):
    """A fake language model: its logits are looked up by (position, token), so a number tells where it was read;
    every logit keeps its gradient"""
    def __init__(self, vocab=11, positions=40):
        super().__init__()
        self.table = nn.Parameter(torch.randn(positions, vocab, vocab, generator=torch.Generator().manual_seed(0)))
        self.config, self.device = SimpleNamespace(_attn_implementation='sdpa'), torch.device('cpu')

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if position_ids is None: position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        self.logits = self.table[position_ids, input_ids]
        if self.logits.requires_grad: self.logits.retain_grad()
        return SimpleNamespace(logits=self.logits)

# ---- plain references

def row_logps(model, prompt_ids, completion_ids, temperature=1.0):
    "Log-probs of the tokens of one completion, alone, without padding, masks or position ids"
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0]
    P = len(prompt_ids)
    return torch.stack([torch.log_softmax(logits[P - 1 + t] / temperature, -1)[i]
                        for t, i in enumerate(completion_ids)])

def weights(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}

def distance(a, b):
    "Largest difference between two sets of weights"
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)

def fingerprint(model):
    "Hash of the very bytes of a model's weights"
    h = hashlib.sha256()
    for k, v in model.state_dict().items(): h.update(k.encode() + v.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

# ---- data

def toy_prompts(n, seed=0): return toy_world().prompts(n, seed)

@cache
def toy_pairs(n=8, seed=0):
    "Preference pairs of the toy world, prompts and completions of unequal length"
    w = toy_world()
    good, bad = w.demonstrations(20 * n, seed=seed), w.demonstrations(20 * n, seed=seed + 1)
    rows = [r for r in zip(good['prompt'], good['completion'], bad['completion']) if not absurd(r[1] + r[2])][:n]
    return Dataset.from_dict(dict(zip(('prompt', 'chosen', 'rejected'), map(list, zip(*rows)))))

# ---- what a run has logged

# clock times; and a mean that `Trainer` takes over the steps since the last resume
NOT_COMPARED = 'time', 'per_second', 'flos', 'train_loss'

def logged(trainer, key=None):
    "Logs of a trainer without those entries; with `key` the list of its values"
    if key: return [l[key] for l in trainer.state.log_history if key in l]
    return [{k: v for k, v in l.items() if not any(t in k for t in NOT_COMPARED)} for l in trainer.state.log_history]

# ---- trainers

def letters(prompts, completions):
    "A reward that is a function of the text alone"
    return [len(c) % 7 - 3. + .1 * (len(p) % 3) for p, c in zip(prompts, completions)]

def talker(kind='gpt2', eos=3., **kw):
    "A tiny model that ends its answers now and then, so that they differ in length"
    model = tiny(kind, **kw)
    steer(model, 1, eos)
    return model

def ppo_trainer(folder, policy=None, ref=None, critic=None, reward=letters, prompts=8, tok=None, trainer=(), **kw):
    "A PPOTrainer for one rollout of 8 completions of up to 6 tokens and one update by SGD, unless `kw` says otherwise"
    from mpo_nb.ppo_config import PPOConfig
    from mpo_nb.ppo_trainer import PPOTrainer
    from mpo_nb.training import trainer_defaults
    args = dict(num_rollouts=1, rollout_batch_size=8, num_ppo_epochs=1,
                per_device_train_batch_size=8, max_new_tokens=6, learning_rate=.05,
                lr_scheduler_type='constant', optim='sgd', max_grad_norm=0., logging_steps=1)
    args = PPOConfig(**trainer_defaults(output_dir=str(folder), **args | kw))
    data = Dataset.from_dict({'prompt': toy_prompts(prompts) if isinstance(prompts, int) else prompts})
    return PPOTrainer(policy or talker(), ref, reward, critic, args, train_dataset=data,
                      processing_class=tok or toy_tokenizer(), **dict(trainer))

def dpo_trainer(folder, policy=None, ref=None, pairs=None, tok=None, trainer=(), **kw):
    "A DPOTrainer for one step by SGD on 8 pairs, unless `kw` says otherwise"
    from mpo_nb.dpo import DPOConfig, DPOTrainer
    from mpo_nb.training import trainer_defaults
    args = dict(max_steps=1, per_device_train_batch_size=8, per_device_eval_batch_size=8, learning_rate=.05,
                lr_scheduler_type='constant', optim='sgd', max_grad_norm=0., logging_steps=1, cache_reference=False)
    args = DPOConfig(**trainer_defaults(output_dir=str(folder), **args | kw))
    return DPOTrainer(policy or tiny(), ref, args, train_dataset=pairs or toy_pairs(),
                      processing_class=tok or toy_tokenizer(), **dict(trainer))

def sha(x):
    "Hash of nested lists, dicts, numbers and tensors"
    plain = lambda x: ({k: plain(v) for k, v in x.items()} if isinstance(x, dict) else [plain(v) for v in x]
                       if isinstance(x, (list, tuple)) else x.tolist() if hasattr(x, 'tolist') else x)
    return hashlib.sha256(repr(plain(x)).encode()).hexdigest()

class AtTheEnd(TrainerCallback):
    "Keeps hashes of everything that a resumed run must have in common with one that was never stopped"
    def on_train_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kw):
        self.state = dict(weights=fingerprint(model), optimizer=sha(optimizer.state_dict()),
                          scheduler=sha(lr_scheduler.state_dict()), step=state.global_step,
                          python=sha(random.getstate()), numpy=sha(np.random.get_state()),
                          torch=sha(torch.get_rng_state()))

def end_state(trainer):
    "What `AtTheEnd` saw, and the logs"
    return next(c for c in trainer.callback_handler.callbacks
                if isinstance(c, AtTheEnd)).state | dict(logs=logged(trainer))

def in_a_new_process(module, folder, checkpoint):
    """`end_state` of `little_run` of a test module, resumed from `checkpoint` by a process whose random
    generators stand elsewhere"""
    code = (f'import conftest, json, sys, torch; torch.manual_seed(99); from {module} import little_run, end_state;'
            'print(json.dumps(end_state(little_run(sys.argv[1], sys.argv[2]))))')
    p = run_code(code, folder, checkpoint)
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout.splitlines()[-1])
