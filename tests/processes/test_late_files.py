"""A shared disk that shows a machine what another has written seconds later; starts on other numbers of processes.

    python -m pytest -m slow_harness tests/processes/test_late_files.py
"""
import shutil

import numpy as np
import pytest

import jobs
import runs
from experiments.runtime import config_files
from experiments.runtime.metrics import read_metrics

pytestmark = [pytest.mark.slow_harness, pytest.mark.slow]

RUN = 'tests.processes.several'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    config = runs.config_of('sft', tmp_path_factory.mktemp('store'))
    config.eval_every = 0
    return config


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
    """A run on two processes, its work directory and its final state."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    config_files.save(config, workdir)
    return workdir, runs.finish(workdir, 2, 2)


def unfinished(whole, tmp_path):
    """A copy of the run as it was when its newest checkpoint was 4."""
    workdir = tmp_path / 'run'
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / 'checkpoints' / str(runs.STEPS))
    (workdir / 'state.npz').unlink()
    return workdir


def assert_ends_alike(workdir, whole, **tolerance):
    for path, x in whole[1][0].items():
        np.testing.assert_allclose(np.load(workdir / 'state.npz')[path], x, err_msg=path, **tolerance)
    steps = [row['step'] for row in read_metrics(workdir / 'metrics.jsonl')]
    assert steps == [row['step'] for row in whole[1][1]]


def test_checkpoints_that_a_process_sees_late(config, whole, tmp_path):
    """While it saves, and at a start, where the newest one stays the newest; what the run left open is settled by the
    process that sees its config."""
    config_files.save(config, tmp_path / 'run')
    ends = jobs.run(RUN, f'--workdirs={tmp_path / "run"}', processes=2, devices=2, own={1: ('--late=4',)})
    assert [status for status, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]
    assert_ends_alike(tmp_path / 'run', whole, rtol=0)
    assert 'could not write checkpoint' not in ends[0][2] + ends[1][2]

    workdir = unfinished(whole, tmp_path / 'again')
    ends = jobs.run(RUN, f'--workdirs={workdir}', processes=2, devices=2, own={1: ('--late=4',)})
    assert [status for status, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]
    for _, _, stderr in ends:
        assert 'continuing from step 4' in stderr and 'unreadable' not in stderr, stderr[-2000:]
    assert_ends_alike(workdir, whole, rtol=0)


def test_a_run_to_start_from_of_which_a_process_sees_the_end_late(config, whole, tmp_path):
    """All start from the step that the first of them finds."""
    config = config.copy_and_resolve_references()
    config.weights, config.num_steps = str(whole[0]), 1
    for name, own in (('plain', {}), ('late', {1: ('--late=4',)})):
        config_files.save(config, tmp_path / name)
        ends = jobs.run(RUN, f'--workdirs={tmp_path / name}', processes=2, devices=2, own=own)
        assert [status for status, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]
    plain, late = (dict(np.load(tmp_path / name / 'state.npz')) for name in ('plain', 'late'))
    for path, x in plain.items():
        np.testing.assert_array_equal(late[path], x, err_msg=path)


def test_hosts_apart_start_from_a_run(config, whole, tmp_path):
    """Only those that train read it."""
    policy = runs.config_of('apart', None)
    policy.model, policy.weights, policy.num_steps = config.model, str(whole[0]), 2
    states = []
    for processes, devices in ((1, 4), (2, 2)):
        config_files.save(policy, tmp_path / str(processes))
        states.append(runs.finish(tmp_path / str(processes), processes, devices)[0])
    for path, x in states[0].items():
        np.testing.assert_array_equal(states[1][path], x, err_msg=path)


@pytest.mark.parametrize('processes, devices', [(1, 4), (4, 1)])
def test_a_run_goes_on_with_fewer_and_with_more_processes(processes, devices, whole, tmp_path):
    workdir = unfinished(whole, tmp_path)
    runs.finish(workdir, processes, devices)
    assert_ends_alike(workdir, whole, rtol=1e-5, atol=1e-6)
