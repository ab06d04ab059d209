"""DPO: reported defects of other implementations (numbered as in the project's list of known defects) that ours
must not have, and parity with TRL 1.16.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy
import json
import logging
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, MistralConfig, TrainerCallback

from forks import run_on_two
from mpo_nb.core import UserError
from mpo_nb.dpo import DPOConfig
from mpo_nb.losses import dpo_loss
from mpo_nb.pairs import collate_pairs, plain_logps, shared_logps, single_logps
from util import (
    KINDS, AtTheEnd, TableLM, distance, dpo_trainer, end_state, fingerprint, in_a_new_process, logged, tiny,
    toy_pairs, toy_tokenizer, weights
)
from test_pairs import PASSES, by_hand, chat_rows, chat_tokenizer, encoded

pytestmark = pytest.mark.usefixtures('own_random_state')

# ---- the loss

def loss_gradient(loss_type, smoothing=0.):
    "Loss and its derivative by the margin (before beta) at margin 6, beta .1"
    chosen = torch.tensor([-4.], dtype=torch.float64, requires_grad=True)
    losses, *_ = dpo_loss(chosen, torch.tensor([-9.]).double(), torch.tensor([-7.]).double(),
                          torch.tensor([-6.]).double(), .1, loss_type, smoothing)
    losses.sum().backward()
    return losses.item(), chosen.grad.item()

@pytest.mark.parametrize('loss_type, smoothing, loss, gradient', [('sigmoid', 0, .437488, -.035434),
                             ('sigmoid', .1, .497488, None), ('robust', .1, .362488, None), ('hinge', 0, .4, -.1)])
def test_item41_losses_at_margin_six(loss_type, smoothing, loss, gradient):
    "The numbers of the list [fails when `loss_type` is ignored, and when `label_smoothing` is]"
    got = loss_gradient(loss_type, smoothing)
    assert got[0] == pytest.approx(loss, abs=1e-6) and (gradient is None or got[1] == pytest.approx(gradient, abs=1e-6))


def plain_loss(pc, pr, rc, rr, beta, kind, e, n, m):
    "One pair, by the formulas of the papers"
    sigmoid, h = lambda x: 1 / (1 + math.exp(-x)), beta * ((pc - rc) - (pr - rr))
    return {'sigmoid': lambda: -(1 - e) * math.log(sigmoid(h)) - e * math.log(sigmoid(-h)),
            'robust': lambda: (-(1 - e) * math.log(sigmoid(h)) + e * math.log(sigmoid(-h))) / (1 - 2 * e),
            'hinge': lambda: max(0., 1 - h),
            'ipo': lambda: ((pc - rc) / n - (pr - rr) / m - 1 / (2 * beta)) ** 2}[kind]()

@pytest.mark.parametrize('kind, e', [('sigmoid', 0.), ('sigmoid', .2), ('robust', .2), ('hinge', 0.), ('ipo', 0.)])
def test_losses_equal_plain_loops(kind, e):
    """Float64, to 1e-10, with the implicit rewards, which carry no gradient [fails when the rewards leave out
    beta, and when IPO divides by one length]"""
    g = torch.Generator().manual_seed(2)
    x = [(-20 * torch.rand(50, dtype=torch.float64, generator=g)).requires_grad_() for _ in range(4)]
    n, m = torch.randint(1, 20, (2, 50), generator=g)
    for beta in (.05, 1.):
        losses, chosen, rejected = dpo_loss(*x, beta, kind, e, (n, m))
        rows = list(zip(*(v.tolist() for v in (*x, n, m))))
        assert losses.tolist() == pytest.approx([plain_loss(*r[:4], beta, kind, e, *r[4:]) for r in rows], abs=1e-10)
        assert chosen.tolist() == pytest.approx([beta * (r[0] - r[2]) for r in rows],
                                                abs=1e-10) and not chosen.requires_grad
        assert rejected.tolist() == pytest.approx([beta * (r[1] - r[3]) for r in rows],
                                                  abs=1e-10) and not rejected.requires_grad


def test_loss_stays_finite_at_large_margins():
    "[fails when log(sigmoid(x)) is written out]"
    x, zero = torch.tensor([-1e4, 1e4], requires_grad=True), torch.zeros(2)
    losses, *_ = dpo_loss(x, zero, zero, zero, 1., 'sigmoid', .1)
    losses.sum().backward()
    assert losses.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize('bad', [dict(loss_type='kto'), dict(loss_type='hinge', label_smoothing=.1),
                                 dict(loss_type='ipo', label_smoothing=.1), dict(label_smoothing=.5),
                                 dict(label_smoothing=-.1), dict(beta=0.), dict(beta=float('nan'))])
def test_item41_unsupported_combinations_raise(bad, tmp_path):
    "[fails when the objective isn't checked]"
    with pytest.raises(UserError): DPOConfig(output_dir=str(tmp_path), use_cpu=True, **bad)


def test_item45_chosen_falls_only_if_the_model_wants_it():
    "The loss pulls chosen up and rejected down; both rewards are logged apart [fails when the two are swapped]"
    pc, pr = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    for kind in ('sigmoid', 'hinge', 'robust', 'ipo'):
        g = torch.autograd.grad(dpo_loss(pc, pr, torch.zeros(3), torch.zeros(3), .1, kind, 0.,
                                         (torch.ones(3), torch.ones(3)))[0].sum(), (pc, pr))
        assert (g[0] < 0).all() and (g[1] > 0).all()


def test_item45_rewards_are_logged_apart(tmp_path):
    """After a few steps: rewards, margin, accuracy, log-probs by hand [fails when the margin has the other sign,
    and when the log-probs are swapped]"""
    policy = tiny()
    t = dpo_trainer(tmp_path, policy, max_steps=3)
    rows, ref = encoded(), copy.deepcopy(policy)
    states = []
    t.add_callback(type('Keep', (TrainerCallback,), {'on_step_begin': lambda self, args, state, control, model=None,
                                                     **kw: states.append(copy.deepcopy(model))})())
    t.train()
    with torch.no_grad(): (pc, pr), (rc, rr) = by_hand(states[2], rows), by_hand(ref, rows)
    want = {'rewards/chosen': .1 * (pc - rc).mean(), 'rewards/rejected': .1 * (pr - rr).mean(),
            'rewards/margins': .1 * (pc - rc - pr + rr).mean(),
            'rewards/accuracies': (pc - rc > pr - rr).float().mean(), 'logps/chosen': pc.mean(),
            'logps/rejected': pr.mean(), 'loss': -torch.nn.functional.logsigmoid(.1 * (pc - rc - pr + rr)).mean()}
    assert {k: logged(t, k)[2] for k in want} == pytest.approx({k: v.item() for k, v in want.items()}, abs=1e-4)


# ---- log-probs of pairs

def test_item40_sums_for_dpo_means_for_ipo():
    """A model of constant log-prob per token: twice the tokens, twice the log-prob; the IPO loss stays [fails
    when the log-probs are averaged]"""
    model = TableLM(vocab=50)
    model.table.data.zero_()
    rows = [dict(prompt_ids=[3], chosen_ids=[4] * n, rejected_ids=[5] * 2 * n) for n in (2, 4)]
    chosen, rejected = plain_logps(model, collate_pairs(rows, 0))
    assert (chosen.tolist() == pytest.approx([-2 * math.log(50), -4 * math.log(50)])
            and rejected.tolist() == pytest.approx((2 * chosen).tolist()))
    lengths = torch.tensor([2, 4]), torch.tensor([4, 8])
    losses, *_ = dpo_loss(chosen, rejected, chosen / 2, rejected / 4, .1, 'ipo', lengths=lengths)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert losses[0].item() == pytest.approx((-math.log(50) / 2 + math.log(50) * .75 - 5) ** 2, abs=1e-4)


# ---- before the first update

@pytest.mark.parametrize('share', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_item42_first_loss_is_ln_2(kind, share, tmp_path):
    """Policy == reference, all dropouts .1 in the config: loss ln 2, rewards 0 [fails when `disable_dropout`
    isn't called, and on all but gpt2 when it skips the rate that the attention keeps as a number]"""
    t = dpo_trainer(tmp_path, tiny(kind, dropout=.1), share_prefix=share, per_device_train_batch_size=3,
                    gradient_accumulation_steps=3)
    assert t.shares_prefix == share
    t.train()
    assert logged(t, 'loss')[0] == pytest.approx(math.log(2), abs=1e-6)
    for k in ('chosen', 'rejected', 'margins'): assert logged(t, f'rewards/{k}')[0] == pytest.approx(0, abs=1e-5)


def test_item42_first_loss_is_ln_2_on_a_sliding_window(tmp_path):
    """A model that looks back 8 tokens, the first pairs short and later ones long: the choice of forward pass
    holds for all [fails when only the first pairs are probed]"""
    config = dict(vocab_size=132, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=24, max_position_embeddings=96, initializer_range=.3)
    policy = AutoModelForCausalLM.from_config(MistralConfig(sliding_window=8, **config)).eval()
    long = toy_pairs(4)
    short = Dataset.from_dict(dict(prompt=['\n\nHuman:'] * 4, chosen=[' cats', ' dogs', ' meow', ' eat'],
                                   rejected=[' salt', ' mice', ' cats', ' dogs']))
    pairs = Dataset.from_list(list(short) + list(long))
    t = dpo_trainer(tmp_path, policy, pairs=pairs)
    rows = encoded(pairs)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(t.train_dataset['ref_chosen']).float(), by_hand(policy, rows)[0],
                                   atol=1e-4, rtol=0)
    t.train()
    assert logged(t, 'loss')[0] == pytest.approx(math.log(2), abs=1e-6)


