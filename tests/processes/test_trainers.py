"""Trainers on one, two and four processes: the same runs, whatever the mesh.

All runs of a number of processes are one job, one after another, for its start costs more than a run. Trainers that
differ from another only in what they compute, and not in where batches and weights come from, are compared on request:

    python -m pytest -m slow_harness tests/processes/test_trainers.py
"""
import random
import shutil

import jax
import numpy as np
import pytest

import jobs
import runs
import struck
from experiments import train
from experiments.runtime import config_files
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.metrics import read_metrics
from experiments.runtime.partition import flatten

pytestmark = pytest.mark.slow

SHARED = ('online_dpo stale', 'ppo')  # policies whose processes share the devices
APART = ('apart',)
OTHERS = ('sft', 'generator')
REST = ('online_dpo', 'online_dpo lora', 'rloo', 'best_of_n', 'ppo stale', 'sft lora', 'reward_model', 'dpo', 'encoder',
        'code_model', 'text_to_code', 'translation_agent', 'translation_game', 'align', 'sft, tensor within hosts')
REST_APART = ('apart in turn', 'apart, two behind')
STOPPED = ('apart',)
ON_FOUR = ('sft', 'apart')  # of the last two hosts train and two generate
MESHES = {'sft, tensor over hosts': (1, 1, 4), 'sft, tensor within hosts': (1, 2, 2)}
LAG = {'apart': 1, 'apart in turn': 0, 'apart, two behind': 2}
MEASURED = ('loss', 'reward', 'kl', 'length', 'eval_reward', 'eval_kl', 'heldout_loss', 'bleu_en')


@pytest.fixture(scope='module')
def config_of(tmp_path_factory):
    store = runs.make_store(tmp_path_factory.mktemp('store'))

    def make(name, mesh=None):
        config = runs.config_of(name.split(',')[0] if name in MESHES else name, store)
        config.mesh.update(dict(zip(('data', 'fsdp', 'tensor'), mesh or MESHES.get(name, (1, -1, 1)))))
        return config
    return make


@pytest.fixture(scope='module')
def alone(config_of, tmp_path_factory):
    names = (*SHARED, *APART, *OTHERS)
    return runs.train_all(tmp_path_factory.mktemp('alone'), {name: config_of(name) for name in names}, 1, 4)


@pytest.fixture(scope='module')
def two(config_of, tmp_path_factory):
    names = (*SHARED, *APART, *OTHERS, 'sft, tensor over hosts')
    return runs.train_all(tmp_path_factory.mktemp('two'), {name: config_of(name) for name in names}, 2, 2,
                          stopped=STOPPED)


@pytest.fixture(scope='module')
def four(config_of, tmp_path_factory):
    configs = {name: config_of(name, (2, 1, 2) if name == 'sft' else None) for name in ON_FOUR}
    return runs.train_all(tmp_path_factory.mktemp('four'), configs, 4, 1)


@pytest.fixture(scope='module')
def rest(config_of, tmp_path_factory):
    """{processes: runs}: of `REST` and `REST_APART` on one, two and four processes, of all others on four."""
    configs = {name: config_of(name) for name in (*REST, *REST_APART)}
    on_four = configs | {name: config_of(name) for name in (*SHARED, *OTHERS) if name not in ON_FOUR}
    return {processes: runs.train_all(tmp_path_factory.mktemp('rest'), of_all, processes, 4 // processes)
            for processes, of_all in ((1, configs), (2, configs), (4, on_four))}


def assert_same_run(found, expected):
    """Equal but for the order of sums over processes."""
    (state, rows), (expected_state, expected_rows) = found, expected
    assert [row['step'] for row in rows] == [row['step'] for row in expected_rows]
    for metric in MEASURED:
        values, wanted = ([row[metric] for row in either if metric in row] for either in (rows, expected_rows))
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5, err_msg=metric)
    assert set(state) == set(expected_state)
    for path, x in expected_state.items():
        np.testing.assert_allclose(state[path], x, rtol=1e-5, atol=1e-5, err_msg=path)


def assert_identical(state, expected):
    assert set(state) == set(expected)
    for path, x in expected.items():
        np.testing.assert_array_equal(state[path], x, err_msg=path)


@pytest.mark.parametrize('name', [*SHARED, *OTHERS, 'sft, tensor over hosts'])
def test_two_processes_train_what_one_trains(name, alone, two):
    assert_same_run(two[name], alone[name.split(',')[0]])


@pytest.mark.slow_harness
@pytest.mark.parametrize('processes', (2, 4))
@pytest.mark.parametrize('name', REST)
def test_every_other_trainer_too(name, processes, rest):
    assert_same_run(rest[processes][name], rest[1][name])


@pytest.mark.parametrize('name', ON_FOUR)
def test_four_processes_train_what_one_trains(name, alone, four):
    assert_same_run(four[name], alone[name])


