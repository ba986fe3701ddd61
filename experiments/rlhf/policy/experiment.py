"""A policy trained on what it samples: Online DPO, PPO, RLOO, Proximal RLOO, GRPO, Best-of-N (arXiv 2410.18252 §2-3),
each under Elastic Reset or a method it is compared with (arXiv 2312.07551) where `config.elastic.method` says so.

One step of the loop takes one rollout batch: N minibatches, T times over. Whether that batch was made synchronously, by
an earlier policy or in another process is the stream's business (`rollouts.py`); the step is the same.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.models import architecture, loading
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.policy import algorithms, evaluation, rollouts
from experiments.runtime import launch, modules, optim
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from rlhf_jax import elastic_reset as er
from rlhf_jax import kl as kl_lib
from rlhf_jax import masked
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models import heads, lora

Array = jax.Array
Params = dict[str, Any]
Rows = dict[str, Array]


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    config = tokenizer_lib.settled(config)
    a, shards = config.algorithm, mesh_lib.batch_shards(mesh)
    algorithm = algorithms.get(a)
    check(config, shards)
    forward = make_forward(config, algorithm)
    elastic = elastic_config(config)
    updates = a.num_minibatches * a.num_epochs
    controller = (kl_lib.AdaptiveController(a.kl_target, a.kl_rate) if a.kl_target else kl_lib.FixedController())
    init_params = make_init(config, algorithm)
    groups = ml_collections.ConfigDict(dict(config.optimizer))
    trained_shapes = divide(config, jax.eval_shape(init_params, jax.random.key(0)))[1]
    if config.lr_per == 'batch':  # the published runs: once a rollout batch, ahead of it, so the last one trains at 0
        tx = optim.adamw(groups, trained_shapes, config.num_steps, clock=lambda n: n // updates + 1)
    else:
        tx = optim.adamw(groups, trained_shapes, config.num_steps * updates)

    def assemble(params: Params, key: Array) -> TrainState:
        """The state at the start of a run from `params`."""
        _, trained = divide(config, params)
        extra = {'kl_coefficient': jnp.float32(a.kl_coefficient)}
        if elastic:
            extra['elastic'] = er.init(elastic, trained)
        elif not config.lora.rank:
            dtype = modules.dtype(config.reference)
            extra['reference'] = {'policy': jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params['policy'])}
        return TrainState(jnp.int32(0), params, tx.init(trained), None, key, extra)

    def init(key):
        key, carried = jax.random.split(key)
        return assemble(init_params(key), carried)

    def reference(state: TrainState) -> Params:
        """The policy that KL is measured against."""
        frozen, trained = divide(config, state.params)
        if elastic:
            return join(frozen, er.reference(elastic, state.extra['elastic'], trained))['policy']
        return lora.without(state.params['policy']) if config.lora.rank else state.extra['reference']['policy']

    def scorers(state: TrainState) -> algorithms.Scorers:
        def score(params, which):
            def run(rows):
                text = {name: rows[name] for name in algorithms.TEXT}
                return in_parts(lambda part: forward(params, part)[which], text, config.accumulate * a.num_minibatches,
                                shards)
            return run
        ref = jax.lax.stop_gradient({'policy': reference(state), 'value': state.params.get('value')})
        own = jax.lax.stop_gradient(state.params)
        return algorithms.Scorers(score(ref, 0), score(own, 0), score(own, 1))

    def loss_of(params, rows):
        logprobs, values = forward(params, rows)
        loss, metrics = algorithm.loss(a, logprobs, values, rows)
        gap = jnp.abs(masked.zeroed(logprobs - rows['logprobs'], rows['mask']))
        return loss, metrics | jax.lax.stop_gradient({'logprob_gap': masked.mean(gap, rows['mask']),
                                                      'logprob_gap_max': gap.max()})

    def loss(params, state, batch, rng):
        rows, metrics = algorithm.prepare(a, batch, scorers(state), state.extra['kl_coefficient'])
        value, more = loss_of(params, rows)
        return value, metrics | more

    def event(name, k, carry):
        """What Elastic Reset does after the k-th `name`: ticks, then resets; `kept` is measured between the two."""
        trained, opt_state, extra, seen = carry
        if not elastic:
            return carry
        due = elastic.due(name, k)
        state = extra['elastic']
        state, trained, opt_state = er.apply(elastic, state, trained, opt_state,
                                             due._replace(reset=False, reset_ema=False))
        if name == elastic.reset_on:
            done = seen['reset']  # of several in one iteration the first is told
            seen = {'kept': jnp.where(done > 0, seen['kept'], er.kept(state, trained)),
                    'reset': jnp.maximum(done, jnp.float32(due.reset))}
        state, trained, opt_state = er.apply(elastic, state, trained, opt_state, due._replace(tick=False))
        return trained, opt_state, extra | {'elastic': state}, seen

    def step(state, batch):
        rows, metrics = algorithm.prepare(a, batch, scorers(state), state.extra['kl_coefficient'])
        frozen, trained = divide(config, state.params)
        parts = optim.split_microbatches(rows, a.num_minibatches, shards)

        def update(carry, inputs):
            index, part = inputs
            trained, opt_state, extra, seen = carry
            (value, found), grads = value_and_grad(
                lambda t, r: loss_of(join(frozen, t), r), trained, part, algorithm.weights(a, part), config.accumulate,
                shards)
            updates, opt_state = tx.update(grads, opt_state, trained)
            trained = jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates)
            k = state.step * a.num_epochs * a.num_minibatches + index
            carry = event('step', k, (trained, opt_state, extra, seen))
            return carry, found | {'loss': value, 'grad_norm': optim.norm(grads)}

        def epoch(carry, e):
            carry, found = jax.lax.scan(update, carry, (e * a.num_minibatches + jnp.arange(a.num_minibatches), parts))
            return event('epoch', state.step * a.num_epochs + e, carry), found

        carry = (trained, state.opt_state, state.extra, {'kept': jnp.float32(0), 'reset': jnp.float32(0)})
        carry, found = jax.lax.scan(epoch, carry, jnp.arange(a.num_epochs))
        trained, opt_state, extra, seen = event('iteration', state.step, carry)
        # Before the first update learner and sampler should agree, but for staleness; later they are meant to part.
        metrics |= {name: x[0, 0] if name.startswith('logprob_gap') else x.mean() for name, x in found.items()}
        metrics |= of_batch(batch, state.step) | {'kl_coefficient': extra['kl_coefficient']}
        measured = metrics['kl_per_token' if a.kl_unit == 'token' else 'kl']
        extra = extra | {'kl_coefficient': controller.update(extra['kl_coefficient'], measured)}
        params = join(frozen, trained)
        return (state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra),
                metrics | (seen if elastic else {}))

    def check_inputs():
        tokenizer_lib.tokenizer_of(config)
        if config.weights:
            loading.check_decoder(config.weights, config)

    def warm_start(state):
        placed = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
        params = dict(state.params)
        if config.weights:
            loaded = loading.load_decoder(config.weights, config, placed(lora.without(params['policy'])))
            params['policy'] = loading.filled(params['policy'], loaded)
        if algorithm.critic and a.critic == 'separate':
            if a.critic_weights:
                module, critic = loading.load_reward_model(a.critic_weights, config.model)
                architecture.check_same(a.critic_weights, module.backbone, architecture.decoder(config.model),
                                    'algorithm.critic_weights')
                params['value'] = jax.device_put(critic, placed(params['value']))
            elif config.weights:
                params['value'] = loading.filled(params['value'], {'backbone': loaded})
        return jax.jit(assemble)(params, state.rng)

    def divergence(state, batch):
        """KL of each prompt's completions from the reference, in nats a response."""
        score = scorers(state)
        return {'kl': masked.zeroed(score.policy(batch) - score.reference(batch), batch['mask']).sum(-1).mean(-1)}

    def hooks(writer):
        return (evaluation.HeldOutPrompts(config, mesh, divergence, writer),) if config.eval_every else ()

    rules = (*architecture.rules(config.model, 'policy'), *architecture.rules(config.model, 'value/backbone'))
    return Experiment(init, loss, step, rules, batch_shapes(config), None, check=check_inputs, warm_start=warm_start,
                      sampler_program=lambda devices: rollouts.sampler_program(config, devices),
                      open_rollouts=lambda workdir: rollouts.open_rollouts(config, mesh, workdir), hooks=hooks,
                      config=config)


