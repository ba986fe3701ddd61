"""The code store: a data set turned into codes, as a folder of memory-mapped arrays.

    codes.npy                                        [N, L] uint8, uint16 or int32
    labels.npy, embeddings.npy, images.npy, ...      [N, ...]
    names.txt                                        one line a row
    captions.txt                                     one line a row, where the data set has captions
    meta.json                                        num, num_codes, vocab_size, arrays, class_names, ...

`writer` streams rows into `<path>.partial` and renames it when all are there, so that a store exists whole or not at
all; interrupted, it continues after the last rows known to be on disk. Images that cannot be read have no row:
`items` in meta.json is the length of the data set, `num` that of the arrays. A store at a URL (`gs://...`) is written
to a local cache and copied there when it is complete, and copied back before it is opened.
"""
import dataclasses
import errno
import io
import json
import os
import pathlib
import time
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.dlc.data.printable import printable
from experiments.runtime import storage

SYNC_SECONDS = 10.0  # at most this much work is done again after a kill
SCAN_ROWS = 2 ** 14  # codes looked at together when a store is opened
# What numpy raises on damaged .npy files, and json on damaged ones of its own.
ARRAY_ERRORS = (ValueError, EOFError, OSError, TypeError, KeyError, OverflowError, MemoryError, RecursionError,
                SyntaxError, tokenize.TokenError)
