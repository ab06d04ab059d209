"13_training: settings that suit the machine, a run that stops at NaN, SFT, adapters that share what lies below them."
import copy
import importlib.util
import json
import math

import pytest
import torch
from datasets import Dataset
from util import distance, fingerprint, ppo_trainer, talker, tiny, toy_pairs, toy_tokenizer, weights

from mpo_nb.core import UserError
from mpo_nb.logprobs import encode_completion, encode_prompt
from mpo_nb.reward import reward_model_from
from mpo_nb.training import (
    StopOnNaN, linear_layers, load_adapter, lora_config, new_adapter, parse_dtype, quantization, quiet_peft,
    save_adapter, train_sft, trainer_defaults, with_adapter
)



def demos(n=8):
    p = toy_pairs(n)
    return Dataset.from_dict(dict(prompt=p['prompt'], completion=p['chosen']))


# ---- settings

def test_trainer_defaults_can_be_overridden():
    assert trainer_defaults(logging_steps=3)['logging_steps'] == 3
    assert trainer_defaults(gradient_checkpointing=True)['activation_checkpointing'] is True
    from trl import RewardConfig
    args = RewardConfig(output_dir='x', **trainer_defaults(gradient_checkpointing=True))
    assert args.activation_checkpointing and args.gradient_checkpointing


def test_stop_on_nan_looks_at_losses_and_rewards_only():
    from transformers import TrainerState
    callback, state = StopOnNaN('ppo'), TrainerState(global_step=7)
    callback.on_log(None, state, None, logs={'loss': 1., 'val/explained_variance': math.nan, 'grad_norm': math.inf,
                                             'learning_rate': 1e-3})
    for key in ('loss/value', 'objective/score', 'rewards/chosen', 'eval_loss'):
        with pytest.raises(UserError, match=f'ppo: {key} is nan at step 7'):
            callback.on_log(None, state, None, logs={key: math.nan})


@pytest.mark.parametrize('gpu, bf16, processor, auto, trains_in_it', [
    (False, False, {}, torch.float32, False), (False, False, dict(amx_bf16=True), torch.bfloat16, False),
    (False, False, dict(avx512_bf16=True), torch.bfloat16, False), (True, True, {}, torch.bfloat16, True),
    (True, False, dict(amx_bf16=True), torch.float32, False)])
def test_auto_is_bf16_only_where_the_hardware_has_it(gpu, bf16, processor, auto, trains_in_it, monkeypatch):
    """A T4 says that it supports bf16 and emulates it; a processor stores frozen weights so, and trains in fp32
    [fails when emulation counts, or the processor behind a GPU]"""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or bf16)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: processor)
    assert parse_dtype('auto') == auto and trainer_defaults()['bf16'] == trains_in_it
    assert parse_dtype('float16') == torch.float16


@pytest.mark.parametrize('name', ['fp16', 'Float32', '', None, 'torch.float32'])
def test_unknown_dtype_names_the_choices(name):
    with pytest.raises(UserError, match='auto, float32, bfloat16, float16'): parse_dtype(name)


@pytest.mark.parametrize('gpu, package, says', [(False, True, 'CUDA GPU'), (False, False, 'CUDA GPU'),
                                                (True, False, 'pip install bitsandbytes')])
def test_four_bits_say_what_is_missing(gpu, package, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: package or None)
    with pytest.raises(UserError, match=says) as e: quantization('4bit')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('bf16, dtype, compute', [(True, 'auto', torch.bfloat16), (False, 'auto', torch.float16),
                                                  (True, 'float32', torch.float32)])
