"""AdamW with parameter groups chosen by path, gradient accumulation and EMA, on optax.

A group is `(pattern, settings)`: the first whose regex fully matches the parameter's path decides its learning-rate
multiplier, weight-decay multiplier and for how many steps it stays frozen. A parameter no group covers is an error.
"""
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.partition import flatten, path_name

Schedule = Callable[[jax.Array], jax.Array]


def schedule(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """Linear warm-up from `init` (default 0) to `peak`, then constant or cosine to `final`, at float32 step `s`.

    The last of `warmup_steps` updates is the first at `peak`. The first of them is at `init` itself (DINOv2), or with
    `first_step` 1 already one of `warmup_steps` equal steps above it (SEDD).

    Keys: `peak`, `warmup_steps`, `decay` ('constant' | 'cosine' | 'linear'), `final`, optional `decay_steps` (default:
    `num_steps`), `init`, `first_step`.
    """
    peak, warmup, final = float(config['peak']), int(config.get('warmup_steps', 0)), float(config.get('final', 0.0))
    decay = config.get('decay', 'constant')
    init, first = float(config.get('init', 0.0)), int(config.get('first_step', 0))
    total = int(config.get('decay_steps', 0) or num_steps)
    if decay not in ('constant', 'cosine', 'linear'):
        raise ValueError(f"schedule: decay={decay!r} is not one of 'constant', 'cosine', 'linear'")

    def at(step):
        s = jnp.asarray(step, jnp.float32) + first
        frac = jnp.clip((s - warmup) / max(total - warmup, 1), 0.0, 1.0)
        if decay == 'cosine':
            after = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * frac))
        elif decay == 'linear':
            after = peak + (final - peak) * frac
        else:
            after = jnp.float32(peak)
        return jnp.where(s < warmup, init + (peak - init) * s / max(warmup - 1 + first, 1), after)

    return at


class Group(NamedTuple):
    """Settings of one parameter group; multipliers may be arrays that broadcast against a stacked parameter."""
    learning_rate: Any = 1.0
    weight_decay: float = 1.0
    frozen_steps: int = 0


def layer_decay(rate: float, depth: int, ndim: int) -> np.ndarray:
    """`rate ** (depth - i)` for block i of a stack, shaped to broadcast against a leaf [depth, ...] of rank `ndim`."""
    return (rate ** (depth - np.arange(depth))).astype(np.float32).reshape((depth,) + (1,) * (ndim - 1))


