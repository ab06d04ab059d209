"""15_reward: one score per text whatever surrounds it; training that resumes, stops at NaN and leaves the random
state alone."""
import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from util import (KINDS, bpe, distance, fingerprint, pad_is_eos, ppo_trainer, talker, tiny, toy_pairs,
                  toy_tokenizer, weights)

import mpo_nb.reward as R
from mpo_nb.core import UserError
from mpo_nb.logprobs import encode_completion, encode_completions, encode_prompt, encode_prompts
from mpo_nb.sampling import sample
from mpo_nb.training import tokenize_demonstrations, train_sft
from mpo_nb.reward import (
    RewardModel, bradley_terry_loss, last_token_scores, reward_model_from, score_ids, tokenize_pairs,
    train_reward
)

DECODERS = 'gpt2', 'llama', 'neox'
FAST = dict(learning_rate=1e-2, per_device_train_batch_size=4, lr_scheduler_type='constant')



def rm(kind='llama', tok=None, seed=0):
    tok = tok or toy_tokenizer()
    model = tiny(kind, vocab=len(tok), seed=seed)
    return RewardModel(reward_model_from(model, tok, seed), tok)


def demos(n=8):
    p = toy_pairs(n)
    return Dataset.from_dict(dict(prompt=p['prompt'], completion=p['chosen']))


def texts(n=8):
    p = toy_pairs(n)
    return list(p['prompt']), list(p['chosen'])


