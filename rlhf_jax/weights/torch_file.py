"""Files of `torch.save` without PyTorch: where their tensors lie, found without running code that they hold."""
import collections
import math
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.weights.tensor import Tensor

_STORAGES = {
    'FloatStorage': np.float32, 'DoubleStorage': np.float64, 'HalfStorage': np.float16, 'BFloat16Storage': jnp.bfloat16,
    'LongStorage': np.int64, 'IntStorage': np.int32, 'ShortStorage': np.int16, 'CharStorage': np.int8,
    'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
}


def tensors(path: pathlib.Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in the file, which is one or holds one, under `key` where it holds several.

    A training checkpoint of SEDD keeps a state dict 'model' and, without names, the average of its parameters,
    `ema.shadow_params`. That average is what is sampled from, so it is what is read, as 'ema'; `key='model'` reads the
    weights themselves.

    Raises:
        OSError: truncated or damaged.
        ValueError: not a file of `torch.save`, no state dict in it, or code that it asks for.
    """
    content = _unpickle(path)
    if isinstance(content, Mapping) and key in (None, 'ema') and isinstance(content.get('ema'), Mapping):
        if 'shadow_params' in content['ema']:
            content, key = {'ema': _averaged(path, content)}, 'ema'
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f'{path}: no entry {key!r}; it has {sorted(map(str, content))[:8]}')
        content = content[key]
    elif isinstance(content, Mapping) and not _is_state_dict(content):
        found = [name for name, x in content.items() if _is_state_dict(x)]
        if len(found) != 1:
            raise ValueError(f'{path}: holds {len(found)} state dicts {found[:8]}; choose one with key=')
        content = content[found[0]]
    if not _is_state_dict(content):
        raise ValueError(f'{path}: not a state dict (a mapping from names to tensors)')
    return dict(content)


def _averaged(path: pathlib.Path, content: Mapping) -> dict[str, Tensor]:
    """The state dict 'model' with the average in place of its parameters; buffers, which are not averaged, stay.

    Raises:
        ValueError: they do not belong together.
    """
    model, shadow = content.get('model'), content['ema']['shadow_params']
    if not _is_state_dict(model) or not isinstance(shadow, list) or not all(isinstance(x, Tensor) for x in shadow):
        raise ValueError(f'{path}: ema.shadow_params is no list of tensors beside a state dict `model`; choose with '
                         'key=')
    averaged, rest = {}, list(shadow)
    for name, tensor in model.items():  # parameters stand in the order of the list, with buffers between them
        averaged[name] = rest.pop(0) if rest and rest[0].shape == tensor.shape else tensor
    if rest:
        raise ValueError(f'{path}: {len(rest)} of the {len(shadow)} tensors of ema.shadow_params fit none of `model`, '
                         f'the first of shape {rest[0].shape}; read `model` with key=')
    return averaged


def _is_state_dict(x: Any) -> bool:
    return isinstance(x, Mapping) and bool(x) and all(isinstance(tensor, Tensor) for tensor in x.values())


def _unpickle(path: pathlib.Path) -> Any:
    """What `torch.save` wrote, with `Tensor`s in place of tensors."""
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


class _StorageType(NamedTuple):
    """Stands for a storage class of PyTorch."""
    dtype: np.dtype


class _Storage(NamedTuple):
    """Numbers in the file.

    Attributes:
        start: first byte.
        size: how many numbers there are.
    """
    dtype: np.dtype
    start: int
    size: int


class _Unpickler(pickle.Unpickler):
    """Knows what a state dict is made of and nothing else."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, path: pathlib.Path):
        super().__init__(file, encoding='utf-8')
        self._archive, self._root, self._path = archive, root, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return collections.OrderedDict
        if module == 'torch._utils' and name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
            return self._tensor if name == '_rebuild_tensor_v2' else _parameter
        if module == 'torch' and name in _STORAGES:
            return _StorageType(np.dtype(_STORAGES[name]))
        raise ValueError(f'{self._path}: refused, because reading it would run {module}.{name}; export its state '
                         'dict as safetensors')

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count = pid
        if kind != 'storage' or not isinstance(storage, _StorageType):
            raise pickle.UnpicklingError(f'unknown kind of record {kind!r}')
        entry = self._archive.getinfo(f'{self._root}data/{key}')
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'{self._path}: compressed, as torch.save does not write it; save it again')
        with open(self._path, 'rb') as file:  # the header before the bytes ends with a name and padding
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
        start = entry.header_offset + 30 + int.from_bytes(lengths[:2], 'little') + int.from_bytes(lengths[2:], 'little')
        size = entry.file_size // storage.dtype.itemsize
        if size < count or start + entry.file_size > self._path.stat().st_size:
            raise OSError(f'{self._path}: truncated, storage {key} has {size} of {count} numbers')
        return _Storage(storage.dtype, start, size)

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
                *_: Any) -> Tensor:
        # as_strided trusts its arguments, and these come from the file.
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or (math.prod(size) and last >= storage.size):
            raise OSError(f'{self._path}: damaged, a tensor of shape {tuple(size)} reaches outside its storage')
        start = storage.start + offset * storage.dtype.itemsize
        contiguous = all(n == 1 or s == math.prod(size[i + 1:]) for i, (n, s) in enumerate(zip(size, stride)))
        return Tensor(self._path, storage.dtype, tuple(size), start, None if contiguous else tuple(stride))


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data
