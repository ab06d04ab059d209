"""Disturb a run again and again, then compare it with an undisturbed one.

    python tests/faults.py RECIPE [--faults 50] [--seed 0] [--out FOLDER] [--key value ...]

RECIPE and the keys are those of `mpo run`. Each time the run is started it is left alone for a random while; then
one of these happens to it: SIGKILL, SIGTERM, SIGINT, SIGHUP; a disk with room for small files only; a second process
on the same folder; and, between two starts, a byte of a finished stage that flips, a file of it that is cut or
removed, a checkpoint that is cut. A run that ends before that makes a stage again (`--redo`). Damage to a stage must
be named (exit code 2, one sentence) and is then taken back; after everything else the same command goes on. At the
end evaluation and tables are those of the undisturbed run. Exit code 1, with the fault and what it said, where any
of this isn't so."""
import argparse, contextlib, json, os, random, resource, shutil, signal, sys, tempfile, time
from collections import Counter
from pathlib import Path

SIGNALS = 'SIGKILL', 'SIGKILL', 'SIGTERM', 'SIGINT', 'SIGHUP'
STOPPED = {-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP}
SMALL = 20_000   # bytes that a file may have on the full disk: no weights


def import_everything():
    "Once, before the first fork"
    import gc
    import datasets, matplotlib.figure, torch, transformers, trl   # noqa: F401
    from trl import SFTTrainer, RewardTrainer                      # noqa: F401
    import mpo_nb.cli, mpo_nb.pipeline, mpo_nb.report              # noqa: F401
    gc.freeze()


def start(argv, said, room=None):
    "Process id of `mpo run` with these arguments; what it says goes to the file `said`"
    if (pid := os.fork()): return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it
    code = 70
    try:
        f = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(f, 1); os.dup2(f, 2)
        if room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from mpo_nb.cli import main
        code = main(argv)
        sys.stdout.flush(); sys.stderr.flush()
    except BaseException:
        import traceback
        traceback.print_exc(); sys.stderr.flush()
    finally: os._exit(code)


def ended(pid, seconds=0.):
    "Exit code of a process, None if it still works after so long"
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until: return None
        time.sleep(.01)


class Harness:
    def __init__(self, recipe, keys, out, seed):
        self.out, self.rng, self.counts = Path(out), random.Random(seed), Counter()
        self.run, self.said = self.out/'disturbed', self.out/'said.txt'
        self.argv = ['run', recipe, *keys, '--output_dir']

    def whole(self):
        "The undisturbed run; its seconds"
        t = time.monotonic()
        assert ended(start([*self.argv, str(self.out/'whole')], self.said), 1e9) == 0, self.said.read_text()
        self.seconds = time.monotonic() - t

    def check(self, what, code, allowed):
        text = self.said.read_text(errors='replace')
        if code not in allowed or 'Traceback' in text:
            sys.exit(f'{what}: exit code {code}, not one of {sorted(allowed)}\n{text[-3000:]}')
        self.counts[what] += 1

    # ---- while it runs

    def disturb(self):
        "Start the run and do something to it"
        again = ['--redo', self.rng.choice(self.stages())] if self.finished() else []
        what = self.rng.choice([*SIGNALS, 'full disk', 'two processes'])
        pid = start([*self.argv, str(self.run), *again], self.said, SMALL if what == 'full disk' else None)
        if what == 'full disk': return self.check(what, ended(pid, 1e9), {2})
        code = ended(pid, self.rng.uniform(.1, .7)*self.seconds)
        if code is not None: return self.check('nothing', code, {0})
        if what == 'two processes':
            other = self.out/'other.txt'
            second = ended(start([*self.argv, str(self.run)], other), 120)
            if second not in (0, 2): sys.exit(f'{what}: exit code {second}\n{other.read_text()[-3000:]}')
            what = 'SIGKILL'
            self.counts['two processes'] += 1
        with contextlib.suppress(ProcessLookupError): os.kill(pid, getattr(signal, what))
        self.check(what, ended(pid, 120), STOPPED | {0})

    def finished(self): return (self.run/'report.html').is_file()

    def stages(self): return sorted(p.parent.name for p in self.run.glob('[!.]*/stage.json'))

    # ---- while it doesn't

    def damage(self):
        "Damage a file of a finished stage; it must be named; take it back"
        files = [p for s in self.stages() for p in (self.run/s).rglob('*')
                 if p.is_file() and p.name != 'stage.json' and p.stat().st_size > 2]
        if not files: return
        path, what = self.rng.choice(sorted(files)), self.rng.choice(['flip', 'cut', 'remove'])
        data = path.read_bytes()
        at = self.rng.randrange(len(data))
        if what == 'remove': path.unlink()
        else: path.write_bytes(data[:at] + (bytes([data[at] ^ 255]) + data[at+1:] if what == 'flip' else b''))
        self.check(what, ended(start([*self.argv, str(self.run)], self.said), 1e9), {2})
        if path.name not in self.said.read_text(): sys.exit(f'{what} of {path} is not named: {self.said.read_text()}')
        path.write_bytes(data)

    def cut_checkpoint(self):
        "Cut a file of the newest checkpoint of a stage: the next start goes on from the one before"
        found = sorted(self.run.glob('checkpoints/*/checkpoint-*/complete'), key=lambda p: p.stat().st_mtime)
        files = [p for p in found[-1].parent.iterdir() if p.stat().st_size > 2] if found else []
        if not files: return
        path = self.rng.choice(sorted(files))
        path.write_bytes(path.read_bytes()[:self.rng.randrange(path.stat().st_size)])
        self.counts['checkpoint cut'] += 1

    def faults(self): return sum(self.counts.values()) - self.counts['nothing']

    def disturb_and_finish(self, n):
        while self.faults() < n:
            self.disturb()
            self.rng.choice([self.damage, self.cut_checkpoint, lambda: None])()
            print(f'{self.faults()} of {n}: {dict(self.counts)}', file=sys.stderr)
        self.check('nothing', ended(start([*self.argv, str(self.run)], self.said), 1e9), {0})

    def compare(self):
        import pandas as pd
        both = self.out/'whole', self.run
        numbers = [json.loads((f/'evaluation.json').read_text()) for f in both]
        for e in numbers: e['stages'] = [*e['stages']]   # without their seconds
        assert numbers[0] == numbers[1], 'evaluation.json differs'
        for name in 'completions.parquet', 'gaps.parquet':
            pd.testing.assert_frame_equal(*(pd.read_parquet(f/name) for f in both))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('recipe'); p.add_argument('--faults', type=int, default=50)
    p.add_argument('--seed', type=int, default=0); p.add_argument('--out')
    args, keys = p.parse_known_args(argv)
    out = Path(args.out or tempfile.mkdtemp(prefix='faults-'))
    out.mkdir(parents=True, exist_ok=True)
    import_everything()
    h = Harness(args.recipe, keys, out, args.seed)
    h.whole()
    h.disturb_and_finish(args.faults)
    h.compare()
    print(f'the numbers of an undisturbed run ({h.seconds:.0f} s) after {dict(h.counts)}')
    if not args.out: shutil.rmtree(out)


if __name__ == '__main__': main()