# ---- Parts -----------------------------------------------------------------------------------------------------------

def check(config: ml_collections.ConfigDict, shards: int) -> None:
    """Raises a ValueError for settings that cannot work together."""
    a, s, module = config.algorithm, config.sampling, architecture.decoder(config.model)
    parts = shards * config.accumulate * a.num_minibatches
    if config.batch_size % parts:
        raise ValueError(f'batch_size={config.batch_size} prompts is not divisible by {shards} batch shards x '
                         f'accumulate={config.accumulate} x algorithm.num_minibatches={a.num_minibatches}; use a '
                         f'multiple of {parts}')
    if s.max_new_tokens < 1:
        raise ValueError(f'sampling.max_new_tokens={s.max_new_tokens} must be at least 1')
    if s.temperature <= 0:
        raise ValueError(f'sampling.temperature={s.temperature} must be positive: the learner needs the probabilities '
                         'that tokens were drawn with')
    if s.max_prompt < 1 or s.max_prompt + s.max_new_tokens > module.max_length:
        raise ValueError(f'sampling.max_prompt={s.max_prompt} and sampling.max_new_tokens={s.max_new_tokens} exceed '
                         f'the context of the model, {module.max_length}; lower one of them')
    if any(not 0 < bucket <= s.max_prompt for bucket in s.buckets):
        raise ValueError(f'sampling.buckets={tuple(s.buckets)} must be lengths up to sampling.max_prompt='
                         f'{s.max_prompt}')
    launch.check_choice('lr_per', config.lr_per, ('step', 'batch'))
    modules.dtype(config.reference, 'reference')
    rollouts.check(config)
    evaluation.check(config)
    elastic_config(config)


