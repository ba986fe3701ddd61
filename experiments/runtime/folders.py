"""Folders that hold a model: the work directory of a run, or weights as somebody released them.

Both have a config.json; that of a run names its experiment.
"""
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from experiments.runtime import storage

# Files of a tokenizer; a folder has some of them.
_TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
                    'vocab.json', 'merges.txt', 'tokenizer.model', 'chat_template.jinja')


def read_settings(path: str | os.PathLike, *, field: str = '',
                  wanted: str = 'a Hugging Face folder or a work directory') -> Mapping[str, Any]:
    """The mapping in `path`/config.json.

    Args:
        field: stands before the path in errors, as in 'weights='.
        wanted: what to give instead of a folder without one.

    Raises:
        FileNotFoundError, ValueError: no config.json there, or a damaged one.
    """
    file = storage.resolve(path) / 'config.json'
    if not file.exists():
        raise FileNotFoundError(f'{field}{path}: no config.json there; give {wanted}')
    return read_json(file)


def read_json(file: Any) -> Mapping[str, Any]:
    """The mapping in a JSON file, {} where it holds something else.

    Raises:
        ValueError: damaged.
    """
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file}: damaged ({error}); mend it or take it away') from None
    return values if isinstance(values, Mapping) else {}


def names_experiment(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a run, not of released weights."""
    return 'experiment' in settings


def copy_tokenizer(name: str, folder: pathlib.Path) -> list[str]:
    """Copies the files of the tokenizer that a config names (a file, a folder, or 'bytes', which has none) to `folder`;
    returns their names."""
    if name == 'bytes':
        return []
    source = pathlib.Path(storage.local_copy(name))
    source = source if source.is_dir() else source.parent
    present = [file for file in _TOKENIZER_FILES if (source / file).exists()]
    for file in present:
        shutil.copyfile(source / file, folder / file)
    return present
