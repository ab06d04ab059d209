"What the README promises: its example runs, its table lists every notebook, its files exist."
import json
import re
from base64 import b64decode
from pathlib import Path

from mpo_nb.worlds import get_world

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text(encoding='utf-8')


def test_example_runs(tmp_path, monkeypatch):
    """The 15 lines as they stand, with fewer steps, on a small model and 60 pairs of the toy world [fails when a
    name in the README is not the library's]"""
    code = re.search(r'```python\n(.*?)```', README, re.S).group(1)
    assert len(code.strip().splitlines()) <= 16
    world = get_world('toy')
    model, tok = world.model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model.save_pretrained(tmp_path/'my-sft-model'), tok.save_pretrained(tmp_path/'my-sft-model')
    pairs = world.pairs(world.demonstrate, 60)
    pairs.to_json(tmp_path/'pairs.jsonl')
    monkeypatch.chdir(tmp_path)
    exec(code.replace('max_steps=100', 'max_steps=2').replace('num_rollouts=50', 'num_rollouts=1')
         .replace('max_new_tokens=64', 'max_new_tokens=4'), {})
    assert json.loads((tmp_path/'mpo'/'config.json').read_text())['architectures'] == ['LlamaForCausalLM']


def test_every_notebook_is_listed_with_a_badge():
    for nb in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        assert (f'nbs/{nb.name}' in README
                and f'colab.research.google.com/github/mpo-nb/mpo_nb/blob/main/nbs/{nb.name}' in README), nb.name


def minutes(names):
    "How long it takes to read notebooks: 200 words or 20 lines of code a minute; what is hidden isn't read"
    words = lines = 0
    for name in names:
        for c in json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))['cells']:
            text = ''.join(c['source'])
            if c['cell_type'] == 'markdown': words += len(re.findall(r'\w+', text))
            elif '#| hide' not in text: lines += len([l for l in text.splitlines() if l.strip() and l[:2] != '#|'])
    return round(words/200 + lines/20)


def with_minutes(readme):
    "README with the minutes of each row that leads to notebooks"
    def row(m):
        names = re.findall(r'\]\(nbs/([\w/]+\.ipynb)\)', m[0])
        return f'{m[1]} {minutes(names)} |' if names else m[0]
    return re.sub(r'(?m)^(\|.*\|) \w+ \|$', row, readme)


def test_minutes_are_those_of_the_notebooks():
    "[fails when a notebook grows by two pages]"
    assert with_minutes(README) == README and README.count('| minutes |') == 2


PICTURE = ROOT/'nbs'/'images'/'toy.png'

def study_picture():
    "The first figure of the study's page, as that notebook has drawn it"
    cells = json.loads((ROOT/'nbs'/'studies'/'toy.ipynb').read_text(encoding='utf-8'))['cells']
    return next(b64decode(''.join(o['data']['image/png'])) for c in cells for o in c.get('outputs', [])
                if 'image/png' in o.get('data', {}))


def test_the_picture_is_the_studys():
    "[fails when the study's page is drawn again and README keeps the old picture]"
    assert PICTURE.read_bytes() == study_picture()


def test_local_links_exist():
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', README): assert (ROOT/target).exists(), target


def toy_rows():
    "README's table of the toy world, from the study's file"
    import pandas as pd
    from mpo_nb.study import paired_row
    df = pd.read_parquet(ROOT/'mpo_nb'/'saved'/'toy.parquet')
    scores = df.pivot(index='seed', columns='policy', values='score')
    means, rows = df.groupby('policy')[['kl', 'seconds']].mean(), []
    for p in ('sft', 'dpo_easy', 'dpo', 'ppo', 'mpo'):
        d = paired_row(scores.mpo, scores[p]) if p != 'mpo' else None
        against = f"{d['diff']:.2f} ({d['low']:.2f} to {d['high']:.2f})" if d else ''
        rows.append(f'| {p} | {scores[p].mean():.2f} | {scores[p].std():.2f} | {scores[p].min():.2f} | '
                    f'{means.kl[p]:.1f} | {means.seconds[p]:.0f} | {against} |')
    return rows


def compared(study):
    "Comparisons of a study, one family"
    import pandas as pd
    from mpo_nb.cells import load_study
    from mpo_nb.study import compare_policies
    return compare_policies(load_study(study), pd.read_parquet(ROOT/'mpo_nb'/'saved'/f'{study}.parquet'))


def toy_verdicts():
    "What the study allows to say"
    from mpo_nb.study import verdict
    return [f'- {verdict(row)}' for _, row in compared('toy').iterrows()]


