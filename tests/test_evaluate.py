"""Evaluation and frontier: what the notebooks don't show. Bad tables, exact KL by enumeration, settings,
escaping, plots."""
import itertools
import json

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from scipy import stats

from mpo_nb.compare import compare_scores
from mpo_nb.core import UserError
from mpo_nb.evaluate import (
    OTHER_COLORS, POLICY_COLORS, across_seeds, add_scores, distinct_n, evaluate_policies, kl_to_ref, mean_ci, paired,
    paired_difference, plot_scores, policy_colors, side_by_side, summarize, summary_table
)
from mpo_nb.frontier import (
    best_of_n, best_of_n_means, checkpoint_policies, fit_frontier, frontier_table, plot_frontier, plot_gold_proxy,
    stepwise_kl
)
from mpo_nb.logprobs import collate, completion_logits, encode_prompt
from mpo_nb.sampling import Samples, sample
from mpo_nb.worlds import get_world


def table(seed=0, n=40, policies=('sft', 'dpo', 'mpo')):
    "An evaluation table of made-up numbers; later policies are better"
    rng = np.random.default_rng(seed)
    rows = [dict(prompt_id=i, prompt=f'question {i}', policy=p, completion=f'{p} answers {i}',
                 score=rng.normal(k) , kl=rng.normal(k, .3), length=int(rng.integers(5, 30)),
                 ended=bool(rng.random() < .8)) for k, p in enumerate(policies) for i in range(n)]
    return pd.DataFrame(rows)


# ---- pairing: by prompt_id, complete, no doubles

def test_pairing_is_by_prompt_id_not_by_row():
    df = table()
    shuffled = pd.concat([g.sample(frac=1, random_state=i)
                          for i, (_, g) in enumerate(df.groupby('policy', sort=False))])
    assert str(compare_scores(shuffled)) == str(compare_scores(df))
    assert paired_difference(shuffled, 'mpo', 'sft') == paired_difference(df, 'mpo', 'sft')


BAD = {
    'missing': (lambda df: df.drop(index=45), "policy 'dpo': prompt_id 5 is missing"),
    'duplicate': (lambda df: pd.concat([df, df.iloc[[45]]]), "policy 'dpo': prompt_id 5 occurs more than once"),
    'nan': (lambda df: df.assign(score=df.score.where(df.index != 45)),
            "policy 'dpo': prompt_id 5 has a score that is not finite"),
    'inf': (lambda df: df.assign(score=df.score.where(df.index != 45, np.inf)),
            "policy 'dpo': prompt_id 5 has a score that is not finite"),
    'other prompt': (lambda df: df.assign(prompt=df.prompt.where(df.index != 45, 'another')),
                     "policy 'dpo': prompt_id 5 is another prompt"),
    'no column': (lambda df: df.drop(columns='score'), "no column 'score'"),
}


@pytest.mark.parametrize('case', BAD)
@pytest.mark.parametrize('use', [compare_scores, summarize, lambda df: paired_difference(df, 'dpo', 'sft'),
                                 plot_scores, plot_frontier, side_by_side])
def test_bad_tables_name_policy_and_prompt(case, use):
    spoil, message = BAD[case]
    with pytest.raises(UserError, match=message): use(spoil(table()))


def test_unknown_policy_and_too_few_values():
    with pytest.raises(UserError, match="no policy 'ppo'.*sft, dpo, mpo"): paired_difference(table(), 'ppo', 'sft')
    with pytest.raises(UserError, match="no policy 'ppo'"): side_by_side(table(), policies=['ppo'])
    with pytest.raises(UserError, match="no prompt_id 99"): side_by_side(table(), prompt_ids=[99])
    with pytest.raises(UserError, match='at least two'): mean_ci([1.])
    with pytest.raises(UserError, match='finite'): mean_ci([1., np.nan])


# ---- differences

def test_paired_difference_is_scipys():
    df = table()
    wide = paired(df)
    d, t = paired_difference(df, 'mpo', 'sft'), stats.ttest_rel(wide['mpo'], wide['sft'])
    assert d['ci'] == pytest.approx(list(t.confidence_interval()))
    assert d['n'] == 40 and d['diff'] / d['se'] == pytest.approx(t.statistic)


