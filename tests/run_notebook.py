"Run a notebook as `nbdev-test` does, in a process of its own"
import sys

from forks import fork


def test(path, save):
    from nbdev.test import test_nb
    ok = test_nb(str(path), skip_flags=['notest', 'slow', 'cuda'], save=save)[0]
    sys.exit(not ok)


def run_notebook(path, log, save=False):
    "Exit code; what it printed is in the file `log`, and with `save` its outputs in the notebook"
    process = fork(test, (path, save), log, cwd=path.parent)
    process.join()
    return process.exitcode
