"""Jobs that something befalls; each is started in half a second, from a server that has imported everything.

A strike hits one process of a job at a moment that is drawn at random: between a start and the first step, between two
steps, or inside a save. `run_through` strikes the same run again and again, starts it anew each time, and gives what
has come of it, to be compared with a run that nobody disturbed.
"""
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import jobs
from experiments.runtime.metrics import read_metrics

TIMES = ('seconds', 'seconds_per_step', 'seconds_waiting_for_batch')
END_SECONDS = 120  # in which the others end after one has been lost
JOIN_SECONDS = 30  # for all processes to come
SETTLE_SECONDS = 3  # in which the others usually end; most of the time they are ended then, as a launcher would
Outcome = tuple[dict[str, np.ndarray], list[dict[str, Any]], list[tuple[int, str, float]]]
CULPRIT = r'(?:process |task:|stopped sending heartbeats\):\s+)(\d+)'


# ---- Processes -------------------------------------------------------------------------------------------------------

class Job:
    """`python -m module ARGS` in several processes of `devices` CPU devices each, see `jobs`.

    Args:
        folder: for what they print.
        own: arguments that only some of the processes get.
    """

    def __init__(self, folder: pathlib.Path, module: str, *args: str, processes: int, devices: int,
                 own: dict[int, tuple[str, ...]] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic_ns()
        self.logs = [folder / f'{started}-{i}.txt' for i in range(processes)]
        environment = {'DLC_ASYNCHRONOUS_CHECKPOINTS': '1'}
        joined = jobs.joining(processes, join_timeout=JOIN_SECONDS)
        self.processes = [jobs.fork(module, [*args, *joined(i), *(own or {}).get(i, ())], devices, environment,
                                    (str(log), str(log))) for i, log in enumerate(self.logs)]

    def alive(self) -> list[int]:
        return [i for i, process in enumerate(self.processes) if process.is_alive()]

    def statuses(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def text(self, i: int) -> str:
        """What process `i` has printed."""
        return self.logs[i].read_text(errors='replace') if self.logs[i].exists() else ''

    def send(self, i: int, number: int) -> None:
        os.kill(self.processes[i].pid, number)

    def wait(self, seconds: float, until: Callable[[], Any] = lambda: False) -> bool:
        """Waits until none is alive, or `until()`, for so many seconds at most; whether none is."""
        deadline = time.monotonic() + seconds
        while self.alive() and not until() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self.alive()

    def end(self) -> None:
        """Ends those that are left, stopped ones too."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def report(self) -> str:
        return '\n'.join(f'--- process {i}: status {status}\n{self.text(i)[-3000:]}'
                         for i, status in enumerate(self.statuses()))


def learner(workdir: pathlib.Path, processes: int, devices: int, *args: str, **how: Any) -> Job:
    """A job that trains the run in `workdir`."""
    if devices == 1:  # compiled once for all starts, which more devices do not allow (`runtime/launch.py`)
        args = (*args, f'--programs={workdir.parent.parent / f"programs-{processes}"}')
    return Job(workdir.parent / 'logs', 'tests.processes.several', f'--workdirs={workdir}', *args,
               processes=processes, devices=devices, **how)


# ---- What befalls them -----------------------------------------------------------------------------------------------

class Fault(AssertionError):
    """A job did not do what it should after a strike."""


@dataclasses.dataclass(frozen=True)
class Strike:
    """What befalls a job.

    Attributes:
        kind: 'SIGKILL', 'SIGSTOP', 'SIGTERM' or 'exception'.
        moment: 'start' (before the first step), 'step', 'save' or 'saved' (after a save).
        victim: the process that it hits.
        patient: wait for the others to end by themselves, however long that takes.
    """
    kind: str
    moment: str
    victim: int
    patient: bool

    @classmethod
    def drawn(cls, rng: random.Random, processes: int) -> 'Strike':
        kinds = {'SIGKILL': 30, 'SIGTERM': 2, 'exception': 3 if processes > 1 else 1,
                 'SIGSTOP': 1 if processes > 1 else 0}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        moments = ('step',) if kind != 'SIGKILL' else ('start', 'step', 'step', 'save', 'save')
        return cls(kind, rng.choice(moments), rng.randrange(processes), rng.random() < 0.15)

    @property
    def name(self) -> str:
        return f'{self.kind} in a {self.moment}' if self.kind == 'SIGKILL' else self.kind


def strike_once(workdir: pathlib.Path, processes: int, devices: int, strike: Strike, rng: random.Random,
                slow: float = 0.1) -> str:
    """Starts the job of the run in `workdir` and lets `strike` befall it.

    Args:
        slow: seconds that every step takes longer.

    Returns:
        What happened: '' where the run was over before.

    Raises:
        Fault: the others did not end in time, or without a message that names the victim, or with a status that says
            that all is well.
    """
    marks = workdir.parent / f'{workdir.name}-marks-{time.monotonic_ns()}'
    own = {strike.victim: (f'--raise_after={rng.randint(1, 2)}',)} if strike.kind == 'exception' else {}
    begun, whole = saves(workdir), saved(workdir)
    moments = {'step': marks.exists, 'save': lambda: saves(workdir) - begun, 'saved': lambda: saved(workdir) - whole}
    job = learner(workdir, processes, devices, f'--slow={slow}', f'--marks={marks}', own=own)
    try:
        return _befall(job, moments, strike, rng)
    finally:
        job.end()


def saves(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """The checkpoints that are being written, or were when their writer died: names and inodes of their folders."""
    out = set()
    for path in (workdir / 'checkpoints').glob('*tmp*'):
        with contextlib.suppress(FileNotFoundError):
            out.add((path.name, path.stat().st_ino))
    return out


def saved(workdir: pathlib.Path) -> set[str]:
    """Names of the checkpoints that are whole."""
    return {path.name for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()}


def _befall(job: Job, moments: dict[str, Callable[[], Any]], strike: Strike, rng: random.Random) -> str:
    processes = len(job.processes)
    if strike.kind != 'exception':
        if strike.moment == 'start':
            job.wait(rng.uniform(0, 3 + 2 * processes))
        else:
            job.wait(300, until=moments[strike.moment])
            job.wait(rng.choice((0, rng.uniform(0, 0.1))) if strike.moment == 'save' else rng.uniform(0, 0.5))
        if strike.victim not in job.alive():
            return _over(job)
        job.send(strike.victim, getattr(signal, strike.kind))
    others = [i for i in range(processes) if i != strike.victim]
    gone = lambda: all(i not in job.alive() for i in others)
    if strike.kind == 'SIGKILL' and not strike.patient:
        job.wait(SETTLE_SECONDS, gone)
        if not gone():
            return f'{strike.name}: the others were ended too'
    began = time.monotonic()
    job.wait(END_SECONDS, gone if strike.kind == 'SIGSTOP' else lambda: False)
    took = time.monotonic() - began
    if strike.kind in ('SIGTERM', 'exception') and job.alive() or not gone():
        raise Fault(f'{strike}: processes {job.alive()} still run after {END_SECONDS} s\n{job.report()}')
    statuses = job.statuses()
    if strike.kind == 'SIGTERM':
        if statuses != [0] * processes:
            raise Fault(f'{strike}: statuses {statuses}\n{job.report()}')
        return strike.name if any('stopped by signal' in job.text(i) for i in range(processes)) else ''
    if strike.kind == 'exception' and statuses == [0] * processes:
        return ''  # in a process that takes no steps, or after the last
    for i in others:
        if statuses[i] == 0:
            if strike.kind == 'SIGKILL' and all(statuses[i] == 0 for i in others):
                continue  # the run was over, and only the victim had not left
            raise Fault(f'{strike}: process {i} ended with status 0\n{job.report()}')
        if str(strike.victim) not in re.findall(CULPRIT, job.text(i)):
            raise Fault(f'{strike}: process {i} does not name it\n{job.report()}')
    return f'{strike.name}: the others ended within {10 if took < 10 else 60 if took < 60 else 120} s' if others else (
        strike.name)


def _over(job: Job) -> str:
    job.wait(END_SECONDS)
    if set(job.statuses()) != {0}:
        raise Fault(f'ended before anything befell it\n{job.report()}')
    return ''


# ---- Runs ------------------------------------------------------------------------------------------------------------

def run_through(workdir: pathlib.Path, processes: int, devices: int, rng: random.Random, *,
                strikes: int, count: Callable[[str], None]) -> Outcome:
    """Strikes the run in `workdir`, which has its config.json, so often, unless it ends before, and lets it end.

    Args:
        count: is told of every strike.

    Returns:
        `outcome` of the run.
    """
    for _ in range(strikes):
        happened = strike_once(workdir, processes, devices, Strike.drawn(rng, processes), rng)
        if not happened:
            break
        count(happened)
    succeed(learner(workdir, processes, devices))
    return outcome(workdir)


def run_through_files(workdir: pathlib.Path, processes: int, devices: int, rng: random.Random, *,
                      strikes: int, count: Callable[[str], None]) -> Outcome:
    """`run_through` of a learner and a generator in jobs of their own, of which either loses a process; the other
    waits for it to be started anew."""
    logs = workdir.parent / 'logs'
    learn = lambda: learner(workdir, processes, devices, '--slow=0.1')
    generate = lambda: Job(logs, 'experiments.generate', f'--workdir={workdir}', '--trust',
                           processes=min(processes, 2), devices=1)
    jobs = {'learner': learn(), 'generator': generate()}
    try:
        while any(job.alive() for job in jobs.values()) or any(set(job.statuses()) != {0} for job in jobs.values()):
            running = [name for name, job in jobs.items() if job.alive()]
            struck = rng.choice(running) if strikes and running else None
            over = lambda: any(not job.alive() for job in jobs.values())
            deadline = time.monotonic() + (rng.uniform(2, 8) if struck else 300)
            while time.monotonic() < deadline and not over():
                time.sleep(0.02)
            if struck and jobs[struck].alive():
                jobs[struck].send(rng.choice(jobs[struck].alive()), signal.SIGKILL)
                jobs[struck].wait(SETTLE_SECONDS)
                jobs[struck].end()
                strikes -= 1
                count(f'SIGKILL of a {struck}')
            for name, start in (('learner', learn), ('generator', generate)):
                if not jobs[name].alive() and set(jobs[name].statuses()) != {0}:
                    if name != struck:
                        raise Fault(f'the {name} ended although nothing befell it\n{jobs[name].report()}')
                    jobs[name] = start()
            if not struck and time.monotonic() > deadline:
                raise Fault(f'still running\n{jobs["learner"].report()}\n{jobs["generator"].report()}')
    finally:
        for job in jobs.values():
            job.end()
    return outcome(workdir)


def succeed(job: Job, seconds: float = 600) -> None:
    """Waits for the end of `job`, which must be a good one."""
    job.wait(seconds)
    statuses, report = job.statuses(), job.report()
    job.end()
    if set(statuses) != {0}:
        raise Fault(f'statuses {statuses}\n{report}')


def outcome(workdir: pathlib.Path) -> Outcome:
    """(arrays of the final state, rows of metrics.jsonl, rows of TensorBoard) of a run, without times."""
    rows = [untimed(row) for row in read_metrics(workdir / 'metrics.jsonl')]
    return dict(np.load(workdir / 'state.npz')), rows, events(workdir / 'tensorboard')


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in row.items() if name not in TIMES and not name.endswith('_seconds')}


def events(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of the scalars that TensorBoard shows of a run, without times: a file that was cut short is
    read up to there, and a start hides what there is of its step and later ones."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    shown: list[tuple[int, str, float]] = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + (size := struct.unpack('<Q', data[:8])[0]):
            event = Event.FromString(data[12:12 + size])
            if event.session_log.status == SessionLog.START:
                shown = [row for row in shown if row[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size:]
    return [row for row in shown if untimed({row[1]: 0})]


def assert_same(result: Outcome, expected: Outcome) -> None:
    """That a run ended as one that nobody disturbed."""
    assert set(result[0]) == set(expected[0])
    for path, x in expected[0].items():
        np.testing.assert_array_equal(result[0][path], x, err_msg=path)
    assert result[1] == expected[1], f'metrics.jsonl: {result[1]} instead of {expected[1]}'
    events, wanted = (collections.Counter((step, tag, repr(value)) for step, tag, value in either)  # NaN equals NaN
                      for either in (result[2], expected[2]))
    assert events == wanted, f'TensorBoard: too many {events - wanted}, missing {wanted - events}'


def left_behind(folder: pathlib.Path) -> list[str]:
    """Names of unfinished files and leases in a run's work directory."""
    return [path.name for path in folder.rglob('*')
            if 'tmp' in path.name or path.name.endswith('.partial') or path.name.endswith('.lease')]
