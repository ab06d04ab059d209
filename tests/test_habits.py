"""What a user of TRL is used to, and finds here too: one habit a row, on the smallest random model.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy
import json
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from mpo_nb.core import UserError
from mpo_nb.dpo import DPOConfig, DPOTrainer, NotTaken
from mpo_nb.training import quiet, trainer_defaults
from test_pairs import by_hand, encoded
from util import distance, dpo_trainer, letters, logged, tiny, toy_pairs, toy_prompts, toy_tokenizer, weights

pytestmark = pytest.mark.usefixtures('own_random_state')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A saved model with its tokenizer"
    path = tmp_path_factory.mktemp('saved')/'my-model'
    with quiet(): tiny().save_pretrained(path), toy_tokenizer().save_pretrained(path)
    return path

@pytest.fixture
def args(tmp_path):
    return lambda **kw: DPOConfig(**trainer_defaults(**dict(
        output_dir=str(tmp_path/'out'), max_steps=1, per_device_train_batch_size=4, cache_reference=False) | kw))


# ---- the model

MODELS = {
    'a folder': lambda f: dict(model=str(f)), 'a path': lambda f: dict(model=f),
    'a model': lambda f: dict(model=tiny(), processing_class=toy_tokenizer()),
    'a loaded model without tokenizer': lambda f: dict(model=type(tiny()).from_pretrained(f)),
    'a folder and a tokenizer': lambda f: dict(model=str(f), processing_class=toy_tokenizer()),
    'a folder and a reference model': lambda f: dict(model=str(f), ref_model=tiny()),
    'a folder for both': lambda f: dict(model=str(f), ref_model=str(f))}

@pytest.mark.parametrize('how', MODELS)
def test_a_model_may_be(how, folder, args):
    "It trains, and its first loss is ln 2 [fails when the string isn't loaded, and when the tokenizer isn't found]"
    t = DPOTrainer(**MODELS[how](folder), args=args(logging_steps=1), train_dataset=toy_pairs())
    t.train()
    assert logged(t, 'loss')[0] == pytest.approx(np.log(2), abs=1e-6)
    assert t.processing_class.get_vocab() == toy_tokenizer().get_vocab()


@pytest.mark.parametrize('kw, dtype', [({}, torch.float32), (dict(dtype='bfloat16'), torch.bfloat16),
                                       (dict(dtype=torch.float16), torch.float16)])
def test_model_init_kwargs_reach_the_loader(kw, dtype, folder, args):
    "[fails when they are dropped]"
    t = DPOTrainer(str(folder), args=args(model_init_kwargs=kw or None), train_dataset=toy_pairs())
    assert t.model.dtype == dtype


@pytest.mark.parametrize('wrong, says', [
    (lambda f, a: dict(model=tiny(), args=a(model_init_kwargs=dict(dtype='bfloat16'))), 'loaded already'),
    (lambda f, a: dict(model=tiny(), args=a(), quantization_config=object()), 'loaded already'),
    (lambda f, a: dict(model=tiny(), args=a()), 'processing_class'),
    (lambda f, a: dict(model=str(f/'nowhere'), args=a()), 'could not be loaded'),
    (lambda f, a: dict(model=str(f), args=a(model_init_kwargs=dict(trust_remote_code=True))), 'never run'),
    (lambda f, a: dict(model=str(f), args=a(pad_token='<nothing>')), 'not in the vocabulary'),
    (lambda f, a: dict(model=str(f), args=a(reference_free=True), ref_model=tiny()), 'no model'),
    (lambda f, a: dict(model=str(f), args=a(), data_collator=list), 'data_collator')])
def test_what_cannot_be_is_said(wrong, says, folder, args):
    "[fails when the check is left out]"
    with pytest.raises(UserError, match=says): DPOTrainer(train_dataset=toy_pairs(), **wrong(folder, args))


def test_args_may_be_left_out(folder, tmp_path, monkeypatch):
    "The folder is named after the model, in the working directory [fails when `args` is needed]"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path))
    t = DPOTrainer(str(folder), train_dataset=toy_pairs())
    assert t.args.output_dir == 'my-model-DPO' and isinstance(t.args, DPOConfig)


def test_arguments_stand_in_the_order_of_trl():
    "By position [fails when one is moved]"
    import inspect
    from trl import DPOTrainer as TRLTrainer
    ours, theirs = (list(inspect.signature(c.__init__).parameters) for c in (DPOTrainer, TRLTrainer))
    assert ours[:len(theirs)] == theirs


def test_everything_by_position(folder, args):
    "[fails when the collator's place is taken by the data]"
    t = DPOTrainer(tiny(), tiny(seed=2), args(), None, toy_pairs(), toy_pairs(3), toy_tokenizer())
    assert (len(t.train_dataset), len(t.eval_dataset)) == (8, 3)


@pytest.mark.parametrize('pad, want', [(None, '<eos>'), ('<word>', '<word>')])
def test_a_tokenizer_without_pad(pad, want, args):
    "Gets EOS, or what is asked for, and trains alike [fails when the tokenizer is refused]"
    tok = copy.deepcopy(toy_tokenizer())
    tok.pad_token = None
    word = tok.convert_ids_to_tokens(7)
    pad, want = word if pad else None, word if pad else tok.eos_token
    a, b = (DPOTrainer(tiny(), args=args(pad_token=p), train_dataset=toy_pairs(), processing_class=t)
            for p, t in ((pad, tok), (None, toy_tokenizer())))
    for t in (a, b): t.train()
    assert tok.pad_token == want and distance(weights(a.model), weights(b.model)) < 1e-6


# ---- the data

TEMPLATE = (r"{% for t in tools or [] %}{{ t.name }}{% endfor %}{% if loud %}{{ ' cats' }}{% endif %}"
            r"{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}")

def text_pairs(): return toy_pairs(4)
def whole_texts():
    return Dataset.from_list([dict(chosen=r['prompt'] + r['chosen'], rejected=r['prompt'] + r['rejected'])
                              for r in toy_pairs(4)])
def chat_pairs():
    says = lambda role, text: [dict(role=role, content=text)]
    return Dataset.from_list([dict(prompt=says('user', r['prompt']), chosen=says('assistant', r['chosen']),
                                   rejected=says('assistant', r['rejected'])) for r in toy_pairs(4)])
def chat_tokenizer():
    "Its template writes what was said, and EOS behind answers"
    tok = copy.deepcopy(toy_tokenizer())
    tok.chat_template = TEMPLATE
    return tok
def whole_chats():
    return Dataset.from_list([dict(chosen=r['prompt'] + r['chosen'], rejected=r['prompt'] + r['rejected'])
                              for r in chat_pairs()])
def streamed(make): return lambda: make().to_iterable_dataset()

DATA = {'text': text_pairs, 'text without prompt': whole_texts, 'chat': chat_pairs, 'chat without prompt': whole_chats}
DATA |= {f'a stream of {k}': streamed(v) for k, v in DATA.items()}

@pytest.mark.parametrize('what', DATA)
@pytest.mark.parametrize('where', ['train', 'eval'])
def test_data_may_be(what, where, args):
    """All forms train the same model from the same ids [fails when the prompt isn't found, and when a stream
    isn't read]"""
    kw = dict(train_dataset=DATA[what]()) if where == 'train' else dict(train_dataset=text_pairs(),
                                                                        eval_dataset=DATA[what]())
    tok = chat_tokenizer() if 'chat' in what else toy_tokenizer()
    if 'chat' in what: kw.setdefault('eval_dataset', None)
    if 'chat' in what and where == 'eval': kw['train_dataset'] = chat_pairs()
    t = DPOTrainer(tiny(), args=args(logging_steps=1), processing_class=tok, **kw)
    got = t.train_dataset if where == 'train' else t.eval_dataset
    want = encoded(text_pairs())
    for k in ('chosen', 'rejected'):   # where the prompt ends may differ, what is read may not
        assert [r['prompt_ids'] + r[f'{k}_ids'] for r in got] == [r['prompt_ids'] + r[f'{k}_ids'] for r in want]
    loss = t.evaluate()['eval_loss'] if where == 'eval' else (t.train(), logged(t, 'loss')[0])[1]
    assert loss == pytest.approx(np.log(2), abs=1e-6)


def test_a_stream_is_read_as_far_as_the_steps_go(args):
    "3 steps of 4 pairs from an endless stream; without max_steps: an error [fails when it is read to its end]"
    from datasets import IterableDataset
    rows = list(toy_pairs())
    def endless():
        while True: yield from rows
    stream = IterableDataset.from_generator(endless)
    t = DPOTrainer(tiny(), args=args(max_steps=3), train_dataset=stream, processing_class=toy_tokenizer())
    assert len(t.train_dataset) == 12
    with pytest.raises(UserError, match='max_steps'):
        DPOTrainer(tiny(), args=args(max_steps=-1), train_dataset=stream, processing_class=toy_tokenizer())


@pytest.mark.parametrize('more, starts', [
    ({}, ''), (dict(tools=[dict(name=' dogs')]), ' dogs'), (dict(tools=json.dumps([dict(name=' dogs')])), ' dogs'),
    (dict(chat_template_kwargs=dict(loud=True)), ' cats'),
    (dict(tools=[dict(name=' dogs')], chat_template_kwargs=dict(loud=True)), ' dogs cats')],
    ids=['nothing', 'tools', 'tools as JSON', 'chat_template_kwargs', 'both'])
def test_columns_for_the_chat_template(more, starts, args):
    "[fails when a column doesn't reach the template]"
    tok = chat_tokenizer()
    row = dict(prompt=[dict(role='user', content=' meow')], chosen=[dict(role='assistant', content=' cats')],
               rejected=[dict(role='assistant', content=' mice')])
    t = DPOTrainer(tiny(), args=args(), train_dataset=Dataset.from_list([row | more]), processing_class=tok)
    assert tok.decode(t.train_dataset[0]['prompt_ids']).split() == (starts + ' meow').split()


@pytest.mark.parametrize('rows, says', [
    ([dict(chosen='yes', rejected='no')], 'row 0'),
    ([dict(chosen='a b', rejected='a c'), dict(chosen='so it is', rejected='so it is')], 'row 1')])
def test_pairs_without_any_prompt_are_named(rows, says, args):
    "[fails when a prompt may be empty, and when an answer may]"
    with pytest.raises(UserError, match=says):
        DPOTrainer(tiny(), args=args(), train_dataset=Dataset.from_list(rows), processing_class=toy_tokenizer())


# ---- evaluation

SETS = {'one': lambda: toy_pairs(3), 'a dict': lambda: dict(near=toy_pairs(3), far=toy_pairs(2, seed=3)),
        'a DatasetDict': lambda: DatasetDict(near=toy_pairs(3), far=toy_pairs(2, seed=3)),
        'a stream': lambda: toy_pairs(3).to_iterable_dataset(),
        'a dict with a stream': lambda: dict(near=toy_pairs(3).to_iterable_dataset(), far=toy_pairs(2, seed=3))}

def hand_loss(policy, ref, ds):
    with torch.no_grad(): (pc, pr), (rc, rr) = by_hand(policy, encoded(ds)), by_hand(ref, encoded(ds))
    return -torch.nn.functional.logsigmoid(.1 * (pc - rc - pr + rr)).mean().item()

@pytest.mark.parametrize('late', [False, True], ids=['at the start', 'at evaluate'])
@pytest.mark.parametrize('how', SETS)
def test_evaluation_sets_may_be(how, late, tmp_path):
    """Each with a loss of its own, by hand, and rewards under its name [fails when sets are mixed up, when new ones
    get no reference, and when rewards of one set stand under the name of another]"""
    policy, ref = tiny(seed=1), tiny(seed=2)
    t = dpo_trainer(tmp_path, policy, ref, trainer={} if late else dict(eval_dataset=SETS[how]()))
    got = t.evaluate(SETS[how]()) if late else t.evaluate()
    sets = dict(eval=toy_pairs(3)) if 'dict' not in how.lower() else dict(eval_near=toy_pairs(3),
                                                                          eval_far=toy_pairs(2, seed=3))
    for name, ds in sets.items():
        assert got[f'{name}_loss'] == pytest.approx(hand_loss(policy, ref, ds), abs=1e-4)
        with torch.no_grad(): want = .1 * (by_hand(policy, encoded(ds))[0] - by_hand(ref, encoded(ds))[0]).mean()
        assert logged(t, f'{name}_rewards/chosen')[-1] == pytest.approx(want.item(), abs=1e-4)


@pytest.mark.parametrize('how', ['ref_model', 'peft_config', 'reference_free', 'nothing', 'shared weights'])
def test_a_new_evaluation_set_after_training(how, tmp_path):
    """With a reference that is still there: right; without: a sentence, never the trained policy as reference
    [fails when the check is left out]"""
    from peft import LoraConfig
    start, ref, new = tiny(seed=1), tiny(seed=2), toy_pairs(3, seed=5)
    extra = dict(trainer=dict(peft_config=LoraConfig(r=2, task_type='CAUSAL_LM', target_modules=['q_proj']))
                 ) if how == 'peft_config' else dict(reference_free=True) if how == 'reference_free' else {}
    policy = copy.deepcopy(start)
    given = {'ref_model': ref, 'shared weights': copy.copy(policy)}.get(how)
    t = dpo_trainer(tmp_path, policy, given, learning_rate=.5, max_steps=3, **extra)
    t.train()
    if how in ('nothing', 'shared weights'):
        with pytest.raises(UserError, match='trained since'): t.evaluate(new)
        return
    got = t.evaluate(new)['eval_loss']
    with torch.no_grad(): (pc, pr) = by_hand(t.model.eval(), encoded(new))
    with torch.no_grad(): (rc, rr) = by_hand(ref if how == 'ref_model' else start, encoded(new))
    if how == 'reference_free': rc, rr = torch.zeros(3), torch.zeros(3)
    assert got == pytest.approx(-torch.nn.functional.logsigmoid(.1 * (pc - rc - pr + rr)).mean().item(), abs=1e-4)


def test_compute_metrics_sees_the_rewards(tmp_path):
    "Of every pair, chosen and rejected [fails when it isn't called, and when the columns are exchanged]"
    seen, policy, ref = [], tiny(seed=1), tiny(seed=2)
    def metrics(p):
        seen.append(p.predictions)
        return dict(share=(p.predictions[:, 0] > p.predictions[:, 1]).mean())
    t = dpo_trainer(tmp_path, policy, ref, trainer=dict(eval_dataset=toy_pairs(5), compute_metrics=metrics),
                    per_device_eval_batch_size=2)
    got = t.evaluate()
    rows = encoded(toy_pairs(5))
    with torch.no_grad(): (pc, pr), (rc, rr) = by_hand(policy, rows), by_hand(ref, rows)
    want = np.stack([.1 * (pc - rc), .1 * (pr - rr)], 1)
    order = lambda x: x[np.lexsort(x.T)]
    np.testing.assert_allclose(order(seen[0]), order(want), atol=1e-4)
    assert got['eval_share'] == pytest.approx((want[:, 0] > want[:, 1]).mean())


# ---- what a trainer has

def test_ref_model_is_an_attribute(tmp_path):
    "[fails when it isn't kept]"
    ref = tiny(seed=2)
    assert dpo_trainer(tmp_path, tiny(), ref).ref_model is ref and dpo_trainer(tmp_path, tiny()).ref_model is None


def test_tags_and_card(folder, args):
    "Say what it is and with which loss [fails when the model gets no tags, and when a setting is left out of the card]"
    t = DPOTrainer(str(folder), args=args(beta=.25, loss_type=['sigmoid', 'sft']), train_dataset=toy_pairs())
    t.create_model_card('named', tags='mine')
    card = open(f'{t.args.output_dir}/README.md', encoding='utf-8').read()
    assert {'mpo_nb', 'dpo'} <= set(t.model.model_tags)
    for said in ('# named', '- mpo_nb', '- dpo', '- mine', '| `beta` | 0.25 |', 'sft', '8 rows', 'arXiv 2305.18290'):
        assert said in card, said


# ---- PEFT

def lora(**kw):
    from peft import LoraConfig
    return LoraConfig(r=2, task_type='CAUSAL_LM', **dict(target_modules=['q_proj', 'v_proj']) | kw)

def prompt_tuning():
    from peft import PromptTuningConfig
    return PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3)

