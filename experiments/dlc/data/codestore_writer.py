"""Writes a code store (`codestore`) row by row.

Rows are streamed into `<path>.partial`, which is renamed when all are there; interrupted, writing continues after the
last rows known to be on disk. Without `num_codes` in its meta it is a store of other rows, such as images. A store at a
URL (`gs://...`) is written to a local cache and copied there when it is complete; a copy that broke off is made anew.
"""
import errno
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.dlc.data.codestore import code_dtype, partial_path, read_meta, read_progress
from experiments.dlc.data.printable import printable
from experiments.runtime import storage

SYNC_SECONDS = 10.0  # at most this much work is done again after a kill


class writer:
    """Context manager that writes a store row by row; see the module docstring for what an interruption leaves.

        with writer(path, num=1000, meta=dict(num_codes=32, vocab_size=16)) as store:
            for start in range(store.done, 1000, 100):
                store.append({'codes': ..., 'labels': ...}, names=...)

    Args:
        path: of the store. Where a finished one with the same `meta` is there already, `done` is `num` at once.
        num: items of the data set, or of a part of it; each becomes a row or is left out. A part may have no row.
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
            self._finished_before(storage.resolve(self._remote) / 'meta.json', self._remote)
            self._remote = None  # nothing to upload
            return self
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

    def check_finished(self) -> None:
        """Raises a ValueError unless the finished store that is there is this one."""
        self._finished_before(storage.resolve(self._remote or self.path) / 'meta.json', self._remote or self.path)

    def _finished_before(self, meta: Any, where: str | pathlib.Path) -> 'writer':
        """Takes the finished store at `where` for this one, or raises."""
        before = read_meta(meta, of_codes=False)
        self._claim({'items': before['num']} | before, where)
        self.done, self._finished = self.meta['items'], True
        return self

    def _claim(self, before: Mapping[str, Any], where: str | pathlib.Path) -> None:
        """Raises unless the store found is the one that is to be written."""
        for key, value in self.meta.items():
            if key == 'origin' and key not in before:  # a store of before it was kept; the rest says what it is
                continue
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
        if 'num_codes' in self.meta:
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
        if not self._written and 'shard' not in self.meta:
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
