"""Jobs of several JAX processes on this machine, joined as those of a pod are (`jax.distributed`, here over gloo)."""
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(module: str, *args: str, processes: int, devices: int, own: dict[int, tuple[str, ...]] | None = None,
          absent: tuple[int, ...] = ()) -> list[subprocess.Popen]:
    """`python -m module ARGS` in `processes` processes of `devices` CPU devices each.

    Their output is captured; `finish` reads it.

    Args:
        own: arguments that only some of the processes get.
        absent: processes that are never started.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    paths = (ROOT, ROOT / 'tests' / 'end_to_end', ROOT / 'tests' / 'align')
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PJRT_NPROC': str(4 * devices),
                        'PYTHONPATH': os.pathsep.join(map(str, paths))}
    job = []
    for i in sorted(set(range(processes)) - set(absent)):
        joined = ('--distributed', f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}',
                  f'--process_id={i}') if processes > 1 else ()
        job.append(subprocess.Popen([sys.executable, '-m', module, *args, *joined, *(own or {}).get(i, ())],
                                    env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return job


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Returns when `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def finish(job: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each process; all are ended where one takes longer than `timeout` seconds."""
    deadline = time.monotonic() + timeout
    try:
        out = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in job]
    finally:
        for process in job:
            if process.poll() is None:
                process.kill()
    return [(process.returncode, *texts) for process, texts in zip(job, out)]


def run(module: str, *args: str, timeout: float = 300, **how) -> list[tuple[int, str, str]]:
    """`start` and `finish`."""
    return finish(start(module, *args, **how), timeout)


def succeed(module: str, *args: str, processes: int, devices: int, timeout: float = 900) -> list[str]:
    """What each process printed, all of which must end well."""
    ends = run(module, *args, processes=processes, devices=devices, timeout=timeout)
    assert all(status == 0 for status, _, _ in ends), '\n'.join(
        f'--- process {i}: status {status}\n{stderr[-3000:]}' for i, (status, _, stderr) in enumerate(ends))
    return [stdout for _, stdout, _ in ends]
