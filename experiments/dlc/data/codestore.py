"""The code store: a data set turned into codes, as a folder of memory-mapped arrays.

    codes.npy                                        [N, L] uint8, uint16 or int32
    labels.npy, embeddings.npy, images.npy, ...      [N, ...]
    names.txt                                        one line a row
    captions.txt                                     one line a row, where the data set has captions
    meta.json                                        num, num_codes, vocab_size, arrays, class_names, ...

A store exists whole or not at all (`codestore_writer`). Images that cannot be read have no row: `items` in meta.json is
the length of the data set, `num` that of the arrays. A store at a URL (`gs://...`) is copied to a local cache before it
is opened.
"""
import dataclasses
import json
import os
import pathlib
import tokenize
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.dlc.data.printable import printable
from experiments.runtime import storage

SCAN_ROWS = 2 ** 14  # codes looked at together when a store is opened
# What numpy raises on damaged .npy files, and json on damaged ones of its own.
ARRAY_ERRORS = (ValueError, EOFError, OSError, TypeError, KeyError, OverflowError, MemoryError, RecursionError,
                SyntaxError, tokenize.TokenError)
JSON_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def code_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint8, uint16, int32 that holds `vocab_size` values."""
    return np.dtype(np.uint8 if vocab_size <= 2 ** 8 else np.uint16 if vocab_size <= 2 ** 16 else np.int32)


@dataclasses.dataclass(frozen=True)
class CodeStore:
    """A finished store. `len(store)` is the number of rows."""
    path: pathlib.Path
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return self.meta['num']

    @property
    def num_codes(self) -> int:
        return self.meta['num_codes']

    @property
    def vocab_size(self) -> int:
        return self.meta['vocab_size']

    @property
    def names(self) -> list[str]:
        """One a row: where in its data set the image came from.

        Raises:
            OSError: the file is missing or of another length.
        """
        path = self.path / 'names.txt'
        if not path.is_file():
            raise FileNotFoundError(f'{path}: missing; encode the data set again')
        names = path.read_bytes().decode('utf-8', 'surrogateescape').split('\n')[:-1]
        if len(names) != len(self):
            raise OSError(f'{path}: {len(names)} lines, meta.json says {len(self)}; encode the data set again')
        return names

    @property
    def captions(self) -> 'Lines':
        """One a row: what the image shows, in words.

        Raises:
            ValueError: a store without captions, or a row without one.
            OSError: the file is missing or truncated.
        """
        path = self.path / 'captions.txt'
        if not self.meta.get('captions'):
            raise ValueError(f'{self.path}: holds codes without captions; encode the data set with --captions')
        if not path.exists():
            raise FileNotFoundError(f'{path}: missing; encode the data set again')
        lines = Lines(path)
        if len(lines) != len(self):
            raise OSError(f'{path}: {len(lines)} lines, meta.json says {len(self)}; encode the data set again')
        return lines

    def array(self, name: str) -> np.ndarray:
        """[N, ...], memory-mapped; a ValueError where the store has no such array."""
        if name not in self.arrays:
            raise ValueError(f'{self.path}: holds {sorted(self.arrays)} but no {name!r}; encode the data set with it')
        return self.arrays[name]

    def labels(self, num_classes: int | None = None) -> np.ndarray:
        """[N] integers in 0..num_classes - 1 (None: as many as `class_names`, where the store has them).

        Raises:
            ValueError: no labels, or one out of range.
        """
        labels = self.array('labels')
        num_classes = num_classes or len(self.meta.get('class_names') or ()) or None
        if labels.ndim != 1 or labels.dtype.kind not in 'iu':
            raise ValueError(f'{self.path}: labels are {labels.dtype} {labels.shape}; need whole numbers, one a row')
        bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
        if bad.any():
            row = int(bad.argmax())
            limit = 'negative' if num_classes is None else f'outside 0..{num_classes - 1}'
            raise ValueError(f'{self.path}: {int(bad.sum())} of {len(labels)} labels are {limit}, the first is '
                             f'{labels[row]} in row {row}; encode a data set with these classes, or set '
                             'model.num_classes')
        return labels


class Lines:
    """The lines of a UTF-8 file by number, read when asked for: captions of millions of images need not be in memory.

    Raises:
        ValueError: an empty line, or, when it is asked for, one that is no text.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._bytes = np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)
        self._ends = np.flatnonzero(self._bytes == ord('\n'))
        empty = np.flatnonzero(np.diff(self._ends, prepend=-1) == 1)
        if empty.size:
            raise ValueError(f'{path}: line {empty[0] + 1} is empty; every code needs a caption')

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        start = self._ends[i - 1] + 1 if i else 0
        try:
            return self._bytes[start:self._ends[i]].tobytes().decode('utf-8')
        except UnicodeDecodeError:
            raise ValueError(f'{self._path}: line {i + 1} is not UTF-8 text; encode the data set again') from None


