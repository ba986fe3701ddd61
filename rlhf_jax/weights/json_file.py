"""JSON files that come with weights (config.json, an index of shards, a safetensors header), read with suspicion."""
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

_LONGEST = 100_000_000  # bytes, of a safetensors header in the format's own reader; configs and indices are shorter


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in the JSON file `path`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file (a pipe would never end), too long, not JSON, not an object, nested too deeply,
            or one that gives a key twice.
    """
    path = check_regular(path)
    if path.stat().st_size > _LONGEST:
        raise ValueError(f'{path}: {path.stat().st_size:,} bytes are too many for a JSON file of this kind')
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f'{path}: not JSON ({error})') from None


def parse_json(text: bytes) -> dict[str, Any]:
    """The object that UTF-8 `text` is.

    Raises:
        ValueError: see `read_json`.
    """
    try:
        value = json.loads(text.decode('utf-8'), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError('nested too deeply') from None
    if not isinstance(value, dict):
        raise ValueError(f'a {type(value).__name__}, not an object')
    return value


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'key {name[:80]!r} is there twice')
    return values


def check_regular(path: str | os.PathLike) -> pathlib.Path:
    """`path`, once it is certain that reading it ends.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a regular one.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such file')
    if not path.is_file():
        raise ValueError(f'{path}: not a regular file')
    return path
