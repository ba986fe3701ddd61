"""Trains several runs one after another in one job, whose start is then paid for once:

    python -m tests.processes.several --workdirs=DIR,DIR,... [--slow=SECONDS] [--marks=FILE] [--raise_after=STEPS]
        [--full_after=STEPS] [--late=SECONDS] [--programs=DIR]

Each folder holds a config.json, and perhaps stop.json: a step after which the run is stopped by a signal to process 0,
and resumed. Process 0 leaves the arrays of the final state in `state.npz`.
"""
import contextlib
import itertools
import json
import os
import pathlib
import re
import resource
import signal
import time

import jax
import numpy as np

from experiments import train
from experiments.runtime import config_files, exchange, launch, partition
from experiments.runtime.signals import Stopped, signals
from policy_runs import shared_steps
from tests import compiled_once

FULL_BYTES = 8192  # of a file on a disk that is full: room for messages, not for a part of a checkpoint


def stopped(workdir: pathlib.Path, config) -> None:
    """The run up to what stop.json says."""
    stop = workdir / 'stop.json'

    def hook(step, state, metrics):
        if step == json.loads(stop.read_text()) and jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
    if stop.exists():
        try:
            train.train(config, workdir, hooks=[hook])
        except Stopped:
            signals.received = None


def see_late(files: list[str], seconds: float) -> None:
    """From now on Python sees the files and folders that one of the patterns `files` matches so long after it first
    looked for them when they were there, as a shared disk may show them to another machine."""
    late = re.compile('|'.join(files))
    looked: dict[str, float] = {}

    def hidden(path) -> bool:
        match = late.match(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else None
        if match is None or match[0] not in looked and not exists(match[0]):
            return False
        return time.monotonic() < looked.setdefault(match[0], time.monotonic()) + seconds

    def exists(path: str, stat=os.stat) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(stat(path))
        return False

    def stat(path, *args, stat=os.stat, **kwargs):
        if hidden(path):
            raise FileNotFoundError(2, 'not to be seen yet', path)
        return stat(path, *args, **kwargs)

    def listdir(path='.', listdir=os.listdir):
        return [name for name in listdir(path) if not hidden(os.path.join(path, name))]

    @contextlib.contextmanager
    def scandir(path='.', scandir=os.scandir):
        with scandir(path) as entries:
            yield iter([entry for entry in entries if not hidden(entry.path)])
    os.stat, os.listdir, os.scandir = stat, listdir, scandir


def main() -> None:
    parser = launch.parser(__doc__)
    parser.add_argument('--workdirs', required=True)
    parser.add_argument('--slow', type=float, default=0.0, help='seconds that every step takes longer')
    parser.add_argument('--marks', type=pathlib.Path, help='a file that grows by a byte with every step')
    parser.add_argument('--raise_after', type=int, default=0, help='steps after which this process fails')
    parser.add_argument('--full_after', type=int, default=0, help='steps after which the disk of this process is full')
    parser.add_argument('--late', type=float, default=0.0, help='seconds after which this process sees new files')
    parser.add_argument('--programs', help='a folder that keeps compiled programs, for processes of one device')
    args, _ = launch.parse(parser)
    launch.initialize(args)
    if args.programs:  # which `--compilation_cache` does for one device in all
        jax.config.update('jax_compilation_cache_dir', args.programs)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    taken = itertools.count(1)

    def hook(step, state, metrics):
        if args.marks and jax.process_index() == 0:
            with open(args.marks, 'ab') as file:
                file.write(b'.')
        steps = next(taken)
        if steps == args.raise_after:
            raise RuntimeError('an exception in one process')
        if steps == args.full_after:
            before = (step - 1) // config.checkpoint_every * config.checkpoint_every
            while not (workdir / 'checkpoints' / str(before)).is_dir():  # it may still be on its way to the disk
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, resource.RLIM_INFINITY))
        time.sleep(args.slow)
    compiled_once.install()
    with shared_steps():
        for workdir in map(pathlib.Path, args.workdirs.split(',')):
            config = config_files.read(workdir)
            if args.late:
                workdirs = [str(workdir)] + [config.weights] * bool(config.get('weights'))
                see_late([f'{re.escape(str(workdir))}/config.json', *(
                    re.escape(path) + r'/checkpoints/\d+' for path in workdirs)], args.late)
            stopped(workdir, config)
            state = train.train(config, workdir, hooks=[hook])
            if state is not None:
                arrays = partition.flatten(exchange.fetch(state))
                if jax.process_index() == 0:
                    np.savez(workdir / 'state.npz', **{name.replace('/', '|'): x for name, x in arrays.items()})


if __name__ == '__main__':
    launch.main(main)
