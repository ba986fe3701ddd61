"""Programs of several stages, each finished once: what an interrupted one has done is not done again."""
import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from experiments.runtime import config_files, storage

log = logging.getLogger(__name__)


def once(path: pathlib.Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in `path`, made and written whole if they are not there yet."""
    if not path.exists():
        arrays = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.write_whole(path) as file:
            np.savez(file, **arrays)
    with np.load(path) as arrays:
        return dict(arrays)


class Clock:
    """Seconds spent in each stage, added up over interruptions."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.seconds = json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            storage.write_json(self._path, self.seconds)


def claim(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> pathlib.Path:
    """`workdir`, in which the config is recorded.

    Raises:
        ValueError: it holds the stages of another config, or is not on this machine.
        OSError: it cannot be written.
    """
    if storage.is_remote(workdir):
        raise ValueError(f'--workdir={workdir}: needs a local folder; copy it afterwards')
    workdir = pathlib.Path(workdir)
    try:
        if (workdir / 'config.json').exists():
            _check_same(config_files.read(workdir), config, workdir)
    except config_files.DamagedConfig as error:
        log.warning('%s (this command does)', error)
    storage.check_writable(workdir, '--workdir')
    config_files.save(config, workdir)
    return workdir


def _check_same(before: ml_collections.ConfigDict, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises a ValueError for changed fields; warns of those that did not exist when the stages were begun."""
    changed, known = config_files.changes(before, config), config_files.flat_fields(before.to_dict())
    other = [change for name, change in changed.items() if name in known]
    if other:
        raise ValueError(f'{workdir} holds a run with another config: {", ".join(other)}; choose another --workdir or '
                         'delete it')
    if changed:
        log.warning('%s: begun before these fields existed: %s', workdir, ', '.join(changed.values()))
