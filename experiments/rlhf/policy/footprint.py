"""What a policy's run keeps on which devices, and the programs that share them: who is resident beside whom.

    learner's devices    the state; while a version is published, the weights for decoding as they leave; the reward
                         models and weights for decoding of an evaluation
    generating devices   the weights of as many versions as may be in flight, the reward models; a wave's cache

They are the same devices where `rollout.devices` is 0 and `rollout.transport` is 'devices'.
"""
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.policy import reward_model, rollouts, waves
from experiments.rlhf.policy.kind import Kind
from experiments.rlhf.policy.models import sampling_of
from experiments.runtime import compiler, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.programs import Program, placed
from rlhf_jax import generate as generate_lib
from rlhf_jax import refill

Config = ml_collections.ConfigDict
Placed = Any  # a tree of `jax.ShapeDtypeStruct` with shardings

SAMPLER = 'set rollout.slots or rollout.memory, raise rollout.mesh.tensor or fsdp, lower sampling.max_new_tokens'
PUBLISH = 'raise mesh.fsdp, set rollout.devices so that others generate'
REWARD = 'lower reward.batch_size, raise reward.mesh.fsdp or tensor'


class Footprint:
    """Residents of a run.

    Args:
        kind: of the policy.
        learner, generating: meshes.
        state: the learner's, abstract.
        rules: partition rules of its parameters.

    Attributes:
        shared: whether both meshes are the same devices. Generators in processes of their own (`rollout.transport`)
            have devices of their own, here as many as the learner.
        state, weights, models: what is resident: the learner's state; one version's weights for decoding; the frozen
            models of the kind. The latter two on the generating devices.
    """

    def __init__(self, kind: Kind, config: Config, learner: Mesh, generating: Mesh, state: Any, rules: partition.Rules):
        self._kind, self._config, self.learner, self.generating = kind, config, learner, generating
        self.shared = not config.rollout.devices and config.rollout.transport == 'devices'
        self.state = placed(state, partition.state_shardings(state, rules, self.learner))
        self.decoding = kind.decoding(config, self.generating)
        self.weights = placed(self.decoding.shapes, self.decoding.shardings)

    @functools.cached_property
    def models(self) -> Mapping[str, Placed]:
        return self._kind.models(self._config, self.generating)

    def beside_step(self) -> Mapping[str, Placed]:
        """What lies on the learner's devices while it trains, beside the state."""
        beside: dict[str, Placed] = {}
        if self.shared:
            beside = {self._kind.models_are: self.models, 'weights for decoding': self._in_flight()}
        elif self._config.eval_every:
            beside = {self._kind.models_are: self._kind.models(self._config, self.learner)}
        if self._config.rollout.transport == 'transfer':  # versions are held until they have been pulled
            beside['weights for decoding'] = self._in_flight()
        return {name: tree for name, tree in beside.items() if jax.tree.leaves(tree)}

    def beside_sampler(self) -> Mapping[str, Placed]:
        """What lies on the generating devices while they sample, beside the weights that they sample with."""
        beside = {self._kind.models_are: self.models, 'weights of other versions': self._in_flight()}
        if self.shared:
            beside['learner'] = self.state
        return {name: tree for name, tree in beside.items() if jax.tree.leaves(tree)}

    def _in_flight(self) -> list[Placed]:
        """Weights of versions other than the one that is sampled with or trained."""
        return [self.weights] * self._config.rollout.max_staleness

    def budgeted(self, usable: float) -> Config:
        """The config with `rollout.memory` as a generating device that offers `usable` bytes has it left."""
        if not self._kind.has_waves:
            return self._config
        return waves.budgeted(self._config, usable, [self.weights, *self.beside_sampler().values()])

    def budgeted_for_evaluation(self, usable: float) -> Config:
        """The same of a device that evaluates, which is the learner's."""
        if self.shared or not self._kind.has_waves:
            return self.budgeted(usable)
        return waves.budgeted(self._config, usable, [self.state, self.weights, *self.beside_step().values()])

    def programs(self, usable: int) -> list[Program]:
        """All programs of an iteration but the step, on devices that offer `usable` bytes."""
        if not self._kind.has_waves:
            sampler, args, mesh = self._kind.sampler_program(self._config, list(self.generating.devices.flat))
            beside = {name: tree for name, tree in self.beside_sampler().items()
                      if name != self._kind.models_are}  # they are arguments of the program
            return [Program('sampler', sampler, args, mesh, beside, options=compiler.options(mesh), knobs=SAMPLER),
                    self._publish()]
        return [*self._kind.programs(self.budgeted(usable), self), self._publish()]

    def _publish(self) -> Program:
        others = {name: tree for name, tree in self.state.params.items() if name != 'policy'}
        extra = {name: tree for name, tree in self.state.extra.items() if name != 'mask'}
        beside = dict(self.beside_step()) | {'learner': [others, self.state.opt_state, extra]}
        convert = self.decoding.convert
        if self._config.rollout.transport == 'devices':
            convert = rollouts.snapshots(self.decoding, self.generating, self.learner)
        return Program('publish', convert, (rollouts.sampler_params(self.state),), self.learner, beside, knobs=PUBLISH)


