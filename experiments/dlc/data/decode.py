"""Decoding of image files: which formats are opened, and what becomes of what an RGB array cannot hold.

Pillow opens any of its formats whatever a file is called, PostScript among them, which it hands to Ghostscript. Only
the formats of `FORMATS` are opened here, so that a stranger's file starts no program.
"""
import dataclasses
import io
import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from experiments.dlc.data.printable import printable

log = logging.getLogger(__name__)

# Pillow's names, and the suffixes that such files go by.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'DIB', 'GIF', 'TIFF', 'PPM')
SUFFIXES = ('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.bmp', '.dib', '.gif', '.tif', '.tiff', '.ppm', '.pgm',
            '.pbm', '.pnm')
ANIMATED = ('GIF', 'TIFF', 'WEBP', 'PNG')  # may hold several pictures, of which the first is read
# What Pillow and the decoders under it raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                 struct.error, zlib.error, MemoryError, Image.DecompressionBombError)

ORIENTATION = 0x0112  # EXIF tag: how the camera was held; 1 is upright

OPTIONS = {'exif_orientation': ('ignore', 'apply'), 'transparency': ('drop', 'white', 'black'),
           'deep_pixels': ('refuse', 'clip', 'stretch')}
# Kind of a note -> what is said of it, once a source.
NOTES = {
    'orientation': 'carry an EXIF orientation that is not applied; data.exif_orientation=apply turns them upright',
    'transparency': 'are transparent in places and lose their alpha; data.transparency=white (or black) puts them on '
                    'that ground',
    'frames': 'hold several pictures, of which the first is read',
    'deep_pixels': 'have 32-bit pixels, cut off at 255; data.deep_pixels=stretch scales the range of each image',
}


class Unreadable(Exception):
    """One image is damaged; the others may be fine."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How encoded images become arrays.

    Attributes:
        channels: 1 or 3; 0: 3.
        exif_orientation: 'ignore' leaves pixels as they are stored, as ADM and DINOv2 read ImageNet; 'apply' turns
            them as the camera was held. (Pillow turns TIFF files itself, always.)
        transparency: 'drop' forgets alpha and shows the colours below it; 'white' and 'black' put the image on that
            ground.
        deep_pixels: images of 32-bit integers or floats, whose range no file states: 'refuse', 'clip' to 0..255, or
            'stretch' the least and largest value of each to 0..255. (16-bit images lose their lower byte.)
    """
    channels: int = 3
    exif_orientation: str = 'ignore'
    transparency: str = 'drop'
    deep_pixels: str = 'refuse'

    def __post_init__(self):
        for name, choices in OPTIONS.items():
            if getattr(self, name) not in choices:
                raise ValueError(f'data.{name}={getattr(self, name)!r} is not one of {choices}')

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> 'Decoding':
        """Options of a `config.data`; those that a run of an earlier version lacks have their defaults."""
        return cls(data.get('channels', 3), **{name: data[name] for name in OPTIONS if name in data})


def decode_image(data: bytes | str | os.PathLike,
                 decoding: Decoding = Decoding()) -> tuple[np.ndarray, tuple[str, ...]]:
    """An encoded image, or a file of one, as uint8 [H, W, channels], and the kinds of `NOTES` that apply to it.

    Raises:
        Unreadable: damaged, of another format, or of pixels that `decoding` refuses.
        FileNotFoundError: no such file.
    """
    notes = []
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as picture:
            if picture.format in ANIMATED and getattr(picture, 'is_animated', False):
                notes.append('frames')
                picture.seek(0)
            picture.load()
            if picture.getexif().get(ORIENTATION, 1) in range(2, 9):
                if decoding.exif_orientation == 'apply':
                    picture = ImageOps.exif_transpose(picture)
                else:
                    notes.append('orientation')
            picture = _eight_bits(picture, decoding, notes)
            picture = _opaque(picture, decoding, notes)
            image = np.asarray(picture.convert('L' if decoding.channels == 1 else 'RGB'))
    except FileNotFoundError:
        raise
    except DECODE_ERRORS as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f'damaged, or none of {", ".join(FORMATS)}' if unknown else str(error)
        raise Unreadable(' '.join(reason.split()) or type(error).__name__) from error
    return image.reshape(*image.shape[:2], decoding.channels or 3), tuple(notes)


def _eight_bits(picture: Image.Image, decoding: Decoding, notes: list[str]) -> Image.Image:
    """`picture` with pixels of 8 bits; Pillow itself would cut off at 255 whatever is deeper."""
    if picture.mode.startswith('I;16'):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode not in ('I', 'F'):
        return picture
    if decoding.deep_pixels == 'refuse':
        raise Unreadable(f'32-bit pixels (mode {picture.mode}); data.deep_pixels=stretch scales the range of each '
                         'image, clip cuts off at 255')
    values = np.nan_to_num(np.asarray(picture, np.float64))
    if decoding.deep_pixels == 'clip':
        notes.append('deep_pixels')
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    low, high = values.min(), values.max()
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8))


def _opaque(picture: Image.Image, decoding: Decoding, notes: list[str]) -> Image.Image:
    """`picture` without transparency; noted where alpha is lost."""
    if not picture.has_transparency_data:
        return picture
    layered = picture.convert('RGBA')
    if layered.getchannel('A').getextrema()[0] == 255:
        return picture
    if decoding.transparency == 'drop':
        notes.append('transparency')
        return layered.convert('RGB') if picture.mode == 'P' else picture  # from a palette Pillow warns of each image
    ground = Image.new('RGBA', layered.size, decoding.transparency)
    return Image.alpha_composite(ground, layered).convert('RGB')


def read_image(path: str | os.PathLike, decoding: Decoding = Decoding()) -> np.ndarray:
    """One image file as uint8 [H, W, channels].

    Raises:
        OSError: of one line; no such file, or not a readable image.
    """
    return _read(os.fspath(path), decoding)[0]


def read_images(paths: Sequence[str | os.PathLike], decoding: Decoding = Decoding()) -> list[np.ndarray]:
    """As `read_image` reads each of them; what `NOTES` says of some is logged."""
    read = {os.fspath(path): _read(os.fspath(path), decoding) for path in paths}
    for kind, said in NOTES.items():
        if noted := [path for path, (_, notes) in read.items() if kind in notes]:
            log.warning('%d image(s) (the first: %s) %s', len(noted), printable(noted[0]), said)
    return [read[os.fspath(path)][0] for path in paths]


def _read(path: str, decoding: Decoding) -> tuple[np.ndarray, tuple[str, ...]]:
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f'{path}: not a file; name one image')
    try:
        return decode_image(path, decoding)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except Unreadable as error:
        raise OSError(f'{path}: not a readable image ({error})') from None
