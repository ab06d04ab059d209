"""Rollout engines: what a server may do wrong, a run that stops and goes on, and the mathematics of the weights.
In [brackets]: the change to the code that was made once to see the test fail."""
import contextlib
import copy
import math
import socket
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from mpo_nb.core import UserError
from mpo_nb.engines import (
    Engine, EngineError, EngineServer, engine_samples, importance_weights, LocalEngine, Sampling, ServerEngine,
    VLLMEngine
)
from mpo_nb.ppo import ppo_losses
from mpo_nb.ppo_config import rollout_seed
from util import (AtTheEnd, distance, end_state, fingerprint, logged, ppo_trainer, talker, tiny, toy_prompts,
                  toy_tokenizer, weights)

pytestmark = pytest.mark.usefixtures('own_random_state')
KEY = 'sk-secret-0123456789'


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    for k in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.delenv(k, raising=False)


@pytest.fixture
def local(): return LocalEngine(talker(), toy_tokenizer())


class Warm(LocalEngine):
    "Draws, and says so, at another temperature than it is asked to"
    def generate(self, prompt_ids, n, s):
        return super().generate(prompt_ids, n, Sampling(s.max_new_tokens, 1.6 * s.temperature, seed=s.seed))


class Scripted(EngineServer):
    "One entry of `script` for each request: None (a good reply), an HTTP status, or what is done to a good reply"
    def __init__(self, engine, script=()):
        super().__init__(engine)
        self.script, self.asked, self.awake = list(script), [], threading.Event()

    def handle_error(self, *_): pass     # clients hang up in these tests

    def answer(self, body):
        self.asked.append(body)
        step = self.script.pop(0) if self.script else None
        if step == 'hang': self.awake.wait(20)
        if isinstance(step, int): return step, dict(error=dict(message=f'no, {KEY}'))
        status, reply = super().answer(body)
        if callable(step): reply = step(reply) or reply
        return status, reply

    def __exit__(self, *_): self.awake.set(); super().__exit__()


def asked(server, n=2, tokens=6, retries=2, timeout=20.):
    "Completions of three prompts over HTTP"
    remote = ServerEngine(server.url, 'm', timeout=timeout, retries=retries)
    return engine_samples(remote, toy_tokenizer(), len(toy_tokenizer()), toy_prompts(3), n, Sampling(tokens))


def first(reply): return reply['choices'][0]

def change(key, value): return lambda reply: first(reply).__setitem__(key, value)

def with_ids(ids):
    "The first completion has these ids, and log-probs that fit"
    def do(reply):
        first(reply).update(token_ids=ids, logprobs=dict(token_logprobs=[-1.] * len(ids)))
    return do

def with_logprobs(*logprobs):
    def do(reply): first(reply).update(token_ids=[5, 1], logprobs=dict(token_logprobs=list(logprobs)))
    return do

def text_only(reply):
    for c in reply['choices']: c.pop('token_ids'); c['logprobs'] = dict(tokens=['yes'], token_logprobs=[-.1])

WRONG = dict(
    fewer=(lambda r: r['choices'].pop(), '5 completions for 3 prompts × 2'),
    twice=(lambda r: r['choices'][1].update(index=0), '6 completions for 3 prompts × 2'),
    unknown_id=(with_ids([10**6, 1]), 'token id 1000000'), negative=(with_ids([-1, 1]), 'token id -1'),
    no_number=(with_ids(['5', 1]), "token id '5'"), empty=(with_ids([]), '1 to 6 token ids'),
    long=(with_ids([5] * 7), '1 to 6 token ids'), nan=(with_logprobs(math.nan, -1.), 'log-prob nan'),
    null=(with_logprobs(None, -1.), 'log-prob None'), impossible=(with_logprobs(-math.inf, -1.), 'log-prob -inf'),
    above=(with_logprobs(-1., .5), 'log-prob 0.5'), few=(with_logprobs(-1.), 'one log-prob for each'),
    beyond=(with_ids([5, 1, 6]), 'EOS where it must not'), other_stop=(with_ids([5, 6]), 'without EOS at token 6'),
    text=(text_only, 'text without token ids'), without=(change('logprobs', None), 'one log-prob for each'),
    endless_id=(lambda r: (first(r).pop('token_ids'), first(r)['logprobs'].update(tokens=['token_id:' + '9' * 5000])),
                'text without token ids'),
    other_tokens=(lambda r: first(r)['logprobs'].update(tokens=['token_id:9']), 'of other tokens'),
    other_prompt=(change('prompt_token_ids', [7]), 'read another prompt'),
    chat=(lambda r: dict(choices='?'), 'no list of completions'), array=(lambda r: [r], 'no list of completions'))


