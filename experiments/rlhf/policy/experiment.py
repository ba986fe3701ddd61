"""A policy trained on what it samples: Online DPO, PPO, RLOO, Proximal RLOO, GRPO, Best-of-N (arXiv 2410.18252 §2-3),
each under Elastic Reset or a method it is compared with (arXiv 2312.07551) where `config.elastic.method` says so.

`kind.py` says what a policy has to offer, `autoregressive.py` how a decoder does. `models.py` has its networks,
`algorithms.py` the losses, `step.py` the training step, `rollouts.py` the batches, `rewards.py` and `evaluation.py`
what completions are worth.
"""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from experiments.rlhf.policy import algorithms, autoregressive, evaluation, hosts, roles, rollouts
from experiments.rlhf.policy.footprint import Footprint
from experiments.rlhf.policy.kind import Kind, Networks
from experiments.rlhf.policy.step import PolicyStep
from experiments.runtime import checks, fitting, modules, optim, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment, divisible_advice
from experiments.runtime.state import TrainState
from rlhf_jax import elastic_reset as er

KIND = autoregressive.KIND  # of the policies of this experiment


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    return build_policy(KIND, config, mesh)


def build_policy(kind: Kind, config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    """The experiment that trains a policy of `kind`.

    Raises:
        ValueError: settings that cannot work together.
    """
    config = kind.settled(config)
    shards = mesh_lib.batch_shards(mesh)
    algorithm = algorithms.get(config.algorithm)
    check(kind, config, algorithm, shards)
    networks = kind.networks(config, algorithm.critic)
    step = PolicyStep(config, algorithm, networks, elastic_config(config), make_optimizer(config, networks), shards)

    def warm_start(state: TrainState) -> TrainState:
        for x in jax.tree.leaves((state.opt_state, state.extra)):
            x.delete()  # they are made anew, and beside the new ones would take their memory twice
        shardings = partition.state_shardings(state, networks.rules, mesh)
        return jax.jit(step.start, out_shardings=shardings)(networks.load(state.params), state.rng)

    @functools.cache
    def footprint(devices: tuple[jax.Device, ...] | None = None) -> Footprint:
        generating = roles.generator_mesh(config, mesh, devices)
        return Footprint(kind, config, mesh, generating, jax.eval_shape(step.init, jax.random.key(0)), networks.rules)

    opened: list[rollouts.Rollouts] = []

    def budgeted() -> ml_collections.ConfigDict:
        return footprint().budgeted(fitting.usable_bytes(footprint().generating))

    def open_rollouts(workdir):
        opened[:] = [hosts.open_rollouts(kind, budgeted(), mesh, workdir)]
        return opened[0]

    def hooks(writer):
        if not config.eval_every:
            return ()
        here = opened[0].published if opened and not config.rollout.devices else lambda version: None
        evaluated = footprint().budgeted_for_evaluation(fitting.usable_bytes(mesh))
        return (evaluation.HeldOutPrompts(kind, evaluated, mesh, step.divergence, networks.columns, writer,
                                          published=here),)

    return Experiment(step.init, step.loss, step.__call__, networks.rules, batch_shapes(kind, config), None,
                      check=lambda: kind.check_inputs(config), warm_start=warm_start, hooks=hooks,
                      programs=lambda devices, usable: footprint(tuple(devices)).programs(usable),
                      beside_step=lambda devices: footprint(tuple(devices)).beside_step(), open_rollouts=open_rollouts,
                      generate=lambda workdir: hosts.generate(kind, budgeted(), mesh, workdir), config=config)


def make_optimizer(config: ml_collections.ConfigDict, networks: Networks) -> optax.GradientTransformation:
    """AdamW of the trained parameters; its schedules move once an update, or once a batch (`lr_per`).

    Once a batch is how the published runs did it: ahead of the batch, so that the last one trains at a rate of 0.
    """
    groups = ml_collections.ConfigDict(dict(config.optimizer))
    trained = networks.divide(jax.eval_shape(networks.init, jax.random.key(0)))[1]
    updates = config.algorithm.num_minibatches * config.algorithm.num_epochs
    if config.lr_per == 'batch':
        return optim.adamw(groups, trained, config.num_steps, clock=lambda n: n // updates + 1)
    return optim.adamw(groups, trained, config.num_steps * updates)


def check(kind: Kind, config: ml_collections.ConfigDict, algorithm: algorithms.Algorithm, shards: int) -> None:
    """Raises a ValueError for settings that cannot work together."""
    parts = shards * config.accumulate * config.algorithm.num_minibatches
    if config.batch_size % parts:
        minibatches = config.algorithm.num_minibatches
        raise ValueError(f'batch_size={config.batch_size} prompts is not divisible by {shards} batch shards x '
                         f'accumulate={config.accumulate} x algorithm.num_minibatches={minibatches}; '
                         + divisible_advice(config.batch_size, shards, config.accumulate, minibatches))
    kind.check(config)
    refusals = kind.refusals(config)
    for use in algorithms.uses(algorithm, config.algorithm):
        if use in refusals:
            raise ValueError(f'algorithm.name={config.algorithm.name!r}: {refusals[use]}')
    checks.choice('lr_per', config.lr_per, ('step', 'batch'))
    modules.dtype(config.reference, 'reference')
    roles.check(config)
    check_mask(config)
    evaluation.check(config)
    elastic_config(config)


def check_mask(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for settings under which the mask of sampler and learner (`algorithm.mask`) would differ."""
    if not config.algorithm.mask.top_p:
        return
    reasons = (
        (config.lora.rank, 'lora.rank', 0, 'the mask is a copy of all weights'),
        (config.rollout.max_staleness, 'rollout.max_staleness', 0, 'a stale batch may have an earlier mask'),
        (config.rollout.devices, 'rollout.devices', 0, 'the mask is sampled with on the devices of the learner'),
        (config.rollout.slots, 'rollout.slots', 0, 'refilled rows have one cache, not that of a mask policy too'),
        (config.rollout.transport != 'devices', 'rollout.transport', 'devices', 'generators elsewhere have no mask'),
        (config.sampling.scored != 'drawn', 'sampling.scored', 'drawn', 'ratios are of the masked policy'))
    for is_set, field, fix, reason in reasons:
        if is_set:
            node, name = field.split('.')
            raise ValueError(f'{field}={config[node][name]!r} under algorithm.mask: {reason}; set it to {fix!r}')


def elastic_config(config: ml_collections.ConfigDict) -> er.ElasticReset | None:
    """The method that `config.elastic` names; None without one.

    Raises:
        ValueError: an unknown method, or periods with which it would never act.
    """
    elastic, algorithm = config.elastic, config.algorithm
    if not elastic.method:
        return None
    checks.choice('elastic.method', elastic.method, er.METHODS)
    fields = {name: value for name, value in elastic.items() if name not in ('method', 'period', 'ema_period')}
    if elastic.ema_period:
        fields['ema_period'] = elastic.ema_period
    needs_period = ('reset_to_init', 'reset_to_ema', 'elastic_reset', 'reference_reset')
    if elastic.method in needs_period and elastic.period < 1:
        raise ValueError(f'elastic.period={elastic.period}: {elastic.method} needs how many {elastic.reset_on}s lie '
                         'between two resets')
    fields['policy'] = r'policy/.*/lora_(a|b)' if config.lora.rank else r'policy/.*'
    fields['critic'] = r'value/.*' if algorithms.get(algorithm).critic else ''
    method = er.method(elastic.method, elastic.period, **fields)
    events = {'iteration': 1, 'epoch': algorithm.num_epochs, 'step': algorithm.num_epochs * algorithm.num_minibatches}
    count = config.num_steps * events[method.reset_on]
    method.resets(count)
    if elastic.method == 'reference_reset' and not any(method.due(method.tick_on, k).tick for k in range(count)):
        raise ValueError(f'elastic.period={elastic.period} is longer than the run of {count} {method.reset_on}s: the '
                         'reference would never be renewed')
    return method


def batch_shapes(kind: Kind, config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """A rollout batch as the step gets it, [B, K, ...]."""
    each = lambda dtype: jax.ShapeDtypeStruct((config.batch_size, config.algorithm.num_samples), dtype)
    shapes = kind.batch_shapes(config) | {'rewards': each(jnp.float32), 'ended': each(bool), 'replaced': each(bool)}
    if config.reward.gold:
        shapes['gold'] = each(jnp.float32)
    return shapes
