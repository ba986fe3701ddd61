"""One trainer on one, two and four processes: the same parameters, whatever the mesh."""
import json

import jax
import numpy as np
import pytest

import jobs
from experiments import train
from experiments.runtime import launch
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.partition import flatten

SMALL = ('--config.num_steps=4', '--config.batch_size=8', '--config.log_every=1', '--config.checkpoint_every=0')
SFT = ('--config=configs/rlhf/sft_arithmetic.py', '--config.model.width=32', '--config.model.depth=2',
       '--config.model.num_heads=4', '--config.model.vocab_size=264', '--config.data.num_rows=40', *SMALL)


def mesh(data, fsdp, tensor):
    return f'--config.mesh.data={data}', f'--config.mesh.fsdp={fsdp}', f'--config.mesh.tensor={tensor}'


def train_job(workdir, command, processes, devices):
    jobs.succeed('experiments.train', *command, f'--workdir={workdir}', processes=processes, devices=devices)
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    config = launch.read_config(workdir)
    config.mesh.update(dict(data=1, fsdp=1, tensor=1))
    experiment = train.build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    like = jax.eval_shape(experiment.init, jax.random.key(0))
    checkpointer = Checkpointer(workdir / 'checkpoints', read_only=True)
    step, state, position = checkpointer.restore(like)
    checkpointer.close()
    return rows, flatten(state.params), (step, position)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    return train_job(tmp_path_factory.mktemp('alone') / 'run', (*SFT, *mesh(1, 4, 1)), 1, 4)


@pytest.mark.parametrize('processes, devices, sizes', [
    (2, 2, (1, 4, 1)), (2, 2, (1, 1, 4)), (2, 2, (1, 2, 2)), (4, 1, (2, 1, 2)),
], ids=['fsdp over hosts', 'tensor over hosts', 'tensor within hosts', 'four hosts'])
def test_processes_train_what_one_trains(alone, tmp_path, processes, devices, sizes):
    rows, params, end = train_job(tmp_path / 'run', (*SFT, *mesh(*sizes)), processes, devices)
    expected_rows, expected, expected_end = alone
    assert end == expected_end
    assert [row['step'] for row in rows] == [row['step'] for row in expected_rows]
    np.testing.assert_allclose([row['loss'] for row in rows], [row['loss'] for row in expected_rows], rtol=1e-5)
    for name, x in expected.items():
        np.testing.assert_allclose(params[name], x, atol=2e-5, err_msg=name)
