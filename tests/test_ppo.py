"""PPO: reported defects of other implementations (numbered as in the project's list of known defects) that ours
must not have.

Each docstring says in brackets which mutation of the code makes the test fail. Tests that stand for many
items: padding invariance (03, 09, 10, 19), null update (02, also with pad == EOS), equal weights for every
split of a batch (22) and for two processes (two_processes.py), resume in a new process (26), pad == EOS (02,
05, 06, 15, 20), poisoned positions (10, 19, 20), frozen hashes of reference, reward model and random states
(27, 30, 33, 34)."""
import copy
import gc
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from mpo_nb import actor_critic, ppo
from mpo_nb import ppo_trainer as trainer_module
from mpo_nb.core import UserError
from mpo_nb.logprobs import collate, encode_prompt, masked_sum
from mpo_nb.sampling import Samples, sample
from mpo_nb.sampling import cut_at_stop
from mpo_nb.training import frozen_reference, sharing_copy
from mpo_nb.actor_critic import ActorCritic, Rollout, ValueHead, entropy, evaluate_samples, token_values, trunk_of
from mpo_nb.ppo import (
    PPOSettings, checked_scores, estimate_advantages, gae, policy_loss, ppo_losses, token_rewards, value_loss, whiten
)
from mpo_nb.ppo_config import PPOConfig, next_kl_coef, rollout_rows, shape_scores, text_prompts
from mpo_nb.ppo_trainer import explained_variance, load_experience, rollout_completions
from mpo_nb.reward import RewardModel, reward_model_from, score_ids
import util
from util import (KINDS, AtTheEnd, distance, fingerprint, in_a_new_process, letters, logged, pad_is_eos, ppo_trainer,
                  row_logps, steer, talker, tiny, toy_prompts, toy_tokenizer, weights)

pytestmark = pytest.mark.usefixtures('own_random_state')


@pytest.fixture
def updates(monkeypatch):
    "(outputs, inputs) of every micro-batch of an update"
    seen, losses = [], trainer_module.ppo_losses
    def spy(outputs, mb, *args):
        seen.append((outputs, mb))
        return losses(outputs, mb, *args)
    monkeypatch.setattr(trainer_module, 'ppo_losses', spy)
    return seen

def drift(updates):
    "Largest change of log-prob and of value since the rollout, over all micro-batches"
    return (max(float((o[0] - mb['old_logprobs']).detach().abs().max()) for o, mb in updates),
            max(float((o[2] - mb['old_values']).detach().abs().max()) for o, mb in updates))

def lengths_of(n, T): return torch.arange(T)[None] < torch.tensor(n)[:, None]

def experience_of(scores, logps, ref, values, mask, kl_coef, **how):
    "Advantages and returns, by the steps of the loop"
    rewards = token_rewards(scores, logps, ref, mask, kl_coef)
    return estimate_advantages(rewards, Rollout(None, mask, logps, ref, values, None), PPOSettings(**how))


# ---- plain loops in float64, one row and one token at a time

def plain_rewards(score, logps, ref, n, beta):
    return [-beta * (logps[t] - ref[t]) + (score if t == n - 1 else 0) for t in range(n)]

def plain_gae(r, v, gamma, lam):
    "The sum that defines it, for each token anew"
    n = len(r)
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0) - v[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]

def plain_policy_loss(new, old, adv, eps):
    ratio = math.exp(new - old)
    return -min(ratio * adv, min(max(ratio, 1 - eps), 1 + eps) * adv)

def plain_value_loss(v, old, ret, eps):
    near = min(max(v, old - eps), old + eps)
    return max((v - ret) ** 2, (near - ret) ** 2) / 2

@pytest.fixture
def numbers():
    "Random float64 tensors [5, 7] and a mask of lengths 7, 1, 4, 3, 6"
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 7, dtype=torch.float64, generator=g) for _ in range(5)] + [[7, 1, 4, 3, 6]]


def test_rewards_and_gae_equal_plain_loops(numbers):
    "To 1e-10 [fails when lambda isn't multiplied by gamma, and when the next value is left out]"
    logps, ref, values, *_, n = numbers
    mask, scores = lengths_of(n, 7), torch.arange(5.).double()
    rewards = token_rewards(scores, logps, ref, mask, kl_coef=.3)
    for gamma, lam in ((1., .95), (.9, .5), (1., 1.), (.8, 0.)):
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        for i, k in enumerate(n):
            r = plain_rewards(scores[i].item(), logps[i].tolist(), ref[i].tolist(), k, .3)
            a = plain_gae(r, values[i].tolist()[:k], gamma, lam)
            assert rewards[i].tolist() == pytest.approx(r + [0] * (7 - k), abs=1e-10)
            assert advantages[i].tolist() == pytest.approx(a + [0] * (7 - k), abs=1e-10)
            assert returns[i].tolist() == pytest.approx([x + v for x, v in zip(a, values[i].tolist())]
                                                        + [0] * (7 - k), abs=1e-10)


def test_losses_equal_plain_loops(numbers):
    "To 1e-10, with every branch of both clips taken [fails when the clipped loss is the smaller of the two]"
    new, old, adv, ret, values, _ = numbers
    losses, ratio, clipped = policy_loss(new, old, adv, .2)
    plain = [plain_policy_loss(*x, .2)
             for x in zip(new.flatten().tolist(), old.flatten().tolist(), adv.flatten().tolist())]
    assert losses.flatten().tolist() == pytest.approx(plain, abs=1e-10)
    outside = ((ratio - 1).abs() > .2) & ((ratio > 1) == (adv > 0))
    assert (clipped == outside).all() and 0 < clipped.sum() < clipped.numel()
    plain = [plain_value_loss(*x, .5)
             for x in zip(values.flatten().tolist(), old.flatten().tolist(), ret.flatten().tolist())]
    assert value_loss(values, old, ret, .5).flatten().tolist() == pytest.approx(plain, abs=1e-10)


def test_clipped_ratio_has_no_gradient():
    """Outside the clip range in the direction of the advantage nothing is left to gain; in the other direction
    there is [fails when the loss isn't clipped]"""
    new = torch.tensor([.5, .5, -.5, -.5], requires_grad=True)
    policy_loss(new, torch.zeros(4), torch.tensor([1., -1., 1., -1.]), .2)[0].sum().backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]


# ---- before the first update

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'neox'])
def test_item01_ratio_is_one_with_dropout_configured(kind, updates, tmp_path):
    """All dropouts .1, train mode: first micro-batch has no drift, nothing clipped [fails when `disable_dropout`
    isn't called, and on llama and neox when it skips the rate that their attention keeps as a number]"""
    t = ppo_trainer(tmp_path, talker(kind, dropout=.1), per_device_train_batch_size=4)
    t.train()
    logp, value = drift(updates)
    assert logp < 1e-5 and value < 1e-5
    assert (logged(t, 'policy/clipfrac') == [0] and logged(t, 'policy/approxkl')[0] < 1e-10
            and logged(t, 'objective/kl') == [0])


