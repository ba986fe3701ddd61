"""What an image source is, how images are decoded, and the sources that hold or make their images in memory.

No jax here: sources are pickled into the loader's worker processes.
"""
import io
import logging
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from dlc_jax.preprocess import center_crop

log = logging.getLogger(__name__)

# What Pillow and the decoders under it raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, zlib.error, Image.DecompressionBombError)
MAX_SKIPPED_IN_A_ROW = 1000


class Unreadable(Exception):
    """One image is damaged; the others may be fine."""


class ImageSource:
    """Base of all sources. A damaged image is replaced by the next good one, logged once and listed in `skipped`.

    A subclass gives `__len__`, `name(i)` and `read(i) -> (image, label)`, which raises `Unreadable`.

    Attributes:
        class_names: one a class; `num_classes` is their number.
        image_size: side that items are brought to by the ADM centre crop; 0 leaves them as stored.
        skipped: damaged images met so far, name -> reason.
        captions: name -> what the image shows, in words; None where the data set says nothing.
    """

    def __init__(self, class_names: tuple[str, ...], image_size: int = 0):
        self.class_names = tuple(str(name) for name in class_names)
        self.image_size = image_size
        self.skipped: dict[str, str] = {}
        self.captions: Mapping[str, str] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def skip(self, name: str, reason: str) -> None:
        """Records a damaged image; logs it the first time."""
        if name not in self.skipped:
            self.skipped[name] = reason
            log.warning('skipped unreadable image %s (%s); the next good one takes its place', name, reason)

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        raise NotImplementedError

    def read(self, i: int) -> tuple[np.ndarray, int]:
        raise NotImplementedError

    def name_read(self, i: int) -> str:
        """Name of the image that `self[i]` gave: its own or, where that is known as damaged, the next good one's."""
        return next(name for k in range(len(self)) if (name := self.name((i + k) % len(self))) not in self.skipped)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f'image {i} of {len(self)}')
        for k in range(min(len(self), MAX_SKIPPED_IN_A_ROW)):
            j = (i + k) % len(self)
            name = self.name(j)
            try:
                image, label = self.read(j)
            except Unreadable as error:
                self.skip(name, str(error))
                continue
            if self.image_size and image.shape[:2] != (self.image_size, self.image_size):
                image = center_crop(image, self.image_size)
            return {'image': image, 'label': int(label), 'name': name}
        raise OSError(f'{k + 1} images in a row from {self.name(i)} on are unreadable; is the data set damaged?')


def decode_image(data: bytes | str | os.PathLike, channels: int = 3) -> np.ndarray:
    """An encoded image, or a file, as uint8 [H, W, channels]; raises `Unreadable`."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            if picture.mode.startswith('I;16'):  # Pillow would cut 16 bits to 8 instead of scaling
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            image = np.asarray(picture.convert('L' if channels == 1 else 'RGB'))
    except FileNotFoundError:
        raise
    except DECODE_ERRORS as error:
        raise Unreadable(' '.join(str(error).split()) or type(error).__name__) from error
    return image.reshape(*image.shape[:2], channels)


def read_image(path: str | os.PathLike, channels: int = 3) -> np.ndarray:
    """One image file as uint8 [H, W, channels]; a one-line OSError if there is none."""
    try:
        return decode_image(path, channels or 3)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except Unreadable as error:
        raise OSError(f'{path}: not a readable image ({error})') from None


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, C] -> [N, H, W, channels]; 0 leaves the channels as they are."""
    images = images[..., None] if images.ndim == 3 else images
    if channels in (0, images.shape[-1]):
        return images
    if images.shape[-1] == 1:
        return np.repeat(images, channels, -1)
    return np.stack([np.asarray(Image.fromarray(x[..., :3]).convert('L')) for x in images])[..., None]


def split_rows(labels: np.ndarray, split: str, heldout: float, seed: int) -> np.ndarray:
    """Rows of one split; the share `heldout` of every class is kept apart, the same rows for the same `seed`.

    Raises:
        ValueError: `split` is not 'train', 'heldout' or 'all', or one of them would be empty.
    """
    if split not in ('train', 'heldout', 'all'):
        raise ValueError(f"data.split={split!r}: this data set has 'train', 'heldout' and 'all'")
    rng, apart = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        apart[rows[:round(heldout * rows.size)]] = True
    rows = np.flatnonzero({'train': ~apart, 'heldout': apart, 'all': np.ones_like(apart)}[split])
    if not rows.size:
        raise ValueError(f'data.heldout={heldout}: leaves no image in split {split!r} of {len(labels)}')
    return rows


class ArrayImages(ImageSource):
    """Images in memory.

    Attributes:
        images: [N, H, W, C] uint8, brought to `channels` and `image_size`.
        labels: [N] int32.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], *, prefix: str,
                 channels: int = 0, image_size: int = 0, rows: np.ndarray | None = None):
        super().__init__(class_names, image_size)
        self._prefix, self._rows = prefix, np.arange(len(images)) if rows is None else rows
        images = with_channels(images[self._rows], channels)
        if image_size and images.shape[1:3] != (image_size, image_size):
            images = np.stack([center_crop(x, image_size) for x in images])
        self.images, self.labels = images, np.asarray(labels)[self._rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f'{self._prefix}/{self._rows[i]}'

    def read(self, i: int) -> tuple[np.ndarray, int]:
        return self.images[i], self.labels[i]


class FakeImages(ImageSource):
    """Smooth coloured noise around a hue that depends on the class; the same for the same (split, seed, index)."""

    def __init__(self, size: int, num_images: int, *, channels: int = 3, num_classes: int = 10, seed: int = 0,
                 split: str = 'train'):
        super().__init__(tuple(f'class {i}' for i in range(num_classes)))
        self._size, self._length, self._channels, self._seed, self._split = size, num_images, channels or 3, seed, split

    def __len__(self) -> int:
        return self._length

    def name(self, i: int) -> str:
        return f'fake/{self._split}/{i}'

    def read(self, i: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng((self._seed, self._split != 'train', i))
        label = i % self.num_classes
        colour = 40 + 20 * np.stack([(label * k) % self.num_classes for k in (1, 3, 7)])[:self._channels]
        grid = (colour % 200 + rng.integers(0, 56, (8, 8, self._channels))).astype(np.uint8)
        picture = Image.fromarray(grid[..., 0] if self._channels == 1 else grid)
        image = np.asarray(picture.resize((self._size, self._size), Image.Resampling.BICUBIC))
        return image.reshape(self._size, self._size, self._channels), label


def in_memory(source: ImageSource) -> ArrayImages:
    """Every image of `source`, decoded; all must have one size (set `image_size` otherwise)."""
    items = [source[i] for i in range(len(source))]
    shapes = {item['image'].shape for item in items}
    if len(shapes) > 1:
        raise ValueError(f'data.in_memory: images have {len(shapes)} different sizes; set data.image_size')
    out = ArrayImages(np.stack([item['image'] for item in items]), np.array([item['label'] for item in items]),
                      source.class_names, prefix=type(source).__name__)
    for name, reason in source.skipped.items():
        out.skip(name, reason)
    return out