JSON_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def code_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint8, uint16, int32 that holds `vocab_size` values."""
    return np.dtype(np.uint8 if vocab_size <= 2 ** 8 else np.uint16 if vocab_size <= 2 ** 16 else np.int32)


# ---- Reading -------------------------------------------------------------------------------------------------------

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


def open_code_store(path: str | os.PathLike, *, num_codes: int | None = None,
                    vocab_size: int | None = None) -> CodeStore:
    """Opens a store and checks it against the L x V that a model expects.

    Raises:
        OSError: there is no store, it is unfinished, or an array is missing or truncated.
        ValueError: its codes are of another L x V.
    """
    shown, path = os.fspath(path), local_folder(path)
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


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """meta.json of a finished store.

    Raises:
        OSError: damaged, or of values that no store has.
    """
    try:
        meta = read_json(path)
        for field in ('num', 'num_codes', 'vocab_size'):
            if type(meta[field]) is not int or not 1 <= meta[field] < 2 ** 40:
                raise ValueError(f'{field}={meta[field]!r}')
        names = meta['arrays']
        if not isinstance(names, list) or not all(isinstance(n, str) and n.isidentifier() for n in names):
            raise ValueError(f'arrays={names!r}')
        if 'codes' not in names:
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


# ---- Writing -------------------------------------------------------------------------------------------------------

def partial_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + '.partial')


class writer:
    """Context manager that writes a store row by row; see the module docstring for what an interruption leaves.

        with writer(path, num=1000, meta=dict(num_codes=32, vocab_size=16)) as store:
            for start in range(store.done, 1000, 100):
                store.append({'codes': ..., 'labels': ...}, names=...)

    Args:
        path: of the store. Where a finished one with the same `meta` is there already, `done` is `num` at once.
        num: items of the data set; each becomes a row or is left out.
        meta: `num_codes`, `vocab_size`, and whatever else should be kept beside the arrays (json). With `captions`,
            rows come with captions.

    Attributes:
        done: items written or left out so far; append the next ones from here on.

    Raises:
        ValueError: another store is there, rows do not fit, or fewer than `num` items came before the block ended.
        OSError: the disk is full.
    """

    def __init__(self, path: str | os.PathLike, *, num: int, meta: Mapping[str, Any]):
        self._remote = os.fspath(path) if storage.is_remote(path) else None
        self.path = storage.cached(path) if self._remote else pathlib.Path(path).expanduser()
        self.meta = json.loads(json.dumps(dict(meta) | {'items': num}))
        self.done = self._written = 0
        self._partial = partial_path(self.path)
        self._files, self._shapes = {}, {}
        columns = ['names'] + (['captions'] if self.meta.get('captions') else [])
        self._lines = dict.fromkeys(columns)
        self._lines_bytes = dict.fromkeys(self._lines, 0)
        self._synced, self._finished = time.monotonic(), False

    def __enter__(self) -> 'writer':
        if self._remote and (storage.resolve(self._remote) / 'meta.json').exists():
            return self._finished_before(storage.resolve(self._remote) / 'meta.json', self._remote)
        if (self.path / 'meta.json').exists():
            return self._finished_before(self.path / 'meta.json', self.path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f'{self.path}: is there already but is no code store; choose another place')
        self._partial.mkdir(parents=True, exist_ok=True)
        if (self._partial / 'progress.json').exists():
            progress = read_progress(self._partial / 'progress.json')
            self._claim(progress['meta'], self._partial)
            self.done, self._written = progress['done'], progress['written']
            for name, (shape, dtype) in progress['arrays'].items():
                self._open(name, shape, dtype)
            self._lines_bytes = {name: progress[f'{name}_bytes'] for name in self._lines}
        for name in self._lines:
            self._lines[name] = open(self._partial / f'{name}.txt', 'ab', buffering=0)
            self._lines[name].truncate(self._lines_bytes[name])
        return self

    def _finished_before(self, meta: Any, where: str | pathlib.Path) -> 'writer':
        """Takes the finished store at `where` for this one, or raises."""
        before = read_meta(meta)
        self._claim({'items': before['num']} | before, where)
        self.done, self._finished, self._remote = self.meta['items'], True, None
        return self

    def _claim(self, before: Mapping[str, Any], where: str | pathlib.Path) -> None:
        """Raises unless the store found is the one that is to be written."""
        for key, value in self.meta.items():
            if before.get(key) != value:
                raise ValueError(f'{where}: holds a store with {key}={shortened(before.get(key))}, not '
                                 f'{shortened(value)}; choose another place or delete it')

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Opens array `name` at the next row to write, writing its header where it is new."""
        path = self._partial / f'{name}.npy'
        # Unbuffered: a full disk must show in the append it belongs to. And not memory-mapped: there it is a SIGBUS.
        file = open(path, 'r+b' if self._written else 'w+b', buffering=0)
        write_header(file, dtype, (self.meta['items'], *shape))
        file.seek(self._written * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, os.SEEK_CUR)
        self._files[name], self._shapes[name] = file, (shape, dtype)

    def append(self, rows: Mapping[str, np.ndarray], *, names: Sequence[str], captions: Sequence[str] | None = None,
               left_out: int = 0) -> None:
        """Writes the next rows: `codes` [n, L] and any other arrays [n, ...], the same ones each time; `left_out` more
        items among them have no row."""
        rows = {name: np.asarray(array) for name, array in rows.items()}
        rows['codes'] = self._check_codes(rows)
        count = len(names)
        if self.done + count + left_out > self.meta['items']:
            raise ValueError(f'{self.path}: {self.done + count + left_out} rows are more than num={self.meta["items"]}')
        if count == 0:
            self.done += left_out
            return
        for name, array in rows.items():
            if len(array) != count:
                raise ValueError(f'{name}: {len(array)} rows but {count} names')
        if not self._files:
            for name, array in rows.items():
                self._open(name, array.shape[1:], array.dtype)
        shapes = {name: (array.shape[1:], array.dtype) for name, array in rows.items()}
        if shapes != self._shapes:
            raise ValueError(f'{self.path}: rows are {shapes}, but those before were {self._shapes}')
        texts = {'names': [' '.join(name.splitlines()) for name in names]}
        if (captions is not None) != ('captions' in self._lines):
            raise ValueError(f'{self.path}: captions come with every row of a store whose meta says so, and no other')
        if captions is not None:
            texts['captions'] = [' '.join(caption.split()) for caption in captions]
            if len(captions) != count or '' in texts['captions']:
                raise ValueError(f'{self.path}: {count} rows but {sum(map(bool, texts["captions"]))} captions')
        # A file name on disk need not be UTF-8; its bytes are kept as they are.
        lines = {name: ''.join(line + '\n' for line in texts[name]).encode('utf-8', 'surrogateescape')
                 for name in texts}
        try:
            for name, array in rows.items():
                write_all(self._files[name], np.ascontiguousarray(array).data)
            for name, data in lines.items():
                write_all(self._lines[name], memoryview(data))
        except OSError as error:
            raise self._full(error) from error
        for name, data in lines.items():
            self._lines_bytes[name] += len(data)
        self.done += count + left_out
        self._written += count
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _check_codes(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        codes, length, vocab = rows.get('codes'), self.meta['num_codes'], self.meta['vocab_size']
        if codes is None or codes.ndim != 2 or codes.shape[1] != length:
            raise ValueError(f'codes are {None if codes is None else codes.shape}; expected [rows, num_codes={length}]')
        if codes.size and not 0 <= codes.min() <= codes.max() < vocab:
            raise ValueError(f'codes lie in [{codes.min()}, {codes.max()}], outside vocab_size={vocab}')
        return codes.astype(code_dtype(vocab))

    def _full(self, error: OSError) -> OSError:
        reason = 'the disk is full' if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        return OSError(error.errno, f'{self.path}: {reason} after {self.done} rows; make room and run the same '
                                    'command, it continues')

    def _sync(self) -> None:
        """Everything written so far reaches the disk before the note that says so."""
        for file in (*self._files.values(), *self._lines.values()):
            os.fsync(file.fileno())
        # After a failed append the files are ahead of `done`; what is beyond it is written over.
        progress = {'done': self.done, 'written': self._written, 'meta': self.meta,
                    'arrays': {name: (shape, dtype.str) for name, (shape, dtype) in self._shapes.items()},
                    **{f'{name}_bytes': size for name, size in self._lines_bytes.items()}}
        write_json(self._partial / 'progress.json', progress)
        self._synced = time.monotonic()

    def __exit__(self, kind, error, trace) -> None:
        if not self._finished:
            self._close(failed=kind is not None)
        if self._remote and kind is None:
            storage.upload(self.path, self._remote, last='meta.json')

    def _close(self, *, failed: bool) -> None:
        try:
            self._sync()
        except OSError as error:
            if not failed:
                raise self._full(error) from error
        finally:
            for file in (*self._files.values(), *self._lines.values()):
                file.close()
        if failed:
            return
        if self.done != self.meta['items']:
            raise ValueError(f'{self.path}: {self.done} of {self.meta["items"]} rows were written; append the rest')
        if not self._written:
            raise ValueError(f'{self.path}: none of the {self.done} items could be read, there is nothing to store')
        if self._written < self.done:
            self._shorten()
        write_json(self._partial / 'meta.json', self.meta | {'num': self._written, 'arrays': sorted(self._shapes)})
        (self._partial / 'progress.json').unlink()
        os.replace(self._partial, self.path)

    def _shorten(self) -> None:
        """Puts the number of rows that came into the arrays' headers, which expected one of every item."""
        for name, (shape, dtype) in self._shapes.items():
            with open(self._partial / f'{name}.npy', 'r+b') as file:
                before = write_header(io.BytesIO(), dtype, (self.meta['items'], *shape))
                if write_header(file, dtype, (self._written, *shape)) != before:
                    raise AssertionError('numpy pads headers so that the first axis may change')
                file.truncate(before + self._written * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
                file.flush()
                os.fsync(file.fileno())


def write_header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Writes the header of a .npy file; returns its length, where the data begin."""
    np.lib.format.write_array_header_1_0(file, {'descr': np.lib.format.dtype_to_descr(dtype), 'fortran_order': False,
                                                'shape': shape})
    return file.tell()


def shortened(value: Any) -> str:
    """`value` for an error message."""
    return printable(repr(value), 120)


def write_all(file: io.RawIOBase, data: memoryview) -> None:
    data = data.cast('B')
    while data:
        data = data[file.write(data):]


def write_json(path: pathlib.Path, content: Any) -> None:
    """Whole or not at all."""
    new = path.with_suffix('.new')
    with open(new, 'w') as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