def prefix_tuning():
    from peft import PrefixTuningConfig
    return PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3)

PEFTS = {'LoRA': lora, 'DoRA': lambda: lora(use_dora=True), 'rsLoRA': lambda: lora(use_rslora=True),
         'all linear layers': lambda: lora(target_modules='all-linear'),
         'prompt tuning': prompt_tuning, 'prefix tuning': prefix_tuning}

@pytest.mark.parametrize('kind', PEFTS)
@pytest.mark.parametrize('how', ['config', 'PeftModel'])
def test_peft_in_every_form(kind, how, tmp_path):
    """Only the adapter is trained, and the reference is the model as handed over: the kept log-probs are the model's
    own, by hand [fails when the base is trained, and when the reference is another]"""
    from peft import get_peft_model
    base = tiny(seed=1)
    config = PEFTS[kind]()
    model, extra = (base, dict(peft_config=config)) if how == 'config' else (get_peft_model(base, config), {})
    before = tiny(seed=1).state_dict()
    t = dpo_trainer(tmp_path, model, trainer=extra, learning_rate=.5, max_steps=2)
    with torch.no_grad(): want = by_hand(tiny(seed=1), encoded())[0]
    if 'p' != kind[0] or how == 'config':   # virtual tokens change a model from the start
        assert t.train_dataset['ref_chosen'][:] == pytest.approx(want.tolist(), abs=1e-3)
    start = {k: v.detach().clone() for k, v in t.model.named_parameters() if v.requires_grad}
    t.train()
    moved = {k: (v - start[k]).abs().max().item() for k, v in t.model.named_parameters() if k in start}
    assert max(moved.values()) > 1e-5 and all('lora' in k or 'prompt' in k for k in moved)
    after = t.model.get_base_model().state_dict()
    assert all(torch.equal(before[k.replace('base_layer.', '')], v) for k, v in after.items() if 'lora' not in k)