def test_item42_a_reference_that_cannot_share_decides_for_both(tmp_path):
    """A full-attention policy with a sliding-window reference: its log-probs are right all the same [fails when
    only the policy is probed]"""
    config = dict(vocab_size=132, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=24, max_position_embeddings=96, initializer_range=.3)
    ref, pairs = AutoModelForCausalLM.from_config(MistralConfig(sliding_window=8, **config)).eval(), toy_pairs(8)
    t = dpo_trainer(tmp_path, tiny(), ref, pairs=pairs)
    with torch.no_grad(): chosen, rejected = by_hand(ref, encoded(pairs))
    assert (t.train_dataset['ref_chosen'] == pytest.approx(chosen.tolist(), abs=1e-4)
            and t.train_dataset['ref_rejected'] == pytest.approx(rejected.tolist(), abs=1e-4))


@pytest.mark.parametrize('forward', PASSES)
def test_item42_reference_and_policy_run_in_the_same_precision(forward, tmp_path, monkeypatch):
    """bf16 autocast: the reference pass runs in bf16 as training does, and the first loss is ln 2 all the same
    [fails when only the training forward is under autocast]"""
    kinds, policy = [], tiny()
    policy.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda mod, a, out: kinds.append((mod.training, out.dtype)))
    monkeypatch.setattr('mpo_nb.dpo.fastest_way', lambda *a: forward)   # its check runs in fp32
    t = dpo_trainer(tmp_path, policy, bf16=True)
    made = list(kinds)
    t.train()
    assert kinds[-1] == (True, torch.bfloat16) and made and all(k == (False, torch.bfloat16) for k in made)
    assert logged(t, 'loss')[0] == pytest.approx(math.log(2), abs=1e-6)


def test_null_update(tmp_path):
    """lr = 0: three steps in shuffled batches of other widths change no weight and no loss [fails when
    `position_ids` are left out]"""
    t = dpo_trainer(tmp_path, tiny('gpt2'), max_steps=6, learning_rate=0., per_device_train_batch_size=3)
    before = fingerprint(t.model)
    t.train()
    assert fingerprint(t.model) == before and logged(t, 'loss') == pytest.approx([math.log(2)] * 6, abs=1e-6)


# ---- tokens and lengths

