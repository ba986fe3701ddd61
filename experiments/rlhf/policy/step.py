"""A policy's training step: one rollout batch, in N minibatches, T times over.

Whether that batch was made synchronously, by an earlier policy or in another process is the stream's business
(`rollouts.py`); the step is the same.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from experiments.rlhf.policy import algorithms
from experiments.rlhf.policy.kind import Networks
from experiments.runtime import modules, optim
from experiments.runtime.state import TrainState
from rlhf_jax import elastic_reset as er
from rlhf_jax import kl, masked
from rlhf_jax.models import lora

COUNTS = ('pairs',)  # metrics of a loss that are numbers of things: they add up over microbatches, others are means

Array = jax.Array
Params = dict[str, Any]
Rows = dict[str, Array]
Metrics = dict[str, Array]


class _Updated(NamedTuple):
    """What the updates of a batch change, one after another.

    Attributes:
        trained: parameters, without what an adapter leaves frozen.
        elastic: `er.Elastic`; None without Elastic Reset.
        kept, reset: float32 scalars, of the first reset within this batch: how much it kept, and whether there was one.
        stopped: float32 scalar, 1 once the policy is too far from the batch's sampler for more updates (`stop_kl`).
    """
    trained: Params
    opt_state: Any
    elastic: er.Elastic | None
    kept: Array
    reset: Array
    stopped: Array


class PolicyStep:
    """The state of a run, its step, and what of it is read elsewhere: loss and divergence.

    Args:
        config: of the run.
        algorithm: that `config.algorithm` names.
        networks: of the policy and its critic.
        elastic: the method of resets; None: none.
        optimizer: of the trained parameters.
        shards: devices that a batch is laid out over.

    Raises:
        ValueError: updates are to stop by a KL that the policy's scores do not estimate.
    """

    def __init__(self, config: ml_collections.ConfigDict, algorithm: algorithms.Algorithm, networks: Networks,
                 elastic: er.ElasticReset | None, optimizer: optax.GradientTransformation, shards: int):
        self._config, self._settings, self._algorithm = config, config.algorithm, algorithm
        self._networks, self._elastic, self._optimizer, self._shards = networks, elastic, optimizer, shards
        self._controller = (kl.AdaptiveController(config.algorithm.kl_target, config.algorithm.kl_rate)
                            if config.algorithm.kl_target else kl.FixedController())
        if config.algorithm.stop_kl and not networks.as_drawn:
            raise ValueError(f'algorithm.stop_kl={config.algorithm.stop_kl}: this policy scores a bound and not what '
                             'its sampler drew; set it to 0')

    # ---- State -------------------------------------------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        """The state of a run from fresh parameters."""
        key, carried = jax.random.split(key)
        return self.start(self._networks.init(key), carried)

    def start(self, params: Params, key: Array) -> TrainState:
        """The state at the start of a run from `params`."""
        trained = self._networks.divide(params)[1]
        extra = {'kl_coefficient': jnp.float32(self._settings.kl_coefficient)}
        if self._elastic:
            extra['elastic'] = er.init(self._elastic, trained)
        elif not self._config.lora.rank:
            extra['reference'] = {'policy': self._frozen(params['policy'])}
        if self._masks:
            extra['mask'] = {'policy': self._frozen(params['policy'])}
        return TrainState(jnp.int32(0), params, self._optimizer.init(trained), None, key, extra)

    def reference(self, state: TrainState) -> Params:
        """Parameters of the policy that KL is measured against."""
        if self._elastic:
            frozen, trained = self._networks.divide(state.params)
            elastic = er.reference(self._elastic, state.extra['elastic'], trained)
            return self._networks.join(frozen, elastic)['policy']
        if self._config.lora.rank:
            return lora.without(state.params['policy'])
        return state.extra['reference']['policy']

    @property
    def _masks(self) -> bool:
        """Whether tokens are drawn among those that an earlier policy finds likely."""
        return self._settings.mask.top_p > 0

    def _frozen(self, policy: Params) -> Params:
        """A copy of the policy's parameters to keep."""
        dtype = modules.dtype(self._config.reference)
        return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), policy)

    # ---- Measures of rows --------------------------------------------------------------------------------------------

    def scorers(self, state: TrainState) -> algorithms.Scorers:
        """Log-probabilities under the reference and under the policy as it is, and values; without gradient."""
        reference = jax.lax.stop_gradient({'policy': self.reference(state), 'value': state.params.get('value')})
        policy = jax.lax.stop_gradient(state.params)
        networks = self._networks
        # NLPO's KL is of the two whole policies, though tokens are drawn under the mask; its ratios are of the masked.
        as_drawn = networks.as_drawn and not self._masks
        return algorithms.Scorers(self._scorer(reference, 0), self._scorer(policy, 0), self._scorer(policy, 1),
                                  networks.columns, as_drawn, networks.scale)

    def _scorer(self, params: Params, output: int) -> Callable[[Rows], Array]:
        return lambda rows: self._read(lambda part: self._networks.forward(params, part)[output], rows)

    def _read(self, fn: Callable[[Rows], Array], rows: Rows) -> Array:
        """`fn` of the columns that the networks read, without gradient and as many rows at a time as in training."""
        columns = {name: rows[name] for name in self._networks.columns if name in rows}
        return in_parts(fn, columns, self._config.accumulate * self._settings.num_minibatches, self._shards)

    def divergence(self, state: TrainState, batch: Rows) -> Metrics:
        """KL of each prompt's completions from the reference, in nats a response: {'kl': float32 [B]}."""
        scorers, batch = self.scorers(state), self._networks.annotated(batch, jax.random.key(0))
        difference = scorers.policy(batch) - scorers.reference(batch)
        return {'kl': scorers.whole(masked.zeroed(difference, batch['mask']).sum(-1)).mean(-1)}

    # ---- Loss --------------------------------------------------------------------------------------------------------

    def prepare(self, state: TrainState, batch: Rows) -> tuple[Rows, Metrics]:
        """Rows to train on, made of a batch before its first update, and their metrics."""
        batch = self._networks.annotated(algorithms.with_rewards(batch), jax.random.fold_in(state.rng, state.step))
        rows, metrics = self._algorithm.prepare(self._settings, batch, self.scorers(state),
                                                state.extra['kl_coefficient'])
        if self._masks:
            mask_policy = jax.lax.stop_gradient(state.extra['mask']['policy'])
            rows['allowed'] = self._read(lambda part: self._networks.allowed(mask_policy, part), rows)
            count = jax.lax.population_count(rows['allowed']).sum(-1, dtype=jnp.float32)
            metrics['allowed_tokens'] = masked.mean(count, rows['mask'])
        return rows, metrics

    def loss_of_rows(self, params: Params, rows: Rows) -> tuple[Array, Metrics]:
        """The algorithm's loss of (a part of) the rows, and how far learner and sampler are apart on their tokens."""
        logprobs, values = self._networks.forward(params, rows)
        loss, metrics = self._algorithm.loss(self._settings, logprobs, values, rows)
        if not self._networks.as_drawn:
            return loss, metrics
        if self._settings.stop_kl:
            apart = kl.estimate(masked.zeroed(rows['logprobs'], rows['mask']), masked.zeroed(logprobs, rows['mask']),
                                'k3')
            metrics = metrics | {'sampler_kl': jax.lax.stop_gradient(masked.mean(apart, rows['mask']))}
        gap = jnp.abs(masked.zeroed(logprobs - rows['logprobs'], rows['mask']))
        return loss, metrics | jax.lax.stop_gradient({'logprob_gap': masked.mean(gap, rows['mask']),
                                                      'logprob_gap_max': gap.max()})

    def loss(self, params: Params, state: TrainState, batch: Rows, rng: Array) -> tuple[Array, Metrics]:
        """The loss of a whole batch, for tests and compile checks."""
        rows, metrics = self.prepare(state, batch)
        loss, more = self.loss_of_rows(params, rows)
        return loss, metrics | more

    # ---- Step --------------------------------------------------------------------------------------------------------

    def __call__(self, state: TrainState, batch: Rows) -> tuple[TrainState, Metrics]:
        """Trains on one rollout batch, `config.batch_size` prompts with their completions, [B, K, ...]."""
        settings = self._settings
        rows, metrics = self.prepare(state, batch)
        frozen, trained = self._networks.divide(state.params)
        minibatches = optim.split_microbatches(rows, settings.num_minibatches, self._shards)

        def minibatch(updated, inputs):
            index, part = inputs
            k = state.step * settings.num_epochs * settings.num_minibatches + index
            return self._update(frozen, updated, part, k)

        def epoch(updated, number):
            indices = number * settings.num_minibatches + jnp.arange(settings.num_minibatches)
            updated, metrics = jax.lax.scan(minibatch, updated, (indices, minibatches))
            skipped = metrics['stopped_updates'].min() if settings.stop_kl else None  # every update of the epoch is
            return self._after('epoch', state.step * settings.num_epochs + number, updated, skipped), metrics

        updated = _Updated(trained, state.opt_state, state.extra.get('elastic'), *3 * [jnp.float32(0)])
        updated, of_updates = jax.lax.scan(epoch, updated, jnp.arange(settings.num_epochs))
        updated = self._after('iteration', state.step, updated)
        metrics |= summary(of_updates) | batch_metrics(batch, state.step)
        metrics['kl_coefficient'] = state.extra['kl_coefficient']
        if self._elastic:
            metrics |= {'kept': updated.kept, 'reset': updated.reset}
        measured = metrics['kl_per_token' if settings.kl_unit == 'token' else 'kl']
        extra = state.extra | {'kl_coefficient': self._controller.update(state.extra['kl_coefficient'], measured)}
        if self._elastic:
            extra['elastic'] = updated.elastic
        params = self._networks.join(frozen, updated.trained)
        if self._masks:
            is_due = (state.step + 1) % self._settings.mask.every == 0
            extra['mask'] = {'policy': jax.tree.map(lambda mask, x: jnp.where(is_due, x.astype(mask.dtype), mask),
                                                    state.extra['mask']['policy'], params['policy'])}
        return state.replace(step=state.step + 1, params=params, opt_state=updated.opt_state, extra=extra), metrics

    def _update(self, frozen: Params, updated: _Updated, rows: Rows, k: Array) -> tuple[_Updated, Metrics]:
        """One optimizer update, the k-th of the run, on a minibatch."""
        (loss, metrics), grads = value_and_grad(
            lambda trained, part: self.loss_of_rows(self._networks.join(frozen, trained), part), updated.trained, rows,
            self._algorithm.weights(self._settings, rows), self._config.accumulate, self._shards)
        updates, opt_state = self._optimizer.update(grads, updated.opt_state, updated.trained)
        trained = jax.tree.map(lambda p, u: p + u.astype(p.dtype), updated.trained, updates)
        if self._settings.stop_kl:
            # Measured before the update. Once too far, always too far: other minibatches may lie nearer by chance.
            stopped = jnp.maximum(updated.stopped, jnp.float32(metrics['sampler_kl'] > self._settings.stop_kl))
            before = updated.trained, optim.left_out(updated.opt_state, opt_state)
            trained, opt_state = jax.tree.map(lambda old, new: jnp.where(stopped > 0, old, new), before,
                                              (trained, opt_state))
            updated = updated._replace(stopped=stopped)
            metrics = metrics | {'stopped_updates': stopped}
        updated = self._after('step', k, updated._replace(trained=trained, opt_state=opt_state), updated.stopped)
        return updated, metrics | {'loss': loss, 'grad_norm': optim.norm(grads)}

    def _after(self, event: str, k: Array, updated: _Updated, skipped: Array | None = None) -> _Updated:
        """What Elastic Reset does after the k-th `event`: ticks, measures, resets.

        Args:
            skipped: 1 where nothing was done in the event, so that the average does not tick; resets keep their time.
        """
        if not self._elastic:
            return updated
        due = self._elastic.due(event, k)
        if self._settings.stop_kl and skipped is not None:
            due = due._replace(tick=jnp.logical_and(due.tick, skipped == 0))
        elastic, trained, opt_state, kept = er.apply_measured(
            self._elastic, updated.elastic, updated.trained, updated.opt_state, due)
        if event == self._elastic.reset_on:  # of several resets within a batch the first is reported
            kept = jnp.where(updated.reset > 0, updated.kept, kept)
            updated = updated._replace(kept=kept, reset=jnp.maximum(updated.reset, jnp.float32(due.reset)))
        return updated._replace(elastic=elastic, trained=trained, opt_state=opt_state)


