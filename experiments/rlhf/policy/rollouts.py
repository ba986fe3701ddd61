"""How a policy's batches come to its learner: the transport of weights, and the stream of batches.

One code path for every way to run: synchronously (max_staleness=0), from earlier weights on devices of their own
(max_staleness=S, devices=n), or with generators in processes of their own (transport='files' or 'transfer', and
`python -m experiments.generate`). A batch is a function of its index and of the weights alone, so they all give the
same batches for the same versions.
"""
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.policy.kind import Kind
from experiments.rlhf.policy.roles import generator_mesh
from experiments.runtime import exchange, placement, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.signals import GRACE_SECONDS, Interrupted, signals
from rlhf_jax.rollout import batch as batch_lib
from rlhf_jax.rollout import processes, publish
from rlhf_jax.rollout.stream import RolloutStream

log = logging.getLogger(__name__)


# ---- Weights ---------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=8)
def snapshots(decoding: Any, generating: Mesh, learner: Mesh) -> Callable[[Any], Any]:
    """`decoding.convert` whose results share no buffer with the policy's parameters. Over the learner's own devices
    they come in the generators' layout, else in one that is the compiler's to choose, from which they travel."""
    together = np.array_equal(generating.devices.flat, learner.devices.flat)
    # A result that is an argument would be the argument's buffer.
    return jax.jit(lambda policy: jax.tree.map(jnp.copy, decoding.convert(policy)),
                   out_shardings=decoding.shardings if together else None)


def sampler_params(state: Any) -> Any:
    """Parameters in a learner's state that its sampler needs: the policy's, or with a mask `{'policy': ..., 'mask':
    ...}`."""
    policy, extra = state.params['policy'], state.extra or {}
    return {'policy': policy, 'mask': extra['mask']['policy']} if 'mask' in extra else policy


def share_of(mesh: Mesh) -> processes.Share:
    """What the first process of `mesh` gives, in all of its processes."""
    return lambda payload: exchange.broadcast(mesh, payload, exchange.processes_of(mesh)[0])


def open_weights(config: ml_collections.ConfigDict, shardings: Any, shapes: Any, folder: Any, *,
                 reader: int = 0, address: str = '') -> Any:
    """The transport that `rollout.transport` names.

    Args:
        address: of this end of a transfer; '': `rollout.address`, the learner's.
    """
    rollout = config.rollout
    keep, timeout = rollout.max_staleness + 1, rollout.timeout or None
    if rollout.transport == 'devices':
        return publish.InProcess(shardings, timeout=timeout, snapshots=True)
    if rollout.transport == 'files':
        return publish.Files(folder / 'weights', shardings, keep=keep, timeout=timeout)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return publish.Transfer(folder / 'weights', like, num_readers=rollout.num_generators, reader=reader, keep=keep,
                            address=address or rollout.address, timeout=timeout)


# ---- The stream ------------------------------------------------------------------------------------------------------