@pytest.mark.parametrize('what', WRONG)
def test_what_cannot_be_trained_on_is_one_sentence(what, local):
    "[fails where `check_drawn` returns at once, or `read_choice` doesn't compare]"
    do, says = WRONG[what]
    def step(reply):
        new = do(reply)
        return new if isinstance(new, list) or isinstance(new, dict) and 'choices' in new else None
    with Scripted(local, [step]) as server, pytest.raises(EngineError) as e: asked(server)
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize('status', [401, 404, 400])
def test_a_refusal_is_not_asked_again_and_shows_no_key(status, local):
    "[fails where the key is not replaced]"
    with Scripted(local, [status] * 9) as server, pytest.raises(EngineError, match='gave no completions') as e:
        asked(server)
    assert len(server.asked) == 1 and KEY not in str(e.value)
    assert ('no, ***' in str(e.value)) == (status != 401)


def test_a_server_that_stumbles_is_asked_again(local):
    "[fails with max_retries=0]"
    with Scripted(local, [500, 429]) as server: s = asked(server)
    assert len(server.asked) == 3 and len(s) == 6
    assert s.completion_ids == engine_samples(local, toy_tokenizer(), len(toy_tokenizer()), toy_prompts(3), 2,
                                              Sampling(6)).completion_ids


def test_what_a_server_is_asked_leaves_nothing_open(local):
    "[fails where top_k is left to the server]"
    with Scripted(local) as server: asked(server)
    body, = server.asked
    assert body | dict(prompt=0) == dict(
        model='m', prompt=0, n=2, max_tokens=6, temperature=1., top_p=1., logprobs=1, top_k=0, min_p=0.,
        repetition_penalty=1., min_tokens=0, return_token_ids=True, return_tokens_as_token_ids=True)
    assert len(body['prompt']) == 3 and all(type(i) is int for row in body['prompt'] for i in row)


def test_a_server_that_hangs_is_left(local):
    "The error comes while the server still sleeps [fails, after 20 s, without a limit]"
    with Scripted(local, ['hang'] * 9) as server:
        with pytest.raises(EngineError, match='gave no completions'): asked(server, timeout=2., retries=1)
        assert not server.awake.is_set() and len(server.asked) >= 2


def test_a_server_that_sends_a_byte_now_and_then_is_left():
    "No read takes long, and the reply never ends [fails, after 20 s, where `generate` asks without `within`]"
    left = threading.Event()
    with socket.create_server(('127.0.0.1', 0)) as listening:
        def drip():
            c, _ = listening.accept()
            c.recv(10**6); c.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n')
            with contextlib.suppress(OSError):
                for _ in range(100):
                    if left.wait(.2): return c.close()
                    c.sendall(b' ')
        threading.Thread(target=drip, daemon=True).start()
        remote = ServerEngine(f'http://127.0.0.1:{listening.getsockname()[1]}/v1', 'm', timeout=1., retries=0)
        with pytest.raises(EngineError, match='no whole reply within 1.0 s'): remote.generate([[5]], 1, Sampling(3))
        left.set()


def test_a_push_that_hangs_or_fails_is_one_sentence():
    "[fails where `update` calls `push` as it is]"
    awake = threading.Event()
    slow = ServerEngine('http://127.0.0.1:9/v1', 'm', push=lambda model: awake.wait(20), timeout=.2)
    with pytest.raises(EngineError, match='could not be pushed'): slow.update(tiny())
    awake.set()
    def broken(model): raise ConnectionError(f'no, {KEY}')
    with pytest.raises(EngineError, match='could not be pushed') as e:
        ServerEngine('http://127.0.0.1:9/v1', 'm', push=broken).update(tiny())
    assert KEY not in str(e.value)


# ---- the mathematics

