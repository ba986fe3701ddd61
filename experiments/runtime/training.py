"""State and step of a model that AdamW trains on the gradient of one loss: what most experiments have in common."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from experiments.runtime import mesh as mesh_lib
from experiments.runtime import optim
from experiments.runtime.experiment import Batch, LossFn
from experiments.runtime.state import TrainState

Params = Any
Aux = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """How the state of one model begins and takes a step; `init` and `step` are those of an `Experiment`.

    Attributes:
        init_params: key -> parameters.
        loss: (params, state, batch, rng) -> (loss, metrics), a mean over the batch.
        optimizer: see `optim.adamw`.
        decay: update count -> decay of the averaged parameters; None: no average is kept.
        accumulate: microbatches a step.
        shards: devices over which the batch's leading axis is laid out.
    """
    init_params: Callable[[jax.Array], Params]
    loss: LossFn
    optimizer: optax.GradientTransformation
    decay: optim.Schedule | None
    accumulate: int
    shards: int

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state; half of `key` is carried for the draws of the steps."""
        key, carried = jax.random.split(key)
        params = self.init_params(key)
        ema = None if self.decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), ema, carried)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update; metrics are those of the loss, `loss` and `grad_norm`."""
        (value, metrics), grads = self.gradient(state, batch)
        state, norm = self.update(state, grads)
        return state, metrics | {'loss': value, 'grad_norm': norm}

    def gradient(self, state: TrainState, batch: Batch) -> tuple[tuple[jax.Array, Aux], Params]:
        """((loss, metrics), gradient) with the draws of this step."""
        rng = jax.random.fold_in(state.rng, state.step)
        return optim.value_and_grad(lambda params, part, key: self.loss(params, state, part, key), state.params,
                                    dict(batch), rng, self.accumulate, self.shards)

    def update(self, state: TrainState, grads: Params) -> tuple[TrainState, jax.Array]:
        """The state one step on, and the norm of `grads` before clipping."""
        params, opt_state, norm = optim.apply(self.optimizer, grads, state)
        ema = None if self.decay is None else optim.ema_update(state.ema, params, self.decay(state.step + 1))
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), norm


def training(config: ml_collections.ConfigDict, mesh: Mesh, init_params: Callable[[jax.Array], Params], loss: LossFn,
             *, averaged: bool = True, groups: tuple = ()) -> Training:
    """The `Training` that `config` describes by its `optimizer`, `accumulate`, `num_steps` and, if `averaged`, `ema`.

    Args:
        groups: of the optimizer, in place of `config.optimizer.groups`.
    """
    settings = config.optimizer.copy_and_resolve_references()
    if groups:
        settings.groups = groups
    optimizer = optim.adamw(settings, jax.eval_shape(init_params, jax.random.key(0)), config.num_steps)
    decay = optim.ema_decay(config.ema, config.num_steps) if averaged else None
    return Training(init_params, loss, optimizer, decay, config.accumulate, mesh_lib.batch_shards(mesh))