@pytest.mark.parametrize('pad_eos', [False, True])
def test_item02_null_update_changes_nothing(pad_eos, updates, tmp_path):
    """lr = 0, other partners and widths in training than in the rollout, 3 epochs: log-ratio stays 0 on absolute
    positions [fails when `position_ids` are left out]"""
    tok = pad_is_eos(toy_tokenizer()) if pad_eos else toy_tokenizer()
    t = ppo_trainer(tmp_path, tok=tok, learning_rate=0., num_rollouts=2, num_ppo_epochs=3, num_mini_batches=2,
                    per_device_train_batch_size=2)
    before = fingerprint(t.model)
    t.train()
    assert len(updates) == 2 * 3 * 4 and len({mb['mask'].shape[1] for _, mb in updates}) > 1
    logp, value = drift(updates)
    assert logp < 1e-5 and value < 1e-5
    assert fingerprint(t.model) == before
    assert logged(t, 'objective/kl') == pytest.approx([0, 0], abs=1e-5)
    assert logged(t, 'policy/ratio') == pytest.approx([1] * 12, abs=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_item03_values_and_scores_ignore_left_padding(kind, tok):
    """Values and reward of a row alone equal those behind 1 to 5 pads [fails on gpt2 when `token_values` leaves
    `position_ids` out]"""
    critic, (prompt, answer) = reward_model_from(tiny(kind), tok, seed=2), ([5, 6, 7], [21, 22, 23, 1])
    with torch.no_grad():
        hidden = getattr(critic, critic.base_model_prefix)(torch.tensor([prompt + answer])).last_hidden_state[0]
        values, score = critic.score(hidden[2:6])[:, 0], critic.score(hidden[6]).item()
        assert values.std() > .01
        for pads in range(1, 6):
            batch = collate([prompt, list(range(30, 33 + pads))], [answer, [40, 41, 42, 43, 44]], pad_id=0)
            torch.testing.assert_close(token_values(critic, batch)[0, :4], values, atol=1e-5, rtol=0)
            assert score_ids(critic, [prompt + answer, [9] * (7 + pads)], 0)[0] == pytest.approx(score, abs=1e-5)


class PlaceCritic(torch.nn.Module):
    "A fake critic whose value is 100 * position + token of the place where it is read"
    base_model_prefix = 'trunk'
    def __init__(self):
        super().__init__()
        self.score = lambda hidden: hidden
    def trunk(self, input_ids, attention_mask, position_ids, use_cache):
        class Out: last_hidden_state = (100. * position_ids + input_ids)[..., None]
        return Out
    trunk.forward = trunk

def test_item04_each_value_is_read_before_its_token():
    "Value t is read at P-1+t [fails when the hidden states are cut one place later]"
    batch = collate([[1, 2, 3], [9]], [[4, 5, 6, 7], [8, 1]], pad_id=0)
    assert token_values(PlaceCritic(), batch).tolist() == [[203, 304, 405, 506], [9, 108, 0, 0]]
    assert batch.mask.sum(1).tolist() == [4, 2]


def test_item05_and_06_masks_of_a_rollout_come_from_lengths(tok):
    "pad == EOS and unfinished rows: the mask has the sampled lengths [fails when the mask is taken from the ids]"
    eos = tok.eos_token_id
    samples = Samples([''] * 3, [''] * 3, [[5], [6, 7], [8]], [[9, eos], [9, 10, 11, 12], [13, 14]],
                      [True, False, False])
    policy = tiny()
    r = evaluate_samples(ActorCritic(policy, reward_model_from(policy, tok)), policy, samples, eos, batch_size=2)
    assert r.mask.sum(1).tolist() == [2, 4, 2]
    assert all((x[~r.mask] == 0).all() and (x[r.mask] != 0).all()
               for x in (r.logprobs, r.ref_logprobs, r.values, r.entropies))


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_item07_temperature_is_on_every_side(kind, updates, tmp_path):
    """T = .7: old log-probs are log_softmax(raw / T), the new ones equal them, the reference has the same T
    [fails when `compute_loss` leaves T out, and when the reference pass does]"""
    policy, ref = talker(kind), talker(kind, seed=5)
    old, reference = copy.deepcopy(policy), copy.deepcopy(ref)
    t = ppo_trainer(tmp_path, policy, ref, temperature=.7)
    t.train()
    s = t.experience.samples
    with torch.no_grad():
        rows = [row_logps(old, p, c, .7) for p, c in zip(s.prompt_ids, s.completion_ids)]
        refs = [row_logps(reference, p, c, .7) for p, c in zip(s.prompt_ids, s.completion_ids)]
    for i, r in enumerate(rows): torch.testing.assert_close(t.experience.logprobs[i, :len(r)], r, atol=1e-5, rtol=0)
    assert drift(updates)[0] < 1e-5
    assert logged(t, 'objective/kl')[0] == pytest.approx(np.mean([float((a - b).sum()) for a, b in zip(rows, refs)]),
                                                         abs=1e-4)


def test_item07_temperature_zero_is_refused(tmp_path):
    "[fails when `PPOConfig` doesn't check: the error of `generate` isn't a UserError]"
    with pytest.raises(UserError, match='temperature'): ppo_trainer(tmp_path, temperature=0.).train()


def test_item08_the_models_generation_config_is_ignored(tmp_path):
    """Two policies, one with its own sampling settings, are trained alike, and the settings survive [fails when
    `_plain_generation` does nothing]"""
    runs = []
    for own in ({}, dict(top_k=2, repetition_penalty=1.5, min_p=.5, do_sample=True)):
        policy = talker()
        for k, v in own.items(): setattr(policy.generation_config, k, v)
        t = ppo_trainer(tmp_path, policy)
        t.train()
        assert all(getattr(t.policy.generation_config, k) == v for k, v in own.items())
        runs.append(t)
    assert runs[0].experience.samples.completion_ids == runs[1].experience.samples.completion_ids
    assert distance(weights(runs[0].model), weights(runs[1].model)) == 0


def test_item08_the_first_rollout_is_checked(tmp_path, monkeypatch):
    "A policy that samples from something else stops the run [fails when `_rollout` doesn't call `check_sampling`]"
    from mpo_nb import sampling
    right = sampling._next_logits
    def wrong(*args):
        logits = right(*args)
        return logits.masked_fill(logits < logits.topk(3).values[:, -1:], float('-inf'))
    monkeypatch.setattr(sampling, '_next_logits', wrong)
    with pytest.raises(RuntimeError): ppo_trainer(tmp_path).train()


# ---- what is reported

def handmade(pads=0, junk=0.):
    "A rollout of two rows, lengths 3 and 2, with `pads` more columns of `junk`"
    mask = lengths_of([3, 2], 3 + pads)
    fill = lambda rows: torch.full(mask.shape, junk).masked_scatter(mask, torch.tensor(rows))
    samples = Samples(['a', 'b'], ['c', 'd'], [[5], [6]], [[7, 8, 1], [9, 10]], [True, False])
    return Rollout(samples, mask, fill([-1., -2., -3., -4., -5.]), fill([-2., -1., -5., -4., -4.]), fill([.1] * 5),
                   fill([1., 2., 3., 4., 5.]))

@pytest.mark.parametrize('pads, junk', [(0, 0.), (50, 0.), (50, 1e6), (50, float('nan'))])
def test_item10_reported_numbers_by_hand(pads, junk, monkeypatch, tmp_path):
    """KL, score, RLHF reward, entropy, length of two rows, with poisoned pad columns [fails when the KL is the
    mean over all columns]"""
    rollout = handmade(pads, junk)
    t = ppo_trainer(tmp_path, kl_coef=.5, missing_eos_penalty=2., reward=lambda p, c: [1., 4.])
    monkeypatch.setattr(trainer_module, 'sample', lambda *a, **kw: rollout.samples)
    monkeypatch.setattr(trainer_module, 'evaluate_samples', lambda *a, **kw: rollout)
    stats = t._sample_and_score(['a', 'b'], 0)[-1]
    # KL: row 0: 1 - 1 + 2 = 2, row 1: 0 - 1 = -1; scores 1 and 4 - 2
    assert stats == pytest.approx({'objective/kl': .5, 'objective/score': 1.5, 'objective/rlhf_reward': 1.25,
                                   'objective/entropy': 3., 'rollout/length': 2.5, 'rollout/eos_rate': .5})


@pytest.mark.parametrize('pads, junk', [(0, 0.), (50, 0.), (50, 1e3), (50, float('nan'))])
def test_item10_sums_of_a_micro_batch_by_hand(pads, junk):
    """Policy loss, value loss, ratio, clip fraction, KL, entropy: sums over real tokens only [fails when one sum
    isn't masked]"""
    mask = lengths_of([2, 1], 2 + pads)
    fill = lambda rows: torch.full(mask.shape, junk).masked_scatter(mask, torch.tensor(rows))
    half = math.log(1.5)
    mb = dict(mask=mask, old_logprobs=fill([0., -half, 0.]), advantages=fill([1., 1., 2.]),
              old_values=fill([0., 0., 1.]), returns=fill([1., 1., 1.]))
    sums = ppo_losses((fill([0., 0., -half]), fill([1., 2., 3.]), fill([.1, .5, 1.])), mb, .2, .2)
    # ratios 1, 1.5, 1/1.5; the second is clipped to 1.2. Values: .9²/2, max(.5², .8²)/2, 0
    assert {k: v.item() for k, v in sums.items()} == pytest.approx({
        'loss/policy': -1 - 1.2 - 2 / 1.5, 'loss/value': (.81 + .64) / 2,
        'policy/ratio': 2.5 + 1 / 1.5, 'policy/clipfrac': 1.,
        'policy/approxkl': half ** 2, 'policy/entropy': 6., 'val/clipfrac': 1.}, abs=1e-6)


def test_item10_entropy_is_exact_and_never_negative():
    "[fails when padding isn't masked or the sign is lost]"
    logits, mask = torch.randn(2, 3, 40) * 5, lengths_of([3, 1], 3)
    p = logits.double().softmax(-1)
    expected = -(p * p.log()).sum(-1) * mask
    torch.testing.assert_close(entropy(logits.log_softmax(-1), mask).double(), expected, atol=1e-5, rtol=0)
    assert ((entropy(logits.log_softmax(-1), mask) >= 0).all()
            and (entropy(logits.log_softmax(-1), mask)[1, 1:] == 0).all())


# ---- rewards and advantages

def test_item14_the_score_is_on_the_last_real_token():
    "Not on the first pad; with lambda = .5 the advantages are .25, .5, 1 [fails when the score is put one place later]"
    mask, zero = lengths_of([3, 5], 5), torch.zeros(2, 5)
    rewards = token_rewards(torch.tensor([1., 1.]), zero, zero, mask, .1)
    assert rewards.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert gae(rewards, zero, mask, 1., .5)[0].tolist() == [[.25, .5, 1, 0, 0], [.0625, .125, .25, .5, 1]]


@pytest.mark.parametrize('pad_eos', [False, True])
def test_item15_the_penalty_is_taken_once_where_eos_is_missing(pad_eos, tok):
    """No end: score - p once, also when the prompt holds an EOS; an end costs nothing, pad == EOS or not [fails
    when EOS is looked for in prompt + completion]"""
    tok = pad_is_eos(tok) if pad_eos else tok
    for by, penalty in ((-1e4, 2.5), (1e4, 0.)):
        model, prompts = tiny(), toy_prompts(2) + [tok.eos_token + toy_prompts(1)[0]]
        steer(model, tok.eos_token_id, by)
        s = sample(model, tok, prompts, 3)
        assert tok.eos_token_id in s.prompt_ids[2]
        assert checked_scores(lambda p, c: [1., 2., 3.], s, 2.5).tolist() == [1 - penalty, 2 - penalty, 3 - penalty]


@pytest.mark.parametrize('given, says', [
    (None, 'returned NoneType None'), ('good', 'returned str'), (dict(score=1), 'returned dict'),
    (iter([1, 2]), 'iterator'), ([1j, 1, 1], 'returned list'), ([1, 10**400], 'returned list'),
    (['a', 'b'], 'returned list'), ([None, None], 'returned list'), ([[1.], [2.]], r'shape \(2, 1\) for 2'),
    (torch.tensor([1j, 2]), 'returned Tensor'),
    (np.array([1j, 2]), 'returned ndarray'),
    ([1., 1e30], 'completion 1 is 1e'), ([1., -1e13], 'completion 1 is -1'), ([1., math.nan], 'completion 1 is nan')])
def test_a_reward_that_is_no_number_is_one_sentence(given, says):
    "[fails when the tensor is made without a word, and when every finite number is good enough]"
    two = Samples(['p', 'q'], ['x', 'y'], [[1], [1]], [[2], [2]], [True, True])
    with pytest.raises(UserError, match=says) as e: checked_scores(lambda p, c: given, two, 0.)
    assert '\n' not in str(e.value)
    assert checked_scores(lambda p, c: [1, 1e9], two, 0.).tolist() == [1, 1e9]


@pytest.mark.parametrize('file, do', [('config.json', 'unlink'), ('critic/config.json', 'unlink'),
                                      ('model.safetensors', 'cut'), ('critic/model.safetensors', 'unlink'),
                                      ('reference/config.json', 'unlink')])
def test_a_checkpoint_that_is_not_whole_is_one_sentence(file, do, straight, tmp_path):
    """[fails without the look at config.json: transformers makes a model of its default size, and no end comes; and
    when a library's own error passes]"""
    shutil.copytree(straight[0]/'checkpoint-4', tmp_path/'checkpoint-4')
    path = tmp_path/'checkpoint-4'/file
    path.unlink() if do == 'unlink' else path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match='go on from an earlier one') as e: little_run(tmp_path, tmp_path/'checkpoint-4')
    assert '\n' not in str(e.value)


def test_item15_the_penalty_reaches_the_reward_once(tmp_path):
    """One row that ends, one that doesn't: the undiscounted return of the first token (lambda = 1, V read off)
    is the score, less the penalty once [fails when `checked_scores` takes nothing off, or twice as much]"""
    policy = talker(eos=1.)
    t = ppo_trainer(tmp_path, policy, reward=lambda p, c: [5.] * len(p), missing_eos_penalty=2., lam=1., kl_coef=0.,
                    learning_rate=0.)
    t.train()
    ended = t.experience.samples.ended
    assert 0 < sum(ended) < 8
    assert t.experience.returns[:, 0].tolist() == pytest.approx([5. if e else 3. for e in ended], abs=1e-5)
    assert logged(t, 'objective/score') == [pytest.approx(np.mean([5 if e else 3 for e in ended]))]


def test_item17_only_sampled_tokens_are_trained(updates, tmp_path, monkeypatch):
    """Ids and mask of the update are the sampled ids; the EOS that the reward model sees isn't in them [fails
    when a micro-batch ends every row with EOS]"""
    drawn, draw = [], trainer_module.sample
    def spy(*a, **kw):
        drawn.append(copy.deepcopy(draw(*a, **kw)))
        return drawn[-1]
    monkeypatch.setattr(trainer_module, 'sample', spy)
    tok, policy = toy_tokenizer(), tiny()
    reward = RewardModel(reward_model_from(tiny(seed=3), tok), tok)
    assert reward.encode('\n\nHuman:', ' cats')[-1] == tok.eos_token_id
    steer(policy, tok.eos_token_id, -1e4)
    batches = []
    t = ppo_trainer(tmp_path, policy, reward=reward, max_new_tokens=4, per_device_train_batch_size=3)
    loss = t.compute_loss
    monkeypatch.setattr(t, 'compute_loss',
                        lambda model, inputs, *a, **kw: (batches.append(inputs), loss(model, inputs, *a, **kw))[1])
    t.train()
    trained = [ids[m].tolist() for b in batches for ids, m in zip(b['completion_ids'], b['mask'])]
    assert sorted(trained) == sorted(drawn[0].completion_ids) and all(tok.eos_token_id not in r for r in trained)
    prompts = [ids[:-4][a[:-4].bool()].tolist() for b in batches for ids, a in zip(b['input_ids'], b['attention_mask'])]
    assert sorted(prompts) == sorted(encode_prompt(tok, p) for p in drawn[0].prompts)


