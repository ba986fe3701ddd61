"""Jobs of several JAX processes on this machine, joined as those of a pod are (`jax.distributed`, here over gloo).

Every process is forked from a server that has imported the commands already, which takes longer than most jobs do.
"""
import atexit
import functools
import multiprocessing
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import jax

from experiments import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = [str(ROOT), *(str(ROOT / 'tests' / folder) for folder in ('processes', 'end_to_end', 'align'))]
# The runner imports tensorboardX, which takes PyTorch along, and scikit-learn late.
PRELOADED = ('tensorboardX', 'sklearn.datasets', 'scipy.stats', 'jobs', 'tests.processes.several',
             'tests.processes.commands', 'experiments.encode', 'experiments.evaluate', 'experiments.generate',
             'experiments.lewis', 'experiments.relabel', 'experiments.sample', *train.EXPERIMENTS.values())


@functools.cache
def server() -> Any:
    """A context whose processes begin with everything imported and no device touched."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join(PATH)  # which is all that the server takes from here to import them
    forkserver.ensure_running()
    os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)
    return context


def main(module: str, argv: list[str], devices: int, environment: dict[str, str], files: tuple[str, str]) -> None:
    """What a process does: `python -m module ARGS` with `devices` CPU devices, its output in two files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    jax.config.update('jax_num_cpu_devices', devices)
    sys.argv = [module, *argv]
    warnings.filterwarnings('ignore', module='runpy')  # that the module has been imported already
    try:
        runpy.run_module(module, run_name='__main__')
    finally:  # which multiprocessing leaves out, and where JAX's processes wait for each other
        sys.stdout.flush()
        atexit._run_exitfuncs()


def fork(module: str, argv: list[str], devices: int, environment: dict[str, str], files: tuple[str, str]) -> Any:
    """Starts a `multiprocessing.Process` that does what `main` says, with some more variables in its environment."""
    environment = dict(os.environ) | {'PJRT_NPROC': str(4 * devices), 'PYTHONPATH': os.pathsep.join(PATH)} | environment
    process = server().Process(target=main, args=(module, argv, devices, environment, files))
    process.start()
    return process


def joining(processes: int, **flags: Any) -> Callable[[int], tuple[str, ...]]:
    """Number of a process -> the flags by which it joins the job; none where it is the only one."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    more = tuple(f'--{name}={value}' for name, value in flags.items())
    return lambda i: ('--distributed', f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}',
                      f'--process_id={i}', *more) if processes > 1 else ()


class Process:
    """One of a job, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, module: str, argv: list[str], devices: int):
        folder = tempfile.mkdtemp(prefix='job-')
        self._files = f'{folder}/stdout', f'{folder}/stderr'
        self._process = fork(module, argv, devices, {}, self._files)

    def poll(self) -> int | None:
        """Its exit status; minus the number of the signal that killed it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """(stdout, stderr) at its end; `subprocess.TimeoutExpired` where that does not come."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired('a process of a job', timeout)
        return tuple(pathlib.Path(file).read_text() if os.path.exists(file) else '' for file in self._files)


def start(module: str, *args: str, processes: int, devices: int, own: dict[int, tuple[str, ...]] | None = None,
          absent: tuple[int, ...] = ()) -> list[Process]:
    """`python -m module ARGS` in `processes` processes of `devices` CPU devices each.

    Their output is captured; `finish` reads it.

    Args:
        own: arguments that only some of the processes get.
        absent: processes that are never started.
    """
    joined = joining(processes)
    return [Process(module, [*args, *joined(i), *(own or {}).get(i, ())], devices)
            for i in sorted(set(range(processes)) - set(absent))]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Returns when `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(job: list[Process], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each process; all are ended where one takes longer than `timeout` seconds."""
    deadline = time.monotonic() + timeout
    try:
        out = [process.communicate(max(deadline - time.monotonic(), 1)) for process in job]
    finally:
        for process in job:
            if process.poll() is None:
                process.kill()
    return [(process.poll(), *texts) for process, texts in zip(job, out)]


def run(module: str, *args: str, timeout: float = 300, **how) -> list[tuple[int, str, str]]:
    """`start` and `finish`."""
    return finish(start(module, *args, **how), timeout)


def succeed(module: str, *args: str, processes: int, devices: int, timeout: float = 900) -> list[str]:
    """What each process printed, all of which must end well."""
    ends = run(module, *args, processes=processes, devices=devices, timeout=timeout)
    assert all(status == 0 for status, _, _ in ends), '\n'.join(
        f'--- process {i}: status {status}\n{stderr[-3000:]}' for i, (status, _, stderr) in enumerate(ends))
    return [stdout for _, stdout, _ in ends]