@pytest.mark.parametrize('base', ['llama', 'gpt2'])
@pytest.mark.parametrize('kind', [prompt_tuning, prefix_tuning])
def test_virtual_tokens_train_as_by_trl(kind, base, tmp_path):
    """Three steps of a PeftModel against another reference: TRL's losses [fails when padding stands between virtual
    tokens and prompt, and when the places of the answers count virtual tokens]"""
    from peft import get_peft_model
    from trl import DPOConfig as TRLConfig, DPOTrainer as TRLTrainer
    from mpo_nb.sampling import seeded
    with seeded(0): model = get_peft_model(tiny(base, seed=1), kind())
    kw = dict(max_steps=3, per_device_train_batch_size=8, learning_rate=1., lr_scheduler_type='constant', optim='sgd',
              max_grad_norm=0., logging_steps=1, max_length=None)
    ours = dpo_trainer(tmp_path, copy.deepcopy(model), tiny(base, seed=2), **kw)
    with quiet(), seeded(0):
        theirs = TRLTrainer(model, tiny(base, seed=2), TRLConfig(**trainer_defaults(output_dir=str(tmp_path), **kw)),
                            train_dataset=toy_pairs(), processing_class=toy_tokenizer())
        theirs.train()
    ours.train()
    assert logged(ours, 'loss') == pytest.approx(logged(theirs, 'loss'), abs=1e-5)
    assert abs(logged(ours, 'loss')[2] - logged(ours, 'loss')[0]) > 1e-4
    with pytest.raises(UserError, match='virtual') if kind is prompt_tuning else nullcontext():
        dpo_trainer(tmp_path, copy.deepcopy(model), tiny(base, seed=2), ld_alpha=.5)


