"""Run a notebook as `nbdev-test` does, in a process of its own: a fork of one that has imported the libraries and done
nothing else. Importing them takes most of a short notebook's time."""
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

SERVER = multiprocessing.get_context('forkserver')


def set_path(path):
    if path is None: os.environ.pop('PYTHONPATH', None)
    else: os.environ['PYTHONPATH'] = path


def start_server(path):
    "The server looks for `libraries` in PYTHONPATH, as it starts"
    SERVER.set_forkserver_preload(['libraries'])
    set_path(os.pathsep.join([str(Path(__file__).parent), *([path] if path else [])]))
    try: forkserver.ensure_running()
    finally: set_path(path)


def in_fork(path, log, python_path, save):
    from nbdev.test import test_nb
    set_path(python_path)
    with open(log, 'wb') as f:
        for fd in (1, 2): os.dup2(f.fileno(), fd)
    os.chdir(path.parent)
    ok = test_nb(str(path), skip_flags=['notest', 'slow', 'cuda'], save=save)[0]
    sys.exit(not ok)


def run_notebook(path, log, save=False):
    "Exit code; what it printed is in the file `log`, and with `save` its outputs in the notebook"
    python_path = os.environ.get('PYTHONPATH')
    start_server(python_path)
    p = SERVER.Process(target=in_fork, args=(path, log, python_path, save))
    p.start(); p.join()
    return p.exitcode
