"16_gap: every pair in exactly one set, by the written rule, with its columns."
import matplotlib
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, load_dataset

from mpo_nb.core import UserError
from mpo_nb.gap import (
    EnsembleReward, accuracy_by_gap, add_gaps, crossfit_gaps, extreme_pairs, gap_correlations, label_agreement,
    pair_features, plot_accuracy_by_gap, plot_gaps, plot_sweep, prompt_folds, resample_pairs, split_by_gap,
    swap_labels, threshold_sweep
)
from mpo_nb.noise import fit_temperature, gap_threshold

matplotlib.use('Agg')
FORMS = 'hard', 'easy', 'swap', 'drop'


def pairs(gaps, **columns):
    n = len(gaps)
    return Dataset.from_dict(dict(prompt=[f'p{i}' for i in range(n)], chosen=[f'c{i}' for i in range(n)],
                                  rejected=[f'r{i}' for i in range(n)], reward_chosen=[float(g) for g in gaps],
                                  reward_rejected=[0.]*n, gap=[float(g) for g in gaps], **columns))


def rows(sets): return {k: list(d['source_row']) for k, d in sets.items()}


GAPS = [-2., -1., -.5, 0., .5, 1., 2.]
RULE = dict(hard=('HHHHHHE', ), easy=('EHHHHHE', ), swap=('EHHHHHE', ), drop=('AHHHHHE', ))


@pytest.mark.parametrize('form', FORMS)
def test_boundaries(form):
    "A gap of exactly the threshold is hard on either side; only what lies beyond -threshold depends on `disagree`"
    sets = split_by_gap(pairs(GAPS), threshold=1, disagree=form)
    letter = {r: k[0].upper() for k, rs in rows(sets).items() for r in rs}
    assert ''.join(letter[i] for i in range(7)) == RULE[form][0]
    assert list(sets) == ['easy', 'hard'] + ['aside']*(form == 'drop')


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('how', [dict(threshold=0), dict(easy_fraction=1.)])
def test_gap_zero_is_never_easy(form, how):
    sets = split_by_gap(pairs([0., 1., 0., -1.]), disagree=form, **how)
    assert {0, 2} <= set(sets['hard']['source_row']) and 1 in sets['easy']['source_row']


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('how', [dict(threshold=0), dict(threshold=.7), dict(threshold=99), dict(easy_fraction=0.),
                                 dict(easy_fraction=.3), dict(easy_fraction=1.)])
def test_every_pair_is_in_exactly_one_set(form, how):
    gaps = np.random.default_rng(0).normal(size=200).round(1)   # many ties
    sets = split_by_gap(pairs(gaps), disagree=form, **how)
    assert sorted(sum(rows(sets).values(), [])) == list(range(200))
    assert all(s == k for k, d in sets.items() for s in d['set'])
    for d in sets.values(): assert list(d['source_row']) == sorted(d['source_row']), 'the order of the rows is kept'


@pytest.mark.parametrize('form', FORMS)
def test_fraction_and_threshold_agree(form):
    "Without ties, the split at the largest size left is the same split"
    gaps = np.random.default_rng(1).normal(size=101)
    sets = split_by_gap(pairs(gaps), easy_fraction=.25, disagree=form)
    assert len(sets['easy']) == round(.25*101)
    size = np.abs(gaps) if form in ('easy', 'swap') else gaps
    rest = np.delete(size, sets['easy']['source_row'])
    assert rows(sets) == rows(split_by_gap(pairs(gaps), threshold=max(rest.max(), 0), disagree=form))


def test_ties_do_not_depend_on_the_order_of_rows():
    ds = split_by_gap(pairs([1.]*10), threshold=5)['hard'].remove_columns('set')   # has source_row
    a, b = (split_by_gap(d, easy_fraction=.4)['easy'] for d in (ds, ds.shuffle(seed=3)))
    assert list(a['source_row']) == sorted(b['source_row']) == [0, 1, 2, 3]


