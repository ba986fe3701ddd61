"""A learner and generators in processes of their own, with a folder between them.

    learner      remote = Remote(folder / 'batches', weights=Files(folder / 'weights', keep=S + 1), max_staleness=S)
                 stream = RolloutStream(remote, remote, max_staleness=S)          # and on as with one process
    generator    serve(generate, Files(folder / 'weights', keep=S + 1), folder / 'batches')

The order is that of one process: batch i comes from version max(0, i - S) and from nothing else, so the sequence is the
same bit for bit whoever generates it. A generator that is killed is simply started again: it goes on at the first batch
that is not there. A learner that is killed resumes from its checkpoint, with the batches in flight that this holds, and
opens a new `attempt`; what generators still deliver to the attempt before is ignored.
"""
import dataclasses
import json
import os
import pathlib
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from rlhf_jax.rollout import batch as batch_lib
from rlhf_jax.rollout.publish import write
from rlhf_jax.rollout.stream import Generate, Weights

# What the first process of a job gives, in all of them; the others give None. One process needs none of it.
Share = Callable[[bytes | None], bytes]


def _of_one_process(payload: bytes | None) -> bytes:
    assert payload is not None  # the only process of a job is its first
    return payload


@dataclasses.dataclass(frozen=True)
class Request:
    """What the learner asks for, in `request.json`.

    Attributes:
        attempt: counts the learner's starts.
        base: the version it started with; nothing older can be had.
        first: index of the first batch that it lacks.
        max_staleness: S.
        closed: it wants no more; generators leave.
        finished: and nobody will want more: the run is over. A learner that was merely stopped comes back.
    """
    attempt: int
    base: int
    first: int
    max_staleness: int
    closed: bool = False
    finished: bool = False

    def version(self, index: int) -> int:
        return max(self.base, index - self.max_staleness)


class _Folder:
    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)

    def request(self) -> Request | None:
        try:
            return Request(**json.loads((self.directory / 'request.json').read_text()))
        except FileNotFoundError:
            return None

    def open(self, request: Request) -> None:
        write(self.directory / 'request.json', json.dumps(dataclasses.asdict(request)).encode())

    def batch(self, attempt: int, index: int) -> pathlib.Path:
        return self.directory / f'batch-{attempt:06d}-{index:09d}.json'

    def error(self, attempt: int, index: int) -> pathlib.Path:
        return self.directory / f'error-{attempt:06d}-{index:09d}.txt'

    def remove(self, unless: Callable[[int, int], bool]) -> None:
        """Removes what belongs to `(attempt, index)` unless it is to stay."""
        for path in (*self.directory.glob('batch-*.json'), *self.directory.glob('error-*.txt')):
            attempt, index = map(int, path.stem.split('-')[1:])
            if not unless(attempt, index):
                path.unlink(missing_ok=True)


class Newest(Weights, Protocol):
    """Weights whose newest published version can be asked for: `publish.Files` and `publish.Transfer`."""

    def newest(self) -> int | None: ...


class Remote:
    """The learner's end: both the `generate` and the `weights` of its `RolloutStream`.

    Args:
        directory: for batches; generators see it too.
        weights: where versions go, `Files` or `Transfer`.
        max_staleness: S, as the stream's.
        poll: seconds between looks at the folder.
        share: of a learner of several processes, see `Share`.
    """

    def __init__(self, directory: str | os.PathLike, weights: Weights, *, max_staleness: int, poll: float = 0.01,
                 share: Share = _of_one_process):
        self._share, self._leads = share, jax.process_index() == 0
        self._folder, self._weights, self._poll = _Folder(directory), weights, poll
        self._max_staleness = max_staleness
        self._base: int | None = None
        self._request: Request | None = None
        self._closed, self._left_open = threading.Event(), False

    def publish(self, version: int, params: Any) -> None:
        self._weights.publish(version, params)
        if self._base is None:
            self._base = version

    def fetch(self, version: int) -> None:
        """Nothing: the learner's process generates nothing."""

    def release(self, before: int) -> None:
        """Nothing: generators hold the weights."""

    def __call__(self, params: None, *, index: int, version: int) -> Mapping[str, Any]:
        """Waits for batch `index` from the generators.

        Raises:
            RuntimeError: a generator failed, with its traceback; or the stream was closed.
        """
        payload = self._share(self._await(index) if self._leads else None)
        try:
            saved = json.loads(payload)
            return batch_lib.from_json(saved['batch']) | {'seconds': saved['seconds']}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            path = self._folder.batch(self._request.attempt if self._request else 0, index)
            raise ValueError(f'{path}: damaged ({error}); delete it, and its generator makes it again') from None

    def _await(self, index: int) -> bytes:
        if self._request is None:
            # Weights first, then the request: whoever reads it finds the version that it starts with.
            before = self._folder.request()
            if self._base is None:
                raise RuntimeError('a batch was asked for before any weights were published')
            attempt = before.attempt + 1 if before else 0
            self._request = Request(attempt, self._base, index, self._max_staleness)
            self._folder.open(self._request)
            self._folder.remove(unless=lambda a, _: a == attempt)
        attempt = self._request.attempt
        path, error = self._folder.batch(attempt, index), self._folder.error(attempt, index)
        while not path.exists():
            if error.exists():
                raise RuntimeError(f'a generator failed:\n{error.read_text()}')
            if self._closed.wait(self._poll):
                raise RuntimeError('the rollout stream was closed while a batch was awaited')
        # A batch stays until the learner has surely drawn it, so that a generator that starts anew finds it done.
        self._folder.remove(unless=lambda a, i: (a, i) >= (attempt, index - self._max_staleness))
        return path.read_bytes()

    def finish(self) -> None:
        """Tells generators that are started later that there is nothing left to do."""
        if self._request is not None and self._folder.request() == dataclasses.replace(self._request, closed=True):
            self._folder.open(dataclasses.replace(self._request, closed=True, finished=True))

    def leave_open(self) -> None:
        """Keeps `close` from sending the generators home: they wait for this learner, which is to be started anew."""
        self._left_open = True

    def close(self) -> None:
        """Sends the generators home."""
        self._closed.set()
        if self._left_open:
            return
        if self._request is not None and self._folder.request() == self._request:
            self._folder.open(dataclasses.replace(self._request, closed=True))


