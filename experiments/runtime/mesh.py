"""The one place that builds a device mesh.

Axes, outermost first: `data` replicates parameters, `fsdp` shards parameters and batch, `tensor` shards heads and
hidden layers. Batches are split over `data` and `fsdp`.
"""
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))

# Logical names of activation axes (flax.linen.with_logical_constraint) -> mesh axes.
# 'rows' is the batch where `fsdp` shards features instead ('vocab').
LOGICAL_RULES = (('batch', ('data', 'fsdp')), ('rows', 'data'), ('tokens', None), ('embed', None), ('heads', 'tensor'),
                 ('mlp', 'tensor'), ('codes', 'tensor'), ('vocab', 'fsdp'))


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Sizes of `AXES` for `num_devices`; at most one may be -1, which takes what is left.

    Raises:
        ValueError: unknown axis, two -1, or a product that is not `num_devices`.
    """
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f'mesh: unknown axis {sorted(unknown)[0]!r}; the axes are {AXES}')
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f'mesh: only one axis may be -1, got {free}')
    if any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f'mesh: sizes must be positive, or -1 for the rest; got {shape}')
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if free:
        if num_devices % fixed:
            raise ValueError(f'mesh: {num_devices} devices cannot be divided by {fixed} '
                             f'(set mesh.{free[0]} or the others)')
        shape[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ValueError(f'mesh: {shape} needs {fixed} devices but there are {num_devices}; set one axis to -1')
    return shape


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all). Slices joined by a data-centre network are laid along `data`.

    Raises:
        ValueError: sizes that do not fit the devices or the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    return Mesh(device_grid(tuple(shape.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def reshaped(mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    """The devices of `mesh`, in their order, under axes of other sizes, so that one program may take arrays of both."""
    shape = mesh_shape(sizes, mesh.devices.size)
    grid = mesh.devices.reshape(tuple(shape.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(shape: tuple[int, int, int], devices: list[jax.Device]) -> np.ndarray:
    """`devices` in the order of a mesh of that shape, [data, fsdp, tensor].

    On a TPU slice neighbours of the mesh are neighbours on the chips' torus, and axes may split those of the torus:
    tensor=2 on a 4x4 slice has no other place. Chips that make no torus, as a slice less those that generate, and all
    other devices are taken in plain order, which keeps the inner axes within a host. (JAX numbers the nodes of a GPU
    cluster as slices, which they are not.)
    """
    if devices[0].platform != 'tpu' or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if num_slices > 1:
        data, fsdp, tensor = shape
        if data % num_slices:
            raise ValueError(f'mesh: data={data} must be a multiple of the {num_slices} slices; set '
                             f'--config.mesh.data={num_slices}')
        return mesh_utils.create_hybrid_device_mesh((data // num_slices, fsdp, tensor), (num_slices, 1, 1), devices,
                                                    allow_split_physical_axes=True)
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        return np.asarray(devices).reshape(shape)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
