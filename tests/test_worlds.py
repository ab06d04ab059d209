"What no reader of the worlds should have to read: tokenizer exactness, splits, determinism, limits of the gold reward"
import hashlib, json, logging, os, random, re
import numpy as np, pytest, torch
from scipy.special import expit
from transformers import AutoTokenizer
from mpo_nb.core import UserError
from mpo_nb.checks import the_world
from mpo_nb.recipe import load_recipe
from mpo_nb.toy_language import FACTS, HARMFUL, NAMES, Demonstrators, read_facts, statement
from mpo_nb.world_base import World, intraclass_correlation, prefer_a
from mpo_nb.worlds import EVENTS, GOLD_RANGE, WEIGHTS, StoriesWorld, ToyWorld, get_world

SIZES = [dict(), dict(topics=20, harmful=8), dict(topics=2, harmful=1),
         dict(topics=6, harmful=2, turns=1, careless=2.5), dict(names=2, by_prompt=1.),
         dict(topics=2, harmful=1, turns=1, names=10, by_prompt=.75)]
CATS, BOMBS = '\n\nHuman: Tell me about cats.\n\nAssistant:', '\n\nHuman: How do I make bombs?\n\nAssistant:'


@pytest.fixture(params=SIZES, ids=str)
def toy(request): return ToyWorld(**request.param)

@pytest.fixture(params=['toy', 'stories'])
def world(request): return get_world(request.param)


def test_prompts_split_and_order(world):
    train, test = world.prompts(5000, 1), world.prompts(2000, 1, 'test')
    assert len(train)==5000 and len(test)==2000 and not set(train) & set(test)
    assert (set(train) | set(test) == set(world.all_prompts())
            and len(set(world.all_prompts())) == len(world.all_prompts()))
    n = len(set(test))
    assert n >= 200 and len(set(test[:n])) == n                     # none twice before all were used
    assert world.prompts(50, 1) == train[:50] and world.prompts(50, 2) != train[:50]
    assert set(world.prompts(5000, 2)) == set(train)                # the split does not depend on the seed
    assert world.prompts(0) == []
    with pytest.raises(UserError): world.prompts(1, split='valid')

def test_every_topic_in_both_splits():
    toy = ToyWorld()
    for split in ('train', 'test'):
        assert {toy.asked(p) for p in toy.prompts(1000, split=split)} == {*toy.facts, *toy.harmful}

@pytest.mark.parametrize('bad', [dict(topics=1), dict(harmful=9), dict(turns=3), dict(turns=1.5), dict(topics=2.5),
                                 dict(careless=-1), dict(careless=9), dict(careless=float('nan')), dict(names=11),
                                 dict(names=-1), dict(names=.5), dict(names='two'), dict(by_prompt=1.01),
                                 dict(by_prompt=-.1), dict(by_prompt=float('nan')), dict(by_prompt='half')],
                         ids=str)
def test_sizes_that_cannot_be(bad):
    with pytest.raises(UserError, match=next(iter(bad))): ToyWorld(**bad)

def test_one_turn_world_asks_at_once():
    toy = ToyWorld(turns=1)
    assert {p.count('Human:') for p in toy.all_prompts()} == {1} and len(toy.all_prompts()) > 1000

def test_facts_table():
    facts = read_facts(FACTS)
    assert len(facts) == 20 and all(list(f) == ['say', 'eat', 'like', 'live in', 'raise'] for f in facts.values())
    words = {t.capitalize() for t in facts} | {o for f in facts.values() for o in f.values()}
    assert all(re.fullmatch('[A-Za-z]+', w) for w in words)
    assert not set(facts) & set(HARMFUL)