def test_item18_nothing_comes_after_the_last_token():
    "The value after the last token is 0, cut or not [fails when the last value is carried on as the next one]"
    adv, ret = gae(torch.tensor([[0., 0., 1.]]), torch.tensor([[1., 2., 3.]]),
                   torch.ones(1, 3, dtype=torch.bool), 1., .95)
    assert adv[0].tolist() == pytest.approx([.145, -.9, -2.], abs=1e-6)
    assert ret[0].tolist() == pytest.approx([1.145, 1.1, 1.], abs=1e-6)


@pytest.mark.parametrize('pads', [0, 1, 50])
@pytest.mark.parametrize('poison', [1e6, float('nan')])
def test_item19_nothing_is_read_beyond_the_end(pads, poison, numbers):
    """Poisoned values, rewards and log-probs at the padding change nothing, and come out as exactly 0 [fails
    when `gae` doesn't mask its values]"""
    n, T = numbers[-1], 7 + pads
    mask = lengths_of(n, T)
    wide = [torch.cat([x, torch.zeros(5, pads, dtype=x.dtype)], 1) for x in numbers[:5]]
    bad = [x.masked_fill(~mask, poison) for x in wide]
    def run(logps, ref, values, old, ret):
        rewards = token_rewards(torch.ones(5).double(), logps, ref, mask, .1)
        advantages, returns = gae(rewards.masked_fill(~mask, poison) if logps is bad[0] else rewards,
                                  values, mask, .9, .8)
        return (rewards, advantages, returns,
                whiten(advantages.masked_fill(~mask, poison) if logps is bad[0] else advantages, mask),
                masked_sum(value_loss(values, old, returns), mask))
    for clean, dirty in zip(run(*wide), run(*bad)):
        assert torch.equal(clean, dirty)
        if clean.dim(): assert (dirty[~mask] == 0).all()


# ---- whitening

def test_item20_whitening_of_few_tokens_stays_finite():
    """One token, none, and a masked outlier [fails when the variance is Bessel-corrected, and when the mean over
    no token isn't guarded]"""
    for n in ([1, 0], [0, 0]):
        assert whiten(torch.tensor([[3., 7.], [9., 9.]]), lengths_of(n, 2)).tolist() == [[0, 0], [0, 0]]
    w = whiten(torch.tensor([[1., 2., 3., 100.]]).double(), lengths_of([3], 4))[0]
    assert (w[:3].mean().item() == pytest.approx(0, abs=1e-10)
            and w[:3].std(correction=0).item() == pytest.approx(1, abs=1e-6) and w[3] == 0)
    assert w[:3].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], abs=1e-6)


def test_item20_all_masked_gives_loss_zero():
    "[fails when a sum isn't masked]"
    x, mask = torch.full((2, 3), float('nan')), lengths_of([0, 0], 3)
    sums = ppo_losses((x, x, x), dict(mask=mask, old_logprobs=x, advantages=x, old_values=x, returns=x))
    assert all(v == 0 for v in sums.values())
    zero = torch.zeros(2, 3)
    advantages, returns = experience_of(torch.ones(2), zero, zero, zero, mask, .1)
    assert (advantages == 0).all() and (returns == 0).all()


@pytest.mark.parametrize('pad_eos', [False, True])
def test_item20_a_rollout_of_single_eos_tokens_trains(pad_eos, tmp_path):
    """Every answer is just EOS, and then a rollout of one row: losses, gradients and weights are finite, the
    rows are kept and scored [fails when the variance is Bessel-corrected]"""
    tok = pad_is_eos(toy_tokenizer()) if pad_eos else toy_tokenizer()
    for size in (8, 1):
        policy, scored = tiny(), []
        steer(policy, tok.eos_token_id, 1e4)
        t = ppo_trainer(tmp_path, policy, tok=tok, rollout_batch_size=size,
                        reward=lambda p, c: scored.extend(c) or [1.] * len(c))
        t.train()
        assert scored == [''] * size and t.experience.mask.sum(1).tolist() == [1] * size
        assert all(math.isfinite(v) for l in logged(t) for v in l.values())
        assert all(p.isfinite().all() for p in t.model.parameters())


SPLITS = [1, 2, 4, 8, 3]

@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    "The same run, 2 epochs of one minibatch, in micro-batches of 1, 2, 4, 8 and 3 + 3 + 2 rows"
    runs = {}
    for size in SPLITS:
        runs[size] = ppo_trainer(tmp_path_factory.mktemp('split'), per_device_train_batch_size=size, num_ppo_epochs=2,
                                 learning_rate=.2)
        runs[size].start = weights(runs[size].model)
        runs[size].train()
    return runs

@pytest.mark.parametrize('size', SPLITS)
def test_item21_advantages_are_whitened_over_the_whole_rollout(size, splits):
    """The same for every micro-batch size: less the mean, over the deviation, of all real tokens [fails when two
    rows at a time are whitened]"""
    e, reference = splits[size].experience, splits[8].experience
    assert len(set(e.mask.sum(1).tolist())) > 2
    raw = (e.returns - e.values)[e.mask].double()
    torch.testing.assert_close(e.advantages[e.mask].double(), (raw - raw.mean()) / raw.std(correction=0),
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(e.advantages, reference.advantages, atol=1e-5, rtol=0)


def test_item21_advantages_follow_a_permutation_of_the_rows(numbers):
    "Reordered rows have the same advantages [fails when a row's weight depends on its place]"
    logps, ref, values, *_, n = numbers
    mask, scores, order = lengths_of(n, 7), torch.arange(5.).double(), [3, 1, 4, 0, 2]
    a, _ = experience_of(scores, logps, ref, values, mask, .1)
    b, _ = experience_of(*(x[order] for x in (scores, logps, ref, values, mask)), .1)
    torch.testing.assert_close(a[order], b, atol=1e-12, rtol=0)


# ---- optimisation

@pytest.mark.parametrize('size', SPLITS)
def test_item22_accumulation_gives_the_same_weights(size, splits):
    """8x1, 4x2, 2x4, 1x8 and 3+3+2 rows of unequal length: same weights, same logs, epochs x minibatches steps
    [fails when each micro-batch is averaged by its own tokens]"""
    t, reference = splits[size], splits[8]
    assert distance(reference.start, weights(reference.model)) > 1e-2
    assert distance(weights(t.model), weights(reference.model)) < 1e-6
    assert t.state.global_step == 2
    for a, b in zip(logged(t), logged(reference)): assert a == pytest.approx(b, abs=2e-5)


def test_item22_one_update_equals_plain_loops(tmp_path):
    """Two epochs of SGD on one rollout, row by row without padding, in float64: same weights to 1e-5 [fails when
    the score is put one place later, or tokens are weighted by row]"""
    policy, ref, tok = talker(seed=1), talker(seed=2), toy_tokenizer()
    critic = reward_model_from(tiny('gpt2', seed=3), tok, seed=3)
    model, reference = copy.deepcopy(ActorCritic(policy, critic)).double(), copy.deepcopy(ref).double()
    t = ppo_trainer(tmp_path, policy, ref, critic, num_ppo_epochs=2, per_device_train_batch_size=3, learning_rate=.1,
                    kl_coef=.3, lam=.9, vf_coef=.5, gamma=.97, cliprange_value=.1)
    t.train()
    s, start = t.experience.samples, weights(model)
    def look():
        "Log-probs and values of every row"
        out = []
        for p, c in zip(s.prompt_ids, s.completion_ids):
            hidden = model.critic.transformer(torch.tensor([p + c])).last_hidden_state[0]
            out.append((row_logps(model.policy, p, c), model.critic.score(hidden[len(p) - 1:-1])[:, 0]))
        return out
    scores = [x - (not e) for x, e in zip(letters(s.prompts, s.completions), s.ended)]
    with torch.no_grad():
        old, refs = look(), [row_logps(reference, p, c) for p, c in zip(s.prompt_ids, s.completion_ids)]
    advantages = [plain_gae(plain_rewards(sc, l.tolist(), r.tolist(), len(l), .3), v.tolist(), .97, .9)
                  for sc, (l, v), r in zip(scores, old, refs)]
    flat = np.concatenate(advantages)
    white = [(np.array(a) - flat.mean()) / flat.std() for a in advantages]
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for _ in range(2):
        loss = 0.
        for (l, v), (l0, v0), a, w in zip(look(), old, advantages, white):
            a, w = torch.tensor(a), torch.tensor(w)
            ratio, near = (l - l0).exp(), v0 + (v - v0).clamp(-.1, .1)
            loss = loss - torch.minimum(ratio * w, ratio.clamp(.8, 1.2) * w).sum()
            loss = loss + .5 * torch.maximum((v - a - v0) ** 2, (near - a - v0) ** 2).sum() / 2
        opt.zero_grad(); (loss / len(flat)).backward(); opt.step()
    assert distance(start, weights(model)) > 1e-2
    assert distance({k: v.double() for k, v in weights(t.model).items()}, weights(model)) < 1e-5


class Rates(TrainerCallback):
    "Notes the learning rate of every optimizer step"
    def __init__(self): self.seen = []
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kw):
        self.seen.append(optimizer.param_groups[0]['lr'])


def test_item23_the_gradient_norm_is_clipped(tmp_path):
    """SGD, lr 1, norm 1e-3: the weights of policy and critic together move by 1e-3; None and 0 mean off; the
    norm before clipping is logged [fails when `max_grad_norm` is set to 0]"""
    moved = {}
    for norm in (1e-3, None, 0.):
        t = ppo_trainer(tmp_path, max_grad_norm=norm, learning_rate=1.)
        before = weights(t.model)
        t.train()
        moved[norm] = math.sqrt(sum(float((v - before[k]).double().square().sum())
                                    for k, v in weights(t.model).items() if k in dict(t.model.named_parameters())))
        if norm: assert logged(t, 'grad_norm')[0] > .1
    assert .99e-3 < moved[1e-3] <= 1e-3 * (1 + 1e-4)
    assert moved[None] == moved[0.] > .1


@pytest.mark.parametrize('norm', [-1., float('nan')])
def test_item23_senseless_norms_are_refused(norm, tmp_path):
    "Negative and NaN [fails when `__post_init__` doesn't check]"
    with pytest.raises(UserError, match='max_grad_norm'):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=norm)


@pytest.mark.parametrize('n', [1, 3, 5])
def test_item24_every_prompt_is_used_however_few(n, tmp_path):
    """1, 3 or 5 prompts, rollouts of 4: no hang, each is seen, the policy changes [fails when rows beyond the
    last full batch are dropped]"""
    seen = []
    t = ppo_trainer(tmp_path, prompts=n, rollout_batch_size=4, num_rollouts=None, num_train_epochs=2,
                    reward=lambda p, c: seen.extend(p) or letters(p, c))
    before = weights(t.policy)
    t.train()
    assert t.state.global_step == math.ceil(2 * n / 4) and len(seen) == 4 * t.state.global_step
    assert set(seen) == set(toy_prompts(n)) and seen.count(seen[0]) >= 2 * (n != 5)
    assert distance(before, weights(t.policy)) > 1e-4