def open_code_store(path: str | os.PathLike, *, num_codes: int | None = None, vocab_size: int | None = None,
                    field: str = 'data.path') -> CodeStore:
    """Opens a store and checks it against the L x V that a model expects.

    Args:
        field: what gave the path, a field of the config or a flag, for the message where it is empty.

    Raises:
        OSError: there is no store, it is unfinished, or an array is missing or truncated.
        ValueError: no path, or its codes are of another L x V.
    """
    from experiments.dlc.data import codestore_shards  # deferred: it opens the parts of a store as stores
    shown = os.fspath(path)
    if not shown:
        raise ValueError(f'{field} is empty: give a code store written by experiments.encode')
    if not (storage.resolve(path) / 'meta.json').exists() and not codestore_shards.merge(path):
        if missing := codestore_shards.describe_missing(path):
            raise FileNotFoundError(f'{shown}: unfinished, {missing}; run the same command again for them')
    path = local_folder(path)
    if not (path / 'meta.json').exists():
        partial = partial_path(path)
        if (partial / 'progress.json').exists():
            progress = read_progress(partial / 'progress.json')
            raise FileNotFoundError(f'{shown}: unfinished, {progress["done"]} of {progress["meta"]["items"]} rows; run '
                                    'the same python -m experiments.encode command again to complete it')
        raise FileNotFoundError(f'{shown}: no code store there; write one with python -m experiments.encode '
                                f'--out={shown}')
    meta = read_meta(path / 'meta.json')
    num, codes, vocab = meta['num'], meta['num_codes'], meta['vocab_size']
    for field, size, wanted in (('num_codes', codes, num_codes), ('vocab_size', vocab, vocab_size)):
        if wanted is not None and size != wanted:
            raise ValueError(f'{path}: holds codes of L x V = {codes} x {vocab} but model.{field}={wanted}; set '
                             f'model.{field}={size} or encode the data set with the matching encoder')
    arrays = {name: open_array(path / f'{name}.npy', num) for name in meta['arrays']}
    check_codes(arrays['codes'], num, codes, vocab, path)
    return CodeStore(path, meta, arrays)


def open_rows(path: str | os.PathLike) -> CodeStore:
    """Opens a finished store of any rows: codes, images, or a part of a store, which may have none.

    Raises:
        OSError: there is no store, or an array is missing or truncated.
    """
    path = local_folder(path)
    meta = read_meta(path / 'meta.json', of_codes=False)
    return CodeStore(path, meta, {name: open_array(path / f'{name}.npy', meta['num']) for name in meta['arrays']})


def check_codes(codes: np.ndarray, num: int, length: int, vocab_size: int, path: pathlib.Path) -> None:
    """Raises a ValueError unless `codes` are [num, length] whole numbers in 0..vocab_size - 1; reads all of them,
    unless their dtype can hold no others."""
    if codes.shape != (num, length):
        raise ValueError(f'{path}: codes.npy is {codes.shape}, meta.json says {(num, length)}; encode again')
    if codes.dtype.kind not in 'iu':
        raise ValueError(f'{path}: codes.npy holds {codes.dtype}, not whole numbers; encode again')
    if codes.dtype.kind == 'u' and np.iinfo(codes.dtype).max < vocab_size:
        return
    for start in range(0, num, SCAN_ROWS):
        part = codes[start:start + SCAN_ROWS]
        least, most = int(part.min()), int(part.max())
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            row = start + int((part == wrong).any(1).argmax())
            raise ValueError(f'{path}: codes.npy holds {wrong} in row {row} but meta.json says '
                             f'vocab_size={vocab_size}; encode again')