def test_across_seeds_pairs_by_seed():
    a, b = {0: 1., 1: 5., 2: 9.}, {2: 8., 0: .1, 1: 4.2}
    s = across_seeds(a, b)
    assert s == across_seeds([1., 5., 9.], [.1, 4.2, 8.])
    assert s['ci'] == pytest.approx(list(stats.ttest_rel([1., 5., 9.], [.1, 4.2, 8.]).confidence_interval()))
    with pytest.raises(UserError, match=r'seeds \[2\]'): across_seeds({0: 1., 1: 1.}, {0: 1., 1: 1., 2: 1.})
    with pytest.raises(UserError, match='3 runs of one method and 2'): across_seeds([1, 2, 3], [1, 2])
    with pytest.raises(UserError, match='both'): across_seeds({0: 1.}, [1.])


# ---- summary

def test_distinct_n():
    assert np.isnan(distinct_n('')) and np.isnan(distinct_n([]))
    assert distinct_n(['x y', 'x y']) == .5
    df = table(policies=('a', 'b'))
    df.loc[df.policy == 'b', 'completion'] = 'go on go on go on'   # 5 bigrams, 2 different
    t = summary_table(df)
    assert t.repetition.tolist() == pytest.approx([0, .6])
    assert t.distinct_2['b'] == pytest.approx(2/200)


def test_summary_numbers():
    df = table()
    s, g = summarize(df), df[df.policy == 'dpo']
    assert list(s) == ['sft', 'dpo', 'mpo']
    assert s['dpo'] == pytest.approx(dict(score=g.score.mean(), score_se=stats.sem(g.score), kl_to_sft=g.kl.mean(),
                                          length=g.length.mean(), eos_rate=g.ended.mean()))
    json.dumps(s, allow_nan=False)


def test_unknown_kl_is_null_in_json():
    df = table()
    df.loc[df.policy == 'dpo', 'kl'] = np.nan
    s = summarize(df)
    assert s['dpo']['kl_to_sft'] is None and s['mpo']['kl_to_sft'] is not None
    json.dumps(s, allow_nan=False)


# ---- evaluate_policies on a tiny model

@pytest.fixture(scope='module')
def tiny():
    world = get_world('toy', topics=2, harmful=1)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                attn_implementation='eager')
    (ref, tok), (policy, _) = world.model(seed=0, **size), world.model(seed=1, **size)
    with torch.no_grad():
        for p in [*ref.parameters(), *policy.parameters()]: p.mul_(4)   # far from uniform
    return dict(world=world, tok=tok, ref=ref, policy=policy, prompts=world.prompts(6, seed=0, split='test'))


def run(tiny, policies=None, **kw):
    kw = {**dict(judge=tiny['world'].gold, ref_model=tiny['ref'], max_new_tokens=6), **kw}
    return evaluate_policies(policies or {'sft': tiny['ref'], 'new': tiny['policy']}, tiny['tok'],
                             kw.pop('prompts', tiny['prompts']), **kw)


def test_table_has_all_that_is_promised(tiny):
    df = run(tiny, seed=3, temperature=.9)
    assert list(df.columns) == ['prompt_id', 'prompt', 'policy', 'completion', 'score', 'kl', 'length', 'ended']
    assert df[df.policy == 'new'].prompt.tolist() == tiny['prompts'] == df[df.policy == 'sft'].prompt.tolist()
    s = sample(tiny['policy'], tiny['tok'], tiny['prompts'], 6, temperature=.9, seed=3)
    new = df[df.policy == 'new']
    assert new.completion.tolist() == s.completions and new.ended.tolist() == s.ended
    assert new.length.tolist() == [len(c) for c in s.completion_ids]
    assert new.score.tolist() == tiny['world'].gold(s.prompts, s.completions).tolist()
    assert (df[df.policy == 'sft'].kl == 0).all() and (new.kl != 0).all()
    assert df.attrs == dict(max_new_tokens=6, temperature=.9, seed=3, batch_size=64, n_prompts=6, judge='ToyWorld.gold')


def test_settings_survive_parquet(tiny, tmp_path):
    df = run(tiny)
    df.to_parquet(tmp_path / 'completions.parquet')
    back = pd.read_parquet(tmp_path / 'completions.parquet')
    assert back.attrs == df.attrs
    assert str(compare_scores(back)) == str(compare_scores(df)) and summarize(back) == summarize(df)