def elastic_config(config: ml_collections.ConfigDict) -> er.ElasticReset | None:
    """The method that `config.elastic` names; None without one.

    Raises:
        ValueError: an unknown method, or periods with which it would never act.
    """
    e, a = config.elastic, config.algorithm
    if not e.method:
        return None
    launch.check_choice('elastic.method', e.method, er.METHODS)
    fields = {name: value for name, value in e.items() if name not in ('method', 'period', 'ema_period')}
    if e.ema_period:
        fields['ema_period'] = e.ema_period
    if e.method in ('reset_to_init', 'reset_to_ema', 'elastic_reset', 'reference_reset') and e.period < 1:
        raise ValueError(f'elastic.period={e.period}: {e.method} needs how many {e.reset_on}s lie between two resets')
    fields['policy'] = r'policy/.*/lora_(a|b)' if config.lora.rank else r'policy/.*'
    fields['critic'] = r'value/.*' if algorithms.get(a).critic else ''
    found = er.method(e.method, e.period, **fields)
    per = {'iteration': 1, 'epoch': a.num_epochs, 'step': a.num_epochs * a.num_minibatches}
    found.resets(config.num_steps * per[found.reset_on])
    return found


def make_init(config: ml_collections.ConfigDict, algorithm: algorithms.Algorithm) -> Callable[[Array], Params]:
    """key -> {'policy': ..., 'value': ...}, fresh."""
    policy = architecture.init_decoder(config)

    def init(key):
        params = {'policy': policy(key)}
        if algorithm.critic:
            key = jax.random.fold_in(key, 7)
            if config.algorithm.critic == 'separate':
                critic = architecture.reward_model(config.model)
                params['value'] = critic.init(key, jnp.zeros((1, 2), jnp.int32))['params']
            else:
                width = architecture.decoder(config.model).width
                params['value'] = {'value_head': heads.ScalarHead(True).init(key, jnp.zeros((1, width)))['params']}
        return params
    return init


