"""Arrays of the host on their way between the processes of a mesh.

Every function is called by all processes that have devices of the mesh, in the same order among all else that runs on
these devices; processes that have none take no part. In a job of one process they return what they are given.
"""
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CHUNK = 1 << 16  # bytes; payloads are padded to a power of two from here on, for few shapes to compile


def processes_of(mesh: Mesh) -> list[int]:
    """Indices of the processes that have devices of `mesh`, ascending."""
    return sorted({device.process_index for device in mesh.devices.flat})


def mesh_of(processes: Sequence[int]) -> Mesh:
    """A mesh of all devices of these processes, to exchange something over."""
    return Mesh(np.array([device for device in jax.devices() if device.process_index in processes]), ('device',),
                axis_types=(AxisType.Auto,))


def portion(mesh: Mesh, num: int) -> slice:
    """Which of `num` things this process of `mesh` sees to on its host; together, in order, the processes see to all
    (`gather_rows` puts the outcome together). Some may get none."""
    processes = processes_of(mesh)
    if len(processes) == 1:
        return slice(0, num)
    place, size = processes.index(jax.process_index()), -(-num // len(processes))
    return slice(min(place * size, num), min((place + 1) * size, num))


def fetch(tree: Any) -> Any:
    """A tree of arrays of one mesh as whole numpy arrays, in each of its processes, as by `jax.device_get`; typed keys
    as their data."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jax.random.key_data(x) if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
              else x for x in leaves]
    spread = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not x.is_fully_addressable
              and not x.is_fully_replicated]
    if spread:
        mesh = leaves[spread[0]].sharding.mesh
        for i, x in zip(spread, _run(mesh, _replicate(mesh), [leaves[i] for i in spread])):
            leaves[i] = x
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def gather_rows(mesh: Mesh, tree: Any) -> Any:
    """The rows of all processes, one after another in the order of their indices.

    Args:
        tree: of numpy arrays [n, ...]; every process its own number n of rows, which may be 0.

    Returns:
        The same tree in every process, of arrays [sum of n, ...].
    """
    if len(processes_of(mesh)) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    counts = _gather(mesh, np.array([len(leaves[0])], np.int32))[:, 0]
    padded = [np.zeros((counts.max(), *x.shape[1:]), x.dtype) for x in leaves]
    for x, into in zip(leaves, padded):
        into[:len(x)] = x
    gathered = [np.concatenate([rows[:count] for rows, count in zip(_gather(mesh, x), counts)]) for x in padded]
    return jax.tree.unflatten(structure, gathered)


def broadcast(mesh: Mesh, payload: bytes | None, source: int) -> bytes:
    """The bytes that process `source` gives, which has devices of `mesh`; the others' `payload` is not looked at."""
    if len(processes_of(mesh)) == 1:
        assert payload is not None
        return payload
    sends = jax.process_index() == source
    lengths = _gather(mesh, np.array([len(payload) if sends else 0], np.int32))
    length = int(lengths.max())
    own = np.zeros(max(CHUNK, 1 << max(length - 1, 0).bit_length()), np.uint8)
    if sends:
        own[:length] = np.frombuffer(payload, np.uint8)
    # A sum of integers in which all others are 0 takes one all-reduce, whatever the number of processes.
    whole = _run(_grid(mesh), _sum(mesh), _by_process(mesh, own.view(np.uint32)))
    return np.asarray(whole).view(np.uint8)[:length].tobytes()


def everywhere(mesh: Mesh, holds: bool) -> bool:
    """Whether it holds in every process."""
    return holds if len(processes_of(mesh)) == 1 else bool(_gather(mesh, np.array([holds])).all())


def check_same(mesh: Mesh, data: bytes, message: str) -> None:
    """Raises a ValueError with `message`, in every process, where they do not all give the same bytes."""
    if len(processes_of(mesh)) > 1 and len(set(_gather(mesh, np.array([zlib.crc32(data)], np.uint32))[:, 0])) > 1:
        raise ValueError(message)


# ---- Machinery -------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def _grid(mesh: Mesh) -> Mesh:
    """The devices of `mesh` as [process, device of it]."""
    rows = [[device for device in mesh.devices.flat if device.process_index == i] for i in processes_of(mesh)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f'mesh: its processes have {sorted(len(row) for row in rows)} devices of it; all must have '
                         'the same number')
    return Mesh(np.array(rows), ('process', 'device'), axis_types=(AxisType.Auto,) * 2)


@functools.lru_cache(maxsize=None)
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda xs: xs, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.lru_cache(maxsize=None)
def _sum(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x.sum(0, dtype=x.dtype), out_shardings=NamedSharding(_grid(mesh), PartitionSpec()))


def _by_process(mesh: Mesh, own: np.ndarray) -> jax.Array:
    """What every process gives [...] as one array [processes, ...], each row on the devices of its process."""
    grid = _grid(mesh)
    return jax.make_array_from_callback((len(grid.devices), *own.shape), NamedSharding(grid, PartitionSpec('process')),
                                        lambda _: own[None])


def _gather(mesh: Mesh, own: np.ndarray) -> np.ndarray:
    """What every process gives [...], as [processes, ...]."""
    return np.asarray(_run(_grid(mesh), _replicate(_grid(mesh)), [_by_process(mesh, own)])[0])


def _run(mesh: Mesh, program: Any, x: Any) -> Any:
    """`program(x)` over `mesh`, whatever mesh the caller has set."""
    with jax.set_mesh(mesh):
        return program(x)
