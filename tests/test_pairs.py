"""Pairs and their log-probs: reported defects of other implementations (numbered as in the project's list of known
defects) that ours must not have.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from mpo_nb.core import UserError
from mpo_nb.logprobs import encode_prompt
from mpo_nb.pairs import (
    ByLength, collate_pairs, encode_pair, encode_pairs, packed_rows, plain_logps, shared_logps, shared_mask,
    single_logps, single_rows
)
from util import KINDS, bpe, distance, pad_is_eos, row_logps, tiny, toy_pairs, toy_tokenizer

pytestmark = pytest.mark.usefixtures('own_random_state')

PASSES = plain_logps, single_logps, shared_logps
PAIRS = [dict(prompt_ids=[5, 6, 7], chosen_ids=[21, 22, 23, 1], rejected_ids=[24, 1]),
         dict(prompt_ids=[8, 9, 10, 11, 12, 13], chosen_ids=[25, 1], rejected_ids=[26, 27, 28, 29, 1]),
         dict(prompt_ids=[16], chosen_ids=[1], rejected_ids=[30, 31, 1])]


def by_hand(model, rows, temperature=1.):
    "Summed log-probs of the chosen and the rejected completions, each row alone and without padding"
    return [torch.stack([row_logps(model, r['prompt_ids'], r[f'{side}_ids'], temperature).sum() for r in rows])
            for side in ('chosen', 'rejected')]

def encoded(ds=None): return list(encode_pairs(ds or toy_pairs(), toy_tokenizer())[0])


# ---- log-probs of pairs

@pytest.mark.parametrize('forward', PASSES)
@pytest.mark.parametrize('kind', KINDS)
def test_item39_logps_do_not_depend_on_partners_or_padding(kind, forward):
    """Each pair alone, by hand, equals any batch, order and pad id [fails when pads are counted, and on gpt2
    when positions count pads]"""
    model = tiny(kind)
    with torch.no_grad():
        want = torch.stack(by_hand(model, PAIRS))
        for pad in (0, 1, 77):
            torch.testing.assert_close(torch.stack(forward(model, collate_pairs(PAIRS, pad))), want, atol=2e-5, rtol=0)
            torch.testing.assert_close(torch.stack(forward(model, collate_pairs(PAIRS[::-1], pad))), want.flip(1),
                                       atol=2e-5, rtol=0)
            torch.testing.assert_close(
                torch.cat([torch.stack(forward(model, collate_pairs([r], pad))) for r in PAIRS], 1), want,
                atol=2e-5, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_item39_all_forward_passes_have_the_same_gradient(kind):
    "Also with eager attention [fails when rejected tokens see chosen ones]"
    batch, coefficients = collate_pairs(PAIRS, 0), torch.tensor([[1., -2., .5], [3., 1., -1.]])
    for attention in ('sdpa', 'eager'):
        grads = []
        for forward in PASSES:
            model = tiny(kind, attn_implementation=attention)
            assert model.config._attn_implementation == attention
            (torch.stack(forward(model, batch)) * coefficients).sum().backward()
            grads.append({k: p.grad for k, p in model.named_parameters()})
        assert max(float(g.abs().max()) for g in grads[0].values()) > .1
        assert distance(grads[0], grads[1]) < 2e-4 and distance(grads[0], grads[2]) < 2e-4


def read_places(forward, batch, model):
    "Which of the places where the head of `forward` may look predict a completion token, [rows, places]"
    if forward is plain_logps:
        masks = [torch.nn.functional.pad(batch[f'{k}_mask'], (0, max(batch[f'{k}_mask'].shape[1]
                                                 for k in ('chosen', 'rejected')) + 1 - batch[f'{k}_mask'].shape[1]))
                 for k in ('chosen', 'rejected')]
        return torch.cat(masks)
    inputs, places, _ = packed_rows(batch, model) if forward is shared_logps else single_rows(batch)
    return torch.zeros(inputs['input_ids'].numel(),
                       dtype=torch.bool).index_fill(0, places, True).view_as(inputs['input_ids'])

@pytest.mark.parametrize('forward', PASSES)
@pytest.mark.parametrize('kind', KINDS)
def test_item39_prompt_and_padding_never_enter_the_sum(kind, forward):
    """Poisoned last hidden states wherever no completion token is predicted: log-probs and gradients unchanged
    [fails when the mask is left out, and when a completion starts one place later]"""
    batch, results = collate_pairs(PAIRS, 0), []
    for poison in (0., 1e4):
        model, noise = tiny(kind), torch.Generator().manual_seed(0)
        read = read_places(forward, batch, model)
        model.get_output_embeddings().register_forward_pre_hook(
            lambda head, args: args[0] + poison * torch.randn(args[0].shape, generator=noise) * ~read[..., None])
        logps = torch.cat(forward(model, batch))
        logps.sum().backward()
        results.append((logps.detach(), {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=0)
    assert distance(results[0][1], results[1][1]) < 1e-4


def test_shared_mask_by_hand():
    "Prompt of 1 (behind a pad), chosen of 2, rejected of 1 (before a pad) [fails when rejected tokens see chosen ones]"
    see = shared_mask(*(torch.tensor([m], dtype=torch.bool) for m in ([0, 1], [1, 1], [1, 0])))[0, 0].int().tolist()
    #        pad pr  ch  ch  re  pad
    assert see == [[1, 0, 0, 0, 0, 0],
                   [0, 1, 0, 0, 0, 0],
                   [0, 1, 1, 0, 0, 0],
                   [0, 1, 1, 1, 0, 0],
                   [0, 1, 0, 0, 1, 0],
                   [0, 1, 0, 0, 1, 1]]


# ---- tokens and lengths

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'closing'])
def test_item35_both_sides_share_the_prompt_of_generation(kind):
    """Prompts that end in a space or mid-word [fails when a prompt is cut back to what prompt + completion have
    in common]"""
    tok = bpe(kind)
    for prompt, chosen, rejected in [('Ans', 'wer', 's'), ('hello wor', 'ld', 'k'),
                                     ('the answer is ', 'here.', 'hello'), ('Answer:', ' hello', ' world.'),
                                     ('hello', ', world', ' ')]:
        r = encode_pair(dict(prompt=prompt, chosen=chosen, rejected=rejected), tok)
        assert (r['prompt_ids'] == encode_prompt(tok, prompt)
                == [i for i in tok(prompt)['input_ids'] if i != tok.eos_token_id])
        for side, text in (('chosen', chosen), ('rejected', rejected)):
            ids = r[f'{side}_ids']
            assert len(ids) > 1 and tok.decode(r['prompt_ids'] + ids, skip_special_tokens=True) == prompt + text


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'closing'])
@pytest.mark.parametrize('pad_eos', [False, True])
def test_item36_one_eos_one_bos(kind, pad_eos):
    "[fails when EOS is added to what the tokenizer has closed already]"
    tok = pad_is_eos(bpe(kind)) if pad_eos else bpe(kind)
    r = encode_pair(dict(prompt='Answer: hello', chosen=' world', rejected=' world, hello</s>'), tok)
    for side in ('chosen', 'rejected'):
        ids = r['prompt_ids'] + r[f'{side}_ids']
        assert ids.count(tok.eos_token_id) == 1 and ids[-1] == tok.eos_token_id and None not in ids
        assert ids.count(tok.bos_token_id) == (kind != 'gpt2') and (kind == 'gpt2' or ids[0] == tok.bos_token_id)


def words(*lengths): return [' '.join(['cats'] * n) for n in lengths]

def test_item37_pairs_around_max_length(tok):
    """Grid of prompt and completion lengths: kept if and only if prompt and longer completion with EOS fit,
    whole; every other row number is returned [fails when EOS isn't counted]"""
    grid = [(p, c, r) for p in (1, 3, 6, 9, 10, 12) for c in (1, 4, 8) for r in (1, 5)]
    prompt, chosen, rejected = zip(*(words(*g) for g in grid))
    one = len(tok('cats cats')['input_ids']) - len(tok('cats')['input_ids'])
    assert one == 1
    kept, aside = encode_pairs(Dataset.from_dict(dict(prompt=prompt, chosen=chosen, rejected=rejected)), tok,
                               max_length=10)
    fits = [p + max(c, r) + 1 <= 10 for p, c, r in grid]
    assert aside == [i for i, f in enumerate(fits) if not f] and len(kept) == sum(fits) > 5
    for (p, c, r), row in zip([g for g, f in zip(grid, fits) if f], kept):
        assert [len(row[k]) for k in ('prompt_ids', 'chosen_ids', 'rejected_ids')] == [p, c + 1, r + 1]
        assert row['chosen_ids'][-1] == row['rejected_ids'][-1] == tok.eos_token_id
    batch = collate_pairs(list(kept), tok.pad_token_id)
    assert ([m.sum().item() for m in (batch['chosen_mask'], batch['rejected_mask'])]
            == [sum(g[1] + 1 for g, f in zip(grid, fits) if f), sum(g[2] + 1 for g, f in zip(grid, fits) if f)])


def test_item37_a_long_prompt_keeps_its_end(tok):
    "`max_prompt_length` cuts the beginning of both sides' prompt, and never a completion [fails when the end is cut]"
    (row,), aside = encode_pairs(Dataset.from_dict(dict(prompt=['cats dogs meow woof'], chosen=[' eat mice'],
                                                        rejected=[' eat'])), tok, max_prompt_length=2, max_length=6)
    assert (not aside and tok.decode(row['prompt_ids']) == ' meow woof' and len(row['chosen_ids']) == 3
            and len(row['rejected_ids']) == 2)


def test_item37_a_cut_prompt_keeps_its_bos():
    "A BOS stays in front of what is left of the prompt [fails when the first tokens are cut whatever they are]"
    t = bpe('llama')
    row = dict(prompt='the world of answers', chosen=' hello', rejected=' world')
    whole, cut = (encode_pair(row, t, n)['prompt_ids'] for n in (None, 3))
    assert whole[0] == t.bos_token_id and len(whole) > 3 and cut == whole[:1] + whole[-2:]


# ---- chat messages

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else "
        "%} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")

