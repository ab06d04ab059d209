"""Sampling: reported defects of other implementations (numbered as in the project's list of known defects) that
ours must not have.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, MambaConfig, MistralConfig

from mpo_nb import sampling as S
from mpo_nb.core import UserError
from mpo_nb.logprobs import collate, decode_completion, encode_prompt, inference, sequence_logprobs
from mpo_nb.sampling import check_sampling, sample, seeded
from util import KINDS, pad_is_eos, row_logps, steer, tiny, toy_prompts, toy_tokenizer
from test_logprobs import ANSWERS, PROMPTS

pytestmark = pytest.mark.usefixtures('own_random_state')

# ---- temperature and the sampling distribution

def test_item07_temperature_zero_is_refused(tok):
    "[fails when the check in `sample` is left out: generate's own ValueError is no UserError]"
    for t in (0, 1e-9, -1): pytest.raises(UserError, sample, tiny(), tok, toy_prompts(1), 3, temperature=t)
    assert len(sample(tiny(), tok, toy_prompts(1), 3, temperature=0, greedy=True)) == 1


LEAKY = dict(top_k=5, repetition_penalty=1.5, min_p=.5, temperature=.3, no_repeat_ngram_size=1, suppress_tokens=[7])

@pytest.fixture(params=['own loop', 'generate'])
def engine(request, monkeypatch):
    "Sampling by our own loop, and by the model's `generate` as for models that the loop can't run"
    if request.param == 'generate': monkeypatch.setattr(S, '_network', lambda model: None)
    return request.param

def test_item08_the_models_generation_config_is_ignored(tok, monkeypatch, engine):
    """The scores that are sampled from are logits / T of a pass without cache, whatever the model's own
    settings; those are put back [fails when `_plain_generation` does nothing, and when `_decode` leaves the
    temperature out]"""
    model, seen = tiny('gpt2'), []
    model.generation_config = own = GenerationConfig(do_sample=True, **LEAKY)
    run = S._engine(model)
    monkeypatch.setattr(S, '_engine', lambda model: lambda *a, **kw: run(*a, seen=seen, **kw))
    s = sample(model, tok, toy_prompts(3), 6, temperature=.8, batch_size=1)
    order = sorted(range(3), key=lambda i: len(s.prompt_ids[i]))
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([s.prompt_ids[i] + s.completion_ids[i]]))
                            .logits[0, len(s.prompt_ids[i]) - 1:-1] for i in order])
    assert len(seen) == len(logits) >= 6
    torch.testing.assert_close(torch.cat(seen), logits / .8, atol=1e-4, rtol=1e-4)
    assert model.generation_config is own and own.top_k == 5


def test_item08_samples_follow_the_models_distribution(tok, engine):
    """3,000 sampled first tokens against softmax(logits / T): chi-squared [fails when `_generation_config`
    leaves `top_k` to its default of 50, and when `_pick` leaves the temperature out]"""
    model, (prompt,) = tiny('gpt2'), toy_prompts(1)
    model.generation_config = GenerationConfig(do_sample=True, **LEAKY)
    drawn = [c[0] for c in sample(model, tok, [prompt] * 3000, 1, temperature=1.3, batch_size=1000).completion_ids]
    with torch.no_grad():
        p = (model(torch.tensor([encode_prompt(tok, prompt)])).logits[0, -1] / 1.3).softmax(-1).double().numpy()
    order = np.argsort(p)
    bins = np.array_split(order, 20)                                      # rare tokens together
    observed, expected = [np.isin(drawn, b).sum() for b in bins], [p[b].sum() * 3000 for b in bins]
    assert stats.chisquare(observed, np.array(expected) * 3000 / np.sum(expected)).pvalue > 1e-4


def test_item08_every_token_of_the_own_loop_follows_the_distribution(tok):
    """2,000 completions with rows leaving the batch all the time: at each step, the probabilities of the drawn
    tokens' place in the distribution function are uniform (Kolmogorov-Smirnov) [fails when the rows that
    leave the batch aren't taken out of the cache]"""
    model = tiny('llama', seed=4)
    steer(model, tok.eos_token_id, by=3.5)
    s = sample(model, tok, toy_prompts(5) * 400, 8, temperature=.9, batch_size=500)
    assert len(set(map(len, s.completion_ids))) == 8
    rng = np.random.default_rng(0)
    for chunk in (slice(0, 1000), slice(1000, 2000)):
        batch = collate(s.prompt_ids[chunk], s.completion_ids[chunk], tok.pad_token_id)
        with torch.no_grad(): p = (S.completion_logits(model, batch) / .9).softmax(-1).double()
        below = p.cumsum(-1).gather(-1, batch.completion_ids[..., None])[..., 0]
        place = below - p.gather(-1,
                                 batch.completion_ids[..., None])[..., 0] * torch.from_numpy(rng.random(below.shape))
        for t in range(8): assert stats.kstest(place[:, t][batch.mask[:, t]].numpy(), 'uniform').pvalue > 1e-4


