"""Tokens, masks, log-probs, KL estimates: reported defects of other implementations (numbered as in
the project's list of known defects) that ours must not have.

Each docstring says in brackets which mutation of the code makes the test fail."""
import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mpo_nb.core import UserError
from mpo_nb.logprobs import (
    check_tokenizer, collate, completion_logprobs, decode_completion, encode_completion, encode_prompt, kl_k1,
    kl_k2, kl_k3, masked_mean, masked_sum, sequence_logprobs
)
from util import KINDS, TableLM, bpe, row_logps, tiny

pytestmark = pytest.mark.usefixtures('own_random_state')

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16], [17, 18, 19, 20]]
ANSWERS = [[21, 22, 23, 1], [24, 1], [25, 26, 27, 28, 29, 30], [1]]


# ---- positions, masks, padding

@pytest.mark.parametrize('kind', KINDS)
def test_item03_left_padding_needs_position_ids(kind):
    """One row alone equals the same row left-padded by 1 to 5 beside a partner [fails on gpt2 when
    `completion_logits` leaves `position_ids` out]"""
    model = tiny(kind)
    prompt, answer = PROMPTS[0], ANSWERS[0]
    with torch.no_grad():
        alone = row_logps(model, prompt, answer)
        for pads in range(6):
            batch = collate([prompt, list(range(30, 33 + pads))], [answer, [40, 41, 42, 43, 44]], pad_id=0)
            assert (batch.attention_mask[0] == 0).sum() == pads + 1
            torch.testing.assert_close(completion_logprobs(model, batch)[0, :4], alone, atol=1e-5, rtol=0)


def test_item04_each_logprob_is_read_at_its_own_place():
    """A model that encodes (position, token): token t is predicted at P-1+t, and nowhere else flows a gradient
    [fails when the logits are cut one place later]"""
    model, (prompt, answer) = TableLM(), ([1, 2, 3], [4, 5, 6, 7])
    batch = collate([prompt, [8, 9]], [answer, [1, 2]], pad_id=0)
    logps = completion_logprobs(model, batch)
    inputs = prompt + answer
    for t, token in enumerate(answer):
        assert torch.equal(logps[0, t], model.table[2 + t, inputs[2 + t]].log_softmax(-1)[token])
    assert batch.mask.sum(1).tolist() == [4, 2]
    logps.sum().backward()
    read = model.logits.grad.abs().sum(-1) > 0
    assert read.int().tolist() == [[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0]]


def test_item05_padding_of_unfinished_rows_is_masked():
    """A row without EOS, shorter than its batch: the mask has its length [fails when the mask is taken from an
    EOS search]"""
    rows = [[5, 6], [5, 6, 7, 8, 9], [5, 1, 6], [1]]
    batch = collate([[2]] * 4, rows, pad_id=0)
    assert batch.mask.sum(1).tolist() == batch.attention_mask[:, 1:].sum(1).tolist() == [2, 5, 3, 1]
    assert batch.mask.dtype == torch.bool and not batch.mask[0, 2:].any()
    assert [r[m].tolist() for r, m in zip(batch.completion_ids, batch.mask)] == rows
    logps = completion_logprobs(tiny(), batch)
    assert (logps[~batch.mask] == 0).all() and (logps[batch.mask] < 0).all()


def test_item06_eos_is_trained_when_it_is_also_the_pad_token():
    """pad == EOS: the EOS is attended and has a gradient, the pads behind it neither [fails when the mask is
    `ids != pad_id`]"""
    model, eos = TableLM(), 1
    batch = collate([[2, 3], [4]], [[5, eos], [6, 7, 8, eos]], pad_id=eos)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    completion_logprobs(model, batch).sum().backward()
    assert model.logits.grad[0, 2, eos].abs() > 1e-3            # place 2 holds the 5 that predicts EOS
    assert model.logits.grad[0, 3:].abs().max() == 0


@pytest.mark.parametrize('pad', [0, 1, 77])
def test_padding_invariance_of_sums(pad):
    "Batch size, partners, order and pad id change no log-prob [fails when the mask is left out of `gather_logprobs`]"
    model = tiny('gpt2')
    expected = [row_logps(model, p, c).sum().item() for p, c in zip(PROMPTS, ANSWERS)]
    for size in (1, 2, 4):
        assert sequence_logprobs(model, pad, PROMPTS, ANSWERS, batch_size=size) == pytest.approx(expected, abs=5e-5)
        assert sequence_logprobs(model, pad, PROMPTS[::-1], ANSWERS[::-1],
                                 batch_size=size) == pytest.approx(expected[::-1], abs=5e-5)


@pytest.mark.parametrize('poison', [1e6, float('nan'), float('inf')])
def test_poisoned_positions_change_no_masked_sum(poison):
    "What stands at masked places reaches neither sum nor mean nor gradient [fails when the mask is multiplied in]"
    mask = torch.tensor([[True, True, False], [False, False, False]])
    x = torch.tensor([[1., 2., poison], [poison] * 3], requires_grad=True)
    assert masked_sum(x, mask) == 3 and masked_mean(x, mask) == 1.5
    assert masked_sum(x, mask, 1).tolist() == [3, 0] and masked_mean(x, mask, 1).tolist() == [1.5, 0]
    masked_mean(x, mask).backward()
    assert x.grad.tolist() == [[.5, .5, 0], [0, 0, 0]]


# ---- temperature and the sampling distribution

