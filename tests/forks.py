"""New processes that are forks of one that has imported the libraries and done nothing else. Importing them takes
most of a short process's time."""
import multiprocessing
import os
import socket
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

SERVER = multiprocessing.get_context('forkserver')
TESTS = Path(__file__).parent


def set_path(path):
    if path is None: os.environ.pop('PYTHONPATH', None)
    else: os.environ['PYTHONPATH'] = path


def start_server():
    "The server looks for `libraries` in PYTHONPATH, as it starts"
    path = os.environ.get('PYTHONPATH')
    SERVER.set_forkserver_preload(['libraries'])
    set_path(os.pathsep.join([str(TESTS), *([path] if path else [])]))
    try: forkserver.ensure_running()
    finally: set_path(path)


def in_fork(target, args, env, cwd, out, err):
    "In the new process: `target(*args)`, in an environment of its own; its streams go to the files `out` and `err`"
    for fd, path in ((1, out), (2, err)):
        with open(path, 'ab') as f: os.dup2(f.fileno(), fd)
    os.environ.clear(), os.environ.update(env)
    os.chdir(cwd)
    target(*args)


def fork(target, args, out, err=None, env=None, cwd=None):
    "The process, started"
    start_server()
    process = SERVER.Process(target=in_fork, args=(target, args, dict(env or os.environ), str(cwd or Path.cwd()),
                                                   str(out), str(err or out)))
    process.start()
    return process


def execute(code, argv):
    "What `python -c CODE ARGV` does, in a process that finds the modules of the tests"
    import torch
    torch.set_num_threads(1)
    sys.argv = ['-c', *argv]
    sys.path[:0] = [str(TESTS), *filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))]
    exec(compile(code, '<code>', 'exec'), {'__name__': '__main__'})


def ended(process, out, err, timeout):
    "Return code and texts of a process that is at its end, like `subprocess.run`'s"
    process.join(timeout)
    if process.exitcode is None: process.kill(); process.join()
    text = lambda path: Path(path).read_text(errors='replace') if Path(path).exists() else ''
    return SimpleNamespace(returncode=process.exitcode, stdout=text(out), stderr=text(err))


def run_code(code, *argv, env=None, cwd=None, timeout=600):
    "`subprocess.run([sys.executable, '-c', code, *argv])`, without the imports"
    with tempfile.TemporaryDirectory() as tmp:
        files = f'{tmp}/out', f'{tmp}/err'
        return ended(fork(execute, (code, list(map(str, argv))), *files, env, cwd), *files, timeout)


@contextmanager
def running(*args, **kw):
    "The process of `fork`, which is gone behind the `with`, whatever happened in it"
    process = fork(*args, **kw)
    try: yield process
    finally: process.kill(), process.join()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def run_on_two(code, *argv, env=(), cwd=None, timeout=600):
    "The same code in two processes, with the variables that torchrun sets; `accelerate launch` is test_study.py's"
    port = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    with tempfile.TemporaryDirectory() as tmp:
        files = [(f'{tmp}/out-{rank}', f'{tmp}/err-{rank}') for rank in '01']
        ranks = [os.environ | port | dict(env) | dict(RANK=rank, LOCAL_RANK=rank) for rank in '01']
        started = [fork(execute, (code, list(map(str, argv))), *fs, own, cwd) for fs, own in zip(files, ranks)]
        return [ended(p, *fs, timeout) for p, fs in zip(started, files)]
