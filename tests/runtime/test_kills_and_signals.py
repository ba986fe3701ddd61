"""Runs that are killed and stopped at every moment: exit statuses, and the same parameters and metrics in the end.

    python -m pytest tests/runtime/test_kills_and_signals.py                       # a few of each, for every change
    RUNS_MINUTES=60 python -m pytest -m slow_harness -s tests/runtime/test_kills_and_signals.py

The long part strikes at random moments for so many minutes and prints what happened: see docs/reliability.md.
"""
import collections
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments.runtime.metrics import read_metrics

HERE = pathlib.Path(__file__).parent
GO_ON = 'run the same command to continue'
SAVING = ('synchronous', 'asynchronous')
ENV = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'XLA_FLAGS': ''}


# ---- Processes -------------------------------------------------------------------------------------------------------

def _run(argv, environment, stderr):
    """In a process forked from a server that has imported everything: half a second instead of five."""
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    import tiny_run
    tiny_run.main(argv)


def _digest(workdir, environment, queue):
    os.environ.update(environment)
    import tiny_run
    queue.put(tiny_run.digest(pathlib.Path(workdir)))


@pytest.fixture(scope='module')
def processes():
    """A context whose processes start with everything imported and no device touched."""
    path = sys.path[:]
    sys.path.insert(0, str(HERE))
    before = {name: os.environ.get(name) for name in ENV}
    os.environ.update(ENV)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tiny_run'])
    yield context
    sys.path[:] = path
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class Run:
    """One start of the tiny run's command."""

    def __init__(self, processes, workdir, *options, saving='synchronous'):
        self.workdir, self.marks = workdir, workdir.parent / f'marks-{time.monotonic_ns()}'
        self.marks.mkdir()
        self.log = self.marks / 'stderr'
        environment = {'DLC_ASYNCHRONOUS_CHECKPOINTS': '1' if saving == 'asynchronous' else '0'}
        self.process = processes.Process(
            target=_run, args=([str(workdir), f'--at={self.marks}', *options], ENV | environment, str(self.log)))
        self.process.start()

    def until(self, ready, seconds=120):
        end = time.monotonic() + seconds
        while not ready():
            assert self.process.is_alive(), f'ended with {self.process.exitcode}: {self.said()}'
            assert time.monotonic() < end, self.said()
            time.sleep(0.002)

    def until_mark(self, name):
        self.until((self.marks / name).exists)

    def send(self, number):
        os.kill(self.process.pid, number)

    def status(self, seconds=120):
        self.process.join(seconds)
        assert self.process.exitcode is not None, f'still running after {seconds} s: {self.said()}'
        return self.process.exitcode

    def said(self):
        return self.log.read_text() if self.log.exists() else ''


def rows(workdir):
    times = ('seconds_per_step', 'seconds_waiting_for_batch')
    return [{k: v for k, v in row.items() if k not in times} for row in read_metrics(workdir / 'metrics.jsonl')]


