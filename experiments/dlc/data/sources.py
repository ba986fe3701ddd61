"""Where images come from: `image_source(config.data, split)` opens what `config.data.name` says.

    digits      scikit-learn's handwritten digits, 1797 of 8x8, shipped with the package
    digit_pairs pictures of two of them, 16x16; splits train, heldout, and unseen, of pairs that are in neither
    emoji       people of Noto Emoji, files below `path`; held out is one tone of each
    fake        coloured noise of any size, for dry runs and benchmarks
    folder      image files below `path` (`decode.SUFFIXES`); its folders are the classes, or all files are one class
    npz         `path` is an .npz or .npz.xz of uint8 arrays, or of encoded images
    otherwise   a TFDS data set prepared as array_record below `path` (default ~/tensorflow_datasets), read without
                TensorFlow: imagenet2012, imagenette, cifar10, fashion_mnist, ...

A source has a length, classes, and items `{'image': uint8 [H, W, C], 'label': int, 'name': str}`.
"""
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.dlc.data.decode import OPTIONS, Decoding
from experiments.dlc.data.digit_pairs import DigitPairs
from experiments.dlc.data.emoji import Emoji
from experiments.dlc.data.image_files import folder
from experiments.dlc.data.images import ArrayImages, FakeImages, ImageSource, in_memory, split_rows
from experiments.dlc.data.npz_images import npz
from experiments.dlc.data.tfds_images import TFDSImages

__all__ = ['ImageSource', 'digits', 'image_source']


def digits(split: str, *, channels: int, image_size: int, heldout: float, seed: int) -> ArrayImages:
    from sklearn.datasets import load_digits
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return ArrayImages(images, data.target, tuple(data.target_names), prefix='digits', channels=channels,
                       image_size=image_size, rows=split_rows(data.target, split, heldout, seed))


def image_source(data: Mapping[str, Any], split: str) -> ImageSource:
    """The source that `data` describes.

    Args:
        data: `name`; where it applies `path`, `image_size` (0: as stored), `channels` (0: as stored, 3 where encoded),
            `exif_orientation`, `transparency` and `deep_pixels` (see `decode.Decoding`), `layout` (of a folder),
            `heldout` and `split_seed` (share kept apart where the data set has no split of its own),
            `num_images` (fake; digit_pairs, whose other splits have `heldout` times as many), `in_memory`. Other
            fields are the loader's and are not read.
        split: 'train', 'heldout', 'all', or one the data set itself names.

    Raises:
        ValueError, OSError: one line that names the field, the file or the nearest name, and what to do.
    """
    name, path = data['name'], data.get('path', '')
    if data.get('channels', 3) not in (0, 1, 3):
        raise ValueError(f"data.channels={data['channels']}: must be 1 or 3, or 0 for as stored")
    if data.get('image_size', 0) < 0:
        raise ValueError(f"data.image_size={data['image_size']}: must be a number of pixels, or 0 for as stored")
    decoding, image_size = Decoding.of(data), data.get('image_size', 0)
    shape = dict(channels=decoding.channels, image_size=image_size)
    stored = dict(decoding=decoding, image_size=image_size)
    parts = dict(heldout=data.get('heldout', 0.1), seed=data.get('split_seed', 0))
    if not 0 <= parts['heldout'] < 1:
        raise ValueError(f"data.heldout={parts['heldout']}: must be in [0, 1)")
    if parts['seed'] < 0:
        raise ValueError(f"data.split_seed={parts['seed']}: must not be negative")
    if name in ('folder', 'npz', 'emoji') and not path:
        raise ValueError(f'data.name={name!r} needs data.path')
    if name in ('digits', 'digit_pairs', 'fake') and path:
        raise ValueError(f"data.path={path}: data.name={name!r} reads no files; set data.name to 'folder' or 'npz', or "
                         'leave the path out')
    if name == 'digits':
        source = digits(split, **shape, **parts)
    elif name == 'digit_pairs':
        num = data.get('num_images', 4096)
        source = DigitPairs(split, num if split == 'train' else round(num * parts['heldout']), **shape, **parts)
    elif name == 'emoji':
        source = Emoji(path, split, **stored)
    elif name == 'fake':
        source = FakeImages(image_size or 224, data.get('num_images', 4096), channels=decoding.channels,
                            seed=parts['seed'], split=split)
    elif name == 'folder':
        source = folder(path, split, layout=data.get('layout', 'auto'), **stored, **parts)
    elif name == 'npz':
        source = npz(path, split, **stored, **parts)
    else:
        source = TFDSImages(name, path or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'), split, **stored)
    if len(source) < 1:
        raise ValueError(f'data.name={name!r}: holds no image in split {split!r}')
    source = in_memory(source) if data.get('in_memory', False) and not isinstance(source, ArrayImages) else source
    source.origin = dict(data=name, path=os.path.abspath(os.path.expanduser(path)) if path else '', split=split) | {
        option: getattr(decoding, option) for option in OPTIONS}
    return source