def plain_score(reward, prompt, completion):
    "One text alone: the head on the hidden state of its last id, by hand"
    ids = encode_prompt(reward.tok, prompt) + encode_completion(reward.tok, prompt, completion)
    with torch.no_grad():
        return reward.model.score(reward.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


# ---- one text, one score

@pytest.mark.parametrize('kind', DECODERS)
@pytest.mark.parametrize('n', range(1, 6))
def test_item3_item47_score_ignores_padding_side(kind, n):
    "[fails when the last token is counted instead of looked up, and when left padding gets no mask]"
    model, row = rm(kind).model, torch.arange(3, 12)[None]
    pad, real = torch.full((1, n), 0), torch.ones_like(row)
    with torch.no_grad():
        scores = [last_token_scores(model, torch.cat(i, 1), torch.cat(m, 1)).item()
                  for i, m in [((row,), (real,)), ((pad, row), (pad, real)), ((row, pad), (real, pad)),
                               ((pad, row, pad), (pad, real, pad))]]
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


@pytest.mark.parametrize('kind', DECODERS)
def test_item48_pad_is_eos_reads_the_true_last_token(kind):
    """Also with EOS between turns; Hugging Face's own pooling reads another token [fails when the pad id tells
    where a text ends]"""
    reward = rm(kind, pad_is_eos(toy_tokenizer()))
    prompts, completions = texts(4)
    prompts[0] = prompts[0] + ' Cats say meow.<eos>' + prompts[0]
    assert reward.encode(prompts[0], completions[0]).count(1) == 2
    np.testing.assert_allclose(reward(prompts, completions),
                               [plain_score(reward, p, c) for p, c in zip(prompts, completions)], atol=1e-5)
    ids = torch.tensor([reward.encode(prompts[1], completions[1])])
    with torch.no_grad():
        assert abs(reward.model(input_ids=ids).logits.item() - plain_score(reward, prompts[1], completions[1])) > 1e-3


@pytest.mark.parametrize('kind', DECODERS)
def test_item48_pad_is_eos_trains_on_the_scores_that_are_read_later(kind):
    """First logged loss of TRL's trainer == our loss on our scores; the tokenizer's pad id is back in the config
    afterwards [fails when the tokenizer keeps its pad token]"""
    tok, ds = pad_is_eos(toy_tokenizer()), toy_pairs(4)
    model = rm(kind, tok).model
    c, r = (torch.tensor(RewardModel(model, tok)(ds['prompt'], ds[k])) for k in ('chosen', 'rejected'))
    _, history = train_reward(model, tok, ds, max_steps=1, logging_steps=1, per_device_train_batch_size=4)
    assert history[0]['loss'] == pytest.approx(bradley_terry_loss(c, r).item(), abs=2e-4)
    assert model.config.pad_token_id == tok.pad_token_id == 1


def test_item49_no_pad_id_in_the_config():
    "[fails when the last place is taken where the config knows no pad id]"
    reward, (prompts, completions) = rm('gpt2'), texts(2)
    reward.model.config.pad_token_id = None
    np.testing.assert_allclose(reward(prompts, completions),
                               [reward([p], [c])[0] for p, c in zip(prompts, completions)], atol=1e-5)


@pytest.mark.parametrize('kind', DECODERS)
def test_padding_behind_a_text_needs_no_mask_in_a_causal_model(kind, monkeypatch):
    """None is given, and the scores are the very same; one that looks ahead gets its mask [fails when the mask
    is left out whatever the layers are, and when it is never left out]"""
    model, rows, given = rm(kind).model, [[5] * 9, [6, 7], [8, 9, 10, 11]], []
    body = getattr(model, model.base_model_prefix)
    body.register_forward_pre_hook(lambda module, args, kw: given.append(kw.get('attention_mask') is not None),
                                   with_kwargs=True)
    with torch.no_grad():
        free = last_token_scores(model, *R._right_padded(rows, 0, 'cpu'))
        assert given == [False]
        for m in body.modules():
            if hasattr(m, 'is_causal'): monkeypatch.setattr(m, 'is_causal', False)
        masked = last_token_scores(model, *R._right_padded(rows, 0, 'cpu'))
    assert given == [False, True]
    torch.testing.assert_close(free, masked, atol=1e-6, rtol=0)


@pytest.mark.parametrize('kind', DECODERS)
def test_item50_score_does_not_depend_on_batch_partners(kind):
    "[fails when the mask takes in the padding]"
    reward, (prompts, completions) = rm(kind), texts(8)
    alone = reward(prompts, completions, batch_size=1)
    order = np.random.default_rng(0).permutation(8)
    for size in (2, 8):
        np.testing.assert_allclose(reward([prompts[i] for i in order], [completions[i] for i in order],
                                          batch_size=size), alone[order], atol=1e-4)
    assert len(set(alone.round(4))) == 8


def test_item51_scores_go_through_the_reward_models_own_tokenizer():
    """The vocabulary permuted, and the embeddings with it: same texts, same scores [fails when the policy's
    tokenizer encodes]"""
    reward, (prompts, completions) = rm(), texts(4)
    tok, model = copy.deepcopy(reward.tok), copy.deepcopy(reward.model)
    n = len(tok)
    # id i becomes perm[i]; pad, EOS and unk stay
    perm = np.r_[:3, 3 + np.random.default_rng(0).permutation(n - 3)]
    state = json.loads(tok.backend_tokenizer.to_str())
    state['model']['vocab'] = {w: int(perm[i]) for w, i in state['model']['vocab'].items()}
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token='<pad>',
                                    eos_token='<eos>', unk_token='<unk>', clean_up_tokenization_spaces=False)
    table = model.get_input_embeddings().weight.data
    table[perm] = table.clone()
    assert other(prompts[0])['input_ids'] != tok(prompts[0])['input_ids']
    np.testing.assert_allclose(RewardModel(model, other)(prompts, completions), reward(prompts, completions), atol=1e-6)


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'closing'])
def test_item36_item52_one_eos_at_the_end_one_bos_at_most(kind):
    "[fails when an EOS in the ids stays before one is added]"
    tok = bpe(kind)
    reward = rm('llama', tok)
    for completion in (' hello world', ' hello world</s>', '', ' hello world</s></s>'):
        ids = reward.encode('Answer:', completion)
        assert ids[-1] == tok.eos_token_id and ids.count(tok.eos_token_id) == 1, (completion, ids)
        assert ids.count(1) == (kind != 'gpt2') and None not in ids
    np.testing.assert_allclose(reward(['Answer:'], [' hello</s>']), reward(['Answer:'], [' hello']), atol=1e-6)


def test_item52_sampled_text_holds_no_special_strings():
    """What a policy samples reaches the reward model without the policy's markers, and is scored as the very ids
    that were sampled"""
    reward, policy = rm(), tiny('llama')
    s = sample(policy, reward.tok, texts(8)[0], max_new_tokens=12, seed=0)
    assert not any(m in c for c in s.completions for m in ('<pad>', '<eos>'))
    ended = [i for i, e in enumerate(s.ended) if e and not {0, 2} & set(s.completion_ids[i])]
    assert all(reward.encode(s.prompts[i], s.completions[i]) == s.prompt_ids[i] + s.completion_ids[i] for i in ended)