def test_item24_rollouts_go_through_the_prompts_evenly():
    """In any 12 rollouts of 4 out of 6 prompts each comes up 8 times, in shuffled passes [fails when each
    rollout is drawn anew]"""
    rows = [r for k in range(12) for r in rollout_rows(6, 4, k, seed=3)]
    passes = [rows[i:i + 6] for i in range(0, 48, 6)]
    assert all(sorted(p) == list(range(6)) for p in passes) and len(set(map(tuple, passes))) > 1


@pytest.mark.parametrize('how',
                         [dict(num_rollouts=4), dict(num_rollouts=2, num_ppo_epochs=2),
                          dict(num_rollouts=1, num_ppo_epochs=2, num_mini_batches=2, per_device_train_batch_size=2),
                                 dict(num_rollouts=2, num_mini_batches=2, per_device_train_batch_size=3)])
def test_item25_the_learning_rate_follows_the_updates(how, tmp_path):
    """Linear schedule over 4 updates, however they come about: 0 is reached after the last [fails when
    `max_steps` counts rollouts]"""
    rates = Rates()
    t = ppo_trainer(tmp_path, lr_scheduler_type='linear', learning_rate=.04, trainer=dict(callbacks=[rates]), **how)
    t.train()
    assert rates.seen == pytest.approx([.04, .03, .02, .01]) and set(t.lr_scheduler.get_last_lr()) == {0}
    assert t.state.global_step == t.args.max_steps == 4


# ---- checkpoints

def end_state(t):
    return util.end_state(t) | dict(kl_coef=t.kl_coef, reference=fingerprint(t.ref_model), stopped=t.stopped)

def little_run(folder, resume=None, **kw):
    """Two rollouts of four updates, with a checkpoint after each update; adaptive KL, a moving reference, and a
    KL limit that ends each rollout after its second update"""
    args = dict(num_rollouts=2, num_ppo_epochs=4, per_device_train_batch_size=4,
                optim='adamw_torch', learning_rate=1e-2, lr_scheduler_type='linear',
                save_strategy='steps', save_steps=1, max_grad_norm=1., seed=5, kl_target=.5, kl_horizon=20,
                ref_ema=.8, target_kl=1e-4, entropy_coef=.01, trainer=dict(callbacks=[AtTheEnd()]))
    t = ppo_trainer(folder, **args | kw)
    t.train(resume_from_checkpoint=resume and str(resume))
    return t

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "A run that was never stopped: (folder, its final state)"
    folder = tmp_path_factory.mktemp('straight')
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    t = little_run(folder)
    return folder, end_state(t), t

@pytest.mark.parametrize('step', [1, 2, 3, 4, 6])
def test_item26_resume_is_bitwise(step, straight, tmp_path):
    """After any update, in the middle of a rollout or between two: weights, Adam, scheduler, random states, KL
    coefficient, moving reference, early stop, logs [fails when an unfinished rollout isn't saved, when the
    critic isn't loaded, and when one of `kl_coef`, `stopped`, `step_kl` or the reference isn't put back]"""
    folder, end, whole = straight
    assert len(set(logged(whole, 'objective/kl_coef'))) == 2 and logged(whole, 'policy/skipped') == [0, 0, 1, 1] * 2
    t = little_run(tmp_path, folder/f'checkpoint-{step}')
    assert end_state(t) == end


def test_item26_resume_is_bitwise_in_a_new_process(straight, tmp_path):
    """The same from the middle of the first rollout, in another process with other random states [fails when an
    unfinished rollout isn't saved]"""
    folder, end, _ = straight
    assert in_a_new_process('test_ppo', tmp_path, folder/'checkpoint-2') == json.loads(json.dumps(end))


def test_item26_a_checkpoint_is_a_policy(straight):
    """`from_pretrained` finds every weight and no other, of policy and critic [fails when the actor-critic is
    saved as one]"""
    folder, _, t = straight
    model, info = AutoModelForCausalLM.from_pretrained(folder/'checkpoint-8', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    assert distance(weights(model), weights(t.policy)) == 0
    critic = RewardModel.load(folder/'checkpoint-8'/'critic', tok=toy_tokenizer()).model
    assert distance(weights(critic), weights(t.model.critic)) == 0


@pytest.mark.parametrize('logging_steps, step', [(3, 4), (6, 3), (6, 4)])
def test_item26_numbers_of_the_next_log_survive_a_stop(logging_steps, step, tmp_path):
    """Logs less often than checkpoints, stopped in the second rollout or before it: score, KL, losses are
    averages over all since the last log [fails when the checkpoint doesn't hold them]"""
    straight = little_run(tmp_path/'a', logging_steps=logging_steps, num_ppo_epochs=3)
    resumed = little_run(tmp_path/'b', tmp_path/'a'/f'checkpoint-{step}', logging_steps=logging_steps, num_ppo_epochs=3)
    for key in ('objective/score', 'objective/kl', 'rollout/length', 'loss/value', 'policy/ratio', 'policy/skipped'):
        assert logged(resumed, key) == pytest.approx(logged(straight, key), rel=1e-6)


# ---- little padding

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_rows_without_a_gap_give_the_numbers_of_padded_ones(kind):
    """Long prompts with short answers beside short prompts with long ones: as wide as the longest row, same
    log-probs, entropies, values, each at its token [fails when the places are moved by the padded mask, and
    when the positions count the pads]"""
    prompts, answers = [[5] * 9, [6, 7], [8, 9, 10], [11]], [[12], [13, 14, 15, 16, 17, 1], [18, 19, 1], [1]]
    s = Samples([''] * 4, [''] * 4, prompts, answers, [False, True, True, True])
    model, ref = (ActorCritic(tiny(kind), reward_model_from(tiny(kind, seed=1), toy_tokenizer(), seed=1)),
                  tiny(kind, seed=2))
    model.least = 1, 2
    padded = collate(prompts, answers, 0)
    assert actor_critic.flush_rows(s, range(4), 0).input_ids.shape == (4, 10) and padded.input_ids.shape == (4, 15)
    with torch.no_grad():
        logp, h, v = model(**vars(padded))
        expected = logp, actor_critic.reference_logprobs(ref, padded, 1., 1, 2), v, h
    for size in (1, 3, 4):
        r = evaluate_samples(model, ref, s, 0, batch_size=size)
        assert (r.mask == padded.mask).all()
        for a, b in zip((r.logprobs, r.ref_logprobs, r.values, r.entropies), expected):
            torch.testing.assert_close(a, b.masked_fill(~r.mask, 0.), atol=1e-5, rtol=1e-5)


def test_micro_batches_hold_rows_of_like_length(tmp_path, updates):
    """And the advantages of their own tokens [fails when the rows of a minibatch aren't sorted, and when a
    micro-batch takes its numbers from the padded places]"""
    t = ppo_trainer(tmp_path, talker(), prompts=8, per_device_train_batch_size=2)
    t.train()
    widths = [int(mb['attention_mask'].sum(1).max()) for _, mb in updates]
    assert [mb['input_ids'].shape[1] for _, mb in updates] == widths == sorted(widths) and len(set(widths)) > 1
    given = sorted(a for _, mb in updates for a in mb['advantages'][mb['mask']].tolist())
    assert given == sorted(t.experience.advantages[t.experience.mask].tolist())
    assert max(drift([updates[0]])) < 1e-5


# ---- seeds, graphs, the reference

def rng_state(): return random.getstate(), [str(x) for x in np.random.get_state()], torch.get_rng_state().tolist()

def test_item27_runs_depend_on_their_seed_alone(tmp_path):
    """Same seed, same run, whatever the global generators say; another seed, another run; building a trainer
    leaves them as they were [fails when the rollouts are sampled without a seed]"""
    logs = []
    for seed, world in ((1, 10), (1, 11), (2, 10)):
        torch.manual_seed(world), np.random.seed(world), random.seed(world)
        before = rng_state()
        t = ppo_trainer(tmp_path, num_rollouts=2, seed=seed)
        assert rng_state() == before
        t.train()
        logs.append((logged(t), weights(t.model)))
    assert logs[0][0] == logs[1][0] and distance(logs[0][1], logs[1][1]) == 0
    assert logs[0][0] != logs[2][0]


def test_item27_equal_prompts_get_different_answers(tmp_path, monkeypatch):
    "In one rollout, and in the next [fails when every rollout has the same seed]"
    drawn, draw = [], trainer_module.sample
    monkeypatch.setattr(trainer_module, 'sample', lambda *a, **kw: (drawn.append(draw(*a, **kw)), drawn[-1])[1])
    ppo_trainer(tmp_path, tiny(), prompts=1, num_rollouts=2, learning_rate=0.).train()
    answers = [tuple(c) for s in drawn for c in s.completion_ids]
    assert len(drawn) == 2 and len(set(answers)) == 16


def test_item28_gradient_checkpointing_changes_no_number(tmp_path):
    """The cache works in the rollout (each step sees one new token), checkpointing in the update; same weights,
    and the mode is put back [fails when the policy isn't in eval mode while sampling]"""
    runs = {}
    for on in (False, True):
        policy, widths = talker('llama'), []
        t = ppo_trainer(tmp_path, policy, activation_checkpointing=on, num_rollouts=2)
        policy.register_forward_pre_hook(lambda m, a, kw: widths.append((m.training, kw['input_ids'].shape[1])),
                                         with_kwargs=True)
        t.train()
        runs[on] = t, widths
        layer = t.policy.model.layers[0]
        assert t.model.training and layer.training and bool(getattr(layer, 'gradient_checkpointing', False)) == on
    sampled = [w for training, w in runs[True][1] if not training]
    assert sampled.count(1) >= 2 * 5
    assert distance(weights(runs[False][0].model), weights(runs[True][0].model)) < 1e-6


class LiveTensors(TrainerCallback):
    "Counts the tensors that are alive after each step"
    def __init__(self): self.seen = []
    def on_step_end(self, *args, **kw):
        gc.collect()
        self.seen.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))

def test_item29_nothing_logged_or_stored_holds_a_graph(tmp_path):
    """Logs are floats, a rollout requires no gradient, six updates don't pile up tensors [fails when metrics are
    kept as tensors, and when the rollout is evaluated with gradients]"""
    live = LiveTensors()
    t = ppo_trainer(tmp_path, num_rollouts=6, logging_steps=100, trainer=dict(callbacks=[live]))
    t.train()
    assert not any(v.requires_grad for v in vars(t.experience).values() if isinstance(v, torch.Tensor))
    assert live.seen[5] <= live.seen[1] + 2, live.seen
    assert all(type(v) in (int, float) for l in t.state.log_history for v in l.values())
    assert not any(isinstance(v, torch.Tensor) for vs in t.metrics_seen.seen['train'].values() for v in vs)


@pytest.mark.parametrize('bare', [False, True])
def test_item30_the_critic_starts_as_the_reward_model(bare, tmp_path):
    """With its weights, so the value at the last token is the score; but the reward model itself never changes,
    passed whole or as bare network [fails when the critic isn't copied]"""
    tok = toy_tokenizer()
    rm = RewardModel(reward_model_from(tiny('gpt2', seed=3), tok, seed=3), tok)
    before = fingerprint(rm.model)
    t = ppo_trainer(tmp_path, reward=rm, critic=rm.model if bare else rm, num_rollouts=2)
    assert fingerprint(t.model.critic) == before
    t.train()
    assert fingerprint(rm.model) == before != fingerprint(t.model.critic)