def test_swap_exchanges_all_paired_columns():
    ds = pairs([2., -3.], gold_chosen=[1., -1.], gold_rejected=[0., 1.], flipped=[False, True], ids_chosen=[[1], [2]],
               ids_rejected=[[3], [4]], note=['a', 'b'])
    easy = split_by_gap(ds, threshold=1, disagree='swap')['easy']
    assert easy[0]['swapped'] is False and {k: easy[0][k] for k in ds.column_names} == ds[0]
    assert easy[1] | dict(prompt='p1', chosen='r1', rejected='c1', reward_chosen=0.,
                          reward_rejected=-3., gap=3., gold_chosen=1., gold_rejected=-1., flipped=False,
                          ids_chosen=[4], ids_rejected=[2], note='b', swapped=True, source_row=1) == easy[1]
    assert swap_labels(swap_labels(ds, [True, True]), [True, True]).remove_columns('swapped')[:] == ds[:]


def test_item60_side_columns_survive_split_and_file(tmp_path):
    ds = add_gaps(Dataset.from_dict(dict(prompt=list('abcd'), chosen=['1', '22', '3', '4444'],
                                         rejected=['', '1', '333', '4'], who=list('wxyz'))),
                  lambda p, c: [len(x) for x in c])
    assert list(ds['gap']) == [1, 1, -2, 3] and list(ds['source_row']) == [0, 1, 2, 3]
    sets = split_by_gap(ds.shuffle(seed=1), threshold=1)
    for k, d in sets.items():
        d.to_parquet(tmp_path/f'{k}.parquet')
        back = load_dataset('parquet', data_files=str(tmp_path/f'{k}.parquet'), split='train',
                            cache_dir=str(tmp_path/'cache'))
        for r in back: assert {c: r[c] for c in ds.column_names} == ds[r['source_row']] and r['set'] == k


def test_scoring_again_replaces_scores_but_not_source_rows():
    ds = add_gaps(pairs([0.]*3), lambda p, c: np.arange(3.)).select([2, 0])
    again = add_gaps(ds, lambda p, c: [float(x[0] == 'c') for x in c])
    assert list(again['gap']) == [1., 1.] and list(again['source_row']) == [2, 0]


def test_item55_a_constant_added_to_rewards_changes_nothing():
    "Gaps and sets [fails when a gap holds a thousandth of a reward itself]"
    ds, score = pairs([0.]*50), lambda p, c: np.array([hash((x[0] == 'c', int(x[1:])*7919 % 31)) % 97/8 for x in c])
    a, b = (add_gaps(ds, f) for f in (score, lambda p, c: score(p, c) + 1024.))
    assert a['gap'][:] == b['gap'][:] and len(set(a['gap'][:])) > 5
    for how in (dict(easy_fraction=.4), dict(threshold=1.)):
        assert rows(split_by_gap(a, **how)) == rows(split_by_gap(b, **how))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_gap_that_is_no_number_names_its_row(bad):
    with pytest.raises(UserError, match='row 2'): split_by_gap(pairs([1., 2., bad]), threshold=1)
    with pytest.raises(UserError, match='row 1'):
        add_gaps(pairs([1., 2.]), lambda p, c: [0., bad if c[0] == 'c0' else 1.])


@pytest.mark.parametrize('kw, message', [
    (dict(), 'one of the two'), (dict(threshold=1, easy_fraction=.5), 'one of the two'),
    (dict(threshold=-1), 'threshold is -1'), (dict(threshold=np.nan), 'threshold is nan'),
    (dict(easy_fraction=50), 'easy_fraction is 50'), (dict(easy_fraction=np.nan), 'easy_fraction is nan'),
    (dict(threshold=1, disagree='keep'), "'keep'")])
def test_bad_arguments(kw, message):
    with pytest.raises(UserError, match=message): split_by_gap(pairs(GAPS), **kw)


def test_other_user_errors():
    with pytest.raises(UserError, match='add_gaps'): split_by_gap(pairs(GAPS).remove_columns('gap'), threshold=1)
    with pytest.raises(UserError, match='one number each'): add_gaps(pairs(GAPS), lambda p, c: [1.])
    with pytest.raises(UserError, match='neither'): plot_accuracy_by_gap(pairs(GAPS))


