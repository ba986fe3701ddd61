"""The object that `torch.save` wrote, without PyTorch and without running code that the file names.

A file of `torch.save` is a pickle, and a pickle may name any function to be called. Here it is read by an unpickler
that knows tensors and containers; every other name becomes an inert `Placeholder`, which remembers the name and ignores
what the pickle does to it. Tensors become `Tensor`s: where they lie in the file, to be read later.

Both of PyTorch's layouts are read. Since 1.6 a file is a zip archive of the pickle and a member for each storage.
Before, it is five pickles (a magic number, a version, facts about the machine, the object, the keys of the storages),
then each storage as its length and its numbers.
"""
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.weights.tensor import Tensor

_STORAGES = {
    'FloatStorage': np.float32, 'DoubleStorage': np.float64, 'HalfStorage': np.float16, 'BFloat16Storage': jnp.bfloat16,
    'LongStorage': np.int64, 'IntStorage': np.int32, 'ShortStorage': np.int16, 'CharStorage': np.int8,
    'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
}
_ZIP = b'PK\x03\x04'
_MAGIC = 0x1950a86a20f9469cfc6c  # of the layout before PyTorch 1.6
_VERSION = 1001


class Placeholder:
    """Stands for an object that is not read; whatever a pickle does to it has no effect.

    Attributes:
        wanted: 'module.name' of what the pickle names.
    """
    wanted = ''

    def __new__(cls, *_: Any, **__: Any) -> 'Placeholder':
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def _ignore(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Dict(dict):
    """A dict or OrderedDict of the file; attributes, which PyTorch sets on the latter, are left out."""
    __slots__ = ()

    def __setstate__(self, *_: Any) -> None:
        pass


class _Refused(Exception):
    """A file that is whole but cannot be read; the message lacks its name."""


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


def load(path: pathlib.Path) -> Any:
    """The object in the file `path`, with `Tensor`s in place of tensors and `Placeholder`s of what is not read.

    Raises:
        OSError: truncated or damaged.
        ValueError: not a file of `torch.save`, or one of a machine or version that is not read.
    """
    try:
        with open(path, 'rb') as file:
            magic = file.read(4)
            if magic == _ZIP:
                return _load_zip(path)
            file.seek(0)
            return _load_legacy(path, file)
    except _Refused as error:
        raise ValueError(f'{path}: {error}') from None
    except Exception as error:  # a damaged pickle calls what it has on the stack: there is no list of what that raises
        text = ' '.join(str(error).split())[:200]
        raise OSError(f'{path}: truncated or damaged ({type(error).__name__}: {text})') from None


# ---- The two layouts -------------------------------------------------------------------------------------------------

def _load_zip(path: pathlib.Path) -> Any:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        if len(names) != 1:
            raise _Refused('a zip file, but not one that torch.save wrote')
        root = names[0].removesuffix('data.pkl')
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise _Refused('two members of the archive have one name')

        def start_of(member: zipfile.ZipInfo) -> int:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise _Refused('compressed, as torch.save does not write it; save it again')
            with open(path, 'rb') as file:  # the header before the bytes ends with a name and padding
                file.seek(member.header_offset + 26)
                lengths = file.read(4)
            start = member.header_offset + 30 + int.from_bytes(lengths[:2], 'little') + int.from_bytes(
                lengths[2:], 'little')
            if start + member.file_size > size:
                raise EOFError(f'{member.filename} reaches past the end')
            return start

        start_of(members[names[0]])  # stored, hence no longer than the file
        order = b'little'
        if root + 'byteorder' in members:
            start_of(members[root + 'byteorder'])
            order = archive.read(root + 'byteorder')
        if order != b'little':
            raise _Refused('written on a big-endian machine; save it again as safetensors')

        def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
            member = members[f'{root}data/{key}']
            return _Storage(dtype, start_of(member), member.file_size // dtype.itemsize)

        with archive.open(names[0]) as file:
            return _Unpickler(file, path, storage).load()


def _load_legacy(path: pathlib.Path, file: Any) -> Any:
    """The object is read twice: where storages lie is known from the keys and lengths that follow it."""
    try:
        magic = _Unpickler(file, path, None).load()
    except Exception:
        magic = None
    if magic != _MAGIC:
        raise _Refused('neither safetensors nor a file of torch.save; save it again as one')
    if _Unpickler(file, path, None).load() != _VERSION:
        raise _Refused('of a version of torch.save that is not read; save it again with a newer PyTorch')
    if not _Unpickler(file, path, None).load()['little_endian']:
        raise _Refused('written on a big-endian machine; save it again as safetensors')
    begin = file.tell()
    dtypes: dict[str, np.dtype] = {}

    def noted(dtype: np.dtype, key: str, count: int) -> _Storage:
        dtypes[key] = dtype
        return _Storage(dtype, 0, count)

    _Unpickler(file, path, noted).load()
    storages: dict[str, _Storage] = {}
    end = path.stat().st_size
    for key in _Unpickler(file, path, None).load():
        if key not in dtypes:
            raise _Refused(f'storage {key} is of a type of numbers that is not read; save it again as safetensors')
        size = int.from_bytes(file.read(8), 'little')
        storages[key] = _Storage(dtypes[key], file.tell(), size)
        if size * dtypes[key].itemsize > end - file.tell():
            raise EOFError(f'storage {key} reaches past the end')
        file.seek(size * dtypes[key].itemsize, 1)
    file.seek(begin)
    return _Unpickler(file, path, lambda dtype, key, count: storages[key]).load()


# ---- Pickles ---------------------------------------------------------------------------------------------------------

# The Python class, because its memo is a dict: the one in C allocates as many slots as a number in the file says.
class _Unpickler(pickle._Unpickler):
    """Knows what a state dict is made of and nothing else.

    Args:
        storage: (dtype, key, how many numbers) -> the storage; None: the pickle has none.
    """

    def __init__(self, file: Any, path: pathlib.Path, storage: Callable[[np.dtype, str, int], _Storage] | None):
        super().__init__(file, encoding='utf-8')
        self._path, self._storage = path, storage
        self._unknown: dict[str, type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return _Dict
        if module == 'torch._utils':
            if name in ('_rebuild_tensor', '_rebuild_tensor_v2'):
                return self._tensor
            if name in ('_rebuild_parameter', '_rebuild_parameter_with_state'):
                return self._parameter
        if (module, name) == ('torch._tensor', '_rebuild_from_type_v2'):
            return self._with_attributes
        if module == 'torch' and name in _STORAGES:
            return _StorageType(np.dtype(_STORAGES[name]))
        wanted = ascii(f'{module}.{name}')[1:-1][:100]  # it appears in messages
        if wanted not in self._unknown:
            self._unknown[wanted] = type('Placeholder', (Placeholder,), {'wanted': wanted})
        return self._unknown[wanted]

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == 'module':  # before PyTorch 1.6: a class of modules, with its source
            return pid[1]
        kind, storage_type, key, _, count, *view = pid
        if kind != 'storage' or self._storage is None:
            raise pickle.UnpicklingError(f'unknown kind of record {kind!r}')
        if not isinstance(storage_type, _StorageType):  # float8, complex or quantised numbers
            return storage_type()
        storage = self._storage(storage_type.dtype, key, count)
        if not 0 <= count <= storage.size:
            raise EOFError(f'storage {key} has {storage.size} of {count} numbers')
        if view and view[0] is not None:  # before PyTorch 0.4 a storage could be a part of another
            _, offset, size = view[0]
            if min(offset, size) < 0 or offset + size > storage.size:
                raise EOFError(f'a part of storage {key} reaches outside it')
            return _Storage(storage.dtype, storage.start + offset * storage.dtype.itemsize, size)
        return storage

    def _tensor(self, storage: _Storage | Placeholder, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
                *_: Any) -> Tensor | Placeholder:
        if isinstance(storage, Placeholder):
            return storage
        # Maps of the file trust these numbers, and they come from the file.
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        if (len(size) != len(stride) or min((offset, *size, *stride)) < 0
                or (math.prod(size) > 0 and last >= storage.size)):
            raise EOFError(f'a tensor of shape {tuple(size)} reaches outside its storage')
        start = storage.start + offset * storage.dtype.itemsize
        contiguous = all(n == 1 or s == math.prod(size[i + 1:]) for i, (n, s) in enumerate(zip(size, stride)))
        return Tensor(self._path, storage.dtype, tuple(size), start, None if contiguous else tuple(stride))

    def _with_attributes(self, rebuild: Any, _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
        """A tensor with Python attributes, or of a subclass, is its data."""
        return rebuild(*args) if rebuild in (self._tensor, self._parameter) else Placeholder()

    def _parameter(self, data: Any, *_: Any) -> Any:
        """A parameter is its data; whether it has a gradient, and its hooks, are left out."""
        return data