def test_four_bits_where_all_is_there(bf16, dtype, compute, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    q = quantization('4bit', dtype)
    assert q.load_in_4bit and q.bnb_4bit_quant_type == 'nf4' and q.bnb_4bit_use_double_quant
    assert q.bnb_4bit_compute_dtype == compute


def test_no_quantization_is_none_and_others_are_refused():
    assert quantization(None) is None
    with pytest.raises(UserError, match="'8bit': use 4bit"): quantization('8bit')


# ---- adapters

@pytest.mark.parametrize('kw, says', [
    (dict(r=0), 'lora: r is'), (dict(r=1.5), 'lora: r is'), (dict(r='4'), 'lora: r is'), (dict(r=True), 'lora: r is'),
    (dict(r=4, alpha=0), 'lora: alpha is'), (dict(r=4, alpha=math.nan), 'lora: alpha is'),
    (dict(r=4, dropout=1.), 'lora: dropout is'), (dict(r=4, dropout=math.nan), 'lora: dropout is')])
def test_values_that_make_no_adapter_are_refused(kw, says):
    with pytest.raises(UserError, match=says): lora_config(**kw)


@pytest.mark.parametrize('kind, has', [('llama', 'q_proj'), ('gpt2', 'c_attn')])
def test_a_module_that_the_model_lacks_is_named(kind, has):
    """PEFT would be content with the one name that fits [fails when only the first name is looked up]"""
    model = tiny(kind)
    assert has in linear_layers(model) and 'lm_head' not in linear_layers(model)
    with pytest.raises(UserError, match=f"'bogus'; its linear layers are .*{has}"):
        lora_config(4, target_modules=[has, 'bogus'], model=model)
    adapted = new_adapter(model, lora_config(4, target_modules=[has], model=model))
    assert {k.split('.')[-4] for k, p in adapted.named_parameters() if p.requires_grad and 'lora_A' in k} == {has}


def test_defaults_of_an_adapter():
    config = lora_config(3)
    assert (config.r, config.lora_alpha, config.target_modules, config.lora_dropout) == (3, 6, 'all-linear', 0)
    assert lora_config(3, alpha=1, target_modules='all-linear', model=tiny()).target_modules == 'all-linear'


def test_peft_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'peft', None)
    with pytest.raises(UserError, match=r"pip install 'mpo_nb\[peft\]'"): lora_config(4)


def adapted(base, std=.2, seed=0, **kw):
    "An adapter that has learned something"
    model = with_adapter(base, lora_config(2, **kw), seed=seed, task_type='CAUSAL_LM')
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for k, p in model.named_parameters():
            if 'lora_B' in k: p.normal_(std=std)
    return model.eval()


IDS = torch.arange(3, 12)[None]
def logits(model):
    with torch.no_grad(): return model.eval()(IDS).logits


@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
def test_an_adapter_is_saved_alone_loaded_by_peft_and_merged(kind, tmp_path):
    "[fails when the whole model is saved, and when the base is not shared]"
    from peft import PeftModel
    base = tiny(kind)
    model, plain = adapted(base), logits(base)
    save_adapter(model, tmp_path/'a', base='../sft')
    assert {p.name for p in (tmp_path/'a').iterdir()} == {'README.md', 'adapter_config.json',
                                                          'adapter_model.safetensors'}
    assert json.loads((tmp_path/'a'/'adapter_config.json').read_text())['base_model_name_or_path'] == '../sft'
    again = load_adapter(base, tmp_path/'a')
    assert torch.equal(logits(again), logits(model)) and not torch.allclose(logits(again), plain, atol=.1)
    assert torch.equal(logits(base), plain) and not hasattr(base, 'peft_config')   # the base stays a plain model
    assert {p.data_ptr() for p in base.parameters()} < {p.data_ptr() for p in again.parameters()}
    with quiet_peft(): theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'a')
    merged = theirs.merge_and_unload()
    assert type(merged) is type(base) and torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_two_adapters_share_one_base(tmp_path):
    base, n = tiny(), sum(p.numel() for p in tiny().parameters())
    for seed in (0, 1): save_adapter(adapted(base, seed=seed), tmp_path/str(seed))
    a, b = (load_adapter(base, tmp_path/str(seed)) for seed in (0, 1))
    own = sum(p.numel() for k, p in a.named_parameters() if 'lora_' in k)
    held = {p.data_ptr(): p.numel() for m in (base, a, b) for p in m.parameters()}
    assert sum(held.values()) == n + 2*own and not torch.allclose(logits(a), logits(b))


