"""Batches made by one side while the other trains, with bounded staleness and a fixed order.

Version v is the policy after training on v batches. Batch i, which the learner trains on at version i, is generated
with version max(0, i - S), S being `max_staleness`: generation of batch i is admitted once that version is published,
and no batch is ever thrown away (throwing away the late ones would favour prompts that are quickly answered). So

    S = 0   generate, train, generate, train: the synchronous loop, bit for bit
    S = 1   one batch in flight: the asynchronous loop of the paper. Batches 0 and 1 come from version 0, then one
    behind

As a batch depends on its index and its version alone, the threaded stream and the serial one give the same sequence,
and a resumed run the same as one that was never stopped.
"""
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

from rlhf_jax.rollout import batch as batch_lib
from rlhf_jax.rollout.batch import Batch

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1  # between two calls of `check` while a batch is awaited


class Generate(Protocol):
    """Prompts, completions and rewards of batch `index` under `params`: a pure function of its arguments.

    `policy_version` may be left out: it is `version` at every token then. A sampler that takes up new weights on the
    way (from the transport's `newest`) returns its own, token by token, and gives up bit-exactness for freshness.
    `seconds`, a dict, replaces times that the stream would measure itself (a generator elsewhere knows its own). A
    `close()`, if there is one, is called when the stream closes.
    """

    def __call__(self, params: Any, *, index: int, version: int) -> Mapping[str, Any]: ...


class Weights(Protocol):
    """Published versions of the policy: see `rlhf_jax.rollout.publish`."""

    def publish(self, version: int, params: Any) -> None: ...

    def fetch(self, version: int) -> Any: ...

    def release(self, before: int) -> None: ...


@dataclasses.dataclass
class _Item:
    batch: Batch
    seconds: dict[str, float]