def test_same_seed_same_table_and_global_state_untouched(tiny):
    torch.manual_seed(5); np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    tiny['policy'].train()
    first = run(tiny)
    assert tiny['policy'].training
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    torch.manual_seed(6)
    pd.testing.assert_frame_equal(run(tiny), first)
    assert run(tiny, seed=1).completion.tolist() != first.completion.tolist()


def test_a_loader_is_called_and_gives_the_same(tiny):
    pd.testing.assert_frame_equal(run(tiny, {'new': lambda: tiny['policy']}), run(tiny, {'new': tiny['policy']}))


def test_ready_samples(tiny):
    s = sample(tiny['policy'], tiny['tok'], tiny['prompts'], 6)
    df = run(tiny, {'plain': s, 'number': (s, 1.5), 'each': (s, np.arange(6.))})
    assert df[df.policy == 'plain'].kl.isna().all()
    assert df[df.policy == 'number'].kl.tolist() == [1.5]*6 and df[df.policy == 'each'].kl.tolist() == list(range(6))
    with pytest.raises(UserError, match="policy 'plain': its samples belong to other prompts"):
        run(tiny, {'plain': s}, prompts=tiny['prompts'][::-1])
    assert run(tiny, ref_model=None).kl.isna().all()


def test_bad_judges_and_prompts(tiny):
    def at(i, v): return lambda p, c: [v if k == i else 0. for k in range(len(p))]
    for v in (float('nan'), float('inf'), None):
        with pytest.raises(UserError, match="policy 'sft' are not finite.*prompt_id 4"): run(tiny, judge=at(4, v))
    with pytest.raises(UserError, match="6 completions of policy 'sft' got scores of shape"):
        run(tiny, judge=lambda p, c: [0.]*5)
    with pytest.raises(UserError, match='shape'): run(tiny, judge=lambda p, c: np.zeros((6, 1)))
    with pytest.raises(UserError, match='at least two'): run(tiny, prompts=[])
    with pytest.raises(UserError, match='at least two'): run(tiny, prompts='one text')
    with pytest.raises(UserError, match='prompt 1 is not a text'): run(tiny, prompts=['a', None, 'b'])
    with pytest.raises(UserError, match='no policies'):
        evaluate_policies({}, tiny['tok'], tiny['prompts'], None, None, 4)


def test_scores_of_a_second_judge_go_to_the_right_rows(tiny):
    df = run(tiny).sample(frac=1, random_state=0)
    two = add_scores(df, lambda p, c: [len(x) for x in c], column='chars')
    assert two.chars.tolist() == df.completion.map(len).tolist() and 'chars' not in df


@pytest.mark.parametrize('temperature', [1., .6])
def test_kl_estimate_against_enumeration(tiny, temperature):
    """Exact KL of two-token completions, all of them, against the mean of the estimate; at the temperature of
    the sampling"""
    tok, prompt, n = tiny['tok'], tiny['prompts'][0], 6000
    ids, V = encode_prompt(tok, prompt), len(tok)
    firsts = collate([ids]*V, [[v, 0] for v in range(V)], tok.pad_token_id)
    with torch.no_grad():
        # [V, 2, V]
        policy, ref = [torch.log_softmax(completion_logits(tiny[m], firsts).double() / temperature, -1)
                       for m in ('policy', 'ref')]
    kl = (policy.exp() * (policy - ref)).sum(-1)                                   # [V, 2]
    after = policy[0, 0].exp() * kl[:, 1]
    after[tok.eos_token_id] = 0                                                    # nothing follows EOS
    exact = (kl[0, 0] + after.sum()).item()
    s = sample(tiny['policy'], tok, [prompt]*n, 2, temperature=temperature, batch_size=n)
    mean, se, _ = mean_ci(kl_to_ref(tiny['policy'], tiny['ref'], tok, s, batch_size=n, temperature=temperature))
    assert abs(mean - exact) < 4*se and se < .05*exact
    wrong = mean_ci(kl_to_ref(tiny['policy'], tiny['ref'], tok, s, batch_size=n, temperature=1.6*temperature))
    assert abs(wrong[0] - exact) > 4*wrong[1]


# ---- what is shown

