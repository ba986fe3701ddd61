"""Versioned weights on their way from the learner to whoever generates: one contract, three transports.

    publish(version, params)    the learner's side: a snapshot; `params` may be donated or updated right after
    fetch(version)              the generator's side: waits for that version, and returns it where it is to be used
    newest()                    the newest version there is, or None
    release(before)             the generator will not ask for anything older than `before`

`InProcess` copies between devices of one process, `Files` goes through a folder, `Transfer` pulls from device to device
between processes where this JAX can. A snapshot is never the learner's own buffer: an optimizer that updates weights
while they are read would hand out a mixture of two versions.
"""
import json
import os
import pathlib
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

LATE_SECONDS = 70.0  # after which a shared disk shows every machine what one of them sees (NFS: 60 by default)


class InProcess:
    """Copies onto other devices of the same process, or onto the same ones.

    Args:
        shardings: a sharding or a device for all parameters, or a tree of them; None: where the learner has them.
        dtype: that floating parameters are cast to before they travel (bfloat16 halves the traffic); None: as they are.
        timeout: seconds `fetch` waits; None: for ever.
        snapshots: what is published are snapshots already, which their maker does not donate: those that lie where
            `shardings` wants them are taken as they are, without a second copy.
    """

    def __init__(self, shardings: Any = None, *, dtype: Any = None, timeout: float | None = None,
                 snapshots: bool = False):
        self._shardings, self._dtype, self._timeout, self._snapshots = shardings, dtype, timeout, snapshots
        self._held: dict[int, Tree] = {}
        self._newest: int | None = None
        self._changed = threading.Condition()

    def publish(self, version: int, params: Tree) -> None:
        """Returns when the copy is complete.

        Raises:
            ValueError: a version that is not newer than the newest.
        """
        if self._newest is not None and version <= self._newest:
            raise ValueError(f'version={version} is not newer than the newest, {self._newest}')
        params = cast(params, self._dtype)
        if self._shardings is None:
            placed = params if self._snapshots else jax.tree.map(jnp.copy, params)
        else:
            placed = jax.device_put(params, self._shardings, may_alias=self._snapshots)
        placed = jax.block_until_ready(placed)
        with self._changed:
            self._held[version], self._newest = placed, version
            self._changed.notify_all()

    def fetch(self, version: int) -> Tree:
        """That version; the same arrays each time, not to be donated.

        Raises:
            TimeoutError: it did not come within `timeout`.
            ValueError: it has been released.
        """
        with self._changed:
            passed = lambda: self._newest is not None and self._newest >= version
            if not self._changed.wait_for(passed, self._timeout):
                raise TimeoutError(f'version {version} was not published within timeout={self._timeout} s')
            if version not in self._held:
                raise ValueError(f'version {version} is not held any more, only {sorted(self._held)}')
            return self._held[version]

    def newest(self) -> int | None:
        return self._newest

    def release(self, before: int) -> None:
        with self._changed:
            self._held = {version: params for version, params in self._held.items() if version >= before}


