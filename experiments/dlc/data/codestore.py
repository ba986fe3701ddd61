"""The code store: a data set turned into codes, as a folder of memory-mapped arrays.

    codes.npy                                        [N, L] uint8, uint16 or int32
    labels.npy, embeddings.npy, images.npy, ...      [N, ...]
    names.txt                                        one line a row
    captions.txt                                     one line a row, where the data set has captions
    meta.json                                        num, num_codes, vocab_size, arrays, class_names, ...

`writer` streams rows into `<path>.partial` and renames it when all are there, so that a store exists whole or not at
all; interrupted, it continues after the last rows known to be on disk. A store at a URL (`gs://...`) is written to a
local cache and copied there when it is complete, and copied back before it is opened.
"""
import dataclasses
import errno
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runtime import storage

SYNC_SECONDS = 10.0  # at most this much work is done again after a kill


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
        """One a row: where in its data set the image came from."""
        return (self.path / 'names.txt').read_text(encoding='utf-8').split('\n')[:-1]

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


class Lines:
    """The lines of a UTF-8 file by number, read when asked for: captions of millions of images need not be in memory.

    Raises:
        ValueError: an empty line.
    """

    def __init__(self, path: pathlib.Path):
        self._bytes = np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)
        self._ends = np.flatnonzero(self._bytes == ord('\n'))
        empty = np.flatnonzero(np.diff(self._ends, prepend=-1) == 1)
        if empty.size:
            raise ValueError(f'{path}: line {empty[0] + 1} is empty; every code needs a caption')

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        start = self._ends[i - 1] + 1 if i else 0
        return self._bytes[start:self._ends[i]].tobytes().decode('utf-8')


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
            found = json.loads((partial / 'progress.json').read_text())
            raise FileNotFoundError(f'{shown}: unfinished, {found["done"]} of {found["meta"]["num"]} rows; run the '
                                    'same python -m experiments.encode command again to complete it')
        raise FileNotFoundError(f'{shown}: no code store there; write one with python -m experiments.encode '
                                f'--out={shown}')
    try:
        meta = json.loads((path / 'meta.json').read_text())
        num, codes, vocab = meta['num'], meta['num_codes'], meta['vocab_size']
        names = meta['arrays']
    except (ValueError, KeyError) as error:
        raise OSError(f'{path / "meta.json"}: damaged ({error!r}); encode the data set again') from None
    for field, found, wanted in (('num_codes', codes, num_codes), ('vocab_size', vocab, vocab_size)):
        if wanted is not None and found != wanted:
            raise ValueError(f'{path}: holds codes of L x V = {codes} x {vocab} but model.{field}={wanted}; set '
                             f'model.{field}={found} or encode the data set with the matching encoder')
    arrays = {name: open_array(path / f'{name}.npy', num) for name in names}
    if arrays['codes'].shape != (num, codes):
        raise ValueError(f'{path}: codes.npy is {arrays["codes"].shape}, meta.json says {(num, codes)}; encode again')
    if (largest := int(arrays['codes'][:2 ** 16].max())) >= vocab:
        raise ValueError(f'{path}: codes.npy holds {largest} but meta.json says vocab_size={vocab}; encode again')
    return CodeStore(path, meta, arrays)


def local_folder(path: str | os.PathLike) -> pathlib.Path:
    """Where the store `path` lies on this machine: a finished remote one is copied, an unfinished one was begun
    here."""
    if not storage.is_remote(path):
        return pathlib.Path(path).expanduser()
    return storage.local_copy(path) if (storage.resolve(path) / 'meta.json').exists() else storage.cached(path)


