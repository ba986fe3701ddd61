"""Elastic Reset (arXiv 2312.07551) and the methods it is compared with, as functions on parameters of any pytree type.

    on a tick:   ema <- decay ema + (1 - decay) params       no bias correction, no warm-up
    on a reset:  params <- ema;  then ema <- init             the optimizer and the critic stay as they are

What is deployed and evaluated is the online policy, never the average. When to tick and when to reset are events that
the training loop announces; a decay means nothing without its tick (`kept_fraction`). For a loop of optimizer steps:

    config = ElasticReset(decay=0.995, period=1000)
    elastic = init(config, params)                            # a dict, a FrozenDict, an nnx.State, lists of layers, ...
    ...
    due = config.due('step', k)                               # k counts steps from 0
    if any(due):
        elastic, params, opt_state = apply(config, elastic, params, opt_state, due)

Only the floating parameters of the policy are averaged and reset: all of `params` by default, the LoRA factors (A and B
by themselves) where only those are trained, without the value head where `policy` leaves it out.
"""
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
Tree = Any

# From the outermost: an iteration is a rollout and all updates on it; an epoch, one pass over that rollout; a step, one
# update of the optimizer.
EVENTS = ('iteration', 'epoch', 'step')
RESET_TARGETS = ('ema', 'init', 'none')
KL_REFERENCES = ('init', 'ema')


@dataclasses.dataclass(frozen=True)
class Every:
    """A schedule over a zero-based count k: due when `(k + offset) % period == 0`.

    Attributes:
        period: in counts.
        offset: 1 makes the end of every period due (k = period - 1, ...), 0 its beginning.
        skip_first: not at k = 0.
    """
    period: int
    offset: int = 1
    skip_first: bool = False

    def __call__(self, k: Any) -> bool | Array:
        due = (k + self.offset) % self.period == 0
        return due & (k != 0) if self.skip_first else due


class Due(NamedTuple):
    """What is to be done now, in this order; bools, or bool scalars under jit."""
    tick: bool | Array
    reset: bool | Array
    reset_ema: bool | Array


@dataclasses.dataclass(frozen=True)
class ElasticReset:
    """Settings. The released runs differ in when they tick and reset: see `released`.

    Attributes:
        period: between resets of the policy, counted in `reset_on`. None: never.
        decay: of the average, at each tick.
        tick_on, tick_every: tick at every so many of this event (`EVENTS`).
        tick_offset, tick_skip_first: as in `Every`; 1 and False, at the end of each.
        reset_on: the event that `period` and `ema_period` count.
        reset_offset, reset_skip_first: as in `Every`, of both.
        reset_to: where the policy goes: 'ema', 'init', or 'none' (it is left alone).
        reset_ema: whether the average goes back to the initial policy.
        ema_period: between resets of the average; None: at each reset of the policy.
        reset_optimizer: whether a reset of the policy also forgets the optimizer's moments (not its schedule).
        reset_critic: whether it also puts the critic back to its initial values.
        kl_reference: what the KL penalty compares with: 'init', or 'ema', as the released IMDB code has it.
        policy, critic: regexes that fully match the paths of the policy's and the critic's parameters: `a/b/kernel` in
            nested dicts, `layers/0/kernel` with a list between, `layers/0/kernel/value` in an `nnx.State`. A path that
            both match belongs to the critic.
    """
    period: int | None = None
    decay: float = 0.995
    tick_on: str = 'step'
    tick_every: int = 1
    tick_offset: int = 1
    tick_skip_first: bool = False
    reset_on: str = 'step'
    reset_offset: int = 1
    reset_skip_first: bool = False
    reset_to: str = 'ema'
    reset_ema: bool = True
    ema_period: int | None = None
    reset_optimizer: bool = False
    reset_critic: bool = False
    kl_reference: str = 'init'
    policy: str = '.*'
    critic: str = ''

    def __post_init__(self):
        for name, choices in (('tick_on', EVENTS), ('reset_on', EVENTS), ('reset_to', RESET_TARGETS),
                              ('kl_reference', KL_REFERENCES)):
            if getattr(self, name) not in choices:
                raise ValueError(f'elastic.{name}={getattr(self, name)!r} is not one of {choices}')
        if not 0 <= self.decay <= 1:
            raise ValueError(f'elastic.decay={self.decay} must be in [0, 1]')
        for name in ('period', 'ema_period', 'tick_every'):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f'elastic.{name}={value} must be a whole number of at least 1')
        if self.period is None and (self.reset_optimizer or self.reset_critic):
            raise ValueError('elastic.period is not set, so reset_optimizer and reset_critic would never act')
        if self.ema_period is not None and not self.reset_ema:
            raise ValueError(f'elastic.ema_period={self.ema_period} but reset_ema is False')
        if self.reset_critic and not self.critic:
            raise ValueError("elastic.critic is empty, so reset_critic has nothing to reset; give the critic's paths")

    def due(self, event: str, k: int | Array | np.ndarray) -> Due:
        """What to do after the k-th (from 0) `event` of the run."""
        if event not in EVENTS:
            raise ValueError(f'event={event!r} is not one of {EVENTS}')
        tick = event == self.tick_on and Every(self.tick_every, self.tick_offset, self.tick_skip_first)(k)
        reset: bool | Array = False
        reset_ema: bool | Array = False
        if event == self.reset_on:
            at = lambda period: bool(period) and Every(period, self.reset_offset, self.reset_skip_first)(k)
            reset = self.reset_to != 'none' and at(self.period)
            reset_ema = self.reset_ema and at(self.ema_period or self.period)
        return Due(tick, reset, reset_ema)

    def resets(self, count: int) -> list[int]:
        """The k, of `count` events `reset_on`, after which the policy is reset.

        Raises:
            ValueError: a period is set and none falls within the run.
        """
        resets = [k for k in range(count) if self.due(self.reset_on, k).reset]
        if self.period is not None and self.reset_to != 'none' and not resets:
            raise ValueError(f'elastic.period={self.period} is longer than the run of {count} {self.reset_on}s: '
                             'it would never reset')
        return resets