class Files:
    """Through a folder that both sides see; one safetensors file a version, complete from the moment it has its name.

    Of a learner of several processes each writes what its devices hold, `shard-VERSION-I-of-P.safetensors`, and the
    first then says that all have, in `weights-VERSION.json`. Readers need not be as many.

    A version may be published anew: a learner that resumed from an older checkpoint goes back, and what the one before
    it had published beyond is withdrawn.

    Args:
        directory: created by the first `publish`.
        shardings: as in `InProcess`, for `fetch`; None: arrays on the default device.
        keep: how many of the newest versions stay; `max_staleness + 1` are needed.
        dtype, timeout: as in `InProcess`.
        poll: seconds between looks at the folder.
    """

    def __init__(self, directory: str | os.PathLike, shardings: Any = None, *, keep: int = 2, dtype: Any = None,
                 timeout: float | None = None, poll: float = 0.02):
        if keep < 1:
            raise ValueError(f'keep={keep} must be at least 1')
        self._directory, self._shardings, self._keep = pathlib.Path(directory), shardings, keep
        self._dtype, self._timeout, self._poll = dtype, timeout, poll

    def _path(self, version: int) -> pathlib.Path:
        return self._directory / f'weights-{version:09d}.safetensors'

    def _marker(self, version: int) -> pathlib.Path:
        return self._directory / f'weights-{version:09d}.json'

    def _shard(self, version: int, index: int, count: int) -> pathlib.Path:
        return self._directory / f'shard-{version:09d}-{index}-of-{count}.safetensors'

    def versions(self) -> list[int]:
        """On disk, oldest first."""
        return sorted({*_versions(self._directory, 'weights-*.safetensors'),
                       *_versions(self._directory, 'weights-*.json')})

    def publish(self, version: int, params: Tree) -> None:
        """Returns when the file is on disk; with several processes, all call it.

        Raises:
            OSError: it could not be written; versions before it are untouched.
            ValueError: `params` is no nested dict, or a name holds a slash.
        """
        from safetensors.numpy import save
        flat = _flatten(cast(params, self._dtype))
        if jax.process_count() > 1:
            return self._publish_shards(version, flat)
        arrays = {name: np.array(x, order='C') for name, x in jax.device_get(flat).items()}
        self._marker(version).unlink(missing_ok=True)  # of a learner that was several processes
        write(self._path(version), save(arrays, metadata={'version': str(version)}))
        self._remove_old(version)

    def _publish_shards(self, version: int, flat: Mapping[str, Any]) -> None:
        from jax.experimental.multihost_utils import sync_global_devices
        from safetensors.numpy import save
        index, count = jax.process_index(), jax.process_count()
        if index == 0:
            self._withdraw(version)
        sync_global_devices(f'weights {version} withdrawn')  # nobody takes new shards for those of the old version
        arrays: dict[str, np.ndarray] = {}
        for name, x in flat.items():
            for shard in x.addressable_shards:
                if shard.replica_id == 0:
                    begins = ','.join(str(axis.start or 0) for axis in shard.index)
                    arrays[f'{name}@{begins}'] = np.array(shard.data, order='C')
        write(self._shard(version, index, count), save(arrays))
        sync_global_devices(f'weights {version} written')
        if index == 0:
            marker = {'shards': count, 'shapes': {name: list(x.shape) for name, x in flat.items()}}
            write(self._marker(version), json.dumps(marker).encode())
            self._remove_old(version)

    def _withdraw(self, version: int) -> None:
        self._path(version).unlink(missing_ok=True)
        self._marker(version).unlink(missing_ok=True)

    def _remove_old(self, version: int) -> None:
        for other in self.versions():
            if other > version or other <= version - self._keep:
                self._withdraw(other)
        for path in self._directory.glob('shard-*.safetensors'):
            other = int(path.name.split('-')[1])
            if other > version or other <= version - self._keep:
                path.unlink(missing_ok=True)

    def fetch(self, version: int) -> Tree:
        """That version as a nested dict.

        Raises:
            TimeoutError: it did not come within `timeout`.
            ValueError: it has been there and is gone.
        """
        gone = lambda: any(other >= version + self._keep for other in self.versions())
        wait(lambda: self._path(version).exists() or self._marker(version).exists() or gone(),
             f'version {version} was not published', self._timeout, self._poll)
        deadline = time.monotonic() + LATE_SECONDS  # a marker may be seen before the shards that it vouches for
        while True:
            try:
                flat = self._read_shards(version) if self._marker(version).exists() else self._read_file(version)
                return _placed(_unflatten(flat), self._shardings)
            except FileNotFoundError:
                if gone() or time.monotonic() > deadline:
                    raise ValueError(f'{self._path(version)} is gone, only {self.versions()} are left; raise '
                                     f'keep={self._keep} to max_staleness + 1') from None
            time.sleep(self._poll)

    def _read_file(self, version: int) -> dict[str, np.ndarray]:
        from safetensors import deserialize
        return {name: _array(entry) for name, entry in deserialize(self._path(version).read_bytes())}

    def _read_shards(self, version: int) -> dict[str, np.ndarray]:
        from safetensors import deserialize
        marker = json.loads(self._marker(version).read_bytes())
        flat: dict[str, np.ndarray] = {}
        for i in range(marker['shards']):
            for key, entry in deserialize(self._shard(version, i, marker['shards']).read_bytes()):
                (name, _, begins), part = key.rpartition('@'), _array(entry)
                whole = flat.setdefault(name, np.empty(marker['shapes'][name], part.dtype))
                begins = [int(begin) for begin in begins.split(',') if begin]
                whole[tuple(slice(begin, begin + size) for begin, size in zip(begins, part.shape))] = part
        return flat

    def newest(self) -> int | None:
        return max(self.versions(), default=None)

    def release(self, before: int) -> None:
        """Nothing: other readers may be behind this one. `keep` bounds what stays."""


