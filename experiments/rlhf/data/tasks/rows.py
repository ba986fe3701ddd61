"""Rows of a split: from files on disk, or from TensorFlow Datasets on disk (`tfds:NAME`, without TensorFlow)."""
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.rlhf.data.tasks.task import Data, Row
from experiments.runtime import tfds_folders
from rlhf_jax.tasks import rows as rows_lib

log = logging.getLogger(__name__)


def read(data: Data, split: str, make: Callable[[Row], Any], fields: Sequence[str] = (), *,
         cut: Callable[[int], Sequence[int]] | None = None) -> list[Any]:
    """`make(row)` of the rows of a split, the first `data.num_rows` of them.

    A row that lacks one of `fields`, or of which `make` raises a ValueError, is an error; with `data.skip_bad_rows` it
    is left out, counted and logged.

    Args:
        cut: number of rows -> those that belong to the split.

    Raises:
        ValueError, FileNotFoundError: a bad row, no row, no such path or split.
    """
    name, low, high = parse_split(split)
    bad: list[str] | None = [] if data['skip_bad_rows'] else None
    limit = data['num_rows'] if cut is None and not (low or high) else 0
    items = []
    for number, row in enumerate(_rows(data['path'], name, fields, bad)):
        try:
            items.append(make(row))
        except ValueError as error:
            message = f'{data["path"]}: row {number}: {error}'
            if bad is None:
                raise ValueError(message + '; data.skip_bad_rows=True leaves such rows out') from None
            bad.append(message)
        if limit and len(items) >= limit:
            break
    if bad:
        log.warning('%s: left out %d rows of %d; the first: %s', data['path'], len(bad), len(bad) + len(items), bad[0])
    if not items:
        raise ValueError(f'data.path={data["path"]}: split {split!r} has no usable row')
    if cut is not None:
        items = [items[i] for i in cut(len(items))]
    items = items[place(low, len(items), 0):place(high, len(items), len(items))]
    if not items:
        raise ValueError(f'data.path={data["path"]}: split {split!r} is empty')
    return items[:data['num_rows'] or None]


def parse_split(split: str) -> tuple[str, str, str]:
    """Name and bounds of a split such as 'train[500:90%]'; '' for what it leaves out."""
    match = re.fullmatch(r'(\w*)(?:\[(\d+%?)?:(\d+%?)?\])?', split)
    if not match:
        raise ValueError(f'split={split!r} is neither a name nor a cut such as train[:90%] or train[500:]')
    return match[1], match[2] or '', match[3] or ''


def place(bound: str, num: int, default: int) -> int:
    """Row, of `num`, that a bound such as '500' or '90%' names; `default` for ''."""
    if not bound:
        return default
    return num * int(bound[:-1]) // 100 if bound.endswith('%') else int(bound)


def _rows(path: str, split: str, fields: Sequence[str], bad: list[str] | None) -> Iterator[Row]:
    if path.startswith('tfds:'):
        yield from _tfds_rows(path, split, fields, bad)
        return
    file = pathlib.Path(path).expanduser()
    if file.is_file() and split != 'train' and not file.name.startswith(split):
        raise ValueError(f'data.path={path} is one file, and {split!r} not a part of it; give a folder that holds '
                         f"{split}.jsonl, or cut the file, as in 'train[90%:]'")
    if not file.exists():
        raise FileNotFoundError(f'data.path={path}: no such file or folder')
    try:
        yield from rows_lib.read(file, fields, split=split or None, bad=bad)
    except rows_lib.BadRow as error:
        raise ValueError(f'{error}; data.skip_bad_rows=True leaves such rows out') from None


def _tfds_rows(path: str, split: str, fields: Sequence[str], bad: list[str] | None) -> Iterator[Row]:
    import tensorflow_datasets as tfds  # heavy, and wanted only here
    name, root = path.removeprefix('tfds:'), os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    builder = tfds.builder_from_directory(str(tfds_folders.find(name, root, field='data.path')))
    if split not in builder.info.splits:
        raise ValueError(f'data.path={path}: no split {split!r}; it has {tuple(builder.info.splits)}')
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f'data.path={path} is not stored as array_record; prepare it again with: '
                         f'{tfds_folders.prepare_command(name, root)}') from None
    for number in range(len(records)):
        row = _decoded(records[number])
        missing = next((field for field in fields if row.get(field) is None), None)
        if missing is None:
            yield row
        elif bad is None:
            raise ValueError(f'{path}: row {number}: missing field {missing!r}; it has {sorted(row)}')
        else:
            bad.append(f'{path}: row {number}: missing field {missing!r}')


def _decoded(value: Any) -> Any:
    """Turns bytes into text, and arrays of bytes into lists of texts."""
    if isinstance(value, bytes):
        return value.decode('utf-8')
    if isinstance(value, Mapping):
        return {name: _decoded(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_decoded(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def text(row: Row, field: str) -> str:
    """The text in a field of a row; raises a ValueError where it holds none."""
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f'field {field!r} is {"missing" if value is None else "a " + type(value).__name__}, not text; '
                         f'the row has {sorted(k for k, v in row.items() if v is not None)}')
    return value


def word_counts(completions: Sequence[str], references: Sequence[str] | None = None) -> dict[str, float]:
    """Mean words of the completions, and of the human ones beside them."""
    words = lambda texts: float(np.mean([len(text.split()) for text in texts]))
    return {'words': words(completions)} | ({} if not references else {'reference_words': words(references)})