@pytest.mark.parametrize('heat', [.7, 1.5])
def test_without_weights_the_gradient_is_biased(heat):
    """Policy loss and KL in the loss, all tokens enumerated, each with its chance under the engine
    [fails where `ppo_losses` leaves the weights out]"""
    theta = torch.tensor([2., 1., 0., -1., -2.], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0., 1., .5, 1., 0.], dtype=torch.float64).log_softmax(0)
    adv = torch.tensor([-1., 0., 2., 3., 4.], dtype=torch.float64)
    p, q = theta.detach().log_softmax(0), (theta.detach() / heat).log_softmax(0)

    def of_token(y, importance):
        now, old = theta.log_softmax(0)[y].view(1, 1), p[y].view(1, 1)
        mb = dict(old_logprobs=old, ref_logprobs=ref[y].view(1, 1), advantages=adv[y].view(1, 1),
                  mask=torch.ones(1, 1, dtype=torch.bool))
        if importance is not None: mb['importance'] = importance[y].view(1, 1)
        terms = ppo_losses((now, torch.zeros(1, 1), None), mb, kl_estimator='k3')
        return torch.stack([torch.autograd.grad(terms[k], theta, retain_graph=True)[0]
                            for k in ('loss/policy', 'loss/kl')])

    def expected(chances, importance=None): return sum(chances[y].exp() * of_token(y, importance) for y in range(5))
    right = expected(p)
    off = lambda g: (g - right).norm(dim=1) / right.norm(dim=1)
    assert (off(expected(q)) > .1).all()                                               # the bias
    assert (off(expected(q, importance_weights(p, q, math.inf))) < 1e-12).all()        # none of it
    assert (off(expected(q, importance_weights(p, q))) < .5 * off(expected(q))).all()  # little, with the default cap


def test_weights_are_cut_and_carry_no_gradient():
    "[fails without `detach`, or without `clamp`: the last is infinite]"
    now = torch.tensor([[0., -1., -2.]], requires_grad=True)
    w = importance_weights(now, torch.tensor([[0., -1.5, -2000.]]), cap=3.)
    assert not w.requires_grad
    torch.testing.assert_close(w, torch.tensor([[1., math.exp(.5), 3.]]))


# ---- a run

class OurTokens(EngineServer):
    "Draws in request number k what the policy itself would draw in rollout k"
    k = 0
    def answer(self, body):
        draw, seed = self.engine.generate, rollout_seed(42, self.k)
        self.engine.generate = lambda ids, n, s: draw(ids, n, Sampling(s.max_new_tokens, s.temperature, seed=seed))
        try: return super().answer(body)
        finally: self.engine.generate, self.k = draw, self.k + 1


@pytest.mark.parametrize('how', [{}, dict(advantage_estimator='rloo', num_generations=2, kl_in='loss')],
                         ids=['gae', 'rloo'])
def test_ppo_through_a_server_equals_ppo(how, tmp_path, local):
    "The same tokens over HTTP: the same weights [fails where the engine isn't given the new weights]"
    how = dict(num_rollouts=3, num_ppo_epochs=2, seed=42) | how
    own = ppo_trainer(tmp_path/'own', **how)
    own.train()
    with OurTokens(local) as server:
        t = ppo_trainer(tmp_path/'served', trainer=dict(engine=ServerEngine(server.url, 'm', push=local.update)), **how)
        t.train()
    assert server.k == 3 and distance(weights(own.model), weights(t.model)) < 1e-6
    assert distance(weights(own.model), weights(ppo_trainer(tmp_path, **how).model)) > 1e-3
    assert max(logged(t, 'engine/mismatch')) < 1e-5 and logged(t, 'engine/capped') == [0] * 3
    assert not logged(own, 'engine/mismatch')


class Watched(LocalEngine):
    "Writes down what it is asked, and fails in the rollouts that are named"
    def __init__(self, *args, fails=()): super().__init__(*args); self.seen, self.fails = [], fails
    def generate(self, prompt_ids, n, s):
        self.seen.append((len(prompt_ids), n, s))
        if len(self.seen) - 1 in self.fails: raise EngineError('the server is gone')
        return super().generate(prompt_ids, n, s)


def test_each_prompt_is_sent_once(tmp_path):
    "[fails where the prompts are sent as they stand in the rollout]"
    engine = Watched(talker(), toy_tokenizer())
    t = ppo_trainer(tmp_path, num_generations=4, trainer=dict(engine=engine, eval_dataset=Dataset.from_dict(
        {'prompt': toy_prompts(3)})), temperature=.8, min_new_tokens=2)
    t.train(); t.evaluate()
    assert [seen[:2] for seen in engine.seen] == [(2, 4), (3, 1)]
    s = engine.seen[0][2]
    assert (s.max_new_tokens, s.temperature, s.min_new_tokens) == (6, .8, 2)
    assert logged(t, 'eval_engine/mismatch')[0] < 1e-5 and min(map(len, t.experience.samples.completion_ids)) >= 2


