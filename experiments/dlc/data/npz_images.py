"""Images in an .npz of arrays or of encoded images, as MedMNIST, Keras and our own tools write them."""
import io
import logging
import lzma
import math
import os
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Container, Mapping
from typing import IO, Any, TypeVar

import numpy as np

from experiments.dlc.data import memory
from experiments.dlc.data.decode import Decoding, decode_image
from experiments.dlc.data.images import ArrayImages, ImageSource, digest, split_rows
from experiments.dlc.data.printable import printable

log = logging.getLogger(__name__)

T = TypeVar('T')

# What numpy, zipfile and lzma raise on damaged archives.
ARCHIVE_ERRORS = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError,
                  SyntaxError, MemoryError, OverflowError, RecursionError, RuntimeError, zlib.error, zipfile.BadZipFile,
                  lzma.LZMAError, tokenize.TokenError)
BLOCK = 2 ** 24  # bytes unpacked at once
MAX_CLASSES = 2 ** 20  # that labels may number where no `class_names` say how many there are
PARTS = ('train', 'heldout', 'val', 'valid', 'validation', 'test')  # of PART_images, PART_labels; Keras: x_PART, y_PART


# ---- Files ---------------------------------------------------------------------------------------------------------

def open_npz(path: str | os.PathLike, wanted: Container[str], *, field: str = 'data.path=') -> dict[str, np.ndarray]:
    """The arrays of an .npz or .npz.xz whose names are among `wanted`; never unpickles.

    What each array takes is read from its header and checked against the file and the free memory before it is taken:
    a small file may unpack to any size.

    Args:
        field: what stands before the file in errors.

    Raises:
        FileNotFoundError: no such file.
        OSError: truncated, no .npz, or headers that do not fit what follows them.
        ValueError: the arrays would not fit into memory.
    """
    return _with_archive(path, field, lambda archive, where: _read_arrays(archive, wanted, where))


def npz_names(path: str | os.PathLike, *, field: str = '') -> list[str]:
    """Names of the arrays in an .npz or .npz.xz; raises as `open_npz` does."""
    return _with_archive(path, field, lambda archive, _: sorted(
        name.removesuffix('.npy') for name in archive.namelist()))


class TooLarge(Exception):
    """More than there is memory for."""


def _with_archive(path: str | os.PathLike, field: str, read: Callable[[zipfile.ZipFile, str], T]) -> T:
    file = pathlib.Path(path).expanduser()
    where = f'{field}{file}'
    if not file.is_file():
        raise FileNotFoundError(f'{where}: no such file')
    try:
        with open(file, 'rb') as stream:
            with zipfile.ZipFile(_unpack_xz(stream, where) if file.suffix == '.xz' else stream) as archive:
                return read(archive, where)
    except TooLarge as error:
        raise ValueError(str(error)) from None
    except ARCHIVE_ERRORS as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise OSError(f'{where}: truncated or not an .npz file ({printable(reason)}); fetch it again') from None


def _check_memory(nbytes: int, where: str) -> None:
    try:
        memory.check(nbytes, f'{where}: what it unpacks to', 'use a machine with more memory, or a folder of images')
    except ValueError as error:
        raise TooLarge(str(error)) from None


def _unpack_xz(stream: IO[bytes], where: str) -> IO[bytes]:
    """`stream` unpacked in memory, as far as there is room for it."""
    out = io.BytesIO()
    with lzma.open(stream) as packed:
        while block := packed.read(BLOCK):
            _check_memory(len(block), where)
            out.write(block)
    out.seek(0)
    return out


def _read_arrays(archive: zipfile.ZipFile, wanted: Container[str], where: str) -> dict[str, np.ndarray]:
    infos = [info for info in archive.infolist() if info.filename.removesuffix('.npy') in wanted]
    members = {info.filename.removesuffix('.npy'): info for info in infos}
    if len(members) != len(infos):
        raise ValueError('two arrays of one name')
    _check_memory(sum(info.file_size for info in infos), where)
    for name, info in members.items():
        with archive.open(info) as member:
            _check_header(member, info.file_size, name)
    out = {}
    for name, info in members.items():
        with archive.open(info) as member:
            out[name] = np.lib.format.read_array(member, allow_pickle=False)
    return out