def assign_groups(params: Any, groups: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """A tree like `params` of `Group`. Settings: `learning_rate`, `weight_decay`, `frozen_steps`, `layer_decay`.

    Raises:
        ValueError: a parameter that no pattern matches, or an unknown setting.
    """
    known = {'learning_rate', 'weight_decay', 'frozen_steps', 'layer_decay'}

    def one(path, leaf):
        name = path_name(path)
        for pattern, settings in groups:
            if re.fullmatch(pattern, name):
                settings = dict(settings)
                if set(settings) - known:
                    raise ValueError(f'optimizer.groups: unknown setting {sorted(set(settings) - known)[0]!r} for '
                                     f'{pattern!r}; choose from {sorted(known)}')
                rate = settings.pop('layer_decay', None)
                if rate is not None:
                    settings['learning_rate'] = settings.get('learning_rate', 1.0) * layer_decay(
                        rate, leaf.shape[0], leaf.ndim)
                return Group(**settings)
        raise ValueError(f'optimizer.groups: no group covers parameter {name}; add one (learning_rate=0 freezes it)')

    return jax.tree_util.tree_map_with_path(one, params)


class _DecayState(NamedTuple):
    count: jax.Array


def scale_by_groups(groups: Any, learning_rate: Schedule, weight_decay: Schedule) -> optax.GradientTransformation:
    """Decoupled weight decay and learning rate, each scaled by the parameter's group: the last link of AdamW."""

    def update(updates, state, params):
        lr, wd = learning_rate(state.count), weight_decay(state.count)

        def one(u, p, g):
            step = lr * g.learning_rate
            if g.frozen_steps:
                step = jnp.where(state.count < g.frozen_steps, 0.0, step)
            decayed = u if g.weight_decay == 0 else u + wd * g.weight_decay * p
            return (-step * decayed).astype(p.dtype)

        updates = jax.tree.map(one, updates, params, groups)
        return updates, _DecayState(state.count + 1)

    return optax.GradientTransformation(lambda params: _DecayState(jnp.zeros((), jnp.int32)), update)


def clip_by_norm(max_norm: float, *, per_module: bool) -> optax.GradientTransformation:
    """Clip to `max_norm`: over all gradients, or over each top-level entry of the tree by itself (as DINOv2 does)."""
    clip = optax.clip_by_global_norm(max_norm)
    if not per_module:
        return clip

    def update(updates, state, params=None):
        return {name: clip.update(tree, optax.EmptyState())[0] for name, tree in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(config: Mapping[str, Any], params: Any, num_steps: int, *,
          clock: Callable[[jax.Array], jax.Array] = lambda count: count) -> optax.GradientTransformation:
    """The optimizer that `config` describes, for parameters shaped like `params`.

    `clock`: updates so far -> the step, of `num_steps`, at which schedules are read.

    Keys: `learning_rate` and `weight_decay` (schedules, see `schedule`), `b1`, `b2`, `eps`, `clip_norm` (0: off),
    `clip_per_module`, `groups`.
    """
    groups = assign_groups(params, tuple(config['groups']) or ((r'.*', {}),))
    chain = []
    if config['clip_norm']:
        chain.append(clip_by_norm(config['clip_norm'], per_module=config['clip_per_module']))
    chain.append(optax.scale_by_adam(b1=config['b1'], b2=config['b2'], eps=config['eps']))
    rates = (schedule(config[name], num_steps) for name in ('learning_rate', 'weight_decay'))
    chain.append(scale_by_groups(groups, *(lambda count, at=at: at(clock(count)) for at in rates)))
    return optax.chain(*chain)


def left_out(before: Any, after: Any) -> Any:
    """The optimizer's state where an update from `before` to `after` is planned and not made: moments and their count
    stay, schedules move on, since their length is that of the run."""
    is_clock = lambda node: isinstance(node, _DecayState)
    return jax.tree.map(lambda old, new: new if is_clock(new) else old, before, after, is_leaf=is_clock)


def split_microbatches(batch: Mapping[str, jax.Array], parts: int, shards: int) -> dict[str, jax.Array]:
    """[B, ...] -> [parts, B / parts, ...], so that every one of `shards` devices splits the rows it already holds."""
    def one(name, x):
        if x.shape[0] % (parts * shards):
            raise ValueError(f'accumulate={parts} x {shards} shards does not divide the leading axis of '
                             f'batch[{name!r}], {x.shape[0]}')
        x = x.reshape(shards, parts, x.shape[0] // (parts * shards), *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(parts, shards * x.shape[2], *x.shape[3:])
    return {name: one(name, x) for name, x in batch.items()}


def join_microbatches(x: jax.Array, shards: int) -> jax.Array:
    """Inverse of `split_microbatches` on one array: [parts, B / parts, ...] -> [B, ...]."""
    parts, rows = x.shape[:2]
    x = jnp.swapaxes(x.reshape(parts, shards, rows // shards, *x.shape[2:]), 0, 1)
    return x.reshape(parts * rows, *x.shape[3:])


def value_and_grad(loss: Callable[..., tuple[jax.Array, dict]], params: Any, batch: dict, rng: jax.Array,
                   accumulate: int = 1, shards: int = 1) -> tuple[tuple[jax.Array, dict], Any]:
    """`jax.value_and_grad(loss, has_aux=True)(params, batch, rng)`, over `accumulate` microbatches in a loop.

    Losses, metrics and gradients are means over the microbatches; `loss` must itself be a mean over its batch.
    `shards`: over how many devices the batch's leading axis is laid out.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        return grad(params, batch, rng)
    micro = split_microbatches(batch, accumulate, shards)

    def body(total, inputs):
        index, part = inputs
        out = grad(params, part, jax.random.fold_in(rng, index))
        return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, out), None

    first = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro), rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate), micro))
    return jax.tree.map(lambda x: x / accumulate, total)


def apply(tx: optax.GradientTransformation, grads: Any, state: Any) -> tuple[Any, Any, jax.Array]:
    """`(params, opt_state, gradient norm before clipping)` after one update of `state`."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state, norm(grads)


def norm(tree: Any) -> jax.Array:
    """L2 norm over all leaves."""
    return optax.tree.norm(tree)


def ema_update(ema: Any, params: Any, decay: jax.Array | float) -> Any:
    """`decay * ema + (1 - decay) * params`, in float32 whatever the dtype of `params`."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)


def ema_decay(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """EMA decay at an update count n >= 1. Keys: `decay`, `ramp` (min(decay, (1 + n) / (10 + n))), `final` (cosine
    target)."""
    decay, final = float(config['decay']), config.get('final', None)

    def at(n):
        n = jnp.asarray(n, jnp.float32)
        if final is not None:  # DINOv2's teacher momentum: cosine from `decay` to `final` over the run
            return final - (final - decay) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((n - 1) / num_steps, 0, 1)))
        return jnp.minimum(decay, (1 + n) / (10 + n)) if config.get('ramp', False) else jnp.float32(decay)

    return at


def count_parameters(params: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())