def test_the_weights_of_a_rollout_are_those_of_its_tokens(tmp_path):
    "At stop strings too, which cut off tokens [fails where `cut_at_stop` or `minibatch` loses them]"
    t = ppo_trainer(tmp_path, stop_strings=[' you', ' the', '.'], importance_cap=1.2, max_new_tokens=12,
                    trainer=dict(engine=Warm(talker(), toy_tokenizer())))
    t.train()
    e = t.experience
    s = e.samples
    assert any(len(l) > len(c) for l, c in zip(s.logprobs, s.completion_ids)), 'nothing was cut'
    for i, ids in enumerate(s.completion_ids):
        want = [min(math.exp(a - b), 1.2) for a, b in zip(e.logprobs[i].tolist(), s.logprobs[i][:len(ids)])]
        torch.testing.assert_close(e.importance[i, :len(ids)], torch.tensor(want))
        mb = t._micro_batch([i])
        assert torch.equal(mb['importance'][mb['mask']], e.importance[i, :len(ids)])
    assert logged(t, 'engine/mismatch')[0] > .1 and 0 < logged(t, 'engine/capped')[0] < 1


def run(folder, engine, resume=None, **kw):
    how = dict(num_rollouts=3, num_ppo_epochs=2, optim='adamw_torch', learning_rate=3e-3, ref_ema=.8, kl_target=.5,
               save_strategy='steps', save_steps=100)
    torch.manual_seed(0)
    t = ppo_trainer(folder, trainer=dict(engine=engine, callbacks=[AtTheEnd()]), **how | kw)
    t.train(resume_from_checkpoint=resume)
    return t


def test_an_engine_that_fails_stops_the_run_and_keeps_it(tmp_path):
    """Nothing was to be saved before the end; resumed, the run ends as one that was never stopped
    [fails without `_kept`, and where the reference follows before the engine is asked]"""
    make = lambda **kw: Watched(talker(), toy_tokenizer(), **kw)
    straight = run(tmp_path/'straight', make())
    with pytest.raises(EngineError, match='the server is gone; the run up to here is in checkpoint-4') as e:
        run(tmp_path/'broken', make(fails=[2]))
    assert '\n' not in str(e.value)
    resumed = run(tmp_path/'broken', make(), resume=str(tmp_path/'broken'/'checkpoint-4'))
    assert end_state(resumed) == end_state(straight)


def test_an_engine_that_fails_in_an_evaluation_keeps_the_run_too(tmp_path):
    "Between two updates on a rollout, which is kept with it [fails where only `_rollout` asks for a checkpoint]"
    with pytest.raises(EngineError, match='is in checkpoint-3'):
        ppo_trainer(tmp_path, num_rollouts=2, num_ppo_epochs=2, save_strategy='steps', save_steps=100, eval_steps=3,
                    eval_strategy='steps', trainer=dict(engine=Watched(talker(), toy_tokenizer(), fails=[2]),
                    eval_dataset=Dataset.from_dict({'prompt': toy_prompts(3)}))).train()
    assert (tmp_path/'checkpoint-3'/'rollout-0.safetensors').exists()


def test_without_checkpoints_a_failing_engine_writes_none(tmp_path):
    with pytest.raises(EngineError, match='the server is gone$'):
        run(tmp_path, Watched(talker(), toy_tokenizer(), fails=[1]), save_strategy='no')
    assert not list(tmp_path.glob('checkpoint*'))


def test_an_evaluation_outside_of_a_run_writes_no_checkpoint(tmp_path):
    "[fails where `_kept` doesn't ask whether a run is on]"
    t = run(tmp_path, Watched(talker(), toy_tokenizer(), fails=[1]), num_rollouts=1, save_strategy='epoch')
    t.args.output_dir = str(tmp_path/'later')
    with pytest.raises(EngineError, match='the server is gone$'): t.evaluate(t.train_dataset)
    assert not (tmp_path/'later').exists()


def test_a_rollout_of_an_engine_survives_a_stop(tmp_path):
    "In the middle of it [fails where the checkpoint leaves the weights out]"
    make = lambda: Warm(talker(), toy_tokenizer())
    straight = run(tmp_path, make(), num_rollouts=2, save_steps=3)
    resumed = run(tmp_path/'resumed', make(), num_rollouts=2, resume=str(tmp_path/'checkpoint-3'))
    assert resumed.experience.importance is not None and end_state(resumed) == end_state(straight)


def test_a_failure_of_another_process_stops_this_one(tmp_path, monkeypatch):
    "[fails where each process raises for itself: the others would wait for it]"
    t = ppo_trainer(tmp_path, trainer=dict(engine=Watched(talker(), toy_tokenizer())))
    monkeypatch.setattr(type(t), '_total', lambda self, x: x + 1)
    with pytest.raises(EngineError, match='another process'): t._sample(toy_prompts(2), 0)