# ---- Programs of a decoder -------------------------------------------------------------------------------------------

def samplers(config: Config, run: Footprint) -> list[Program]:
    """Sampling of a whole rollout batch at its longest: waves, or the two programs of refilled slots."""
    rollout, mesh, module = config.rollout, run.generating, run.decoding.module
    num_samples, sampling, length = config.algorithm.num_samples, sampling_of(config, (0,)), config.sampling.max_prompt
    batch, beside = mesh_lib.batch_sharding(mesh), run.beside_sampler()

    def rows(count, dtype):
        return jax.ShapeDtypeStruct((count, length), dtype, sharding=batch)

    def keys(*shape):
        return placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape)), batch)

    if not (rollout.slots or rollout.chunk):
        count = waves.count(config, mesh)
        size = config.batch_size // count
        sampler = jax.jit(lambda *args: generate_lib.generate(module, *args, sampling, num_samples=num_samples),
                          out_shardings=batch)
        args = (run.weights, rows(size, jnp.int32), rows(size, bool), keys(size, num_samples))
        return [Program('sampler', sampler, args, mesh, beside, times=count, knobs=SAMPLER)]
    total, shards = config.batch_size * num_samples, mesh_lib.batch_shards(mesh)
    slots = min(rollout.slots or total, total)
    slots += -slots % shards
    start = functools.partial(refill.start, module, sampling=sampling)
    args = (run.weights, rows(slots, jnp.int32), rows(slots, bool), keys(slots), jax.ShapeDtypeStruct((), jnp.int32))
    state, chunk = placed(jax.eval_shape(start, *args), batch), rollout.chunk or refill.CHUNK
    advance = jax.jit(functools.partial(refill.advance, module, sampling=sampling, chunk=chunk), donate_argnums=1)
    rounds = -(-total // slots)
    return [Program('prefill', jax.jit(start), args, mesh, dict(beside) | {'slots': state}, times=rounds,
                    knobs=SAMPLER),
            Program('sampler', advance, (run.weights, state, args[-1]), mesh, beside,
                    times=rounds * -(-(sampling.max_new_tokens - 1) // chunk), knobs=SAMPLER)]


def scorers(config: Config, run: Footprint) -> list[Program]:
    """The reward models' programs."""
    mesh = mesh_lib.reshaped(run.generating, config.reward.mesh)
    shards, batch = mesh_lib.batch_shards(mesh), mesh_lib.batch_sharding(mesh)
    count, total = -(-config.reward.batch_size // shards) * shards, config.batch_size * config.algorithm.num_samples
    length, out = config.sampling.max_prompt + config.sampling.max_new_tokens, []
    args = tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=batch) for shape, dtype in (
        ((count, length), jnp.int32), ((count, length), bool), ((count,), jnp.int32)))
    for path, (module, params) in reward_model.abstract(config, run.generating).items():
        others = {name: tree for name, tree in run.models.items() if name != path}
        beside = dict(run.beside_sampler()) | {'reward models': others, 'weights for decoding': run.weights}
        out.append(Program('reward' if path == config.reward.model else 'gold reward',
                           jax.jit(functools.partial(reward_model.last_scores, module)), (params, *args), mesh,
                           {name: tree for name, tree in beside.items() if jax.tree.leaves(tree)},
                           times=-(-total // count), options=compiler.options(mesh), knobs=REWARD))
    return out