def test_all_text_of_the_sample_table_is_escaped():
    evil = '<img src=x onerror=alert(1)>&"\'</td>'
    df = table(n=2, policies=('sft', 'new')).assign(prompt=evil, completion=evil + '\nline', evil=1.)
    df = df.rename(columns={'evil': '<i>c'}).assign(policy=df.policy.map({'sft': 'sft', 'new': '<b>new'}))
    page = side_by_side(df, 2, column='<i>c')
    assert '<img' not in page and '<b>' not in page and '<i>' not in page
    assert page.count('&lt;img src=x onerror=alert(1)&gt;&amp;&quot;&#x27;&lt;/td&gt;') == 2 + 4
    assert page.count('<br>line') == 4 and page._repr_html_() == page


def test_sample_table_shows_what_was_asked():
    df = table()
    page = side_by_side(df, 2, ['mpo', 'sft'])
    assert page.index('mpo answers 0') < page.index('sft answers 0') < page.index('mpo answers 1')
    assert 'dpo' not in page and 'answers 2' not in page and f'{df.score[0]:.2f}' in page
    assert 'mpo answers 7' in side_by_side(df, prompt_ids=[7]) and 'answers 0' not in side_by_side(df, prompt_ids=[7])
    assert 'score' not in side_by_side(df.drop(columns='score'), column=None)
    assert 'x'*50 + ' …' in side_by_side(df.assign(completion='x'*99), max_chars=50)


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close('all')


def points(ax): return {c.get_label(): c[0].get_xydata()[0] for c in ax.containers}


def legend(ax): return {t.get_text() for t in ax.get_legend().get_texts()}


def test_plots_draw_on_the_given_axes(ax):
    df, before = table(), len(plt.get_fignums())
    assert plot_frontier(df, ax=ax) is ax and legend(ax) == {'sft', 'dpo', 'mpo'}
    means = df.groupby('policy', sort=False)[['kl', 'score']].mean()
    for p, xy in points(ax).items(): np.testing.assert_allclose(xy, means.loc[p])
    ax.clear(); plot_frontier(df, sqrt_kl=True, ax=ax)
    for p, (x, _) in points(ax).items(): np.testing.assert_allclose(x, np.sqrt(max(means.kl[p], 0)))
    ax.clear(); plot_scores(df, ax=ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['sft', 'dpo', 'mpo']
    assert len(plt.get_fignums()) == before


def test_a_policy_has_one_color_in_every_figure(ax):
    "[fails when colours are given by position]"
    names = ['mpo', 'sft', 'dpo_random', 'ppo', 'ppo_from_dpo', 'dpo', 'dpo_easy']
    colors = policy_colors(names)
    assert list(colors) == names and len(set(colors.values())) == 7 and colors['sft'] == POLICY_COLORS['sft']
    assert policy_colors(['ppo_from_dpo', 'sft']) == {k: colors[k] for k in ('ppo_from_dpo', 'sft')}
    many = policy_colors([f'policy {i}' for i in range(len(OTHER_COLORS))])
    assert set(many.values()) == set(OTHER_COLORS) and len(policy_colors([*many, 'one more'])) == len(many) + 1
    drawn = lambda ax: {c.get_label(): to_hex(c[0].get_color()).upper() for c in ax.containers}
    first = drawn(plot_frontier(table(), ax=ax))
    ax.clear()
    assert drawn(plot_frontier(table(policies=('mpo', 'sft')), ax=ax)) == {k: first[k] for k in ('mpo', 'sft')}


def test_frontier_draws_a_policy_of_unknown_kl(ax):
    df = table()
    df.loc[df.policy == 'dpo', 'kl'] = np.nan
    plot_frontier(df, ax=ax)
    assert set(points(ax)) == {'sft', 'mpo'} and legend(ax) == {'sft', 'dpo (KL unknown)', 'mpo'}


# ---- score and KL

def test_best_of_n_keeps_the_best_whole_row():
    s = Samples(list('ppqq'), ['1', '3', '5', '4'], [[0]]*2 + [[1]]*2, [[1], [3], [5], [4]], [True, False, True, False])
    best = best_of_n(s, 2, lambda p, c: [float(x) for x in c])
    assert (best.prompts, best.completions, best.prompt_ids, best.completion_ids,
            best.ended) == (['p', 'q'], ['3', '5'], [[0], [1]], [[3], [5]], [False, True])
    with pytest.raises(UserError, match='4 completions'): best_of_n(s, 3, len)
    with pytest.raises(UserError, match='not finite'): best_of_n(s, 2, lambda p, c: [1, 2, float('nan'), 4])


def test_best_of_n_over_all_subsets():
    "[fails when the ranks are those of the score instead of the proxy]"
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 5, 7))
    for n in (1, 2, 5, 7):
        subsets = [list(s) for s in itertools.combinations(range(7), n)]
        expected = np.mean([gold[np.arange(5), np.array(s)[proxy[:, s].argmax(1)]] for s in subsets], axis=0)
        np.testing.assert_allclose(best_of_n_means(proxy, n, gold), expected)
    with pytest.raises(UserError, match='best of 8 needs 8 draws'): best_of_n_means(proxy, 8)


