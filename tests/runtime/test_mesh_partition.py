import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from experiments.runtime.state import TrainState


def test_free_axis_takes_the_rest():
    assert mesh_lib.mesh_shape({'data': 2, 'fsdp': -1}, 8) == {'data': 2, 'fsdp': 4, 'tensor': 1}


@pytest.mark.parametrize('sizes, message', [
    ({'dat': 2}, "unknown axis 'dat'"),
    ({'data': -1, 'fsdp': -1}, 'only one axis'),
    ({'data': 3, 'fsdp': -1}, 'cannot be divided by 3'),
    ({'data': 2, 'fsdp': 2}, 'needs 4 devices but there are 8'),
    ({'data': 0, 'fsdp': -1}, 'must be positive'),
])
def test_bad_mesh_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.mesh_shape(sizes, 8)


RULES = ((r'.*/kernel', P('fsdp', 'tensor')), (r'.*/bias', P()))


def test_moments_and_ema_follow_their_parameter():
    import optax
    mesh = mesh_lib.make_mesh({'fsdp': 4, 'tensor': 2})
    params = {'a': {'kernel': jnp.zeros((8, 4)), 'bias': jnp.zeros(4)}}
    state = TrainState(jnp.int32(0), params, optax.adam(1e-3).init(params), params, jax.random.key(0))
    specs = partition.flatten(partition.state_shardings(state, RULES, mesh))
    kernels = [name for name in specs if name.endswith('kernel')]
    assert len(kernels) == 4  # params, two moments, ema
    assert all(specs[name].spec == P('fsdp', 'tensor') for name in kernels)
    assert specs['opt_state/0/count'].spec == P()
    held = partition.bytes_per_device(state.params, partition.param_shardings(params, RULES, mesh))
    assert held == 8 * 4 * 4 // 8 + 4 * 4


def test_uncovered_and_indivisible_parameters_are_named():
    mesh = mesh_lib.make_mesh({'fsdp': 8})
    with pytest.raises(ValueError, match='no rule covers parameter a/scale'):
        partition.param_shardings({'a': {'scale': jnp.zeros(8)}}, RULES, mesh)
    with pytest.raises(ValueError, match=r'a/kernel \(6, 4\): 6 is not divisible by the 8'):
        partition.param_shardings({'a': {'kernel': jnp.zeros((6, 4))}}, RULES, mesh)


def test_nodes_of_a_gpu_cluster_are_no_slices():
    """JAX gives GPUs of different nodes different slice numbers; the default mesh lies over all of them."""
    class Gpu:
        platform, slice_index = 'gpu', 0

        def __init__(self, i):
            self.id, self.slice_index, self.process_index = i, i // 8, i // 8
    devices = [Gpu(i) for i in range(16)]
    grid = mesh_lib.device_grid((1, 16, 1), devices)
    assert [d.id for d in grid.flat] == list(range(16))
    for device in devices:
        device.platform = 'tpu'
    with pytest.raises(ValueError, match=r'data=1 must be a multiple of the 2 slices; set --config.mesh.data=2'):
        mesh_lib.device_grid((1, 16, 1), devices)
