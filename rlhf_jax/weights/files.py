"""State dicts on disk, mapped rather than read: a model larger than memory converts tensor by tensor.

    state_dict = load_state_dict('Llama-3.1-8B')           # a folder with model.safetensors.index.json and its shards
    module, params = from_torch('llama', state_dict, config=read_config('Llama-3.1-8B'), shardings=...)
    save('exported', tensors('llama', module, params), config_of('llama', module))

Read are safetensors and PyTorch's zip format, one file or shards with an index; written is safetensors. The first is a
length, a JSON header of names, dtypes, shapes and offsets, and the bytes. The second is a pickle (`torch_file.py`),
which can run any code; here it is read without PyTorch by an unpickler that knows tensors and containers and refuses
every other name it meets.
"""
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.weights import torch_file
from rlhf_jax.weights.tensor import Tensor

_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64,
           'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_INDEX_SUFFIX = '.index.json'
_LONGEST_HEADER = 100_000_000  # bytes, as in the format's own reader
_SHARD = 5_000_000_000  # bytes a shard at most, as `transformers` 4 writes them


class StateDict(Mapping):
    """{name: array}, each a view of a file on disk, mapped when it is asked for and forgotten again."""

    def __init__(self, path: pathlib.Path, tensors: Mapping[str, Tensor]):
        self._path, self._tensors = path, tensors

    @property
    def specs(self) -> Mapping[str, Tensor]:
        """{name: what has its shape and dtype}; nothing is read."""
        return self._tensors

    def where(self, name: str) -> str:
        """' (in FILE)': the file that holds `name`, or would."""
        return f' (in {self._tensors[name].path if name in self._tensors else self._path})'

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would map the file
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


# ---- Reading ---------------------------------------------------------------------------------------------------------

def load_state_dict(path: str | pathlib.Path, *, key: str | None = None) -> StateDict:
    """The tensors of a file, or of a directory that holds one state dict; read when they are asked for.

    Args:
        path: `.safetensors`; `.pth`, `.pt`, `.bin` or `.pkl` as `torch.save` writes it; an index of shards
            (`*.index.json`); or a directory with an index, or else with a single such file.
        key: entry to take from a file that holds more than a state dict ('teacher'). None: the file is a state dict, or
            holds exactly one.

    Raises:
        FileNotFoundError: nothing there.
        OSError: a truncated or damaged file.
        ValueError: not a format named above, an index that does not fit its shards, or a file that asks for code to be
            run.
    """
    path = pathlib.Path(path)
    return StateDict(path, _tensors(_only_file(path) if path.is_dir() else path, key))


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


def _only_file(directory: pathlib.Path) -> pathlib.Path:
    for pattern in ('*.safetensors' + _INDEX_SUFFIX, '*' + _INDEX_SUFFIX, '*.safetensors', '*.bin', '*.pth', '*.pt'):
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            raise ValueError(f'{directory}: holds {len(found)} files {pattern}; name one of them')
        if found:
            return found[0]
    raise FileNotFoundError(f'{directory}: no .safetensors, .bin, .pth or .pt file in it')


def _tensors(path: pathlib.Path, key: str | None) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such file')
    if path.name.endswith(_INDEX_SUFFIX):
        return _of_shards(path)
    if path.suffix == '.safetensors':
        return _of_safetensors(path)
    return torch_file.tensors(path, key)


def _of_shards(index: pathlib.Path) -> dict[str, Tensor]:
    try:
        weight_map = dict(json.loads(index.read_text())['weight_map'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{index}: not an index of shards ({error!r})') from None
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shard in weight_map.items():
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f'{index}: shard {shard!r} is not a plain file name beside the index')
        if shard not in shards:
            shards[shard] = _tensors(index.parent / shard, None)
        if name not in shards[shard]:
            raise ValueError(f'{index.parent / shard}: tensor {name} is missing though the index places it there')
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _of_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise OSError(f'{path}: truncated or not a safetensors file')
        try:
            header = json.loads(file.read(length))
            header.pop('__metadata__', None)
            entries = {name: (np.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape']), *entry['data_offsets'])
                       for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f'{path}: not a safetensors file ({error!r})') from None
    start = 8 + length
    for name, (dtype, shape, begin, end) in entries.items():
        if not 0 <= begin <= end <= size - start or math.prod(shape) * dtype.itemsize != end - begin:
            raise OSError(f'{path}: truncated or damaged, tensor {name} does not lie in it')
    return {name: Tensor(path, dtype, shape, start + begin) for name, (dtype, shape, begin, _) in entries.items()}


# ---- Writing ---------------------------------------------------------------------------------------------------------

def save_state_dict(path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes `state_dict` as one safetensors file, under a temporary name until it is complete. One tensor is in memory
    at a time where `state_dict` makes or reads them when asked. Folders on the way are created.

    Raises:
        ValueError: another ending, or a dtype that the format does not have.
        OSError: it cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != '.safetensors':
        raise ValueError(f'{path}: weights are written as .safetensors; change the name')
    specs = getattr(state_dict, 'specs', state_dict)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    # Wide numbers first, so that all are aligned.
    for name in sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name)):
        dtype = np.dtype(specs[name].dtype)
        if dtype not in _NAMES:
            raise ValueError(f'{path}: {name} is {dtype}, which safetensors do not hold')
        begin, end = end, end + math.prod(specs[name].shape) * dtype.itemsize
        header[name] = {'dtype': _NAMES[dtype], 'shape': list(specs[name].shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.partial')
    with open(partial, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name in list(header)[1:]:
            file.write(np.ascontiguousarray(state_dict[name]).reshape(-1).view(np.uint8).data)
    partial.replace(path)


def save(folder: str | pathlib.Path, state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], *,
         name: str = 'model', shard_bytes: int = _SHARD) -> None:
    """Writes weights and `config.json`, which `transformers` (`diffusers`) loads, into `folder`: one file
    `name`.safetensors, or shards of at most `shard_bytes` and their index; the config last.

    Raises:
        ValueError, OSError: as `save_state_dict`.
    """
    folder = pathlib.Path(folder)
    specs = getattr(state_dict, 'specs', state_dict)
    shards: list[list[str]] = [[]]
    total = size = 0
    for tensor, spec in specs.items():
        count = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        total, size = total + count, size + count
    if len(shards) == 1:
        save_state_dict(folder / f'{name}.safetensors', state_dict)
    else:
        files = [f'{name}-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
        for file, part in zip(files, shards):
            save_state_dict(folder / file, _Part(state_dict, {tensor: specs[tensor] for tensor in part}))
        index = {'metadata': {'total_size': total},
                 'weight_map': {tensor: file for file, part in zip(files, shards) for tensor in part}}
        (folder / f'{name}.safetensors{_INDEX_SUFFIX}').write_text(json.dumps(index, indent=2) + '\n')
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


class _Part(Mapping):
    """Some tensors of a state dict."""

    def __init__(self, state_dict: Mapping[str, np.ndarray], specs: Mapping[str, Any]):
        self._state_dict, self.specs = state_dict, specs

    def __getitem__(self, name: str) -> np.ndarray:
        return self._state_dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)
