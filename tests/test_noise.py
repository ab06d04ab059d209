"19_noise: what probability a gap stands for, and how many labels are wrong."
import numpy as np
import pytest

from mpo_nb.core import UserError
from mpo_nb.noise import (
    calibration, expected_calibration_error, fit_temperature, gap_threshold, noise_bound, noise_rate,
    wrong_probability
)


def test_temperature_is_that_of_the_labels():
    """Labels drawn with sigmoid(gap / 2.5) give that temperature, calibrated confidences, and a bound that holds
    the rate [fails when the gap is multiplied by T]"""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 3, 20000))
    gaps = np.where(rng.random(len(size)) < 1/(1 + np.exp(-size/2.5)), size, -size)
    T = fit_temperature(gaps)
    assert T == pytest.approx(2.5, rel=.05)
    assert expected_calibration_error(calibration(gaps, T)) < .015 < .1 < expected_calibration_error(calibration(gaps))
    b = noise_bound(gaps, [f'{i // 2}' for i in range(len(gaps))], n_boot=50)
    assert b['ci'][0] < np.mean(gaps < 0) < b['ci'][1] and b['ci'][0] < b['bound'] < b['ci'][1]


def test_gap_threshold_is_where_a_label_is_wrong_so_often():
    assert gap_threshold(.1, 2.) == pytest.approx(2*np.log(9))
    for p in (0, .5, 1): pytest.raises(UserError, gap_threshold, p)


def test_temperature_needs_both_signs():
    with pytest.raises(UserError, match='both signs'): fit_temperature([1., 2.])


def test_noise_bound_resamples_prompts():
    """Nine copies of every pair under its prompt are no new evidence: the interval stays as wide [fails when
    rows are resampled: a third as wide]"""
    gaps = np.random.default_rng(0).normal(.7, 1.5, 400)
    width = lambda g, p: np.subtract(*noise_bound(g, p, n_boot=100)['ci'][::-1])
    prompts = [f'p{i}' for i in range(len(gaps))]
    assert width(np.repeat(gaps, 9), list(np.repeat(prompts, 9))) == pytest.approx(width(gaps, prompts), rel=.2)


def test_a_tie_agrees_by_half():
    "A reward model that scores everything alike claims one half and gets it [fails when a tie counts as disagreement]"
    assert expected_calibration_error(calibration(np.zeros(40), bins=4)) == 0


def drawn(n, slope, spread, second, seed=0, per_prompt=2):
    """Gaps, prompts, second labels and truth from the very model that is fitted: d ~ Normal(slope x, spread),
    labels ~ sigmoid(d)"""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1.5, n)
    d = slope*x + spread*rng.normal(size=n)
    labels = np.where(rng.random((2, n)) < 1/(1 + np.exp(-d)), 1, -1)
    again = [bool(s) if i < second else None for i, s in enumerate(labels[0] == labels[1])]
    return x*labels[0], [f'p{i // per_prompt}' for i in range(n)], again, d*labels[0] < 0


@pytest.mark.parametrize('slope, spread', [(1., 1.), (.5, 2.), (.1, 1.5)])
def test_noise_rate_holds_the_truth(slope, spread):
    """Also where the gaps say little (last row) [fails when the likelihood of two labels is that of one, or when
    they count as drawn apart from d]"""
    gaps, prompts, again, wrong = drawn(3000, slope, spread, 600)
    t = noise_rate(gaps, prompts, again, n_boot=40)
    assert t.loc['all', 'lo'] < wrong.mean() < t.loc['all', 'hi'] and t.loc['all', 'hi'] - t.loc['all', 'lo'] < .12
    assert t.loc['all', 'rate'] == pytest.approx(wrong.mean(), abs=.03)
    once = noise_rate(gaps, prompts, n_boot=10).loc['all']
    assert (once['lo'] == 0 and np.isnan(once['rate']) and wrong.mean() < once['hi']
            and t.loc['all', 'hi'] < once['hi'] + .02)


def test_noise_by_bins():
    gaps, prompts, again, wrong = drawn(6000, 1., 1., 1500)
    edges = (-np.inf, -1, 0, 1, np.inf)
    t = noise_rate(gaps, prompts, again, bins=edges, n_boot=30)
    for (lo, hi), name in zip(zip(edges[:-1], edges[1:]), t.index[1:]):
        i = (gaps > lo) & (gaps <= hi)
        assert t.loc[name, 'n'] == i.sum() and t.loc[name, 'lo'] - .01 < wrong[i].mean() < t.loc[name, 'hi'] + .01
    assert t['n'].iloc[1:].sum() == t.loc['all', 'n'] == 6000


def test_wrong_probability_by_simulation():
    "The share of d < 0 among draws that gave these labels"
    rng = np.random.default_rng(0)
    d = .8*1.2 + 1.5*rng.normal(size=400000)
    p = 1/(1 + np.exp(-d))
    first, second = rng.random((2, len(d))) < p
    for seen, i in enumerate((first, first & second, first & ~second)):
        assert wrong_probability([1.2], .8, np.log(1.5), [seen])[0] == pytest.approx(np.mean(d[i] < 0), abs=.005)


@pytest.mark.parametrize('again', [[True], [2]*20, [.5]*20])
def test_second_labels_are_checked(again):
    with pytest.raises(UserError, match='second labels: give 20'):
        noise_rate(np.linspace(-1, 2, 20), list('abcdefghijklmnopqrst'), again)


def test_noise_bound_of_few_contradictions():
    "One contradicted pair in 40: some bootstrap samples hold none [fails when those are fitted like the others]"
    gaps = np.r_[np.linspace(.1, 2, 39), -.3]
    b = noise_bound(gaps, [f'p{i}' for i in range(40)])
    assert 0 <= b['ci'][0] <= b['bound'] <= b['ci'][1] < .5
    with pytest.raises(UserError, match='both signs'): noise_bound(gaps[:-1], [f'p{i}' for i in range(39)])