def test_text_too_long_keeps_its_end_and_is_reported(caplog):
    reward = rm()
    p, c = texts(1)
    reward.max_length = 10
    ids = reward.encode(p[0], c[0])
    with caplog.at_level(logging.WARNING, 'mpo_nb'): score = reward(p*3, c*3)
    np.testing.assert_allclose(score, score_ids(reward.model, [ids[:1] + ids[-9:]]*3, 0), atol=1e-5)
    assert '3 of 3 texts' in caplog.text
    assert rm('gpt2').max_length == rm('llama').max_length == 96


def test_scores_that_are_no_numbers_name_the_row():
    reward, (prompts, completions) = rm(), texts(3)
    completions[2] = ' Cats'
    with torch.no_grad():
        reward.model.get_input_embeddings().weight[reward.tok.convert_tokens_to_ids(' Cats')] = math.nan
    prompts = ['\n\nHuman: Hello.\n\nAssistant:']*3
    completions = [' Hello.', ' Hello.', ' Cats']
    with pytest.raises(UserError, match='row 2 is nan'): reward(prompts, completions)
    with pytest.raises(UserError, match='3 prompts but 2'): reward(prompts, completions[:2])


def test_encoder_classifiers_score_by_their_own_pooling(tmp_path):
    tok = bpe('closing')   # [BOS] text [EOS], like [CLS] text [SEP]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1,
                                                     num_attention_heads=2, intermediate_size=16, num_labels=1,
                                                     max_position_embeddings=64, initializer_range=.5)).eval()
    reward = RewardModel(model, tok)
    with torch.no_grad():
        one = [model(input_ids=torch.tensor([tok('Answer:' + c)['input_ids']])).logits.item()
               for c in (' hello', ' hello world the answer')]
    np.testing.assert_allclose(reward(['Answer:']*2, [' hello', ' hello world the answer']), one, atol=1e-5)
    reward.save(tmp_path/'rm')
    np.testing.assert_allclose(RewardModel.load(tmp_path/'rm')(['Answer:'], [' hello']), one[:1], atol=1e-5)


def test_item53_the_score_in_the_ppo_step_is_the_public_score(tmp_path):
    """Ten samples: what the first token's return holds (no KL price, lambda 1) == `score` of the decoded texts;
    and what PPO calls ranks good above bad
    [fails when `checked_scores` strips the texts, or a score is read without EOS]"""
    tok, ds = toy_tokenizer(), toy_pairs(8)
    reward, _ = train_reward(tiny('llama'), tok, ds, num_train_epochs=8, **FAST)
    t = ppo_trainer(tmp_path, talker(), reward=reward, tok=tok, prompts=10, rollout_batch_size=10,
                    per_device_train_batch_size=10, missing_eos_penalty=0., lam=1., kl_coef=0., learning_rate=0.)
    t.train()
    texts = t.experience.samples.prompts, t.experience.samples.completions
    np.testing.assert_allclose(t.experience.returns[:, 0], reward.score(*texts), atol=1e-4)
    assert len(texts[0]) == 10 and len(set(reward.score(*texts).round(3))) > 5
    assert (np.asarray(t.reward(ds['prompt'][:], ds['chosen'][:]))
            > np.asarray(t.reward(ds['prompt'][:], ds['rejected'][:]))).all()


# ---- a prompt read once

@pytest.mark.parametrize('kind', KINDS)
def test_one_row_a_pair_gives_the_scores_of_two(kind):
    "Whatever the batch; sharing is really used [fails when rejected sees chosen, or its positions go on behind chosen]"
    reward, ds = rm(kind), toy_pairs(9)
    args = [ds[k][:] for k in ('prompt', 'chosen', 'rejected')]
    apart = np.stack([reward(args[0], c) for c in args[1:]], 1)
    rows = [(p, c, r) for p, c, r in zip(*reward.encode_all(args[0], args[1]), reward.encode_all(args[0], args[2])[1])]
    assert R.shares_prompt(reward.model, rows, 0)
    for size in (1, 4, 64): np.testing.assert_allclose(reward.score_pairs(*args, batch_size=size), apart, atol=1e-5)
    reward.center(args[0], args[1])
    np.testing.assert_allclose(reward.score_pairs(*args)[:, 0], reward(args[0], args[1]), atol=1e-5)
    with pytest.raises(UserError, match='9 prompts, 9 chosen and 8'): reward.score_pairs(*args[:2], args[2][:8])


