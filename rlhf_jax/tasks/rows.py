"""Rows of data sets that lie on disk: jsonl, json, parquet and arrow files, Hugging Face folders, parallel text.

Parquet and arrow files need pyarrow, which the extra `text` brings. Nothing is ever downloaded.
"""
import gzip
import json
import lzma
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

_OPEN = {'.gz': gzip.open, '.xz': lzma.open}
_TABLES = ('.parquet', '.arrow')
_FORMATS = ('.jsonl', '.json') + _TABLES


def read(path: str | os.PathLike, fields: Sequence[str] = (), *, split: str | None = None,
         bad: list[str] | None = None) -> Iterator[Row]:
    """Rows of one file, or of a split of a folder, in order.

    Args:
        path: a file `.jsonl`, `.json` (a list of rows), either with `.gz` or `.xz` behind it, `.parquet`, `.arrow`; or
            a folder as `datasets.save_to_disk` writes it, or one that holds `{split}.*` or `{split}-*` files, itself or
            under `data/`.
        fields: that every row must have, and not null.
        split: of a folder; None: its only one.
        bad: a list that takes the message of each row that cannot be used, which is then left out; None: the first
            such row is an error.

    Raises:
        ValueError: one line that names the file, the row (from 0) and the field that it lacks; or a folder or file that
            is in no known form.
        FileNotFoundError: no such file, folder or split.
        ImportError: a parquet or arrow file without pyarrow.
    """
    for file in _files(pathlib.Path(path), split):
        for number, row in enumerate(_rows(file)):
            message = _fault(row, fields)
            if message is None:
                yield row
            elif bad is None:
                raise BadRow(f'{file}: row {number}: {message}')
            else:
                bad.append(f'{file}: row {number}: {message}')


def read_parallel(paths: Mapping[str, str | os.PathLike]) -> list[dict[str, str]]:
    """Sentences that say the same, line by line, of text files (`.gz` and `.xz` too): [{language: sentence}].

    Raises:
        ValueError: the files have different numbers of lines, or a line is empty.
    """
    texts = {language: _lines(pathlib.Path(path)) for language, path in paths.items()}
    counts = {str(paths[language]): len(lines) for language, lines in texts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f'parallel files have different numbers of lines: {counts}')
    for language, lines in texts.items():
        for number, line in enumerate(lines):
            if not line.strip():
                raise ValueError(f'{paths[language]}: row {number}: {language!r} is empty')
    return [dict(zip(texts, sentences)) for sentences in zip(*texts.values())]


def _fault(row: Any, fields: Sequence[str]) -> str | None:
    if isinstance(row, _Malformed):
        return row.message
    if not isinstance(row, dict):
        return f'is a {type(row).__name__}, not an object with fields'
    for field in fields:
        if row.get(field) is None:
            return f'missing field {field!r}; it has {sorted(k for k, v in row.items() if v is not None)}'
    return None


class BadRow(ValueError):
    """One row of a file that is fine otherwise."""


class _Malformed:
    """Stands for a line that is no JSON."""

    def __init__(self, message: str):
        self.message = message


def _kind(file: pathlib.Path) -> str:
    suffixes = file.suffixes
    return suffixes[-2] if suffixes and suffixes[-1] in _OPEN and len(suffixes) > 1 else file.suffix


def _files(path: pathlib.Path, split: str | None) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: no such file or folder')
    if (path / 'dataset_dict.json').is_file():
        splits = json.loads((path / 'dataset_dict.json').read_text())['splits']
        return _files(path / _only(path, splits, split), None)
    if (path / 'state.json').is_file():  # one split, its shards in order
        return [path / shard['filename'] for shard in json.loads((path / 'state.json').read_text())['_data_files']]
    found = [file for folder in (path, path / 'data') if folder.is_dir() for file in sorted(folder.iterdir())
             if file.is_file() and _kind(file) in _FORMATS and file.name != 'dataset_info.json']
    by_split: dict[str, list[pathlib.Path]] = {}
    for file in found:
        by_split.setdefault(file.name.split('.')[0].split('-')[0], []).append(file)
    if not by_split:
        raise FileNotFoundError(f'{path}: holds no file of {", ".join(_FORMATS)}')
    return by_split[_only(path, list(by_split), split)]


def _only(path: pathlib.Path, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise ValueError(f'{path}: split must be one of {sorted(splits)}')
    if split not in splits:
        raise FileNotFoundError(f'{path}: no split {split!r}; it has {sorted(splits)}')
    return split


def _rows(file: pathlib.Path) -> Iterator[Any]:
    kind = _kind(file)
    if kind == '.jsonl':
        for line in _lines(file):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield _Malformed(f'is no JSON: {error}')
    elif kind == '.json':
        try:
            rows = json.loads('\n'.join(_lines(file)))
        except json.JSONDecodeError as error:
            raise ValueError(f'{file}: is no JSON: {error}; a file with one row a line is named .jsonl') from None
        if not isinstance(rows, list):
            raise ValueError(f'{file}: holds a {type(rows).__name__}, expected a list of rows')
        yield from rows
    elif kind in _TABLES:
        yield from _table(file, kind)
    else:
        raise ValueError(f'{file}: unknown format; expected {", ".join(_FORMATS)} (json also .gz or .xz)')


def _table(file: pathlib.Path, kind: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{file}: {kind} needs pyarrow; `pip install 'dlc-jax[text]'`") from None
    if kind == '.parquet':
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                yield from batch.to_pylist()
        return
    with pa.memory_map(str(file)) as source:
        try:
            batches = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # the other of arrow's two layouts
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


def _lines(file: pathlib.Path) -> list[str]:
    """Lines by newline alone: str.splitlines would also cut at U+0085 and its like, which texts hold."""
    with _OPEN.get(file.suffix, open)(file, 'rt', encoding='utf-8', newline='\n') as f:
        lines = f.read().split('\n')
    return lines[:-1] if lines[-1] == '' else lines
