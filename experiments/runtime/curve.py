"""A run measured at its checkpoints: one JSON line each, in a file that an interrupted command continues."""
import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.runtime import metrics, processes, storage

# Flags that say where and how fast, not what is measured.
_NOT_OF_THE_MEASUREMENT = (
    'json', 'out', 'step', 'shard', 'batch_size', 'tensor', 'trust', 'traceback', 'compilation_cache', 'distributed',
    'coordinator', 'num_processes', 'process_id', 'join_timeout')
_NEW = ('min_new_tokens',)  # flags that earlier files do not know: not given, they leave the measurement what it was


class Curve:
    """Rows `{"step": n, "hours": h, name: value, ..., "settings": digest}`, ordered by step.

    Args:
        path: file of JSON lines; its rows stay.
        settings: `settings_of` the command: rows of another measurement are not mixed with these.
        run: work directory, whose metrics tell the hours of training until a step; None: rows have none.

    Raises:
        ValueError: the file holds something else, or measurements of other settings.
    """

    def __init__(self, path: str | os.PathLike, settings: str, run: str | os.PathLike | None = None):
        self._path, self._settings = storage.resolve(path), settings
        self._hours = metrics.hours(run) if run else {}
        self._rows: dict[int, dict[str, Any]] = {}
        if not self._path.exists():
            return
        for row in metrics.read_metrics(self._path):
            if row.get('settings') != settings:
                raise ValueError(f'--json={path}: holds a curve that was measured with other flags; choose another '
                                 'file')
            self._rows[row['step']] = row
        if not self._rows and self._path.read_bytes().strip():
            raise ValueError(f'--json={path}: is there already and holds no curve; choose another file')

    def missing(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps` that have no row yet. The processes of a job call it together and get what process 0 finds,
        which writes the rows: a shared disk may show them to the others later, and measuring takes all of them."""
        return processes.agreed([step for step in steps if step not in self._rows])

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the row of `step`; of nested `values` the names are joined by dots."""
        spent = {'hours': round(self._hours[step], 6)} if step in self._hours else {}
        self._rows[step] = {'step': step} | spent | flat(values) | {'settings': self._settings}
        storage.write_json_lines(self._path, [self._rows[step] for step in sorted(self._rows)])


def settings_of(args: argparse.Namespace, *more: Any) -> str:
    """A digest of the flags that decide what is measured, and of what `more` does (JSON values)."""
    left_out = {*_NOT_OF_THE_MEASUREMENT, *(name for name in _NEW if getattr(args, name, None) is None)}
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in left_out}
    return hashlib.sha256(json.dumps([flags, *more], default=str).encode()).hexdigest()[:16]


def flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {prefix + name: value}
    return out