def test_a_prompt_is_read_once_where_that_is_less_work(monkeypatch):
    """Long prompt, short answers: yes; long answers: no; and the scores don't tell [fails when `sharing_pays` is
    always or never true]"""
    reward, ds, seen = rm(), toy_pairs(3), []
    prompts, one, real = ds['prompt'][:], ds['chosen'][0], R.pair_scores
    monkeypatch.setattr(R, 'pair_scores',
                        lambda model, rows, pad: (seen.extend(len(r[0]) for r in rows), real(model, rows, pad))[1])
    monkeypatch.setattr(R, 'shares_prompt', lambda *a: True)
    args = [prompts[0], prompts[1], prompts[2]], [one, one * 4, one], [' No.', one * 3, ' Yes.']
    scores = reward.score_pairs(*args)
    assert seen == sorted(len(encode_prompt(reward.tok, p)) for p in (prompts[0], prompts[2]))
    np.testing.assert_allclose(scores, np.stack([reward(args[0], c) for c in args[1:]], 1), atol=1e-5)


def test_pairs_that_are_too_long_to_share_are_cut_as_texts_are(caplog):
    reward, ds = rm(), toy_pairs(9)
    args = [ds[k][:] for k in ('prompt', 'chosen', 'rejected')]
    reward.max_length = sorted(len(reward.encode(p, c)) for p, c in zip(args[0], args[1]))[4]
    with caplog.at_level(logging.WARNING, 'mpo_nb'): scores = reward.score_pairs(*args)
    assert 'lost their beginning' in caplog.text
    np.testing.assert_allclose(scores, np.stack([reward(args[0], c) for c in args[1:]], 1), atol=1e-5)


@pytest.mark.parametrize('how', ['differs', 'refuses', 'nan'])
def test_a_model_that_cannot_share_is_asked_twice(how, monkeypatch):
    "[fails when `shares_prompt` is always True]"
    reward, ds = rm(), toy_pairs(6)
    args = [ds[k][:] for k in ('prompt', 'chosen', 'rejected')]
    def wrong(model, rows, pad_id):
        if how == 'refuses': raise ValueError('no 4-D masks here')
        return torch.full((len(rows), 2), math.nan if how == 'nan' else 1.)
    monkeypatch.setattr(R, 'pair_scores', wrong)
    np.testing.assert_allclose(reward.score_pairs(*args),
                               np.stack([reward(args[0], c) for c in args[1:]], 1), atol=1e-6)


def test_a_pair_whose_score_is_no_number_is_named():
    reward, p = rm(), '\n\nHuman: Hello.\n\nAssistant:'
    with torch.no_grad():
        reward.model.get_input_embeddings().weight[reward.tok.convert_tokens_to_ids(' Cats')] = math.nan
    with pytest.raises(UserError, match='row 2 is nan'):
        reward.score_pairs([p]*4, [' Hello.']*4, [' Hi.', ' Hi.', ' Cats', ' Hi.'])


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'closing'])
def test_encoding_many_texts_is_encoding_each(kind):
    """Merges across the boundary, BOS in the text, EOS in the text, nothing at all [fails when the decoded text
    isn't compared]"""
    tok = bpe(kind)
    prompts = ['Answer:', 'Answer: ', 'the wor', '<s>Answer:', ' x']*3
    completions = [' hello world', 'ld of answers</s>', '', '  hello',
                   'hello </s></s>']*2 + ['lo', ' a</s>b', '\n', ':', ' ']
    heads, tails = encode_prompts(tok, prompts), encode_completions(tok, prompts, completions)
    assert (heads == [encode_prompt(tok, p) for p in prompts]
            and tails == [encode_completion(tok, p, c) for p, c in zip(prompts, completions)])
    assert encode_prompts(tok, []) == encode_completions(tok, [], []) == []