def open_array(path: pathlib.Path, num: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: missing; encode the data set again') from None
    except (ValueError, EOFError, OSError) as error:
        raise OSError(f'{path}: truncated or damaged ({error}); encode the data set again') from None
    if len(array) != num:
        raise OSError(f'{path}: {len(array)} rows, meta.json says {num}; encode the data set again')
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
        num: rows in all.
        meta: `num_codes`, `vocab_size`, and whatever else should be kept beside the arrays (json). With `captions`,
            rows come with captions.

    Attributes:
        done: rows written so far; append the next ones from here on.

    Raises:
        ValueError: another store is there, rows do not fit, or fewer than `num` came before the block ended.
        OSError: the disk is full.
    """

    def __init__(self, path: str | os.PathLike, *, num: int, meta: Mapping[str, Any]):
        self._remote = os.fspath(path) if storage.is_remote(path) else None
        self.path = storage.cached(path) if self._remote else pathlib.Path(path).expanduser()
        self.meta = json.loads(json.dumps(dict(meta) | {'num': num}))
        self.done = 0
        self._partial = partial_path(self.path)
        self._files, self._shapes = {}, {}
        self._lines = {name: None for name in ('names', 'captions')[:1 + bool(self.meta.get('captions'))]}
        self._lines_bytes = dict.fromkeys(self._lines, 0)
        self._synced, self._finished = time.monotonic(), False

    def __enter__(self) -> 'writer':
        if self._remote and (storage.resolve(self._remote) / 'meta.json').exists():
            self._claim(json.loads((storage.resolve(self._remote) / 'meta.json').read_text()), self._remote)
            self.done, self._finished, self._remote = self.meta['num'], True, None
            return self
        if (self.path / 'meta.json').exists():
            self._claim(json.loads((self.path / 'meta.json').read_text()), self.path)
            self.done, self._finished = self.meta['num'], True
            return self
        if self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f'{self.path}: is there already but is no code store; choose another place')
        self._partial.mkdir(parents=True, exist_ok=True)
        if (self._partial / 'progress.json').exists():
            progress = json.loads((self._partial / 'progress.json').read_text())
            self._claim(progress['meta'], self._partial)
            self.done = progress['done']
            for name, (shape, dtype) in progress['arrays'].items():
                self._open(name, tuple(shape), np.dtype(dtype))
            self._lines_bytes = {name: progress[f'{name}_bytes'] for name in self._lines}
        for name in self._lines:
            self._lines[name] = open(self._partial / f'{name}.txt', 'ab', buffering=0)
            self._lines[name].truncate(self._lines_bytes[name])
        return self

    def _claim(self, found: Mapping[str, Any], where: str | pathlib.Path) -> None:
        """Raises unless the store found is the one that is to be written."""
        for key, value in self.meta.items():
            if found.get(key) != value:
                raise ValueError(f'{where}: holds a store with {key}={found.get(key)!r}, not {value!r}; choose another '
                                 'place or delete it')

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Opens array `name` at row `done`, writing its header where it is new."""
        path = self._partial / f'{name}.npy'
        # Unbuffered: a full disk must show in the append it belongs to. And not memory-mapped: there it is a SIGBUS.
        file = open(path, 'r+b' if self.done else 'w+b', buffering=0)
        np.lib.format.write_array_header_1_0(file, {'descr': np.lib.format.dtype_to_descr(dtype),
                                                    'fortran_order': False, 'shape': (self.meta['num'], *shape)})
        file.seek(self.done * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, os.SEEK_CUR)
        self._files[name], self._shapes[name] = file, (shape, dtype)

    def append(self, rows: Mapping[str, np.ndarray], *, names: Sequence[str],
               captions: Sequence[str] | None = None) -> None:
        """Writes the next rows: `codes` [n, L] and any other arrays [n, ...], the same ones each time."""
        rows = {name: np.asarray(array) for name, array in rows.items()}
        rows['codes'] = self._check_codes(rows)
        count = len(names)
        if count == 0:
            return
        for name, array in rows.items():
            if len(array) != count:
                raise ValueError(f'{name}: {len(array)} rows but {count} names')
        if self.done + count > self.meta['num']:
            raise ValueError(f'{self.path}: {self.done + count} rows are more than num={self.meta["num"]}')
        if not self._files:
            for name, array in rows.items():
                self._open(name, array.shape[1:], array.dtype)
        found = {name: (array.shape[1:], array.dtype) for name, array in rows.items()}
        if found != self._shapes:
            raise ValueError(f'{self.path}: rows are {found}, but those before were {self._shapes}')
        texts = {'names': [' '.join(name.splitlines()) for name in names]}
        if (captions is not None) != ('captions' in self._lines):
            raise ValueError(f'{self.path}: captions come with every row of a store whose meta says so, and no other')
        if captions is not None:
            texts['captions'] = [' '.join(caption.split()) for caption in captions]
            if len(captions) != count or '' in texts['captions']:
                raise ValueError(f'{self.path}: {count} rows but {sum(map(bool, texts["captions"]))} captions')
        lines = {name: ''.join(line + '\n' for line in texts[name]).encode('utf-8') for name in texts}
        try:
            for name, array in rows.items():
                write_all(self._files[name], np.ascontiguousarray(array).data)
            for name, data in lines.items():
                write_all(self._lines[name], memoryview(data))
        except OSError as error:
            raise self._full(error) from error
        for name, data in lines.items():
            self._lines_bytes[name] += len(data)
        self.done += count
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
        progress = {'done': self.done, 'meta': self.meta,
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
        if self.done != self.meta['num']:
            raise ValueError(f'{self.path}: {self.done} of {self.meta["num"]} rows were written; append the rest')
        write_json(self._partial / 'meta.json', self.meta | {'arrays': sorted(self._shapes)})
        (self._partial / 'progress.json').unlink()
        os.replace(self._partial, self.path)


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