def test_accuracy_by_gap_counts_by_hand():
    "Bins hold their upper edge; ties in truth are left out of the shares; a judge stands in for gold"
    gold = dict(gold_chosen=[1., 0., 1., 1., 0.], gold_rejected=[0., 1., 0., 1., 1.])
    ds = pairs([-1., 0., 1., 1., 2.], **gold)
    t = accuracy_by_gap(ds, bins=(-np.inf, 0, 1, 5))
    assert t['n'].tolist() == [2, 2, 1]
    np.testing.assert_allclose(t['label_right'], [.5, 1., 0.])
    # -1: says rejected, wrong; 0: no preference counts as rejected, right
    np.testing.assert_allclose(t['model_right'], [.5, 1., 0.])
    judge = ds.rename_columns({k: k.replace('gold', 'judge') for k in gold})
    np.testing.assert_array_equal(accuracy_by_gap(judge, (-np.inf, 0, 1, 5)), t)
    assert 'label_right' not in accuracy_by_gap(pairs(GAPS))


def test_label_agreement_counts_half_for_no_gap():
    assert (label_agreement(pairs([1., -1., 0., 0.])) == .5
            and label_agreement(pairs([2., 1., 0.])) == pytest.approx(2.5/3))


def test_sweep_and_extremes():
    ds = pairs(GAPS, gold_chosen=[0., 1, 1, 1, 1, 1, 1], gold_rejected=[1., 0, 0, 0, 0, 0, 0])
    s = threshold_sweep(ds, [0, 1, 3], 'drop').set_index('threshold')
    np.testing.assert_allclose(s['easy'], [3/7, 1/7, 0])
    np.testing.assert_allclose(s['aside_right'], [2/3, 0, np.nan])
    e = extreme_pairs(ds, 1)
    assert dict(zip(e['kind'], e['gap'])) == dict(easiest=2., hardest=0., contradicted=-2.)


def test_plots_draw_where_they_are_told():
    import matplotlib.pyplot as plt
    fig, (a, b) = plt.subplots(1, 2)
    ds = pairs(GAPS, gold_chosen=[1.]*7, gold_rejected=[0.]*7)
    sets = split_by_gap(ds, threshold=1, disagree='drop')
    assert plot_gaps(sets, threshold=1, ax=a) is a and plot_accuracy_by_gap(ds, ax=b) is b
    assert [t.get_text() for t in a.get_legend().get_texts()] == ['easy (1)', 'hard (5)', 'aside (1)', '± threshold']
    for x in (a, b): assert x.get_title() and x.get_xlabel() and x.get_ylabel()
    from datasets import concatenate_datasets
    plot_gaps(concatenate_datasets(list(sets.values())), ax=a)
    assert sum(p.get_height() for c in a.containers[-1:] for p in c) >= 1
    plt.close(fig)


# ---- cross-fitting and calibration

def test_crossfitting_keeps_prompts_apart():
    """Every pair is scored by the model whose training pairs hold no row of its prompt [fails when folds are
    made by row]"""
    prompts = [f'p{i % 12}' for i in range(40)]
    ds = Dataset.from_dict(dict(prompt=prompts, chosen=[f'c{i}' for i in range(40)],
                                rejected=[f'r{i}' for i in range(40)]))
    def fit(pairs, fold):
        seen = set(pairs['prompt'])
        return lambda ps, cs: np.array([100. * (p in seen) * (c[0] == 'c') + fold for p, c in zip(ps, cs)])
    got = crossfit_gaps(ds, fit, folds=4, seed=3)
    assert (set(got['gap']) == {0.}
            and set(got['reward_chosen']) == {-50.}), 'zero of each model: the mean score of its own training pairs'
    assert got['fold'][:] == prompt_folds(prompts, 4, 3).tolist()
    assert all(s > 0 for s in got['gap_spread']) and got['chosen'][:] == ds['chosen'][:]


@pytest.mark.parametrize('folds', [1, 13])
def test_impossible_folds_are_refused(folds):
    with pytest.raises(UserError, match='12 different prompts'): prompt_folds([f'p{i % 12}' for i in range(40)], folds)


def test_folds_are_even_and_repeatable():
    folds = prompt_folds([f'p{i}' for i in range(11)], 3, seed=1)
    assert (sorted(np.bincount(folds)) == [3, 4, 4]
            and (folds == prompt_folds([f'p{i}' for i in range(11)], 3, seed=1)).all()
            and (folds != prompt_folds([f'p{i}' for i in range(11)], 3, seed=2)).any())


