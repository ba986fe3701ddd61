"""Images in a folder, and in an .npz of arrays or of encoded images."""
import io
import lzma
import os
import pathlib
import zipfile
import zlib

import numpy as np

from experiments.dlc.data.images import ArrayImages, ImageSource, Unreadable, decode_image, split_rows

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
HELDOUT_FOLDERS = ('heldout', 'val', 'validation', 'test')
# What numpy, zipfile and lzma raise on damaged archives.
ARCHIVE_ERRORS = (OSError, EOFError, ValueError, KeyError, AttributeError, NotImplementedError, zlib.error,
                  zipfile.BadZipFile, lzma.LZMAError)


class FolderImages(ImageSource):
    """Image files below a folder: its folders are the classes, or all files are one class where it has none.

    `class_names` numbers the classes where another folder (of the training images) decides.
    """

    def __init__(self, root: pathlib.Path, *, channels: int = 3, image_size: int = 0, split: str = 'all',
                 heldout: float = 0.1, seed: int = 0, class_names: tuple[str, ...] | None = None):
        if not root.is_dir():
            raise FileNotFoundError(f'data.path={root}: no such folder')
        files = sorted(os.path.relpath(os.path.join(folder, file), root)
                       for folder, _, names in os.walk(root, followlinks=True) for file in names
                       if file.lower().endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(f'data.path={root}: no {", ".join(SUFFIXES)} file below it')
        classes = [file.split(os.sep)[0] if os.sep in file else '' for file in files]
        names, labels = np.unique(classes, return_inverse=True)
        if '' in names and len(names) > 1:
            raise ValueError(f'data.path={root}: holds both images and folders of images; move the images, such as '
                             f'{files[classes.index("")]}, into a class folder')
        if '' in names:
            class_names = (root.name,)
        elif class_names is not None:
            if unknown := sorted(set(names) - set(class_names)):
                raise ValueError(f'data.path={root}: class {unknown[0]} has no training images')
            labels = np.array([class_names.index(name) for name in names])[labels]
        super().__init__(tuple(names) if class_names is None else class_names, image_size)
        rows = split_rows(labels, split, heldout, seed)
        # As bytes in one array: a million str objects would be pickled to every worker.
        self._root, self._channels = root, channels or 3
        self._files, self.labels = np.array([os.fsencode(files[i]) for i in rows]), labels[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        return os.fsdecode(self._files[i])

    @property
    def root(self) -> pathlib.Path:
        """Names are relative to it."""
        return self._root

    def read(self, i: int) -> tuple[np.ndarray, int]:
        try:
            return decode_image(self._root / self.name(i), self._channels), self.labels[i]
        except FileNotFoundError:
            raise Unreadable('no such file') from None


def folder(path: str, split: str, *, channels: int, image_size: int, heldout: float, seed: int) -> FolderImages:
    """`path`/train and `path`/{heldout, val, validation, test} where both are there, else a share of each class of
    `path`/train or `path`."""
    root, kind = pathlib.Path(path).expanduser(), dict(channels=channels, image_size=image_size)
    parts = [root / part for part in HELDOUT_FOLDERS if (root / part).is_dir()]
    if (root / 'train').is_dir() and parts:
        train = FolderImages(root / 'train', **kind)
        if split == 'train':
            return train
        if split != 'heldout' and not (root / split).is_dir():
            raise ValueError(f"data.split={split!r}: {root} has 'train' and 'heldout' ({parts[0].name})")
        own = parts[0] if split == 'heldout' else root / split
        return FolderImages(own, **kind, class_names=train.class_names)
    root = root / 'train' if (root / 'train').is_dir() else root
    return FolderImages(root, **kind, split=split, heldout=heldout, seed=seed)


class EncodedImages(ImageSource):
    """Encoded images (JPEG, PNG) joined into one array; image i is `data[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], *,
                 prefix: str, rows: np.ndarray, channels: int = 3, image_size: int = 0):
        super().__init__(class_names, image_size)
        self._data, self._offsets, self._prefix, self._channels = data, offsets, prefix, channels or 3
        self._rows, self.labels = rows, labels[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return f'{self._prefix}/{self._rows[i]}'

    def read(self, i: int) -> tuple[np.ndarray, int]:
        start, stop = self._offsets[self._rows[i]:self._rows[i] + 2]
        return decode_image(self._data[start:stop].tobytes(), self._channels), self.labels[i]


def load_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .npz.xz; never unpickles."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'data.path={file}: no such file')
    try:
        with (lzma.open(file) if file.suffix == '.xz' else open(file, 'rb')) as stream:
            with np.load(io.BytesIO(stream.read()) if file.suffix == '.xz' else stream, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except ARCHIVE_ERRORS as error:
        raise OSError(f'data.path={file}: truncated or not an .npz file ({error}); fetch it again') from None


def npz(path: str, split: str, *, channels: int, image_size: int, heldout: float, seed: int) -> ImageSource:
    """Arrays `images` [N, H, W(, C)] uint8 and `labels`, or `train_images`, `test_images`, ..., or encoded images
    `jpeg_bytes`, `offsets`, `labels`. Optional: `is_test` [N] bool, `class_names`."""
    arrays = load_npz(path)
    where = f'data.path={path}'
    prefix = pathlib.Path(path).name.split('.')[0]
    if 'train_images' in arrays and 'test_images' in arrays:
        parts = [arrays[f'{part}_images'] for part in ('train', 'test')]
        sizes = [len(part) for part in parts]
        labels = [arrays.get(f'{part}_labels', np.zeros(n, int)) for part, n in zip(('train', 'test'), sizes)]
        arrays |= {'images': np.concatenate(parts), 'labels': np.concatenate(labels),
                   'is_test': np.repeat([False, True], sizes)}
    encoded = 'jpeg_bytes' in arrays
    if not encoded and 'images' not in arrays:
        raise ValueError(f"{where}: needs 'images', or 'jpeg_bytes' and 'offsets'; it holds {sorted(arrays)}")
    if encoded and 'offsets' not in arrays:
        raise ValueError(f"{where}: has 'jpeg_bytes' but no 'offsets'")
    count = len(arrays['offsets']) - 1 if encoded else len(arrays['images'])
    labels = arrays.get('labels', np.zeros(count, int))
    for name, found in (('labels', len(labels)), ('is_test', len(arrays.get('is_test', labels)))):
        if found != count:
            raise ValueError(f'{where}: {count} images but {found} {name}')
    if 'is_test' in arrays and split in ('train', 'heldout'):
        rows = np.flatnonzero(arrays['is_test'] == (split == 'heldout'))
        if not rows.size:
            raise ValueError(f'{where}: is_test leaves no image in split {split!r}')
    else:
        rows = split_rows(labels, split, heldout, seed)
    class_names = tuple(arrays.get('class_names', [f'class {i}' for i in range(int(labels.max()) + 1)]))
    kind = dict(prefix=prefix, rows=rows, channels=channels, image_size=image_size)
    if encoded:
        offsets = arrays['offsets']
        if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(arrays['jpeg_bytes']):
            raise ValueError(f"{where}: 'offsets' do not fit 'jpeg_bytes' ({len(arrays['jpeg_bytes'])} bytes)")
        return EncodedImages(arrays['jpeg_bytes'], offsets, labels, class_names, **kind)
    images = arrays['images']
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{where}: 'images' are {images.dtype} {images.shape}; need uint8 [N, H, W(, 1 or 3)]")
    return ArrayImages(images, labels, class_names, **kind)
