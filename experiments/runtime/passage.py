"""Arrays on their way from the devices of some processes to those of others in the same job.

No process sees both meshes whole. Leaf by leaf one program over all devices of both gathers what the source's devices
hold, and each device of the target keeps its part: bit for bit, whatever the two layouts are.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.runtime import mesh as mesh_lib


class Passage:
    """The way of one tree of arrays from `source` to the layout `shardings`.

    All processes of the source call `send` and all of the target `receive`, equally often, in the same order among all
    else that runs over both.

    Args:
        shapes: tree of `ShapeDtypeStruct`.
        source: mesh of the devices that have it.
        shardings: a tree like `shapes`, over a mesh of other devices.
    """

    def __init__(self, shapes: Any, source: Mesh, shardings: Any):
        self._shapes, self._structure = jax.tree.flatten(shapes)
        self._shardings, self._source = jax.tree.leaves(shardings), source
        target = self._shardings[0].mesh
        if set(source.devices.flat) & set(target.devices.flat):
            raise ValueError('a device cannot be at both ends of a passage')
        devices = np.array([*source.devices.flat, *target.devices.flat])
        self._all = NamedSharding(Mesh(devices, ('all',), axis_types=(AxisType.Auto,)), PartitionSpec('all'))
        self._targets = list(target.devices.flat)

    def send(self, tree: Any) -> None:
        """From the source's processes: `tree` may be donated once this has returned."""
        for i, x in enumerate(self._structure.flatten_up_to(tree)):
            rows = _as_rows(self._source, len(self._source.devices.flat))(x)
            self._pass(i, [shard.data for shard in rows.addressable_shards])

    def receive(self) -> Any:
        """On the target's processes: the tree."""
        out = []
        for i, (shape, sharding) in enumerate(zip(self._shapes, self._shardings)):
            size = -(-shape.size // len(self._source.devices.flat))
            zeros = [jax.device_put(jnp.zeros((1, size), shape.dtype), device)
                     for device in self._targets if device.process_index == jax.process_index()]
            passed = self._pass(i, zeros)
            parts = [shard.data[0] for shard in passed.addressable_shards]
            out.append(jax.make_array_from_single_device_arrays(shape.shape, sharding, parts))
        return jax.tree.unflatten(self._structure, out)

    def _pass(self, i: int, rows: list[jax.Array]) -> jax.Array:
        """Of leaf `i`, each device's row [1, size] -> the part of the leaf that each device of the target keeps."""
        count, shape = len(self._all.mesh.devices), self._shapes[i]
        given = jax.make_array_from_single_device_arrays((count, rows[0].shape[1]), self._all, rows)
        with jax.set_mesh(self._all.mesh):  # in place of the one that training or sampling has set
            return self._program(shape.shape, self._shardings[i])(given)

    @functools.lru_cache(maxsize=None)
    def _program(self, shape: tuple[int, ...], sharding: NamedSharding) -> Any:
        places = sharding.devices_indices_map(shape)
        begins = np.zeros((len(self._all.mesh.devices), len(shape)), np.int32)  # the source's devices keep any part
        for row, device in enumerate(self._targets, start=len(self._source.devices.flat)):
            begins[row] = [index.start or 0 for index in places[device]]
        part = sharding.shard_shape(shape)

        def one(row: jax.Array) -> jax.Array:
            whole = jax.lax.all_gather(row[0], 'all', tiled=True)[:int(np.prod(shape))].reshape(shape)
            begin = jnp.asarray(begins)[jax.lax.axis_index('all')]
            return jax.lax.dynamic_slice(whole, list(begin), part)[None]
        return jax.jit(jax.shard_map(one, mesh=self._all.mesh, in_specs=PartitionSpec('all'),
                                     out_specs=PartitionSpec('all'), check_vma=False))


@functools.lru_cache(maxsize=None)
def _as_rows(mesh: Mesh, count: int) -> Any:
    """An array as [devices of `mesh`, size], padded with zeros at its end, a row on each."""
    def rows(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1)
        return jnp.pad(flat, (0, -flat.size % count)).reshape(count, -1)
    return jax.jit(rows, out_shardings=NamedSharding(mesh, PartitionSpec(mesh_lib.AXES)))
