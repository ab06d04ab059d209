"09_chats: a chat in the model's own spelling, and templates of strangers."
import copy
import threading
import time

import pytest
from util import toy_tokenizer

from mpo_nb import chats
from mpo_nb.chats import as_chats, dialogue_messages, render_chat
from mpo_nb.core import UserError

HELLO = [dict(role='user', content='Hello')]


def speaking(template):
    tok = copy.deepcopy(toy_tokenizer())
    tok.chat_template = template
    return tok


# about a minute: without the limit these tests fail, and don't hang
LONG = '{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}'


@pytest.mark.parametrize('thread', [False, True], ids=['main thread', 'another thread'])
def test_a_template_that_does_not_end_is_stopped(thread, monkeypatch):
    "In whatever thread it runs [fails without the limit; in another thread where only a signal would stop it]"
    monkeypatch.setattr(chats, 'CHAT_SECONDS', .3)
    said, tok = [], speaking(LONG)
    def run():
        try: render_chat(tok, HELLO)
        except UserError as e: said.append(str(e))
    begun = time.monotonic()
    if thread: t = threading.Thread(target=run); t.start(); t.join(60)
    else: run()
    assert said and 'was still running after 0.3 s' in said[0] and time.monotonic() - begun < 30


def test_a_template_that_does_not_end_for_one_pair_stops_all(monkeypatch):
    "It is not set aside, ten seconds a row [fails when as_chats sets aside whatever render_chat says]"
    monkeypatch.setattr(chats, 'CHAT_SECONDS', .3)
    tok = speaking("{% if 'x' in messages[0].content %}" + LONG + '{% endif %}{{ messages[0].content }}'
                   '{% for m in messages[1:] %}{{ m.content + eos_token }}{% endfor %}')
    rows = [dict(prompt=p, chosen=' b', rejected=' c') for p in ('a', 'x')]
    assert len(as_chats(rows[:1], tok)[0]) == 1
    with pytest.raises(UserError, match='was still running'): as_chats(rows, tok)


def test_a_template_that_writes_without_end_is_refused():
    with pytest.raises(UserError, match='made 20,000,000 characters of one chat'):
        render_chat(speaking("{{ 'a' * 20000000 }}"), HELLO)


def test_a_limit_that_is_not_reached_leaves_nothing_behind():
    "Nothing is raised later, and no thread stays [fails when the timer isn't cancelled]"
    before, tok = threading.active_count(), speaking('{{ messages[0].content }}')
    for _ in range(50): assert render_chat(tok, HELLO) == 'Hello'
    time.sleep(.1)
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize('text, turns', [
    ('\n\nHuman: a\n\nAssistant:', [('user', 'a')]),
    ('Human: a\n\nAssistant: b\n\nHuman: c', [('user', 'a'), ('assistant', 'b'), ('user', 'c')]),
    ('\n\nHuman: a\n\nHuman: b\n\nAssistant:', [('user', 'a'), ('user', 'b')]),
    ('\n\nHuman: She said "Human: x"\n\nAssistant:', [('user', 'She said "Human: x"')]),
    ('\n\nHuman: a\n\nAssistant: b', [('user', 'a'), ('assistant', 'b')]),
    ('\n\nHuman:\n\nAssistant:', [('user', '')]),
    ('What is it?', [('user', 'What is it?')]),
    ('Look:\n\nHuman: a\n\nAssistant:', [('user', 'Look:\n\nHuman: a\n\nAssistant:')])])
def test_turns_of_a_text(text, turns):
    assert [(m['role'], m['content']) for m in dialogue_messages(text)] == turns