def test_item31_kl_is_against_the_reference(tmp_path):
    """A reference with negated output layer: the KL is that of hand-read log-probs, and large [fails when the
    policy stands in for the reference]"""
    policy, ref = talker('qwen2'), talker('qwen2', tie_word_embeddings=False)
    ref.get_output_embeddings().weight.data.neg_()
    old = copy.deepcopy(policy)
    t = ppo_trainer(tmp_path, policy, ref)
    t.train()
    s = t.experience.samples
    with torch.no_grad():
        kl = [float((row_logps(old, p, c) - row_logps(ref, p, c)).sum())
              for p, c in zip(s.prompt_ids, s.completion_ids)]
    assert logged(t, 'objective/kl')[0] == pytest.approx(np.mean(kl), abs=1e-4) and abs(np.mean(kl)) > .5


@pytest.mark.parametrize('given', [False, True])
def test_item34_the_reference_is_frozen(given, tmp_path):
    """Handed over in train mode with dropout, or made by the trainer: eval mode, no gradients, same bytes after
    the run, KL 0 at its start [fails when `frozen_reference` doesn't call `eval`]"""
    policy = talker(dropout=.1)
    ref = copy.deepcopy(policy).train() if given else None
    t = ppo_trainer(tmp_path, policy, ref, num_rollouts=3)
    before = fingerprint(t.ref_model)
    t.train()
    assert fingerprint(t.ref_model) == before != fingerprint(t.policy)
    assert not any(m.training for m in t.ref_model.modules())
    assert all(p.grad is None and not p.requires_grad for p in t.ref_model.parameters())
    kl = logged(t, 'objective/kl')
    assert kl[0] == 0 and kl[2] != 0
    trained = {id(p) for g in t.optimizer.param_groups for p in g['params']}
    assert (trained == {id(p) for p in t.model.parameters() if p.requires_grad}
            and not trained & {id(p) for p in t.ref_model.parameters()})


def test_item34_a_shared_reference_is_refused(tmp_path):
    "The policy itself, or a model that shares one of its tensors [fails when only `is` is looked at]"
    policy = tiny()
    half = copy.deepcopy(policy)
    half.model.embed_tokens.weight = policy.model.embed_tokens.weight
    for ref in (policy, half):
        with pytest.raises(UserError, match='ref_model'): ppo_trainer(tmp_path, policy, ref)


# ---- bf16

def test_item13_policy_and_reference_run_in_the_same_precision(tmp_path):
    """bf16 autocast: the reference's logits are bf16 as the policy's are, and the KL before the first update is
    0 [fails when only the policy's forward is under autocast]"""
    kinds, policy = {}, talker()
    ref = copy.deepcopy(policy)
    for name, m in (('policy', policy), ('ref', ref)):
        m.get_output_embeddings().register_forward_hook(lambda mod, a, out, name=name: kinds.setdefault(name, [])
                                                        .append(out.dtype))
    t = ppo_trainer(tmp_path, policy, ref, bf16=True)
    t.train()
    assert kinds['policy'][-1] == torch.bfloat16 and kinds['ref'] == [torch.bfloat16] * len(kinds['ref'])
    assert logged(t, 'objective/kl') == [0]


# ---- before the first update

def named(trainer, caplog):
    "What a run warns of the policy that has not been trained yet"
    trainer.train()
    return [r.getMessage().split(':')[0] for r in caplog.records if 'before any update' in r.getMessage()]


@pytest.mark.parametrize('how', [{}, dict(bf16=True), dict(bf16=True, per_device_train_batch_size=2)],
                         ids=['fp32', 'autocast', 'accumulated'])
def test_nothing_is_named_where_the_policy_is_itself(how, tmp_path, caplog):
    "In the second rollout the policy has moved: its KL is no fault [fails when the KL is looked at in every rollout]"
    assert named(ppo_trainer(tmp_path, num_rollouts=2, num_ppo_epochs=2, learning_rate=.5, **how), caplog) == []


@pytest.mark.parametrize('bf16', [False, True])
def test_a_ratio_that_is_not_1_is_named(bf16, tmp_path, caplog):
    """Dropout that was switched on after the trainer was made: once a rollout, in the first pass over it [fails
    without `_check_ratio`]"""
    t = ppo_trainer(tmp_path, num_rollouts=2, num_ppo_epochs=2, bf16=bf16)
    t.policy.register_forward_hook(lambda m, a, out: setattr(out, 'logits', torch.nn.functional.dropout(
        out.logits, .2, m.training)))
    assert named(t, caplog) == ['the ratio is not 1'] * 2


@pytest.mark.parametrize('bf16', [False, True])
def test_a_kl_that_is_not_0_is_named(bf16, tmp_path, caplog):
    """A reference that has changed since it was copied is named once; another model as reference is a choice, and
    isn't [fails when it is looked at after the first rollout, and when every reference is]"""
    t = ppo_trainer(tmp_path, num_rollouts=2, bf16=bf16)
    with torch.no_grad(): t.ref_model.get_input_embeddings().weight.mul_(1.5)
    assert named(t, caplog) == ['the KL is not 0']
    caplog.clear()
    assert named(ppo_trainer(tmp_path/'other', ref=talker(seed=1), bf16=bf16), caplog) == []


# ---- the rest of the rollout