def test_an_adapter_is_merged_in_a_copy(tmp_path):
    "[fails where the adapter is merged in place]"
    from peft import LoraConfig
    engine = Watched(tiny(), toy_tokenizer())
    t = ppo_trainer(tmp_path, tiny(), trainer=dict(
        engine=engine, peft_config=LoraConfig(r=2, target_modules='all-linear', init_lora_weights=False)))
    before, own = fingerprint(t.policy), t._sample(toy_prompts(4), 0).completion_ids
    assert fingerprint(t.policy) == before
    t.engine = None
    assert t._sample(toy_prompts(4), 0).completion_ids == own
    assert distance(weights(engine.model), weights(tiny())) > .01


@pytest.mark.parametrize('kw, says', [(dict(importance_cap=.5), 'importance_cap is 0.5'),
                                      (dict(importance_cap=math.nan), 'importance_cap is nan')])
def test_senseless_settings_are_refused(kw, says, tmp_path):
    with pytest.raises(UserError, match=says): ppo_trainer(tmp_path, **kw)


def test_weights_that_cannot_arrive_are_refused(tmp_path):
    "[fails where a server without `push` draws with the weights of the start]"
    with pytest.raises(UserError, match='needs push='):
        ppo_trainer(tmp_path, trainer=dict(engine=ServerEngine('http://127.0.0.1:9/v1', 'm'))).train()
    with pytest.raises(UserError, match='engine is str'): ppo_trainer(tmp_path, trainer=dict(engine='vllm'))


# ---- vLLM, by an object with the methods of TRL 1.16's VLLMGeneration

class FakeVLLM:
    "Its signatures were checked against TRL's source by `test_trl_has_what_is_called`"
    def __init__(self, model, accelerator, processing_class, mode='colocate', server_timeout=240., **kw):
        self.model, self.tok, self.mode, self.kw, self.limits, self.synced = model, processing_class, mode, kw, [], 0
        session = SimpleNamespace(request=lambda method, url, timeout=None: self.limits.append(timeout))
        if mode == 'server': self.vllm_client = SimpleNamespace(session=session)

    def sync_weights(self):
        self.engine, self.synced = LocalEngine(copy.deepcopy(self.model), self.tok), self.synced + 1
        if self.mode == 'server': self.vllm_client.session.request('POST', 'update_weights')

    def generate(self, prompts, images, num_generations, profiler=None):
        assert images is None and self.generation_kwargs == dict(min_tokens=0)
        ids, logprobs = self.engine.generate(prompts, 1, Sampling(self.max_completion_length, self.temperature))
        return prompts, ids, [[[x] for x in row] for row in logprobs], None


@pytest.mark.parametrize('mode', ['colocate', 'server'])
def test_ppo_with_vllms_methods(mode, tmp_path, monkeypatch):
    "[fails where the HTTP session gets no limit, or the weights go out only once]"
    monkeypatch.setitem(sys.modules, 'trl.generation.vllm_generation', SimpleNamespace(VLLMGeneration=FakeVLLM))
    engine = VLLMEngine(toy_tokenizer(), mode, timeout=60., max_model_length=99)
    t = ppo_trainer(tmp_path, num_rollouts=2, num_generations=2, trainer=dict(engine=engine))
    t.train()
    assert engine.vllm.synced == 2 and engine.vllm.kw == dict(max_model_length=99)
    assert engine.vllm.limits == ([10., 10.] if mode == 'server' else [])
    assert max(logged(t, 'engine/mismatch')) < 1e-5
    engine.vllm.engine = None
    with pytest.raises(EngineError, match='vLLM failed'): engine.generate([[5]], 1, Sampling(3))


def test_trl_has_what_is_called():
    "And without vLLM there is one sentence [fails for another name of an argument]"
    from inspect import signature
    from trl.generation.vllm_generation import VLLMGeneration
    for name in ('__init__', 'sync_weights', 'generate'):
        ours, theirs = (signature(getattr(c, name)).parameters for c in (FakeVLLM, VLLMGeneration))
        assert [p for p in ours if p != 'kw'][:4] == list(theirs)[:4] and set(ours) - {'kw'} <= set(theirs)
    with pytest.raises(UserError, match='vLLM is not installed'): VLLMEngine(toy_tokenizer()).update(tiny())


def test_the_interface_is_two_methods():
    for f, args in ((Engine().generate, ([], 1, Sampling(3))), (Engine().update, (None,))):
        with pytest.raises(NotImplementedError): f(*args)