def test_item08_rare_tokens_keep_their_probability():
    """100,000 tokens of 1e-8 beside one of 0.999: numbers 1e-8 apart draw 200 of them, one after the other
    [fails when the distribution function is in fp32]"""
    logits = torch.cat([torch.tensor([.999]), torch.full((100_000,), 1e-8)]).log().expand(50, -1)
    drawn = torch.cat([S._pick(logits, .9991 + 1e-8 * torch.arange(i, i + 50, dtype=torch.float64))
                       for i in range(0, 200, 50)])
    assert len(drawn.unique()) == 200 and drawn.diff().abs().max() <= 2


def test_a_model_that_predicts_nan_is_refused(tok):
    "[fails when `_pick` doesn't look: token V - 1 would be drawn for ever]"
    model = tiny()
    model.get_input_embeddings().weight.data.fill_(float('nan'))
    with pytest.raises(UserError, match='NaN'): sample(model, tok, toy_prompts(2), 3)


def test_item08_the_check_on_the_first_rollout_sees_a_leak(tok, monkeypatch):
    "[fails when `check_sampling` compares with the processed scores]"
    for network in (S._network, lambda model: None):                      # the own loop, and generate
        monkeypatch.setattr(S, '_network', network)
        check_sampling(tiny(), tok, toy_prompts(1)[0], temperature=.7)
    for leak in (dict(top_k=5), dict(repetition_penalty=1.5), dict(min_p=.5), dict(temperature=.5)):
        monkeypatch.setattr(S, '_generation_config', lambda *a, **kw: GenerationConfig(**dict(do_sample=True,
                                    max_new_tokens=3, top_k=0, eos_token_id=1, pad_token_id=0) | leak))
        with pytest.raises(RuntimeError): check_sampling(tiny(), tok, toy_prompts(1)[0], temperature=.7)


@pytest.mark.parametrize('leak',
                         [lambda x: x.masked_fill(x < x.topk(5).values[:, -1:], float('-inf')), lambda x: x * 1.3])
def test_item08_the_check_sees_a_leak_in_the_own_loop(leak, tok, monkeypatch):
    "[fails when `check_sampling` compares the loop's scores with themselves]"
    plain = S._next_logits
    monkeypatch.setattr(S, '_next_logits', lambda *a: leak(plain(*a)))
    with pytest.raises(RuntimeError): check_sampling(tiny(), tok, toy_prompts(1)[0], temperature=.7)


# ---- the own loop

def windowed(kind):
    "A model of which every layer, or every other one, sees 8 tokens"
    config = dict(vocab_size=len(toy_tokenizer()), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=8, intermediate_size=24, sliding_window=8,
                  initializer_range=.3, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**config)).eval()

@pytest.mark.parametrize('kind', [*KINDS, MistralConfig, Gemma2Config])
def test_the_own_loop_says_what_generate_says(kind, tok):
    """Greedy, 12 prompts of unequal length, rows ending at all times, stores growing beyond their first room
    [fails when positions aren't counted on, when rows that leave aren't taken out of the cache, and when the
    store isn't copied as it grows]"""
    model = tiny(kind, seed=2) if isinstance(kind, str) else windowed(kind)
    steer(model, tok.eos_token_id, by=2.)
    ids = [encode_prompt(tok, p) for p in toy_prompts(12)]
    with inference(model): own, theirs = (f(model, tok, ids, 45) for f in (S._decode, S._generate))
    assert S._network(model) is model and own == theirs and len(set(map(len, own))) > 1


def test_models_that_the_own_loop_cannot_run_are_left_to_generate(tok):
    """Recurrent layers (Mamba) or a `generate` of their own; they sample all the same [fails when `_network`
    doesn't look at the cache's layers]"""
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=2,
                                                         state_size=4, pad_token_id=0, eos_token_id=1)).eval()
    class Own(type(tiny())):
        def generate(self, *a, **kw): return super().generate(*a, **kw)
    own = Own(tiny().config).eval()
    hybrid = tiny()
    hybrid.config.layer_types = ['full_attention', 'linear_attention']
    assert [S._network(m) for m in (mamba, own, hybrid)] == [None] * 3
    for model in (mamba, own):
        s = sample(model, tok, toy_prompts(3), 5)
        assert (s.completion_ids == sample(model, tok, toy_prompts(3), 5).completion_ids
                and all(0 < len(c) <= 5 for c in s.completion_ids))
        check_sampling(model, tok, toy_prompts(1)[0])