def test_pair_features_by_hand():
    ds = Dataset.from_dict(dict(prompt=['\n\nHuman: a b\n\nAssistant:', 'x', ''],
                                chosen=[' one two three', 'same words', 'a'],
                                rejected=[' one four', 'same words', 'b c d']))
    f = pair_features(ds)
    assert (f['words_more'].tolist() == [1, 0, -2] and f['words_apart'].tolist() == [1, 0, 2]
            and f['turn'].tolist() == [1, 0, 0] and f['prompt_words'].tolist() == [4, 1, 0])
    np.testing.assert_allclose(f['overlap'], [2/5, 1, 0])   # twice the common words by all words


def test_gap_correlations_are_spearmans():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=400)
    x = dict(size=np.abs(gaps) + rng.normal(size=400), side=gaps**3, same=np.ones(400))
    t = gap_correlations(pairs(gaps), pd.DataFrame(x))
    for k in ('size', 'side'):
        assert (t.loc[k, 'size'] == pytest.approx(spearmanr(x[k], np.abs(gaps)).statistic)
                and t.loc[k, 'gap'] == pytest.approx(spearmanr(x[k], gaps).statistic))
        assert t.loc[k, 'size_lo'] < t.loc[k, 'size'] < t.loc[k, 'size_hi']
    # nothing to rank: no number, rather than 0
    assert t.loc['side', 'gap'] == pytest.approx(1) and t.loc['same'].isna().all()
    with pytest.raises(UserError, match='one row a pair'): gap_correlations(pairs(gaps), pd.DataFrame(x).head(3))


# ---- scores that are kept

@pytest.fixture
def kept(tmp_path, monkeypatch):
    "A reward model, pairs, and the number of times they were really scored"
    from util import tiny, toy_pairs, toy_tokenizer

    from mpo_nb.reward import RewardModel, reward_model_from
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path/'cache'))
    calls, score = [], RewardModel.score_pairs
    monkeypatch.setattr(RewardModel, 'score_pairs', lambda self, *a: calls.append(1) or score(self, *a))
    return RewardModel(reward_model_from(tiny(), toy_tokenizer()), toy_tokenizer()), toy_pairs(6), calls


def test_cached_scores_are_read_not_made(kept):
    reward, ds, calls = kept
    a, b = add_gaps(ds, reward, cache=True), add_gaps(ds.add_column('note', ['x']*6), reward, cache=True)
    assert len(calls) == 1 and a['gap'][:] == b['gap'][:] == add_gaps(ds, reward)['gap'][:] and len(calls) == 2


def test_cache_misses_what_is_not_the_same(kept):
    "Another order, word, weight, offset: scored anew [fails when the key leaves out the texts, or the weights]"
    import torch
    reward, ds, calls = kept
    add_gaps(ds, reward, cache=True)
    word = ds.map(lambda r, i: dict(rejected=r['rejected'] + ' Hi.' if i == 5 else r['rejected']), with_indices=True)
    for n, d in enumerate((ds.select([1, 0, 2, 3, 4, 5]), word), 2):
        assert (add_gaps(d, reward, cache=True)['gap'][:] == pytest.approx(add_gaps(d, reward)['gap'][:])
                and len(calls) == 2*n - 1)
    before = len(calls)
    with torch.no_grad(): reward.model.score.weight[0, 0] += 1.
    add_gaps(ds, reward, cache=True)
    reward.offset = 2.
    assert (add_gaps(ds, reward, cache=True)['reward_chosen'][:] == add_gaps(ds, reward)['reward_chosen'][:]
            and len(calls) == before + 3)
    with pytest.raises(UserError, match='no fingerprint'): add_gaps(ds, lambda p, c: [0.]*len(p), cache=True)


# ---- several models

def test_ensemble_by_hand():
    a, b = (lambda p, c: np.array([1., 2.])), (lambda p, c: [3., 2.])
    np.testing.assert_allclose(EnsembleReward([a, b])(['p']*2, ['c']*2), [2, 2])
    np.testing.assert_allclose(EnsembleReward([a, b], penalty=.5)(['p']*2, ['c']*2), [2 - .5*np.sqrt(2), 2])
    length, first = ((lambda p, c: np.array([float(len(x)) for x in c])),
                     (lambda p, c: np.array([3.*(x[0] == 'c') for x in c])))
    ds = EnsembleReward([length, first]).gaps(
        Dataset.from_dict(dict(prompt=['p', 'q'], chosen=['caaa', 'c'], rejected=['rr', 'r'])))
    np.testing.assert_allclose([ds['reward_chosen'], ds['reward_rejected'], ds['gap'], ds['gap_spread']],
                               [[3.5, 2], [1, .5], [2.5, 1.5], [1/np.sqrt(2), 3/np.sqrt(2)]])
    with pytest.raises(UserError, match='at least 2'): EnsembleReward([a])


