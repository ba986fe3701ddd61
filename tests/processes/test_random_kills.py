"""Jobs of one, two and four processes in which one is killed, stopped or fails at a random moment, for as long as one
likes:

    RUNS_MINUTES=60 RUNS_COUNTS=counts.json python -m pytest -m slow_harness -s tests/processes/test_random_kills.py

Every trainer, over and over, with checkpoints that are written beside the training steps. What was found is in
docs/reliability.md; RUNS_COUNTS names a file that has the counts after each run, also of a test that is cut off.
RUNS_PROCESSES=2,4 leaves out jobs of other numbers of processes, and RUNS_TRAINERS=dpo,lewis other trainers.
"""
import collections
import json
import os
import pathlib
import random
import signal
import time
import traceback

import numpy as np
import pytest

import runs
import struck
from experiments.runtime import config_files

NAMES = ('encoder', 'generator', 'code_model', 'text_to_code', 'sft', 'sft lora', 'reward_model', 'dpo', 'online_dpo',
         'online_dpo stale', 'apart', 'files', 'ppo stale', 'translation_agent', 'translation_game')
STRIKES = {1: 8, 2: 5, 4: 4}  # of a run of so many processes, at most
LEWIS = ('lewis', 1)


def config_of(name, processes, store):
    """A run of which every other step is saved, and a report covers two."""
    config = runs.config_of(name, store)
    config.num_steps, config.checkpoint_every, config.log_every = 6, 2, 2
    if name in ('sft', 'reward_model', 'dpo', 'text_to_code'):
        config.eval_every = 0  # others evaluate; each program that is compiled makes kills fewer
    if name == 'apart':
        config.rollout.devices = max(processes // 2, 1)
    return config


def run(name, processes, store, workdir, rng, strikes, count):
    config_files.save(config_of(name, processes, store), workdir)
    run_through = struck.run_through_files if name == 'files' else struck.run_through
    devices = 2 if name == 'apart' and processes == 1 else 1
    return run_through(workdir, processes, devices, rng, strikes=strikes, count=count)


def run_lewis(workdir, rng, strikes, count):
    """The Lewis game, whose command keeps each of its runs as arrays; these and its metrics, as of `run`."""
    arguments = ('--config=configs/rlhf/lewis.py:tiny', f'--workdir={workdir}')
    for _ in range(strikes):
        job = struck.Job(workdir.parent / 'logs', 'experiments.lewis', *arguments, processes=1, devices=1)
        over = job.wait(rng.uniform(0.5, 6))
        if not over:
            job.send(0, signal.SIGKILL)
            count('SIGKILL')
        job.end()
        if over:
            break
    struck.succeed(struck.Job(workdir.parent / 'logs', 'experiments.lewis', *arguments, processes=1,
                              devices=1))
    arrays = {f'{path.relative_to(workdir)}|{name}': x for path in sorted(workdir.rglob('*.npz'))
              for name, x in np.load(path).items()}
    return arrays, [struck.untimed(json.loads((workdir / 'metrics.json').read_text()))], []


@pytest.mark.slow_harness
@pytest.mark.timeout(0)
def test_at_random_moments(tmp_path):
    seed = time.time_ns()
    rng, store = random.Random(seed), runs.make_store(tmp_path)
    counts, compared, failures = collections.defaultdict(collections.Counter), collections.Counter(), []
    file = pathlib.Path(os.environ.get('RUNS_COUNTS', tmp_path / 'counts.json'))
    turns = [*((name, processes) for name in NAMES for processes in STRIKES), LEWIS]
    chosen = os.environ.get('RUNS_PROCESSES', '1,2,4').split(',')
    trainers = os.environ.get('RUNS_TRAINERS', '').split(',')
    turns = [turn for turn in turns if str(turn[1]) in chosen and (trainers == [''] or turn[0] in trainers)]
    rng.shuffle(turns)
    turns.sort(key=lambda turn: turn[1])  # those of one process take the least time
    whole, number, end = {}, 0, time.monotonic() + 60 * float(os.environ.get('RUNS_MINUTES', '5'))

    def through(turn, what, strikes, count):
        workdir = tmp_path / f'{what}-{number}' / 'run'
        if turn == LEWIS:
            result = run_lewis(workdir, rng, strikes, count)
        else:
            result = run(*turn, store, workdir, rng, strikes, count)
        left = struck.left_behind(workdir)
        assert not left, left
        return result

    while time.monotonic() < end:
        name, processes = turn = turns[number % len(turns)]
        number += 1
        title = f'{name}, {processes} process(es)'
        try:
            if turn not in whole:
                whole[turn] = through(turn, 'whole', 0, None)
            result = through(turn, 'struck', rng.randint(3, STRIKES[processes]),
                             lambda happened: counts[title].update([happened]))
            struck.assert_same(result, whole[turn])
            compared[title] += 1
        except Exception as error:  # the others are looked at all the same
            failures.append(f'{title}, run {number}: {error}')
            traceback.print_exc()
        total = sum(sum(counter.values()) for counter in counts.values())
        file.write_text(json.dumps({'seed': seed, 'total': total, 'runs': compared, 'failures': failures,
                                    'counts': counts}, indent=1, sort_keys=True) + '\n')
        print(f'{title}: {dict(counts[title])}; {total} strikes in all', flush=True)
    assert not failures, '\n'.join(failures)
