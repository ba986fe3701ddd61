"""Batches on the devices before they are needed."""
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from experiments.runtime.placement import check_replicas, place_batch
from experiments.runtime.signals import signals

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1    # between two looks at whether the other side is still wanted
CLOSE_SECONDS = 2.0   # that a stream gets to finish the batch it is reading

T = TypeVar('T')


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
        self._state, self._stop = batches.get_state(), threading.Event()
        self._thread: threading.Thread | None = None
        self._checked = False  # that devices with the same rows have got the same ones

    def set_state(self, state: Mapping) -> None:
        if self._thread is not None:
            raise RuntimeError('set_state must come before the first batch')
        self._batches.set_state(state)
        self._state = state

    def get_state(self) -> dict:
        return self._state

    def _work(self) -> None:
        item: object = None
        while not (self._stop.is_set() or isinstance(item, BaseException)):
            try:
                item = (place_batch(next(self._batches), self._sharding), self._batches.get_state())
            except BaseException as error:  # handed to the consumer, which raises it where the batch is missed
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=LOOK_SECONDS)
                    break
                except queue.Full:
                    continue

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        """The next batch.

        Raises:
            Interrupted: a signal came while there was none (in a job of one process; those of a larger one leave
                together, between two steps).
            Exception: what the stream raised.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name='prefetch', daemon=True)
            self._thread.start()
        item = None
        while item is None:
            try:
                item = self._queue.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if jax.process_count() == 1:
                    signals.check()
        if isinstance(item, BaseException):
            raise item
        batch, self._state = item
        if not self._checked:
            check_replicas(batch)
            self._checked = True
        return batch

    def close(self) -> None:
        """Ends the thread; a stream that does not return from reading is left behind in it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                log.warning('the data stream has not returned within %g s; it is left behind', CLOSE_SECONDS)


def ahead(compute: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """`compute` of each item in turn, in a thread: the next item is computed while the caller uses the result before.

    Programs are begun by that one thread, so that several devices get them in one order.
    """
    with ThreadPoolExecutor(1, thread_name_prefix='ahead') as thread:
        running: Future[T] | None = None
        try:
            for item in items:
                begun = thread.submit(compute, item)
                if running is not None:
                    yield running.result()
                running = begun
            if running is not None:
                yield running.result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
