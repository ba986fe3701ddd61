"""Captions that a policy writes codes for, and what rewards may know of each: the rows of a data set."""
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.dlc.data.captions import clean
from experiments.dlc.data.codestore import open_code_store
from experiments.runtime import storage


class StoreRows(Sequence[Mapping[str, Any]]):
    """Rows of a code store: `caption`, and where the store has them `label` (int) and `image` (uint8 [H, W, C]).

    Made when they are asked for, so that a store of millions opens at once.
    """

    def __init__(self, path: str):
        store = open_code_store(path)
        self._captions = store.captions
        self._arrays = {field: store.array(name) for field, name in (('label', 'labels'), ('image', 'images'))
                        if name in store.arrays}
        self.fields = ('caption', *self._arrays)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, i: Any) -> dict[str, Any]:
        row = {'caption': self._captions[int(i)]}
        for field, array in self._arrays.items():
            row[field] = int(array[i]) if field == 'label' else np.asarray(array[i])
        return row


class FileRows(list[Mapping[str, Any]]):
    """Rows of a file; `fields` are those that all of them have."""

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for name in self[0] if all(name in row for row in self))


def open_rows(path: str, field: str) -> StoreRows | FileRows:
    """The captions in `path`: a code store with captions, a .jsonl of `{"caption": ..., more fields}`, or a .txt of one
    a line.

    Args:
        field: of the config that gave the path, for messages.

    Raises:
        FileNotFoundError, ValueError: nothing there, no captions, an empty one, or a damaged line.
    """
    if not path:
        raise ValueError(f'{field} is empty: give a code store with captions, a .jsonl of {{"caption": ...}} or a .txt '
                         'of captions')
    place = storage.resolve(path)
    if place.suffix not in ('.jsonl', '.txt'):
        return StoreRows(path)
    if not place.is_file():
        raise FileNotFoundError(f'{field}={path}: no such file')
    rows = FileRows()
    try:
        lines = place.read_bytes().decode('utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{field}={path}: not UTF-8 text (byte {error.start})') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = {'caption': line} if place.suffix == '.txt' else dict(json.loads(line))
            row['caption'] = clean(row['caption'])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f'{field}={path}: line {number} is not {{"caption": "...", ...}}') from None
        if not row['caption']:
            raise ValueError(f'{field}={path}: line {number} has an empty caption')
        rows.append(row)
    if not rows:
        raise ValueError(f'{field}={path}: no caption in it')
    return rows