class Rollouts:
    """A `RolloutStream` as the runner's loop knows streams; `publish` hands it the weights of every new state.

    Args:
        convert: `sampler_params` of a state -> weights for decoding.
        mesh: of the learner; batches are laid out over it.
        num_steps: of the run; nothing is published after the last.
        vocab_size: ids of the policy; a batch with others (a generator of another model, a damaged file) is refused.
        held: the transport, where what was published is on devices of this process.
        shortened: batch -> the batch without padding that no row needs (`kind.Kind.shortened`).
    """

    def __init__(self, stream: RolloutStream, convert: Callable[[Any], Any], mesh: Mesh, num_steps: int,
                 vocab_size: int | None = None, held: publish.InProcess | None = None,
                 shortened: Callable[[Any], Any] = lambda batch: batch):
        self._stream, self._convert, self._num_steps, self._vocab_size = stream, convert, num_steps, vocab_size
        self._sharding, self._held = mesh_lib.batch_sharding(mesh), held
        self._failed, self._shortened = False, shortened

    def publish(self, version: int, state: Any) -> None:
        """Before the first batch, and after every step but the last."""
        if version < self._num_steps:
            self._stream.publish(version, self._convert(sampler_params(state)))

    def published(self, version: int) -> Any:
        """Weights for decoding of that version where they were the last to be published, and are here; else None."""
        return self._held.fetch(version) if self._held is not None and self._held.newest() == version else None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the batch handed out last: `rollout_staleness` in versions, `rollout_..._seconds` of waits and work."""
        counts = ('staleness', 'in_flight')
        return {f'rollout_{name}' if name in counts else f'rollout_{name}_seconds': value
                for name, value in self._stream.metrics.items()}

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        try:
            batch = next(self._stream)
            batch_lib.check(batch, 'a rollout batch', self._vocab_size)
            return placement.place_tree(self._shortened(batch), self._sharding)
        except Interrupted:
            raise
        except Exception:
            self._failed = True
            raise

    def get_state(self) -> dict:
        return self._stream.get_state(self._patience())

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._stream.set_state(state)

    def _patience(self) -> float | None:
        """Seconds to wait for a batch that is being made: as long as it takes, unless the run has been asked to stop,
        or has failed over it already."""
        if self._failed:
            return 0.0
        return None if signals.received is None else GRACE_SECONDS

    def finish(self) -> None:
        """Sends generators elsewhere home for good: the run is over and saved."""
        self._stream.finish()

    def leave_open(self) -> None:
        """Lets generators elsewhere wait, when this closes: the learner lost one of its processes and is started anew
        by whatever started it."""
        self._stream.leave_open()

    def close(self) -> None:
        self._stream.close(self._patience())


def open_rollouts(kind: Kind, config: ml_collections.ConfigDict, mesh: Mesh, workdir: str | os.PathLike) -> Rollouts:
    """The stream of a learner of a policy of `kind` on `mesh` that generates too, or has batches come through
    `workdir/rollouts`."""
    rollout = config.rollout
    if rollout.transport != 'devices' and storage.is_remote(workdir):
        raise ValueError(f'--workdir={workdir}: rollout.transport={rollout.transport!r} needs a folder that all '
                         'processes see')
    generating = generator_mesh(config, mesh)
    decoding = kind.decoding(config, generating)
    weights = open_weights(config, decoding.shardings, decoding.shapes, storage.resolve(workdir) / 'rollouts')
    if rollout.transport == 'devices':
        generate = kind.generator(config, generating, weights)
    else:
        generate = weights = processes.Remote(storage.resolve(workdir) / 'rollouts' / 'batches', weights,
                                              max_staleness=rollout.max_staleness, share=share_of(mesh))
    # Two threads that each start programs over several devices, the same ones, can leave those waiting for each other.
    shared = rollout.transport == 'devices' and not rollout.devices and mesh.devices.size > 1
    if shared and rollout.chunk:
        raise ValueError(f'rollout.chunk={rollout.chunk} takes up weights while others are trained, which needs '
                         'devices of its own; set rollout.devices')
    if shared and rollout.max_staleness:
        log.warning('rollout.max_staleness=%d with rollout.devices=0: batches come from earlier weights, but are made '
                    'and trained on in turn; set devices apart to do both at once', rollout.max_staleness)
    # What comes from elsewhere is shared among several processes by a program, which keeps its place among the others.
    late = rollout.transport != 'devices' and jax.process_count() > 1
    threaded = rollout.threaded and not shared and not late
    stream = RolloutStream(generate, weights, max_staleness=rollout.max_staleness, threaded=threaded, late=late,
                           newest=rollout.newest, num_batches=config.num_steps, timeout=rollout.timeout or None,
                           check=signals.check if jax.process_count() == 1 else None)  # several stop between two steps
    convert, held = decoding.convert, None
    if rollout.transport == 'devices':
        convert, held = snapshots(decoding, generating, mesh), weights
    return Rollouts(stream, convert, mesh, config.num_steps, kind.num_tokens(config), held,
                    functools.partial(kind.shortened, config))
