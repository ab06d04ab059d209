"18_sets: every named set is what its line says, drawn independently of the other lines, and checked before a run."
import math

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from mpo_nb.core import UserError
from mpo_nb.gap import split_by_gap
from mpo_nb.sets import BASE_SETS, SET_KINDS, SetKind, check_sets, is_share, make_sets

N = 40


def pairs(disagree='drop', **kw):
    "Split pairs; of equal gaps there are many, and rows come in the order of the sets, as in gaps.parquet"
    rng = np.random.default_rng(0)
    gaps = rng.integers(-4, 8, N).astype(float)
    ds = Dataset.from_dict(dict(prompt=[f'p{i}' for i in range(N)], chosen=[f'c{i}' for i in range(N)],
                                rejected=[f'r{i}' for i in range(N)], gap=gaps, reward_chosen=gaps,
                                reward_rejected=[0.]*N, gold_chosen=[1.]*N, gold_rejected=[0.]*N, flipped=[False]*N))
    return concatenate_datasets([*split_by_gap(ds, threshold=1, disagree=disagree, **kw).values()])


def rows(ds): return list(ds['source_row'])


SPEC = {'rest': {'not': 'random'}, 'random': {'like': 'easy', 'seed': 1}, 'noisy': {'flip': .25, 'of': 'easy'},
        'low': {'band': {'quantile': [0, .3]}}, 'high': {'band': {'quantile': [.3, 1.]}}}


@pytest.mark.parametrize('disagree', ['hard', 'easy', 'swap', 'drop'])
def test_all_is_the_data_as_it_came(disagree):
    "Whatever happened to contradicted pairs: every row, in its order, with its first label [fails when a swap stays]"
    ds = pairs(disagree)
    sets = make_sets(ds)
    assert list(sets) == list(BASE_SETS) and rows(sets['all']) == list(range(N))
    assert sets['all']['chosen'][:] == [f'c{i}' for i in range(N)]
    np.testing.assert_array_equal(sets['all']['gap'][:], np.random.default_rng(0).integers(-4, 8, N))
    for k in ('easy', 'hard', 'aside'):
        assert rows(sets[k]) == sorted(r for r, s in zip(ds['source_row'], ds['set']) if s == k)
    assert sum(len(sets[k]) for k in ('easy', 'hard', 'aside')) == N
    assert (len(sets['aside']) > 0) == (disagree == 'drop')
    assert any(c.startswith('r') for c in sets['easy']['chosen']) == (disagree == 'swap')


def test_a_set_and_its_rest_make_up_all():
    sets = make_sets(pairs(), SPEC)
    assert len(sets['random']) == len(sets['easy']) and rows(sets['random']) != rows(sets['easy'])
    assert sorted(rows(sets['random']) + rows(sets['rest'])) == list(range(N))
    assert not set(rows(sets['random'])) & set(rows(sets['rest']))


def test_bands_that_touch_share_no_pair_even_among_ties():
    "[fails when a band is cut by values of the gap]"
    sets = make_sets(pairs(), SPEC)
    assert len(sets['low']) == round(.3*N) and sorted(rows(sets['low']) + rows(sets['high'])) == list(range(N))
    assert max(sets['low']['gap']) <= min(sets['high']['gap'])
    inner = make_sets(pairs(), {'x': {'band': {'quantile': [.5, 1]}, 'of': 'easy'}})['x']
    assert set(rows(inner)) < set(rows(sets['easy']))


def test_flipped_labels_are_counted_and_turned_with_all_their_columns():
    "[fails when only the texts are exchanged, and when the mark is lost]"
    sets = make_sets(pairs(), SPEC)
    noisy, easy = sets['noisy'], sets['easy']
    assert rows(noisy) == rows(easy) and sum(noisy['relabelled']) == round(.25*len(easy))
    for a, b in zip(noisy, easy):
        turned = a['relabelled']
        assert (a['chosen'],
                a['rejected']) == ((b['rejected'], b['chosen']) if turned else (b['chosen'], b['rejected']))
        assert a['gap'] == (-b['gap'] if turned else b['gap']) == a['reward_chosen'] - a['reward_rejected']
        assert (a['gold_chosen'] < a['gold_rejected']) == turned == a['flipped'] == a['swapped']