PARTS = [('mpo', 'mpo_ref_sft'), ('ppo_hard', 'ppo_ref_dpo'), ('mpo', 'ppo_hard'), ('mpo', 'mpo_from_random'),
         ('mpo', 'mpo_all'), ('dpo_on_easy', 'dpo_on_random'), ('mpo', 'mixdpo'), ('mpo', 'ppo_then_dpo')]


def claims_verdicts():
    "Of the comparisons with controls, one for each part of MPO"
    from mpo_nb.study import verdict
    rows = compared('claims').set_index(['a', 'b'], drop=False)
    return [f'- {verdict(rows.loc[pair])}' for pair in PARTS]


def after_verdicts():
    "MPO without its split"
    from mpo_nb.study import verdict
    return [f'- {verdict(row)}' for _, row in compared('after').iterrows()]


def test_results_are_those_of_the_study():
    "Table and verdicts are what `mpo study toy` gave on seeds that no tuning has seen [fails when a number is changed]"
    import pandas as pd
    from mpo_nb.cells import load_study
    for line in toy_rows() + toy_verdicts() + claims_verdicts() + after_verdicts(): assert line in README
    seeds = set(pd.read_parquet(ROOT/'mpo_nb'/'saved'/'toy.parquet').seed)
    assert len(seeds) >= 8 and not seeds & set(load_study('toy').tuned_on)
    assert f'{len(seeds)} seeds' in README


def test_the_first_screen_says_what_the_study_says():
    "Before any command [fails when the study's differences turn, and README's sentence stays]"
    import pandas as pd
    from mpo_nb.study import paired_row
    table = compared('toy')
    diff = table[table.p_holm < .05].set_index(['a', 'b'])['diff']
    assert diff['mpo', 'ppo'] > 0 > diff['mpo', 'dpo'] and diff['ppo', 'dpo'] < 0
    said = ' '.join(README[:README.index('## Two commands')].split())
    saved = {k: pd.read_parquet(ROOT/'mpo_nb'/'saved'/f'{k}.parquet') for k in ('toy', 'claims', 'after')}
    scores = {k: d.pivot(index='seed', columns='policy', values='score') for k, d in saved.items()}
    for study, a, b in (('toy', 'dpo', 'mpo'), ('after', 'dpo', 'mpo'), ('toy', 'mpo', 'ppo'), ('after', 'mpo', 'ppo'),
                        ('claims', 'dpo_easy', 'dpo_random'), ('after', 'dpo_ppo_hard', 'dpo')):
        d = paired_row(scores[study][a], scores[study][b])
        assert f"{d['diff']:.2f} ({d['low']:.2f} to {d['high']:.2f})" in ' '.join(README.split()), (study, a, b)
    assert (scores['after'].dpo_ppo_hard > scores['after'].dpo).all()


def test_when_which_is_ahead():
    from mpo_nb.study import compare_policies, join_studies
    from mpo_nb.cells import load_study
    said = ' '.join(README.split())
    shown = dict(labels_65='ppo', reward_500='dpo', labels_95='dpo', oracle='dpo', near='ppo')
    for name in ('when', 'when_settings'):
        df = join_studies([ROOT/'mpo_nb'/'saved'/f'{name}.parquet'])
        for _, r in compare_policies(load_study(name), df).iterrows():
            if shown.get(r.variant) == r.b:
                text = f"{r['diff']:+.2f} ({r.low:.2f} to {r.high:.2f})"
                assert text in said, (r.variant, text)
    assert 'MPO is ahead of PPO, and plain DPO on all pairs is ahead of both' in said
    claims = compared('claims').set_index(['a', 'b'])
    helps = claims[claims.p_holm < .05]['diff']
    assert helps['mpo', 'mpo_ref_sft'] > 0 > helps['ppo_hard', 'ppo_ref_dpo']
    assert 'the DPO model as PPO\'s KL reference helps' in said
    split = [('dpo_on_easy', 'dpo_on_random'), *[('mpo', f'mpo_{k}') for k in ('all', 'random', 'from_random')]]
    assert not any(helps.get(pair, 0) > 0 for pair in split) and 'for the split by reward gap we found no gain' in said


if __name__ == '__main__':   # brings picture and minutes up to date, and prints the numbers to be written
    PICTURE.write_bytes(study_picture())
    (ROOT/'README.md').write_text(with_minutes(README), encoding='utf-8')
    print(*toy_rows(), *toy_verdicts(), *claims_verdicts(), *after_verdicts(), sep='\n')
