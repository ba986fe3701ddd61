"""Jobs of one, two and four processes in which one is killed at a random moment, for as long as one likes:

    RUNS_MINUTES=60 python -m pytest -m slow_harness -s tests/processes/test_random_kills.py

Every trainer, over and over; what was found is in docs/reliability.md.
"""
import collections
import os
import random
import time

import numpy as np
import pytest

import runs
from experiments.runtime import launch

NAMES = (*runs.POLICIES, *runs.TEXTS, *runs.IMAGES, *runs.GAMES)
DEVICES = {1: 4, 2: 2, 4: 1}  # of each process
TIMES = ('seconds', 'seconds_per_step', 'seconds_waiting_for_batch')


def untimed(rows):
    return [{name: x for name, x in row.items() if name not in TIMES and not name.endswith('_seconds')} for row in rows]


@pytest.mark.slow_harness
@pytest.mark.timeout(0)
def test_at_random_moments(tmp_path):
    seed = time.time_ns()
    rng, counts, whole = random.Random(seed), collections.Counter(), {}
    store = runs.make_store(tmp_path)
    end, number = time.monotonic() + 60 * float(os.environ.get('RUNS_MINUTES', '5')), 0
    turns = [(name, processes) for name in NAMES for processes in DEVICES]
    rng.shuffle(turns)
    while time.monotonic() < end:
        name, processes = turns[number % len(turns)]
        number += 1
        config, devices = runs.config_of(name, store), DEVICES[processes]
        if name.startswith('apart') and processes == 4:
            config.rollout.devices = 2  # two hosts of one device
        if (name, processes) not in whole:
            workdir = tmp_path / f'whole-{number}'
            launch.save_config(config, workdir)
            whole[name, processes] = runs.finish(workdir, processes, devices)
        workdir = tmp_path / f'killed-{number}'
        launch.save_config(config, workdir)
        for _ in range(rng.randint(1, 3)):
            counts[name, processes] += runs.kill_once(workdir, processes, devices, rng)
        state, rows = runs.finish(workdir, processes, devices)
        expected, expected_rows = whole[name, processes]
        for path, x in expected.items():
            np.testing.assert_array_equal(state[path], x, err_msg=f'{name}, {processes} processes, {path}, seed {seed}')
        assert untimed(rows) == untimed(expected_rows), f'{name}, {processes} processes, seed {seed}'
        print(f'{name}, {processes} process(es): {counts[name, processes]} kills', flush=True)
    print(f'\n{number} runs, {sum(counts.values())} kills; arrays and metrics as undisturbed')
