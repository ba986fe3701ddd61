"""Which rows of a batch a process provides, and how host arrays get onto a mesh that several processes share.

A batch is split over the mesh axes `data` and `fsdp` into equal parts. A process provides the parts that lie on its own
devices, whatever the mesh looks like: with `tensor` across hosts several processes provide the same parts, and on a TPU
slice the parts of one host need not follow each other.
"""
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from experiments.runtime import mesh as mesh_lib
from experiments.runtime.stream import WHOLE, Share


def share_of(mesh: Mesh) -> Share:
    """What this process provides of batches that are laid out over `mesh`; `WHOLE` where it has all devices (and where
    the mesh has none, only a shape)."""
    if not isinstance(mesh, Mesh) or jax.process_count() == 1:
        return WHOLE
    count = mesh_lib.batch_shards(mesh)
    places = mesh_lib.batch_sharding(mesh).addressable_devices_indices_map((count,))
    parts = sorted({part for (rows,) in places.values() for part in range(*rows.indices(count))})
    if not parts:
        raise ValueError(f'mesh: process {jax.process_index()} has none of its devices; every process of a job must '
                         'have some')
    return Share(tuple(parts), count)


def place_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Global arrays from this process's rows (those of `share_of`), on its own devices only.

    Args:
        batch: name -> [n, ...], of which the first axis holds the rows of `Share.rows`.
        sharding: of batches, from `mesh.batch_sharding`.
    """
    if jax.process_count() == 1:
        return {name: jax.device_put(x, sharding) for name, x in batch.items()}
    share = share_of(sharding.mesh)
    return {name: _place_rows(np.asarray(x), share, sharding) for name, x in batch.items()}


def _place_rows(x: np.ndarray, share: Share, sharding: NamedSharding) -> jax.Array:
    size, rest = divmod(len(x), len(share.parts))
    if rest:
        raise ValueError(f'a batch of {len(x)} rows is not divisible into the {len(share.parts)} parts of this process')
    offsets = {part * size: i * size for i, part in enumerate(share.parts)}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        begin = offsets[index[0].start or 0]
        return x[begin:begin + size]
    return jax.make_array_from_callback((size * share.count, *x.shape[1:]), sharding, part)


def place_tree(tree: Any, shardings: Any) -> Any:
    """A tree of arrays that every process holds whole, laid out by `shardings`: each process copies its own shards and
    nothing is gathered. (`jax.device_put` onto several processes compares, and so gathers, all of their copies.)

    Args:
        shardings: a tree of them, or one for all leaves.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.tree.map(place, tree, shardings)


def mesh_of(tree: Any) -> Mesh:
    """The mesh that the arrays of `tree` are laid out over; one of their device where they lie on one."""
    sharding = jax.tree.leaves(tree)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else mesh_lib.make_mesh({}, list(sharding.device_set))


def check_replicas(batch: Mapping[str, jax.Array]) -> None:
    """Raises a RuntimeError, in every process, where devices that should hold the same rows of a batch do not.

    To be called once, on the first batch: it waits for all processes.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils
    for name, x in batch.items():
        own = np.zeros((x.shape[0], 2), np.uint64)  # by first row of a part: there, and a digest of it
        for shard in x.addressable_shards:
            first = shard.index[0].start or 0
            digest = _digest(np.asarray(shard.data))
            if own[first, 0] and own[first, 1] != digest:
                own[first, 0] = 2
            else:
                own[first] = 1, digest
        parts = multihost_utils.process_allgather(own.view(np.uint32)).reshape(-1, x.shape[0], 4).view(np.uint64)
        for row in np.flatnonzero(parts[..., 0].any(0)):
            there = parts[parts[:, row, 0] > 0, row]
            if (there[:, 0] > 1).any() or len(set(there[:, 1].tolist())) > 1:
                raise RuntimeError(f'batch[{name!r}]: devices that share its rows from {row} on hold different ones; '
                                   'this is a defect of how the batch was dealt out, please report it with the mesh')


def _digest(x: np.ndarray) -> int:
    import zlib
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1)) + 1