def test_item38_a_row_that_does_not_fit_leaves_no_trace(tmp_path, caplog):
    """A prompt as long as `max_length`: counted in the log, and the same run as without the row; nothing left:
    an error [fails when the row is kept with an empty completion]"""
    pairs = toy_pairs(6)
    long = dict(prompt=' cats' * 90, chosen=' meow', rejected=' woof')
    with caplog.at_level(logging.INFO, 'mpo_nb'):
        with_row = dpo_trainer(tmp_path, pairs=Dataset.from_list([long, *pairs]), max_length=90)
    assert '1 of 7' in caplog.text and len(with_row.train_dataset) == 6
    without = dpo_trainer(tmp_path, pairs=pairs, max_length=90)
    for t in (with_row, without): t.train()
    assert logged(with_row) == logged(without) and distance(weights(with_row.model), weights(without.model)) == 0
    with pytest.raises(UserError, match='max_length'):
        dpo_trainer(tmp_path, pairs=Dataset.from_list([long]), max_length=90)


def test_item46_equal_completions(tmp_path):
    """chosen == rejected: loss ln 2, no gradient, a tie and not a win, at the start and after training [fails
    when ties count as losses]"""
    for share in (True, False):
        policy = tiny('gpt2')
        equal = Dataset.from_list([dict(r, rejected=r['chosen']) for r in toy_pairs()])
        t = dpo_trainer(tmp_path, policy, pairs=equal, share_prefix=share, max_steps=2, learning_rate=1.)
        before = weights(policy)
        t.train()
        assert logged(t, 'loss') == pytest.approx([math.log(2)] * 2, abs=1e-6)
        assert distance(before, weights(policy)) < 1e-5
        moved = dpo_trainer(tmp_path, tiny('gpt2', seed=1), ref=policy, pairs=equal, share_prefix=share,
                            learning_rate=0.)
        moved.train()
        assert abs(logged(moved, 'rewards/chosen')[0]) > .001
        assert logged(t, 'rewards/accuracies') == [.5, .5] and logged(moved, 'rewards/accuracies') == [.5]


# ---- optimisation

SPLITS = (8, 1), (4, 2), (2, 4), (3, 3)

@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    "The same step on 8 pairs of unequal length, in micro-batches of 8, 4, 2 and 3 + 3 + 2"
    runs = {}
    for size, steps in SPLITS:
        t = runs[size] = dpo_trainer(tmp_path_factory.mktemp('split'), tiny(seed=1), ref=tiny(seed=2),
                                     per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                                     learning_rate=.5, max_steps=2)
        t.start = weights(t.model)
        t.train()
    return runs

@pytest.mark.parametrize('size', [s for s, _ in SPLITS])
def test_item43_accumulation_gives_the_same_weights(size, splits):
    "8x1, 4x2, 2x4, 3+3+2: same weights, loss and gradient norm [fails when the loss is the mean of the micro-batch]"
    t, reference = splits[size], splits[8]
    assert distance(reference.start, weights(reference.model)) > 1e-2
    assert distance(weights(t.model), weights(reference.model)) < 2e-6
    for key in ('loss', 'grad_norm'): assert logged(t, key) == pytest.approx(logged(reference, key), abs=1e-4)


@pytest.mark.parametrize('size', [s for s, _ in SPLITS])
def test_item43_logged_rewards_do_not_depend_on_the_split(size, splits):
    "3+3+2 too [fails when micro-batches of unequal size are averaged with equal weight]"
    for key in ('rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies', 'logps/chosen',
                'logps/rejected'):
        assert logged(splits[size], key) == pytest.approx(logged(splits[8], key), abs=1e-4), key


@pytest.mark.parametrize('size', [3, 8])
def test_item10_evaluation_does_not_depend_on_its_batch_size(size, tmp_path):
    "Loss, rewards, accuracy of 8 pairs by hand [fails when the last, smaller batch weighs as much as the others]"
    policy, ref, rows = tiny(seed=1), tiny(seed=2), encoded()
    t = dpo_trainer(tmp_path, policy, ref, trainer=dict(eval_dataset=toy_pairs()), per_device_eval_batch_size=size)
    got = t.evaluate()
    with torch.no_grad(): (pc, pr), (rc, rr) = by_hand(policy, rows), by_hand(ref, rows)
    want = {'loss': -torch.nn.functional.logsigmoid(.1 * (pc - rc - pr + rr)), 'rewards/chosen': .1 * (pc - rc),
            'rewards/rejected': .1 * (pr - rr), 'rewards/accuracies': (pc - rc > pr - rr).float(), 'logps/chosen': pc}
    assert {k: got.get(f'eval_{k}', logged(t, f'eval_{k}')[-1])
            for k in want} == pytest.approx({k: v.mean().item() for k, v in want.items()}, abs=1e-4)


def test_item22_cdpo_step_equals_plain_loops(tmp_path):
    """Label smoothing .2, two SGD steps: the weights of a float64 loop over single rows, to 1e-5 [fails when the
    smoothing is ignored]"""
    policy, ref, rows = tiny('gpt2', seed=1), tiny('gpt2', seed=2), encoded()
    model, reference = copy.deepcopy(policy).double(), copy.deepcopy(ref).double()
    t = dpo_trainer(tmp_path, policy, ref, max_steps=2, learning_rate=.5, label_smoothing=.2, beta=.3,
                    per_device_train_batch_size=3, gradient_accumulation_steps=3)
    t.train()
    start, opt = weights(model), torch.optim.SGD(model.parameters(), lr=.5)
    with torch.no_grad(): rc, rr = by_hand(reference, rows)
    for _ in range(2):
        pc, pr = by_hand(model, rows)
        h = .3 * (pc - rc - pr + rr)
        loss = (.8 * torch.log1p((-h).exp()) + .2 * torch.log1p(h.exp())).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert distance(start, weights(model)) > 1e-2
    assert distance({k: v.double() for k, v in weights(policy).items()}, weights(model)) < 1e-5


def test_item23_the_gradient_norm_is_clipped(tmp_path):
    "SGD, lr 1, norm 1e-3: the weights move by 1e-3 [fails when the config drops `max_grad_norm`]"
    policy = tiny(seed=1)
    before = {k: v.detach().clone() for k, v in policy.named_parameters()}
    t = dpo_trainer(tmp_path, policy, ref=tiny(seed=2), max_grad_norm=1e-3, learning_rate=1.,
                    per_device_train_batch_size=4, gradient_accumulation_steps=2)
    t.train()
    moved = math.sqrt(sum(float((p.detach() - before[k]).double().square().sum())
                          for k, p in policy.named_parameters()))
    assert .99e-3 < moved <= 1e-3 * (1 + 1e-4) and logged(t, 'grad_norm')[0] > .1


