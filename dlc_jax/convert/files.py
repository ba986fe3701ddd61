"""State dicts on disk: safetensors and PyTorch's zip format, one file or shards with an index. No PyTorch needed.

A `.pth` file is a pickle, and a pickle can run any code. Here it is read by an unpickler that knows tensors and
containers and refuses every other name it meets.
"""
import collections
import json
import math
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    'FloatStorage': np.float32, 'DoubleStorage': np.float64, 'HalfStorage': np.float16, 'BFloat16Storage': jnp.bfloat16,
    'LongStorage': np.int64, 'IntStorage': np.int32, 'ShortStorage': np.int16, 'CharStorage': np.int8,
    'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
}
_INDEX_SUFFIX = '.index.json'


def load_state_dict(path: str | pathlib.Path, *, key: str | None = None) -> dict[str, np.ndarray]:
    """{name: array} from a file, or from a directory that holds one state dict.

    Args:
        path: `.safetensors`; `.pth`, `.pt`, `.bin` or `.pkl` as `torch.save` writes it; an index of shards
            (`*.index.json`); or a directory with an index, or else with a single such file.
        key: entry to take from a file that holds more than a state dict ('teacher'). None: the file is a state dict, or
            holds exactly one.

    Raises:
        FileNotFoundError: nothing there.
        OSError: the file is truncated or damaged.
        ValueError: not a format named above, or the file asks for code to be run.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _only_file(path)
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such file')
    if path.name.endswith(_INDEX_SUFFIX):
        return _load_shards(path)
    if path.suffix == '.safetensors':
        return _load_safetensors(path)
    return _select(path, _load_zip(path), key)


def save_state_dict(path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes `state_dict` as one safetensors file, under a temporary name until it is complete."""
    from safetensors.numpy import save_file
    path = pathlib.Path(path)
    if path.suffix != '.safetensors':
        raise ValueError(f'{path}: weights are written as .safetensors; change the name')
    partial = path.with_name(path.name + '.partial')
    save_file({name: np.ascontiguousarray(x) for name, x in state_dict.items()}, partial)
    partial.replace(path)


def _only_file(directory: pathlib.Path) -> pathlib.Path:
    for pattern in ('*.safetensors' + _INDEX_SUFFIX, '*' + _INDEX_SUFFIX, '*.safetensors', '*.bin', '*.pth', '*.pt'):
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            raise ValueError(f'{directory}: holds {len(found)} files {pattern}; name one of them')
        if found:
            return found[0]
    raise FileNotFoundError(f'{directory}: no .safetensors, .bin, .pth or .pt file in it')


def _load_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        weight_map = json.loads(index.read_text())['weight_map']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{index}: not an index of shards ({error!r})') from None
    out = {}
    for shard in sorted(set(weight_map.values())):
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f'{index}: shard {shard!r} is not a plain file name beside the index')
        tensors = load_state_dict(index.parent / shard)
        for name in (name for name, where in weight_map.items() if where == shard):
            if name not in tensors:
                raise ValueError(f'{index.parent / shard}: tensor {name} is missing though the index places it there')
            out[name] = tensors[name]
    return out


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(f'{path}: truncated or not a safetensors file ({error})') from None


def _select(path: pathlib.Path, content: Any, key: str | None) -> dict[str, np.ndarray]:
    """The state dict in `content`, which is one or holds one under `key`."""
    def is_state_dict(x):
        return isinstance(x, Mapping) and bool(x) and all(isinstance(t, np.ndarray) for t in x.values())

    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f'{path}: no entry {key!r}; it has {sorted(map(str, content))[:8]}')
        content = content[key]
    elif isinstance(content, Mapping) and not is_state_dict(content):
        found = [name for name, x in content.items() if is_state_dict(x)]
        if len(found) != 1:
            raise ValueError(f'{path}: holds {len(found)} state dicts {found[:8]}; choose one with key=')
        content = content[found[0]]
    if not is_state_dict(content):
        raise ValueError(f'{path}: not a state dict (a mapping from names to tensors)')
    return dict(content)


def _load_zip(path: pathlib.Path) -> Any:
    """What `torch.save` wrote, tensors as numpy arrays."""
    with open(path, 'rb') as file:
        magic = file.read(4)
    if magic != b'PK\x03\x04':
        raise ValueError(f'{path}: neither safetensors nor the zip format of torch.save; save it again as one')
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith('/data.pkl')]
            if len(names) != 1:
                raise ValueError(f'{path}: a zip file, but not one that torch.save wrote')
            root = names[0].removesuffix('data.pkl')
            order = archive.read(root + 'byteorder') if root + 'byteorder' in archive.namelist() else b'little'
            if order != b'little':
                raise ValueError(f'{path}: written on a big-endian machine; save it again as safetensors')
            with archive.open(names[0]) as file:
                return _Unpickler(file, archive, root, path).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f'{path}: truncated or damaged ({error})') from None


class _Unpickler(pickle.Unpickler):
    """Knows what a state dict is made of and nothing else."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, path: pathlib.Path):
        super().__init__(file, encoding='utf-8')
        self._archive, self._root, self._path = archive, root, path
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return collections.OrderedDict
        if module == 'torch._utils' and name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
            return self._tensor if name == '_rebuild_tensor_v2' else _parameter
        if module == 'torch' and name in _STORAGES:
            return _Storage(name)
        raise ValueError(f'{self._path}: refused, because reading it would run {module}.{name}; export its state '
                         'dict as safetensors')

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != 'storage' or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f'unknown kind of record {kind!r}')
        if key not in self._storages:
            data = np.frombuffer(self._archive.read(f'{self._root}data/{key}'), storage.dtype)
            if data.size < count:
                raise OSError(f'{self._path}: truncated, storage {key} has {data.size} of {count} numbers')
            self._storages[key] = data
        return self._storages[key]

    def _tensor(self, storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
                *_: Any) -> np.ndarray:
        # as_strided trusts its arguments, and these come from the file.
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or (math.prod(size) and last >= storage.size):
            raise OSError(f'{self._path}: damaged, a tensor of shape {tuple(size)} reaches outside its storage')
        view = np.lib.stride_tricks.as_strided(storage[offset:], size, [s * storage.itemsize for s in stride])
        return np.array(view)


class _Storage:
    """Stands for a storage class of PyTorch: its dtype."""

    def __init__(self, name: str):
        self.dtype = np.dtype(_STORAGES[name])


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
