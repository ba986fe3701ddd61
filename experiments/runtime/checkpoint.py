"""Checkpoints: state, data position, shapes and digests in one step directory. Hides Orbax.

A step directory appears whole or not at all. What is restored is compared with the digests that were saved beside it.
Every way of reading takes the newest readable step and says which it passed over; a checkpoint of another model is an
error that names the first parameter that differs, never a silent fallback.
"""
import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.runtime import exchange, orbax_quirks, storage
from experiments.runtime.digest import digests, json_digest
from experiments.runtime.partition import flatten
from experiments.runtime.retention import Retention

log = logging.getLogger(__name__)

T = TypeVar('T')

# '1': write checkpoints beside the training steps on the CPU as well, where saves otherwise hold the run up.
ASYNCHRONOUS = 'DLC_ASYNCHRONOUS_CHECKPOINTS'

LATE_SECONDS = 70.0  # after which a shared disk shows every machine what one of them sees (NFS: 60 by default)
LOOK_SECONDS = 0.2


def _shapes(state: Any) -> dict[str, list]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flatten(state).items()}


class Damaged(Exception):
    """A checkpoint is not what was saved."""


class Unsaved(OSError):
    """One of several processes could not write its part of a checkpoint. The others wait for it, inside of Orbax, and
    only the end of the job frees them."""