@pytest.mark.parametrize('n', [1, 3, 5])
def test_item24_every_pair_is_used_however_few(n, tmp_path):
    """1, 3 or 5 pairs in batches of 4: each is seen once an epoch, the policy changes [fails when the last batch
    is dropped]"""
    t = dpo_trainer(tmp_path, pairs=toy_pairs(n), per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2)
    before, seen, loss = weights(t.model), [], t.compute_loss
    t.compute_loss = lambda model, inputs, *a, **kw: (
        seen.extend(ids[m].tolist() for ids, m in zip(inputs['chosen_ids'], inputs['chosen_mask'])),
        loss(model, inputs, *a, **kw))[1]
    t.train()
    assert (sorted(seen) == sorted(2 * [r['chosen_ids'] for r in encoded(toy_pairs(n))])
            and t.state.global_step == 2 * math.ceil(n / 4))
    assert distance(before, weights(t.model)) > 1e-4


def test_item25_the_learning_rate_follows_the_updates(tmp_path):
    "Linear schedule, 4 steps of 2 micro-batches: 0 is reached after the last [fails when micro-batches are counted]"
    rates = []
    note = type('Rates', (TrainerCallback,), {'on_pre_optimizer_step': lambda self, args, state, control,
                                              optimizer=None, **kw: rates.append(optimizer.param_groups[0]['lr'])})()
    t = dpo_trainer(tmp_path, lr_scheduler_type='linear', learning_rate=.04, per_device_train_batch_size=1,
                    gradient_accumulation_steps=2, max_steps=4, trainer=dict(callbacks=[note]))
    t.train()
    assert rates == pytest.approx([.04, .03, .02, .01]) and set(t.lr_scheduler.get_last_lr()) == {0}


# ---- parity with TRL

@pytest.fixture(scope='module')
def trl_runs(tmp_path_factory):
    "Three SGD steps on all 8 pairs by TRL's trainer, by loss and number of micro-batches"
    from trl import DPOConfig as TRLConfig, DPOTrainer as TRLTrainer
    from mpo_nb.sampling import seeded
    from mpo_nb.training import quiet, trainer_defaults
    runs = {}
    def run(loss_type, steps=1):
        if (loss_type, steps) not in runs:
            args = TRLConfig(**trainer_defaults(output_dir=str(tmp_path_factory.mktemp('trl')),
                                                max_steps=3, per_device_train_batch_size=8 // steps,
                                                gradient_accumulation_steps=steps, learning_rate=.2,
                                                lr_scheduler_type='constant', optim='sgd', max_grad_norm=0.,
                                                logging_steps=1, label_smoothing=.1 if loss_type == 'robust' else 0.,
                                                loss_type=[loss_type],
                                                beta=.2, max_length=None))
            with quiet(), seeded(0):
                t = TRLTrainer(tiny('llama', seed=1), tiny('llama', seed=2), args, train_dataset=toy_pairs(),
                               processing_class=toy_tokenizer())
                t.train()
            runs[loss_type, steps] = t
        return runs[loss_type, steps]
    return run

@pytest.mark.parametrize('share', [True, False])
@pytest.mark.parametrize('loss_type', ['sigmoid', 'ipo', 'hinge', 'robust'])
def test_parity_with_trl(loss_type, share, trl_runs, tmp_path):
    """Loss, rewards, margins, log-probs and weights of three steps in fp32 [fails when beta is fixed, when IPO
    sums, and when the flipped term of robust has the other sign]"""
    theirs = trl_runs(loss_type)
    ours = dpo_trainer(tmp_path, tiny('llama', seed=1), tiny('llama', seed=2), max_steps=3, learning_rate=.2, beta=.2,
                       loss_type=loss_type, label_smoothing=.1 if loss_type == 'robust' else 0., share_prefix=share)
    ours.train()
    assert distance(weights(tiny('llama', seed=1)), weights(theirs.model)) > 1e-2
    assert distance(weights(ours.model), weights(theirs.model)) < 2e-5
    assert logged(ours, 'loss') == pytest.approx(logged(theirs, 'loss'), rel=1e-4)
    for key in ('rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies', 'logps/chosen',
                'logps/rejected'):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), abs=1e-3, rel=1e-3), key


class FirstGradient(TrainerCallback):
    "Keeps the gradients of the first step"
    def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
        if state.global_step == 0: self.grads = {k: p.grad.detach().clone() for k, p in model.named_parameters()}

def ten_steps_by_trl(folder, kind, args):
    from trl import DPOConfig as TRLConfig, DPOTrainer as TRLTrainer
    from mpo_nb.sampling import seeded
    from mpo_nb.training import quiet, trainer_defaults
    with quiet(), seeded(0):
        t = TRLTrainer(tiny(kind, seed=1), tiny(kind, seed=2), TRLConfig(**trainer_defaults(output_dir=str(folder),
                               max_length=None, **args | dict(loss_type=[args['loss_type']]))),
                       train_dataset=toy_pairs(), processing_class=toy_tokenizer(), callbacks=[FirstGradient()])
        t.train()
    return t

def first_gradient(t): return next(c for c in t.callback_handler.callbacks if isinstance(c, FirstGradient)).grads

@pytest.mark.parametrize('kind, loss_type', [*((k, 'sigmoid') for k in KINDS),
                                             *(('qwen2', l) for l in ('ipo', 'hinge', 'robust'))])