def chat_tokenizer(kind):
    """Qwen-like: no BOS, turns end in the EOS token and a line break. Llama-like: the template writes BOS, and
    EOS right behind the answer"""
    tok = copy.deepcopy(bpe('gpt2' if kind == 'qwen' else 'llama'))
    if kind == 'qwen':
        tok.add_special_tokens({'additional_special_tokens': ['<|im_start|>'], 'eos_token': '<|im_end|>'})
    tok.chat_template = CHATML if kind == 'qwen' else INST
    return tok

def chat_rows():
    user, answer = ((lambda text: [dict(role='user', content=text)]),
                    (lambda text: [dict(role='assistant', content=text)]))
    return Dataset.from_list(
        [dict(prompt=user('hello world'), chosen=answer('the answer is here.'), rejected=answer('hello')),
                              dict(prompt=[*user('hello'), *answer('hello world'), *user('the answer')],
                                   chosen=answer('world'), rejected=answer(' of answers '))])

@pytest.mark.parametrize('kind', ['qwen', 'llama'])
def test_item35_36_58_chat_messages(kind):
    """The prompt's ids are those of the generation prompt, one EOS ends each answer and nothing follows it, at
    most one BOS and only first, the whole decodes to the rendered dialogue [fails when the tokenizer adds a
    second BOS, and when the template's line break stays behind EOS]"""
    tok, ds = chat_tokenizer(kind), chat_rows()
    for row, ids in zip(ds, encode_pairs(ds, tok)[0]):
        assert ids['prompt_ids'] == tok.apply_chat_template(
            row['prompt'], add_generation_prompt=True, return_dict=True)['input_ids']
        for side in ('chosen', 'rejected'):
            whole = ids['prompt_ids'] + ids[f'{side}_ids']
            assert (ids[f'{side}_ids'].count(tok.eos_token_id) == 1 and whole[-1] == tok.eos_token_id
                    and None not in whole and len(ids[f'{side}_ids']) > 1)
            assert (whole.count(tok.bos_token_id) == (kind == 'llama')
                    and (kind == 'qwen' or whole[0] == tok.bos_token_id))
            assert tok.decode(whole) == tok.decode(
                tok.apply_chat_template(row['prompt'] + row[side], return_dict=True)['input_ids']).rstrip('\n')


def test_item35_a_template_that_renders_the_prompt_differently_is_refused():
    "[fails when the answer is cut at the prompt's length]"
    tok = chat_tokenizer('qwen')
    tok.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match='chat template'): encode_pairs(chat_rows(), tok)


# ---- batches by length

def test_batches_hold_pairs_of_similar_length():
    """Every pair once, seed and epoch decide, and the batches are narrower than shuffled ones, in no order of
    length [fails when the batches of a window stay sorted]"""
    lengths = torch.randint(10, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = ByLength(lengths, 8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(400)) and first == again != second
    assert list(ByLength(lengths, 8, seed=4)) != first
    widths = [max(lengths[i] for i in first[s:s + 8]) for s in range(0, 400, 8)]
    assert widths[0] == max(widths) and 8 * sum(widths) < 1.1 * sum(lengths)
    # in a sorted window nearly every batch is narrower than the one before
    assert .3 < np.mean(np.diff(widths) > 0) < .7


@pytest.mark.parametrize('n', [1, 3, 8, 13])
def test_batches_of_few_pairs(n): assert sorted(ByLength([5] * n, 8)) == list(range(n))
