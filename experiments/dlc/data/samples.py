"""Sets of generated images: where they grow, row by row, and the form they are given at the end.

A set OUT grows in the folder OUT.partial: `images`, rows as a code store has them (in parts, where several processes or
tasks make them), and `codes`, unless these are kept elsewhere. When all rows are there OUT is written and the folder
removed. What OUT is follows from its name: one .png grid, an .npz of uint8 [N, H, W, C] under `arr_0` (what FID
evaluators read), or a directory of numbered files, each with its text beside it where there is one.
"""
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.dlc.data import codestore, codestore_shards, memory
from experiments.dlc.data.decode import SUFFIXES
from experiments.dlc.data.image_files import is_junk
from experiments.dlc.data.printable import printable
from experiments.runtime import cores, png, shards, storage

log = logging.getLogger(__name__)

SAMPLE = re.compile(r'\d{6,}\.(png|txt)')  # names of files in a directory of samples
BLOCK = 1024  # images that are looked at together


def check_out(out: str | os.PathLike) -> None:
    """Raises a ValueError or OSError unless samples can be written to `out`."""
    path = storage.resolve(out)
    if path.suffix not in ('', '.png', '.npz'):
        raise ValueError(f'--out={out}: end it in .png (grid), .npz (array) or / (a directory of files)')
    if path.suffix and path.is_dir():
        raise ValueError(f'--out={out} is a directory; give the name of a file')
    if not path.suffix and path.is_dir():
        others = sorted(file.name for file in path.iterdir() if not SAMPLE.fullmatch(file.name)
                        and file.suffix.lower() in (*SUFFIXES, '.txt') and not is_junk(file.name))
        if others:
            raise ValueError(f'--out={out} holds other pictures or texts, such as {printable(others[0])}; give a '
                             'directory of its own')
    storage.check_writable(path.parent if path.suffix else path, '--out')


def check_room(out: str | os.PathLike, num: int, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError where `num` images of `shape` would not fit: a grid into memory, others, with the rows that
    they are made of, onto the disk."""
    nbytes = num * int(np.prod(shape))
    if storage.resolve(out).suffix == '.png' or storage.is_remote(out):
        memory.check(nbytes, f'{num} samples', 'make fewer at once, with another --seed each time')
    else:
        memory.check_disk(2 * nbytes, storage.resolve(out).parent, f'{num} samples', 'make fewer at once, with another '
                          '--seed each time')


def growing(out: str | os.PathLike, what: str) -> str:
    """Where `images` or `codes` of the set `out` grow."""
    return os.fspath(shards.partial(out) / what)


def finish(out: str | os.PathLike) -> bool:
    """Writes `out` where all its images are there, and removes what it was made of. Returns whether it is there now.

    Raises:
        OSError: no room; what it is made of stays.
    """
    place = growing(out, 'images')
    parts = [codestore.open_rows(place)] if codestore_shards.is_finished(place) else codestore_shards.open_parts(place)
    if parts is None:
        return False
    texts = [json.loads(line) for part in parts for line in part.captions] if parts[0].meta.get('captions') else []
    try:
        write([part.array('images') for part in parts], out, parts[0].meta.get('columns', 0), texts)
    except OSError as error:
        raise OSError(f'--out={out}: {error.strerror or error}; the samples are in {shards.partial(out)}, make room '
                      'and run the same command') from error
    shards.partial(out).rmtree(missing_ok=True)
    return True


def describe_missing(out: str | os.PathLike) -> str:
    """What a set that is not whole lacks; '' where none was begun."""
    place = growing(out, 'images')
    if missing := codestore_shards.describe_missing(place):
        return missing
    progress = codestore.partial_path(codestore.local_folder(place)) / 'progress.json'
    if progress.exists():
        at = codestore.read_progress(progress)
        return f'{at["done"]} of {at["meta"]["items"]} images'
    growing_here = shards.partial(out)
    return 'no image yet' if growing_here.is_dir() and any(file.is_dir() for file in growing_here.iterdir()) else ''


def is_whole(out: str | os.PathLike) -> bool:
    """Whether a set, or something else, is at `out`."""
    path = storage.resolve(out)
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def as_line(text: str) -> str:
    """`text` to the letter as one word, for a store's lines, which keep no spaces that follow each other."""
    return json.dumps(text).replace(' ', '\\u0020')


def write(parts: Sequence[np.ndarray], out: str | os.PathLike, columns: int = 0, texts: Sequence[str] = ()) -> None:
    """Images, uint8 [n, H, W, C] each, as `out` is named, with `texts` beside the files of a directory; the samples of
    an earlier run there are replaced, all of them."""
    out = storage.resolve(out)
    if out.suffix == '.npz':
        with storage.write_whole(out) as file:
            _write_npz(file, parts)
    elif out.suffix == '.png':
        images = np.concatenate(parts)
        png.save(out, png.grid(images, columns or int(np.ceil(np.sqrt(len(images))))))
    else:
        _write_files(out, parts, texts)


def _write_npz(file: Any, parts: Sequence[np.ndarray]) -> None:
    """The bytes of `numpy.savez(file, arr_0=images)`, a block of images at a time."""
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
        with archive.open('arr_0.npy', 'w', force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, {
                'descr': np.lib.format.dtype_to_descr(parts[0].dtype), 'fortran_order': False,
                'shape': (sum(map(len, parts)), *parts[0].shape[1:])})
            for block in blocks(parts):
                array.write(np.ascontiguousarray(block).data)


def _write_files(out: Any, parts: Sequence[np.ndarray], texts: Sequence[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    num = sum(map(len, parts))
    earlier = {file.name for file in out.iterdir() if SAMPLE.fullmatch(file.name)}
    ours = {f'{i:06d}.png' for i in range(num)} | {f'{i:06d}.txt' for i in range(len(texts))}
    for name in earlier - ours:
        (out / name).unlink(missing_ok=True)
    if earlier:
        log.warning('%s: replaced %d files of an earlier run', out, len(earlier))

    def save(numbered: tuple[int, np.ndarray]) -> None:
        png.save(out / f'{numbered[0]:06d}.png', numbered[1])
    with ThreadPoolExecutor(cores.usable()) as threads:
        start = 0
        for block in blocks(parts):
            list(threads.map(save, enumerate(block, start)))
            start += len(block)
    for i, text in enumerate(texts):
        with storage.write_whole(out / f'{i:06d}.txt') as file:
            file.write(f'{text}\n'.encode())


def blocks(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for start in range(0, len(part), BLOCK):
            yield part[start:start + BLOCK]