def test_item09_chunks_of_generation_make_one_rollout(tmp_path):
    """8 prompts in chunks of 3, 3 and 2: eight rows in their order, nothing behind EOS, pads only on the right,
    log-probs those of each row alone; at so low a temperature each answer is the likeliest to its own prompt
    [fails when `sample` gives rows back in the order of their lengths, and when the last chunk is dropped]"""
    seen = []
    t = ppo_trainer(tmp_path, talker('llama', eos=2., seed=2), generation_batch_size=3, learning_rate=0.,
                    temperature=.01, reward=lambda p, c: seen.extend(p) or letters(p, c))
    t.train()
    e, tok = t.experience, toy_tokenizer()
    assert (e.samples.completion_ids == [sample(t.policy, tok, [p], 6, greedy=True).completion_ids[0] for p in seen]
            and len({*e.samples.completions}) == 8 and 2 < sum(e.samples.ended) < 8)
    assert e.samples.prompts == seen and len(e.mask) == 8 and len(set(seen)) == 8
    assert e.samples.prompt_ids == [encode_prompt(tok, p) for p in seen]
    assert all(tok.eos_token_id not in c[:-1] for c in e.samples.completion_ids)
    assert torch.equal(e.mask, lengths_of([len(c) for c in e.samples.completion_ids], e.mask.shape[1]))
    for i, (p, c) in enumerate(zip(e.samples.prompt_ids, e.samples.completion_ids)):
        torch.testing.assert_close(e.logprobs[i, :len(c)], row_logps(t.policy, p, c, .01).detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_item11_each_estimator_is_paid_for_at_its_token(estimator, numbers):
    """Rewards by plain loops in float64, to 1e-10; log-ratios of 100 stay finite [fails when `token_rewards`
    always takes k1, and when k3 casts to fp32]"""
    logps, ref, *_, n = numbers
    plain = {'k1': lambda d: d, 'k2': lambda d: d * d / 2, 'k3': lambda d: math.exp(-d) - 1 + d}[estimator]
    rewards = token_rewards(torch.ones(5).double(), logps, ref, lengths_of(n, 7), .3, estimator)
    for i, k in enumerate(n):
        expected = [-.3 * plain(float(logps[i, t] - ref[i, t])) + (t == k - 1) for t in range(k)]
        assert rewards[i, :k].tolist() == pytest.approx(expected, abs=1e-10)
    far = token_rewards(torch.ones(1), torch.tensor([[0., 0., 0.]]), torch.tensor([[-100., 0., 100.]]),
                        lengths_of([3], 3), .1, estimator)
    assert far.isfinite().all() and far[0, 1] == 0


def test_item12_the_adaptive_coefficient():
    "The worked example, the limit of 20% either way, and no change on target [fails when the error isn't limited]"
    assert next_kl_coef(.2, 12, 6, 256, 10_000) == pytest.approx(.201024)
    assert next_kl_coef(.2, 0, 6, 256, 10_000) == pytest.approx(.2 * (1 - .2 * .0256))
    assert next_kl_coef(.2, 6, 6, 256, 10_000) == .2 and next_kl_coef(.2, 6.6, 6, 1000, 1000) == pytest.approx(.22)


def test_item12_the_coefficient_follows_the_kl_of_each_rollout(tmp_path):
    """Adaptive: each rollout has the coefficient that the KL logged before it asks for; fixed: never another
    [fails when the coefficient is updated before it is used, and when the fixed one is updated]"""
    t = ppo_trainer(tmp_path, num_rollouts=4, kl_target=.05, kl_horizon=16, kl_coef=.1)
    t.train()
    kl, coef = logged(t, 'objective/kl'), logged(t, 'objective/kl_coef')
    assert coef[0] == .1 and kl[0] == 0 and kl[3] > .05
    for k in range(3): assert coef[k + 1] == pytest.approx(next_kl_coef(coef[k], kl[k], .05, 8, 16))
    assert t.kl_coef == pytest.approx(next_kl_coef(coef[3], kl[3], .05, 8, 16)) and coef[3] != coef[1]
    fixed = ppo_trainer(tmp_path, num_rollouts=2, kl_coef=.1)
    fixed.train()
    assert fixed.kl_coef == .1


def test_item16_a_rollout_stops_at_eos(tmp_path):
    """EOS forced at the third step: three forward passes, three tokens, ended [fails when generation isn't told
    the EOS id]"""
    policy = tiny()
    calls = steer(policy, 1, 1e4, at=3)
    t = ppo_trainer(tmp_path, policy)
    s = t._sample(toy_prompts(1), 0)
    assert len(calls) == 3 and len(s.completion_ids[0]) == 3 and s.ended == [True]


# ---- options

@pytest.mark.parametrize(
    'kw, what', [(dict(kl_target=0.), 'kl_target is 0'), (dict(kl_target=-1.), 'kl_target'),
                 (dict(kl_target=1., kl_horizon=0), 'kl_horizon is 0'), (dict(kl_target=1., kl_coef=0.), 'kl_coef'),
                 (dict(min_new_tokens=64), 'min_new_tokens'), (dict(kl_estimator='k4'), 'kl_estimator'),
                 (dict(ref_ema=1.), 'ref_ema'), (dict(kl_coef=-.1), 'kl_coef'), (dict(clip_scores=0.), 'clip_scores'),
                 (dict(target_kl=0.), 'target_kl'), (dict(stop_strings=['']), 'stop_strings'),
                 (dict(stop_strings='x'), 'stop_strings'), (dict(entropy_coef=-1.), 'entropy_coef'),
                 (dict(rollout_batch_size=6, num_mini_batches=4), 'multiple'),
                 (dict(gradient_accumulation_steps=2), 'gradient_accumulation_steps')])
def test_item12_senseless_settings_are_refused(kw, what, tmp_path):
    "At construction, naming the field [fails when `check_ppo_config` isn't called]"
    with pytest.raises(UserError, match=what): PPOConfig(output_dir=str(tmp_path), use_cpu=True, **kw)


def test_early_stop_skips_the_rest_of_a_rollout(tmp_path):
    """With a limit that the second update breaks, six epochs end with the weights of two; Adam's moments stand
    still, the schedule goes on [fails when a skipped step still runs the optimizer on gradients, and when
    `stopped` outlives its rollout]"""
    kw = dict(optim='adamw_torch', learning_rate=.01, weight_decay=.1, num_rollouts=2)
    two, six = (ppo_trainer(tmp_path, num_ppo_epochs=2, **kw),
                ppo_trainer(tmp_path, num_ppo_epochs=6, target_kl=1e-6, **kw))
    two._shuffled = six._shuffled = lambda k, epoch: list(range(8))
    two.train(), six.train()
    assert logged(six, 'policy/skipped') == [0, 0, 1, 1, 1, 1] * 2 and six.state.global_step == 12
    assert distance(weights(two.model), weights(six.model)) == 0
    assert logged(two, 'policy/approxkl') == [l['policy/approxkl'] for l in logged(six) if 'policy/approxkl' in l]


def test_entropy_bonus_adds_its_own_gradient(tmp_path):
    """One SGD step with and without: the policies differ by lr x coefficient x gradient of the mean entropy
    [fails when the entropy is computed without gradient, or has the other sign]"""
    policy = talker('llama')
    start, runs = copy.deepcopy(policy), []
    for c in (0., .3):
        runs.append(ppo_trainer(tmp_path, copy.deepcopy(policy), entropy_coef=c, learning_rate=.1, temperature=.8))
        runs[-1].train()
    s, total, n = runs[0].experience.samples, 0., 0
    for p, ids in zip(s.prompt_ids, s.completion_ids):
        logp = (start(torch.tensor([p + ids])).logits[0, len(p) - 1:-1] / .8).log_softmax(-1)
        total, n = total - (logp.exp() * logp).sum(), n + len(ids)
    (total / n).backward()
    for (k, p), a, b in zip(start.named_parameters(), runs[0].policy.parameters(), runs[1].policy.parameters()):
        torch.testing.assert_close(b - a, .1 * .3 * p.grad, atol=2e-6, rtol=1e-3, msg=k)


def test_a_moving_reference_follows_the_policy(tmp_path):
    """After each rollout but the last: ref = .7 ref + .3 policy; the KL is against the moved one [fails when the
    reference moves by the other share, or moves the policy]"""
    class Policies(TrainerCallback):
        def __init__(self): self.seen = []
        def on_step_end(self, *args, model=None, **kw): self.seen.append(weights(model.policy))
    seen, policy = Policies(), talker('llama')
    start = weights(policy)
    t = ppo_trainer(tmp_path, policy, ref_ema=.7, num_rollouts=3, trainer=dict(callbacks=[seen]))
    t.train()
    expected = {k: .7 * (.7 * v + .3 * seen.seen[0][k]) + .3 * seen.seen[1][k] for k, v in start.items()}
    assert distance(expected, weights(t.ref_model)) < 1e-6 and distance(start, expected) > 1e-3
    s = t.experience.samples
    logps = [sum(float(t.experience.logprobs[i].sum()) - float(row_logps(t.ref_model, p, c).sum())
                 for i, (p, c) in enumerate(zip(s.prompt_ids, s.completion_ids))) / 8]
    assert logged(t, 'objective/kl')[-1] == pytest.approx(logps[0], abs=1e-4)
    with pytest.raises(UserError, match='ref_ema'):
        ppo_trainer(tmp_path, talker('llama'), tiny('llama', intermediate_size=32), ref_ema=.5)


def test_scores_are_shaped_for_ppo_alone(tmp_path):
    """Divided by their deviation over the rollout, then cut; the log keeps the raw ones; by default untouched
    [fails when the clip comes first, and when the shaped scores are logged]"""
    x = torch.tensor([-3., 1., 2., 9.]).double()
    assert shape_scores(x).tolist() == x.tolist()
    assert shape_scores(x, scale=True).tolist() == pytest.approx((x / x.std(correction=0)).tolist(), abs=1e-6)
    assert shape_scores(x, scale=True, clip=1.).tolist() == pytest.approx([-3 / x.std(correction=0).item(),
        1 / x.std(correction=0).item(), 2 / x.std(correction=0).item(), 1.], abs=1e-6)
    assert shape_scores(torch.tensor([5.]), scale=True).isfinite().all()
    raw = [-300., 100., 200., 900., 0., 5., 7., -20.]
    t = ppo_trainer(tmp_path, reward=lambda p, c: raw, scale_scores=True, clip_scores=1., lam=1.,
                    missing_eos_penalty=0., learning_rate=0.)
    t.train()
    assert logged(t, 'objective/score') == [pytest.approx(np.mean(raw), rel=1e-6)]
    assert t.experience.returns[:, 0].tolist() == pytest.approx(
        (np.array(raw) / np.std(raw)).clip(-1, 1).tolist(), abs=1e-4)


def test_whitened_rewards_keep_their_mean(numbers):
    "[fails when the mean is taken off, as for advantages]"
    x, mask = numbers[0], lengths_of(numbers[-1], 7)
    real, w = x[mask], whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(w[mask], (real - real.mean()) / real.std(correction=0) + real.mean(), atol=1e-6, rtol=0)
    assert (w[~mask] == 0).all()


def test_value_clipping_can_be_off(numbers):
    "[fails when None is taken for 0]"
    values, old, ret, *_ = numbers
    torch.testing.assert_close(value_loss(values, old, ret, None), (values - ret).square() / 2)


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'neox'])
def test_share_trunk_is_one_forward_for_policy_and_critic(kind, updates, tmp_path):
    """One pass through one trunk for log-probs and values, no copy of it; values start at 0, ratio at 1; the
    value loss moves the trunk [fails when the critic gets hidden states of another pass]"""
    policy, passes = talker(kind), []
    t = ppo_trainer(tmp_path, policy, share_trunk=True, num_ppo_epochs=2, per_device_train_batch_size=4)
    trunk_of(t.policy).register_forward_hook(lambda *a: passes.append(torch.is_grad_enabled()))
    n = sum(p.numel() for p in policy.parameters()) + policy.config.hidden_size + 1
    assert sum(p.numel() for p in t.model.parameters()) == n
    t.train()
    assert sum(passes) == len(updates) == 4
    logp, value = drift(updates[:2])
    assert logp < 1e-5 and value == 0 and updates[2][0][2].abs().max() > 1e-3
    s = t.experience.samples
    batch = collate(s.prompt_ids, s.completion_ids, 0)
    with torch.no_grad():
        _, _, values = t.model(**vars(batch))
        hidden = trunk_of(t.policy)(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                                    position_ids=batch.position_ids).last_hidden_state
        expected = t.model.critic(hidden)[:, -batch.mask.shape[1] - 1:-1, 0] * batch.mask
    torch.testing.assert_close(values, expected)
    _, _, values = t.model(**vars(batch))
    values.sum().backward()
    assert trunk_of(t.policy).get_input_embeddings().weight.grad.abs().max() > 0


def test_share_trunk_resumes_and_refuses_a_second_critic(tmp_path):
    "The head is in the checkpoint [fails when it isn't loaded]"
    a = little_run(tmp_path/'a', share_trunk=True)
    b = little_run(tmp_path/'b', tmp_path/'a'/'checkpoint-2', share_trunk=True)
    assert end_state(a) == end_state(b)
    with pytest.raises(UserError, match='share_trunk'):
        ppo_trainer(tmp_path, critic=reward_model_from(tiny(), toy_tokenizer()), share_trunk=True)


def test_item15_a_stop_string_is_an_end(tok, tmp_path):
    """The completion ends with the token that completes it, counts as ended, is scored without it; others stay
    as they are [fails when what follows the stop string is kept, or the penalty is taken]"""
    a, b, c, stop = [tok(f' {w}', add_special_tokens=False)['input_ids'][0] for w in ('cows', 'eat', 'barns', 'salt')]
    ids = [[a, b, stop, c, c], [stop], [a, b, 1], [a, b]]
    s = Samples(['\n\nHuman:'] * 4, [tok.decode(i, skip_special_tokens=True) for i in ids],
                [encode_prompt(tok, '\n\nHuman:')] * 4, ids, [False, False, True, False])
    s = Samples(s.prompts, [' ' + x.strip() for x in s.completions], s.prompt_ids, s.completion_ids, s.ended)
    out = cut_at_stop(s, tok, ['salt', 'moo'])
    assert out.completion_ids == [[a, b, stop], [stop], [a, b, 1], [a, b]] and out.ended == [True, True, True, False]
    assert [x.strip() for x in out.completions] == [tok.decode([a, b]).strip(), '', tok.decode([a, b]).strip(),
                                                    tok.decode([a, b]).strip()]
    assert checked_scores(lambda p, c: [5.] * 4, out, 2.).tolist() == [5, 5, 5, 3]
    policy = tiny()
    steer(policy, stop, 4.), steer(policy, 1, -1e4)
    t = ppo_trainer(tmp_path, policy, stop_strings=['salt'], missing_eos_penalty=1.)
    t.train()
    s = t.experience.samples
    assert 0 < sum(s.ended) and all((stop in c) == e and stop not in c[:-1] for c, e in zip(s.completion_ids, s.ended))
    assert t.experience.mask.sum(1).tolist() == [len(c) for c in s.completion_ids]


# ---- prompts

TEMPLATE = ("{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: "
            "' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")

def test_chats_train_like_their_text(tmp_path):
    """Messages and the text that the template makes of them give the same run; evaluation too [fails when the
    assistant's turn isn't opened]"""
    tok, texts = copy.deepcopy(toy_tokenizer()), toy_prompts(6)
    tok.chat_template = TEMPLATE
    turns = [re.split(r'\n\n(Human|Assistant):', p)[1:-2] for p in texts]
    chats = [[{'role': {'Human': 'user', 'Assistant': 'assistant'}[who], 'content': what.strip()}
              for who, what in zip(t[::2], t[1::2])] for t in turns]
    assert text_prompts(util.Dataset.from_dict({'prompt': chats}), tok)['prompt'][:] == texts
    runs = [ppo_trainer(tmp_path, prompts=p, tok=tok,
                        trainer=dict(eval_dataset=util.Dataset.from_dict({'prompt': p}))) for p in (texts, chats)]
    evals = []
    for t in runs: t.train(), evals.append(t.evaluate())
    assert distance(*[weights(t.model) for t in runs]) == 0 and evals[0] == evals[1]


@pytest.mark.parametrize('data, what', [({'text': ['x']}, 'no column prompt'), ({'prompt': []}, 'no rows'),
                                        ({'prompt': ['x', '']}, 'row 1 is empty'),
                                        ({'prompt': [[{'role': 'user', 'content': 'x'}]]}, 'no chat template')])
def test_prompts_that_cannot_be_used_are_named(data, what, tok):
    "[fails when `text_prompts` doesn't look]"
    with pytest.raises(UserError, match=what): text_prompts(util.Dataset.from_dict(data), tok)


def test_a_chat_that_ends_with_its_answer_is_named(tok):
    "[fails when the last role isn't looked at]"
    tok = copy.deepcopy(tok)
    tok.chat_template = TEMPLATE
    chats = [[{'role': 'user', 'content': 'x'}],
             [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]]
    with pytest.raises(UserError, match='row 1'): text_prompts(util.Dataset.from_dict({'prompt': chats}), tok)


# ---- watching

