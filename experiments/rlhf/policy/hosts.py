"""Hosts that generate and hosts that train in one job: `rollout.devices` sets whole processes apart.

Each process runs the programs of its own role; two things take both roles, at places that follow from the order of
batches alone, so that nobody has to say when:

    version v   after the learner's step v: its weights pass to the generators (`passage.py`)
    batch i     after version max(0, i - S + 1), or i with S = 0: the batch returns to every learner

Between the two, generators make the next batch, of the version they have just got, while the learner trains. A batch is
that of one process with as many devices apart: of version max(0, i - S).
"""
import collections
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh

from experiments.rlhf.policy import roles, rollouts
from experiments.rlhf.policy.kind import Generator, Kind
from experiments.runtime import exchange, processes
from experiments.runtime.passage import Passage
from experiments.runtime.signals import signals
from rlhf_jax.rollout import batch as batch_lib
from rlhf_jax.rollout.stream import RolloutStream

log = logging.getLogger(__name__)

STARTED = 'rollouts'  # announced by process 0: the version that the learner begins with, and the batch that it lacks


class Schedule:
    """Which batches return after which version.

    Args:
        base: the version that the job begins or resumes with.
        first: index of the first batch that the learner lacks then.
        num_batches: of the run.
        max_staleness: S.
    """

    def __init__(self, base: int, first: int, num_batches: int, max_staleness: int):
        self.base, self.num_batches, self._bound = base, num_batches, max_staleness
        self.next = first

    def due(self, version: int) -> list[int]:
        """Batches that return after `version`, in order; to be asked once for every version."""
        end = min(self.num_batches, version + max(self._bound, 1))
        out = list(range(self.next, end))
        self.next = max(self.next, end)
        return out

    def ahead(self, version: int) -> int | None:
        """The batch to be made of `version` before the next one comes, or None."""
        index = version + self._bound
        return index if self._bound and self.next <= index < self.num_batches else None


class Line:
    """Both directions between the roles, seen from either.

    Args:
        learner, generating: the meshes of the two.
        shapes, shardings: of the weights, as the kind's `decoding` has them on `generating`.
    """

    def __init__(self, learner: Mesh, generating: Mesh, shapes: Any, shardings: Any):
        self._weights = Passage(shapes, learner, shardings)
        self._all = Mesh(np.array([*learner.devices.flat, *generating.devices.flat]), ('all',),
                         axis_types=(AxisType.Auto,))
        self._source = exchange.processes_of(generating)[0]
        self.send, self.receive = self._weights.send, self._weights.receive  # of a version

    def deliver(self, batch: Mapping[str, np.ndarray] | None, seconds: Mapping[str, float]) -> dict[str, Any]:
        """A batch from the generators to all; learners give None."""
        payload = None
        if batch is not None:
            payload = json.dumps({'batch': batch_lib.to_json(batch), 'seconds': dict(seconds)}).encode()
        sent = json.loads(exchange.broadcast(self._all, payload, self._source))
        return batch_lib.from_json(sent['batch']) | {'seconds': sent['seconds']}


class Delivered:
    """The learner's end: both the `generate` and the `weights` of its `RolloutStream`, which must be `late`.

    Args:
        first: the index of the first batch that the stream lacks, to be asked once something is published.
    """

    def __init__(self, line: Line, num_batches: int, max_staleness: int, first: Callable[[], int]):
        self._line, self._num_batches, self._bound, self._first = line, num_batches, max_staleness, first
        self._schedule: Schedule | None = None
        self._batches: collections.deque[dict[str, Any]] = collections.deque()

    def publish(self, version: int, params: Any) -> None:
        """Sends that version, and takes the batches that are due after it."""
        if self._schedule is None:
            self._schedule = Schedule(version, self._first(), self._num_batches, self._bound)
            if jax.process_index() == 0:
                processes.announce(STARTED, json.dumps({'base': version, 'first': self._schedule.next}))
        self._line.send(params)
        for _ in self._schedule.due(version):
            self._batches.append(self._line.deliver(None, {}))

    def fetch(self, version: int) -> None:
        """Nothing: the learner's hosts generate nothing."""

    def release(self, before: int) -> None:
        """Nothing: the generators have the weights."""

    def __call__(self, params: None, *, index: int, version: int) -> Mapping[str, Any]:
        return self._batches.popleft()


def open_rollouts(kind: Kind, config: ml_collections.ConfigDict, learner: Mesh,
                  workdir: str | os.PathLike) -> rollouts.Rollouts:
    """The stream of a learner on the mesh `learner`, on whatever devices its batches are made."""
    generating = roles.generator_mesh(config, learner)
    if jax.process_index() in exchange.processes_of(generating):
        return rollouts.open_rollouts(kind, config, learner, workdir)
    bound, decoding = config.rollout.max_staleness, kind.decoding(config, generating)
    line = Line(learner, generating, decoding.shapes, decoding.shardings)
    delivered = Delivered(line, config.num_steps, bound, first=lambda: stream.produced)
    stream = RolloutStream(delivered, delivered, max_staleness=bound, threaded=False, late=True,
                           num_batches=config.num_steps)
    return rollouts.Rollouts(stream, decoding.convert, learner, config.num_steps, kind.num_tokens(config),
                             shortened=functools.partial(kind.shortened, config))


def generate(kind: Kind, config: ml_collections.ConfigDict, learner: Mesh, workdir: str | os.PathLike) -> None:
    """What a generating host does for the length of a run: it makes batches until the run is over or stopped.

    Raises:
        ValueError, OSError: data, tokenizer or rewards that do not fit, before anything is compiled.
    """
    mesh = roles.generator_mesh(config, learner)
    decoding, make = kind.decoding(config, mesh), kind.generator(config, mesh, None)
    line = Line(learner, mesh, decoding.shapes, decoding.shardings)
    name, text = processes.awaited(STARTED, processes.FINISHED)
    if name == STARTED:
        started = json.loads(text)
        log.info('%s: generating from version %d on', workdir, started['base'])
        schedule = Schedule(started['base'], started['first'], config.num_steps, config.rollout.max_staleness)
        with signals.remembering():
            _serve(schedule, line, make, stop_every=config.log_every)
            processes.awaited(processes.FINISHED)


def _serve(schedule: Schedule, line: Line, make: Generator, *, stop_every: int) -> None:
    """Takes versions and delivers batches, in the order in which `Delivered.publish` does the opposite.

    Args:
        stop_every: steps after which the learners ask all processes whether to stop (see `loop.run`).
    """
    ready: dict[int, tuple[Mapping[str, np.ndarray], dict[str, float]]] = {}
    for version in range(schedule.base, schedule.num_batches):
        waiting = time.monotonic()
        params = line.receive()
        waited = {'generator_wait': time.monotonic() - waiting, 'load': 0.0}

        def add(index: int, version: int = version, params: Any = params,
                waited: Mapping[str, float] = waited) -> None:
            start = time.monotonic()
            batch = dict(make(params, index=index, version=version))
            batch_lib.complete(batch, version)
            ready[index] = batch, dict(waited) | {'generate': time.monotonic() - start}
        for index in schedule.due(version):
            if index not in ready:
                add(index)
            line.deliver(*ready.pop(index))
        if version > schedule.base and version % stop_every == 0 and signals.agreed():
            return
        ahead = schedule.ahead(version)
        if ahead is not None:
            add(ahead)