class Transfer:
    """From device to device between processes, by `jax.experimental.transfer`; the folder only says who holds what.

    Each version can be pulled once by each of `num_readers`, and is held until then; a reader therefore has to fetch
    every version (a single generator does in the stream's exact order; several, which share the batches, would not),
    and one that was killed starts again at the next. Where that is not good enough, use `Files`.

    Nothing asks who pulls, and nothing is encrypted: whoever can connect to the address, and guesses the number of an
    offer (48 random bits, which the folder holds), can read the weights. Let it be one of a network that you trust.

    Args:
        directory: both sides see it.
        like: tree of `ShapeDtypeStruct` with shardings: what to pull and where to put it. The reader's side needs it.
        num_readers, reader: how many there are, and which one this is.
        keep: for how many of the newest versions the folder says who holds them; `max_staleness + 1` are needed.
        address: of this machine, `host:port`, as the other side reaches it; the default takes any free port and is
            reached from this machine alone.
        dtype, timeout, poll: as in `Files`.

    Raises:
        NotImplementedError: this JAX, or this backend, has no transfer server.
    """

    def __init__(self, directory: str | os.PathLike, like: Tree = None, *, num_readers: int = 1, reader: int = 0,
                 keep: int = 2, address: str = '127.0.0.1:0', dtype: Any = None, timeout: float | None = None,
                 poll: float = 0.02):
        try:
            from jax.experimental import transfer
            server = transfer.start_transfer_server(jax.devices()[0].client, address, [_host(address) + ':0'])
        except Exception as error:  # an ImportError, or the runtime's own types
            raise NotImplementedError(f'jax.experimental.transfer cannot be used here ({error}); use Files') from error
        self._server, self._directory, self._like = server, pathlib.Path(directory), like
        self._num_readers, self._reader, self._keep = num_readers, reader, keep
        self._host, self._dtype, self._timeout, self._poll = _host(address), dtype, timeout, poll
        self._connections: dict[str, Any] = {}
        self._held: tuple[int, Tree] | None = None

    def _path(self, version: int) -> pathlib.Path:
        return self._directory / f'transfer-{version:09d}.json'

    def publish(self, version: int, params: Tree) -> None:
        """Returns when the snapshot is offered, before anybody has pulled it."""
        leaves = jax.block_until_ready(jax.tree.leaves(jax.tree.map(jnp.copy, cast(params, self._dtype))))
        base = int.from_bytes(os.urandom(6), 'big') * self._num_readers
        for reader in range(self._num_readers):
            self._server.await_pull(base + reader, leaves)
        port = self._server.address().rsplit(':', 1)[1]
        write(self._path(version), json.dumps({'address': f'{self._host}:{port}', 'uuid': base}).encode())
        for other in _versions(self._directory, 'transfer-*.json'):
            if other > version or other <= version - self._keep:
                self._path(other).unlink(missing_ok=True)

    def fetch(self, version: int) -> Tree:
        """That version, laid out as `like`.

        Raises:
            TimeoutError: it did not come within `timeout`.
        """
        if self._held and self._held[0] == version:
            return self._held[1]
        wait(self._path(version).exists, f'version {version} was not published', self._timeout, self._poll)
        offer = json.loads(self._path(version).read_text())
        if offer['address'] not in self._connections:
            self._connections[offer['address']] = self._server.connect(offer['address'])
        leaves, structure = jax.tree.flatten(self._like)
        pulled = self._connections[offer['address']].pull(offer['uuid'] + self._reader, leaves)
        self._held = version, jax.block_until_ready(jax.tree.unflatten(structure, pulled))
        return self._held[1]

    def newest(self) -> int | None:
        return max(_versions(self._directory, 'transfer-*.json'), default=None)

    def release(self, before: int) -> None:
        """Nothing: a version goes when it has been pulled."""


# ---- Parts ---------------------------------------------------------------------------------------------------------

def cast(params: Tree, dtype: Any) -> Tree:
    """`params` with floating arrays in `dtype`; None leaves all as they are."""
    if dtype is None:
        return params
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def write(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that is either whole or not there, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        with open(partial, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def wait(ready: Any, what: str, timeout: float | None, poll: float) -> None:
    """Looks every `poll` seconds whether `ready()`; TimeoutError `what` after `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not ready():
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f'{what} within timeout={timeout} s')
        time.sleep(poll)


def _placed(tree: Tree, shardings: Any) -> Tree:
    """A tree of host arrays on the devices; where those of other processes have a part, each copies its own."""
    if jax.process_count() == 1 or shardings is None:
        return jax.device_put(tree, shardings)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), tree, shardings)


def _versions(directory: pathlib.Path, pattern: str) -> list[int]:
    """Numbers of the files that match, oldest first; a file still being written has another name."""
    return sorted(int(path.name.split('.')[0].split('-')[1]) for path in directory.glob(pattern))


def _host(address: str) -> str:
    return address.rsplit(':', 1)[0]


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        if not path:
            raise ValueError(f'params are a {type(tree).__name__}, expected a nested dict')
        return {'/'.join(path): tree}
    out: dict[str, Any] = {}
    for name, sub in tree.items():
        if not isinstance(name, str) or '/' in name:
            raise ValueError(f'params: {name!r} is not a name that a file can hold')
        out |= _flatten(sub, (*path, name))
    return out


def _unflatten(flat: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for name, x in flat.items():
        *path, last = name.split('/')
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = x
    return tree


_DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'BOOL': 'bool',
           'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8',
           'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8'}


def _array(entry: Mapping[str, Any]) -> np.ndarray:
    # safetensors.numpy knows no bfloat16 when it reads.
    return np.frombuffer(entry['data'], jnp.dtype(_DTYPES[entry['dtype']])).reshape(entry['shape'])