class RolloutStream(Iterator[Batch]):
    """The learner's stream of batches. `publish` the policy before every `next`, version 0 before the first:

        stream.publish(0, params)
        for n in range(num_batches):
            params = train(params, next(stream))
            stream.publish(n + 1, params)

    Draw from it directly: a prefetching wrapper would ask for batches before their weights exist.

    Args:
        generate: makes a batch; called in a thread of its own unless `threaded` is False.
        weights: where versions are published to and fetched from.
        max_staleness: S, in versions.
        threaded: False generates within `next`: the same batches without overlap.
        late: do not ask for a batch of the newest version before it is due. For a `generate` that delivers, while the
            learner trains, what it has been sent the weights for; only with `threaded=False`.
        newest: generate with the newest version there is rather than with exactly max(0, i - S). Staleness is bounded
            all the same and lower where the learner waits, but depends on timing, and so does the sequence.
        num_batches: of the whole run; none beyond are generated. None: endless.
        timeout: seconds `next` waits for a batch (a reward that hangs); None: for ever.
        check: called a few times a second while `next` waits; what it raises is raised there (the process has been
            asked to stop).
        clock: seconds, for the measured times.

    Attributes:
        metrics: of the batch handed out last: `staleness`, versions; `in_flight`, batches ready and waiting after it;
            and in seconds `learner_wait` (the learner, for it), `generator_wait` (the generator, for admission), `load`
            (weights), `generate`, `publish` (of the version it is trained at).

    Raises:
        ValueError: a negative or fractional `max_staleness`, or another argument that cannot work.
    """

    def __init__(self, generate: Generate, weights: Weights, *, max_staleness: int = 0, threaded: bool = True,
                 late: bool = False, newest: bool = False, num_batches: int | None = None, timeout: float | None = None,
                 check: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter):
        if max_staleness != int(max_staleness) or max_staleness < 0:
            raise ValueError(f'max_staleness={max_staleness} must be a whole number of at least 0')
        if num_batches is not None and num_batches < 0:
            raise ValueError(f'num_batches={num_batches} must not be negative')
        if timeout is not None and not timeout > 0:
            raise ValueError(f'timeout={timeout} must be positive')
        self._generate, self._weights = generate, weights
        if late and threaded:
            raise ValueError('late=True needs threaded=False')
        self._bound, self._threaded, self._late, self._take_newest = int(max_staleness), threaded, late, newest
        self._end, self._timeout, self._check, self._clock = num_batches, timeout, check, clock
        self.metrics: dict[str, float] = {}
        # Guarded by `_changed`, and shared with the worker:
        self._changed = threading.Condition()
        self._ready: collections.deque[_Item] = collections.deque()
        self._base = 0            # version this run began (or resumed) at: nothing older can be had
        self._next = 0            # index of the batch that the learner draws next
        self._produced = 0        # index of the batch that is generated next
        self._published = -1      # newest version
        self._publish_seconds = 0.0
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    # ---- The learner's side ----

    def publish(self, version: int, params: Any) -> None:
        """Hands over the policy as it stands after `version` batches; `params` are copied and may be donated then.

        Raises:
            ValueError: not the version that is due: that of the number of batches drawn so far.
        """
        if version != self._next or version == self._published:
            raise ValueError(f'version={version} cannot be published: {self._next} batches have been drawn and version '
                             f'{self._published} is the newest, so version {self._next} is due, once')
        jax.block_until_ready(params)  # so that what is measured below is the publishing and not the training step
        start = self._clock()
        self._weights.publish(version, params)
        with self._changed:
            self._published, self._publish_seconds = version, self._clock() - start
            self._changed.notify_all()

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            RuntimeError: the version that is due has not been published, or the stream is closed.
            TimeoutError: no batch came within `timeout`.
            Exception: what `generate` raised, after the batches it had made before.
        """
        if self._closed:
            raise RuntimeError('the rollout stream is closed')
        if self._next == self._end:
            raise StopIteration
        if self._published != self._next:
            newest = self._published if self._published >= 0 else 'none'
            raise RuntimeError(f'version {self._next} must be published before batch {self._next} is drawn; the newest '
                               f'is {newest}')
        start = self._clock()
        if self._threaded:
            self._start()
            self._wait(lambda: bool(self._ready), self._timeout, self._check)
        else:
            while self._admitted():
                self._produce()
        with self._changed:
            item = self._ready.popleft()
            index, self._next = self._next, self._next + 1
            in_flight = len(self._ready)
            needed = self._version(self._produced)
        self._weights.release(needed)  # so that no batch's weights stay in memory beside the step that it trains
        self.metrics = {'staleness': batch_lib.staleness(item.batch, index), 'in_flight': in_flight,
                        'learner_wait': self._clock() - start, **item.seconds, 'publish': self._publish_seconds}
        return item.batch

    @property
    def produced(self) -> int:
        """Index of the batch that is generated next."""
        return self._produced

    def get_state(self, patience: float | None = None) -> dict:
        """Position and batches in flight, as JSON values: what a checkpoint of the learner's state at this point needs.

        Batches that come from versions older than the learner's are part of it, for those versions will be gone; it
        waits for those not yet finished. Later ones are generated again. Their number is at most S.

        Args:
            patience: seconds to wait for them; None: the stream's `timeout`.

        Raises:
            TimeoutError: they were not finished in that time. Without them the sequence would go on differently.
            Exception: what `generate` raised, if it did before these batches were made.
        """
        waiting = self._in_flight()
        while self._late and len(self._ready) < waiting:
            self._produce()
        self._wait(lambda: len(self._ready) >= waiting, self._timeout if patience is None else patience)
        with self._changed:
            saved = [item.batch for item in list(self._ready)[:waiting]]
        return {'next': self._next, 'batches': [batch_lib.to_json(b) for b in saved]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; before anything is published. The version due next is the number of batches drawn.

        Raises:
            ValueError: a saved batch would exceed `max_staleness` (which was larger when it was generated), or is no
                batch (`rollout.batch.check`).
            RuntimeError: the stream is already in use.
        """
        if self._published >= 0 or self._thread is not None:
            raise RuntimeError('set_state must come before the first publish')
        batches = [batch_lib.from_json(saved) for saved in state['batches']]
        for i, b in enumerate(batches, state['next']):
            batch_lib.check(b, f'batch {i} of the checkpoint')
            if (lag := batch_lib.staleness(b, i)) > self._bound:
                raise ValueError(f'max_staleness={self._bound}, but batch {i} of the checkpoint will be {lag} versions '
                                 f'old; resume with max_staleness={lag} or more')
        self._base = self._next = int(state['next'])
        self._produced = self._next + len(batches)
        self._ready.extend(_Item(b, {'generator_wait': 0.0, 'load': 0.0, 'generate': 0.0}) for b in batches)

    def finish(self) -> None:
        """Tells generators elsewhere, after `close`, that the run is over and that nobody will continue it."""
        if finish := getattr(self._generate, 'finish', None):
            finish()

    def leave_open(self) -> None:
        """Lets generators elsewhere wait for a learner that is started anew, when this one closes."""
        if leave_open := getattr(self._generate, 'leave_open', None):
            leave_open()

    def close(self, patience: float | None = None) -> None:
        """Stops admission and waits until the batch being generated is finished.

        Args:
            patience: seconds to wait for it at most; None: the stream's `timeout`.
        """
        patience = self._timeout if patience is None else patience
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if close := getattr(self._generate, 'close', None):
            close()
        if self._thread is not None:
            self._thread.join(patience)
            if self._thread.is_alive():
                log.warning('rollout: batch %d is still being generated after %s s', self._produced, patience)

    def __enter__(self) -> 'RolloutStream':
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    # ---- The generator's side ----

    def _version(self, index: int) -> int:
        return max(self._base, index - self._bound)

    def _admitted(self) -> bool:
        """Whether the next batch may be generated now."""
        if self._end is not None and self._produced >= self._end:
            return False
        newest = self._published - (self._late and self._produced > self._next)
        return self._version(self._produced) <= newest

    def _in_flight(self) -> int:
        """How many batches from the next on come from versions before the learner's."""
        if self._next > self._base:
            count = self._bound
        else:  # nothing drawn yet: all but restored batches can come from the version the run starts with
            count = sum(batch_lib.staleness(item.batch, self._base) > 0 for item in self._ready)
        return count if self._end is None else min(count, self._end - self._next)

    def _produce(self, waited: float = 0.0) -> None:
        index = self._produced
        version = self._published if self._take_newest else self._version(index)
        start = self._clock()
        try:
            params = self._weights.fetch(version)
            self._weights.release(version)  # versions only go up
            loaded = self._clock()
            batch = dict(self._generate(params, index=index, version=version))
            measured = batch.pop('seconds', {})
            batch = jax.device_get(batch)
            batch_lib.complete(batch, version)
            batch_lib.check(batch, f'batch {index}')
        except BaseException as error:
            error.add_note(f'while generating batch {index} with version {version}')
            raise
        seconds = {'generator_wait': waited, 'load': loaded - start, 'generate': self._clock() - loaded} | measured
        with self._changed:
            self._ready.append(_Item(batch, seconds))
            self._produced += 1
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while True:
                start = self._clock()
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._admitted())
                    if self._closed:
                        return
                self._produce(self._clock() - start)
        except BaseException as error:  # raised where the batch is missed
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name='rollout', daemon=True)
            self._thread.start()

    def _wait(self, ready: Callable[[], bool], timeout: float | None, check: Callable[[], None] | None = None) -> None:
        """Until `ready`, an error of the worker (raised), the stream's end, the time-out or an error of `check`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not (ready() or self._error or self._closed):
                left = LOOK_SECONDS if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f'batch {self._produced} was not generated within timeout={timeout} s')
                self._changed.wait(min(left, LOOK_SECONDS))
                if check:
                    check()
            if not ready():
                raise self._error or RuntimeError('the rollout stream was closed while a batch was awaited')