def method(name: str, period: int, **settings: Any) -> ElasticReset:
    """One of the compared methods by name; they differ in these settings alone.

    'fixed_reference': KL to the initial policy, no resets. 'ema_anchor': KL to the average, no resets.
    'reference_reset': KL to a snapshot of the policy, renewed when the others reset: its ticks are of `reset_on`,
    `reset_offset` and `reset_skip_first`. 'reset_to_init', 'reset_to_ema' (the
    average is never reset), 'elastic_reset'. The seventh, post-hoc interpolation, is `interpolate` on the first.

    Raises:
        ValueError: another name, or settings that contradict.
    """
    if name not in METHODS:
        raise ValueError(f'method={name!r} is not one of {tuple(METHODS)}')
    fixed = METHODS[name](period)
    if name == 'reference_reset':
        fixed |= {f'tick_{when}': settings.get(f'reset_{when}', getattr(ElasticReset, f'reset_{when}'))
                  for when in ('on', 'offset', 'skip_first')}
    return ElasticReset(**(dict(settings) | fixed))


METHODS: dict[str, Callable[[int], dict[str, Any]]] = {
    'fixed_reference': lambda period: {'period': None, 'reset_to': 'none', 'reset_ema': False},
    'ema_anchor': lambda period: {'period': None, 'reset_to': 'none', 'reset_ema': False, 'kl_reference': 'ema'},
    'reference_reset': lambda period: {'period': None, 'reset_to': 'none', 'reset_ema': False, 'kl_reference': 'ema',
                                       'decay': 0.0, 'tick_every': period},
    'reset_to_init': lambda period: {'period': period, 'reset_to': 'init'},
    'reset_to_ema': lambda period: {'period': period, 'reset_to': 'ema', 'reset_ema': False},
    'elastic_reset': lambda period: {'period': period, 'reset_to': 'ema', 'reset_ema': True},
}


def released(task: str) -> ElasticReset:
    """Elastic Reset as its released code runs it: 'imdb', 'stackllama' or 'lewis' (the a2c and gumbel scripts).

    One decay names three regimes here, for the ticks differ: see `kept_fraction`.
    """
    if task == 'imdb':  # also resets after the very first iteration, and penalises KL to the average
        return ElasticReset(period=17, tick_on='iteration', reset_on='iteration', reset_offset=0, kl_reference='ema')
    if task == 'stackllama':
        return ElasticReset(period=260, tick_on='epoch', reset_on='iteration', reset_offset=0, reset_skip_first=True)
    if task == 'lewis':
        return ElasticReset(period=2000, tick_on='step', tick_every=100, tick_offset=0)
    raise ValueError(f"task={task!r} is not one of ('imdb', 'stackllama', 'lewis')")