def test_parity_with_trl_on_five_architectures(kind, loss_type, tmp_path):
    """Same 8 pairs in one batch, policy and reference apart: loss, rewards and gradients of the first step to
    1e-5 (relative), weights after ten steps to 1e-5, in fp32. (Losses are functions of log-probs, so one architecture
    shows them all. TRL has no cDPO: its `sigmoid` ignores label_smoothing; ours is held against float64 loops above.)
    [fails when beta is fixed, when IPO sums, when rejected tokens see chosen
    ones, and on gpt2 when the rejected completion's positions go on behind the chosen one]"""
    args = dict(loss_type=loss_type, label_smoothing=.1 if loss_type == 'robust' else 0., beta=.2, max_steps=10,
                learning_rate=.01, per_device_train_batch_size=8, lr_scheduler_type='constant', optim='sgd',
                max_grad_norm=0., logging_steps=1)
    ours, theirs = dpo_trainer(tmp_path/'ours', tiny(kind, seed=1), tiny(kind, seed=2),
                               trainer=dict(callbacks=[FirstGradient()]),
                               **args), ten_steps_by_trl(tmp_path/'trl', kind, args)
    ours.train()
    assert ours.shares_prefix
    for key in ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/margins', 'logps/chosen', 'logps/rejected'):
        assert logged(ours, key)[0] == pytest.approx(logged(theirs, key)[0], rel=1e-5, abs=2e-5), key
    a, b = first_gradient(ours), first_gradient(theirs)
    assert distance(a, b) < 1e-5 * max(float(g.abs().max()) for g in b.values())
    assert distance(weights(tiny(kind, seed=1)), weights(theirs.model)) > 2e-3
    assert distance(weights(ours.model), weights(theirs.model)) < 1e-5


@pytest.mark.parametrize('steps', [2, 4])
def test_item43_trl_accumulates_alike(steps, trl_runs, tmp_path):
    """TRL's trainer in 2 or 4 micro-batches ends where ours does in one [fails when our loss is the mean of the
    micro-batch]"""
    ours = dpo_trainer(tmp_path, tiny('llama', seed=1), tiny('llama', seed=2), max_steps=3, learning_rate=.2, beta=.2,
                       per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)
    ours.train()
    theirs = trl_runs('sigmoid', steps)
    assert (distance(weights(ours.model), weights(theirs.model)) < 2e-5
            and logged(ours, 'loss') == pytest.approx(logged(theirs, 'loss'), abs=1e-4))


# ---- the reference

def test_item44_the_reference_is_computed_before_training(tmp_path):
    """Kept log-probs are those of the model at the start, for training and evaluation data, also after ten steps
    and with dropout configured [fails when `all_logps` returns its rows sorted by length]"""
    policy = tiny('gpt2', dropout=.1).train()
    initial, test = copy.deepcopy(policy).eval(), toy_pairs(5, seed=7)
    t = dpo_trainer(tmp_path, policy, max_steps=10, learning_rate=.5, trainer=dict(eval_dataset=test))
    t.train()
    for ds, pairs in ((t.train_dataset, toy_pairs()), (t.eval_dataset, test)):
        with torch.no_grad(): chosen, rejected = by_hand(initial, encoded(pairs))
        assert (ds['ref_chosen'] == pytest.approx(chosen.tolist(), abs=5e-5)
                and ds['ref_rejected'] == pytest.approx(rejected.tolist(), abs=5e-5))
    with torch.no_grad(): (pc, pr), (rc, rr) = by_hand(policy.eval(), encoded(test)), by_hand(initial, encoded(test))
    margin = .1 * (pc - rc - pr + rr)
    assert margin.abs().max() > .05
    assert t.evaluate()['eval_loss'] == pytest.approx(-torch.nn.functional.logsigmoid(margin).mean().item(), abs=1e-5)


def test_item44_data_that_come_after_training_are_refused_or_right(tmp_path):
    """A new evaluation set after training: the initial reference or a clear error, never the trained policy as
    reference [fails when `evaluate` takes any data: the collator's KeyError isn't clear]"""
    t = dpo_trainer(tmp_path, max_steps=3, learning_rate=.5)
    initial, test = tiny(), toy_pairs(5, seed=7)
    t.train()
    try: loss = t.evaluate(test)['eval_loss']
    except UserError: return
    with torch.no_grad(): (pc, pr), (rc, rr) = by_hand(t.model.eval(), encoded(test)), by_hand(initial, encoded(test))
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(.1 * (pc - rc - pr + rr)).mean().item(), abs=1e-5)


def test_item31_another_reference_is_really_used(tmp_path):
    """A reference with negated output layer: its log-probs by hand, and a first loss that isn't ln 2 [fails when
    the policy stands in for the reference]"""
    policy, ref = tiny('qwen2'), tiny('qwen2', tie_word_embeddings=False)
    ref.get_output_embeddings().weight.data.neg_()
    t = dpo_trainer(tmp_path, policy, ref)
    with torch.no_grad(): chosen, rejected = by_hand(ref, encoded())
    assert (t.train_dataset['ref_chosen'] == pytest.approx(chosen.tolist(), abs=5e-5)
            and t.train_dataset['ref_rejected'] == pytest.approx(rejected.tolist(), abs=5e-5))
    t.train()
    assert abs(logged(t, 'loss')[0] - math.log(2)) > .01


def test_item34_the_reference_is_only_read(tmp_path):
    """Handed over in train mode with dropout: evaluated without, mode and bytes as they were, not in the
    optimizer; the policy itself is refused [fails when the reference pass doesn't use `inference`]"""
    policy, ref = tiny('gpt2'), tiny('gpt2', seed=2, dropout=.3).train()
    before, expected = fingerprint(ref), by_hand(copy.deepcopy(ref).eval(), encoded())[0]
    t = dpo_trainer(tmp_path, policy, ref, max_steps=3)
    start = fingerprint(policy)
    t.train()
    assert fingerprint(ref) == before and ref.training and all(p.grad is None for p in ref.parameters())
    assert t.train_dataset['ref_chosen'] == pytest.approx(expected.tolist(), abs=5e-5)
    assert fingerprint(policy) != start
    assert {id(p) for g in t.optimizer.param_groups for p in g['params']} == {id(p) for p in policy.parameters()}
    with pytest.raises(UserError, match='ref_model'): dpo_trainer(tmp_path, policy, policy)


def test_item34_a_reference_that_shares_weights_is_a_snapshot(tmp_path):
    """Its log-probs are read before the first step, so it can't move with the policy [fails when the reference
    is read in `compute_loss`]"""
    policy = tiny(tie_word_embeddings=False)
    ref, snapshot = copy.copy(policy), copy.deepcopy(policy)
    shared, copied = (dpo_trainer(tmp_path, p, r, max_steps=3, learning_rate=.5)
                      for p, r in ((policy, ref), (copy.deepcopy(policy), snapshot)))
    for t in (shared, copied): t.train()
    assert distance(weights(ref), weights(policy)) == 0 and distance(weights(policy), weights(snapshot)) > 1e-2
    assert logged(shared) == logged(copied)


