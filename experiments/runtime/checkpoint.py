"""Checkpoints: state, data position and shapes in one step directory. Hides Orbax.

A step directory appears whole or not at all. `restore` takes the newest readable one and says which it passed over;
a checkpoint of another model is an error that names the first parameter that differs, never a silent fallback.
"""
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.runtime import storage
from experiments.runtime.partition import flatten

log = logging.getLogger(__name__)


def _shapes(state: Any) -> dict[str, list]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flatten(state).items()}


class Checkpointer:
    """Reads and writes `directory/<step>/`.

    Args:
        directory: created on the first save.
        keep: how many of the newest steps stay.
        read_only: never create or clean anything (sampling, evaluation).
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        directory = storage.resolve(directory)
        self.directory = directory if storage.is_remote(directory) else directory.absolute()
        # Asynchronous only where arrays leave the device by copy: on CPU Orbax may write from the very buffer that the
        # next step has been donated.
        self._asynchronous, self._saving = jax.default_backend() != 'cpu' and not read_only, None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only,
            enable_async_checkpointing=self._asynchronous)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=('state', 'data', 'meta')) if (
                not read_only or self.directory.is_dir()) else None

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, step: int, state: Any, data: Mapping[str, Any] | None = None) -> None:
        """Writes `state` and the data iterators' positions `data` as `step`; a step already there is left alone.

        Raises:
            OSError: nothing was kept of this step; earlier steps are untouched.
        """
        if self._holds(step):
            return
        try:
            # Forced, for the manager may take a step whose save failed for one that it has and quietly do nothing.
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data or {})),
                meta=ocp.args.JsonSave({'shapes': _shapes(state)})))
            self._manager.check_for_errors()
            self._saving = step
            if not self._asynchronous:
                self.wait()
        except Exception as error:  # Orbax and TensorStore report a full disk as ValueError, OSError or their own types
            self._saving = None
            self._manager.reload()
            kept = max((s for s in self.steps() if s != step), default=None)
            raise OSError(f'could not write checkpoint {step} to {self.directory} ({_first_line(error)}); '
                          + (f'checkpoint {kept} is intact' if kept is not None else 'no earlier checkpoint exists')
                          + '. Free space or fix permissions and run the same command again') from error

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
            OSError: it did not get there.
        """
        self._manager.wait_until_finished()
        if self._saving is not None and not self._holds(self._saving):
            raise OSError(f'checkpoint {self._saving} is not in {self.directory} after it was written')
        self._saving = None

    def _holds(self, step: int) -> bool:
        return (self.directory / str(step)).is_dir()

    def restore(self, like: Any, shardings: Any | None = None) -> tuple[int, Any, dict] | None:
        """The newest readable checkpoint as `(step, state, data)`, or None if the directory holds none.

        Args:
            like: pytree of arrays or `ShapeDtypeStruct` with the wanted structure.
            shardings: where to put each leaf (any mesh, not only the one it was saved from); None: one device.

        Raises:
            ValueError: the checkpoint is of another model or optimizer, or none on disk can be read.
        """
        shardings = shardings if shardings is not None else jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
        failures = []
        for step in reversed(self.steps()):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            except Exception as error:
                failures.append(f'{step} ({_first_line(error)})')
                continue
            self._check_shapes(step, meta['shapes'], _shapes(like))
            try:
                out = self._manager.restore(step, args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()))
            except Exception as error:
                failures.append(f'{step} ({_first_line(error)})')
                continue
            if failures:
                log.warning('%s: unreadable checkpoint %s; continuing from %d',
                            self.directory, ', '.join(failures), step)
            return step, out.state, out.data
        if failures:
            raise ValueError(f'{self.directory}: no readable checkpoint: {", ".join(failures)}; '
                             'delete the directory to start again')
        return None

    def restore_part(self, name: str, like: Any, shardings: Any) -> Any | None:
        """The subtree `name`, such as 'params' or 'params/policy', of the newest checkpoint; None if there is none.

        Nothing else of it is read.

        Raises:
            ValueError: the subtree is of another model.
        """
        if not self.steps():
            return None
        step, parts, saved = self.steps()[-1], name.split('/'), self.shapes()
        inside = {path[len(name) + 1:]: shape for path, shape in saved.items() if path.startswith(f'{name}/')}
        self._check_shapes(step, inside, _shapes(like))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
        for part in reversed(parts):
            target = {part: target}
        restore = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                                         partial_restore=True)
        out = ocp.PyTreeCheckpointer().restore(self.directory / str(step) / 'state', restore)
        for part in parts:
            out = out[part]
        return out

    def shapes(self) -> dict[str, list]:
        """{path: [shape, name of the dtype]} of what the newest checkpoint holds; {} if there is none."""
        if not self.steps():
            return {}
        meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.steps()[-1], args=meta).meta['shapes']

    def delete_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: the unreadable ones that `restore` passed over."""
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def _check_shapes(self, step: int, saved: dict, wanted: dict) -> None:
        for name in sorted(set(saved) | set(wanted)):
            a, b = saved.get(name), wanted.get(name)
            if a != b:
                raise ValueError(f'{self.directory}/{step}: {name} is {_describe(a)} in the checkpoint but '
                                 f'{_describe(b)} in this config; '
                                 'use the config it was trained with, or another --workdir')

    def close(self) -> None:
        if self._manager:
            self._manager.close()


def _describe(entry: list | None) -> str:
    return 'absent' if entry is None else f'{entry[1]}{tuple(entry[0])}'


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
