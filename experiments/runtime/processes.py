"""The processes of one job: joining them, and ending all of them soon when one fails.

A process that fails writes its first error line to the job's key-value store before it leaves; a thread in each of the
others looks for such lines and ends its process with it. One that dies without a word (SIGKILL, a machine that is gone,
SIGSTOP) is missed when a collective loses its connection: whoever sees that calls the roll, which those threads answer,
and names who is absent. Where no collective notices, heartbeats do, and JAX ends the others with a message that names
its task.
"""
import argparse
import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from experiments.runtime import cores

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 40   # without a sign of life, after which a process counts as dead
SHUTDOWN_SECONDS = 60    # between the first and the last process that ends
LOOK_SECONDS = 1.0       # between two looks for a failed process
AWAIT_SECONDS = 0.1      # between two looks for an announcement
WAIT_SECONDS = 14 * 86400  # for the slowest process, at places where all must have come; a dead one is missed before
FAREWELL_SECONDS = 3.0   # that process 0, which keeps the store, stays where it would end for a failure
ANSWER_SECONDS = 5.0     # for every process of the job to say that it is there

# What a collective raises, by gloo or NCCL, where the connection to another process is gone or never came about.
_LOST = re.compile(r'(closed|reset) by peer|broken pipe|connection (refused|closed)|timed out waiting|nccl|'
                   r'context initialization failed', re.I)
_STATUS = re.compile(r'[A-Z_]+: ')  # how XLA's messages begin

