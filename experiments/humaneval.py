"""Runs the programs that a policy wrote for HumanEval's problems, each in a sandbox: pass@k.

    python -m experiments.sample --policy=RUN --prompts=HumanEval.jsonl --num_samples=200 --temperature=0.2 \\
        --top_p=0.95 --max_new_tokens=256 --out=samples.jsonl
    python -m experiments.humaneval --samples=samples.jsonl --json=humaneval.json

The rows of samples.jsonl keep the problems' own fields. Programs have no network and no files but a temporary folder
(see experiments/runtime/sandbox.py); where the kernel cannot confine them, nothing is run.
"""
import collections
import concurrent.futures
import json
import os

from experiments.runtime import launch, sandbox, storage
from experiments.runtime.progress import bar
from rlhf_jax.tasks import humaneval

SECONDS = 10.0


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--samples', metavar='FILE', required=True, help='as experiments.sample writes them')
    p.add_argument('--seconds', type=float, default=SECONDS, help='a program may take')
    p.add_argument('--memory', type=float, default=1.0, metavar='GIB', help='a program may take')
    p.add_argument('--parallel', type=int, default=os.cpu_count(), help='programs at a time')
    p.add_argument('--json', metavar='FILE', help='also write the numbers there')
    p.add_argument('--out', metavar='FILE', help='also write how each program ended there, a JSON line each')
    args, _ = launch.parse(p)
    for name, least in (('seconds', 0.1), ('memory', 0.1), ('parallel', 1)):
        if getattr(args, name) < least:
            raise ValueError(f'--{name}={getattr(args, name)} must be at least {least}')
    for name in ('json', 'out'):
        if getattr(args, name):
            storage.check_writable(storage.resolve(getattr(args, name)).parent, f'--{name}')
    rows = storage.read_json_lines('--samples', args.samples, (*humaneval.FIELDS, 'completion'),
                                   'experiments.sample --prompts=HumanEval.jsonl --out')
    sandbox.run_python('pass')  # says so before any program is run, where it cannot be confined
    progress, outcomes = bar('programs', len(rows)), []
    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        run = lambda row: sandbox.run_python(humaneval.program(row, row['completion']), seconds=args.seconds,
                                             memory=int(args.memory * 2 ** 30))
        for outcome in pool.map(run, rows):
            outcomes.append(outcome)
            if progress:
                progress(len(outcomes))
    passed = collections.defaultdict(list)
    for row, outcome in zip(rows, outcomes):
        passed[row['task_id']].append(outcome.outcome == 'passed')
    out = {'problems': len(passed), 'programs': len(rows),
           'timed_out': sum(outcome.outcome == 'timed out' for outcome in outcomes) / len(rows),
           **humaneval.pass_rates(passed)}
    print(json.dumps(out, indent=1))
    if args.json:
        storage.write_json(args.json, out)
    if args.out:
        storage.write_json_lines(args.out, ({'task_id': row['task_id'], 'completion': row['completion'],
                                             **outcome._asdict()} for row, outcome in zip(rows, outcomes)))


if __name__ == '__main__':
    launch.main(main)
