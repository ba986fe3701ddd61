"""Several commands in one job, so that its processes are started once: `python -m tests.processes.commands FILE`.

FILE holds a JSON list of command lines, each `[module, argument, ...]`. With `--killed_at=N` the process kills itself
in the N-th append to a row store, where every row that is written is noted at once, or before it writes the N-th block
of a computation. With `--late=SECONDS` it sees what one of the patterns `--late_files` matches so much later than it
was there.
"""
import importlib
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

from experiments.runtime import cores, launch, processes
from tests import compiled_once
from tests.processes.several import see_late


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('file')
    p.add_argument('--killed_at', type=int, default=0)
    p.add_argument('--late', type=float, default=0.0)
    p.add_argument('--late_files', nargs='+', default=[])
    args, _ = launch.parse(p)
    launch.initialize(args)
    compiled_once.install()
    if args.late:
        see_late(args.late_files, args.late)
    print(f'{cores.usable()} cores')
    made = processes.once_a_host(lambda: {'by': np.full(3, jax.process_index())})
    print(f'made by {set(made["by"].tolist())}')
    if args.killed_at:
        kill_at(args.killed_at)
    for number, command in enumerate(json.loads(pathlib.Path(args.file).read_text())):
        sys.argv = [command[0], *command[1:]]
        importlib.import_module(command[0]).main()
        print(f'--- {number}', flush=True)


def kill_at(number: int) -> None:
    from experiments.dlc.data import codestore_writer
    from experiments.runtime import blocks
    calls = []

    def counted(write):
        def write_and_count(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args, **kwargs)
        return write_and_count
    codestore_writer.SYNC_SECONDS = 0
    codestore_writer.writer.append = counted(codestore_writer.writer.append)
    blocks._write = counted(blocks._write)


if __name__ == '__main__':
    launch.main(main)
