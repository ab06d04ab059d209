"""The table of losses against TRL 1.16: value and gradient on the same random log-probs, then whole training runs.

Each docstring says in brackets which mutation of the code makes the test fail."""
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mpo_nb.core import UserError
from mpo_nb.dpo import DPOConfig
from mpo_nb.logprobs import gather_logprobs
from mpo_nb.losses import (
    DIVERGENCES, dpo_loss, length_desensitized, loss_options, LOSSES, Objective, PairLogps, wpo_weights
)
from util import distance, dpo_trainer, logged, tiny, toy_pairs, toy_tokenizer, weights

pytestmark = pytest.mark.usefixtures('own_random_state')

B, P, T, V = 6, 2, 7, 11   # pairs, tokens of every prompt, of the longest answer, of the vocabulary


def random_tokens(dtype, spread, seed=0):
    "Logits, log-probs under policy (a leaf) and reference, and mask of random answers, chosen above rejected: [2B, T]"
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (2 * B,), generator=g)
    lengths[0] = T
    mask, ids = torch.arange(T) < lengths[:, None], torch.randint(0, V, (2 * B, T), generator=g)
    logits = [spread * torch.randn(2 * B, T, V, dtype=dtype, generator=g) for _ in range(2)]
    policy, ref = (gather_logprobs(x, ids, mask) for x in logits)
    return logits[0], policy.requires_grad_(), ref, mask


class Says(torch.nn.Module):
    "A model that has said all it will say"
    is_gradient_checkpointing = False
    def __init__(self, logps, logits):
        super().__init__()
        zeros = torch.zeros(2 * B, P + T - 1, dtype=logps.dtype)
        behind = lambda x: torch.cat([zeros[:, :P - 1], x], 1)   # the first token of all isn't predicted
        self.out = SimpleNamespace(log_probs=behind(logps), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
                                   log_sum_sq_probs=behind(logits.softmax(-1).square().sum(-1).log()))
    def forward(self, **kw): return self.out


def by_trl(logits, policy, ref, mask, loss_type, loss_weights=None, beta=.1, label_smoothing=0., discopop_tau=.05,
           f_divergence_type='reverse_kl', f_alpha_divergence_coef=.5, ld_alpha=None, use_weighting=False):
    "The loss that TRL's own trainer computes from these log-probs, without a model"
    from trl import DPOTrainer as TRLTrainer
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    same = lambda x: x
    trainer = SimpleNamespace(
        model=Says(policy, logits), ref_model=Says(ref, logits), aux_loss_enabled=False, precompute_ref_logps=False,
        accelerator=SimpleNamespace(device='cpu', gather=same, gather_for_metrics=same), loss_types=names,
        loss_weights=loss_weights or [1.] * len(names), beta=beta, label_smoothing=label_smoothing, ld_alpha=ld_alpha,
        f_divergence_type=f_divergence_type, f_alpha_divergence_coef=f_alpha_divergence_coef, _tp_size=1,
        use_weighting=use_weighting, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        args=SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None))
    completion = torch.cat([torch.zeros(2 * B, P, dtype=torch.bool), mask], 1).long()
    inputs = dict(input_ids=torch.ones_like(completion), attention_mask=torch.ones_like(completion),
                  completion_mask=completion)
    return TRLTrainer._compute_loss(trainer, trainer.model, inputs, False)


def by_us(logits, policy, ref, mask, ld_alpha=None, use_weighting=False, **options):
    lengths = mask.sum(1).chunk(2)
    shared = torch.minimum(*lengths).repeat(2)
    sums = [length_desensitized(x, shared, 1. if ld_alpha is None else ld_alpha).chunk(2) for x in (policy, ref)]
    factors = torch.mul(*wpo_weights(logits, policy, mask).chunk(2)) if use_weighting else None
    p = PairLogps(*sums[0], *sums[1], lengths, factors, policy.sum(1).chunk(2)[0])
    return Objective(**options)(p).mean()


