"Text from others on our pages, in a real browser: it is shown, nothing in it runs, no request leaves."
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest

import mpo_nb
from mpo_nb.core import printable
from mpo_nb.evaluate import side_by_side
from mpo_nb.results import evaluate_file

GO, PACKAGE = 'go()', Path(mpo_nb.__file__).parent
MARKUP = [f'<script>{GO}</script>', f'<img src=x onerror={GO}>', f'"><svg onload={GO}>', f"'><body onload={GO}>",
          f'<iframe src="javascript:parent.{GO}"></iframe>', f'<a href="javascript:{GO}">a</a>',
          f'</style><script>{GO}</script>', f'</title><script>{GO}</script>', f'--><script>{GO}</script><!--',
          '<meta http-equiv=refresh content="0;url=HOST/refresh">', '<link rel=stylesheet href="HOST/style">',
          '<base href="HOST/">', '<img src="HOST/image">', '<form action="HOST"><button autofocus>a</button></form>',
          f'<details open ontoggle={GO}>', f'<input autofocus onfocus={GO}>', f'<math href="javascript:{GO}">a</math>',
          f'<svg><script>{GO}</script></svg>', '<plaintext>', '<style>* {display: none}</style>',
          '<object data="HOST/object"></object>', '{{ 7*7 }}', '{% raw %}', '&lt;b&gt;', ']]>', '\u202eback', '\x00']
FOREIGN = 'script, iframe, svg, link, base, form, input, object, math, plaintext, [onerror], [onload], ' \
          '[onfocus], [ontoggle], a[href^="javascript"], meta[http-equiv=refresh]'


@pytest.fixture
def host():
    "Address of a server, and the list of what it was asked for"
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self): asked.append(self.path); self.send_response(200); self.end_headers()
        def log_message(self, *args): pass
    server = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', asked
    server.shutdown()


def completions(folder, host):
    "A file in which prompts, policies and completions are markup"
    texts = [t.replace('HOST', host) for t in MARKUP]
    rows = [dict(prompt=f'{i} {t}', policy=p, completion=f'{p} {t}', score=i*(k + 1.))
            for i, t in enumerate(texts) for k, p in enumerate(texts[:3])]
    (folder/'c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder/'c.jsonl'


def opened(browser, path):
    "What is in an opened page that only a stranger can have put there"
    browser.execute_cdp_cmd('Page.addScriptToEvaluateOnNewDocument',
                            dict(source='window.went = 0; window.go = () => { window.went += 1 }'))
    browser.get(f'file://{path}')
    assert browser.execute_script('return window.went') == 0
    return browser.execute_script(f"return [...document.querySelectorAll('{FOREIGN}')].map(x => x.outerHTML)")


def test_results_page(browser, host, tmp_path):
    "Escaping alone holds, without the policy that the page gives the browser"
    evaluate_file(completions(tmp_path, host[0]), output_dir=tmp_path/'out')
    page, = (tmp_path/'out').glob('*.html')
    html = page.read_text(encoding='utf-8')
    page.write_text(re.sub('<meta http-equiv[^>]*>', '', html), encoding='utf-8')
    assert opened(browser, page) == [] and host[1] == []
    text = browser.find_element('tag name', 'body').text
    assert f'<script>{GO}</script>' in text and '{{ 7*7 }}' in text and printable(text, keep='\n') == text


def test_table_of_samples(browser, host, tmp_path):
    "A notebook's output has no policy of its own"
    df = pd.read_json(completions(tmp_path, host[0]), lines=True)
    df['prompt_id'] = pd.factorize(df.prompt)[0]
    (tmp_path/'t.html').write_text(f'<meta charset="utf-8">{side_by_side(df, 40)}', encoding='utf-8')
    assert opened(browser, tmp_path/'t.html') == [] and host[1] == []


@pytest.mark.parametrize('name', sorted(p.name for p in PACKAGE.glob('*.html.jinja')))
def test_every_page_has_the_policy(name):
    source = (PACKAGE/name).read_text(encoding='utf-8')
    assert 'Content-Security-Policy' in source or "{% include 'head.html.jinja' %}" in source


def test_the_policy_holds_where_escaping_would_fail(browser, host, tmp_path):
    "Markup put into the page behind the template's back neither runs nor asks"
    evaluate_file(completions(tmp_path, host[0]), output_dir=tmp_path/'out')
    page, = (tmp_path/'out').glob('*.html')
    # but for the refresh, which no policy forbids, and what would hide the rest
    evil = ''.join(t for t in MARKUP[:18] if 'refresh' not in t).replace('HOST', host[0])
    page.write_text(page.read_text(encoding='utf-8').replace('<body>', f'<body>{evil}'), encoding='utf-8')
    assert opened(browser, page) and host[1] == []