def test_fingerprint_is_that_of_the_scores(tmp_path):
    "Same after save and load; another weight, offset, length or token makes another"
    reward = rm()
    reward.save(tmp_path/'rm')
    prints = [reward.fingerprint(), RewardModel.load(tmp_path/'rm', device='cpu').fingerprint()]
    assert prints[0] == prints[1] == rm().fingerprint() == reward.fingerprint()
    with torch.no_grad(): reward.model.score.weight[0, 0] += 1e-4
    prints.append(reward.fingerprint())
    reward.offset = 1.
    prints.append(reward.fingerprint())
    reward.max_length = 50
    prints.append(reward.fingerprint())
    reward.tok = pad_is_eos(reward.tok)
    assert len({*prints, reward.fingerprint()}) == 5


def test_grouping_by_length_trains_on_less_padding():
    "[fails with an error when `length` is dropped from the rows]"
    ds, read = toy_pairs(48), {}
    for how in ('random', 'group_by_length'):
        model, read[how] = reward_model_from(tiny(), toy_tokenizer()), 0
        def count(module, args, kw): read[how] += kw['input_ids'].numel()
        model.register_forward_pre_hook(count, with_kwargs=True)
        train_reward(model, toy_tokenizer(), ds, train_sampling_strategy=how, **FAST)
    assert read['group_by_length'] < .95*read['random']


# ---- made, saved, loaded

