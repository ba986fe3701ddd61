"""The translation game: both agents fine-tuned on French and German alone, with Elastic Reset or what it is compared
with (arXiv 2312.07551; the game of arXiv 1909.04499 and 2003.12694).

    French -> speaker -> sampled English -> listener -> German

The listener learns German from the speaker's English by cross entropy; the speaker is rewarded with the listener's mean
log-likelihood of the gold German ('a2c': REINFORCE with a learned baseline), or learns through a straight-through
Gumbel-softmax ('gumbel'). One Adam step trains both. Elastic Reset averages and resets the speaker alone; its value
network, the listener and the optimizer stay.
"""
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.translation import agent as agents
from experiments.rlhf.translation import data as data_lib
from experiments.rlhf.translation import evaluation
from experiments.runtime import optim, partition, placement
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from rlhf_jax import elastic_reset, kl, masked
from rlhf_jax.models import seq2seq
from rlhf_jax.tasks import translation

Array = jax.Array
ALGORITHMS = ('a2c', 'gumbel')
KL_ONLY = ('fixed_reference', 'ema_anchor', 'reference_reset')  # methods that act through the KL penalty alone
RULES = partition.prefixed('(?:speaker|listener)', seq2seq.PARTITION_RULES)


def make_method(config: ml_collections.ConfigDict) -> elastic_reset.ElasticReset | None:
    """What averages and resets the speaker and what a KL penalty compares it with; None: neither is asked for.

    Raises:
        ValueError: an unknown method, one that could never act, or settings out of range.
    """
    fields, coefficient = dict(config.elastic), config.kl.coefficient
    name = fields.pop('method') or ('fixed_reference' if coefficient else '')
    if coefficient < 0:
        raise ValueError(f'kl.coefficient={coefficient} must not be negative')
    if not name:
        return None
    if config.freeze_speaker:
        raise ValueError(f'elastic.method or kl.coefficient is set, but freeze_speaker leaves {name!r} nothing to do')
    if name in KL_ONLY:
        if not coefficient:
            raise ValueError(f'elastic.method={name!r} acts through the KL penalty alone, but kl.coefficient is 0')
        fields |= dict(reset_optimizer=False, reset_critic=False)
    method = elastic_reset.method(name, policy='speaker/.*', critic='speaker/value_.*', **fields)
    method.resets(config.num_steps)
    return method


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    # ---- What is asked for -------------------------------------------------------------------------------------------
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f'algorithm={config.algorithm!r} is not one of {ALGORITHMS}')
    m, weights, method = config.message, config.loss, make_method(config)
    if not 0 <= m.min_length <= m.max_length:
        raise ValueError(f'message.min_length={m.min_length} must be between 0 and max_length={m.max_length}')
    if not weights.temperature > 0:
        raise ValueError(f'loss.temperature={weights.temperature} must be positive')
    languages = ('fr', 'de') + (('en',) if m.reference_length else ())
    model, shards = agents.make_agent(config), mesh_lib.batch_shards(mesh)
    unit = shards * config.accumulate
    pairs = config.pairs.every > 0 and config.pairs
    beta = config.kl.coefficient

    def init_params(key):
        first, second = jax.random.split(key)
        return {'speaker': agents.init_params(model, first), 'listener': agents.init_params(model, second)}

    tx = optim.adamw(config.optimizer, jax.eval_shape(init_params, jax.random.key(0)), config.num_steps)

    def extra(params, checksums):
        return {'vocabulary': checksums} | ({'elastic': elastic_reset.init(method, params)} if method else {})

    def init(key):
        key, carried = jax.random.split(key)
        params = init_params(key)
        return TrainState(jnp.int32(0), params, tx.init(params), None, carried, extra(params, jnp.zeros(3, jnp.uint32)))

    # ---- Loss --------------------------------------------------------------------------------------------------------
    def score(speaker, read, tokens):
        """Log-probabilities of a message's tokens, entropies and values [N, L + 1], as `send` drew them."""
        begin = jnp.full((tokens.shape[0], 1), seq2seq.BOS, tokens.dtype)
        logits, values = model.apply({'params': speaker}, *read, jnp.concatenate([begin, tokens], -1))
        early = jnp.arange(tokens.shape[-1])[:, None] < m.min_length
        barred = early & (jnp.arange(logits.shape[-1]) == seq2seq.EOS)
        logp = jax.nn.log_softmax(jnp.where(barred, -1e9, logits))
        return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(-1), values

    def loss(params, state, batch, rng):
        draw_key, drop_key = jax.random.split(rng)
        dropout = drop_key if config.model.dropout else None
        speaker, listener = params['speaker'], params['listener']
        read = agents.source(batch, 'fr')
        gumbel = config.algorithm == 'gumbel' and not config.freeze_speaker
        message = model.apply(
            {'params': speaker if gumbel else jax.lax.stop_gradient(speaker)}, *read, key=draw_key,
            max_length=m.max_length, min_length=m.min_length, relaxation=weights.temperature if gumbel else None,
            max_lengths=batch['en_length'] - 2 if m.reference_length else None, method='send')

        # The listener learns German from the message; through a relaxed one the speaker learns with it.
        heard = message.one_hot if gumbel else message.tokens
        logprobs, mask = agents.target_logprobs(model, listener, (heard, message.mask), batch, 'de', dropout)
        ce = agents.cross_entropy(logprobs, mask)
        rewards = translation.reward(logprobs, mask)
        total = weights.listener * ce
        metrics = {'ce_de': ce, 'reward': rewards.mean(), 'message_length': message.mask.sum(-1).mean()}

        if not config.freeze_speaker:
            said, entropy, values = (message.logprobs, message.entropies, message.values) if gumbel else score(
                speaker, read, message.tokens)
            metrics['entropy'] = masked.mean(entropy, message.drawn)
            if beta:
                reference = elastic_reset.reference(method, state.extra['elastic'], state.params)['speaker']
                ref_logprobs = score(jax.lax.stop_gradient(reference), read, message.tokens)[0]
                metrics['kl'] = kl.sequence_kl(said, ref_logprobs, message.drawn).mean()
            if gumbel:
                if beta:  # k2, for its gradient, unlike that of k1, is the gradient of the KL
                    total += beta * kl.sequence_kl(said, ref_logprobs, message.drawn, 'k2').mean()
            else:
                if beta:
                    per_token = jax.lax.stop_gradient(kl.estimate(said, ref_logprobs))
                    rewards = kl.penalized_scores(rewards, per_token, message.drawn, beta)
                value, found = translation.speaker_loss(
                    said, entropy, values, rewards, message.drawn, baseline_coefficient=weights.baseline,
                    entropy_coefficient=weights.entropy)
                total += weights.policy * value
                metrics |= found
        if pairs:
            total += supervised(params, state, batch, dropout, metrics)
        return total, jax.lax.stop_gradient(metrics)

    def supervised(params, state, batch, dropout, metrics):
        """Cross entropy of both agents on pretraining pairs, on every `pairs.every`-th step ("S2P")."""
        def both(params):
            found = 0.0
            for name, (first, second) in agents.PAIRS.items():
                part = {key.removeprefix(f'{name}_'): x for key, x in batch.items() if key.startswith(f'{name}_')}
                found += agents.cross_entropy(*agents.target_logprobs(
                    model, params[name], agents.source(part, first), part, second, dropout))
            return found
        metrics['ce_pairs'] = jax.lax.cond(state.step % pairs.every == 0, both, lambda _: 0.0, params)
        return pairs.coefficient * metrics['ce_pairs']

    # ---- Step --------------------------------------------------------------------------------------------------------
    def step(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        (value, metrics), grads = optim.value_and_grad(
            lambda p, b, r: loss(p, state, b, r), state.params, batch, rng, config.accumulate, shards)
        params, opt_state, norm = optim.apply(tx, grads, state)
        carried = dict(state.extra)
        if method:  # a step is one rollout and one update, so it is also an iteration
            due, elastic = method.due('step', state.step), state.extra['elastic']
            elastic, params, opt_state = elastic_reset.apply(method, elastic, params, opt_state,
                                                             elastic_reset.Due(due.tick, False, False))
            metrics['kept'] = elastic_reset.kept(elastic, params)  # as a reset at this step would find it
            carried['elastic'], params, opt_state = elastic_reset.apply(
                method, elastic, params, opt_state, elastic_reset.Due(False, due.reset, due.reset_ema))
        return (state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=carried),
                metrics | {'loss': value, 'grad_norm': norm})

    # ---- Start -------------------------------------------------------------------------------------------------------
    def warm_start(state):
        params = dict(state.params)
        for name in agents.PAIRS:
            if config[name]:
                params[name] = agents.load(config[name], name, config)
        return state.replace(params=params, extra=extra(params, agents.checksums(config, translation.FIELDS)))

    def hooks(writer):
        return evaluation.hooks(config, writer, lambda: evaluation.GameEvaluation(config, model))

    spec = agents.batch_spec(config, languages, unit)
    if pairs:
        for name, pair in agents.PAIRS.items():
            spec |= {f'{name}_{key}': x for key, x in agents.batch_spec(one_length(config), pair, unit).items()}
    return Experiment(init, loss, step, RULES, spec,
                      lambda: open_batches(config, languages, unit, placement.share_of(mesh)),
                      warm_start=warm_start, hooks=hooks)


