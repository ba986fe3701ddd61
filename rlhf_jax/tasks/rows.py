"""Rows of data sets that lie on disk: jsonl, json, parquet and arrow files, Hugging Face folders, parallel text.

Parquet and arrow files need pyarrow, which the extra `text` brings. Nothing is ever downloaded.
"""
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.tasks import text_files
from rlhf_jax.weights.json_file import read_json

Row = dict[str, Any]

_TABLES = ('.parquet', '.arrow')
_FORMATS = ('.jsonl', '.json') + _TABLES
_ESCAPED_HALF = re.compile(rb'\\u[dD][89a-fA-F]')  # as JSON writes half of a surrogate pair


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
        ValueError: one line that names the file, the row (from 0) and what is wrong with it: a field that it lacks, no
            JSON, not UTF-8, half of a character; or a folder or file that is in no known form, cut off, or damaged.
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
        ValueError: the files have different numbers of lines, or a line is empty or not UTF-8.
    """
    texts = {language: _sentences(pathlib.Path(path)) for language, path in paths.items()}
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
    """Stands for a row that cannot be used, whatever fields are wanted."""

    def __init__(self, message: str):
        self.message = message


def _sentences(file: pathlib.Path) -> list[str]:
    sentences = []
    for number, line in enumerate(text_files.lines(file)):
        try:
            sentences.append(text_files.decoded(line))
        except ValueError as error:
            raise ValueError(f'{file}: row {number}: {error}') from None
    return sentences


# ---- Which files -----------------------------------------------------------------------------------------------------

def _kind(file: pathlib.Path) -> str:
    suffixes = file.suffixes
    return suffixes[-2] if suffixes and suffixes[-1] in text_files.OPENERS and len(suffixes) > 1 else file.suffix


def _files(path: pathlib.Path, split: str | None) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: no such file or folder')
    index = path / 'dataset_dict.json'
    if index.exists():
        splits = _names(index, read_json(index).get('splits'), 'splits')
        path, split = path / _only(path, splits, split), None
        if not path.is_dir():
            raise FileNotFoundError(f'{index}: names a split {path.name!r} that is not there')
    if (path / 'state.json').exists():
        return _shards(path / 'state.json')
    found = [file for folder in (path, path / 'data') if folder.is_dir() for file in sorted(folder.iterdir())
             if file.is_file() and _kind(file) in _FORMATS
             and file.name not in ('dataset_info.json', 'dataset_dict.json')]
    by_split: dict[str, list[pathlib.Path]] = {}
    for file in found:
        by_split.setdefault(file.name.split('.')[0].split('-')[0], []).append(file)
    if not by_split:
        raise FileNotFoundError(f'{path}: holds no file of {", ".join(_FORMATS)}')
    return by_split[_only(path, list(by_split), split)]


def _shards(state: pathlib.Path) -> list[pathlib.Path]:
    """Files of the one split whose `state.json` this is, in order."""
    entries = read_json(state).get('_data_files')
    entries = [entry.get('filename') if isinstance(entry, dict) else entry for entry in entries] if isinstance(
        entries, list) else entries
    files = [state.parent / name for name in _names(state, entries, '_data_files')]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f'{state}: names {file.name!r}, which is no file there')
    return files


def _names(file: pathlib.Path, names: Any, field: str) -> list[str]:
    """Names that an index gives, each of something in its own folder.

    Raises:
        ValueError: other values, or a path that leads elsewhere.
    """
    if not isinstance(names, list) or not names:
        raise ValueError(f'{file}: {field} must be a list of names')
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).parts != (name,) or name == '..' or '\0' in name:
            raise ValueError(f'{file}: {field} holds {str(name)[:80]!r}, not the name of something beside it')
    return names


def _only(path: pathlib.Path, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise ValueError(f'{path}: split must be one of {sorted(splits)}')
    if split not in splits:
        raise FileNotFoundError(f'{path}: no split {split!r}; it has {sorted(splits)}')
    return split


# ---- What is in them -------------------------------------------------------------------------------------------------

def _rows(file: pathlib.Path) -> Iterator[Any]:
    kind = _kind(file)
    if kind == '.jsonl':
        yield from (_parsed(line) for line in text_files.lines(file) if line.strip())
    elif kind == '.json':
        text = text_files.whole(file)
        rows = _parsed(text, as_rows=True)
        if isinstance(rows, _Malformed):
            raise ValueError(f'{file}: {rows.message}; a file with one row a line is named .jsonl')
        if not isinstance(rows, list):
            raise ValueError(f'{file}: holds a {type(rows).__name__}, expected a list of rows')
        yield from rows
    elif kind in _TABLES:
        yield from _table(file, kind)
    else:
        raise ValueError(f'{file}: unknown format; expected {", ".join(_FORMATS)} (json also .gz or .xz)')


def _parsed(text: bytes, as_rows: bool = False) -> Any:
    """What JSON says, or why it cannot be used; `as_rows`: of a list, element by element."""
    try:
        value = json.loads(text_files.decoded(text))
    except RecursionError:
        return _Malformed('is no JSON that can be read: nested too deeply')
    except json.JSONDecodeError as error:
        return _Malformed(f'is no JSON: {error}')
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        return _Malformed(str(error))
    if not _ESCAPED_HALF.search(text):
        return value
    checked = lambda row: _Malformed(fault) if (fault := text_files.half_character(row)) else row
    return [checked(row) for row in value] if as_rows and isinstance(value, list) else checked(value)


def _table(file: pathlib.Path, kind: str) -> Iterator[Row]:
    """Rows of a parquet or arrow file.

    Raises:
        ValueError: a file that pyarrow cannot read, for whatever reason.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{file}: {kind} needs pyarrow; `pip install 'dlc-jax[text]'`") from None
    try:
        if kind == '.parquet':
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches():
                    batch.validate(full=True)
                    yield from batch.to_pylist()
            return
        with pa.OSFile(str(file)) as source:  # not mapped: a file that is cut short meanwhile would end the process
            try:
                batches = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:  # the other of arrow's two layouts
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            for batch in batches:
                batch.validate(full=True)  # else lengths that lie are read from memory that is not theirs
                yield from batch.to_pylist()
    except PermissionError:
        raise
    except Exception as error:  # pyarrow's errors are of many types, and none names the file
        raise ValueError(f'{file}: cannot be read as {kind[1:]} ({str(error) or type(error).__name__})') from None