@pytest.mark.slow_harness
@pytest.mark.parametrize('name', [name for name in (*SHARED, *OTHERS) if name not in ON_FOUR])
def test_four_processes_of_the_others_too(name, alone, rest):
    assert_same_run(rest[4][name], alone[name])


def assert_lag(name, rows):
    assert [row['rollout_staleness'] for row in rows] == [min(i, LAG[name]) for i in range(len(rows))]


def assert_apart(name, on_one, on_two):
    assert_identical(on_two[0], on_one[0])
    assert_lag(name, on_two[1])


@pytest.mark.parametrize('name', APART)
def test_hosts_apart_train_what_devices_apart_train(name, alone, two):
    """One host trains while the other generates, each by itself: bit for bit the run of one process that divides its
    devices."""
    assert_apart(name, alone[name], two[name])


@pytest.mark.slow_harness
@pytest.mark.parametrize('name', REST_APART)
def test_hosts_apart_at_any_staleness(name, rest):
    assert_apart(name, rest[1][name], rest[2][name])


@pytest.mark.slow_harness
@pytest.mark.parametrize('name', REST_APART)
def test_two_hosts_that_train_and_two_that_generate_at_any_staleness(name, rest):
    assert_same_run(rest[4][name], rest[1][name])
    assert_lag(name, rest[4][name][1])


@pytest.mark.parametrize('name', [f'{name} stopped' for name in STOPPED])
def test_stopped_and_resumed_is_bit_identical(name, two):
    assert_identical(two[name][0], two[name.rsplit(' ', 1)[0]][0])


def test_learner_and_generator_jobs_of_two_processes_each(config_of, alone, tmp_path):
    """Weights and batches through a folder."""
    workdir, config = tmp_path / 'run', config_of('apart')
    config.rollout.update(dict(devices=0, transport='files'))
    config_files.save(config, workdir)
    learner = jobs.start('tests.processes.several', f'--workdirs={workdir}', processes=2, devices=1)
    generator = jobs.start('experiments.generate', f'--workdir={workdir}', '--trust', processes=2, devices=1)
    for status, _, stderr in (*jobs.finish(learner), *jobs.finish(generator)):
        assert status == 0, stderr[-3000:]
    shards = sorted(path.name for path in (workdir / 'rollouts' / 'weights').iterdir())
    assert shards == [f'shard-{v:09d}-{i}-of-2.safetensors' for v in (3, 4) for i in (0, 1)] + [
        f'weights-{v:09d}.json' for v in (3, 4)]
    assert_same_run((dict(np.load(workdir / 'state.npz')), read_metrics(workdir / 'metrics.jsonl')), alone['apart'])


def test_a_killed_process_is_missed_and_the_job_goes_on_to_the_same_end(config_of, two, tmp_path):
    """With a batch in flight; by SIGKILL in the steps after a save."""
    workdir, strike = tmp_path / 'run', struck.Strike('SIGKILL', 'saved', victim=1, patient=True)
    config_files.save(config_of('online_dpo stale'), workdir)
    assert struck.strike_once(workdir, 2, 2, strike, random.Random(0), slow=1.0)
    assert_identical(runs.finish(workdir, 2, 2)[0], two['online_dpo stale'][0])


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(two, tmp_path_factory, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(next(tmp_path_factory.getbasetemp().glob('two*/sft')), workdir)
    parts = [path for path in (workdir / 'checkpoints' / str(runs.STEPS)).rglob('ocdbt.process_1/d/*')]
    assert parts
    for path in parts:
        path.write_bytes(b'')
    (_, _, first), (_, _, second) = ends = jobs.run('tests.processes.several', f'--workdirs={workdir}', processes=2,
                                                    devices=2)
    assert [status for status, _, _ in ends] == [0, 0], first[-2000:] + second[-2000:]
    for stderr in (first, second):
        assert f'unreadable checkpoint {runs.STEPS} (' in stderr and 'continuing from 4' in stderr, stderr[-2000:]
    assert f'{runs.STEPS} (another process cannot read it)' in first + second
    assert_identical(dict(np.load(workdir / 'state.npz')), two['sft'][0])


def test_one_process_reads_the_checkpoint_of_two(config_of, two, tmp_path_factory):
    workdir = next(tmp_path_factory.getbasetemp().glob('two*/sft'))
    config = config_files.read(workdir)
    config.mesh.update(dict(data=1, fsdp=1, tensor=1))
    experiment = train.build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    checkpointer = Checkpointer(workdir / 'checkpoints', read_only=True)
    step, state, _ = checkpointer.restore(jax.eval_shape(experiment.init, jax.random.key(0)))
    checkpointer.close()
    assert step == runs.STEPS
    for path, x in flatten(state.params).items():
        np.testing.assert_array_equal(two['sft'][0][f'params/{path}'.replace('/', '|')], x, err_msg=path)