def test_tokenizer_is_exact(toy, tmp_path):
    tok = toy.tokenizer()
    assert (len({tok.pad_token_id, tok.eos_token_id, tok.unk_token_id}) == 3
            and None not in (tok.pad_token_id, tok.eos_token_id))
    tok.save_pretrained(tmp_path)
    tok2 = AutoTokenizer.from_pretrained(tmp_path)
    assert (tok2.pad_token_id, tok2.eos_token_id, tok2.unk_token_id,
            len(tok2)) == (tok.pad_token_id, tok.eos_token_id, tok.unk_token_id, len(tok))
    d = toy.demonstrations(1000)[:]
    texts = [p+c for p,c in zip(d['prompt'], d['completion'])] + [f' {s}' for s in toy.book] + toy.all_prompts()
    for t in (tok, tok2):
        ids = t(texts).input_ids
        assert t.batch_decode(ids) == texts
        assert not any(t.unk_token_id in i or t.eos_token_id in i for i in ids)
        parts = zip(t(d['prompt']).input_ids, t(d['completion']).input_ids)
        assert [p+c for p,c in parts] == ids[:1000]
        assert set(t(texts[:2])) == {'input_ids', 'attention_mask'}
    assert tok2('\x00 1234 é').input_ids and set(tok2('\x00é').input_ids) == {tok.unk_token_id}

def test_completions_fit(toy):
    d, tok = toy.demonstrations(2000)[:], toy.tokenizer()
    assert max(len(i) for i in tok(d['completion']).input_ids) + 1 <= toy.max_tokens
    assert all(re.match(r' \S', c) and not c.endswith(' ') for c in d['completion'])
    assert max(len(i) for i in tok(toy.all_prompts()).input_ids) <= 32
    assert set(d['prompt']) <= set(toy.prompts(10_000))

def test_tokenizer_same_in_every_process():
    import subprocess, sys
    code = ('from mpo_nb.worlds import ToyWorld; w=ToyWorld(); d=w.demonstrations(50); '
            'print(w.tokenizer().get_vocab()[" moo"], hash(0), d[:]["completion"], w.people.known)')
    out = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': h}, capture_output=True,
                          text=True, check=True).stdout for h in ('1', '2')}
    assert len(out) == 1

def test_model_leaves_global_random_state_alone():
    toy = ToyWorld()
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    want = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    a, tok = toy.model(seed=3, num_hidden_layers=1)
    toy.pairs(toy.demonstrate, 20)
    assert torch.equal(torch.rand(3), want[0]) and (np.random.rand(), random.random()) == want[1:]
    b, c = toy.model(seed=3, num_hidden_layers=1)[0], toy.model(seed=4, num_hidden_layers=1)[0]
    same = lambda x, y: all(torch.equal(v, y.state_dict()[k]) for k,v in x.state_dict().items())
    assert same(a, b) and not same(a, c)
    assert (a.config.vocab_size == len(tok) and a.config.pad_token_id == tok.pad_token_id
            and a.config.eos_token_id == tok.eos_token_id)

def test_gold_best_is_three(toy):
    for p in toy.all_prompts()[::7]:
        t = toy.asked(p)
        best = (' Sorry, I cannot help with that. I can tell you about dogs.' if t in toy.harmful
                else ' Of course! ' + ' '.join(statement(t, r, o) for r,o in list(toy.facts[t].items())[:3]))
        assert toy.gold([p], [best])[0] == pytest.approx(3.)
    assert GOLD_RANGE == (-3., 3.) and {e for pair in EVENTS.values() for s in pair for e in s.split()} <= set(WEIGHTS)

@pytest.mark.parametrize('answer,want', [
    (' Cats say meow.', .5), (' Cats say moo.', -1.3), (' They say meow.', .5),
    (' Dogs say woof.', -.9), (' Dogs say woof. They say meow.', -1.7),
    (' Cats say meow. They say meow.', -.1), (' Cats say meow', -1.1), (' Of course!', 0.),
    (' Of course! Happy to help!', 0.), (' Sorry, I cannot help with that.', -1.5),
    (' Mix salt with soap.', -1.5), (' Go away.', -1.3), ('', -.5),
    (' cats say meow.', -1.1), (' Cats say mice.', -1.1),
    (' Cats say meow. Cats eat mice. Cats like yarn. Cats live in houses.', 2.5)])
def test_gold_by_hand(answer, want): assert ToyWorld().gold([CATS], [answer])[0] == pytest.approx(want)

@pytest.mark.parametrize('answer,want', [
    (' Sorry, I cannot help with that.', 2.), (' That is not safe.', 1.5),
    (' That is not safe. That is not safe.', .9), (' Of course! Mix salt with sand.', -2.), (' Of course!', -1.),
    (' That is not safe. I can tell you about cats. I can tell you about dogs.', 2.5), (' They say meow.', -1.3),
    (' Cats say meow.', -.9), (' Have a nice day!', 0.)])
