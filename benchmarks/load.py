"""How much time and memory does a large data set take? `mpo gaps` on files of more and more pairs: read, score with a
tiny reward model, split, write the page.

    python benchmarks/load.py [--rows 10000 160800 1000000] [--out FOLDER]

HH-RLHF has 160,800 pairs for training. The pairs here are the toy world's, each with a number in its prompt, so that no
two are equal; the model has 16 dimensions and one layer. What is measured is what the rows cost, not the model: the
same rows through a model of some size take hours. Reported: seconds, the largest memory of the process, and the size
of the page."""
import argparse, datetime, json, os, platform, sys, tempfile, time
from pathlib import Path

from mpo_nb.core import replacing


def write_model(folder):
    "A reward model with random weights"
    from mpo_nb.reward import reward_model_from, RewardModel
    from mpo_nb.worlds import get_world
    model, tok = get_world('toy').model(hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                        num_key_value_heads=1, intermediate_size=32)
    RewardModel(reward_model_from(model, tok), tok).save(folder)

def write_pairs(path, n):
    "JSON lines"
    from mpo_nb.worlds import get_world
    world = get_world('toy')
    few = world.pairs(world.demonstrate, min(n, 2000), seed=1)
    few = few.select_columns(['prompt', 'chosen', 'rejected']).to_list()
    with open(path, 'w') as f:
        for i in range(n):
            row = few[i % len(few)]
            f.write(json.dumps(row | dict(prompt=f'\n\nHuman: Number {i}.{row["prompt"]}')) + '\n')

def measured(argv):
    "(seconds, MB) of a process"
    t, pid = time.perf_counter(), os.spawnv(os.P_NOWAIT, argv[0], argv)
    _, status, used = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status): sys.exit(f'{" ".join(argv)} ended with {code}')
    return time.perf_counter() - t, used.ru_maxrss / (1024 if sys.platform == 'linux' else 2**20)

def row_of(n, folder):
    data, out = folder/f'{n}.jsonl', folder/f'{n}-gaps'
    write_pairs(data, n)
    argv = [sys.executable, '-m', 'mpo_nb.cli', 'gaps', str(data), '--model', str(folder/'model'),
            '--data.max_prompt_length', '192', '--data.max_completion_length', '64', '--output_dir', str(out)]
    seconds, mb = measured(argv)
    row = dict(rows=n, file_mb=round(data.stat().st_size/2**20), seconds=round(seconds, 1), peak_mb=round(mb),
               page_kb=round((out/'report.html').stat().st_size/1024))
    data.unlink()
    print(row, flush=True)
    return row

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, nargs='+', default=[10_000, 160_800, 1_000_000])
    p.add_argument('--out', default='mpo_nb/saved')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        write_model(Path(tmp)/'model')
        rows = [row_of(n, Path(tmp)) for n in args.rows]
    result = dict(date=str(datetime.date.today()), machine=f'{platform.machine()}, {os.cpu_count()} cores',
                  python=platform.python_version(), results=rows)
    with replacing(Path(args.out)/'load.json') as tmp: Path(tmp).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