def test_flips_add_up():
    "All turned twice are as before; a flip of a relabelled set knows which label is the given one"
    ds = pairs('swap')
    sets = make_sets(ds, {'once': {'flip': 1, 'of': 'easy'}, 'twice': {'flip': 1, 'of': 'once'}})
    assert sets['twice']['chosen'][:] == sets['easy']['chosen'][:] and not any(sets['twice']['relabelled'])
    assert sets['twice']['swapped'][:] == sets['easy']['swapped'][:]
    assert [s != t for s, t in zip(sets['once']['swapped'], sets['easy']['swapped'])] == [True]*len(sets['easy'])
    assert [c.startswith('r') for c in sets['once']['chosen']] == sets['once']['swapped'][:]


def long_pairs(disagree='drop', n=400):
    "Split pairs in which a longer chosen answer makes the gap larger"
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 30, (2, n))
    gaps = .2*(a - b) + rng.normal(size=n)
    ds = Dataset.from_dict(dict(prompt=[f'p{i}' for i in range(n)], chosen=['a ' * k for k in a],
                                rejected=['b ' * k for k in b], gap=gaps, reward_chosen=gaps, reward_rejected=[0.]*n))
    return concatenate_datasets([*split_by_gap(ds, easy_fraction=.3, disagree=disagree).values()])


def longer_by(ds): return np.array([len(c.split()) - len(r.split()) for c, r in zip(ds['chosen'], ds['rejected'])])


def test_a_matched_set_has_the_lengths_and_other_pairs():
    """As many pairs, each once, and in every stretch of the difference in length as many as the set has; a random set
    is far from it, and another seed gives other pairs [fails when bins are those of all pairs, and with replacement]"""
    spec = {'alike': {'matched': 'easy'}, 'other': {'matched': 'easy', 'seed': 1}, 'random': {'like': 'easy'}}
    sets = make_sets(long_pairs(), spec)
    easy, alike, random = (longer_by(sets[k]) for k in ('easy', 'alike', 'random'))
    assert len(alike) == len(set(rows(sets['alike']))) == len(easy) and rows(sets['alike']) != rows(sets['other'])
    edges = np.unique(np.quantile(easy, np.linspace(0, 1, 21)))
    count = lambda w: np.histogram(w, edges)[0]
    assert (count(alike) == count(easy)).all() and alike.min() >= easy.min() and alike.max() <= easy.max()
    assert easy.mean() - random.mean() > 5 and abs(easy.mean() - alike.mean()) < .5
    assert set(rows(sets['alike'])) != set(rows(sets['easy']))


def test_no_match_where_labels_were_changed():
    "All has too few pairs as long as those with reversed labels: said in one sentence [fails when a bin is cut short]"
    spec = {'wrong': {'flip': 1, 'of': 'easy'}, 'alike': {'matched': 'wrong'}}
    with pytest.raises(UserError, match="can't be matched to 'wrong'"): make_sets(long_pairs(), spec)


def test_another_line_moves_no_set():
    "Nor do its name, the order of lines, and the order of rows [fails with one generator for all lines]"
    ds = pairs()
    alone = rows(make_sets(ds, {'random': SPEC['random']})['random'])
    assert rows(make_sets(ds, SPEC)['random']) == alone
    assert rows(make_sets(ds, {'x': {'like': 'hard', 'seed': 7}, 'other': SPEC['random']})['other']) == alone
    assert rows(make_sets(ds.shuffle(seed=3), SPEC)['random']) == alone
    assert rows(make_sets(ds, {'random': {'like': 'easy', 'seed': 2}})['random']) != alone
    assert rows(make_sets(ds, {'random': SPEC['random']}, seed=5)['random']) != alone
    noisy = make_sets(ds, SPEC)['noisy']['relabelled'][:]
    assert make_sets(ds, {'n': SPEC['noisy']})['n']['relabelled'][:] == noisy


def test_sets_come_in_the_order_of_the_recipe_whatever_they_wait_for():
    chain = {'a': {'not': 'b'}, 'b': {'like': 'c'}, 'c': {'band': {'quantile': [0, .5]}, 'of': 'd'},
             'd': {'like': 'hard'}}
    assert check_sets(chain) == ['d', 'c', 'b', 'a'] and list(make_sets(pairs(), chain)) == [*BASE_SETS, *chain]