# ---- Batches -------------------------------------------------------------------------------------------------------

def one_length(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """For pairs beside the game's own rows: one shape, or a step would compile for every combination of shapes."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        one.data.lengths = one.data.lengths[-1:]
    return one


def open_batches(config: ml_collections.ConfigDict, languages: tuple[str, ...], unit: int,
                 share: placement.Share = placement.WHOLE) -> Any:
    own = agents.open_batches(config, languages, unit, share)
    if not config.pairs.every:
        return own
    streams = {'': own}
    for name, pair in agents.PAIRS.items():
        if not config.pairs[name] and config.data.path:
            raise ValueError(f'pairs.{name} is empty: give the folder that the {name} was pretrained on')
        one = one_length(config)
        with one.unlocked():
            one.vocabulary.paths = tuple(config.vocabulary.paths) or (config.data.path,)
            one.data.path = config.pairs[name]
        streams[f'{name}_'] = agents.open_batches(one, pair, unit, share)
    return Together(streams)


class Together:
    """Streams side by side: the arrays of each under its prefix."""

    def __init__(self, streams: dict[str, data_lib.LengthBatches]):
        self._streams = streams

    def __iter__(self):
        return self

    def __next__(self):
        return {prefix + key: x for prefix, stream in self._streams.items() for key, x in next(stream).items()}

    def get_state(self):
        return {prefix: stream.get_state() for prefix, stream in self._streams.items()}

    def set_state(self, state):
        for prefix, stream in self._streams.items():
            stream.set_state(state[prefix])