# ---- PPO and the reward model

@pytest.mark.parametrize('how', ['a folder', 'a path', 'a loaded model without tokenizer', 'a folder for both'])
def test_ppo_takes_the_model_as(how, folder, tmp_path):
    "The same rollout as from the loaded model [fails when the string isn't loaded, and when the tokenizer isn't found]"
    from mpo_nb.ppo_config import PPOConfig
    from mpo_nb.ppo_trainer import PPOTrainer
    runs = []
    for kw in (MODELS[how](folder), dict(model=tiny(), processing_class=toy_tokenizer())):
        args = PPOConfig(**trainer_defaults(output_dir=str(tmp_path), num_rollouts=1, rollout_batch_size=4,
                                            num_ppo_epochs=1, per_device_train_batch_size=4, max_new_tokens=4))
        t = PPOTrainer(reward=letters, args=args, train_dataset=Dataset.from_dict(dict(prompt=toy_prompts(4))), **kw)
        t.train()
        runs.append([l['objective/score'] for l in t.state.log_history if 'objective/score' in l])
    assert runs[0] == runs[1] and runs[0]


@pytest.mark.parametrize('how', ['model', 'folder', 'folder without tokenizer', 'without prompt'])
def test_train_reward_takes(how, folder, tmp_path):
    "The same scores from each [fails when the tokenizer isn't found, and when whole dialogues aren't split]"
    from mpo_nb.reward import train_reward
    model, tok = (tiny(), toy_tokenizer()) if how in ('model', 'without prompt') else (str(folder), toy_tokenizer())
    if 'without tokenizer' in how: tok = None
    data = whole_texts() if how == 'without prompt' else text_pairs()
    kw = dict(max_steps=1, per_device_train_batch_size=4)
    reward, _ = train_reward(model, tok, data, **kw)
    want, _ = train_reward(tiny(), toy_tokenizer(), text_pairs(), **kw)
    rows = text_pairs()
    got, want = (r(rows['prompt'][:], rows['chosen'][:]) for r in (reward, want))
    assert list(got) == pytest.approx(list(want), abs=1e-5)