def check_one_encoder(stores: Mapping[str, CodeStore]) -> None:
    """Raises a ValueError where two of `stores` (name, such as a flag -> store) were encoded by different encoders, or
    number other classes: their codes and labels mean different things. Stores that do not say pass.
    """
    for field, what in (('encoder', 'were written by different encoders'), ('class_names', 'have other classes')):
        said = {name: store.meta[field] for name, store in stores.items() if store.meta.get(field)}
        names = list(said)
        for name in names[1:]:
            if said[name] != said[names[0]]:
                raise ValueError(f'{names[0]} ({stores[names[0]].path}) and {name} ({stores[name].path}) {what}; '
                                 'encode both data sets with one encoder')


def read_meta(path: pathlib.Path, *, of_codes: bool = True) -> dict[str, Any]:
    """meta.json of a finished store, of codes or of any rows.

    Raises:
        OSError: damaged, or of values that no store has.
    """
    try:
        meta = read_json(path)
        for field in ('num', 'num_codes', 'vocab_size') if of_codes else ('num',):
            if type(meta[field]) is not int or not of_codes <= meta[field] < 2 ** 40:
                raise ValueError(f'{field}={meta[field]!r}')
        names = meta['arrays']
        if not isinstance(names, list) or not all(isinstance(n, str) and n.isidentifier() for n in names):
            raise ValueError(f'arrays={names!r}')
        if of_codes and 'codes' not in names:
            raise ValueError("arrays without 'codes'")
        if not isinstance(meta.get('class_names') or [], list):
            raise ValueError('class_names are no list')
    except JSON_ERRORS as error:
        raise OSError(f'{path}: damaged ({shown_error(error)}); encode the data set again') from None
    return meta


def read_progress(path: pathlib.Path) -> dict[str, Any]:
    """progress.json of an unfinished store: `done`, `written`, `meta`, `arrays` (name -> shape, dtype), `*_bytes`.

    Raises:
        OSError: damaged.
    """
    try:
        progress = read_json(path)
        meta = progress['meta']
        meta.setdefault('items', meta.get('num'))
        progress.setdefault('written', progress['done'])
        counts = [meta['items'], progress['done'], progress['written'],
                  *(value for name, value in progress.items() if name.endswith('_bytes'))]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError('counts that are none')
        if not progress['written'] <= progress['done'] <= meta['items'] or 'names_bytes' not in progress:
            raise ValueError('counts that do not fit together')
        progress['arrays'] = {name: (tuple(map(int, shape)), np.dtype(dtype))
                              for name, (shape, dtype) in progress['arrays'].items() if _is_array_name(name)}
    except JSON_ERRORS as error:
        raise OSError(f'{path}: damaged ({shown_error(error)}); delete {path.parent} and encode the data set '
                      'again') from None
    return progress


def _is_array_name(name: str) -> bool:
    if not name.isidentifier():
        raise ValueError(f'array {name!r}')
    return True


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file; one of `JSON_ERRORS` where there is none."""
    if not path.is_file():
        raise ValueError('not a file')
    return json.loads(path.read_text(encoding='utf-8'))


def shown_error(error: BaseException) -> str:
    return printable(' '.join(repr(error).split()))


def partial_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + '.partial')


def local_folder(path: str | os.PathLike) -> pathlib.Path:
    """Where the store `path` lies on this machine: a finished remote one is copied, an unfinished one was begun
    here."""
    if not storage.is_remote(path):
        return pathlib.Path(path).expanduser()
    return storage.local_copy(path) if (storage.resolve(path) / 'meta.json').exists() else storage.cached(path)


def open_array(path: pathlib.Path, num: int) -> np.ndarray:
    """The array [num, ...] in a .npy file, memory-mapped.

    Raises:
        OSError: missing, truncated, damaged or of another length.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: missing; encode the data set again')
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
        rows = len(array)
    except ARRAY_ERRORS as error:
        raise OSError(f'{path}: truncated or damaged ({shown_error(error)}); encode the data set again') from None
    if rows != num:
        raise OSError(f'{path}: {rows} rows, meta.json says {num}; encode the data set again')
    return array