def test_the_own_loop_runs_inside_lora(tok):
    """An adapter that isn't zero changes what is said, as in generate; prompt tuning is left to generate [fails
    when `_network` hands back the wrapper's bare weights, or doesn't look for prompt learning]"""
    bare = tiny()
    model = get_peft_model(copy.deepcopy(bare), LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj', 'v_proj'],
                                                           init_lora_weights=False)).eval()
    ids = [encode_prompt(tok, p) for p in toy_prompts(6)]
    with inference(model):
        runs = [f(m, tok, ids, 20) for m, f in ((model, S._decode), (model, S._generate), (bare, S._decode))]
    assert runs[0] == runs[1] != runs[2]
    tuned = get_peft_model(bare, PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3))
    assert S._network(tuned) is None


def test_ended_rows_cost_nothing(tok):
    """Rows leave the batch when a quarter of it has ended: the forward sees fewer and fewer, and each only the
    new token [fails when no row leaves]"""
    model, shapes = tiny('llama', seed=4), []
    steer(model, tok.eos_token_id, by=3.5)
    model.register_forward_pre_hook(lambda m, a, kw: shapes.append(tuple(kw['input_ids'].shape)), with_kwargs=True)
    s = sample(model, tok, toy_prompts(40), 30)
    lens = sorted(map(len, s.completion_ids))
    assert lens[10] < lens[20] < lens[-1]                                 # else the test shows nothing
    assert shapes[0][0] == 40 and all(w == 1 for _, w in shapes[1:]) and len(shapes) == lens[-1]
    for t, (rows, _) in enumerate(shapes): assert rows * .75 < sum(n > t for n in lens) <= rows


@pytest.mark.parametrize('size', [1, 3, 7])
def test_a_completion_does_not_depend_on_its_batch(size, tok):
    """Same seed, another batch size: the same samples (up to ties in rounding, of which there are none here)
    [fails when the random numbers are drawn step by step]"""
    model, prompts = tiny('gpt2'), toy_prompts(7)
    steer(model, tok.eos_token_id, by=3)
    assert sample(model, tok, prompts, 9,
                  batch_size=size).completion_ids == sample(model, tok, prompts, 9).completion_ids


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
@pytest.mark.parametrize('pad_eos', [False, True])
def test_item09_batched_generation_equals_single(kind, pad_eos, tok):
    """Greedy: 5 prompts of unequal length in batches of 5, 2 and 1 give the ids of each alone, nothing behind
    EOS [fails on gpt2 when prompts are padded on the right, and when the rows come back sorted by length]"""
    tok = pad_is_eos(tok) if pad_eos else tok
    model, prompts = tiny(kind, seed=4), toy_prompts(5, seed=1)
    steer(model, tok.eos_token_id, by={'gpt2': 2.2, 'llama': 3.5}[kind])
    ids = [sample(model, tok, [p], 7, greedy=True).completion_ids[0] for p in prompts]
    runs = [sample(model, tok, prompts, 7, greedy=True, batch_size=b) for b in (1, 2, 5)]
    assert len(set(map(len, ids))) > 1 and any(runs[0].ended)             # else the test shows nothing
    for r in runs:
        assert (r.completion_ids == ids and r.prompts == prompts
                and r.prompt_ids == [encode_prompt(tok, p) for p in prompts])
        assert r.ended == [tok.eos_token_id in c for c in ids]
        assert all(tok.eos_token_id not in c[:-1] for c in r.completion_ids)


def test_item09_logprobs_of_samples_equal_single_rows(tok):
    """Samples of several chunks and widths, scored in other chunks, have the log-probs of each row alone [fails
    when `sequence_logprobs` returns its rows sorted by length]"""
    model, prompts = tiny('gpt2'), toy_prompts(7)
    steer(model, tok.eos_token_id, by=3)
    s = sample(model, tok, prompts, 7, batch_size=3)
    assert len(s) == 7 and len(set(map(len, s.completion_ids))) > 2
    expected = [row_logps(model, encode_prompt(tok, p), c).sum().item() for p, c in zip(prompts, s.completion_ids)]
    assert sequence_logprobs(model, 0, s.prompt_ids, s.completion_ids,
                             batch_size=2) == pytest.approx(expected, abs=5e-5)


# ---- stopping