SMOOTH = dict(label_smoothing=.1)
ONE = [dict(loss_type=k, **(SMOOTH if k == 'exo_pair' else {})) for k in LOSSES]
SMOOTHED = [dict(loss_type=k, **SMOOTH) for k in ('robust', 'aot', 'aot_unpaired')]
DIVERGED = [dict(loss_type=k, f_divergence_type=d, **(SMOOTH if k == 'exo_pair' else {}))
            for k, d in [*zip(('sigmoid', 'sigmoid_norm', 'hinge', 'ipo'), ['forward_kl'] * 4),
                         *zip(('sigmoid', 'exo_pair', 'robust', 'discopop', 'sft'), ['js_divergence'] * 5),
                         *zip(('sigmoid', 'ipo', 'sigmoid_norm'), ['alpha_divergence'] * 3)]]
ALPHAS = [dict(loss_type='sigmoid', f_divergence_type='alpha_divergence', f_alpha_divergence_coef=a)
          for a in (0., .9, 1., 2.)]
INSIDE = ([dict(loss_type=k, ld_alpha=a) for k, a in (('sigmoid', .3), ('sigmoid', 0.), ('sigmoid', 1.), ('ipo', .5),
                                                      ('bco_pair', .5), ('sft', .3), ('aot', .5))]
          + [dict(loss_type=k, use_weighting=True) for k in ('sigmoid', 'ipo', 'apo_down', 'discopop')]
          + [dict(loss_type=['sigmoid', 'sft'], loss_weights=[1., .5], ld_alpha=.5),
             dict(loss_type=['sigmoid', 'ipo'], ld_alpha=.5, use_weighting=True)])
SEVERAL = [dict(loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[.8, .2, 1.]),
           dict(loss_type=['robust', 'apo_zero'], label_smoothing=.2),
           dict(loss_type=['ipo', 'aot_unpaired', 'discopop'], loss_weights=[.01, -.5, 2.], discopop_tau=.2)]
CASES = ONE + SMOOTHED + DIVERGED + ALPHAS + INSIDE + SEVERAL


@pytest.mark.parametrize('beta', [.1, 1.])
@pytest.mark.parametrize('case', CASES, ids=lambda c: ' '.join(f'{k}={v}' for k, v in c.items()))
def test_value_and_gradient_are_trls(case, beta):
    """To 1e-6 relative, in float64; alpha_divergence in float32 to its rounding, since TRL knows no other [fails for
    each row when its function or its view is changed, and when a weight, the smoothing, alpha or ld_alpha doesn't
    arrive]"""
    exact = case.get('f_divergence_type') != 'alpha_divergence'
    dtype, rtol = (torch.float64, 1e-6) if exact else (torch.float32, 5e-6)
    tensors = random_tokens(dtype, spread=.7)
    ours, theirs = by_us(*tensors, beta=beta, **case), by_trl(*tensors, beta=beta, **case)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)
    # at padding nothing is computed, and no gradient goes further
    a, b = (torch.autograd.grad(x, tensors[1])[0][tensors[3]] for x in (ours, theirs))
    assert b.abs().max() > 1e-4
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def test_every_loss_of_trl_is_a_row():
    "[fails when a row is missing, and when TRL has got one more]"
    from trl import DPOConfig as TRLConfig
    said = TRLConfig.__dataclass_fields__['loss_type'].metadata['help']
    assert set(LOSSES) == set(re.findall(r"`'(\w+)'`", said))
    kinds = TRLConfig.__dataclass_fields__['f_divergence_type'].metadata['help'].split('The other')[0]
    assert set(DIVERGENCES) == set(re.findall(r'`(\w+_(?:kl|divergence))`', kinds))