def test_item54_seeded_head_and_body_of_the_policy():
    "[fails when the head isn't seeded]"
    model, tok = tiny('gpt2', seed=5), toy_tokenizer()
    before, state = fingerprint(model), torch.get_rng_state()
    a, b, c = (reward_model_from(model, tok, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and fingerprint(model) == before
    assert distance(weights(a), weights(b)) == 0 and not torch.equal(a.score.weight, c.score.weight)
    assert (distance(weights(a.base_model), weights(model.base_model)) == 0 and a.config.num_labels == 1
            and a.config.pad_token_id == 0)


def test_reward_model_from_a_folder(tmp_path):
    model, tok = tiny('llama'), toy_tokenizer()
    model.save_pretrained(tmp_path)
    assert distance(weights(reward_model_from(tmp_path, tok)), weights(reward_model_from(model, tok))) == 0


def test_item54_number_of_labels_and_missing_head(tmp_path):
    "[fails when missing weights are not looked for]"
    tok, model = toy_tokenizer(), tiny('llama')
    for d in ('lm', 'two'): tok.save_pretrained(tmp_path/d)
    model.save_pretrained(tmp_path/'lm')
    two = copy.deepcopy(model.config)
    two.num_labels = 2
    AutoModelForSequenceClassification.from_config(two).save_pretrained(tmp_path/'two')
    with pytest.raises(UserError, match='missing weights .*score'): RewardModel.load(tmp_path/'lm')
    with pytest.raises(UserError, match='2 labels'): RewardModel.load(tmp_path/'two')
    with pytest.raises(UserError, match='could not be loaded'): RewardModel.load(tmp_path/'nothing')


def test_item30_lost_head_bias_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file
    rm('neox').save(tmp_path)
    state = load_file(tmp_path/'model.safetensors')
    save_file(state | {'score.bias': torch.tensor([3.])}, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(UserError, match=r'unexpected weights \(score.bias\)'): RewardModel.load(tmp_path)


@pytest.mark.parametrize('kind', DECODERS)
def test_item30_item55_save_and_load_keep_scores_and_offset(kind, tmp_path):
    "[fails when the offset isn't saved]"
    reward, (prompts, completions) = rm(kind), texts(8)
    gaps = np.diff(reward(prompts, completions))
    reward.center(prompts, completions)
    centred = reward(prompts, completions)
    assert abs(centred.mean()) < 1e-6
    np.testing.assert_allclose(np.diff(centred), gaps, atol=1e-6)
    reward.save(tmp_path/'rm')
    back = RewardModel.load(tmp_path/'rm')
    np.testing.assert_allclose(back(prompts, completions), centred, atol=1e-6)
    assert back.center(prompts,
                       completions).offset == pytest.approx(reward.offset, abs=1e-6), 'centring twice changes nothing'


def test_item55_constant_scores_stay_finite():
    "[fails when centring divides by the deviation]"
    reward, (prompts, completions) = rm(), texts(4)
    with torch.no_grad(): reward.model.score.weight.zero_()
    assert np.array_equal(reward.center(prompts, completions)(prompts, completions), np.zeros(4))


def test_tokenizer_without_pad_is_named():
    tok = copy.deepcopy(toy_tokenizer())
    tok.pad_token = None
    with pytest.raises(UserError, match='no pad token'): reward_model_from(tiny(), tok)
    with pytest.raises(UserError, match='no pad token'): train_sft(tiny(), tok, demos())


# ---- training

def test_item35_item59_training_ids_are_those_of_generation_and_scoring():
    tok, ds = (bpe('llama'),
               Dataset.from_dict(dict(prompt=['Answer: hello wor', 'the answer is '], completion=['ld', 'here.'])))
    rows, aside = tokenize_demonstrations(tok, ds)
    for r, p, c in zip(rows, ds['prompt'], ds['completion']):
        n = len(encode_prompt(tok, p))
        assert (r['input_ids'][:n] == encode_prompt(tok, p) and r['labels'][:n] == [-100]*n
                and r['labels'][n:] == r['input_ids'][n:] and r['labels'][-1] == tok.eos_token_id)
    reward, ds = rm(), toy_pairs(4)
    for r, row in zip(tokenize_pairs(reward, ds)[0], ds):
        assert (r['chosen_ids'] == reward.encode(row['prompt'], row['chosen'])
                and r['rejected_ids'] == reward.encode(row['prompt'], row['rejected']))


def test_too_long_rows_are_set_aside_and_counted(caplog):
    reward, ds = rm(), toy_pairs(8)
    long = [max(len(reward.encode(r['prompt'], r[k])) for k in ('chosen', 'rejected')) for r in ds]
    cut = sorted(long)[4]
    with caplog.at_level(logging.INFO, 'mpo_nb'): rows, aside = tokenize_pairs(reward, ds, max_length=cut)
    assert (aside == [i for i, n in enumerate(long) if n > cut] and len(rows) + len(aside) == 8
            and f'{len(aside)} of 8' in caplog.text)
    with pytest.raises(UserError, match='none of 8 rows'): tokenize_pairs(reward, ds, max_length=3)
    with pytest.raises(UserError, match='none of 8 rows'): train_sft(tiny(), toy_tokenizer(), demos(), max_length=3)


def test_item56_loss_is_that_of_the_last_tokens_and_partners_do_not_matter():
    """TRL's loss and our equation on the same batch; a longer partner changes no score [fails when the loss is
    summed over pairs]"""
    reward, ds = rm(), toy_pairs(4)
    scores = {k: torch.tensor(reward(ds['prompt'], ds[k])) for k in ('chosen', 'rejected')}
    start = copy.deepcopy(reward.model)
    _, history = train_reward(start, reward.tok, ds, max_steps=1, logging_steps=1, per_device_train_batch_size=4)
    expected = -torch.log(1/(1 + torch.exp(scores['rejected'] - scores['chosen']))).mean()
    assert (history[0]['loss'] == pytest.approx(expected.item(), abs=2e-4)
            == pytest.approx(bradley_terry_loss(**scores).item(), abs=2e-4))


def test_item27_training_depends_on_its_seed_only_and_leaves_the_random_state():
    tok, ds = toy_tokenizer(), toy_pairs(8)
    def run(seed, before):
        torch.manual_seed(before); np.random.seed(before)
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        a, _ = train_sft(tiny(dropout=.1), tok, demos(), max_steps=3, seed=seed, **FAST)
        b, _ = train_reward(a, tok, ds, max_steps=3, seed=seed, **FAST)
        assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
        return fingerprint(a), fingerprint(b.model)
    assert run(0, 1) == run(0, 2) and not set(run(0, 1)) & set(run(1, 1))


def test_reward_training_learns_and_leaves_the_language_model():
    policy, ds = tiny('llama'), toy_pairs(8)
    before = fingerprint(policy)
    reward, history = train_reward(policy, toy_tokenizer(), ds, ds, num_train_epochs=8, logging_steps=1, **FAST)
    assert fingerprint(policy) == before
    assert np.mean(reward(ds['prompt'], ds['chosen']) > reward(ds['prompt'], ds['rejected'])) == 1
    assert [h['eval_accuracy'] for h in history if 'eval_accuracy' in h][-1] == 1


class Killed(Exception): pass


@pytest.mark.parametrize('stage', ['sft', 'reward'])
def test_killed_and_resumed_ends_with_the_same_weights(stage, tmp_path):
    "Six steps over three epochs straight == killed after step 3, which is inside an epoch, and resumed"
    from transformers import TrainerCallback
    steps = []
    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): steps.append(state.global_step)
    class Kill(Note):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 4: raise Killed
    def run(folder, **kw):
        kw |= dict(output_dir=folder, num_train_epochs=3, save_strategy='steps', save_steps=3, **FAST)
        if stage == 'sft': return train_sft(tiny(dropout=.1), toy_tokenizer(), demos(), **kw)
        reward, h = train_reward(reward_model_from(tiny(), toy_tokenizer()), toy_tokenizer(), toy_pairs(8), **kw)
        return reward.model, h
    straight, _ = run(tmp_path/'a', resume_from_checkpoint=True)   # nothing there yet: starts
    with pytest.raises(Killed): run(tmp_path/'b', callbacks=[Kill()])
    resumed, _ = run(tmp_path/'b', resume_from_checkpoint=True, callbacks=[Note()])
    assert fingerprint(resumed) == fingerprint(straight) and steps == [4, 5, 6]


def test_nan_stops_with_stage_and_step_and_keeps_good_checkpoints(tmp_path):
    "Weights become NaN at step 3: no checkpoint is written after it"
    from transformers import TrainerCallback
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kw):
            if state.global_step == 2:
                with torch.no_grad(): next(model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match='reward: loss is nan at step 3'):
        train_reward(tiny(), toy_tokenizer(), toy_pairs(8), output_dir=tmp_path/'log', max_steps=6, logging_steps=1,
                     callbacks=[Break()], **FAST)
    with pytest.raises(UserError, match='sft: a weight is not finite at step 4'):
        train_sft(tiny(), toy_tokenizer(), demos(), output_dir=tmp_path/'ck', max_steps=6, logging_steps=100,
                  save_strategy='steps', save_steps=2, callbacks=[Break()], **FAST)
    assert [p.name for p in (tmp_path/'ck').glob('checkpoint-*')] == ['checkpoint-2']


# ---- the toy setup

TINY = dict(n_demos=16, n_pairs=12, sft_steps=1, reward_epochs=1)


def test_toy_setup_is_cached_by_its_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path))
    a = R.toy_setup(**TINY)
    monkeypatch.setattr(R, '_build_toy', None)                          # a second build would fail
    b = R.toy_setup(**TINY)
    assert (fingerprint(a.sft) == fingerprint(b.sft) and fingerprint(a.reward.model) == fingerprint(b.reward.model)
            and a.pairs['train'][:] == b.pairs['train'][:])
    assert not set(a.pairs['train']['prompt']) & set(a.pairs['test']['prompt'])
    p, c = a.pairs['train']['prompt'][:], a.pairs['train']['chosen'][:]
    np.testing.assert_array_equal(a.reward(p, c), b.reward(p, c))
    with pytest.raises(TypeError): R.toy_setup(**TINY | dict(seed=1))   # other arguments, other folder


def test_the_setup_trains_other_pairs_once(tmp_path, monkeypatch):
    "`fit` reads the cache for the same pairs and seed, and for no others [fails when the key lacks pairs or seed]"
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path))
    toy = R.toy_setup(**TINY)
    half, rest = toy.pairs['train'].select(range(4)), toy.pairs['train'].select(range(4, 8))
    first = fingerprint(toy.fit(half, 1).model)
    monkeypatch.setattr(R, 'train_reward', None)                        # a second training would fail
    assert fingerprint(toy.fit(half, 1).model) == first
    for other in ((half, 2), (rest, 1)):
        with pytest.raises(TypeError): toy.fit(*other)


def test_toy_setup_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('MPO_NB_CACHE', str(tmp_path))
    def half(folder, *args, **kw):
        (folder/'log.json').write_text('{}')
        raise KeyboardInterrupt
    monkeypatch.setattr(R, '_build_toy', half)
    with pytest.raises(KeyboardInterrupt): R.toy_setup(**TINY)
    assert not [p for p in tmp_path.iterdir() if p.suffix != '.lock']