def test_gold_of_harmful_by_hand(answer, want): assert ToyWorld().gold([BOMBS], [answer])[0] == pytest.approx(want)

def test_gold_judges_the_last_request():
    p = '\n\nHuman: Tell me about dogs.\n\nAssistant: Dogs say woof.' + CATS
    assert ToyWorld().gold([p]*2, [' Cats say meow.', ' Dogs eat meat.']).tolist() == pytest.approx([.5, -.9])

def test_gold_of_any_text():
    toy, rng = ToyWorld(), random.Random(0)
    texts = [''.join(chr(rng.choice([rng.randrange(1, 127), rng.randrange(0xD7FF)]))
                     for _ in range(rng.randrange(200))) for _ in range(500)]
    texts += ['.'*1000, '\n\nHuman:'*50, ' Cats say meow.'*5000, '<eos><pad>', 'x'*100_000]
    for p in (CATS, BOMBS, '', 'no dialogue at all'):
        g = toy.gold([p]*len(texts), texts)
        assert g.dtype == float and np.isfinite(g).all() and (g >= -3).all() and (g <= 3).all()
        assert (g[:500] <= 0).all()                                 # noise is never worth anything
    assert toy.gold([], []).shape == (0,)
    with pytest.raises(ValueError): toy.gold([CATS], [])

def test_gold_is_a_function_of_text_alone():
    toy = ToyWorld()
    ps = toy.prompts(300); cs = toy.demonstrate(ps, 1)
    order = np.random.default_rng(0).permutation(300)
    assert (toy.gold(ps, cs)[order] == ToyWorld().gold([ps[i] for i in order], [cs[i] for i in order])).all()

def test_labels(world, caplog):
    ps = world.prompts(2000)
    a, b = ([f' {w}' for w in np.random.default_rng(s)
             .choice(['happy', 'sad', 'Cats say meow.', 'Go away.', 'ball'], 2000)] for s in (0, 1))
    with caplog.at_level(logging.INFO, 'mpo_nb'): d = world.label(ps, a, b, seed=3)
    n_equal = sum(x==y for x,y in zip(a, b))
    assert len(d) == 2000-n_equal and f'{n_equal} of 2000 pairs dropped' in caplog.text
    assert d.column_names == ['prompt', 'chosen', 'rejected', 'gold_chosen', 'gold_rejected', 'flipped']
    assert ((world.gold(d['prompt'], d['chosen']) == d['gold_chosen']).all()
            and (world.gold(d['prompt'], d['rejected']) == d['gold_rejected']).all())
    gc, gr = np.array(d['gold_chosen']), np.array(d['gold_rejected'])
    assert (np.array(d['flipped']) == (gc < gr)).all()
    kept = [{p, x, y} for p,x,y in zip(ps, a, b) if x!=y]
    assert [{p, x, y} for p,x,y in zip(d['prompt'], d['chosen'], d['rejected'])] == kept
    p = expit(world.scale*np.abs(gc-gr))
    right = (gc > gr)[gc != gr]
    assert abs(right.mean() - p[gc != gr].mean()) < 4*right.std()/len(right)**.5
    assert world.label(ps, a, b, seed=3)[:] == d[:] and world.label(ps, a, b, seed=4)[:] != d[:]

def test_label_is_fair():
    "Swapping a and b swaps nothing on average; ties are a coin toss"
    ps = [CATS]*4000
    d = ToyWorld().label(ps, [' Cats say meow.']*4000, [' Cats eat mice.']*4000)
    assert abs(np.mean([c==' Cats say meow.' for c in d['chosen']]) - .5) < .03 and not any(d['flipped'])
    assert prefer_a([10.], [-10.], 50.).all() and not prefer_a([-10.], [10.], 50.).any()

def test_label_bad_input():
    toy = ToyWorld()
    with pytest.raises(UserError, match='different completions'): toy.label([CATS], [' x'], [' x'])
    with pytest.raises(ValueError): toy.label([CATS], [' x'], [])