@pytest.mark.parametrize('alpha', [.25, 2.])
def test_rpo_alpha_is_the_mix_with_sft(alpha):
    "TRL took `rpo_alpha` out and names this mix in its place [fails when the weight is ignored]"
    tensors = random_tokens(torch.float64, .7)
    theirs = by_trl(*tensors, ['sigmoid', 'sft'], [1., alpha])
    torch.testing.assert_close(by_us(*tensors, rpo_alpha=alpha), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_losses_stay_finite_far_out(name):
    "Margins of a million, in fp32 [fails for discopop when the gate is multiplied with the exponential]"
    far = torch.tensor([-1e6, 1e6, 0.], requires_grad=True)
    options = SMOOTH if name == 'exo_pair' else {}
    losses, *_ = dpo_loss(far, -far, torch.zeros(3), torch.zeros(3), 1., name, lengths=(torch.ones(3),) * 2, **options)
    losses.sum().backward()
    assert losses.isfinite().all() and far.grad.isfinite().all()


@pytest.mark.parametrize('kind', DIVERGENCES)
def test_divergences_stay_finite_far_out(kind):
    "Log-ratios of a thousand nats, on both sides of a pair [fails when the exponent isn't bounded]"
    far = torch.tensor([-1e3, 1e3, 0.], requires_grad=True)
    losses, *_ = dpo_loss(far, far.detach() + 1, torch.zeros(3), torch.zeros(3), .1, f_divergence_type=kind)
    losses.sum().backward()
    assert losses.isfinite().all() and far.grad.isfinite().all()


@pytest.mark.parametrize('wrong, says', [
    (dict(loss_type='kto'), 'unknown'), (dict(loss_type=[]), 'empty'), (dict(loss_type=['sigmoid', 'orpo']), 'orpo'),
    (dict(loss_weights=[1., 2.]), 'one for each'), (dict(loss_weights=[float('nan')]), 'finite'),
    (dict(rpo_alpha=float('inf')), 'finite'), (dict(loss_type='exo_pair'), 'above 0'),
    (dict(loss_type='bco_pair', label_smoothing=.1), 'no meaning'), (dict(discopop_tau=.1), 'no meaning'),
    (dict(loss_type='discopop', discopop_tau=0.), 'positive'), (dict(f_alpha_divergence_coef=.2), 'no meaning'),
    (dict(f_divergence_type='kl'), 'unknown'), (dict(loss_type='nca_pair', f_divergence_type='forward_kl'), 'knows no'),
    (dict(ld_alpha=1.5), r'\[0, 1\]'), (dict(loss_type='aot', use_weighting=True), 'aot sorts')],
    ids=lambda x: ' '.join(map(str, x.items())) if isinstance(x, dict) else '')
def test_what_would_be_ignored_is_refused(wrong, says, tmp_path):
    "When the settings are written, not in the first step [fails when the check is left out]"
    with pytest.raises(UserError, match=says): DPOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_several_losses_can_be_given_on_the_command_line(tmp_path):
    "As by TRL's scripts [fails when the annotation is one that argparse can't read]"
    from transformers import HfArgumentParser
    args, = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(
        ['--output_dir', str(tmp_path), '--use_cpu', '--loss_type', 'sigmoid', 'sft', '--loss_weights', '1', '.5'])
    assert args.objective().terms() == [('sigmoid', 1.), ('sft', .5)]


# ---- in the trainer

def three_steps_by_trl(folder, args):
    from trl import DPOConfig as TRLConfig, DPOTrainer as TRLTrainer
    from mpo_nb.sampling import seeded
    from mpo_nb.training import quiet, trainer_defaults
    with quiet(), seeded(0):
        t = TRLTrainer(tiny(seed=1), tiny(seed=2), TRLConfig(**trainer_defaults(output_dir=str(folder), **args)),
                       train_dataset=toy_pairs(), processing_class=toy_tokenizer())
        t.train()
    return t

@pytest.mark.parametrize('options', [
    dict(loss_type=['exo_pair', 'apo_zero', 'discopop'], loss_weights=[.5, 1., 2.], label_smoothing=.1),
    dict(loss_type=['sigmoid', 'sft'], ld_alpha=.3), dict(use_weighting=True), dict(f_divergence_type='js_divergence')],
    ids=lambda o: ' '.join(o))
def test_three_steps_are_trls(options, tmp_path):
    """Same model, reference and 8 pairs: losses, and weights at the end [fails when the reference is summed without
    `ld_alpha`, when WPO's weights are left out, and when an option doesn't reach the objective]"""
    args = dict(max_steps=3, per_device_train_batch_size=8, learning_rate=.2, lr_scheduler_type='constant', optim='sgd',
                max_grad_norm=0., logging_steps=1, beta=.2, max_length=None) | options
    theirs = three_steps_by_trl(tmp_path/'trl', args)
    ours = dpo_trainer(tmp_path/'ours', tiny(seed=1), tiny(seed=2), **args)
    ours.train()
    assert distance(weights(tiny(seed=1)), weights(theirs.model)) > 1e-3
    assert logged(ours, 'loss') == pytest.approx(logged(theirs, 'loss'), rel=1e-4)
    assert distance(weights(ours.model), weights(theirs.model)) < 2e-5