# ---- best and worst of n

def test_resampling_pairs_best_with_worst(caplog):
    """By a reward that counts letters; a prompt whose samples are all alike is left out, and `source_row` says
    which are there [fails when best and worst are taken over other prompts' rows]"""
    import logging

    from util import letters, talker, toy_prompts, toy_tokenizer

    from mpo_nb.sampling import sample
    tok, prompts, policy = toy_tokenizer(), toy_prompts(6), talker()
    ds = resample_pairs(policy, tok, letters, prompts, 6, n=3, seed=4)
    texts = sample(policy, tok, [p for p in prompts for _ in range(3)], 6, seed=4).completions
    for r in ds:
        i = r['source_row']
        own = dict(zip(texts[3*i:3*i + 3], letters([prompts[i]]*3, texts[3*i:3*i + 3])))
        assert (r['prompt'] == prompts[i] and own[r['chosen']] == max(own.values()) == r['reward_chosen']
                and own[r['rejected']] == min(own.values()) == r['reward_rejected'])
        assert r['gap'] == pytest.approx(r['reward_chosen'] - r['reward_rejected'])
    sets = split_by_gap(ds, threshold=1)
    assert sorted(sum(rows(sets).values(), [])) == ds['source_row'][:]
    with caplog.at_level(logging.INFO, 'mpo_nb'), pytest.MonkeyPatch.context() as m:
        import mpo_nb.gap as G
        m.setattr(G, 'sample', lambda model, tok, ps, *a,
                  **kw: type('S', (), dict(completions=[f' {i % 2 * (i > 2)}' for i in range(len(ps))])))
        assert resample_pairs(policy, tok, lambda p, c: [float(x) for x in c], ['a', 'b'], 6,
                              n=3)['source_row'][:] == [1]
    assert '1 of 2 prompts left out' in caplog.text
    with pytest.raises(UserError, match='at least 2'): resample_pairs(policy, tok, letters, prompts, 6, n=1)


# ---- the threshold from a share of wrong labels

def test_max_wrong_takes_its_temperature_from_unseen_pairs(tmp_path):
    "[fails when the temperature is fitted on the pairs that are split]"
    from types import SimpleNamespace

    from mpo_nb.prepare import write_split
    rng = np.random.default_rng(0)
    gap = SimpleNamespace(threshold=None, easy_fraction=None, max_wrong=.2, disagree='hard')
    seen, unseen = pairs(rng.normal(2, 2, 300)), pairs(rng.normal(.9, 1.2, 300))
    work = SimpleNamespace(r=SimpleNamespace(gap=gap), run=tmp_path)
    counts = write_split(work, seen, unseen)
    assert (counts['threshold'] == pytest.approx(gap_threshold(.2, fit_temperature(unseen['gap'][:])))
            != pytest.approx(gap_threshold(.2, fit_temperature(seen['gap'][:])), rel=.1))
    table = pd.read_parquet(tmp_path/'gaps.parquet')
    assert (((table['gap'] > counts['threshold']) == (table['set'] == 'easy')).all()
            and counts['easy'] + counts['hard'] == 300)
    gap.max_wrong = 1e-6
    with pytest.raises(UserError, match='no easy pairs.*threshold .*gap.max_wrong'):
        write_split(work, seen, unseen)


def test_sweep_plot_marks_the_threshold():
    import matplotlib.pyplot as plt
    axs = plot_sweep(threshold_sweep(pairs(GAPS, gold_chosen=[1.]*7, gold_rejected=[0.]*7), [0, 1, 2], 'drop'),
                     chosen=1.)
    assert ([t.get_text() for t in axs[0].get_legend().get_texts()] == ['easy', 'hard', 'aside', 'γ = 1.00']
            and all(a.get_xlabel() and a.get_ylabel() and a.get_title() for a in axs))
    plt.close(axs[0].figure)