def test_completions_are_kept_every_n_rollouts(tmp_path):
    "Of rollouts 0 and 2, with scores, KL and monitors [fails when every rollout is kept]"
    t = ppo_trainer(tmp_path, num_rollouts=4, log_completions=2,
                    trainer=dict(monitors={'length': lambda p, c: [len(x) for x in c]}))
    t.train()
    table = rollout_completions(tmp_path, 8)
    assert table['rollout'].tolist() == [0] * 8 + [2] * 8
    assert logged(t, 'objective/score')[::2] == pytest.approx(
        table.groupby('rollout')['score'].mean().tolist(), rel=1e-5)
    assert logged(t, 'objective/kl')[::2] == pytest.approx(table.groupby('rollout')['kl'].mean().tolist(), abs=1e-5)
    assert table['length'].tolist() == [len(c) for c in table['completion']]
    assert len(rollout_completions(tmp_path)) == 4
    with pytest.raises(UserError, match='log_completions'): rollout_completions(tmp_path/'elsewhere')


def test_explained_variance_by_hand():
    "1 for a perfect critic, 0 for a constant, over real tokens [fails when masked places count]"
    r, mask = torch.tensor([[1., 2., 9e9], [4., 9e9, 9e9]]), lengths_of([2, 1], 3)
    v = torch.tensor([[2., 2., 7.], [5., -1e6, 0.]])   # errors -1, 0, -1; returns 1, 2, 4: variances 2/9 and 14/9
    assert explained_variance(r, v, mask) == pytest.approx(1 - 2 / 14, abs=1e-6)
    assert (explained_variance(r, r, mask) == 1
            and explained_variance(r, torch.full_like(r, 3.), mask) == pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize('how', [dict(ACCELERATE_USE_DEEPSPEED='true'),
                                 dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='1')])
def test_item34_what_cannot_be_cut_is_refused(how, tmp_path, monkeypatch):
    "DeepSpeed and FSDP 1, before anything is built [fails when `check_processes` isn't called]"
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to='none')
    for k, v in how.items(): monkeypatch.setenv(k, v)
    with pytest.raises(UserError, match='supported'): trainer_module.check_processes(args)
    with pytest.raises(UserError, match='supported'):
        trainer_module.PPOTrainer(tiny(), None, letters, args=args,
                                  train_dataset=util.Dataset.from_dict({'prompt': toy_prompts(2)}),
                                  processing_class=toy_tokenizer())


# ---- LoRA: one copy of each weight

def lora(**kw):
    from peft import LoraConfig
    return LoraConfig(**dict(r=4, target_modules='all-linear', lora_dropout=.1) | kw)

def storages(*models):
    "Number of weights in the distinct tensors of some models"
    return sum({p.data_ptr(): p.numel() for m in models for p in m.parameters()}.values())

def lora_trainer(folder, policy=None, rm=None, **kw):
    "PPO on adapters: policy (a stand-in for the DPO model), reward model that is also the critic's start"
    rm = rm or RewardModel(reward_model_from(tiny(seed=3), toy_tokenizer(), seed=3), toy_tokenizer())
    trainer = dict(peft_config=lora()) | kw.pop('trainer', {})
    return ppo_trainer(folder, policy or talker('llama'), None, rm.model if kw.pop('bare', False) else rm, reward=rm,
                       trainer=trainer, **dict(num_rollouts=3, learning_rate=.2) | kw)

@pytest.fixture(scope='module')
def with_lora(tmp_path_factory):
    "A run on adapters, and what was there before it"
    folder, policy, tok = tmp_path_factory.mktemp('lora'), tiny('llama'), toy_tokenizer()
    policy.save_pretrained(folder/'dpo')
    rm = RewardModel(reward_model_from(tiny(seed=3), tok, seed=3), tok)
    n, before = storages(policy), (fingerprint(policy), fingerprint(rm.model),
                                   rm(toy_prompts(3), [' cows.'] * 3).tolist())
    t = lora_trainer(folder, policy, rm, save_strategy='steps', save_steps=1)
    wants = ({k: p.requires_grad for k, p in t.model.named_parameters()},
             {k: p.requires_grad for k, p in t.ref_model.named_parameters()})
    start = {k: v.clone() for k, v in t.model.named_parameters() if v.requires_grad}
    t.train()
    return dict(t=t, folder=folder, policy=policy, rm=rm, before=before, wants=wants, start=start, n=n)


def test_item32_the_lora_reference_is_the_model_itself(with_lora):
    """KL exactly 0 at the first rollout and not later; after the run the reference has the bytes, and the
    log-probs, of the separately loaded DPO model, and those of the policy with its adapter switched off
    [fails when the adapter is put into the model itself]"""
    t, kl = with_lora['t'], logged(with_lora['t'], 'objective/kl')
    assert kl[0] == 0 and abs(kl[2]) > 1e-3
    assert fingerprint(t.ref_model) == with_lora['before'][0]
    dpo, s = AutoModelForCausalLM.from_pretrained(with_lora['folder']/'dpo').eval(), t.experience.samples
    with torch.no_grad():
        for p, c in zip(s.prompt_ids, s.completion_ids):
            separately = row_logps(dpo, p, c)
            assert torch.equal(row_logps(t.ref_model, p, c), separately)
            with t.policy.disable_adapter(): assert torch.equal(row_logps(t.policy, p, c), separately)
    assert distance({k: v.detach() for k, v in dpo.named_parameters()},
                    {k: v.detach() for k, v in t.ref_model.named_parameters()}) == 0


def test_item32_an_adapted_policy_is_its_own_reference(tmp_path):
    """A policy that comes with a trained adapter, no peft_config: KL exactly 0 at first, reference with that
    adapter as it was, bare weights held once [fails when the reference is the bare base]"""
    from peft import get_peft_model
    policy = get_peft_model(tiny('llama'), lora(lora_dropout=0.))
    with torch.no_grad():
        for k, p in policy.named_parameters():
            if 'lora_B' in k: p.normal_(0, .1)
    n, adapter = storages(policy), sum(p.numel() for p in policy.parameters() if p.requires_grad)
    rm = reward_model_from(tiny(seed=3), toy_tokenizer(), seed=3)
    t = ppo_trainer(tmp_path, policy, None, rm, num_rollouts=3, learning_rate=.2)
    before = fingerprint(t.ref_model)
    assert before == fingerprint(policy) and storages(t.policy, t.ref_model) == n + adapter
    t.train()
    kl = logged(t, 'objective/kl')
    assert kl[0] == 0 and abs(kl[2]) > 1e-3 and fingerprint(t.ref_model) == before != fingerprint(t.policy)


def test_item33_adapters_are_trained_and_nothing_else(with_lora):
    """requires_grad is what it was through three rollouts; every trainable weight is in the optimizer and has
    moved; reference, reward model and its scores have not [fails when the critic's head isn't among
    `modules_to_save`]"""
    t, (wants, ref_wants) = with_lora['t'], with_lora['wants']
    assert wants == {k: p.requires_grad for k, p in t.model.named_parameters()} and any(wants.values())
    assert ref_wants == {k: p.requires_grad for k, p in t.ref_model.named_parameters()} and not any(ref_wants.values())
    trained = {id(p) for g in t.optimizer.param_groups for p in g['params']}
    assert trained == {id(p) for p in t.model.parameters() if p.requires_grad}
    still = [k for k, p in t.model.named_parameters() if p.requires_grad and torch.equal(p, with_lora['start'][k])]
    assert not still, still
    assert (any('score.modules_to_save' in k for k in with_lora['start'])
            and all('lora' in k or 'score' in k for k in with_lora['start']))
    rm = with_lora['rm']
    assert (fingerprint(with_lora['policy']), fingerprint(rm.model),
            rm(toy_prompts(3), [' cows.'] * 3).tolist()) == with_lora['before']


def test_lora_holds_one_copy_of_each_weight(with_lora):
    """Policy, reference, critic and reward model together: the weights of one policy, one reward model, the
    adapters and one more head [fails when any of them is copied]"""
    t, rm = with_lora['t'], with_lora['rm']
    extra = sum(v.numel() for v in with_lora['start'].values())
    assert storages(t.model, t.ref_model, rm.model) == with_lora['n'] + storages(rm.model) + extra
    assert extra < .7 * with_lora['n']   # of full copies there would be two more policies and a reward model


def test_lora_without_a_value_model_puts_the_critic_on_the_policys_weights(tmp_path):
    "Nothing is copied there either [fails when the critic keeps the trunk that `reward_model_from` copies]"
    policy = talker('llama')
    n = storages(policy)
    t = ppo_trainer(tmp_path, policy, trainer=dict(peft_config=lora()))
    extra = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    assert storages(t.model, t.ref_model) <= n + extra + policy.config.hidden_size
    t.train()
    shared = ppo_trainer(tmp_path, talker('llama'), share_trunk=True, trainer=dict(peft_config=lora()))
    assert storages(shared.model,
                    shared.ref_model) == n + sum(p.numel() for p in shared.model.parameters() if p.requires_grad)
    shared.train()


@pytest.mark.parametrize('bare', [False, True])
def test_item30_the_lora_critic_starts_as_the_reward_model(bare, tmp_path):
    "Its value at the last token is the reward model's raw score, dropout or not [fails when the head starts anew]"
    tok, t = toy_tokenizer(), lora_trainer(tmp_path, bare=bare)
    rows = [(encode_prompt(tok, p), [21, 22, 23 + i]) for i, p in enumerate(toy_prompts(3))]
    # the value at the last place is that of the state before EOS
    batch = collate([p for p, _ in rows], [c + [1] for _, c in rows], 0)
    scores = score_ids(t.reward.model, [p + c for p, c in rows], 0)
    with torch.no_grad():
        torch.testing.assert_close(token_values(t.model.critic, batch)[:, -1].double(), torch.tensor(scores),
                                   atol=1e-5, rtol=0)


def test_item26_lora_resume_is_bitwise_and_a_checkpoint_is_an_adapter(with_lora, tmp_path):
    """Three rollouts = one + checkpoint + two; the checkpoint loads with PEFT on the DPO model and says what the
    policy says [fails when the adapter isn't loaded]"""
    from peft import PeftModel
    t = with_lora['t']
    again = lora_trainer(tmp_path, tiny('llama'))
    again.train(resume_from_checkpoint=str(with_lora['folder']/'checkpoint-1'))
    assert fingerprint(again.model) == fingerprint(t.model) and logged(again) == logged(t)
    dpo = AutoModelForCausalLM.from_pretrained(with_lora['folder']/'dpo')
    loaded, s = PeftModel.from_pretrained(dpo, with_lora['folder']/'checkpoint-3').eval(), t.experience.samples
    assert not any('embed' in p.name or p.name == 'model.safetensors'
                   for p in (with_lora['folder']/'checkpoint-3').iterdir())
    with torch.no_grad():
        assert torch.equal(row_logps(loaded, s.prompt_ids[0], s.completion_ids[0]),
                           row_logps(t.policy.eval(), s.prompt_ids[0], s.completion_ids[0]))


def test_item28_lora_with_activation_checkpointing_trains_alike(tmp_path):
    """On in policy and critic, gradients reach the adapters though the embeddings below are frozen: same weights
    as without [fails when `activation_checkpointing_enable` leaves the critic out]"""
    runs = [lora_trainer(tmp_path, activation_checkpointing=on, num_rollouts=1) for on in (False, True)]
    start = weights(runs[0].model)
    for on, t in enumerate(runs):
        t.train()
        assert {layer.gradient_checkpointing for m in (t.policy, t.model.critic)
                for layer in trunk_of(m).layers} == {bool(on)}
    assert distance(weights(runs[0].model), weights(runs[1].model)) < 1e-6 < distance(start, weights(runs[0].model))