@pytest.mark.parametrize('spec, says', [
    (['random'], "gap.sets is \\['random'\\]"), ({3: {'like': 'easy'}}, 'name 3 is not text'),
    ({'': {'like': 'easy'}}, "name '' is not text"),
    ({'easy': {'like': 'hard'}}, 'gap.sets.easy: easy is always there'),
    ({'aside': {'like': 'hard'}}, 'always there'),
    ({'x': 'easy'}, 'gap.sets.x: say one of like, matched, not, band, flip'),
    ({'x': {}}, 'say one of'), ({'x': None}, 'say one of'), ({'x': {'like': 'easy', 'not': 'hard'}}, 'say one of'),
    ({'x': {'lik': 'easy'}}, 'say one of'), ({'x': {'like': 'easy', 'of': 'hard'}}, "unknown key 'of'"),
    ({'x': {'not': 'easy', 'seed': 1}}, "unknown key 'seed'; beside not there may be nothing"),
    ({'x': {'like': 3}}, 'gap.sets.x.like is 3: give the name'), ({'x': {'like': None}}, 'give the name'),
    ({'x': {'like': 'easy', 'seed': -1}}, 'gap.sets.x.seed is -1'),
    ({'x': {'like': 'easy', 'seed': True}}, 'seed is True'),
    ({'x': {'like': 'easy', 'seed': 1.5}}, 'seed is 1.5'), ({'x': {'flip': 0}}, 'gap.sets.x.flip is 0'),
    ({'x': {'flip': 1.2}}, 'flip is 1.2'),
    ({'x': {'flip': math.nan}}, 'flip is nan'), ({'x': {'flip': '0.2'}}, 'flip is'),
    ({'x': {'band': [.2, .8]}}, 'gap.sets.x.band is'), ({'x': {'band': {'quantile': [.8, .2]}}}, 'band is'),
    ({'x': {'band': {'quantile': [0, math.nan]}}}, 'band is'),
    ({'x': {'band': {'quantile': [0, 1], 'z': 1}}}, 'band is'),
    ({'x': {'band': {'quantile': [-.1, 1]}}}, 'band is'),
    ({'x': {'band': {'quantile': [0, 1]}, 'of': ['easy']}}, 'refers to'),
    ({'x': {'sampled': 3}}, 'gap.sets.x.sampled is 3: give the name of a policy'),
    ({'x': {'sampled': 'dpo', 'seed': 1}}, "unknown key 'seed'"),
    ({'x': {'sampled': 'dpo', 'of': 'y'}}, "refers to 'y'"),
    ({'x': {'sampled': 'dpo'}, 'y': {'like': 'x'}}, 'gap.sets.y refers to x, and its pairs are sampled in the run'),
    ({'x': {'sampled': 'dpo'}, 'y': {'flip': .1, 'of': 'x'}}, 'gap.sets.y refers to x'),
    ({'x': {'sampled': 'dpo'}, 'y': {'sampled': 'ppo', 'of': 'x'}}, 'gap.sets.y refers to x'),
    ({'x': {'like': 'esay'}}, "gap.sets.x refers to 'esay'; there are all, easy, hard, aside, x"),
    ({'x': {'flip': .1, 'of': 'y'}}, "refers to 'y'"), ({'x': {'like': 'x'}}, 'wait for each other: x <- x'),
    ({'x': {'like': 'y'}, 'y': {'not': 'z'}, 'z': {'flip': .1, 'of': 'x'}}, 'wait for each other')])
def test_what_cannot_be_is_named_before_anything_runs(spec, says):
    with pytest.raises(UserError, match=says) as e: check_sets(spec)
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match=says): make_sets(pairs(), spec)


def test_sampled_sets_are_left_to_the_run():
    "[fails when the kind without a function is called]"
    assert list(make_sets(pairs(), {'fresh': {'sampled': 'dpo'}, 'rest': {'not': 'easy'}})) == [*BASE_SETS, 'rest']


def test_no_sets_are_fine_and_an_empty_one_is_not():
    assert check_sets(None) == check_sets({}) == []
    with pytest.raises(UserError, match='gap.sets.none has no pairs: all has 40'):
        make_sets(pairs(), {'none': {'not': 'all'}})
    with pytest.raises(UserError, match="no column 'set'"): make_sets(pairs().remove_columns('set'))


def test_a_new_kind_is_one_row(monkeypatch):
    "And one function; it takes part in checks, references and seeds"
    first = lambda base, every, line, rng: base.select(range(round(line['first']*len(base))))
    monkeypatch.setitem(SET_KINDS, 'first', SetKind(first, is_share, 'a share', ('of',)))
    sets = make_sets(pairs(), {'rest': {'not': 'start'}, 'start': {'first': .5}})
    assert rows(sets['start']) == list(range(N//2)) and rows(sets['rest']) == list(range(N//2, N))
    with pytest.raises(UserError, match='gap.sets.x.first is 2: give a share'): check_sets({'x': {'first': 2}})
