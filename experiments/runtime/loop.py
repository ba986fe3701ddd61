"""One loop for every trained model.

    state = run(state, step, batches, hooks, num_steps)

Encoder, generator and code model differ in their step and their stream, not in their loop. What happens beside the
step (logging, checkpoints, evaluation, resets, weight publishing) is a hook.
"""
import logging
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.metrics import MetricsWriter
from experiments.runtime.state import TrainState

log = logging.getLogger(__name__)

Step = Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]]


class Hook(Protocol):
    """Called after every step. May return a state to put in place of the current one; None leaves it."""

    def __call__(self, step: int, state: TrainState, metrics: 'Metrics') -> TrainState | None: ...


class Stopped(SystemExit):
    """SIGTERM or SIGINT was answered. Exit status 0 where what was done is saved and the same command continues."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(status)
        self.message = message


class Metrics:
    """Metrics of the steps since the last report, left on the device until somebody asks.

    Fetching them a step late keeps the device busy: step n + 1 is already running when step n is read.
    """

    def __init__(self):
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._pending.append((step, metrics))

    def take(self, *, leave: int = 0) -> tuple[int, dict[str, float]] | None:
        """Means over the pending steps but the newest `leave`: `(last step, means)`, or None if there are none.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        ready = self._pending[:len(self._pending) - leave]
        if not ready:
            return None
        values = jax.device_get([metrics for _, metrics in ready])
        for (step, _), row in zip(ready, values):
            check_finite(step, row)
        self._pending = self._pending[len(ready):]
        return ready[-1][0], {name: float(np.mean([row[name] for row in values])) for name in values[-1]}

    def check(self) -> None:
        """Waits for every pending step and raises if a loss was not finite."""
        for step, metrics in self._pending:
            check_finite(step, jax.device_get(metrics))


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
    for name in ('loss', 'grad_norm'):
        if name in metrics and not math.isfinite(float(metrics[name])):
            raise FloatingPointError(f'{name} is {float(metrics[name])} at step {step}; the last good checkpoint is '
                                     'kept. Lower optimizer.learning_rate or set optimizer.clip_norm, then run again')


class Prefetch:
    """Places batches on the devices ahead of use, in a thread. `get_state` is the position after the last batch handed
    out.

    Args:
        batches: iterator with `get_state` and `set_state`; each batch holds this process's rows.
        sharding: of every array's leading axis.
        depth: how many batches may be on their way.
    """

    def __init__(self, batches: Iterator[dict], sharding: jax.sharding.Sharding, *, depth: int = 2):
        self._batches, self._sharding = batches, sharding
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._state, self._stop, self._thread = batches.get_state(), threading.Event(), None

    def set_state(self, state: Mapping[str, Any]) -> None:
        if self._thread is not None:
            raise RuntimeError('set_state must come before the first batch')
        self._batches.set_state(state)
        self._state = state

    def get_state(self) -> dict:
        return self._state

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict:
        return {name: jax.make_array_from_process_local_data(self._sharding, x) for name, x in batch.items()}

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                item = (self._place(next(self._batches)), self._batches.get_state())
                while not self._stop.is_set():
                    try:
                        self._queue.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
        except BaseException as error:  # handed to the consumer, which raises it where the batch is missed
            self._queue.put(error)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        batch, self._state = item
        return batch

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between steps. A second signal is not caught."""

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        self.received = number
        self.__exit__()

    def __exit__(self, *unused):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def agreed(self) -> bool:
        """Whether any process got a signal (they must all leave the loop at the same step)."""
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils
        return bool(multihost_utils.process_allgather(np.asarray(self.received is not None)).any())


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

    def __call__(self, step, state, metrics):
        if step % self.every:
            return None
        self.report(metrics.take(leave=1))
        return None

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
    computed is still in memory.
    """

    def __init__(self, checkpointer: Checkpointer, batches: Any, every: int):
        self.checkpointer, self.batches, self.every = checkpointer, batches, every

    def __call__(self, step, state, metrics):
        if self.every and step % self.every == 0:
            metrics.check()
            try:
                self.save(step, state)
            except OSError as error:
                log.warning('%s (training goes on; next try in %d steps)', error, self.every)
        return None

    def save(self, step: int, state: TrainState) -> None:
        self.checkpointer.save(step, state, self.batches.get_state())


def run(state: TrainState, step: Step, batches: Iterator[Any], hooks: Sequence[Hook], num_steps: int, *,
        save: Save | None = None, log_hook: Log | None = None, name: str = 'train', stop_every: int = 1) -> TrainState:
    """Runs `step` until `num_steps` steps have been taken in all, from wherever `state` stands.

    Order, which resuming bit for bit depends on: a batch is drawn, the step runs on it, hooks see the new state, and
    only then may a checkpoint record that state together with the position after that batch.

    Args:
        state: donated; use only what is returned.
        step: `(state, batch) -> (state, metrics)`; jitted, `metrics` scalars including `loss`.
        batches: endless iterator; with `save`, also `get_state`.
        hooks: called in order after every step.
        num_steps: total, counted in `state.step`.
        save, log_hook: the two hooks that also act at the end and on a signal; they run after `hooks`.
        name: shown on the progress bar.
        stop_every: with several processes, how often they ask each other whether to stop.

    Raises:
        FloatingPointError: a loss was not finite; nothing after the last good checkpoint has been saved.
        Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    start = int(state.step)
    metrics = Metrics()
    bar = tqdm(total=num_steps, initial=start, desc=name, unit='step', disable=jax.process_index() != 0,
               mininterval=0.5, dynamic_ncols=True)
    with StopSignal() as stop, bar:
        try:
            for n in range(start + 1, num_steps + 1):
                with jax.profiler.StepTraceAnnotation(name, step_num=n):
                    state, values = step(state, log_hook.next(batches) if log_hook else next(batches))
                metrics.push(n, values)
                # The last steps are reported after the loop, whole: a step late there is nothing more to wait for.
                own = (log_hook if n < num_steps else None, save)
                for hook in (*hooks, *(h for h in own if h)):
                    replaced = hook(n, state, metrics)
                    state = state if replaced is None else replaced
                bar.update()
                if log_hook and log_hook.last:
                    bar.set_postfix(loss=f"{log_hook.last['loss']:.4g}", refresh=False)
                if n % stop_every == 0 and stop.agreed():
                    metrics.check()
                    if save:
                        save.save(n, state)
                        save.checkpointer.wait()
                    raise Stopped(f'{name}: stopped by signal at step {n} of {num_steps}, state saved; '
                                  'run the same command to continue')
            metrics.check()
            if log_hook:
                log_hook.report(metrics.take())
            if save and start < num_steps:
                save.save(num_steps, state)
                save.checkpointer.wait()
        finally:
            if hasattr(batches, 'close'):
                batches.close()
    return state
