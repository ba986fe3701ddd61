"""What an image source is, and the sources that hold or make their images in memory.

No jax here: sources are pickled into the loader's worker processes.
"""
import collections
import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from dlc_jax.preprocess import center_crop
from experiments.dlc.data import memory
from experiments.dlc.data.decode import NOTES, Unreadable
from experiments.dlc.data.printable import printable

log = logging.getLogger(__name__)

MAX_TRIES = 1000  # images looked at in place of an unreadable one
NAMED_IN_LOG = 10  # unreadable images that are logged by name; then whenever their number has doubled


class ImageSource:
    """Base of all sources. Unreadable images are logged and listed in `skipped`.

    A subclass gives `__len__`, `name(i)` and `read(i) -> (image, label, *notes)`, which raises `Unreadable`; notes are
    kinds of `decode.NOTES`.

    Attributes:
        class_names: one a class; `num_classes` is their number.
        image_size: side that items are brought to by the ADM centre crop; 0 leaves them as stored.
        skipped: unreadable images met so far, name -> reason.
        notes: kind -> how many images were read of which that note holds.
        captions: name -> what the image shows, in words; None where the data set says nothing.
        origin: fields of the config that named the data set; a code store made of it keeps them.
        held_back: images of its data set that this split leaves to 'heldout', where the two were drawn here.
    """

    def __init__(self, class_names: tuple[str, ...], image_size: int = 0):
        self.class_names = tuple(str(name) for name in class_names)
        self.image_size = image_size
        self.skipped: dict[str, str] = {}
        self.notes: collections.Counter[str] = collections.Counter()
        self.captions: Mapping[str, str] | None = None
        self.origin: Mapping[str, Any] = {}
        self.held_back = 0

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        raise NotImplementedError

    def read(self, i: int) -> tuple[Any, ...]:
        raise NotImplementedError

    def digest(self) -> str:
        """16 hexadecimal digits that tell this set of images from another of the same length.

        Here of the names and their order; a subclass adds what it knows of the contents without decoding them.
        """
        return digest(self.name(i).encode('utf-8', 'surrogateescape') + b'\n' for i in range(len(self)))

    def fetch(self, i: int) -> dict[str, Any]:
        """Image `i`, or a readable one in its place; what was met on the way is in the item, not yet in `skipped`.

        The places that are tried in turn for an unreadable image are drawn from (i, attempt): the images of a damaged
        stretch are not all replaced by the one behind it.

        Returns:
            `image` uint8 [H, W, C], `label` int, `name` and `index` of the image that was read, `skipped` (name ->
            reason) and `notes` (kinds).

        Raises:
            IndexError: no image `i`.
            OSError: no readable image was found.
        """
        if not 0 <= i < len(self):
            raise IndexError(f'image {i} of {len(self)}')
        skipped: dict[str, str] = {}
        for attempt in range(min(2 * len(self), MAX_TRIES)):
            index = i if attempt == 0 else int(np.random.default_rng((i, attempt)).integers(len(self)))
            name = self.name(index)
            if name in skipped:
                continue
            try:
                image, label, *notes = self.read(index)
            except Unreadable as error:
                skipped[name] = str(error)
                continue
            if self.image_size and image.shape[:2] != (self.image_size, self.image_size):
                image = center_crop(image, self.image_size)
            return {'image': image, 'label': int(label), 'name': name, 'index': index, 'skipped': skipped,
                    'notes': tuple(notes)}
        first, reason = next(iter(skipped.items()))
        raise OSError(f'{printable(first)}: unreadable ({reason}), and so are all {len(skipped)} images tried in its '
                      'place; is the data set damaged?')

    def record(self, skipped: Mapping[str, str], notes: Iterable[str], name: str) -> None:
        """Counts and logs what `fetch` met on the way to the image `name`."""
        for unreadable, reason in skipped.items():
            self.skip(unreadable, reason)
        for kind in notes:
            self.notes[kind] += 1
            if self.notes[kind] == 1:
                log.warning('some images (the first: %s) %s', printable(name), NOTES[kind])

    def skip(self, name: str, reason: str) -> None:
        """Records an unreadable image; logs the first ones by name, then their number whenever it has doubled."""
        if name in self.skipped:
            return
        self.skipped[name] = reason
        count = len(self.skipped)
        if count <= NAMED_IN_LOG:
            log.warning('skipped unreadable image %s (%s)', printable(name), reason)
        elif count & (count - 1) == 0:
            log.warning('skipped %d unreadable images so far, the last is %s (%s)', count, printable(name), reason)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """`fetch`, recorded."""
        item = self.fetch(i)
        self.record(item.pop('skipped'), item.pop('notes'), item['name'])
        return item


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """16 hexadecimal digits of the SHA-256 of `parts`."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


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

    def digest(self) -> str:
        return digest([super().digest().encode(), np.ascontiguousarray(self.images).data,
                       np.ascontiguousarray(self.labels).data])


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

    def digest(self) -> str:
        return digest([super().digest().encode(), repr((self._size, self._channels, self._seed)).encode()])

    def read(self, i: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng((self._seed, self._split != 'train', i))
        label = i % self.num_classes
        colour = 40 + 20 * np.stack([(label * k) % self.num_classes for k in (1, 3, 7)])[:self._channels]
        grid = (colour % 200 + rng.integers(0, 56, (8, 8, self._channels))).astype(np.uint8)
        picture = Image.fromarray(grid[..., 0] if self._channels == 1 else grid)
        image = np.asarray(picture.resize((self._size, self._size), Image.Resampling.BICUBIC))
        return image.reshape(self._size, self._size, self._channels), label


def in_memory(source: ImageSource) -> ArrayImages:
    """Every readable image of `source`, decoded; all must have one size (set `image_size` otherwise).

    Raises:
        ValueError: several sizes, or more than fits into memory.
        OSError: no image is readable.
    """
    images, labels, rows = [], [], []
    for i in range(len(source)):
        item = source[i]
        if item['index'] != i:  # a stand-in for an unreadable image
            continue
        if not images:
            memory.check(2 * item['image'].nbytes * len(source), f'data.in_memory: {len(source)} images',
                         'set data.in_memory=False')
        elif item['image'].shape != images[0].shape:
            raise ValueError('data.in_memory: images have different sizes; set data.image_size')
        images.append(item['image'])
        labels.append(item['label'])
        rows.append(i)
    out = ArrayImages(np.stack(images), np.array(labels), source.class_names, prefix=type(source).__name__)
    out._rows = np.array(rows)  # images are named by their place in `source`
    out.held_back = source.held_back
    for name, reason in source.skipped.items():
        out.skip(name, reason)
    return out