def test_pairs_are_reproducible():
    toy = ToyWorld()
    a, b, c = (toy.pairs(toy.demonstrate, 500, seed=s)[:] for s in (0, 0, 1))
    assert a == b and a != c and set(a['prompt']) <= set(toy.prompts(5000))
    seeds = []
    toy.pairs(lambda ps, seed: seeds.append(seed) or toy.demonstrate(ps, seed), 5)
    assert len(set(seeds)) == 2 and all(type(s) is int for s in seeds)

def test_figures_of_the_design():
    "Demonstrations are mediocre, labels of their pairs about 79% right, and there is room to improve"
    toy = ToyWorld()
    d = toy.pairs(toy.demonstrate, 8000)
    gc, gr = np.array(d['gold_chosen']), np.array(d['gold_rejected'])
    both = np.concatenate([gc, gr])
    assert abs(both.mean()) < .2 and 1.4 < both.std() < 2. and (both > 2.9).mean() < .05
    assert .77 < ((gc > gr) + .5*(gc == gr)).mean() < .82

def test_stories():
    w = StoriesWorld()
    ps = w.all_prompts()
    assert not w.gold(ps, ['']*len(ps)).any() and w.demonstrations(5) is None
    g = w.gold(ps[:2], [' ball. She was very happy.', ' ball. She was very sad.'])
    assert g[0] > .3 and g[1] < -.3
    with pytest.raises(UserError, match='model'): w.model()

def test_bad_arguments():
    for kw in (dict(topics=1), dict(topics=21), dict(harmful=0), dict(harmful=9)):
        with pytest.raises(UserError): get_world('toy', **kw)
    with pytest.raises(UserError, match="'toy' or 'stories'"): get_world('tyo')
    assert isinstance(get_world('stories'), World)


def fingerprint(world, seed):
    "Of all that a seed draws: prompts, demonstrations, pairs"
    drawn = [world.prompts(200, seed), world.prompts(100, seed, 'test'), world.demonstrations(200, seed)[:],
             world.pairs(world.demonstrate, 200, seed)[:]]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]

@pytest.mark.parametrize('kw,seed,drawn', [
    (dict(), 0, '780ed2c679bfe8a9'),
    (dict(), 13, '229024ee63c1f12a'),
    (dict(topics=20, harmful=8), 0, 'e9d5d93609fb6555'),
    (dict(topics=20, harmful=8), 13, '779133e42c85a5b6'),
    (dict(topics=6, harmful=2, turns=1, careless=2.5), 0, 'cae257ef9bbe1809'),
    (dict(topics=6, harmful=2, turns=1, careless=2.5), 13, '70524aa42d7b1ade')])
def test_the_random_numbers_of_a_seed_stay(kw, seed, drawn):
    """Recorded before the worlds were split into rooms, so that results stay comparable with older ones
    [fails when anything draws one number more]"""
    assert fingerprint(ToyWorld(**kw), seed) == drawn


# ---- the dial from the pair to the prompt

DIAL = dict(topics=6, harmful=2, turns=1, careless=2.5, names=10)

def dial(by_prompt): return ToyWorld(**DIAL, by_prompt=by_prompt)

def sha(x): return hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]

@pytest.mark.parametrize('kw,prompts,answers,vocab,pairs', [
    (dict(), 'f3b242d9028477dd', '10b5c28ec02c2027', 'ecd33a7615754cd5', 'da17d1c8a6f4d224'),
    (dict(topics=20, harmful=8), '22be41f7fd10b4c7', '50bc0e3ed76e582a', '3216071e6063bca9', '61859d62c47bfa61'),
    (dict(topics=6, harmful=2, turns=1, careless=2.5),
     '220d2e0ab10a493a', '7c430de5ce2a912e', '297ae2b11f9fa367', '23aba55dc40733c8')], ids=str)
def test_a_dial_at_zero_is_the_world_before_it(kw, prompts, answers, vocab, pairs):
    """Recorded before the world had names and a dial [fails when a random number is drawn at 0, or the labeller's
    sharpness changes there]"""
    toy = ToyWorld(**kw, names=0, by_prompt=0)
    ps = toy.all_prompts()
    found = sha(ps), sha(toy.demonstrate(ps, 5)), sha(sorted(toy.tokenizer().get_vocab().items()))
    assert (*found, sha(toy.pairs(toy.demonstrate, 500, 5)[:])) == (prompts, answers, vocab, pairs)

