"""Waves of a rollout batch: how many there are, and what a device is thought to have left for one."""
import math

import jax
import pytest

from configs.rlhf import tldr
from experiments.rlhf.policy import waves
from experiments.runtime import fitting
from experiments.runtime import mesh as mesh_lib


@pytest.fixture
def mesh():
    return mesh_lib.make_mesh({'data': 8})


def test_the_fewest_that_fit_and_divide(mesh):
    config = tldr.get_config('online_dpo_410m')  # 64 prompts a device
    sizes = [waves.wave_bytes(config, prompts, mesh) for prompts in (64, 32, 16, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert waves.count(config, mesh) == 1  # without a limit
    for limit, count in ((sizes[0], 1), (sizes[0] - 1, 2), (sizes[1] - 1, 4), (sizes[3], 64), (1, 64)):
        config.rollout.memory = limit / waves.GIB
        assert waves.count(config, mesh) == count, limit


def test_a_cache_of_the_paper_is_counted(mesh):
    """Pythia-2.8b, two completions of a prompt: 32 layers, 32 heads of 80, 564 slots, keys and values in bfloat16."""
    config = tldr.get_config('online_dpo_2.8b')
    cache = 2 * 32 * 32 * 80 * 564 * 2
    assert 3 * cache <= waves.wave_bytes(config, 1, mesh) < 3.1 * cache


def test_what_residents_leave(mesh):
    config = tldr.get_config('online_dpo_410m')
    resident = [jax.ShapeDtypeStruct((8, 2 ** 27), 'float32', sharding=mesh_lib.batch_sharding(mesh))]  # 0.5 GiB each
    assert waves.budgeted(config, 16 * waves.GIB, resident).rollout.memory == pytest.approx(0.95 * 16 - 0.5)
    assert waves.budgeted(config, 0.1 * waves.GIB, resident).rollout.memory > 0  # nothing left is not without limit
    assert waves.budgeted(config, math.inf, resident).rollout.memory == 0
    config.rollout.memory = 2.0
    assert waves.budgeted(config, 16 * waves.GIB, resident).rollout.memory == 2.0
    assert math.isinf(fitting.usable_bytes(mesh))  # these devices say nothing of their memory