# ---- adapters

def lora(**kw):
    from peft import LoraConfig
    return LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM', **kw)

def with_trained_adapter(scale=.5, **kw):
    "A model whose adapter has been trained: its second matrix isn't zero"
    from peft import get_peft_model
    model = get_peft_model(tiny(**kw), lora())
    g = torch.Generator().manual_seed(3)
    for k, p in model.named_parameters():
        if 'lora_B' in k: p.data.normal_(0, scale, generator=g)
    return model.eval()

def of_adapter(model): return {k: p.detach().clone() for k, p in model.named_parameters() if 'lora_' in k}
def of_base(model): return {k: p.detach().clone() for k, p in model.named_parameters() if 'lora_' not in k}
def trained(model): return {k: p.requires_grad for k, p in model.named_parameters()}


@pytest.mark.parametrize('init', [True, 'gaussian', False])
def test_item32_reference_of_a_new_adapter_is_the_model_without_it(init, tmp_path):
    """`peft_config`: the reference is the base model, also with an adapter that starts away from zero (init
    False); only the adapter is trained [fails when the reference pass leaves the adapter on: with False]"""
    policy, rows = tiny(), encoded()
    with torch.no_grad(): chosen, rejected = by_hand(policy, rows)
    t = dpo_trainer(tmp_path, policy, max_steps=3, learning_rate=.5,
                    trainer=dict(peft_config=lora(init_lora_weights=init)))
    base, adapter = of_base(t.model), of_adapter(t.model)
    assert (t.shares_prefix and t.train_dataset['ref_chosen'] == pytest.approx(chosen.tolist(), abs=5e-5)
            and t.train_dataset['ref_rejected'] == pytest.approx(rejected.tolist(), abs=5e-5))
    t.train()
    assert distance(base, of_base(t.model)) == 0 and distance(adapter, of_adapter(t.model)) > 1e-3
    first = logged(t, 'loss')[0]
    assert abs(first - math.log(2)) > 1e-3 if init is False else first == pytest.approx(math.log(2), abs=1e-6)
    with t.model.disable_adapter(), torch.no_grad():
        assert torch.stack(by_hand(t.model, rows))[0].tolist() == pytest.approx(chosen.tolist(), abs=5e-5)


def test_item32_reference_of_a_trained_adapter_is_that_adapter(tmp_path):
    """A model that comes with a trained adapter: KL 0 at the start, reference = base + that adapter and not the
    bare base, equal to the merged model's; unchanged after five updates [fails when the reference pass
    switches every adapter off]"""
    policy, rows = with_trained_adapter(), encoded()
    merged = copy.deepcopy(policy).merge_and_unload()
    with torch.no_grad(): (chosen, rejected), bare = by_hand(merged, rows), by_hand(tiny(), rows)[0]
    t = dpo_trainer(tmp_path, policy, max_steps=5, learning_rate=.5)
    before = t.train_dataset['ref_chosen'][:]
    assert (before == pytest.approx(chosen.tolist(), abs=1e-4)
            and t.train_dataset['ref_rejected'] == pytest.approx(rejected.tolist(), abs=1e-4))
    assert (chosen - bare).abs().max() > .1
    t.train()
    assert (logged(t, 'kl')[0] == pytest.approx(0, abs=1e-6)
            and logged(t, 'loss')[0] == pytest.approx(math.log(2), abs=1e-6))
    assert t.train_dataset['ref_chosen'][:] == before and abs(logged(t, 'kl')[-1]) > 1e-3


@pytest.mark.parametrize('how', ['new', 'trained'])
def test_item33_what_is_trained_stays_trained(how, tmp_path):
    """`requires_grad` as before the reference pass; every trained weight is in the optimizer, and moves [fails
    when the adapter is left frozen; peft 0.21 itself no longer flips them, `without_adapter` guards against
    versions that do]"""
    start = with_trained_adapter() if how == 'trained' else tiny()
    t = dpo_trainer(tmp_path, start, max_steps=1, learning_rate=.5,
                    trainer=dict(peft_config=None if how == 'trained' else lora()))
    assert {k for k, g in trained(t.model).items() if g} == {k for k in trained(t.model) if 'lora_' in k}
    before = of_adapter(t.model)
    t.train()
    assert {id(p) for g in t.optimizer.param_groups
            for p in g['params']} == {id(p) for p in t.model.parameters() if p.requires_grad}
    after = of_adapter(t.model)
    assert all(float((after[k] - before[k]).abs().max()) > 0 for k in after if 'lora_B' in k)


def test_item33_nothing_to_train_is_said(tmp_path):
    "An adapter loaded for inference [fails when the check is left out: an empty optimizer]"
    policy = with_trained_adapter()
    for p in policy.parameters(): p.requires_grad_(False)
    with pytest.raises(UserError, match='is_trainable'): dpo_trainer(tmp_path, policy)


def test_item34_two_claims_to_the_reference_raise(tmp_path):
    "peft_config with ref_model, or on a model that has an adapter [fails when one of them is silently ignored]"
    with pytest.raises(UserError, match='ref_model and peft_config'):
        dpo_trainer(tmp_path, tiny(), tiny(seed=1), trainer=dict(peft_config=lora()))
    with pytest.raises(UserError, match='adapter already'):
        dpo_trainer(tmp_path, with_trained_adapter(), trainer=dict(peft_config=lora()))


def test_item26_an_adapter_checkpoint_is_an_adapter(tmp_path):
    "Loaded onto the base model it gives the trained policy [fails when the base is saved in its place]"
    from peft import PeftModel
    t = dpo_trainer(tmp_path, tiny(), max_steps=2, learning_rate=.5, save_strategy='steps', save_steps=2,
                    trainer=dict(peft_config=lora()))
    t.train()
    again = PeftModel.from_pretrained(tiny(), tmp_path/'checkpoint-2').eval()
    with torch.no_grad():
        assert (by_hand(again, encoded())[0].tolist()
                == pytest.approx(by_hand(t.model.eval(), encoded())[0].tolist(), abs=1e-5))