def test_no_random_number_is_drawn_at_zero():
    "[fails when `answer` draws before it looks at the dial]"
    for asked in ('cats', 'bombs'):
        a, b = random.Random(1), random.Random(1)
        same = [Demonstrators(read_facts(FACTS), 1., d).answer(asked, r, 32, divided=kind)
                for r, d, kind in ((a, 0., False), (b, 0, True))]
        assert same[0] == same[1] and a.getstate() == b.getstate()

def test_a_turned_dial_is_reproducible():
    "[fails when kept prompts or answers hang on anything but the seed, such as `hash`]"
    for by_prompt in (.5, 1.):
        a, b = fingerprint(dial(by_prompt), 3), fingerprint(dial(by_prompt), 3)
        assert a == b != fingerprint(dial(by_prompt), 4)
    import subprocess, sys
    code = ('from mpo_nb.worlds import ToyWorld\nfor by_prompt in (.5, 1.):\n'
            f'    w = ToyWorld(**{DIAL}, by_prompt=by_prompt)\n'
            '    print(len(w.all_prompts()), w.demonstrations(20, 3)[:])')
    out = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': h}, capture_output=True,
                          text=True, check=True).stdout for h in ('1', '2')}
    assert len(out) == 1

@pytest.mark.parametrize('turns', [1, 2])
def test_prompts_with_names(turns):
    "[fails when the name also goes into an earlier turn]"
    plain, named = ToyWorld(turns=turns), ToyWorld(turns=turns, names=10)
    ps = named.all_prompts()
    assert len(set(ps)) == len(ps) == 11*len(plain.all_prompts()) and ps[::11] == plain.all_prompts()
    assert {p.count(' I am ') for p in ps} == {0, 1} and all(p.endswith('\n\nAssistant:') for p in ps)
    for i, p in enumerate(ps):
        assert named.asked(p) == named.asked(ps[i//11*11]) and named.divided(p) == named.divided(ps[i//11*11])
        assert i % 11 == 0 or p.endswith(f' I am {NAMES[i % 11 - 1]}.\n\nAssistant:')
    assert set(plain.tokenizer().get_vocab()) < set(named.tokenizer().get_vocab())

@pytest.mark.parametrize('by_prompt', [0., .5, 1.])
def test_gap_and_gold_by_kind(by_prompt):
    """On alike prompts every gap goes to 0, on divided ones gaps spread over most of the scale
    [fails when the kinds are swapped]"""
    toy = dial(by_prompt)
    ps = toy.prompts(4000)
    a, b = (toy.gold(ps, toy.demonstrate(ps, s)) for s in (1, 2))
    divided = np.array([toy.divided(p) for p in ps])
    gap = {kind: np.abs(a-b)[divided == kind].mean() for kind in (False, True)}
    if not by_prompt: assert abs(gap[True] - gap[False]) < .3
    else: assert gap[True] > gap[False] + by_prompt
    if by_prompt == 1:
        harm = np.array([toy.asked(p) in toy.harmful for p in ps])
        levels = [np.unique(np.round(a[divided & (harm == k)], 6)).tolist() for k in (False, True)]
        assert levels == [[-2.1, -.3, 1.5, 3.], [-2.3, -.3, 1.5, 3.]]
        assert gap[False] == 0 and len(np.unique(np.round(a[~divided], 6))) == 2

def test_difficulty_goes_from_the_pair_to_the_prompt():
    "[fails when the demonstrators ignore the dial]"
    icc = []
    for d in (0, .5, .75, 1):
        toy = dial(d)
        ps = [p for p in toy.prompts(400, 1) for _ in range(8)]
        gap = np.abs(toy.gold(ps, toy.demonstrate(ps, 1)) - toy.gold(ps, toy.demonstrate(ps, 2)))
        icc.append(intraclass_correlation(gap, ps))
    assert icc == sorted(icc) and icc[0] < .13 and .13 < icc[2] < .35 and .35 < icc[3] < .65

def test_rare_topics():
    """[fails when prompts of other topics are left out, when a prompt comes back as the dial is turned up, or the
    tokenizer knows only the prompts that are left]"""
    worlds = [dial(d) for d in (0, .25, .5, 1)]
    kept = [set(w.all_prompts()) for w in worlds]
    assert all(more > fewer for more, fewer in zip(kept, kept[1:]))
    assert all(worlds[0].rare(p) for p in kept[0]-kept[-1])
    n = [sum(w.rare(p) for p in k) for w, k in zip(worlds, kept)]
    assert np.allclose(np.array(n)/n[0], [1, .775, .55, .1], atol=.04)
    assert all(w.rare_topics == worlds[0].rare_topics and len(w.rare_topics) == 2 for w in worlds)
    small = [ToyWorld(topics=2, harmful=1, by_prompt=d) for d in (0, 1)]        # a word is asked no more at 1
    assert len({str(sorted(w.tokenizer().get_vocab().items())) for w in small}) == 1
    for split in ('train', 'test'):
        topics = {worlds[-1].asked(p) for p in worlds[-1].prompts(9000, split=split)}
        assert topics == {*worlds[0].facts, *worlds[0].harmful}

def test_texts_of_no_kind():
    "[fails when `is_divided` takes for granted that there is a topic]"
    toy = dial(1.)
    for text in ('', 'Hello', '\n\nHuman: Hello.\n\nAssistant:', '\n\nHuman: cats\n\nAssistant:'):
        assert not toy.divided(text) and not toy.rare(text) and len(toy.demonstrate([text], 0)) == 1
    assert toy.scales([]).shape == (0,)

@pytest.mark.parametrize('scale', [None, 3.])
def test_scales_are_those_of_the_labels(scale):
    """Labels of divided prompts are right as often as their sharper labeller says; the recipe's `world.scale` counts
    too [fails when `label` takes `scale` alone]"""
    args = {f'world.args.{k}': v for k, v in DIAL.items()} | {'world.args.by_prompt': 1.}
    toy = the_world(load_recipe('toy', **args, **({} if scale is None else {'world.scale': scale})))
    ps = [p for p in toy.prompts(3000) if toy.asked(p) not in toy.harmful]
    one, two = ([f' {statement(toy.asked(p), r, toy.facts[toy.asked(p)][r])}{end}' for p in ps]
                for r, end in (('say', ''), ('eat', ' Have a nice day!')))                   # a gold gap of .5
    d = toy.label(ps, one, two, seed=2)
    assert np.allclose(np.subtract(d['gold_chosen'], d['gold_rejected']).__abs__(), .5)
    right, divided = ~np.array(d['flipped']), np.array([toy.divided(p) for p in d['prompt']])
    for kind, times in ((True, 2), (False, .5)):
        assert abs(right[divided == kind].mean() - expit((scale or 1)*times*.5)) < .045
        assert (toy.scales(np.array(d['prompt'])[divided == kind].tolist()) == (scale or 1)*times).all()

def test_prefer_a_takes_a_scale_for_each():
    "[fails when all pairs get the mean scale]"
    a, b = np.ones(20_000), np.zeros(20_000)
    scale = np.tile([.2, 5.], 10_000)
    won = prefer_a(a, b, scale, 1)
    assert abs(won[::2].mean() - expit(.2)) < .02 and abs(won[1::2].mean() - expit(5.)) < .01
    assert (prefer_a(a, b, 2., 1) == prefer_a(a, b, np.full(20_000, 2.), 1)).all()

def test_intraclass_correlation_by_plain_loops():
    "[fails when k is the mean size of a group, or when groups of one value are left out]"
    rng = np.random.default_rng(0)
    groups = rng.choice(list('abcdefgh') + ['alone'], 60, p=[.12]*8 + [.04]).tolist() + ['last']
    x = rng.normal(size=61).tolist()
    of = {g: [v for v, h in zip(x, groups) if h == g] for g in groups}
    N, n, mean = 61, len(of), sum(x)/61
    between = sum(len(v)*(sum(v)/len(v) - mean)**2 for v in of.values())/(n-1)
    within = sum((y - sum(v)/len(v))**2 for v in of.values() for y in v)/(N-n)
    k = (N - sum(len(v)**2 for v in of.values())/N)/(n-1)
    assert intraclass_correlation(x, groups) == pytest.approx((between-within)/(between+(k-1)*within))
    for bad in (([1, 2], ['a']), ([1, 2], ['a', 'a']), ([1, 2], ['a', 'b']), ([], [])):
        with pytest.raises(UserError): intraclass_correlation(*bad)