def serve(generate: Generate, weights: Newest, directory: str | os.PathLike, *, generator: int = 0,
          num_generators: int = 1, poll: float = 0.01, idle_timeout: float | None = None,
          share: Share = _of_one_process,
          is_own_fault: Callable[[Exception], bool] = lambda error: True) -> int:
    """A generator: makes the batches that the learner's request asks for until it is closed.

    Args:
        generate: as in one process.
        weights: the learner's `weights` as seen from here. Its own time-out bounds the wait of a single fetch only.
        directory: the learner's.
        generator, num_generators: which one this is; batch i is made by generator `i % num_generators`.
        poll: seconds between looks at the folder.
        idle_timeout: leave after so many seconds with nothing to do (the learner is gone); None: wait for ever.
        share: of a generator of several processes, which all call `serve`; the first of them looks at the folder.
        is_own_fault: whether what `generate` raised would come again, so that the learner should end; it waits where
            another process of the generator was lost and all of them are to be started anew.

    Returns:
        How many batches it made.

    Raises:
        Exception: what `generate` raised, after telling the learner if `is_own_fault`.
    """
    if not 0 <= generator < num_generators:
        raise ValueError(f'generator={generator} must be in 0..{num_generators - 1}')
    leads, made = jax.process_index() == 0, 0
    folder, orders = _Folder(directory), _Orders(directory, weights, generator, num_generators, poll, idle_timeout)
    loaded: tuple[int, int] | None = None  # attempt and version of `params`
    params: Any = None
    while True:
        idle = time.monotonic()
        order = json.loads(share(json.dumps(orders.next()).encode() if leads else None))
        if order is None:
            return made
        attempt, index, version = order
        start = time.monotonic()
        try:
            if loaded != (attempt, version):
                loaded, params = None, None  # a version may have been published anew
                params, loaded = weights.fetch(version), (attempt, version)
                weights.release(version)
        except (TimeoutError, ValueError):
            if jax.process_count() == 1 and orders.outdated():  # it belonged to a learner that is no more
                continue
            raise
        fetched = time.monotonic()
        try:
            batch = jax.device_get(dict(generate(params, index=index, version=version)))
            batch_lib.complete(batch, version)
            batch_lib.check(batch, f'batch {index}')
        except Exception as error:
            error.add_note(f'while generating batch {index} with version {version}')
            if is_own_fault(error):
                write(folder.error(attempt, index), traceback.format_exc().encode())
            raise
        made += 1
        if leads:
            seconds = {'generator_wait': start - idle, 'load': fetched - start, 'generate': time.monotonic() - fetched}
            write(folder.batch(attempt, index),
                  json.dumps({'batch': batch_lib.to_json(batch), 'seconds': seconds}).encode())
            orders.done()


class _Orders:
    """What a generator has to do next, from the learner's request and the versions there are."""

    def __init__(self, directory: str | os.PathLike, weights: Newest, generator: int, num_generators: int, poll: float,
                 idle_timeout: float | None):
        self._folder, self._weights, self._poll, self._idle_timeout = _Folder(directory), weights, poll, idle_timeout
        self._generator, self._num_generators, self._index = generator, num_generators, 0
        self._request: Request | None = None
        # A learner that was stopped has closed its request; it opens another when it comes back, perhaps later than
        # this.
        gone = self._folder.request()
        self._gone = gone if gone and gone.closed and not gone.finished else None

    def next(self) -> tuple[int, int, int] | None:
        """Waits for (attempt, index of a batch, version) to make; None: leave."""
        idle = time.monotonic()
        while True:
            current = self._folder.request()
            if current == self._gone:
                current = None
            if current and current.closed:
                return None
            if current and current != self._request:
                self._request = current
                self._index = current.first + (self._generator - current.first) % self._num_generators
            request, newest = self._request, self._weights.newest() if self._request else None
            if request is None or newest is None or request.version(self._index) > newest:
                if self._idle_timeout is not None and time.monotonic() - idle > self._idle_timeout:
                    return None
                time.sleep(self._poll)
            elif self._index < newest or self._folder.batch(request.attempt, self._index).exists():
                self._index += self._num_generators  # drawn already, or made before this process was started anew
            else:
                return request.attempt, self._index, request.version(self._index)

    def done(self) -> None:
        """The batch that was asked for last is written."""
        self._index += self._num_generators

    def outdated(self) -> bool:
        """Whether the learner has asked anew since."""
        return self._folder.request() != self._request
