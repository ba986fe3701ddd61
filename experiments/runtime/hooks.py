"""What the loop does beside its steps: metrics that wait on the device, their log, and checkpoints."""
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.runtime.checkpoint import Checkpointer, Unsaved
from experiments.runtime.lease import Taken
from experiments.runtime.metrics import MetricsWriter
from experiments.runtime.state import TrainState

log = logging.getLogger(__name__)

PENDING = 'pending_metrics'  # where a checkpoint's data position holds them


class Metrics:
    """Metrics of the steps since the last report, left on the device until somebody asks.

    Fetching them a step late keeps the device busy: step n + 1 is already running when step n is read.

    Args:
        pending: what `get_state` gave when the run was saved.
    """

    def __init__(self, pending: Sequence[tuple[int, Mapping[str, Any]]] = ()):
        self._pending: list[tuple[int, Mapping[str, Any]]] = [(step, row) for step, row in pending]
        self._noted: dict[str, tuple[int, float]] = {}

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._pending.append((step, metrics))

    def take(self, *, leave: int = 0) -> tuple[int, dict[str, float]] | None:
        """Means over the pending steps but the newest `leave`: `(last step, means)`, or None if there are none.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        ready = self._fetched(self._pending[:len(self._pending) - leave])
        if not ready:
            return None
        self._pending = self._pending[len(ready):]
        step, newest = ready[-1]
        means = {name: float(np.mean([row[name] for _, row in ready])) for name in newest}
        self.note(step, means)
        return step, means

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Remembers what was measured of the state after `step`."""
        self._noted |= {name: (step, float(value)) for name, value in values.items()}

    def measured(self, step: int) -> dict[str, float]:
        """What is known of the state after `step`: evaluations of it, and means over the steps before (whose last
        report is a step late). Older values are left out."""
        return {name: value for name, (at, value) in self._noted.items() if step - 1 <= at <= step}

    @property
    def names(self) -> set[str]:
        """Of the metrics that are pending."""
        return {name for _, row in self._pending for name in row}

    def check(self) -> None:
        """Waits for every pending step and raises if a loss was not finite."""
        self._pending = self._fetched(self._pending)

    def get_state(self) -> list[list]:
        """The pending steps as JSON values, so that a resumed run reports the same means."""
        self.check()
        return [[step, dict(row)] for step, row in self._pending]

    @staticmethod
    def _fetched(pending: Sequence[tuple[int, Mapping[str, Any]]]) -> list[tuple[int, dict[str, float]]]:
        rows = jax.device_get([row for _, row in pending])
        # As Python floats, which JSON keeps exactly.
        out = [(step, {name: float(x) for name, x in row.items()}) for (step, _), row in zip(pending, rows)]
        for step, row in out:
            check_finite(step, row)
        return out


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
    for name in ('loss', 'grad_norm'):
        if name in metrics and not math.isfinite(float(metrics[name])):
            raise FloatingPointError(f'{name} is {float(metrics[name])} at step {step}; the last good checkpoint is '
                                     'kept. Lower optimizer.learning_rate or set optimizer.clip_norm, then run again')


class Log:
    """Every `every` steps: means of the metrics, seconds a step and how many of them went by waiting for the batch, to
    `writer` and the bar. The first report's seconds include compilation."""

    def __init__(self, writer: MetricsWriter | None, every: int):
        self.writer, self.every = writer, every
        self.last: dict[str, float] = {}
        self._since, self._count, self._waited = time.monotonic(), 0, 0.0

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time that takes is what the step waited for."""
        started = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - started
        self._count += 1
        return batch

    def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
        if step % self.every == 0:
            self.report(metrics.take(leave=1))

    def report(self, row: tuple[int, dict[str, float]] | None) -> None:
        if row is None:
            return
        step, values = row
        now = time.monotonic()
        values['seconds_per_step'] = (now - self._since) / max(self._count, 1)
        values['seconds_waiting_for_batch'] = self._waited / max(self._count, 1)
        self._since, self._count, self._waited, self.last = now, 0, 0.0, values
        if self.writer:
            self.writer.write(step, values)


class Save:
    """Every `every` steps: a checkpoint, after making sure that what is saved is finite.

    A save that fails (a full disk) is reported and tried again at the next turn; training goes on, for what has been
    computed is still in memory. Of several processes all end then: the others wait for the one that failed.

    Args:
        batches: the stream, whose position is saved.
        every: steps; 0: only at the end and on a signal.
        before: called before each save; raises `Taken` where another trainer owns the place now.
    """

    def __init__(self, checkpointer: Checkpointer, batches: Any, every: int, *,
                 before: Callable[[], None] = lambda: None):
        self.checkpointer, self.batches, self.every, self._before = checkpointer, batches, every, before

    def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
        self.checkpointer.check()
        if self.every and step % self.every == 0:
            metrics.check()
            try:
                self.save(step, state, metrics)
            except (Taken, Unsaved):
                raise
            except OSError as error:
                log.warning('%s (training goes on; next try in %d steps)', error, self.every)

    def save(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Begins a checkpoint of `step`, which may be written while training goes on."""
        self._before()
        self.checkpointer.save(step, state, self.batches.get_state() | {PENDING: metrics.get_state()},
                               metrics.measured(step))

    def finish(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """A checkpoint of `step` that is on disk when this returns.

        Raises:
            FloatingPointError: a loss was not finite.
            OSError: it could not be written.
        """
        self.save(step, state, metrics)
        try:
            self.checkpointer.wait()
        except Unsaved:
            raise
        except OSError as error:  # of a save that was begun earlier; there may be room now
            log.warning('%s; trying once more', error)
            self.save(step, state, metrics)
            self.checkpointer.wait()