@pytest.mark.parametrize('other', [dict(num_hidden_layers=1), dict(num_hidden_layers=3), dict(hidden_size=32)])
def test_an_adapter_of_another_model_is_refused(other, tmp_path):
    "Fewer layers, more layers, other widths [fails when only PEFT's own checks are made]"
    save_adapter(adapted(tiny(), target_modules='q_proj'), tmp_path/'a')
    with pytest.raises(UserError, match='is not for this model'): load_adapter(tiny(**other), tmp_path/'a')
    with pytest.raises(UserError, match='holds no adapter'): load_adapter(tiny(), tmp_path)
    with pytest.raises(UserError, match='has no adapter to save'): save_adapter(tiny(), tmp_path/'b')


def test_a_saved_adapter_is_trained_further_against_itself(tmp_path):
    """PPO from a policy that is an adapter: the reference is that policy, shares its base, and stays; the base
    stays too [fails when the adapter isn't trainable]"""
    base = talker('llama', tie_word_embeddings=False)
    save_adapter(adapted(base), tmp_path/'a')
    policy = load_adapter(base, tmp_path/'a', trainable=True)
    critic = reward_model_from(tiny(seed=3), toy_tokenizer())
    start, below = weights(policy), fingerprint(base)
    t = ppo_trainer(tmp_path/'run', policy, critic=critic, num_rollouts=2)
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in t.ref_model.parameters()}
    t.train()
    assert distance(weights(t.policy), start) > 0 and fingerprint(base) == below
    assert distance(weights(t.ref_model), start) == 0


# ---- SFT

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_sft_loss_is_the_mean_over_completion_tokens(kind):
    from util import row_logps
    model, tok, ds = tiny(kind), toy_tokenizer(), demos(4)
    with torch.no_grad():
        logps = torch.cat([row_logps(model, encode_prompt(tok, r['prompt']),
                                     encode_completion(tok, r['prompt'], r['completion'])) for r in ds])
    _, history = train_sft(model, tok, ds, max_steps=1, logging_steps=1, per_device_train_batch_size=4)
    assert history[0]['loss'] == pytest.approx(-logps.mean().item(), abs=1e-3)


def test_sft_leaves_a_model_whose_copy_is_its_own():
    "TRL binds a new forward to the model; a deepcopy would go on running the original's weights"
    model, _ = train_sft(tiny(), toy_tokenizer(), demos(), max_steps=1)
    twin, ids = copy.deepcopy(model), torch.arange(3, 9)[None]
    with torch.no_grad():
        before = twin(ids).logits
        for p in model.parameters(): p.zero_()
        assert torch.equal(twin(ids).logits, before) and before.abs().max() > 0
    assert 'forward' not in vars(model) and not model.training


def test_a_checkpoint_of_the_last_step_is_not_trained_further(tmp_path):
    """Killed between its last checkpoint and its end, a run ends with the weights of that checkpoint, in the middle
    of an epoch, too [fails when `Trainer.train` is called: it takes a step more]"""
    from mpo_nb.reward import reward_model_from, train_reward
    from mpo_nb.worlds import get_world
    world = get_world('toy')
    pairs = world.pairs(world.demonstrate, 139, seed=1)
    def train(resume=None):
        model, tok = world.model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        reward, log = train_reward(reward_model_from(model, tok), tok, pairs, output_dir=tmp_path/'run', max_steps=6,
                                   save_strategy='steps', save_steps=3, logging_steps=3, learning_rate=1e-3,
                                   per_device_train_batch_size=32, resume_from_checkpoint=resume)
        return torch.cat([p.detach().cpu().flatten() for p in reward.model.parameters()]), log
    whole, again = train(), train(str(tmp_path/'run'/'checkpoint-6'))
    assert torch.equal(whole[0], again[0]) and max(h['step'] for h in again[1]) == 6
