"""A scripted OpenAI-compatible server on 127.0.0.1 that goes wrong where it is told to, and writes down what it
was asked."""
import json
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

READABLE = re.compile(r'<(context|A|B)-\w+>\n(.*?)\n</', re.S)


def row_of(text):
    "Number of the row, which the tests write into the prompt"
    return int(re.search(r'question (\d+)', text)[1])


def best(prompt, a, b):
    "The verdict of the scripted judge: the answer that says it is better is better"
    score = lambda t: int(re.search(r'quality (-?\d+)', t)[1])
    return 'A' if score(a) > score(b) else 'B' if score(a) < score(b) else 'tie'


class Server(ThreadingHTTPServer):
    """`faults`: row -> list of faults, one for each request about that row in one order, before it is answered
    well; a last '...' repeats the one before it.
    `refuses`: names of parameters that are answered by 400."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self, faults=None, verdict=best, refuses=(), delay=0.):
        super().__init__(('127.0.0.1', 0), Handler)
        self.faults, self.verdict, self.refuses, self.delay = faults or {}, verdict, set(refuses), delay
        self.lock, self.requests, self.replies, self.paid, self.asked = threading.Lock(), [], Counter(), [], Counter()
        self.peak = self.under_way = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        return self

    def __exit__(self, *_): self.shutdown(); self.server_close()

    def handle_error(self, request, client_address): pass   # clients are killed in these tests

    def fault(self, question):
        with self.lock:
            n, script = self.asked[question], self.faults.get(question[0], [])
            self.asked[question] += 1
        if script[-1:] == ['...']: return script[min(n, len(script) - 2)]
        return script[n] if n < len(script) else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_): pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with s.lock: s.under_way += 1; s.peak = max(s.peak, s.under_way)
        try: self.answer(body)
        finally:
            with s.lock: s.under_way -= 1

    def answer(self, body):
        s, text = self.server, body['messages'][0]['content']
        prompt, a, b = [m[1] for m in READABLE.findall(text)]
        question = row_of(prompt), a, b
        with s.lock: s.requests.append((question, body, self.headers['Authorization']))
        if refused := next((p for p in body if p in s.refuses), None):
            return self.error(400, f"Unsupported parameter: '{refused}' is not supported with this model.",
                              param=refused)
        if s.delay: time.sleep(s.delay)
        fault = s.fault(question)
        getattr(self, f'f_{fault}',
                lambda *_: self.error(int(fault), f'scripted {fault}'))(question, body, s.verdict(prompt, a, b))

    def f_None(self, question, body, label):
        "A good reply"
        with self.server.lock: self.server.paid.append(question)
        self.chat(self.verdict_text(body, label))

    def verdict_text(self, body, label):
        if 'response_format' in body: return json.dumps(dict(reason=f'[[A]] or [[B]]? {label}', verdict=label))
        return f'One might say [[A]], one might say [[B]].\n[[{label}]]'

    def f_timeout(self, question, body, label): time.sleep(8); self.close_connection = True

    def f_cut(self, question, body, label):
        "Half of the body, then the connection is closed"
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', '1000')
        self.end_headers()
        self.wfile.write(b'{"id": "1", "choices": [{"message": {"content": "[[B]]')
        self.close_connection = True

    def f_empty(self, question, body, label): self.chat('')

    def f_length(self, question, body, label):
        "Cut off, unless it was given more room than at first"
        room = body.get('max_tokens') or body.get('max_completion_tokens')
        if room <= 64: return self.chat('{"reason": "[[B]]', finish='length')
        self.f_None(question, body, label)

    # a whole HTTP body that is not JSON
    def f_body(self, question, body, label): self.send('{"choices": [{"mess', 200)

    def f_nochoices(self, question, body, label):
        self.send(json.dumps(dict(id='1', object='chat.completion', created=0, model='m', choices=[])), 200)

    def f_json(self, question, body, label): self.chat('{"reason": "x", "verdict": "A", "verdict": "B"}')

    def f_prose(self, question, body, label): self.chat('not A')

    def chat(self, content, finish='stop', model='served-model'):
        self.send(json.dumps(dict(id='1', object='chat.completion', created=0, model=model,
                                  usage=dict(prompt_tokens=100, completion_tokens=10, total_tokens=110),
                                  choices=[dict(index=0, finish_reason=finish,
                                                message=dict(role='assistant', content=content))])), 200)

    def error(self, status, message, **kw): self.send(json.dumps(dict(error=dict(message=message, **kw))), status)

    def send(self, text, status): self.send_bytes(text.encode(), status)

    def send_bytes(self, data, status):
        with self.server.lock: self.server.replies[status] += 1
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.send_header('retry-after-ms', '5')
        self.end_headers()
        self.wfile.write(data)