# ---- Parts -----------------------------------------------------------------------------------------------------------

def in_parts(fn: Callable[[Rows], Array], rows: Rows, parts: int, shards: int) -> Array:
    """`fn` of rows [B, ...], a part of them at a time, so that no more is in memory than while training."""
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
        (value, metrics), grads = grad(params, part)
        metrics = {name: x if name in COUNTS else weight * x for name, x in metrics.items()}
        out = (weight * value, metrics), jax.tree.map(lambda g: weight * g, grads)
        return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, out), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (share, micro))[0]


def summary(of_updates: Mapping[str, Array]) -> Metrics:
    """Means of the metrics of all updates on a batch, [T, N] each; of the gap between learner and sampler the first.

    Before any update the two should agree, except for staleness; later they are meant to part.
    """
    gaps = ('logprob_gap', 'logprob_gap_max')
    return {name: x[0, 0] if name in gaps else x.mean() for name, x in of_updates.items()}


def batch_metrics(batch: Rows, step: Array) -> Metrics:
    """Measures of the completions themselves, float32 scalars; rewards are of the completions that have one."""
    mask, rewarded = batch['mask'], jnp.isfinite(batch['rewards'])
    reward = masked.mean(batch['rewards'], rewarded)
    deviations = jnp.square(masked.zeroed(batch['rewards'], rewarded) - reward)
    metrics = {
        'reward': reward, 'reward_std': jnp.sqrt(masked.mean(deviations, rewarded)),
        'missing_rewards': 1 - rewarded.mean(dtype=jnp.float32), 'length': mask.sum(-1).mean(),
        'ended': batch['ended'].mean(dtype=jnp.float32), 'entropy_estimate': -masked.mean(batch['logprobs'], mask),
        'token_staleness': masked.mean((step - batch['policy_version']).astype(jnp.float32), mask),
        'replaced': batch['replaced'].mean(dtype=jnp.float32)}
    if 'gold' in batch:
        metrics['gold'] = masked.mean(batch['gold'], jnp.isfinite(batch['gold']))
    return metrics