@pytest.mark.parametrize('pad_eos', [False, True])
def test_item16_generation_stops_at_eos(pad_eos, tok):
    """A model that says EOS at step 3 is called 3 times, though its own settings know no EOS [fails when no
    config names `eos_token_id`]"""
    tok, model = pad_is_eos(tok) if pad_eos else tok, tiny()
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None
    steer(model, tok.eos_token_id, by=-1e4)
    calls = steer(model, tok.eos_token_id, by=1e5, at=3)
    s = sample(model, tok, toy_prompts(1), 20)
    assert len(calls) == 3 and s.ended == [True] and len(s.completion_ids[0]) == 3


def test_item17_a_cut_completion_is_exactly_what_was_sampled(tok):
    "Length-limited: no EOS is added, the flag says so [fails when `_generate` ends every row with EOS]"
    model = tiny()
    steer(model, tok.eos_token_id, by=-1e4)
    s = sample(model, tok, toy_prompts(3), 4)
    assert s.ended == [False] * 3 and all(len(c) == 4 and tok.eos_token_id not in c for c in s.completion_ids)
    assert s.completions == [decode_completion(tok, p, c) for p, c in zip(s.prompt_ids, s.completion_ids)]


def test_item20_eos_or_pad_as_first_token(tok):
    """First token EOS: a completion of one token, empty text; first token the pad token: an ordinary token
    [fails when rows are cut at the first pad]"""
    model = tiny()
    steer(model, tok.eos_token_id, by=1e5)
    s = sample(model, tok, toy_prompts(2), 5)
    assert s.completion_ids == [[tok.eos_token_id]] * 2 and s.ended == [True] * 2 and s.completions == ['', '']
    model = tiny()
    steer(model, tok.pad_token_id, by=1e5, at=1); steer(model, tok.eos_token_id, by=1e5, at=2)
    s = sample(model, tok, toy_prompts(2), 5)
    assert s.completion_ids == [[tok.pad_token_id, tok.eos_token_id]] * 2
    assert sequence_logprobs(model, tok.pad_token_id, s.prompt_ids, s.completion_ids).shape == (2,)


# ---- random state and mode

def rng_state(): return random.getstate(), [str(x) for x in np.random.get_state()], torch.get_rng_state().tolist()

def test_item27_sampling_is_seeded_and_leaves_the_global_generators_alone(tok):
    """Same seed, same samples, whatever was drawn before; equal prompts in one batch differ [fails when `sample`
    doesn't use `seeded`]"""
    model, prompts, before = tiny(), toy_prompts(1) * 6, rng_state()
    first = sample(model, tok, prompts, 6, seed=3).completion_ids
    assert rng_state() == before
    torch.rand(3), np.random.rand(3), random.random()
    assert sample(model, tok, prompts, 6, seed=3).completion_ids == first
    assert sample(model, tok, prompts, 6, seed=4).completion_ids != first
    assert len(set(map(tuple, first))) == 6
    # batches don't repeat each other
    assert len(set(map(tuple, sample(model, tok, prompts, 6, seed=3, batch_size=2).completion_ids))) == 6


def test_item27_seeded_puts_the_state_back_after_an_error():
    "[fails when the states are put back without `finally`]"
    before = rng_state()
    with pytest.raises(ZeroDivisionError), seeded(2**40 + 1):
        torch.rand(1), np.random.rand(), random.random()
        1 / 0
    assert rng_state() == before


def test_item29_log_probs_of_rollouts_carry_no_graph(tok):
    """Sampling and scoring leave the mode of the model as it was, with dropout off inside [fails when
    `inference` doesn't call `eval`]"""
    model = tiny('gpt2', dropout=.5).train()
    expected = sequence_logprobs(copy.deepcopy(model).eval(), 0, PROMPTS, ANSWERS)
    assert (sequence_logprobs(model, 0, PROMPTS, ANSWERS) == expected).all() and model.training
    with inference(model): assert not model(torch.tensor([[5]])).logits.requires_grad
    assert model.training and all(m.training for m in model.modules())
    greedy = [sample(m, tok, toy_prompts(3), 5, greedy=True).completion_ids
              for m in (model, copy.deepcopy(model).eval())]
    assert greedy[0] == greedy[1] and model.training


def test_item31_the_reference_samples_from_itself(tok):
    """A reference with negated output layer says something else than the policy [fails when `sample` keeps the
    first model that it was given]"""
    policy = tiny('qwen2', tie_word_embeddings=False)
    ref = copy.deepcopy(policy)
    ref.get_output_embeddings().weight.data.neg_()
    a, b, again = (sample(m, tok, toy_prompts(3), 5, greedy=True).completion_ids for m in (policy, ref, policy))
    assert a == again and all(x != y for x, y in zip(a, b))
