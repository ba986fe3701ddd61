"""Trains several runs one after another in one job, whose start is then paid for once:

    python -m tests.processes.several --workdirs=DIR,DIR,... [--slow=SECONDS] [--marks=FILE] [--raise_after=STEPS]

Each folder holds a config.json, and perhaps kill.json or stop.json: a step after which the run is given up, or stopped
by a signal to process 0, and resumed. Process 0 leaves the arrays of the final state in `state.npz`.
"""
import itertools
import json
import os
import pathlib
import signal
import time

import jax
import numpy as np

from experiments import train
from experiments.runtime import exchange, launch, partition
from experiments.runtime.signals import Stopped, signals
from policy_runs import shared_steps
from tests import compiled_once


class Kill(Exception):
    pass


def interrupted(workdir: pathlib.Path, config) -> None:
    """The run up to what kill.json or stop.json says."""
    kill, stop = workdir / 'kill.json', workdir / 'stop.json'

    def hook(step, state, metrics):
        if kill.exists() and step == json.loads(kill.read_text()):
            raise Kill
        if stop.exists() and step == json.loads(stop.read_text()) and jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
    if kill.exists() or stop.exists():
        try:
            train.train(config, workdir, hooks=[hook])
        except (Kill, Stopped):
            signals.received = None


def main() -> None:
    parser = launch.parser(__doc__)
    parser.add_argument('--workdirs', required=True)
    parser.add_argument('--slow', type=float, default=0.0, help='seconds that every step takes longer')
    parser.add_argument('--marks', type=pathlib.Path, help='a file that grows by a byte with every step')
    parser.add_argument('--raise_after', type=int, default=0, help='steps after which this process fails')
    args, _ = launch.parse(parser)
    launch.initialize(args)
    taken = itertools.count(1)

    def hook(step, state, metrics):
        if args.marks and jax.process_index() == 0:
            with open(args.marks, 'ab') as file:
                file.write(b'.')
        if next(taken) == args.raise_after:
            raise RuntimeError('an exception in one process')
        time.sleep(args.slow)
    compiled_once.install()
    with shared_steps():
        for workdir in map(pathlib.Path, args.workdirs.split(',')):
            config = launch.read_config(workdir)
            interrupted(workdir, config)
            state = train.train(config, workdir, hooks=[hook])
            if state is not None:
                arrays = partition.flatten(exchange.fetch(state))
                if jax.process_index() == 0:
                    np.savez(workdir / 'state.npz', **{name.replace('/', '|'): x for name, x in arrays.items()})


if __name__ == '__main__':
    launch.main(main)
