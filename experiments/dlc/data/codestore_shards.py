"""A code store that was written in parts (`runtime.shards`), made whole.

Every part is a store of its own, with `shard` = [index, count] and `first` = its first item in meta.json. Put together,
byte for byte, they are what one process would have written.
"""
import os
import pathlib
import shutil
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.dlc.data import codestore
from experiments.dlc.data.codestore_writer import write_header, write_json, writer
from experiments.dlc.data.printable import printable
from experiments.runtime import shards, storage
from experiments.runtime.shards import Shard

OF_A_PART = ('shard', 'first')  # fields of meta.json that the whole has not
COPY_BYTES = 2 ** 24


def part_meta(meta: dict[str, Any], shard: Shard, rows: range) -> dict[str, Any]:
    """`meta` of the part that holds `rows`; `meta` itself where it is the whole."""
    return meta if shard.count == 1 else meta | {'shard': [shard.index, shard.count], 'first': rows.start}


def part_writer(path: str | os.PathLike, meta: dict[str, Any], shard: Shard, rows: range) -> writer:
    """The writer of the part of the store `path` that holds `rows`: the store itself, where `shard` is the whole."""
    return writer(shards.place(path, shard), num=len(rows), meta=part_meta(meta, shard, rows))


def is_finished(path: str | os.PathLike) -> bool:
    """Whether a whole store is there."""
    return (storage.resolve(path) / 'meta.json').exists()


def is_finished_for_all(path: str | os.PathLike) -> bool:
    """Whether process 0 of a job finds a whole store, which the others then wait to see too; all call it together."""
    return shards.agreed(is_finished(path)) and shards.in_time(lambda: is_finished(path))


def merge_for_all(path: str | os.PathLike) -> bool:
    """`merge` in process 0 of a job, when all are done with their parts. Returns, in every process, whether the whole
    store is there; all call it together."""
    return shards.finish(lambda: merge(path), seen=lambda: is_finished(path))


def merge(path: str | os.PathLike) -> bool:
    """Makes the store `path` of its parts and removes them. Returns whether a whole store is there now.

    Two processes may do it at once: one of them is first, and the other finds its work done.

    Raises:
        OSError: damaged parts, or no room.
        ValueError: parts that do not belong together.
    """
    if is_finished(path):
        _remove_parts(path)
        return True
    parts = open_parts(path)
    if parts is None:
        return False
    whole = storage.cached(path) if storage.is_remote(path) else pathlib.Path(path).expanduser()
    new = whole.with_name(f'{whole.name}.{uuid.uuid4().hex}{storage.PARTIAL}')
    new.mkdir(parents=True)
    try:
        _write(parts, new)
        try:
            os.replace(new, whole)
        except OSError:
            if not is_finished(whole):
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if storage.is_remote(path):
        storage.upload(whole, path, last='meta.json')
    _remove_parts(path)
    return True


def open_parts(path: str | os.PathLike) -> list[codestore.CodeStore] | None:
    """The parts of `path` that have rows, in order; None where there is none, or some are missing.

    Raises:
        OSError: damaged.
        ValueError: parts of different data sets, or that do not follow each other.
    """
    count = shards.begun(path)
    places = [shards.folder(path) / str(Shard(i, count)) for i in range(count or 0)]
    if not places or not all((place / 'meta.json').exists() for place in places):
        return None
    parts = [codestore.open_rows(place) for place in places]
    first, items = common(parts[0]), 0
    for part in parts:
        fields = first.keys() | common(part).keys()
        if not all('origin' in meta for meta in (first, common(part))):  # one is of before there was that
            fields -= {'origin', 'drawn'}
        for field in fields:
            if common(part).get(field) != first.get(field):
                theirs, ours = (printable(repr(meta.get(field)), 80) for meta in (first, part.meta))
                raise ValueError(f'{part.path}: has {field}={ours}, other parts {theirs}; delete it and run its '
                                 'command again')
        if part.meta.get('first') != items:
            raise ValueError(f'{part.path}: begins at item {part.meta.get("first")}, but the parts before it end at '
                             f'{items}; they were written with another --batch_size: delete {shards.folder(path)}')
        items += part.meta['items']
    if not any(len(part) for part in parts):
        raise ValueError(f'{path}: none of the {items} items could be read, there is nothing to store')
    return [part for part in parts if len(part)]


def common(part: codestore.CodeStore) -> dict[str, Any]:
    """What all parts of one store say alike."""
    return {name: value for name, value in part.meta.items() if name not in (*OF_A_PART, 'items', 'num', 'arrays')}


def describe_missing(path: str | os.PathLike) -> str:
    """'2 of 4 parts' and which are missing; '' where there are no parts."""
    count = shards.begun(path)
    if count is None:
        return ''
    missing = [i for i in range(count) if not (shards.folder(path) / str(Shard(i, count)) / 'meta.json').exists()]
    return f'{count - len(missing)} of {count} shards; missing are {", ".join(f"{i}/{count}" for i in missing[:8])}'


def _write(parts: Sequence[codestore.CodeStore], new: pathlib.Path) -> None:
    num, items = (sum(part.meta[field] for part in parts) for field in ('num', 'items'))
    for name, array in parts[0].arrays.items():
        with open(new / f'{name}.npy', 'wb') as file:
            write_header(file, array.dtype, (num, *array.shape[1:]))
            for part in parts:
                _append(file, part.path / f'{name}.npy', part.arrays[name])
            _sync(file)
    for lines in sorted(parts[0].path.glob('*.txt')):
        with open(new / lines.name, 'wb') as file:
            for part in parts:
                with open(part.path / lines.name, 'rb') as of_part:
                    shutil.copyfileobj(of_part, file, COPY_BYTES)
            _sync(file)
    meta = {name: value for name, value in parts[0].meta.items() if name not in OF_A_PART}
    write_json(new / 'meta.json', meta | {'items': items, 'num': num})


def _append(file: Any, path: pathlib.Path, array: np.ndarray) -> None:
    """Copies the rows of `array`, which lies in the .npy file `path`."""
    with open(path, 'rb') as of_part:
        of_part.seek(array.offset)
        shutil.copyfileobj(of_part, file, COPY_BYTES)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_parts(path: str | os.PathLike) -> None:
    place = shards.folder(path)
    if place.is_dir():
        place.rmtree(missing_ok=True)
