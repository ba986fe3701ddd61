"""What becomes of a job when one of its processes fails, is stopped, or never comes; test_trainers.py kills one."""
import signal
import time

import jax
import pytest

import jobs
from experiments.runtime import launch, processes

SFT = ('--config=configs/rlhf/sft_arithmetic.py', '--config.model.width=32', '--config.model.depth=1',
       '--config.model.num_heads=2', '--config.model.vocab_size=264', '--config.data.num_rows=40',
       '--config.batch_size=8', '--config.log_every=1', '--config.checkpoint_every=0')
LONG = (*SFT, '--config.num_steps=100000')


@pytest.mark.parametrize('failing, count', [(0, 2), (1, 2), (1, 4)])
def test_an_error_in_one_process_ends_the_others_with_its_line(tmp_path, failing, count):
    """Of four, the one that keeps the store stays until the others have read the line there."""
    started = time.monotonic()
    ends = jobs.run('experiments.train', *LONG, f'--workdir={tmp_path / "run"}', processes=count, devices=1,
                    own={failing: ('--config.batch_size=7',)})
    assert time.monotonic() - started < 100
    status, _, own = ends.pop(failing)
    assert status == 2 and 'error: batch_size=7 is not divisible by' in own
    for status, _, other in ends:
        assert status == 1 and f'error: process {failing} of {count} failed: batch_size=7 is not divisible' in other


def test_a_process_that_never_comes_is_not_awaited_for_ever(tmp_path):
    started = time.monotonic()
    (status, _, stderr), = jobs.finish(jobs.start(
        'experiments.train', *LONG, f'--workdir={tmp_path / "run"}', '--join_timeout=4', processes=2, devices=1,
        absent=(1,)))
    assert status not in (0, None) and time.monotonic() - started < 90
    assert 'joining the job as process 0 of 2' in stderr and 'waiting up to 4 s for all of its processes' in stderr


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    workdir = tmp_path / 'run'
    job = jobs.start('experiments.train', *LONG, f'--workdir={workdir}', processes=2, devices=1)
    jobs.wait_for(lambda: (workdir / 'metrics.jsonl').exists() and (workdir / 'metrics.jsonl').stat().st_size)
    job[1].send_signal(signal.SIGTERM)
    ends = jobs.finish(job)
    assert [status for status, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]
    lines = {line for _, _, stderr in ends for line in stderr.splitlines() if 'stopped by signal at step' in line}
    assert len(lines) == 1
    assert len([path for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]) == 1


@pytest.mark.parametrize('message, is_loss', [
    ('INTERNAL: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:193', True),
    ('UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo/0,1/1',
     True),
    ('RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes', False)])
def test_what_a_lost_process_looks_like_to_the_others(message, is_loss, monkeypatch):
    monkeypatch.setattr(processes, 'alone', lambda: False)
    assert processes.is_loss(jax.errors.JaxRuntimeError(message)) == is_loss
    assert processes.is_loss(ValueError(message)) == is_loss  # of an array that is read
    assert not processes.is_loss(RuntimeError(message))
    assert not processes.is_loss(ValueError('the reward model: connection refused'))


def test_flags_of_a_job_that_do_not_fit_together():
    args = launch.parser('').parse_args
    for flags, message in ((('--distributed', '--process_id=1'), '--coordinator is missing'),
                           (('--coordinator=a:1', '--num_processes=2', '--process_id=1'), 'need --distributed'),
                           (('--distributed', '--coordinator=a:1', '--num_processes=2', '--process_id=2'),
                            r'--process_id=2 must lie between 0 and --num_processes=2'),
                           (('--distributed', '--join_timeout=0'), '--join_timeout=0 must be at least 1 second')):
        with pytest.raises(ValueError, match=message):
            processes.check_flags(args(list(flags)))