def digest(processes, workdir):
    queue = processes.Queue()
    process = processes.Process(target=_digest, args=(str(workdir), ENV, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    return found


@pytest.fixture(scope='module')
def whole(processes, tmp_path_factory):
    """Digest and metrics of a run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    run = Run(processes, workdir)
    assert run.status() == 0, run.said()
    return digest(processes, workdir), rows(workdir)


def assert_continues(processes, workdir, whole, saving):
    run = Run(processes, workdir, saving=saving)
    assert run.status() == 0, run.said()
    assert digest(processes, workdir) == whole[0]
    assert rows(workdir) == whole[1]
    left = [p.name for p in workdir.rglob('*') if 'tmp' in p.name or p.name.endswith('.partial') or 'lease' in p.name]
    assert not left


# ---- A few of each ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('saving', SAVING)
@pytest.mark.parametrize('options, mark, delay, message', [
    (['--layers=400'], 'compiling', 0.4, 'stopped by signal before step 1 of 12'),
    (['--layers=400', f'--trace_signal={int(signal.SIGTERM)}'], None, 0, 'stopped by signal before step 1 of 12'),
    (['--hang_at=6'], 'step-6', 0.7, 'stopped by signal at step 6 of 12, state saved'),
    (['--slow=0.1'], 'step-5', 0, r'stopped by signal at step'),
], ids=['compiling', 'tracing', 'waiting', 'training'])
def test_sigterm(processes, whole, tmp_path, options, mark, delay, message, saving):
    """Each phase is left within seconds, with the status and the words that launchers wait for."""
    if saving == 'asynchronous' and mark in ('compiling', None):
        pytest.skip('nothing is saved')
    run = Run(processes, tmp_path / 'run', *options, saving=saving)
    if mark:
        run.until_mark(mark)
        time.sleep(delay)
        run.send(signal.SIGTERM)
    began = time.monotonic()
    assert run.status(30) == 0, run.said()
    assert message in run.said() and GO_ON in run.said()
    assert not mark or time.monotonic() - began < 20
    assert_continues(processes, tmp_path / 'run', whole, saving)


@pytest.mark.parametrize('saving', SAVING)
def test_sigterm_while_a_checkpoint_is_written(processes, whole, tmp_path, saving):
    run = Run(processes, tmp_path / 'run', saving=saving)
    run.until(lambda: any((tmp_path / 'run' / 'checkpoints').glob('4*')))
    run.send(signal.SIGTERM)
    assert run.status() == 0 and GO_ON in run.said()
    assert_continues(processes, tmp_path / 'run', whole, saving)


@pytest.mark.parametrize('saving', SAVING)
def test_killed(processes, whole, tmp_path, saving):
    """Twice, once in the middle of a save and once just after a report that covers the step of a checkpoint."""
    workdir = tmp_path / 'run'
    for ready in (lambda: any((workdir / 'checkpoints').glob('4.orbax*')), lambda: (run.marks / 'step-6').exists()):
        run = Run(processes, workdir, '--slow=0.05', saving=saving)
        run.until(ready)
        run.send(signal.SIGKILL)
        assert run.status() == -signal.SIGKILL
    assert_continues(processes, workdir, whole, saving)


def test_the_command_itself_leaves_the_compiler(tmp_path):
    """Without the server: the interpreter's end included, where a run that was unwound from the compiler crashed."""
    process = subprocess.Popen([sys.executable, HERE / 'tiny_run.py', tmp_path / 'run', '--layers=400',
                                f'--at={tmp_path}'], env=os.environ | ENV, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / 'compiling').exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and 'stopped by signal before step 1 of 12' in said, said


def test_the_second_of_two_is_told(processes, tmp_path):
    first = Run(processes, tmp_path / 'run', '--slow=3')  # there for longer than the second takes to start
    first.until_mark('step-1')
    second = Run(processes, tmp_path / 'run')
    assert second.status() == 2
    line = [x for x in second.said().splitlines() if x.startswith('error: ')]
    assert len(line) == 1 and f'another trainer uses it, process {first.process.pid} on ' in line[0]
    first.send(signal.SIGTERM)
    assert first.status() == 0


def test_a_directory_deleted_under_a_trainer_is_whole_again(processes, whole, tmp_path):
    workdir = tmp_path / 'run'
    run = Run(processes, workdir, '--slow=0.1')
    run.until_mark('step-6')
    subprocess.run(['rm', '-rf', workdir], check=True)
    assert run.status() == 0 and 'deleted while a run was using it' in run.said(), run.said()
    assert (workdir / 'config.json').exists() and digest(processes, workdir) == whole[0]


# ---- For as long as one likes ----------------------------------------------------------------------------------------

@pytest.mark.slow_harness
@pytest.mark.timeout(0)
def test_at_random_moments(processes, whole, tmp_path):
    """Kills and stops one run after another at random moments; every one must end as if undisturbed."""
    rng, counts = random.Random(time.time_ns()), collections.Counter()
    end, number = time.monotonic() + 60 * float(os.environ.get('RUNS_MINUTES', '5')), 0
    while time.monotonic() < end:
        number += 1
        workdir, saving = tmp_path / f'{number}' / 'run', rng.choice(SAVING)
        workdir.parent.mkdir()
        for _ in range(rng.randint(1, 6)):
            run = Run(processes, workdir, f'--slow={rng.choice([0, 0.02, 0.1])}',
                      saving=saving)
            kind = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if rng.random() < 0.7:  # else the strike may come before the command has put its handlers in place
                while run.process.is_alive() and not (run.marks / 'tracing').exists():
                    time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 3.0))
            if run.process.is_alive():
                run.send(kind)
            status = run.status()
            counts[signal.Signals(kind).name, status] += 1
            if kind != signal.SIGKILL:
                # Before the command has put its handlers in place the signal does what it does by default.
                assert status in (0, -kind) and (status == 0 or 'step' not in run.said()), (status, run.said())
        assert_continues(processes, workdir, whole, saving)
    print(f'\n{number} runs, all parameters and metrics as undisturbed; (signal, status): count')
    for (name, status), count in sorted(counts.items()):
        print(f'  {name} {status}: {count}')