# ---- chat messages

def test_chat_messages_train_like_their_text(tmp_path):
    "Messages and the same dialogue as text: same ids, same run [fails when the generation prompt is left out]"
    tok, ds = chat_tokenizer('qwen'), chat_rows()
    render = lambda m, **kw: tok.apply_chat_template(m, tokenize=False, **kw)
    text = Dataset.from_list([dict(prompt=(p := render(r['prompt'], add_generation_prompt=True)),
                                   **{k: render(r['prompt'] + r[k])[len(p):].removesuffix('<|im_end|>\n')
                                      for k in ('chosen', 'rejected')}) for r in ds])
    runs = [dpo_trainer(tmp_path, tiny(vocab=len(tok), max_position_embeddings=256), pairs=pairs, tok=tok,
                        max_steps=2) for pairs in (ds, text)]
    for t in runs: t.train()
    assert logged(runs[0]) == logged(runs[1]) and logged(runs[0], 'loss')[0] == pytest.approx(math.log(2), abs=1e-6)


# ---- the cache of reference log-probs

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache, and the number of pairs that have been computed rather than read"
    import mpo_nb.dpo
    computed, real = [], mpo_nb.dpo.all_logps
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(mpo_nb.dpo, 'all_logps',
                        lambda model, pairs, *a: (computed.append(len(pairs)), real(model, pairs, *a))[1])
    return tmp_path/'cache', computed

def refs(t): return [t.train_dataset[f'ref_{k}'][:] for k in ('chosen', 'rejected')]

def test_item44_a_cache_hit_gives_equal_numbers(cache, tmp_path):
    """The second trainer on the same model and data computes nothing, its numbers are the very same, and so is
    its run; off, nothing is written [fails when the file is never read]"""
    folder, computed = cache
    runs = [dpo_trainer(tmp_path, tiny(), trainer=dict(eval_dataset=toy_pairs(5, seed=7)), cache_reference=c,
                        max_steps=2) for c in (True, True, False)]
    assert computed == [8, 5, 8, 5] and len(list(folder.iterdir())) == 2
    assert refs(runs[0]) == refs(runs[1]) == refs(runs[2])
    for t in runs: t.train()
    assert logged(runs[0]) == logged(runs[1]) == logged(runs[2])


def other_word(tok):
    "The same tokenizer with two words exchanged"
    t = json.loads(tok.backend_tokenizer.to_str())
    v = t['model']['vocab']
    a, b = [w for w in v if w.strip().isalpha()][10:12]
    v[a], v[b] = v[b], v[a]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(t)), pad_token=tok.pad_token,
                                   eos_token=tok.eos_token)

def test_item44_the_cache_key_holds_all_that_matters(cache, tmp_path):
    """Other weights, one bit of them, pairs, order, tokenizer, max_length, max_prompt_length, configuration,
    precision, adapter: a miss each time [fails when any of weights, ids, configuration or adapter is left out
    of the key]"""
    folder, computed = cache
    def nudged():
        m = tiny()
        m.model.norm.weight.data[0] *= 1 + 2**-20
        return m
    make = lambda *a, trainer=(), **kw: dpo_trainer(tmp_path, *a, cache_reference=True, trainer=dict(trainer), **kw)
    pairs, lengths = toy_pairs(), sorted(len(r['prompt_ids']) + max(len(r['chosen_ids']), len(r['rejected_ids']))
                                         for r in encoded())
    first = make()
    others = [lambda: make(tiny(seed=1)), lambda: make(nudged()), lambda: make(pairs=pairs.select(range(7))),
              lambda: make(pairs=pairs.select(range(7, -1, -1))), lambda: make(tok=other_word(toy_tokenizer())),
              lambda: make(max_length=lengths[-1] - 1), lambda: make(max_prompt_length=4),
              lambda: make(tiny(rms_norm_eps=1e-2)), lambda: make(bf16=True), lambda: make(share_prefix=False),
              lambda: make(with_trained_adapter()), lambda: make(with_trained_adapter(scale=.4)),
              lambda: make(tiny(), trainer=dict(peft_config=lora(init_lora_weights=False)))]
    for i, other in enumerate(others):
        other()
        assert len(computed) == i + 2, f'number {i} was read from the cache of another'
    assert len(list(folder.iterdir())) == len(others) + 1
    assert refs(make()) == refs(first) and len(computed) == len(others) + 1


def test_item44_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    "[fails when the error isn't caught]"
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path/'file'/'cache'))
    with caplog.at_level(logging.WARNING, 'mpo_nb'): t = dpo_trainer(tmp_path/'run', cache_reference=True)
    assert 'could not be kept' in caplog.text and len(refs(t)[0]) == 8


# ---- batches by length

@pytest.mark.parametrize('strategy', ['random', 'sequential'])
def test_other_orders_are_still_there(strategy, tmp_path):
    "[fails when the configured strategy is ignored]"
    t = dpo_trainer(tmp_path, train_sampling_strategy=strategy)
    assert type(t._get_train_sampler()).__name__ == f'{strategy.title()}Sampler'


# ---- models that can't do all of it

def mamba():
    from transformers import MambaConfig
    return AutoModelForCausalLM.from_config(MambaConfig(vocab_size=132, hidden_size=16, state_size=4,
                                                        num_hidden_layers=2, initializer_range=.3)).eval()
def window():
    config = dict(vocab_size=132, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=24, max_position_embeddings=96, initializer_range=.3)
    return AutoModelForCausalLM.from_config(MistralConfig(sliding_window=8, **config)).eval()
def softcap():
    from transformers import Gemma2Config
    return AutoModelForCausalLM.from_config(
        Gemma2Config(vocab_size=132, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, intermediate_size=24, initializer_range=.3,
                     final_logit_softcapping=2., max_position_embeddings=96, attn_implementation='eager')).eval()

@pytest.mark.parametrize('make, way', [(mamba, single_logps), (window, single_logps), (softcap, plain_logps),
                                       (tiny, shared_logps)])