def _check_header(member: IO[bytes], size: int, name: str) -> None:
    """Raises a ValueError unless the array that the header announces is what the remaining bytes hold."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f'{name}: .npy of version {version}')
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f'{name}: holds Python objects')
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - member.tell():
        raise ValueError(f'{name}: its header announces {dtype} {shape}, which is not what follows')


# ---- Images --------------------------------------------------------------------------------------------------------

class EncodedImages(ImageSource):
    """Encoded images (JPEG, PNG) joined into one array; image i is `data[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], *,
                 prefix: str, rows: np.ndarray, decoding: Decoding = Decoding(), image_size: int = 0):
        super().__init__(class_names, image_size)
        self._data, self._offsets, self._prefix, self._decoding = data, offsets, prefix, decoding
        self._rows, self.labels = rows, labels[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return f'{self._prefix}/{self._rows[i]}'

    def read(self, i: int) -> tuple[np.ndarray | int | str, ...]:
        start, stop = self._offsets[self._rows[i]:self._rows[i] + 2]
        image, notes = decode_image(self._data[start:stop].tobytes(), self._decoding)
        return image, self.labels[i], *notes

    def digest(self) -> str:
        return digest([super().digest().encode(), np.ascontiguousarray(self._data).data,
                       np.ascontiguousarray(self._offsets).data, self.labels.tobytes()])


def npz(path: str, split: str, *, heldout: float = 0.1, seed: int = 0, decoding: Decoding = Decoding(),
        image_size: int = 0) -> ImageSource:
    """Images of one split of an .npz.

    It holds `images` uint8 [N, H, W(, C)], or encoded ones as `jpeg_bytes` and `offsets`; `labels` [N], `is_test` [N]
    bool and `class_names` are optional. Or `train_images`, `train_labels`, `val_images`, `test_images`, ... (MedMNIST),
    or `x_train`, `y_train`, `x_test`, ... (Keras). Without parts, a share `heldout` of each class is kept apart.

    Raises:
        FileNotFoundError, OSError, ValueError: of one line, with the file and the array that does not fit.
    """
    arrays = open_npz(path, READ)
    where, prefix = f'data.path={path}', pathlib.Path(path).name.split('.')[0]
    arrays, part_of_row = _join_parts(arrays, where)
    encoded = 'jpeg_bytes' in arrays
    if not encoded and 'images' not in arrays:
        raise ValueError(f"{where}: needs 'images', or 'jpeg_bytes' and 'offsets'; it holds "
                         f'{printable(str(npz_names(path)))}')
    count = len(_offsets(arrays, where)) - 1 if encoded else len(_pixels(arrays['images'], where))
    if count < 1:
        raise ValueError(f'{where}: holds no image')
    labels, class_names = _labels(arrays, count, where)
    rows = _rows(arrays, labels, part_of_row, split, heldout, seed, where)
    kind = dict(prefix=prefix, rows=rows, image_size=image_size)
    if encoded:
        source = EncodedImages(arrays['jpeg_bytes'], arrays['offsets'], labels, class_names, decoding=decoding, **kind)
    else:
        source = ArrayImages(arrays['images'], labels, class_names, channels=decoding.channels, **kind)
    if 'is_test' not in arrays and len(part_of_row) < 2:
        source.held_back = count - len(rows)
    return source


_SPELLINGS = {f'{part}_{kind}': (part, kind) for part in PARTS for kind in ('images', 'labels')} | {
    f'{letter}_{part}': (part, kind) for part in PARTS for letter, kind in (('x', 'images'), ('y', 'labels'))}


READ = {*_SPELLINGS, 'images', 'labels', 'jpeg_bytes', 'offsets', 'is_test', 'class_names'}


def _join_parts(arrays: Mapping[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`arrays` with `images` and `labels` joined of all parts, and the rows of each part ({} without parts)."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, (part, kind) in _SPELLINGS.items():
        if name in arrays:
            parts.setdefault(part, {})[kind] = arrays[name]
    parts = {part: kinds for part, kinds in parts.items() if 'images' in kinds}
    if 'images' in arrays or 'jpeg_bytes' in arrays or not parts:
        return dict(arrays), {}
    images = [_pixels(kinds['images'], f'{where}: {part}') for part, kinds in parts.items()]
    if len({x.shape[1:] for x in images}) > 1:
        raise ValueError(f'{where}: images of its parts differ in size: {[x.shape for x in images]}')
    without = [part for part, kinds in parts.items() if 'labels' not in kinds]
    if without and len(without) < len(parts):
        raise ValueError(f'{where}: {without[0]} has images but no labels, unlike the other parts')
    out = {name: array for name, array in arrays.items() if name not in _SPELLINGS} | {'images': np.concatenate(images)}
    for part, kinds in parts.items():
        if 'labels' in kinds and (np.ndim(kinds['labels']) == 0 or len(kinds['labels']) != len(kinds['images'])):
            raise ValueError(f'{where}: {part} has {len(kinds["images"])} images but labels {kinds["labels"].shape}')
    if not without:
        try:
            out['labels'] = np.concatenate([kinds['labels'] for kinds in parts.values()])
        except ValueError:
            raise ValueError(f'{where}: labels of its parts differ in shape') from None
    stops = np.cumsum([0] + [len(x) for x in images])
    return out, {part: np.arange(*stops[i:i + 2]) for i, part in enumerate(parts)}


def _pixels(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)) or \
            0 in images.shape[1:]:
        raise ValueError(f"{where}: 'images' are {images.dtype} {images.shape}; need uint8 [N, H, W(, 1 or 3)]")
    return images


def _offsets(arrays: Mapping[str, np.ndarray], where: str) -> np.ndarray:
    data, offsets = arrays['jpeg_bytes'], arrays.get('offsets')
    if offsets is None:
        raise ValueError(f"{where}: has 'jpeg_bytes' but no 'offsets'")
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer) \
            or len(offsets) < 1:
        raise ValueError(f"{where}: 'jpeg_bytes' and 'offsets' are {data.dtype} {data.shape} and {offsets.dtype} "
                         f'{offsets.shape}; need uint8 [bytes] and whole numbers [N + 1]')
    if (offsets[1:] < offsets[:-1]).any() or offsets[0] < 0 or offsets[-1] > len(data):
        raise ValueError(f"{where}: 'offsets' do not fit 'jpeg_bytes' ({len(data)} bytes)")
    return offsets


def _labels(arrays: Mapping[str, np.ndarray], count: int, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [N] in 0 .. classes - 1, and the classes' names."""
    names = arrays.get('class_names')
    if names is not None and (names.ndim != 1 or names.dtype.kind not in 'US'):
        raise ValueError(f'{where}: class_names are {names.dtype} {names.shape}; need strings [classes]')
    names = None if names is None else tuple(_text(name) for name in names)
    labels = arrays.get('labels', np.zeros(count, np.int64))
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras and MedMNIST have them
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f'{where}: labels are {labels.shape}; need one class an image, [N] or [N, 1]')
    if len(labels) != count:
        raise ValueError(f'{where}: {count} images but {len(labels)} labels')
    if labels.dtype.kind in 'US':
        words = np.array([_text(label) for label in labels])
        names = tuple(np.unique(words)) if names is None else names
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(words) - numbers.keys()):
            raise ValueError(f'{where}: label {printable(unknown[0])} is not among its class_names')
        return np.array([numbers[word] for word in words], np.int64), names
    if labels.dtype.kind == 'f' and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in 'iub':
        raise ValueError(f'{where}: labels are {labels.dtype}; need whole numbers or names of classes')
    least, most = int(labels.min()), int(labels.max())
    limit = MAX_CLASSES if names is None else len(names)
    if least < 0 or most >= limit:
        raise ValueError(f'{where}: labels lie in {least}..{most}; number the classes from 0 to at most {limit - 1}')
    names = tuple(f'class {i}' for i in range(most + 1)) if names is None else names
    return labels.astype(np.int64), names


def _text(value: Any) -> str:
    return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


def _rows(arrays: Mapping[str, np.ndarray], labels: np.ndarray, parts: Mapping[str, np.ndarray], split: str,
          heldout: float, seed: int, where: str) -> np.ndarray:
    """Rows of `split`: a part, 'all', what `is_test` says, or a share of each class."""
    if len(parts) > 1 and 'train' in parts:
        apart = [part for part in parts if part != 'train']
        if split == 'all':
            return np.arange(len(labels))
        if split not in ('heldout', *parts):
            raise ValueError(f"data.split={split!r}: {where} has 'all', 'heldout' ({apart[0]}) and {tuple(parts)}")
        if split == 'heldout' and len(apart) > 1:
            log.warning('%s: held out are the images of %s; left out: %s, read by naming it as the split', where,
                        apart[0], ', '.join(apart[1:]))
        return parts[apart[0] if split == 'heldout' else split]
    is_test = arrays.get('is_test')
    if is_test is not None and is_test.shape != labels.shape:
        raise ValueError(f'{where}: {len(labels)} images but {is_test.shape[0] if is_test.ndim else 1} is_test')
    if is_test is None or split not in ('train', 'heldout'):
        return split_rows(labels, split, heldout, seed)
    if is_test.dtype != bool and not np.isin(is_test, (0, 1)).all():
        raise ValueError(f'{where}: is_test is {is_test.dtype}; need true or false of each image')
    rows = np.flatnonzero(is_test.astype(bool) == (split == 'heldout'))
    if not rows.size:
        raise ValueError(f'{where}: is_test leaves no image in split {split!r}')
    return rows
