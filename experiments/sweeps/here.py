"""Runs of a sweep on this machine, in turn or side by side, each in a process of its own."""
import collections
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.runtime import config_files
from experiments.runtime.metrics import read_metrics
from experiments.sweeps.plan import Run, is_finished

log = logging.getLogger(__name__)

LOG = 'log.txt'                          # in a run's folder: what its processes print
EVALUATION = 'evaluation.json'           # in a run's folder: what its measurement says of it
INTERPOLATION = 'interpolation.json'     # the same of its weights, put back to the start by degrees
LOOK_SECONDS = 0.1


class Stage(NamedTuple):
    """A command, and whether there is nothing left for it to do."""
    command: tuple[str, ...]
    finished: Callable[[], bool]


class Job(NamedTuple):
    """The stages of one run, one after another; they print to `log`."""
    name: str
    stages: tuple[Stage, ...]
    log: pathlib.Path


def job_of(run: Run, workdir: pathlib.Path, *, common: Sequence[str] = (), training: Sequence[str] = (),
           evaluation: Sequence[str] | None = None, alphas: Sequence[float] = ()) -> Job:
    """Training, and the measurements that follow it.

    Args:
        common: flags of every command, such as `--compilation_cache`.
        training: flags of `experiments.train` beside those of the run.
        evaluation: flags of the command that measures what was trained; None: it is not measured.
        alphas: at which its weights are interpolated with those it started from, and measured with the same flags: the
            newest ones, also where every checkpoint is measured.
    """
    folder = workdir / run.name
    measure = [*measurement_of(run, folder), *(evaluation or ())]
    stages = [Stage(module('experiments.train', *run.flags, *training, f'--workdir={folder}', *common),
                    lambda: is_finished(folder, run.config.num_steps))]
    every = measures_every(evaluation or ())
    if evaluation is not None:
        stages.append(Stage(module(*measure, f'--json={folder / EVALUATION}', *common),
                            lambda: is_measured(folder, every)))
    if alphas:
        stages.append(Stage(module(*measure, *(['--step=last'] if every else []),
                                   f'--interpolate={",".join(f"{alpha:g}" for alpha in alphas)}',
                                   f'--json={folder / INTERPOLATION}', *common),
                            lambda: is_interpolated(folder, alphas)))
    return Job(run.name, tuple(stages), folder / LOG)


def measurement_of(run: Run, folder: pathlib.Path) -> list[str]:
    """The command that measures what `run` trained in `folder`: of a translation game both agents, else a policy."""
    if run.config.experiment == 'translation_game':
        return ['experiments.evaluate_translation', f'--game={folder}']
    start = run.config.get('weights', '')
    return ['experiments.evaluate', f'--policy={folder}', *([f'--reference={start}'] if start else [])]


def measures_every(evaluation: Sequence[str]) -> bool:
    """Whether these flags of a measurement ask for every checkpoint; the last of one name counts."""
    return re.findall(r'--step[= ](\S+)', ' '.join(evaluation))[-1:] == ['all']


def is_measured(folder: pathlib.Path, every: bool) -> bool:
    """Whether the evaluation of the run in `folder` is there; `every`: of each checkpoint that it keeps."""
    path = folder / EVALUATION
    if not path.exists() or not every:
        return path.exists()
    kept = {int(place.name) for place in (folder / 'checkpoints').iterdir() if place.name.isdigit()}
    return kept <= {row['step'] for row in read_metrics(path)}


def is_interpolated(folder: pathlib.Path, alphas: Sequence[float]) -> bool:
    """Whether the run in `folder` has been measured at all of `alphas`."""
    try:
        rows = json.loads((folder / INTERPOLATION).read_text())
        return {f'{alpha:g}' for alpha in alphas} <= {f'{row["alpha"]:g}' for row in rows}
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # not there, or something else
        return False


def module(name: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, '-m', name, *flags)


def run_all(jobs: Sequence[Job], *, parallel: int = 1, gpus: Sequence[str] = ()) -> dict[str, str]:
    """Runs what of `jobs` is not finished, `parallel` at a time.

    A job that fails costs itself alone. Where this is left by an exception (a signal raises one), the running
    processes get SIGTERM, on which a run saves its state, and are waited for.

    Args:
        gpus: dealt out to the jobs that run at one time, equally many to each; (): all see all devices.

    Returns:
        {name: reason} of jobs that did not finish.
    """
    share = len(gpus) // parallel
    waiting = collections.deque(job for job in jobs if not all(stage.finished() for stage in job.stages))
    log.info('%d of %d runs are finished already', len(jobs) - len(waiting), len(jobs))
    free, running, failed = collections.deque(range(parallel)), {}, {}
    done = len(jobs) - len(waiting)
    try:
        while waiting or running:
            while waiting and free:
                slot, job = free.popleft(), waiting.popleft()
                environment = dict(CUDA_VISIBLE_DEVICES=','.join(gpus[slot * share:(slot + 1) * share])) if gpus else {}
                running[slot] = Process(job, environment)
            time.sleep(LOOK_SECONDS)
            for slot in [slot for slot, process in running.items() if process.over()]:
                process = running.pop(slot)
                free.append(slot)
                done += 1
                if process.reason:
                    failed[process.job.name] = process.reason
                log.info('%d/%d %s: %s', done, len(jobs), process.job.name, process.reason or
                         f'finished in {time.monotonic() - process.started:.0f} s')
    finally:
        for process in running.values():
            process.stop()
        for process in running.values():
            process.wait()
    return failed


class Process:
    """A job under way: one process at a time, for each stage that is not finished.

    Attributes:
        reason: why the job did not finish; ''.
        started: time.monotonic() when it began.
    """

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job, self.reason, self.started = job, '', time.monotonic()
        self._environment = {**os.environ, 'PYTHONPATH': python_path(), **environment}
        self._stages = collections.deque(stage for stage in job.stages if not stage.finished())
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._begin()

    def _begin(self) -> None:
        # In a session of its own: a Ctrl-C reaches the sweep alone, which passes on one signal, for a second one kills.
        with open(self.job.log, 'ab') as file:
            self._process = subprocess.Popen(self._stages[0].command, stdin=subprocess.DEVNULL, stdout=file,
                                             stderr=file, start_new_session=True, env=self._environment)

    def over(self) -> bool:
        """Whether the last stage has ended, or one has failed; begins the next stage where there is one."""
        status = self._process.poll()
        if status is None:
            return False
        stage = self._stages.popleft()
        if status or not stage.finished():
            self.reason = last_error(self.job.log) or (
                f'ended with status {status}' if status else 'stopped before its end')
            return True
        if not self._stages:
            return True
        self._begin()
        return False

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        self._process.wait()


def python_path() -> str:
    """Where the processes find this checkout, whatever folder the sweep is started from."""
    return os.pathsep.join(filter(None, (str(config_files.CHECKOUT), os.environ.get('PYTHONPATH', ''))))


def last_error(path: pathlib.Path) -> str:
    """The last line of a log that begins with 'error: '; '' if it has ended without one."""
    if not path.exists():
        return ''
    lines = [line.strip() for line in path.read_text(errors='replace').splitlines() if line.strip()]
    return lines[-1] if lines and lines[-1].startswith('error: ') else ''