class Checkpointer:
    """Reads and writes `directory/<step>/`.

    Args:
        directory: created on the first save.
        keep: which steps stay: so many of the newest, or a `Retention`.
        read_only: never create or clean anything (sampling, evaluation).
        clean: remove what killed writers left unfinished. Only for the one process group that owns the directory.
        processes: that read and write together, the first of the job among them; None: all, or, of `read_only`, each
            by itself.
        asynchronous: write while training goes on. None: on accelerators, and on the CPU if `ASYNCHRONOUS` is '1'.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | Retention = 2, read_only: bool = False,
                 clean: bool = False, processes: Sequence[int] | None = None,
                 asynchronous: bool | None = None):
        orbax_quirks.ignore_closed_loops()
        directory = storage.resolve(directory)
        self.directory = directory if storage.is_remote(directory) else directory.absolute()
        on_cpu = jax.default_backend() == 'cpu'
        if asynchronous is None:
            asynchronous = not on_cpu or os.environ.get(ASYNCHRONOUS) == '1'
        self._asynchronous = asynchronous and not read_only
        # Arrays leave an accelerator by copy. On the CPU Orbax writes from the very buffer that the next step is given
        # to reuse. jax 0.10.2 leaves one alone that is being read, but promises nothing, so there Orbax gets a copy.
        self._copies = self._asynchronous and on_cpu
        self._writing: int | None = None  # a step handed to Orbax that `wait` has not yet seen on disk
        self._retention = keep if isinstance(keep, Retention) else Retention(keep)
        self._unmeasured = False  # whether it was said that the metric to keep the best by is missing
        # Those that must go on from the same step; a reader of others' runs may be alone in it.
        alone = jax.process_count() == 1 or (read_only and processes is None)
        self._trainers = None if alone else exchange.mesh_of(
            range(jax.process_count()) if processes is None else processes)
        self._is_first = self._trainers is None or exchange.processes_of(self._trainers)[0] == jax.process_index()
        self._several = self._trainers is not None and len(exchange.processes_of(self._trainers)) > 1
        self._failed = threading.Event()  # in this process a save of several, in the background, has failed
        self._unsaved = False  # whether `Unsaved` was raised
        together = ocp.options.MultiprocessingOptions()
        if processes is not None and not read_only:  # Orbax then leaves the folder to us
            if len(processes) == 1:
                orbax_quirks.let_one_of_several_save()
            together = ocp.options.MultiprocessingOptions(active_processes=set(processes),
                                                          barrier_sync_key_prefix='learners')
            self.directory.mkdir(parents=True, exist_ok=True)
        beside = None
        if self._several and self._asynchronous:
            beside = ocp.AsyncOptions(barrier_sync_fn=orbax_quirks.barrier(
                together.active_processes, lambda failure: self._failed.set()))
        options = ocp.CheckpointManagerOptions(
            **({} if read_only else self._retention.options()), create=not read_only and processes is None,
            read_only=read_only, cleanup_tmp_directories=clean, enable_async_checkpointing=self._asynchronous,
            save_root_metadata=not read_only,  # for which a reader too would wait for all processes of the job
            multiprocessing_options=together, async_options=beside)
        self._open = lambda: ocp.CheckpointManager(self.directory, options=options,
                                                   item_names=('state', 'data', 'meta'))
        self._manager = self._open() if not read_only or self.directory.is_dir() else None

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    # ---- Writing -----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, data: Mapping[str, Any] | None = None,
             measured: Mapping[str, float] | None = None) -> None:
        """Writes `state` and the data iterators' positions `data` as `step`.

        `measured`: metrics of this state; where the best checkpoint is kept, the one it is chosen by must be among
        them for this step to be a candidate.

        A step that is on disk, or on its way there, is left alone. An asynchronous save returns before it is finished;
        what went wrong with it is raised by `wait` or logged by the next save.

        Raises:
            OSError: nothing was kept of this step; earlier steps are untouched.
            Unsaved: the same, and the job has to end.
        """
        if step == self._writing or self._agreed(self._holds(step)):
            return
        try:
            self.wait()
        except Unsaved:
            raise
        except OSError as error:
            log.warning('%s (training goes on)', error)
        data = json.loads(json.dumps(dict(data or {})))
        meta = {'shapes': _shapes(state), 'digests': digests(state), 'data': json_digest(data)}
        meta['meta'] = json_digest(meta)
        if self._copies:
            state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else np.array(x), state)
        with self._as_os_error(step):
            # Forced, for the manager may take a step whose save failed for one that it has and quietly do nothing.
            best_by = self._candidate(step, measured or {})
            self._manager.save(step, force=True, metrics=best_by, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)))
            self._writing = step
        if not self._asynchronous:
            self.wait()

    def _candidate(self, step: int, measured: Mapping[str, float]) -> dict[str, float] | None:
        """The metric by which the best checkpoint is kept; None where there is none, or no finite value of it."""
        metric = self._retention.metric
        if not metric:
            return None
        if math.isfinite(measured.get(metric, math.nan)):
            return {metric: float(measured[metric])}
        if not self._unmeasured:
            log.warning('keep=best:%s: no value of it at step %d (there are %s), which is kept as one of the newest '
                        'only; let checkpoint_every be a multiple of eval_every or log_every', metric, step,
                        ', '.join(sorted(measured)) or 'none')
        self._unmeasured = True
        return None

    def wait(self) -> None:
        """Blocks until the last save is on disk, in all processes that write it.

        Raises:
            OSError: it did not get there.
            Unsaved: the same, and the job has to end.
        """
        if self._writing is None:
            return
        with self._as_os_error(self._writing):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._is_first and not self._holds(self._writing):
                raise Damaged('it is not there after it was written')
        if self._several:  # one that failed does not come; the others end by its line (`runtime/processes.py`)
            exchange.everywhere(self._trainers, True)
        self._writing = None

    def check(self) -> None:
        """Raises `Unsaved` if this process, one of several, has failed to write its part of the save under way; it
        waits for nothing."""
        if self._failed.is_set():
            self.wait()

    @contextlib.contextmanager
    def _as_os_error(self, step: int) -> Iterator[None]:
        """Turns whatever a failed write raises (ValueError, OSError or types of their own) into one OSError."""
        try:
            yield
        except Exception as error:
            self._writing, self._unsaved = None, self._several
            self._manager.reload()
            kept = max((s for s in self.steps() if s != step), default=None)
            kind = Unsaved if self._several else OSError
            raise kind(f'could not write checkpoint {step} to {self.directory} ({_first_line(error)}); '
                       + (f'checkpoint {kept} is intact' if kept is not None else 'no earlier checkpoint exists')
                       + '. Free space or fix permissions and run the same command again') from error

    def _holds(self, step: int) -> bool:
        return (self.directory / str(step)).is_dir()

    def _agreed(self, seen: bool) -> bool:
        """What the first of the trainers' processes sees: a shared disk shows a folder to others later, or still shows
        one that is gone."""
        return seen if self._trainers is None else exchange.everywhere(self._trainers, seen or not self._is_first)

    def delete_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: the unreadable ones that `restore` passed over."""
        for later in [s for s in self._candidates() if s > step]:
            self._manager.delete(later)

    # ---- Reading -----------------------------------------------------------------------------------------------------

    def restore(self, like: Any, shardings: Any | None = None, *,
                step: int | None = None) -> tuple[int, Any, dict] | None:
        """The newest readable checkpoint, or that of `step`, as `(step, state, data)`; None if there is none.

        Args:
            like: pytree of arrays or `ShapeDtypeStruct` with the wanted structure.
            shardings: where to put each leaf (any mesh, not only the one it was saved from); None: one device.

        Raises:
            ValueError: the checkpoint is of another model or optimizer, `step` was not kept, or none can be read.
        """
        shardings = shardings if shardings is not None else jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)

        def read(step: int) -> tuple[int, Any, dict]:
            meta = self._meta(step)
            self._check_shapes(step, meta['shapes'], _shapes(like))
            data = self._json(step, 'data')
            if 'data' in meta and json_digest(data) != meta['data']:
                raise Damaged('the position in the data is not the one that was saved')
            state = ocp.StandardCheckpointHandler().restore(self.directory / str(step) / 'state',
                                                            args=ocp.args.StandardRestore(target))
            return step, state, data

        def verify(restored: tuple[int, Any, dict]) -> None:
            _check_digests(self._meta(restored[0]), digests(restored[1]))
        return self._readable(read, step, verify)

    def restore_part(self, name: str, like: Any, shardings: Any, *, step: int | None = None) -> Any | None:
        """The subtree `name`, such as 'params' or 'params/policy', of the newest readable checkpoint or of `step`;
        None if the directory holds none. Nothing else of it is read, and in each process no more than `shardings` give
        to its devices.

        Raises:
            ValueError: the subtree is of another model, `step` was not kept, or no checkpoint can be read.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
        for part in reversed(name.split('/')):
            target = {part: target}

        def read(step: int) -> tuple[int, Any]:
            meta = self._meta(step)
            inside = {path[len(name) + 1:]: x for path, x in meta['shapes'].items() if path.startswith(f'{name}/')}
            self._check_shapes(step, inside, _shapes(like))
            # By the handler, for a `Checkpointer` of Orbax waits for all processes of the job.
            wanted = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                                            partial_restore=True)
            out = ocp.PyTreeCheckpointHandler().restore(self.directory / str(step) / 'state', args=wanted)
            for part in name.split('/'):
                out = out[part]
            return step, out

        def verify(restored: tuple[int, Any]) -> None:
            step, out = restored
            _check_digests(self._meta(step), {f'{name}/{path}': x for path, x in digests(out).items()})
        restored = self._readable(read, step, verify)
        return None if restored is None else restored[1]

    def shapes(self, step: int | None = None) -> dict[str, list]:
        """{path: [shape, name of the dtype]} of what the newest readable checkpoint, or that of `step`, holds; {} if
        there is none."""
        return self._readable(lambda step: self._meta(step)['shapes'], step) or {}

    def _readable(self, read: Callable[[int], T], step: int | None,
                  verify: Callable[[T], None] = lambda out: None) -> T | None:
        """`read` of `step`, or of the newest step for which it works, in all of the trainers' processes; one warning
        names those passed over.

        Args:
            read: reads by itself in every process, for what it cannot read others may.
            verify: raises for what was read and is not to be used; all processes call it together.

        Raises:
            ValueError: `read` raised one of `_OtherModel`, or worked for no step; `step` is not on disk.
        """
        if step is not None:
            self.check_kept(step)
        failures = []
        for candidate in self._candidates() if step is None else [step]:
            failure = ''
            try:
                with orbax_quirks.quiet():
                    out = read(candidate)
            except _OtherModel as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # Orbax and TensorStore have no common type for what they cannot read
                failure = _first_line(error)
            if self._trainers is not None and not exchange.everywhere(self._trainers, not failure):
                failure = failure or 'another process cannot read it'
            try:
                if not failure:
                    verify(out)
            except Exception as error:
                failure = _first_line(error)
            if failure:
                failures.append(f'{candidate} ({failure})')
                continue
            if failures:
                log.warning('%s: unreadable checkpoint %s; continuing from %d', self.directory, ', '.join(failures),
                            candidate)
            return out
        if failures:
            cure = 'delete the directory to start again' if step is None else 'choose another --step'
            raise ValueError(f'{self.directory}: no readable checkpoint: {", ".join(failures)}; {cure}')
        return None

    def _candidates(self) -> list[int]:
        """Steps on disk, newest first, as the first of the trainers' processes sees them; the others wait until they
        see them too."""
        steps = self.steps()[::-1]
        if self._trainers is None:
            return steps
        first = exchange.processes_of(self._trainers)[0]
        steps = json.loads(exchange.broadcast(self._trainers, json.dumps(steps).encode(), first))
        self._look_until(lambda: set(self.steps()) == set(steps))
        return steps

    def _look_until(self, seen: Callable[[], bool]) -> None:
        """Looks at the folder anew until `seen()`, as long as a shared disk may take to show it."""
        deadline = time.monotonic() + LATE_SECONDS
        while not seen() and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            if self._manager is None:
                self._manager = self._open() if self.directory.is_dir() else None
            else:
                self._manager.reload()

    def check_kept(self, step: int) -> None:
        """Raises a ValueError where `step` is not on disk. In a job of several processes another may have seen it, so
        this one waits for it."""
        if jax.process_count() > 1:
            self._look_until(lambda: step in self.steps())
        if step not in self.steps():
            kept = ', '.join(map(str, self.steps())) or 'none'
            raise ValueError(f'--step={step}: {self.directory} holds steps {kept}; what is kept of a run is its '
                             'keep_checkpoints, keep_every and keep')

    def _meta(self, step: int) -> dict[str, Any]:
        """Shapes and digests of a step. One that was saved without digests has `shapes` alone."""
        meta = self._json(step, 'meta')
        if set(meta) == {'shapes'}:
            return meta
        check = meta.pop('meta', None)
        if set(meta) != {'shapes', 'digests', 'data'} or check != json_digest(meta):
            raise Damaged('its list of shapes and digests is not the one that was saved')
        return meta

    def _json(self, step: int, item: str) -> dict[str, Any]:
        # Not by way of the manager, which waits after each item for all processes, and so for those that failed.
        return ocp.JsonCheckpointHandler().restore(self.directory / str(step) / item, args=ocp.args.JsonRestore())

    def _check_shapes(self, step: int, saved: dict, wanted: dict) -> None:
        for name in sorted(set(saved) | set(wanted)):
            on_disk, in_config = saved.get(name), wanted.get(name)
            if on_disk != in_config:
                raise _OtherModel(f'{self.directory}/{step}: {name} is {_describe(on_disk)} in the checkpoint but '
                                  f'{_describe(in_config)} in this config; '
                                  'use the config it was trained with, or another --workdir')

    def close(self) -> None:
        """Waits for what is being written, unless that cannot be finished."""
        if self._manager and not self._unsaved:
            self._manager.close()


class _OtherModel(Exception):
    """A readable checkpoint of another model."""


def _check_digests(meta: Mapping[str, Any], digests_read: Mapping[str, str]) -> None:
    for name, value in digests_read.items():
        if 'digests' in meta and meta['digests'].get(name) != value:
            raise Damaged(f'{name} is not what was saved')


def _describe(entry: list | None) -> str:
    return 'absent' if entry is None else f'{entry[1]}{tuple(entry[0])}'


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