@pytest.mark.parametrize('kw, what',
                         [(dict(ref=True), 'leave ref_model out'), (dict(adapted=True), 'merge_and_unload'),
                          (dict(ref_ema=.9), 'ref_ema'), (dict(prompt=True), 'virtual tokens')])
def test_item34_adapters_that_contradict_are_refused(kw, what, tmp_path):
    """A reference beside peft_config, an adapter upon an adapter, a reference that moves, prompt tuning [fails
    when `policy_and_reference` doesn't look]"""
    from peft import PromptTuningConfig, get_peft_model
    policy = get_peft_model(tiny(), lora()) if kw.pop('adapted', False) else tiny()
    config = PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2) if kw.pop('prompt', False) else lora()
    rm = reward_model_from(tiny(seed=3), toy_tokenizer(), seed=3)
    with pytest.raises(UserError, match=what):
        ppo_trainer(tmp_path, policy, tiny(seed=5) if kw.pop('ref', False) else None, rm,
                    trainer=dict(peft_config=config), **kw)


def test_item34_frozen_weights_may_be_shared_trained_ones_not():
    "A sharing copy has the frozen tensors themselves and copies of the others [fails when everything is shared]"
    policy = tiny()
    policy.get_input_embeddings().requires_grad_(False)
    ref, frozen = sharing_copy(policy), policy.get_input_embeddings().weight
    assert (ref.get_input_embeddings().weight is frozen
            and storages(policy, ref) == 2 * storages(policy) - frozen.numel())
    assert frozen_reference(None, policy).training is False
    with pytest.raises(UserError, match='ref_model'):
        frozen_reference(sharing_copy(policy, lambda p: True), policy.requires_grad_(True))


# ---- two processes

def test_two_processes_learn_and_hold_equal_weights(two):
    "The toy task is learned and both ranks end with the same bytes [fails when the policy loss has the other sign]"
    _, (a, b) = two
    assert a['world_size'] == b['world_size'] == 2
    for part in ('one_update', 'learning'): assert a[part]['weights'] == b[part]['weights']
    scores = a['learning']['scores']
    assert len(scores) == 20 and np.mean(scores[-3:]) > np.mean(scores[:3]) + 1, scores


def test_item27_two_processes_sample_apart(two):
    """One prompt for all: the halves of a rollout differ, within and between processes [fails when
    the places of the rows are left out]"""
    _, (a, b) = two
    both = a['one_update']['completions'], b['one_update']['completions']
    assert len(both[0]) == len(both[1]) == 4 and both[0] != both[1] and len(set(both[0] + both[1])) > 4


def test_item21_two_processes_whiten_over_both(two):
    """Advantages of both halves together have mean 0 and deviation 1, those of one half don't [fails when
    `whiten` gets no `reduce`]"""
    out, _ = two
    parts = [load_experience(out/f'experience-{rank}.safetensors')[0] for rank in (0, 1)]
    both = [e.advantages[e.mask] for e in parts]
    raw = torch.cat([(e.returns - e.values)[e.mask] for e in parts])
    torch.testing.assert_close(torch.cat(both), (raw - raw.mean()) / raw.std(correction=0), atol=1e-4, rtol=0)
    assert all(abs(float(x.mean())) > .01 for x in both)


def test_item22_two_processes_make_the_update_of_one(two):
    """One SGD step of two processes, in micro-batches of 3 and 1 rows, equals the step of one process on both
    halves; logs are those of all rows [fails when the loss isn't multiplied by the number of processes]"""
    out, (a, b) = two
    parts, policy = ([load_experience(out/f'experience-{rank}.safetensors')[0] for rank in (0, 1)],
                     talker('llama'))
    model = ActorCritic(policy, reward_model_from(policy, toy_tokenizer(), seed=42))
    total, n, start = {}, sum(int(e.mask.sum()) for e in parts), weights(model)
    for e in parts:
        batch = collate(e.samples.prompt_ids, e.samples.completion_ids, 0)
        sums = ppo_losses(model(**vars(batch)), dict(mask=e.mask, old_logprobs=e.logprobs, old_values=e.values,
                                                     advantages=e.advantages, returns=e.returns))
        total = {k: total.get(k, 0) + v / n for k, v in sums.items()}
    (total['loss/policy'] + .1 * total['loss/value']).backward()
    torch.optim.SGD(model.parameters(), lr=.1).step()
    done = torch.load(out/'updated.pt', weights_only=True)
    assert distance(weights(model), done) < 1e-5 and distance(start, done) > 1e-2
    log = a['one_update']['logs'][0]
    for k in ('loss/value', 'policy/entropy', 'policy/ratio'): assert log[k] == pytest.approx(total[k].item(), abs=1e-4)
    assert log['rollout/length'] == n / 8


def test_item26_two_processes_resume_in_the_middle_of_a_rollout(two):
    """Each has its own half of the rollout back [fails, with all tests of two processes, when only the main
    process saves it]"""
    _, (a, b) = two
    assert a['resumed'] == b['resumed'] == dict(same=True)


# ---- TRL's numbers

TRL = json.loads((Path(__file__).parent/'trl112_ppo.json').read_text())

@pytest.mark.parametrize('estimator', ['k1', 'k3'])
def test_numbers_of_trl(estimator):
    """The tensors of a real update of TRL 1.12.0 (recorded by record_trl112.py), responses of full length, where
    both put the score on the last token: token rewards, GAE, whitening, both losses.
    Ours whitens by the population's deviation, TRL by the sample's: a factor of sqrt((n - 1) / n) on purpose,
    since that of a single token is not NaN [fails when lambda isn't multiplied by gamma, and when k3 is read
    as k1]"""
    x, how = {k: torch.tensor(v, dtype=torch.float64) for k, v in TRL[estimator].items()}, TRL['settings']
    mask, close = torch.ones_like(x['values'], dtype=torch.bool), dict(atol=2e-5, rtol=1e-5)
    rewards = token_rewards(x['scores'], x['logprobs'], x['ref_logprobs'], mask, how['kl_coef'], estimator)
    torch.testing.assert_close(rewards, x['rewards'], **close)
    advantages, _ = gae(rewards, x['values'], mask, how['gamma'], how['lam'])
    torch.testing.assert_close(advantages, x['advantages'], **close)
    n = mask.sum()
    torch.testing.assert_close(whiten(advantages, mask) * ((n - 1) / n).sqrt(), x['whitened'], **close)
    losses, ratio, _ = policy_loss(x['new_logprobs'], x['mb_logprobs'], x['mb_advantage'], how['cliprange'])
    torch.testing.assert_close(ratio, x['ratio'], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses, x['pg_loss_max'], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(2 * value_loss(x['vpred'], x['mb_values'], x['mb_return'], how['cliprange_value']),
                               x['vf_loss_max'], **close)
    assert (((ratio - 1).abs() > how['cliprange']).any()
            and ((x['vpred'] - x['mb_values']).abs() > how['cliprange_value']).any())


def test_item33_a_frozen_model_is_not_trained_without_a_word(tmp_path):
    """A policy or bare critic without trainable weights is refused; a reward model that was frozen because it
    only scores makes a critic that learns [fails when `check_trainable` isn't called, and when the critic
    keeps the frozen flags]"""
    tok = toy_tokenizer()
    with pytest.raises(UserError, match='policy requires gradients'):
        ppo_trainer(tmp_path, tiny().requires_grad_(False))
    frozen = reward_model_from(tiny(seed=3), tok, seed=3).requires_grad_(False)
    with pytest.raises(UserError, match='critic requires gradients'): ppo_trainer(tmp_path, critic=frozen)
    t = ppo_trainer(tmp_path, critic=RewardModel(frozen, tok))
    before = fingerprint(t.model.critic)
    t.train()
    assert fingerprint(t.model.critic) != before and not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize('item', range(1, 35))
def test_every_item_has_a_test(item):
    "Here; some have more in test_logprobs.py and test_reward.py [fails when one is renamed]"
    names = re.findall(r'^def (test_\w+)', Path(__file__).read_text(encoding='utf-8'), re.M)
    assert any(re.match(rf'test_item(\d\d_and_)?{item:02d}_', n) for n in names)


def test_the_best_checkpoint_can_be_loaded_at_the_end(tmp_path):
    """By the lowest score on evaluation prompts, so that the best checkpoint isn't the last: policy and critic
    are those of that checkpoint [fails when `_load_best_model` does nothing]"""
    prompts = util.Dataset.from_dict({'prompt': toy_prompts(8)})
    t = ppo_trainer(tmp_path, num_rollouts=4, learning_rate=.3, eval_strategy='steps',
                    eval_steps=1, save_strategy='steps', save_steps=1, load_best_model_at_end=True,
                    metric_for_best_model='objective/score', greater_is_better=False,
                    trainer=dict(eval_dataset=prompts))
    t.train()
    scores = logged(t, 'eval_objective/score')
    best = min(range(4), key=scores.__getitem__) + 1
    assert best < 4 and t.state.best_model_checkpoint.endswith(f'checkpoint-{best}'), scores
    assert distance(weights(AutoModelForCausalLM.from_pretrained(tmp_path/f'checkpoint-{best}')),
                    weights(t.policy)) == 0
    assert distance(weights(RewardModel.load(tmp_path/f'checkpoint-{best}'/'critic', tok=toy_tokenizer()).model),
                    weights(t.model.critic)) == 0


@pytest.mark.parametrize('engine', ['_decode', '_generate'])
def test_item07_a_least_length_is_in_every_log_prob(engine, updates, tmp_path, monkeypatch):
    """No EOS among the first three tokens, in the sampling and in all log-probs: policy, reference and old ones
    are softmaxes without it, the ratio is 1, the entropy finite [fails when the reference, or the update,
    keeps EOS]"""
    from mpo_nb import sampling
    monkeypatch.setattr(sampling, '_engine', lambda model: getattr(sampling, engine))
    policy, ref = talker('llama', eos=6.), talker('llama', eos=6., seed=5)
    old, reference = copy.deepcopy(policy), copy.deepcopy(ref)
    t = ppo_trainer(tmp_path, policy, ref, min_new_tokens=3, temperature=.8, entropy_coef=.01)
    t.train()
    s = t.experience.samples
    assert min(map(len, s.completion_ids)) == 4 and sum(s.ended) > 4
    def alone(model, p, c):
        logits = model(torch.tensor([p + c])).logits[0, len(p) - 1:-1] / .8
        logits[:3, 1] = -math.inf
        return logits.log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0]
    with torch.no_grad():
        logps, refs = ([alone(m, p, c) for p, c in zip(s.prompt_ids, s.completion_ids)] for m in (old, reference))
    for i, r in enumerate(logps): torch.testing.assert_close(t.experience.logprobs[i, :len(r)], r, atol=1e-5, rtol=0)
    assert drift(updates)[0] < 1e-5 and all(math.isfinite(v) for l in logged(t) for v in l.values())
    assert logged(t, 'objective/kl')[0] == pytest.approx(np.mean([float((a - b).sum()) for a, b in zip(logps, refs)]),
                                                         abs=1e-4)
