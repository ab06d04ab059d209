"""What a user of TRL is used to in its PPO trainer and reward training, and finds here too: one habit a row.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from mpo_nb.core import UserError
from mpo_nb.ppo_config import PPOConfig, TRLNames
from mpo_nb.ppo_trainer import TRL_ARGUMENTS, PPOTrainer
from mpo_nb.reward import RewardModel, reward_model_from
from mpo_nb.training import quiet, trainer_defaults
from test_habits import chat_tokenizer, streamed
from util import letters, logged, talker, tiny, toy_pairs, toy_prompts, toy_tokenizer, weights

pytestmark = pytest.mark.usefixtures('own_random_state')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A saved policy with its tokenizer, and a saved reward model"
    path = tmp_path_factory.mktemp('saved')
    reward = RewardModel(reward_model_from(tiny(), toy_tokenizer(), seed=1), toy_tokenizer())
    with quiet():
        talker().save_pretrained(path/'my-model'), toy_tokenizer().save_pretrained(path/'my-model')
        reward.save(path/'reward')
    return SimpleNamespace(policy=path/'my-model', reward=path/'reward', model=reward)

@pytest.fixture
def args(tmp_path):
    return lambda **kw: PPOConfig(**trainer_defaults(**dict(
        output_dir=str(tmp_path/'out'), num_rollouts=1, rollout_batch_size=4, num_ppo_epochs=1, max_new_tokens=4,
        per_device_train_batch_size=4, optim='sgd') | kw))

def prompts(n=4): return Dataset.from_dict(dict(prompt=toy_prompts(n)))

def trained(**kw):
    "A trainer that has made its rollout"
    t = PPOTrainer(**dict(reward=letters, train_dataset=prompts()) | kw)
    t.train()
    return t


# ---- models and rewards

MODELS = {
    'a folder': lambda f: dict(model=str(f.policy)), 'a path': lambda f: dict(model=f.policy),
    'a model': lambda f: dict(model=talker(), processing_class=toy_tokenizer()),
    'a loaded model without tokenizer': lambda f: dict(model=type(talker()).from_pretrained(f.policy)),
    'a folder and a reference model': lambda f: dict(model=str(f.policy), ref_model=talker()),
    'a folder for both': lambda f: dict(model=str(f.policy), ref_model=str(f.policy))}

@pytest.mark.parametrize('how', MODELS)
def test_a_model_may_be(how, folders, args):
    "It trains, and is its reference at the start [fails when the string isn't loaded]"
    t = trained(**MODELS[how](folders), args=args())
    other = how == 'a folder and a reference model'
    assert (abs(logged(t, 'objective/kl')[0]) > .1) == other

REWARDS = {
    'a reward model': lambda f: f.model, 'its folder': lambda f: str(f.reward), 'its path': lambda f: f.reward,
    'a rule': lambda f: letters, 'numbers of numpy': lambda f: lambda p, c: np.array(letters(p, c)),
    'a tensor': lambda f: lambda p, c: torch.tensor(letters(p, c)), 'whole numbers': lambda f: lambda p, c: [1]*len(c),
    'truth values': lambda f: lambda p, c: [x > 0 for x in letters(p, c)],
    'several with weights': lambda f: [(1., letters), (.5, f.model)],
    'a folder with a weight': lambda f: [(1., str(f.reward)), (0., letters)]}

@pytest.mark.parametrize('what', REWARDS)
def test_a_reward_may_be(what, folders, args):
    "[fails when a folder isn't loaded, and when numbers aren't made a tensor]"
    t = trained(model=str(folders.policy), reward=REWARDS[what](folders), args=args())
    assert np.isfinite(logged(t, 'objective/score')[0])

def test_a_folder_scores_as_its_model(folders, args):
    "[fails when a weight is lost]"
    a, b, c = (logged(trained(model=str(folders.policy), reward=r, args=args()), 'objective/score')[0]
               for r in (folders.model, str(folders.reward), [(1., str(folders.reward)), (0., letters)]))
    assert a == b == pytest.approx(c, abs=1e-6)

CRITICS = {'left out': lambda f: None, 'a reward model': lambda f: f.model, 'its folder': lambda f: str(f.reward),
           'a model with one label': lambda f: reward_model_from(tiny(), toy_tokenizer(), seed=2)}

@pytest.mark.parametrize('what', CRITICS)
def test_a_critic_may_be(what, folders, args):
    "[fails when a folder isn't loaded]"
    t = trained(model=str(folders.policy), value_model=CRITICS[what](folders), args=args())
    assert t.model.critic is not None and 'val/explained_variance' in t.state.log_history[0]

@pytest.mark.parametrize('kw, dtype', [({}, torch.float32), (dict(dtype='bfloat16'), torch.bfloat16)])
def test_model_init_kwargs_reach_the_loader(kw, dtype, folders, args):
    "[fails when they are dropped]"
    t = PPOTrainer(str(folders.policy), None, letters, args=args(model_init_kwargs=kw or None), train_dataset=prompts())
    assert t.policy.dtype == dtype

def test_args_may_be_left_out(folders, tmp_path, monkeypatch):
    "One pass over the prompts, in a folder named after the model [fails when `args` is needed]"
    monkeypatch.chdir(tmp_path)
    t = PPOTrainer(str(folders.policy), reward=letters, train_dataset=prompts(130))
    assert (t.args.output_dir, t.args.num_rollouts) == ('my-model-PPO', math.ceil(t.args.num_train_epochs*130/64))

def test_a_tokenizer_without_pad(args):
    "Gets EOS [fails when it is refused]"
    tok = copy.deepcopy(toy_tokenizer())
    tok.pad_token = None
    t = trained(model=talker(), processing_class=tok, args=args())
    assert t.processing_class.pad_token == tok.eos_token

def test_optimizers_and_callbacks_are_trainers(folders, args):
    "[fails when they are not passed on]"
    steps = []
    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): steps.append(state.global_step)
    lr = lambda m: (torch.optim.SGD(m.parameters(), lr=0.), None)
    model = talker()
    before = weights(model)
    t = PPOTrainer(model, None, letters, args=args(num_ppo_epochs=3), train_dataset=prompts(), callbacks=[Count()],
                   processing_class=toy_tokenizer(), optimizers=lr(model))
    t.train()
    assert steps == [1, 2, 3] and all(torch.equal(v, before[k]) for k, v in weights(t.policy).items())


# ---- data

def chats():
    return Dataset.from_dict(dict(prompt=[[dict(role='user', content=p)] for p in toy_prompts(4)]))
def whole_texts():
    return Dataset.from_list([dict(chosen=r['prompt'] + r['chosen'], rejected=r['prompt'] + r['rejected'])
                              for r in toy_pairs(4)])
def with_tools(): return chats().add_column('tools', ['[{"name": " cats"}]']*4)
def with_kwargs(): return chats().add_column('chat_template_kwargs', [dict(loud=True)]*4)

DATA = {'text': prompts, 'preference pairs': lambda: toy_pairs(4), 'pairs without prompt': whole_texts, 'chats': chats,
        'chats with tools': with_tools, 'chats with template keywords': with_kwargs}
DATA |= {f'a stream of {k}': streamed(v) for k, v in DATA.items()}

@pytest.mark.parametrize('what', DATA)
@pytest.mark.parametrize('where', ['train', 'eval'])
def test_data_may_be(what, where, args):
    "[fails when a stream has no length, and when a prompt isn't found]"
    t = PPOTrainer(talker(), None, letters, args=args(), train_dataset=DATA[what]() if where == 'train' else prompts(),
                   eval_dataset=DATA[what]() if where == 'eval' else None, processing_class=chat_tokenizer())
    ds = t.train_dataset if where == 'train' else t.eval_dataset
    assert len(ds) == 4 and all(isinstance(p, str) for p in ds['prompt'])
    assert all(' cats' in p for p in ds['prompt']) or 'chats with' not in what
    if where == 'eval': assert np.isfinite(t.evaluate()['eval_objective/score'])

def test_a_stream_without_end_gives_what_the_rollouts_need(args):
    "[fails when all of it is read]"
    from datasets import IterableDataset
    def endless():
        i = 0
        while True: yield dict(prompt=toy_prompts(4)[i % 4]); i += 1
    ds = IterableDataset.from_generator(endless)
    t = PPOTrainer(talker(), None, letters, args=args(num_rollouts=3), train_dataset=ds,
                   processing_class=toy_tokenizer())
    assert len(t.train_dataset) == 12
    with pytest.raises(UserError, match='say in num_rollouts'):
        PPOTrainer(talker(), None, letters, args=args(num_rollouts=None), train_dataset=ds,
                   processing_class=toy_tokenizer())

def test_several_evaluation_sets(args):
    "Each has its name in front of its numbers [fails when one is left out]"
    sets = dict(a=prompts(2), b=prompts(3))
    t = PPOTrainer(talker(), None, letters, args=args(eval_strategy='steps', eval_steps=1), train_dataset=prompts(),
                   eval_dataset=sets, processing_class=toy_tokenizer())
    t.train()
    said = {k for l in t.state.log_history for k in l}
    assert {'eval_a_objective/score', 'eval_b_objective/score'} <= said and 'eval_objective/score' not in said
    assert 'eval_objective/score' in t.evaluate('b') and 'eval_objective/score' in t.evaluate(prompts(2))
    assert 'test_a_objective/kl' in t.evaluate(sets, metric_key_prefix='test')


# ---- what comes out

def test_a_card(folders, args):
    "[fails when the method is another's]"
    t = PPOTrainer(str(folders.policy), None, letters, args=args(), train_dataset=prompts())
    t.create_model_card('my-policy', tags='cats')
    text = (Path(t.args.output_dir)/'README.md').read_text(encoding='utf-8')
    assert '# my-policy' in text and 'with PPO' in text and '- cats' in text and str(folders.policy) not in text

@pytest.fixture(scope='module')
def log(tmp_path_factory):
    args = trainer_defaults(output_dir=str(tmp_path_factory.mktemp('log')), num_rollouts=1, rollout_batch_size=4,
                            per_device_train_batch_size=4, max_new_tokens=4)
    return trained(model=talker(), processing_class=toy_tokenizer(), args=PPOConfig(**args)).state.log_history

@pytest.mark.parametrize('key', ['objective/score', 'objective/kl', 'objective/rlhf_reward', 'objective/entropy',
                                 'policy/approxkl', 'policy/clipfrac', 'loss/policy', 'loss/value',
                                 'val/explained_variance', 'rollout/length', 'rollout/eos_rate'])
def test_is_logged(key, log):
    "[fails when it is not]"
    assert any(key in l for l in log), sorted(log[0])


# ---- what can't be, said in a sentence

@pytest.mark.parametrize('name', [f.name for f in TRLNames.__dataclass_fields__.values()])
def test_names_of_trl_are_refused_with_ours(name):
    "[fails when one is accepted and ignored]"
    with pytest.raises(UserError, match=f'{name} is a name of TRL; say'): PPOConfig(**{name: 1})

@pytest.mark.parametrize('name', [*TRL_ARGUMENTS, 'data_collator'])
def test_arguments_of_trl_are_refused_with_ours(name, args):
    "[fails when one is left to Trainer]"
    with pytest.raises(UserError, match=TRL_ARGUMENTS.get(name, 'leave it out')):
        PPOTrainer(talker(), None, letters, args=args(), train_dataset=prompts(), processing_class=toy_tokenizer(),
                   **{name: letters})

BAD = {
    'no reward': (dict(reward=None), 'needs reward'), 'no folder': (dict(model='nowhere/x'), 'could not be loaded'),
    'no reward folder': (dict(reward='nowhere/x'), 'could not be loaded'),
    'a bare model as reward': (dict(reward=reward_model_from(tiny(), toy_tokenizer())), 'no tokenizer'),
    'no prompt column': (dict(train_dataset=Dataset.from_dict(dict(text=['a']))), 'no column prompt'),
    'an empty prompt': (dict(train_dataset=Dataset.from_dict(dict(prompt=['a', '']))), 'row 1 is empty'),
    'pairs that share nothing': (dict(train_dataset=Dataset.from_dict(dict(chosen=['a'], rejected=['b']))), 'no start'),
    'no rows': (dict(train_dataset=Dataset.from_dict(dict(prompt=[]))), 'no rows'),
    'chats without template': (dict(train_dataset=chats()), 'no chat template')}

@pytest.mark.parametrize('what', BAD)
def test_what_cannot_be_is_said(what, args):
    "[fails when the check is left out]"
    kw, says = BAD[what]
    with pytest.raises(UserError, match=says):
        PPOTrainer(**dict(model=talker(), reward=letters, args=args(), train_dataset=prompts(),
                          processing_class=toy_tokenizer()) | kw)

ODD = {'None': None, 'text': 'good', 'a dict': dict(score=1), 'one number': 1., 'too few': [1.], 'lists': [[1.]]*4,
       'a complex number': torch.tensor([1j]*4), 'a huge number': [10**400]*4}

@pytest.mark.parametrize('what', ODD)
@pytest.mark.parametrize('who', ['reward function', 'monitor length'])
def test_odd_scores_are_named(what, who, args):
    "[fails when a monitor's are not looked at]"
    odd = dict(reward=lambda p, c: ODD[what]) if who == 'reward function' else dict(
        monitors=dict(length=lambda p, c: ODD[what]))
    with pytest.raises(UserError, match=who):
        trained(model=talker(), processing_class=toy_tokenizer(), args=args(), **odd)