@pytest.mark.parametrize('form', ['rl', 'bon'])
def test_gaos_curve_is_found_again(form):
    d = np.linspace(.2, 4, 15)
    y = 1.5 + d*(1.1 - .4*(np.log(d) if form == 'rl' else d))
    noisy = y + np.random.default_rng(0).normal(0, .02, 15)
    f = fit_frontier(np.r_[0, d**2], np.r_[1.5, noisy], 1.5, form, score_se=np.full(16, .02))
    assert abs(f['alpha'] - 1.1) < 4*f['alpha_se'] and abs(f['beta'] - .4) < 4*f['beta_se'] and f['alpha_se'] < .05
    assert f['peak_kl'] == pytest.approx((np.exp(1.1/.4 - 1) if form == 'rl' else 1.1/.8)**2, rel=.3)
    assert fit_frontier(d**2, 1.5 + d, 1.5, form)['beta'] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match='at least three'): fit_frontier([0, 1, 2, 2], [0, 1, 2, 3], 0.)


@pytest.mark.parametrize('temperature', [1., .6])
def test_stepwise_kl_has_the_same_mean_and_less_scatter(tiny, temperature):
    """The mean of the summed log-ratios, which are held against enumeration above; padding changes nothing
    [fails at another temperature]"""
    s = sample(tiny['policy'], tiny['tok'], tiny['prompts'] * 60, 4, temperature=temperature, batch_size=360)
    k1 = kl_to_ref(tiny['policy'], tiny['ref'], tiny['tok'], s, batch_size=360, temperature=temperature)
    steps = stepwise_kl(tiny['policy'], tiny['ref'], tiny['tok'], s, batch_size=300, temperature=temperature)
    assert (steps >= -1e-5).all() and steps.std() < k1.std() and abs((steps - k1).mean()) < 4*stats.sem(steps - k1)
    wrong = stepwise_kl(tiny['policy'], tiny['ref'], tiny['tok'], s, batch_size=300, temperature=1.6*temperature)
    assert abs((wrong - k1).mean()) > 4*stats.sem(wrong - k1)
    np.testing.assert_allclose(steps[:6], stepwise_kl(tiny['policy'], tiny['ref'], tiny['tok'],
                                                      Samples(*[v[:6] for v in vars(s).values()]), batch_size=1,
                                                      temperature=temperature), atol=1e-4)


def test_checkpoints_of_a_run_are_points(tmp_path, tiny, ax):
    for step in (20, 100, 3): (tmp_path/f'checkpoint-{step}').mkdir()
    (tmp_path/'checkpoint-old').mkdir()
    loaded = []
    found = checkpoint_policies(tmp_path, lambda p: loaded.append(p.name) or tiny['policy'])
    assert list(found) == ['step 3', 'step 20', 'step 100'] and not loaded
    df = add_scores(run(tiny, {'sft': tiny['ref'], **found}), lambda p, c: [len(x) for x in c], 'reward')
    assert loaded == ['checkpoint-3', 'checkpoint-20', 'checkpoint-100']
    t = frontier_table(df)
    assert (t.policy.tolist() == ['sft', 'step 3', 'step 20', 'step 100'] and t.kl[0] == 0
            and t.gold[1] == pytest.approx(df[df.policy == 'step 3'].score.mean()) and t.proxy_se[1] > 0)
    assert plot_gold_proxy(t.assign(kl=[0, .5, 1, 2]), ax=ax) is ax and {'gold', 'proxy'} <= legend(ax)
    with pytest.raises(UserError, match='no checkpoint-NUMBER'): checkpoint_policies(tmp_path/'checkpoint-3', None)