def test_models_get_the_fastest_way_that_holds(make, way, tmp_path, caplog):
    """State space, sliding window, logits capped behind the head: another way, said once, and the log-probs of
    single rows by hand [fails when the ways aren't compared with the plain one]"""
    model = make()
    with caplog.at_level(logging.WARNING, 'mpo_nb'): t = dpo_trainer(tmp_path, model)
    assert t.forward_pass is way
    assert caplog.text.count('cannot share a prompt') == (way is not shared_logps)
    with torch.no_grad(): chosen, rejected = by_hand(model, encoded())
    assert (t.train_dataset['ref_chosen'] == pytest.approx(chosen.tolist(), abs=1e-3)
            and t.train_dataset['ref_rejected'] == pytest.approx(rejected.tolist(), abs=1e-3))
    t.train()
    assert logged(t, 'loss')[0] == pytest.approx(math.log(2), abs=1e-6)


def test_encoder_decoders_are_refused(tmp_path):
    "[fails with an error of the model's forward]"
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=132, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match='encoder-decoder'): dpo_trainer(tmp_path, t5)


# ---- several processes

def shared_run(folder, size):
    "Four AdamW steps of 8 pairs each, `size` pairs a process, with an evaluation at the end"
    t = dpo_trainer(folder, tiny(seed=1), ref=tiny(seed=2), pairs=toy_pairs(24), per_device_train_batch_size=size,
                    max_steps=4, optim='adamw_torch', learning_rate=1e-2, max_grad_norm=1.,
                    ddp_find_unused_parameters=False, trainer=dict(eval_dataset=toy_pairs(8, seed=7)))
    t.train()
    t.evaluate()
    return t

def test_two_processes_end_where_one_does(tmp_path):
    """Two CPU processes (gloo), 4 pairs each, against one with 8: weights, losses,
    rewards and reference log-probs, to 1e-5 [fails when the loss isn't multiplied by the number of processes,
    and when each process has its own order of the data]"""
    one = shared_run(tmp_path/'one', 8)
    code = ('import conftest, sys, torch\n'
            'from test_dpo import shared_run, logged, weights\n'
            't = shared_run(sys.argv[1], 4)\n'
            'assert t.accelerator.num_processes == 2 and '
            'type(t.model_wrapped).__name__ == "DistributedDataParallel"\n'
            'if t.is_world_process_zero(): torch.save((weights(t.model), '
            'logged(t), t.train_dataset["ref_chosen"][:]), sys.argv[2])\n'
            'torch.distributed.barrier(); torch.distributed.destroy_process_group()\n'
            'import os; os._exit(0)\n')   # a thread of gloo may outlive the interpreter and abort
    for p in run_on_two(code, tmp_path/'two', tmp_path/'out.pt'): assert p.returncode == 0, p.stderr[-3000:]
    theirs, log, ref = torch.load(tmp_path/'out.pt', weights_only=True)
    assert distance(weights(tiny(seed=1)), weights(one.model)) > 1e-2
    assert distance(weights(one.model), theirs) < 1e-5
    assert one.train_dataset['ref_chosen'][:] == pytest.approx(ref, abs=1e-5)
    for a, b in zip(logged(one), log): assert a == pytest.approx(b, abs=1e-4)
    assert len(log) == len(logged(one)) >= 5


# ---- seeds, graphs, checkpoints

def rng_state(): return random.getstate(), [str(x) for x in np.random.get_state()], torch.get_rng_state().tolist()

def test_item27_runs_depend_on_their_seed_alone(tmp_path):
    """Same seed, same run, whatever the global generators say; another seed, another order; building a trainer
    leaves them as they were [fails when the order of the data comes from the global seed]"""
    logs = []
    for seed, world in ((1, 10), (1, 11), (2, 10)):
        torch.manual_seed(world), np.random.seed(world), random.seed(world)
        before = rng_state()
        t = dpo_trainer(tmp_path, tiny(seed=1), ref=tiny(seed=2), per_device_train_batch_size=2, max_steps=4, seed=seed)
        assert rng_state() == before
        t.train()
        logs.append(logged(t))
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_item29_logs_are_floats_and_hold_no_graph(tmp_path):
    "[fails when metrics are kept as tensors]"
    t = dpo_trainer(tmp_path, max_steps=3, logging_steps=100, trainer=dict(eval_dataset=toy_pairs()))
    t.train()
    assert not any(isinstance(v, torch.Tensor) for vs in t.metrics_seen.seen['train'].values() for v in vs)
    t.evaluate()
    assert all(type(v) in (int, float) for l in t.state.log_history for v in l.values())


def little_run(folder, resume=None):
    "Six steps in two shuffled epochs, with a checkpoint after each"
    t = dpo_trainer(folder, tiny(seed=1), ref=tiny(seed=2), per_device_train_batch_size=3, max_steps=6,
                    optim='adamw_torch', learning_rate=1e-2, lr_scheduler_type='linear', max_grad_norm=1.,
                    save_strategy='steps', save_steps=1, seed=5, trainer=dict(callbacks=[AtTheEnd()]))
    t.train(resume_from_checkpoint=resume and str(resume))
    return t

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "A run that was never stopped: (folder, its final state, trainer)"
    folder = tmp_path_factory.mktemp('straight')
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    t = little_run(folder)
    return folder, end_state(t), t

@pytest.mark.parametrize('step', [1, 3, 4])
def test_item26_resume_is_bitwise(step, straight, tmp_path):
    """In the first epoch, between two, in the second: weights, Adam, scheduler, random states, logs [fails when
    the order of the data comes from the global seed]"""
    folder, end, _ = straight
    assert end_state(little_run(tmp_path, folder/f'checkpoint-{step}')) == end


def test_item26_resume_is_bitwise_in_a_new_process(straight, tmp_path):
    """Another process with other random states, in the middle of the first epoch [fails when the order of the
    data comes from the global seed]"""
    folder, end, _ = straight
    assert in_a_new_process('test_dpo', tmp_path, folder/'checkpoint-2') == json.loads(json.dumps(end))


def test_item26_a_checkpoint_is_a_policy(straight):
    "`from_pretrained` finds every weight and no other [fails when a wrapper is saved]"
    folder, _, t = straight
    model, info = AutoModelForCausalLM.from_pretrained(folder/'checkpoint-6', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    assert distance(weights(model), weights(t.model)) == 0