def make_forward(config: ml_collections.ConfigDict, algorithm: algorithms.Algorithm) -> Callable:
    """(params, rows) -> log-probabilities of responses [b, C, L] at the sampling temperature, and values or None."""
    module, temperature = architecture.decoder(config.model), config.sampling.temperature
    critic = architecture.reward_model(config.model) if algorithm.critic else None
    shared = algorithm.critic and config.algorithm.critic == 'shared'

    def forward(params, rows):
        shape = rows['mask'].shape
        texts = lambda x: x.reshape(-1, x.shape[-1])  # a model reads completions one a row
        tokens, mask = texts(rows['tokens']), texts(jnp.concatenate([rows['prompt_mask'], rows['mask']], -1))
        length = shape[-1]
        span = slice(-length - 1, -1)  # each token is predicted one position before it
        out = module.apply({'params': params['policy']}, tokens, mask=mask, at=span,
                           output='both' if shared else 'logits')
        logits, values = out if shared else (out, None)
        logprobs = token_logprobs(logits, tokens[:, -length:], temperature)
        if shared:
            values = heads.ScalarHead(True).apply({'params': params['value']['value_head']}, values)
        elif critic is not None:
            values = critic.apply({'params': params['value']}, tokens, mask=mask)[:, span]
        return logprobs.reshape(shape), None if values is None else values.reshape(shape)

    return forward


def divide(config: ml_collections.ConfigDict, params: Params) -> tuple[Params, Params]:
    """(frozen, trained): with an adapter, the policy's own weights are frozen."""
    if not config.lora.rank:
        return {}, params
    frozen, adapter = lora.split(params['policy'])
    return {'policy': frozen}, params | {'policy': adapter}


def join(frozen: Params, trained: Params) -> Params:
    return lora.join(frozen, trained) if frozen else trained


def in_parts(fn: Callable[[Rows], Array], rows: Rows, parts: int, shards: int) -> Array:
    """`fn` of rows [B, ...], a part of them at a time, so that no more is held than while training."""
    if parts == 1:
        return fn(rows)
    out = jax.lax.map(fn, optim.split_microbatches(rows, parts, shards))
    return optim.join_microbatches(out, shards)


def value_and_grad(loss: Callable, params: Any, rows: Rows, weights: Array, accumulate: int, shards: int) -> tuple:
    """`jax.value_and_grad(loss, has_aux=True)(params, rows)` over microbatches, of a loss that is a mean in which row b
    counts `weights[b]`: microbatches of unequal weight add up to the loss of all rows."""
    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        return grad(params, rows)
    micro = optim.split_microbatches(rows | {'weights_of_rows': weights}, accumulate, shards)
    share = micro.pop('weights_of_rows').sum(1)
    share = jnp.where(share.sum() > 0, share / jnp.maximum(share.sum(), 1e-9), 1 / accumulate)

    def body(total, inputs):
        weight, part = inputs
        out = grad(params, part)
        return jax.tree.map(lambda t, o: t + weight * o.astype(t.dtype), total, out), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (share, micro))[0]


def of_batch(batch: Rows, step: Array) -> dict[str, Array]:
    """Measures of the completions themselves."""
    mask, lengths = batch['mask'], batch['mask'].sum(-1)
    found = {'reward': batch['rewards'].mean(), 'reward_std': batch['rewards'].std(), 'length': lengths.mean(),
             'ended': batch['ended'].mean(dtype=jnp.float32), 'entropy_estimate': -masked.mean(batch['logprobs'], mask),
             'token_staleness': masked.mean((step - batch['policy_version']).astype(jnp.float32), mask)}
    for name in ('gold', 'replaced'):
        if name in batch:
            found[name] = batch[name].mean(dtype=jnp.float32)
    return found


def batch_shapes(config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """A rollout batch as the step gets it, prompts at their longest."""
    s, rows = config.sampling, (config.batch_size, config.algorithm.num_samples)
    shape = lambda dtype, *more: jax.ShapeDtypeStruct((*rows, *more), dtype)
    length, prompt = s.max_new_tokens, s.max_prompt
    out = {'tokens': shape(jnp.int32, prompt + length), 'prompt_mask': shape(bool, prompt), 'mask': shape(bool, length),
           'logprobs': shape(jnp.float32, length), 'policy_version': shape(jnp.int32, length),
           'rewards': shape(jnp.float32), 'ended': shape(bool), 'replaced': shape(bool)}
    return out | ({'gold': shape(jnp.float32)} if config.reward.gold else {})