# ---- State and its events ------------------------------------------------------------------------------------------

@flax.struct.dataclass
class Elastic:
    """What a run carries besides parameters and optimizer; part of its checkpoint.

    Whatever type of tree the parameters are, these are nested dicts that hold the policy's paths only (`select`).

    Attributes:
        init: the policy's initial parameters, float32 (float64 stays). A copy: the parameters it was made from may be
            donated.
        ema: their average, of the same structure. float32 even over bfloat16 parameters, whose spacing is coarser than
            a tick's increment: in bfloat16 the average would not move at all.
        critic: initial parameters of the critic, in their own dtype; empty unless it is to be reset.
    """
    init: Tree
    ema: Tree
    critic: Tree


def init(config: ElasticReset, params: Tree) -> Elastic:
    """The state at the start of a run whose initial policy (and critic) is `params`, any pytree of arrays.

    Raises:
        ValueError: no parameter belongs to the policy, or none to a critic that is to be reset.
    """
    policy = select(params, config.policy, without=config.critic)
    if not jax.tree.leaves(policy):
        raise ValueError(f'elastic.policy={config.policy!r} matches no parameter')
    critic = select(params, config.critic) if config.reset_critic else {}
    if config.reset_critic and not jax.tree.leaves(critic):
        raise ValueError(f'elastic.critic={config.critic!r} matches no parameter')
    wide = lambda: jax.tree.map(lambda x: jnp.array(x, _wide(x.dtype), copy=True), policy)
    return Elastic(init=wide(), ema=wide(), critic=jax.tree.map(jnp.copy, critic))


def apply(config: ElasticReset, elastic: Elastic, params: Tree, opt_state: Tree,
          due: Due) -> tuple[Elastic, Tree, Tree]:
    """Ticks, resets the policy and resets the average, as far as they are due and in that order.

    Pure. `due` of Python bools branches in Python (jit one function for each combination, or run it as it is); of
    traced bools, on the device. With gradient accumulation in the optimizer (`optax.MultiSteps`), reset only where
    `at_boundary`.

    Returns:
        `(elastic, params, opt_state)`. What was reset is a copy, so that no two of them share a buffer: all may be
        donated to the next step.
    """
    elastic = _when(due.tick, lambda e: tick(e, params, config.decay), elastic)
    params, opt_state = _when(due.reset, lambda s: _reset(config, elastic, *s), (params, opt_state))
    elastic = _when(due.reset_ema, lambda e: e.replace(ema=jax.tree.map(jnp.copy, e.init)), elastic)
    return elastic, params, opt_state


def apply_measured(config: ElasticReset, elastic: Elastic, params: Tree, opt_state: Tree,
                   due: Due) -> tuple[Elastic, Tree, Tree, Array]:
    """`apply`, and `kept` as it is between the tick and the reset, whether or not a reset is due.

    Returns:
        `(elastic, params, opt_state, kept)`.
    """
    elastic, params, opt_state = apply(config, elastic, params, opt_state, due._replace(reset=False, reset_ema=False))
    measured = kept(elastic, params)
    return *apply(config, elastic, params, opt_state, due._replace(tick=False)), measured


def tick(elastic: Elastic, params: Tree, decay: float | Array) -> Elastic:
    """`ema <- ema - (1 - decay) (ema - params)`, in float32. `decay` may be traced; 0 is then exact to a rounding."""
    def one(average, x):
        if not isinstance(decay, jax.Array) and decay == 0:  # where the formula would miss x by a rounding
            return jnp.array(x, average.dtype, copy=True)
        return average - (1 - decay) * (average - x.astype(average.dtype))
    return dataclasses.replace(elastic, ema=_map_subset(one, elastic.ema, params))