def test_item07_temperature_divides_the_logits():
    """T = 0.7: log-probs are those of softmax(logits / T) [fails when `temperature` isn't passed on to
    `gather_logprobs`]"""
    model = tiny('neox')
    expected = [row_logps(model, p, c, .7).sum().item() for p, c in zip(PROMPTS, ANSWERS)]
    assert sequence_logprobs(model, 0, PROMPTS, ANSWERS, temperature=.7) == pytest.approx(expected, abs=5e-5)
    assert abs(expected[0] - row_logps(model, PROMPTS[0], ANSWERS[0]).sum().item()) > .1


# ---- the own loop

def test_item13_log_softmax_is_computed_in_fp32():
    """bf16 weights: the log-probs are fp32 and those of the bf16 logits to 1e-5 [fails when `completion_logits`
    leaves out `.float()`]"""
    model = tiny('llama').bfloat16()
    batch = collate(PROMPTS[:1], ANSWERS[:1], pad_id=0)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + ANSWERS[0]])).logits[0, 2:6].double()
        logps = completion_logprobs(model, batch)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps[0].double(), logits.log_softmax(-1)[range(4), ANSWERS[0]], atol=1e-5, rtol=0)


# ---- KL estimates

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_item11_k3_stays_finite(dtype):
    """Log-ratios of -100, 0, 100: value and gradient finite, never negative, 0 at 0 [fails when the cap on the
    log-ratio is left out]"""
    logps = torch.tensor([-100., 0., 100.], dtype=dtype, requires_grad=True)
    k3 = kl_k3(logps, torch.zeros(3, dtype=dtype))
    k3.sum().backward()
    assert k3.isfinite().all() and logps.grad.isfinite().all() and (k3 >= 0).all() and k3[1] == 0
    assert kl_k1(logps, 0)[0] == -100 and kl_k2(logps, 0)[0] == 5000


def test_item11_estimators_agree_with_the_exact_kl():
    "Expected k1 and k3 over the vocabulary are the KL itself, to 1e-6 [fails when k3 has policy and reference swapped]"
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    assert kl > .1
    for k in (kl_k1, kl_k3): assert (p.exp() * k(p, q)).sum() == pytest.approx(kl.item(), abs=1e-6)


# ---- text and ids

TEXTS = [('Answer: hello', ' world'), ('Ans', 'wer: hello'), ('hello wor', 'ld, the answer'),
         ('the answer is ', 'here.'), ('the answer is', ' here.'),
         ('\n\nAssistant:', ' hello'), ('hello', '\n\nworld'), ('a', 'b'), ('hello world,', 'the')]

def tokenizer(kind):
    if kind != 'stories260K': return bpe(kind)
    folder = Path(__file__).parents[2]/'shared'/'models'/kind
    if not folder.exists(): pytest.skip(f'the pretrained model {kind} is not beside the project, in shared/models')
    tok = AutoTokenizer.from_pretrained(folder)
    tok.pad_token = tok.pad_token or tok.eos_token
    return tok

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'closing', 'stories260K'])
def test_item35_tokens_never_merge_across_the_boundary(kind):
    """Prompts that end in a space or mid-word: the prompt's ids are those of generation, prompt + completion
    decodes to the text [fails when the completion is encoded alone]"""
    tok = tokenizer(kind)
    for prompt, completion in TEXTS:
        head, ids = encode_prompt(tok, prompt), encode_completion(tok, prompt, completion)
        assert head == [i for i in tok(prompt)['input_ids'] if i != tok.eos_token_id]
        assert len(ids) > 1 and ids[-1] == tok.eos_token_id
        assert tok.decode(head + ids, skip_special_tokens=True) == prompt + completion, (prompt, completion)
        assert decode_completion(tok, head, ids) == completion
        assert encode_completion(tok, prompt, completion, eos=False) == ids[:-1]


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'closing', 'stories260K'])
def test_item36_one_eos_at_the_end_one_bos_at_the_start(kind):
    """Also where the tokenizer closes every text with EOS, or the completion's text already ends in it [fails
    when the trailing EOS isn't stripped before one is added]"""
    tok = tokenizer(kind)
    for prompt, completion in TEXTS + [('hello', ''), ('Answer:', ' hello' + tok.eos_token),
                                       ('hello', tok.eos_token * 2)]:
        ids = encode_prompt(tok, prompt) + encode_completion(tok, prompt, completion)
        assert None not in ids
        assert ids.count(tok.eos_token_id) == 1 and ids[-1] == tok.eos_token_id
        if tok.bos_token_id is not None: assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id


def test_item36_bos_in_the_text_is_not_doubled():
    "A prompt rendered by a chat template starts with BOS already [fails when the tokenizer may add a second one]"
    tok = bpe('llama')
    prompt = '<s>hello world'
    assert encode_prompt(tok, prompt).count(tok.bos_token_id) == 1
    ids = encode_prompt(tok, prompt) + encode_completion(tok, prompt, ', the answer')
    assert ids.count(tok.bos_token_id) == 1 and tok.decode(ids, skip_special_tokens=True) == 'hello world, the answer'


def test_item36_empty_prompt_and_missing_tokens_are_named():
    "[fails when `encode_prompt` may return no ids, and when `check_tokenizer` looks at the pad token only]"
    with pytest.raises(UserError, match='prompt'): encode_prompt(bpe('gpt2'), '')
    for kind in ('pad', 'eos'):
        tok = copy.deepcopy(bpe('gpt2'))
        setattr(tok, f'{kind}_token', None)
        with pytest.raises(UserError, match=f'{kind}_token'): check_tokenizer(tok)
