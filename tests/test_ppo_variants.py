"""PPO: the KL in the loss, advantages without a critic, and adapters that are trained further. The default is tested
in test_ppo.py.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy
import json
import math
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from mpo_nb import ppo
from mpo_nb import ppo_trainer as trainer_module
from mpo_nb.actor_critic import ActorCritic
from mpo_nb.core import UserError
from mpo_nb.logprobs import collate, encode_prompt
from mpo_nb.ppo import ADVANTAGES, KL_ESTIMATORS, AdvantageEstimator, kl_loss, over_tokens, rloo
from mpo_nb.training import load_adapter
from mpo_nb.ppo_config import PPOConfig, classifier_on, make_critic, rollout_rows
from mpo_nb.ppo_trainer import load_experience
from mpo_nb.reward import RewardModel, reward_model_from
from test_ppo import (AtTheEnd, end_state, little_run, lora, plain_gae, plain_rewards, storages, updates)
from util import (distance, fingerprint, in_a_new_process, letters, logged, ppo_trainer, row_logps, talker, tiny,
                  toy_prompts, toy_tokenizer, weights)

pytestmark = pytest.mark.usefixtures('own_random_state')

KINDS = sorted(KL_ESTIMATORS)


# ---- the gradient of the KL

class Categorical:
    "Seven outcomes, all of which are summed over: a policy, where it was when it sampled, a reference; float64"
    def __init__(self, on_policy):
        g = torch.Generator().manual_seed(3)
        self.theta, there, ref = (2 * torch.randn(7, dtype=torch.float64, generator=g) for _ in range(3))
        self.theta.requires_grad_()
        self.old = (self.theta if on_policy else there).detach().log_softmax(0)
        self.ref = ref.log_softmax(0)

    def grad(self, f):
        "Of f(log-probs of all outcomes), summed"
        return torch.autograd.grad(f(self.theta.log_softmax(0)).sum(), self.theta)[0]

    def exact(self): return self.grad(lambda logp: logp.exp() * (logp - self.ref))


@pytest.mark.parametrize('on_policy', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_the_expected_gradient_is_that_of_the_exact_kl(kind, on_policy):
    """Over all outcomes, weighted by the policy that sampled; for k1 and k3 the expected value is the KL as well, for
    k2 only the gradient is right [fails when the ratio is left out, when it is held constant for k1 and k3, and,
    off-policy, when it isn't for k2]"""
    c = Categorical(on_policy)
    seen = c.grad(lambda logp: c.old.exp() * kl_loss(logp, c.old, c.ref, kind))
    torch.testing.assert_close(seen, c.exact(), atol=1e-12, rtol=0)
    assert c.exact().norm() > .1
    logp = c.theta.detach().log_softmax(0)
    value, kl = (c.old.exp() * kl_loss(logp, c.old, c.ref, kind)).sum(), (logp.exp() * (logp - c.ref)).sum()
    assert (abs(value - kl) < 1e-12) == (kind != 'k2')


def test_estimates_as_they_stand_have_other_gradients():
    """On-policy: that of k1 is 0, that of k3 is KL(ref || policy)'s, that of k2 is right; off-policy that of k2 isn't
    [fails when one of them is what the text says of another]"""
    c = Categorical(True)
    naive = {k: c.grad(lambda logp: c.old.exp() * f(logp, c.ref)) for k, f in KL_ESTIMATORS.items()}
    assert naive['k1'].abs().max() < 1e-12
    torch.testing.assert_close(naive['k2'], c.exact(), atol=1e-12, rtol=0)
    torch.testing.assert_close(naive['k3'], c.grad(lambda logp: c.ref.exp() * (c.ref - logp)), atol=1e-12, rtol=0)
    c = Categorical(False)
    assert (c.grad(lambda logp: c.old.exp() * KL_ESTIMATORS['k2'](logp, c.ref)) - c.exact()).norm() > .1


@pytest.mark.parametrize('kind', KINDS)
def test_far_from_the_reference_the_loss_stays_finite(kind):
    "Log-ratios of ±100 in fp32: value and gradient [fails when k3 isn't capped]"
    logp = torch.tensor([[0., 0., 0.]], requires_grad=True)
    loss = kl_loss(logp, logp.detach(), torch.tensor([[-100., 0., 100.]]), kind)
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all() and loss[0, 1] == 0


# ---- whole updates against plain loops

def plain_update(t, model, reference, advantages, beta, kind, critic, epochs=2, lr=.1, vf=.5):
    """`epochs` steps of SGD, row by row without padding, in float64; the KL's gradient is written out by hand, for a
    token rho * l * grad log pi (k1: l + 1)"""
    s, opt = t.experience.samples, torch.optim.SGD(model.parameters(), lr=lr)
    def look():
        out = []
        for p, c in zip(s.prompt_ids, s.completion_ids):
            v = None
            if critic:
                hidden = model.critic.transformer(torch.tensor([p + c])).last_hidden_state[0]
                v = model.critic.score(hidden[len(p) - 1:-1])[:, 0]
            out.append((row_logps(model.policy, p, c), v))
        return out
    with torch.no_grad():
        old, refs = look(), [row_logps(reference, p, c) for p, c in zip(s.prompt_ids, s.completion_ids)]
    white, raw = advantages(old, refs)
    n = sum(map(len, white))
    for _ in range(epochs):
        loss = 0.
        for (l, v), (l0, v0), r, w, a in zip(look(), old, refs, white, raw):
            w, ratio = torch.tensor(w), (l - l0).exp()
            loss = loss - torch.minimum(ratio * w, ratio.clamp(.8, 1.2) * w).sum()
            loss = loss + beta * (ratio * (l - r + (kind == 'k1'))).detach().mul(l).sum()
            if critic:
                target, near = torch.tensor(a) + v0, v0 + (v - v0).clamp(-.2, .2)
                loss = loss + vf * torch.maximum((v - target) ** 2, (near - target) ** 2).sum() / 2
        opt.zero_grad(); (loss / n).backward(); opt.step()
    return model

def scores_of(t):
    s = t.experience.samples
    return [x - (not e) for x, e in zip(letters(s.prompts, s.completions), s.ended)]

@pytest.mark.parametrize('size', [8, 3])
@pytest.mark.parametrize('kind', KINDS)
def test_an_update_with_the_kl_in_the_loss_equals_plain_loops(kind, size, tmp_path):
    """Two epochs on one rollout, the second off-policy, against float64 loops: same weights to 1e-5 [fails when the
    KL is in the rewards as well, when it has no ratio, and when it is averaged by row]"""
    policy, ref, tok = talker(seed=1), talker(seed=2), toy_tokenizer()
    critic = reward_model_from(tiny('gpt2', seed=3), tok, seed=3)
    model, reference = copy.deepcopy(ActorCritic(policy, critic)).double(), copy.deepcopy(ref).double()
    start = weights(model)
    t = ppo_trainer(tmp_path, policy, ref, critic, num_ppo_epochs=2, per_device_train_batch_size=size, learning_rate=.1,
                    kl_coef=.3, lam=.9, vf_coef=.5, gamma=.97, kl_in='loss', kl_estimator=kind)
    t.train()
    def advantages(old, refs):
        raw = [plain_gae(plain_rewards(sc, l.tolist(), l.tolist(), len(l), 0.), v.tolist(), .97, .9)
               for sc, (l, v) in zip(scores_of(t), old)]
        flat = np.concatenate(raw)
        return [(np.array(a) - flat.mean()) / flat.std() for a in raw], raw
    plain_update(t, model, reference, advantages, .3, kind, critic=True)
    assert distance(start, weights(model)) > 1e-2
    assert distance({k: v.double() for k, v in weights(t.model).items()}, weights(model)) < 1e-5


@pytest.mark.parametrize('kl_in', ['reward', 'loss'])
def test_a_leave_one_out_update_equals_plain_loops(kl_in, tmp_path):
    """Four prompts with two completions each: no critic, no whitening, the KL in the return or in the loss [fails when
    the advantages are whitened, and when a completion is in its own baseline]"""
    policy, ref = talker(seed=1), talker(seed=2)
    model, reference = copy.deepcopy(ActorCritic(policy)).double(), copy.deepcopy(ref).double()
    t = ppo_trainer(tmp_path, policy, ref, num_ppo_epochs=2, per_device_train_batch_size=3, learning_rate=.02,
                    kl_coef=.3, kl_in=kl_in, advantage_estimator='rloo', num_generations=2)
    t.train()
    def advantages(old, refs):
        paid = .3 if kl_in == 'reward' else 0.
        total = [sum(plain_rewards(sc, l.tolist(), r.tolist(), len(l), paid))
                 for sc, (l, _), r in zip(scores_of(t), old, refs)]
        return [[total[i] - total[i ^ 1]] * len(l) for i, (l, _) in enumerate(old)], [None] * 8
    start = weights(model)
    plain_update(t, model, reference, advantages, .3 * (kl_in == 'loss'), 'k1', critic=False, lr=.02)
    assert distance(start, weights(model)) > 1e-3
    assert distance({k: v.double() for k, v in weights(t.model).items()}, weights(model)) < 1e-5


# ---- the KL in the loss: rewards, logs, prices

def test_the_kl_is_in_one_place_and_logged_the_same(tmp_path):
    """In the loss the rewards are the scores alone; KL and RLHF reward of the first rollout are logged as they are
    with the KL in the reward, `loss/kl` only where there is one [fails when `kl_prices` gives both the price]"""
    policy, ref = talker(seed=1), talker(seed=2)
    runs = {place: ppo_trainer(tmp_path, copy.deepcopy(policy), ref, kl_in=place, kl_coef=.5, lam=1., learning_rate=0.)
            for place in ('reward', 'loss')}
    for t in runs.values(): t.train()
    a, b = runs['reward'], runs['loss']
    assert b.experience.returns[:, 0].tolist() == pytest.approx(scores_of(b), abs=1e-5)
    e = a.experience
    assert a.experience.returns[:, 0].tolist() == pytest.approx(
        (torch.tensor(scores_of(a)) - .5 * (e.logprobs - e.ref_logprobs).sum(1)).tolist(), abs=1e-5)
    for key in ('objective/kl', 'objective/rlhf_reward', 'objective/score', 'objective/entropy'):
        assert logged(a, key) == logged(b, key), key
    assert abs(logged(a, 'objective/kl')[0]) > .1 and logged(a, 'loss/kl') == []
    tokens = int(e.mask.sum())
    assert logged(b, 'loss/kl')[0] == pytest.approx(8 * logged(b, 'objective/kl')[0] / tokens, abs=1e-5)
    # both say what the objective is worth
    kl, score = logged(a, 'objective/kl')[0], logged(a, 'objective/score')[0]
    assert logged(b, 'objective/rlhf_reward')[0] == pytest.approx(score - .5 * kl, abs=1e-5)


def test_the_default_carries_no_reference_into_the_update(tmp_path, updates):
    "No work is added where the KL is in the reward [fails when `minibatch` always takes them along]"
    ppo_trainer(tmp_path).train()
    assert all('ref_logprobs' not in mb for _, mb in updates)


def test_an_adaptive_price_is_that_of_the_rollout(tmp_path):
    """With kl_target the updates on a rollout pay the price that was logged with it, not the next one [fails when
    `compute_loss` takes the trainer's `kl_coef`, and when the experience is made after it has moved]"""
    prices, losses = [], []
    t = ppo_trainer(tmp_path, talker(seed=1), talker(seed=2), num_rollouts=3, num_ppo_epochs=2, kl_in='loss',
                    kl_target=.05, kl_horizon=16, kl_coef=.1)
    learn, loss = t._learn_from, trainer_module.ppo_loss
    t._learn_from = lambda *a: (prices.append(t.kl_coef), learn(*a))[1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(trainer_module, 'ppo_loss', lambda terms, a, kl_coef: (losses.append(kl_coef),
                                                                         loss(terms, a, kl_coef))[1])
        t.train()
    assert prices == logged(t, 'objective/kl_coef') and len(set(prices)) == 3
    assert losses == [p for p in prices for _ in range(2)]


def test_the_kl_in_the_loss_pulls_the_policy_back(tmp_path):
    """Every answer is worth the same, so the advantages are 0 and the KL alone moves the policy, from another model
    towards the reference [fails when the loss has no KL, or the other sign]"""
    t = ppo_trainer(tmp_path, talker('llama', seed=1), talker('llama', seed=2), reward=lambda p, c: [0.] * len(c),
                    missing_eos_penalty=0., advantage_estimator='rloo', num_generations=2, kl_in='loss', kl_coef=1.,
                    kl_estimator='k3', num_rollouts=6, num_ppo_epochs=4, rollout_batch_size=64,
                    per_device_train_batch_size=64, optim='adamw_torch', learning_rate=.01)
    t.train()
    kl = logged(t, 'objective/kl')
    assert t.experience.advantages.abs().max() == 0 and 0 < kl[-1] < .8 * kl[0], kl


# ---- leave one out

def plain_rloo(rewards, n, k):
    "Advantage and return of every completion, by the definition"
    total = [sum(r[:m]) for r, m in zip(rewards, n)]
    out = []
    for i, x in enumerate(total):
        group = range(i - i % k, i - i % k + k)
        out.append(x - sum(total[j] for j in group if j != i) / (k - 1))
    return out, total

@pytest.mark.parametrize('k', [2, 3, 6])
def test_leave_one_out_equals_a_plain_loop(k):
    "To 1e-12, whatever stands at the padding [fails when the baseline is the mean of all k]"
    n = [7, 1, 4, 3, 6, 2]
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(7)[None] < torch.tensor(n)[:, None]
    rewards = torch.randn(6, 7, dtype=torch.float64, generator=g).masked_fill(~mask, float('nan'))
    advantages, returns = rloo(rewards, None, mask, num_generations=k, gamma=.5, lam=.5)
    a, r = plain_rloo(rewards.tolist(), n, k)
    for i, m in enumerate(n):
        assert advantages[i].tolist() == pytest.approx([a[i]] * m + [0] * (7 - m), abs=1e-12)
        assert returns[i].tolist() == pytest.approx([r[i]] * m + [0] * (7 - m), abs=1e-12)


def test_completions_of_a_prompt_stand_together(tmp_path):
    """Each prompt as often as `num_generations` says, side by side, different completions; three rollouts use every
    prompt twice [fails when the rows of a rollout are repeated as a whole, and when a group has one seed]"""
    t = ppo_trainer(tmp_path, tiny(), prompts=4, num_rollouts=3, advantage_estimator='rloo', num_generations=3,
                    rollout_batch_size=9, per_device_train_batch_size=9)
    seen = []
    t.reward = lambda p, c: (seen.extend(p), letters(p, c))[1]
    t.train()
    groups = [seen[i:i + 3] for i in range(0, 27, 3)]
    assert all(len(set(g)) == 1 for g in groups)
    prompts = [g[0] for g in groups]
    assert sorted(prompts[:4]) == sorted(prompts[4:8]) == sorted(toy_prompts(4))
    answers = [tuple(c) for c in t.experience.samples.completion_ids]
    assert len(set(answers)) > 6


def test_without_a_critic_none_is_built_or_saved(tmp_path):
    """Only the policy is in the module, the optimizer and the checkpoint; there are no logs of a critic; the best
    checkpoint can be loaded [fails when the critic is built and left alone]"""
    policy = talker()
    n = sum(p.numel() for p in policy.parameters())
    t = ppo_trainer(tmp_path, policy, advantage_estimator='rloo', num_generations=2, save_strategy='steps',
                    save_steps=1, num_rollouts=2, eval_strategy='steps', eval_steps=1, load_best_model_at_end=True,
                    metric_for_best_model='objective/score',
                    trainer=dict(eval_dataset=trainer_module.Dataset.from_dict({'prompt': toy_prompts(4)})))
    t.train()
    assert t.model.critic is None and sum(p.numel() for p in t.model.parameters()) == n
    assert sum(p.numel() for g in t.optimizer.param_groups for p in g['params']) == n
    assert not (tmp_path/'checkpoint-1'/'critic').exists() and (tmp_path/'checkpoint-1'/'config.json').exists()
    assert not {k for l in t.state.log_history for k in l if k.startswith('val/') or k == 'loss/value'}
    assert (t.experience.values == 0).all()


def test_a_critic_beside_rloo_is_refused(tmp_path):
    "[fails when the value model is dropped without a word]"
    rm = reward_model_from(tiny(), toy_tokenizer())
    with pytest.raises(UserError, match='rloo has no critic: leave value_model out'):
        ppo_trainer(tmp_path, critic=rm, advantage_estimator='rloo', num_generations=2)


@pytest.mark.parametrize('kw, what', [
    (dict(advantage_estimator='rloo'), 'num_generations is 1'), (dict(num_generations=0), 'num_generations is 0'),
    (dict(advantage_estimator='gea'), 'advantage_estimator is gea: choose one of gae, rloo'),
    (dict(advantage_estimator='rloo', num_generations=2, share_trunk=True), 'share_trunk'),
    (dict(num_generations=3), 'rollout_batch_size 64 must be a multiple of num_generations × processes = 3'),
    (dict(kl_in='rewards'), 'kl_in is rewards: choose one of reward, loss'), (dict(gamma=2.), 'gamma is 2'),
    (dict(lam=-1.), 'lam'), (dict(cliprange=-1.), 'cliprange'), (dict(temperature=float('nan')), 'temperature'),
    (dict(kl_coef=float('nan')), 'kl_coef')])
def test_senseless_settings_are_refused(kw, what, tmp_path):
    "At construction, naming the field [fails when the row is taken out of `PPO_BOUNDS`]"
    with pytest.raises(UserError, match=what): PPOConfig(output_dir=str(tmp_path), use_cpu=True, **kw)


def test_gae_takes_any_number_of_completions(tmp_path):
    """Two completions of each prompt with a critic: as many prompts fewer, and the plan counts them [fails when
    `plan_steps` forgets `num_generations`]"""
    t = ppo_trainer(tmp_path, num_generations=2, num_rollouts=None, num_train_epochs=1)
    t.train()
    assert t.args.num_rollouts == 2 and t.state.global_step == 2
    s = t.experience.samples
    assert s.prompts[::2] == s.prompts[1::2] and len(set(s.prompts)) == 4


def test_a_new_estimator_is_a_function_and_a_row(tmp_path, monkeypatch):
    "Group mean, by name in the settings [fails when the settings know the shipped names only]"
    def group_mean(rewards, values, mask, num_generations, **_):
        total = rewards.sum(1)
        group = total.view(-1, num_generations)
        return over_tokens((group - group.mean(1, keepdim=True)).flatten(), mask), over_tokens(total, mask)
    monkeypatch.setitem(ADVANTAGES, 'group_mean', AdvantageEstimator(group_mean, critic=False, whiten=False))
    runs = [ppo_trainer(tmp_path, talker(), advantage_estimator=name, num_generations=2, learning_rate=0.)
            for name in ('group_mean', 'rloo')]
    for t in runs: t.train()
    a, b = (t.experience.advantages for t in runs)
    torch.testing.assert_close(2 * a, b, atol=1e-5, rtol=0)
    assert runs[0].model.critic is None and b.abs().max() > .1


# ---- checkpoints

@pytest.mark.parametrize('step', [2, 5])
@pytest.mark.parametrize('way', [dict(kl_in='loss', kl_estimator='k3'),
                                 dict(advantage_estimator='rloo', num_generations=2, kl_in='loss'),
                                 dict(advantage_estimator='rloo', num_generations=4)])
def test_resume_is_bitwise(way, step, tmp_path):
    """In the middle of the first and of the second rollout, with an adaptive price and a moving reference: the
    reference log-probs of the rollout are those it was made with [fails when the checkpoint leaves out the price, and
    when the reference is asked again]"""
    kw = dict(target_kl=None) | way
    whole = little_run(tmp_path/'a', **kw)
    again = little_run(tmp_path/'b', tmp_path/'a'/f'checkpoint-{step}', **kw)
    assert end_state(again) == end_state(whole)
    kept, index = load_experience(tmp_path/'a'/f'checkpoint-{step}'/'rollout-0.safetensors')
    assert index == step // 4 and kept.ref_logprobs.abs().sum() > 0 and (kept.kl_coef > 0) == ('kl_in' in way)


# ---- adapters that exist already

@pytest.fixture(scope='module')
def stage1(tmp_path_factory):
    "A base, a DPO adapter on disk, and a reward adapter on disk, all on the same base weights"
    from peft import get_peft_model
    folder, base, tok = tmp_path_factory.mktemp('stage1'), talker('llama'), toy_tokenizer()
    base.save_pretrained(folder/'base')
    def adapter(model, name, **kw):
        model = get_peft_model(model, lora(lora_dropout=0., **kw))
        with torch.no_grad():
            for k, p in model.named_parameters():
                if 'lora_B' in k: p.normal_(0, .1, generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(folder/name)
    adapter(copy.deepcopy(tiny('llama')), 'dpo', task_type='CAUSAL_LM')
    adapter(classifier_on(copy.deepcopy(tiny('llama')), tok), 'reward', task_type='SEQ_CLS', modules_to_save=['score'])
    return folder, base

def adapter_size(model): return sum(p.numel() for p in model.parameters() if p.requires_grad)

def test_an_adapter_from_disk_is_trained_further_on_one_copy_of_the_weights(stage1, tmp_path):
    """Policy and reference are DPO's adapter, critic and reward a reward adapter, all on the tensors of one base: KL 0
    at first, the reference says what the separately loaded DPO model says, the base has the same bytes after three
    rollouts [fails when `load_adapter` copies the base, when the critic copies it, and when it trains the reward
    model's own adapter]"""
    from peft import PeftModel
    folder, base = stage1
    tok, before, n = toy_tokenizer(), fingerprint(base), storages(base)
    policy, ref = load_adapter(base, folder/'dpo', trainable=True), load_adapter(base, folder/'dpo')
    reward = RewardModel(load_adapter(classifier_on(base, tok), folder/'reward'), tok)
    scores, size = reward(toy_prompts(3), [' cows.'] * 3).tolist(), adapter_size(policy)
    t = ppo_trainer(tmp_path, policy, ref, reward, reward=reward, num_rollouts=3, learning_rate=.2,
                    save_strategy='steps', save_steps=1)
    critic = adapter_size(t.model.critic)
    head = base.config.hidden_size
    assert storages(base, t.model, t.ref_model, reward.model) == n + 2 * size + 2 * critic + head
    frozen, adapter = fingerprint(t.ref_model), fingerprint(t.policy)
    t.train()
    assert fingerprint(base) == before and fingerprint(t.ref_model) == frozen == adapter != fingerprint(t.policy)
    assert reward(toy_prompts(3), [' cows.'] * 3).tolist() == scores
    kl = logged(t, 'objective/kl')
    assert kl[0] == 0 and abs(kl[2]) > 1e-3
    whole = AutoModelForCausalLM.from_pretrained(folder/'base')
    dpo, s = PeftModel.from_pretrained(whole, folder/'dpo').eval(), t.experience.samples
    with torch.no_grad():
        for i, (p, c) in enumerate(zip(s.prompt_ids, s.completion_ids)):
            assert torch.equal(row_logps(t.ref_model, p, c), row_logps_with_eos(dpo, p, c))
    assert (tmp_path/'checkpoint-3'/'adapter_config.json').exists()
    assert (tmp_path/'checkpoint-3'/'critic'/'adapter_config.json').exists()

def row_logps_with_eos(model, p, c):
    "`row_logps` with the steer of `talker`, which isn't saved with the weights"
    logits = model(torch.tensor([p + c])).logits[0]
    logits = logits + 3. * torch.nn.functional.one_hot(torch.tensor(1), logits.shape[-1])
    return torch.stack([torch.log_softmax(logits[len(p) - 1 + t], -1)[i] for t, i in enumerate(c)])


def test_a_loaded_adapter_resumes_bitwise(stage1, tmp_path):
    "One rollout, checkpoint, two more, equals three [fails when the critic's adapter isn't loaded]"
    folder, base = stage1
    tok = toy_tokenizer()
    def run(name, resume=None):
        reward = RewardModel(load_adapter(classifier_on(base, tok), folder/'reward'), tok)
        t = ppo_trainer(tmp_path/name, load_adapter(base, folder/'dpo', trainable=True),
                        load_adapter(base, folder/'dpo'), reward, reward=reward, num_rollouts=3, num_ppo_epochs=2,
                        learning_rate=.2, save_strategy='steps', save_steps=1, kl_in='loss')
        t.train(resume_from_checkpoint=resume)
        return t
    a = run('a')
    b = run('b', str(tmp_path/'a'/'checkpoint-3'))
    assert fingerprint(a.model) == fingerprint(b.model) and logged(a) == logged(b)


@pytest.mark.parametrize('start', ['nothing', 'reward model'])
def test_the_critic_of_an_adapted_policy_is_adapted(start, stage1, tmp_path):
    """Without a value model on the policy's own base weights, with one on those of the reward model; its first values
    are the reward model's [fails when the critic is a full copy, and when it stands on the adapted weights]"""
    folder, base = stage1
    tok = toy_tokenizer()
    policy = load_adapter(base, folder/'dpo', trainable=True)
    rm = None if start == 'nothing' else RewardModel(reward_model_from(tiny(seed=3), tok, seed=3), tok)
    critic = make_critic(rm, policy, tok, seed=5)
    n = storages(base, policy) + (storages(rm.model) if rm else base.config.hidden_size)
    assert storages(base, policy, critic, *([rm.model] if rm else [])) == n + adapter_size(critic)
    plain = rm.model if rm else reward_model_from(base, tok, seed=5)
    batch = collate([encode_prompt(tok, toy_prompts(1)[0])], [[21, 22, 1]], 0)
    from mpo_nb.actor_critic import token_values
    with torch.no_grad():
        torch.testing.assert_close(token_values(critic.eval(), batch), token_values(plain, batch), atol=1e-6, rtol=0)
    assert 0 < adapter_size(critic) < .7 * storages(base)
    t = ppo_trainer(tmp_path, policy, None, rm, num_rollouts=2, learning_rate=.2)
    t.train()
    assert logged(t, 'objective/kl')[0] == 0


def test_an_adapted_policy_without_a_critic(stage1, tmp_path):
    "rloo on an adapter: policy and reference, nothing else [fails when the critic is built]"
    folder, base = stage1
    policy = load_adapter(base, folder/'dpo', trainable=True)
    size = adapter_size(policy)
    t = ppo_trainer(tmp_path, policy, advantage_estimator='rloo', num_generations=2, num_rollouts=2, learning_rate=.2)
    assert storages(base, t.model, t.ref_model) == storages(base) + 2 * size
    t.train()
    assert logged(t, 'objective/kl')[0] == 0 and math.isfinite(logged(t, 'loss')[-1])


def test_a_folder_without_an_adapter_is_named(stage1):
    "[fails when the error is PEFT's, which looks for a model on the Hub]"
    folder, base = stage1
    with pytest.raises(UserError, match='holds no adapter'): load_adapter(base, folder/'base')


# ---- two processes

def test_two_processes_keep_groups_together(two):
    """Leave-one-out with the KL in the loss: all completions of a prompt are on one process, and the update of both is
    that of one process on all rows [fails when prompts are repeated before they are shared out]"""
    out, (a, b) = two
    parts = [load_experience(out/f'groups-{rank}.safetensors')[0] for rank in (0, 1)]
    for r in (a, b):
        p = r['groups']['prompts']
        assert len(p) == 8 and all(len(set(p[i:i + 4])) == 1 for i in (0, 4))
    assert not set(a['groups']['prompts']) & set(b['groups']['prompts'])
    model = ActorCritic(talker('llama'))
    total, n, start = {}, sum(int(e.mask.sum()) for e in parts), weights(model)
    for e in parts:
        mb = ppo.minibatch(e, range(len(e.samples)), 0)
        sums = ppo.ppo_losses(ppo.outputs_of(model, mb), mb, kl_estimator='k3')
        total = {k: total.get(k, 0) + v / n for k, v in sums.items()}
    (total['loss/policy'] + .3 * total['loss/kl']).backward()
    torch.optim.SGD(model.parameters(), lr=.1).step()
    done = torch.load(out/'groups.pt', weights_only=True)
    assert distance(weights(model), done) < 1e-5 and distance(start, done) > 1e-3
    assert a['groups']['weights'] == b['groups']['weights']


# --- a critic that learns first

def test_in_the_warm_up_only_the_critic_learns(tmp_path):
    "Then both do [fails when the policy's loss counts in the warm-up, and when the warm-up doesn't end]"
    seen = []
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            seen.append([weights(m) for m in (model.policy, model.critic)])
    t = ppo_trainer(tmp_path, num_rollouts=3, num_ppo_epochs=1, critic_warmup=2, learning_rate=1e-2,
                    trainer=dict(callbacks=[Look()]))
    start = [weights(m) for m in (t.policy, t.model.critic)]
    t.train()
    moved = [[any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(then, now)]
             for then, now in zip([start, *seen], seen)]
    assert moved == [[False, True], [False, True], [True, True]]


@pytest.mark.parametrize('kw', [dict(share_trunk=True), dict(advantage_estimator='rloo', num_generations=2)])
def test_a_warm_up_needs_a_critic_of_its_own(kw, tmp_path):
    with pytest.raises(UserError, match='critic_warmup is 2'): ppo_trainer(tmp_path, critic_warmup=2, **kw)