_WATCHED = 'experiments/watched/'  # what the thread in each process looks at
_FAILED, _ROLL_CALL = f'{_WATCHED}failed/', f'{_WATCHED}roll_call/'
_PRESENT = 'experiments/present/'
_ANNOUNCED = 'experiments/announced/'
FINISHED = 'finished'  # announced when a run has ended
_run = 0  # counts the runs of this process
_CORES = 'experiments/cores/'
_meetings = itertools.count()  # the same in all processes, which meet in the same order
_first_on_host = True  # whether no process of a lower number is on this machine
_joined = threading.Event()  # JAX's store aborts a process that asks it anything before it is connected


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--distributed`, and the flags that say where and who where no cluster does."""
    parser.add_argument('--distributed', action='store_true',
                        help='join the other processes of this job (TPU pod, SLURM, GKE or Open MPI are detected; '
                             'elsewhere give the next three as well)')
    parser.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 of a --distributed job listens')
    parser.add_argument('--num_processes', type=int, metavar='N', help='processes of the job')
    parser.add_argument('--join_timeout', type=int, metavar='SECONDS', default=120,
                        help='how long to wait for all processes to join (default 120)')
    parser.add_argument('--process_id', type=int, metavar='I', help='which of them this is, from 0')


def check_flags(args: argparse.Namespace) -> None:
    """Raises a ValueError where the flags that name a job's processes do not fit together."""
    if args.join_timeout < 1:
        raise ValueError(f'--join_timeout={args.join_timeout} must be at least 1 second')
    flags = {f'--{name}': getattr(args, name) for name in ('coordinator', 'num_processes', 'process_id')}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return
    if missing:
        raise ValueError(f'{missing[0]} is missing: give all of {", ".join(flags)}, or none where they are detected')
    if not args.distributed:
        raise ValueError('--coordinator, --num_processes and --process_id need --distributed')
    if not 0 <= args.process_id < args.num_processes:
        raise ValueError(f'--process_id={args.process_id} must lie between 0 and --num_processes={args.num_processes} '
                         'less 1')


def join(args: argparse.Namespace) -> None:
    """Joins the job that the flags, or the cluster, describe. Before anything touches a device.

    Where not all processes come within `--join_timeout`, JAX ends this one with a message of its own, and a status
    other than 0.

    Raises:
        ValueError: flags that do not fit together.
    """
    check_flags(args)
    if not args.distributed:
        return
    log.info('joining the job%s; waiting up to %d s for all of its processes',
             '' if args.process_id is None else f' as process {args.process_id} of {args.num_processes}, process 0 at '
             f'{args.coordinator}', args.join_timeout)
    # JAX's own handler of SIGTERM would take the place of ours (runtime/signals.py), and nobody would save.
    jax.config.update('jax_enable_preemption_service', False)
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id,
                               initialization_timeout=args.join_timeout, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                               shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    _joined.set()
    _look_around(args.join_timeout)


def _look_around(timeout: float) -> None:
    """Finds out which processes of the job are on this machine, and how many may run on the very cores that this one
    may."""
    global _first_on_host
    from jax._src import distributed
    state = distributed.global_state
    mine = f'{socket.gethostname()} {sorted(cores.bound())}'
    state.client.key_value_set(f'{_CORES}{state.process_id}', mine)
    everybody = [state.client.blocking_key_value_get(f'{_CORES}{i}', int(1000 * timeout))
                 for i in range(state.num_processes)]
    cores.share(everybody.count(mine))
    hosts = [theirs.split()[0] for theirs in everybody]
    _first_on_host = hosts.index(socket.gethostname()) == state.process_id


def once_a_host(make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `make` returns, made by one process of each machine and shared, read-only, with the others there.

    All processes of a job call it together; what `make` raises ends all of them.
    """
    if alone():
        return make()
    folder = pathlib.Path(tempfile.gettempdir(), f'experiments-{agreed(uuid.uuid4().hex)}')
    if _first_on_host:
        made = make()
        folder.mkdir(mode=0o700)
        for name, array in made.items():
            np.save(folder / f'{name}.npy', array)
        del made  # read back, it is in memory once for all
    wait_for_all()
    shared = {file.stem: np.load(file, mmap_mode='r') for file in sorted(folder.glob('*.npy'))} or make()
    wait_for_all()
    if _first_on_host:
        shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays until the last process lets go of it
    return shared


def _client() -> Any:
    """The job's key-value store; None in a job of one process, and before it is joined."""
    if not _joined.is_set():
        return None
    from jax._src import distributed  # jax.distributed does not say what the store holds
    return distributed.global_state.client


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside the block this process ends, with status 1 and the other's message, soon after another has failed."""
    done = threading.Event()

    def watch() -> None:
        answered = False
        while not done.wait(LOOK_SECONDS):
            client = _client()
            if client is None:
                continue
            try:
                notes = dict(client.key_value_dir_get(_WATCHED))
                if not answered and any(key.startswith(_ROLL_CALL) for key in notes):
                    _answer(client)
                    answered = True
            except jax.errors.JaxRuntimeError:  # the store is gone: what is left to say JAX says itself
                return
            failed = [line for key, line in notes.items() if key.startswith(_FAILED)]
            if failed and not done.is_set():
                _end(f'error: {failed[0]}', 1)
    thread = threading.Thread(target=watch, name='processes', daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def begin_run() -> None:
    """Begins a run, in every process of the job: what was announced in the one before counts no more."""
    global _run
    _run += 1


def announce(name: str, text: str = '') -> None:
    """Leaves `text` in the job's store, for `awaited` in other processes; once a run for each `name`."""
    _client().key_value_set(f'{_ANNOUNCED}{_run}/{name}', text)


def awaited(*names: str) -> tuple[str, str]:
    """(name, text) of the first of `names` that another process announces, however long that takes; `watched` ends the
    wait where one fails."""
    while True:
        announced = {key.rsplit('/', 1)[1]: text for key, text in _client().key_value_dir_get(f'{_ANNOUNCED}{_run}/')}
        for name in names:
            if name in announced:
                return name, announced[name]
        time.sleep(AWAIT_SECONDS)


@contextlib.contextmanager
def announcing_end() -> Iterator[None]:
    """`FINISHED` is announced, in a job of several processes, however the block ends; only process 0 does it."""
    try:
        yield
    finally:
        if not alone() and jax.process_index() == 0:
            announce(FINISHED)


def wait_for_all() -> None:
    """Returns when every process of the job has come here, however long that takes. (A collective of the devices, as
    JAX has for it, would give up on the slow.)"""
    client = _client()
    if client is not None:
        client.wait_at_barrier(f'experiments/barrier/{next(_meetings)}', WAIT_SECONDS * 1000)


def agreed(value: Any) -> Any:
    """The JSON value that process 0 calls it with, in every process of the job."""
    client, key = _client(), f'experiments/agreed/{next(_meetings)}'
    if client is None or jax.process_count() == 1:
        return value
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, WAIT_SECONDS * 1000))


def alone() -> bool:
    """Whether this is the only process of its job."""
    return _client() is None or jax.process_count() == 1


def fail(line: str, status: int) -> NoReturn:
    """Ends this process with `status` and, in a job of several, the others with `line`; it waits for none of them.

    Where `line` says that a connection was lost, which is as much as a collective can tell, the processes are called
    first, and those that do not answer are named.
    """
    client = _client()
    if client is None or alone():
        raise SystemExit(status) from None
    number, count = jax.process_index(), jax.process_count()
    try:
        lost = _missing(client, number, count) if _LOST.search(line) else ''
        if lost:
            print(f'error: {lost}', file=sys.stderr)
        line = f'{lost} ({line})' if lost else line
        client.key_value_set(f'{_FAILED}{number}', f'process {number} of {count} failed: {line}', allow_overwrite=True)
    except jax.errors.JaxRuntimeError:
        if number:
            print(f'error: process 0 of {count}, which keeps the store of the job, does not answer', file=sys.stderr)
    _end('', status)


def is_loss(error: BaseException) -> bool:
    """Whether `error` is what a collective raises where another process of the job is gone: JAX's own error, or a
    ValueError where the result is read."""
    return (not alone() and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
            and bool(_STATUS.match(str(error))) and bool(_LOST.search(str(error))))


def _answer(client: Any) -> None:
    client.key_value_set(f'{_PRESENT}{jax.process_index()}', '', allow_overwrite=True)


def _missing(client: Any, number: int, count: int) -> str:
    """Words on the processes that do not answer a roll call; '' if all do. Ends this process with the line of another
    that has failed for a reason of its own."""
    client.key_value_set(f'{_ROLL_CALL}{number}', '', allow_overwrite=True)
    _answer(client)
    absent, deadline = set(range(count)), time.monotonic() + ANSWER_SECONDS
    while absent and time.monotonic() < deadline:
        time.sleep(AWAIT_SECONDS)
        failed = client.key_value_dir_get(_FAILED)
        if failed:
            _end(f'error: {failed[0][1]}', 1)
        absent -= {int(key.rsplit('/', 1)[1]) for key, _ in client.key_value_dir_get(_PRESENT)}
    return ', '.join(f'process {i} of {count}' for i in sorted(absent)) + ' was lost: no answer' if absent else ''


def _end(line: str, status: int) -> NoReturn:
    """Leaves without the barrier that JAX puts at a process's end, where the others would be waited for."""
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if _number() == 0:
        time.sleep(FAREWELL_SECONDS)  # the others look for a line in the store, which goes with this process
    os._exit(status)


def _number() -> int:
    """This process's, asked without touching a device."""
    from jax._src import distributed
    return distributed.global_state.process_id