def _reset(config: ElasticReset, elastic: Elastic, params: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
    params = merge(params, elastic.ema if config.reset_to == 'ema' else elastic.init)
    if config.reset_critic:
        params = merge(params, elastic.critic)
    return params, forget_moments(opt_state) if config.reset_optimizer else opt_state


def reference(config: ElasticReset, elastic: Elastic, params: Tree) -> Tree:
    """The parameters that the KL penalty compares with, complete: what is not the policy's is as in `params`."""
    return merge(params, elastic.ema if config.kl_reference == 'ema' else elastic.init)


def forget_moments(opt_state: Tree) -> Tree:
    """`opt_state` with moments (and their step counts) of Adam, RMSProp and momentum at zero. Schedules stay."""
    kinds = (optax.ScaleByAdamState, optax.ScaleByRmsState, optax.ScaleByRStdDevState, optax.TraceState)
    zero = lambda s: jax.tree.map(jnp.zeros_like, s) if isinstance(s, kinds) else s
    return jax.tree.map(zero, opt_state, is_leaf=lambda s: isinstance(s, kinds))


def at_boundary(opt_state: Tree) -> bool | Array:
    """Whether no gradients are half accumulated in `opt_state`; True without `optax.MultiSteps`."""
    is_multi = lambda s: isinstance(s, optax.MultiStepsState)
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_multi) if is_multi(s)]
    return jnp.all(jnp.stack([s.mini_step == 0 for s in states])) if states else True


# ---- Measures and the post-hoc baseline ----------------------------------------------------------------------------

def kept_fraction(decay: float, ticks: int) -> float:
    """Share of a period's displacement that survives its reset, for a policy that moves at constant velocity.

        1 - d (1 - d^n) / (n (1 - d))          n ticks a period

    0.995 keeps 4% of 17 ticks and 81% of 1040: the first is nearly a reset to the initial policy, the second hardly
    one.
    """
    if ticks < 1:
        raise ValueError(f'ticks={ticks} must be at least 1')
    if decay == 1:
        return 0.0
    return 1 - decay * (1 - decay ** ticks) / (ticks * (1 - decay))


def kept(elastic: Elastic, params: Tree) -> Array:
    """The same as measured: how far the average went along the policy's displacement from the initial policy.

        <ema - init, params - init> / |params - init|^2

    Read it right before a reset. float32 scalar; 0 for a policy that has not moved.
    """
    policy = _subset(params, elastic.init)
    away = jax.tree.map(lambda x, o: x.astype(o.dtype) - o, policy, elastic.init)
    followed = jax.tree.map(lambda e, o: e - o, elastic.ema, elastic.init)
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    squared = dot(away, away)
    return jnp.where(squared > 0, dot(followed, away) / jnp.where(squared > 0, squared, 1), 0)


def interpolate(init: Tree, params: Tree, alpha: float | Array) -> Tree:
    """`init + alpha (params - init)` in float32, then in the dtype of `params`: the control every claim of a better
    trade-off needs. A reset is such an interpolation; without a gain over this front there is none."""
    def one(o, x):
        wide = _wide(x.dtype)
        return (o.astype(wide) + alpha * (x.astype(wide) - o.astype(wide))).astype(x.dtype)
    return jax.tree.map(one, init, params)


# ---- Parts of a parameter tree -------------------------------------------------------------------------------------

def select(params: Tree, pattern: str, *, without: str = '') -> dict:
    """The floating parameters whose path fully matches `pattern` and not `without`: a nested dict of their paths.

    Args:
        params: any pytree of arrays; counters, PRNG keys and the like are never selected.
    """
    part: dict = {}
    for path, x in _paths(params).items():
        name = '/'.join(path)
        if _is_floating(x) and re.fullmatch(pattern, name) and not (without and re.fullmatch(without, name)):
            node = part
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = x
    return part


def merge(params: Tree, part: dict) -> Tree:
    """`params`, whatever their type, with copies of the parameters in `part`, which keep the dtype of `params`."""
    replaced = _paths(part)

    def one(path, x):
        path = _names(path)
        return jnp.array(replaced[path], x.dtype, copy=True) if path in replaced else x
    return jax.tree_util.tree_map_with_path(one, params)


def _subset(params: Tree, like: dict) -> dict:
    """Those of `params` whose paths `like` holds, as a nested dict."""
    paths = _paths(params)
    return jax.tree_util.tree_map_with_path(lambda path, _: paths[_names(path)], like)


def _map_subset(f: Callable[..., Array], part: dict, params: Tree) -> dict:
    return jax.tree.map(f, part, _subset(params, part))


def _paths(tree: Tree) -> dict[tuple[str, ...], Any]:
    return {_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path as names, one a level; a tree that is a single array has the path ('',)."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ('',)


def _is_floating(x: Any) -> bool:
    return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _when(flag: bool | Array, f: Callable[[Tree], Tree], x: Tree) -> Tree:
    if isinstance(flag, jax.Array):
        return jax.lax.cond(flag, f, lambda x: x, x)
    return f(x) if flag else x
