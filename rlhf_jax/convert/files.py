"""Weights in safetensors files, mapped rather than read: a model larger than memory converts tensor by tensor.

    state_dict = open_safetensors('Llama-3.1-8B')          # a folder with model.safetensors.index.json and its shards
    module, params = from_torch('llama', state_dict, config=read_config('Llama-3.1-8B'), shardings=...)
    save('exported', to_torch('llama', module, params), config_of('llama', module))

The format is a length, a JSON header of names, dtypes, shapes and offsets, and the bytes; nothing in it can run.
"""
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64,
           'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
_INDEX = 'model.safetensors.index.json'
_LONGEST_HEADER = 100_000_000  # bytes, as in the format's own reader


class Safetensors(Mapping):
    """{name: array} of one file, each a read-only view of the file on disk.

    Raises:
        FileNotFoundError: no such file.
        OSError: truncated, or not a safetensors file.
    """

    def __init__(self, path: str | pathlib.Path):
        self._path = pathlib.Path(path)
        size = self._path.stat().st_size
        with open(self._path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise OSError(f'{path}: truncated or not a safetensors file')
            try:
                header = json.loads(file.read(length))
                header.pop('__metadata__', None)
                self._entries = {name: (_DTYPES[entry['dtype']], tuple(entry['shape']), *entry['data_offsets'])
                                 for name, entry in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise OSError(f'{path}: not a safetensors file ({error!r})') from None
        self._start = 8 + length
        for name, (dtype, shape, begin, end) in self._entries.items():
            inside = 0 <= begin <= end <= size - self._start
            if not inside or math.prod(shape) * np.dtype(dtype).itemsize != end - begin:
                raise OSError(f'{path}: truncated or damaged, tensor {name} does not lie in it')

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._entries[name]
        if begin == end:
            return np.zeros(shape, dtype)
        data = np.memmap(self._path, np.uint8, 'r', self._start + begin, (end - begin,))
        return data.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Shards(Mapping):
    """{name: array} over several files."""

    def __init__(self, where: Mapping[str, Safetensors]):
        self._where = where

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_safetensors(path: str | pathlib.Path) -> Mapping[str, np.ndarray]:
    """The tensors of a `.safetensors` file, or of a folder with one or with shards and their index.

    Raises:
        FileNotFoundError: nothing there.
        OSError: a truncated or damaged file.
        ValueError: an index that does not fit its shards, or a folder with several files and no index.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return Safetensors(path)
    if not (path / _INDEX).exists():
        found = sorted(path.glob('*.safetensors'))
        if not found:
            raise FileNotFoundError(f'{path}: no .safetensors file in it')
        if len(found) > 1:
            raise ValueError(f'{path}: {len(found)} .safetensors files and no {_INDEX}; name one of them')
        return Safetensors(found[0])
    try:
        weight_map = dict(json.loads((path / _INDEX).read_text())['weight_map'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path / _INDEX}: not an index of shards ({error!r})') from None
    shards: dict[str, Safetensors] = {}
    for name, shard in weight_map.items():
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f'{path / _INDEX}: shard {shard!r} is not a plain file name beside the index')
        if shard not in shards:
            shards[shard] = Safetensors(path / shard)
        if name not in shards[shard]:
            raise ValueError(f'{path / shard}: tensor {name} is missing though the index places it there')
    return _Shards({name: shards[shard] for name, shard in weight_map.items()})


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """`config.json` of the folder `path`.

    Raises:
        FileNotFoundError, ValueError: none there, or not JSON.
    """
    path = pathlib.Path(path) / 'config.json'
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: not JSON ({error})') from None


def save(path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json`, which `transformers` loads, into the folder `path`."""
    from safetensors.numpy import save_file
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    partial = path / 'model.safetensors.partial'
    save_file({name: np.ascontiguousarray(x) for name, x in state_dict.items()}, partial, metadata={'format': 'pt'})
    partial.replace(path / 'model.safetensors')
    (path / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