# ---- the keys

def test_every_key_of_trl_is_known():
    "Supported, or refused with a sentence [fails when TRL gets a new key]"
    from trl import DPOConfig as TRLConfig
    theirs = {f.name for f in fields(TRLConfig)} - {f.name for f in fields(TrainingArguments)}
    ours = {f.name: f.metadata.get('help', '') for f in fields(DPOConfig)}
    assert theirs and theirs <= set(ours) and all(len(ours[k]) > 15 for k in theirs)


REFUSED = dict(trust_remote_code=True, router_aux_loss_coef=.1, disable_dropout=False, dataset_num_proc=2,
               padding_free=True, pad_to_multiple_of=8, precompute_ref_log_probs=False, activation_offloading=True,
               sync_ref_model=True, ref_model_mixup_alpha=.5, ref_model_sync_steps=10, truncation_mode='keep_end')

@pytest.mark.parametrize('key', REFUSED)
def test_a_key_that_is_not_supported_is_refused(key, args):
    "By name [fails when it is accepted and ignored]"
    assert {f.name for f in fields(NotTaken)} <= set(REFUSED)
    with pytest.raises(UserError, match=key): args(**{key: REFUSED[key]})


def test_trls_way_to_fit_a_pair(tmp_path):
    """keep_start cuts answers to what the prompt leaves, max_completion_length to a number; both at once
    [fails when a key is ignored]"""
    whole = encoded()
    longest = max(len(r['prompt_ids']) for r in whole) + 3
    for kw, room in ((dict(max_length=longest, truncation_mode='keep_start'), lambda r: longest - len(r['prompt_ids'])),
                     (dict(max_completion_length=2), lambda r: 2),
                     (dict(max_completion_length=4, max_length=longest, truncation_mode='keep_start'),
                      lambda r: min(4, longest - len(r['prompt_ids'])))):
        got = dpo_trainer(tmp_path, **kw).train_dataset
        assert got['chosen_ids'][:] == [r['chosen_ids'][:room(r)] for r in whole]
    full = len(whole[0]['prompt_ids'])
    with pytest.raises(UserError, match='max_length'):
        dpo_trainer(tmp_path, pairs=toy_pairs(1), max_length=full, truncation_mode='keep_start')


def test_reference_free(tmp_path):
    "Log-probs count against 0 [fails when the key is ignored]"
    policy = tiny(seed=1)
    t = dpo_trainer(tmp_path, policy, reference_free=True, learning_rate=0.)
    t.train()
    with torch.no_grad(): pc, pr = by_hand(policy, encoded())
    want = -torch.nn.functional.logsigmoid(.1 * (pc - pr)).mean().item()
    assert logged(t, 'loss')[0] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize('size', [2, 5])
def test_precompute_ref_batch_size(size, tmp_path, monkeypatch):
    "Is that of the reference pass [fails when it is ignored]"
    seen = []
    def count(*a):
        seen.append(a[3])
        return np.zeros((len(a[1]), 2))
    monkeypatch.setattr('mpo_nb.dpo.all_logps', count)
    dpo_trainer(tmp_path, precompute_ref_batch_size=size)
    assert seen == [size]
