"""The translation game: both agents fine-tuned on French and German alone, with Elastic Reset or what it is compared
with (arXiv 2312.07551; the game of arXiv 1909.04499 and 2003.12694).

    French -> speaker -> sampled English -> listener -> German

The listener learns German from the speaker's English by cross entropy; the speaker is rewarded with the listener's mean
log-likelihood of the gold German ('a2c': REINFORCE with a learned baseline), or learns through a straight-through
Gumbel-softmax ('gumbel'). One Adam step trains both. Elastic Reset averages and resets the speaker, and with
`elastic.agents='both'` the listener; the speaker's value network and the optimizer stay.
"""
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.translation import agent as agents
from experiments.rlhf.translation import data as data_lib
from experiments.rlhf.translation import evaluation, imitation
from experiments.runtime import checks, optim, partition, placement
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from rlhf_jax import elastic_reset, kl, masked
from rlhf_jax.models import seq2seq
from rlhf_jax.tasks import translation

Array = jax.Array
ALGORITHMS = ('a2c', 'gumbel')
KL_ONLY = ('fixed_reference', 'ema_anchor', 'reference_reset')  # methods that act through the KL penalty alone
Params = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Array]
# Who is averaged and reset -> parameters.
AGENTS = {'speaker': r'speaker/.*', 'both': r'(speaker|listener)/.*'}
RULES = partition.prefixed('(?:speaker|listener)', seq2seq.PARTITION_RULES)


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    check(config)
    unit = mesh_lib.batch_shards(mesh)
    game = TranslationGame(config, make_method(config))

    def hooks(writer):
        generations = [imitation.Generations(config, game.model, mesh)] if imitation.wanted(config) else []
        return generations + evaluation.hooks(config, writer, lambda: evaluation.GameEvaluation(config, game.model))

    def check_runs():
        game.pretrained()
        evaluation.check(config, translation.FIELDS)

    return Experiment(game.init, game.loss, game.step, RULES, batch_spec(config, unit),
                      lambda: open_batches(config, unit, placement.share_of(mesh)), warm_start=game.warm_start,
                      check=check_runs, hooks=hooks)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for settings out of range."""
    agents.whole_batches(config)
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f'algorithm={config.algorithm!r} is not one of {ALGORITHMS}')
    message = config.message
    if not 0 <= message.min_length <= message.max_length:
        raise ValueError(f'message.min_length={message.min_length} must be between 0 and max_length='
                         f'{message.max_length}')
    if not config.loss.temperature > 0:
        raise ValueError(f'loss.temperature={config.loss.temperature} must be positive')
    imitation.check(config)


def make_method(config: ml_collections.ConfigDict) -> elastic_reset.ElasticReset | None:
    """What averages and resets the speaker and what a KL penalty compares it with; None: neither is asked for.

    Raises:
        ValueError: an unknown method, one that could never act, or settings out of range.
    """
    fields, coefficient = dict(config.elastic), config.kl.coefficient
    agents_reset = fields.pop('agents', 'speaker')
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
    checks.choice('elastic.agents', agents_reset, AGENTS)
    method = elastic_reset.method(name, policy=AGENTS[agents_reset], critic='speaker/value_.*', **fields)
    method.resets(config.num_steps)
    return method


class TranslationGame:
    """State, loss and step of a game.

    Args:
        config: of the run.
        method: of resets and KL reference; None: neither.

    Attributes:
        model: of both agents.
    """

    def __init__(self, config: ml_collections.ConfigDict, method: elastic_reset.ElasticReset | None):
        self._config, self._method = config, method
        self.model = agents.make_agent(config)
        shapes = jax.eval_shape(self.init_params, jax.random.key(0))
        self._optimizer = optim.adamw(config.optimizer, shapes, config.num_steps)

    # ---- State -------------------------------------------------------------------------------------------------------

    def init_params(self, key: Array) -> Params:
        """Fresh agents."""
        first, second = jax.random.split(key)
        return {'speaker': agents.init_params(self.model, first), 'listener': agents.init_params(self.model, second)}

    def init(self, key: Array) -> TrainState:
        """The state of a run from fresh agents."""
        key, carried = jax.random.split(key)
        params = self.init_params(key)
        extra = self.extra(params, jnp.zeros(3, jnp.uint32))
        return TrainState(jnp.int32(0), params, self._optimizer.init(params), None, carried, extra)

    def extra(self, params: Params, checksums: Array) -> dict[str, Any]:
        """What a run carries besides: checksums of its vocabularies, uint32 [3], averages, and students."""
        elastic = {'elastic': elastic_reset.init(self._method, params)} if self._method else {}
        learning = {'students': imitation.students(self._config, params)} if imitation.wanted(self._config) else {}
        return {'vocabulary': checksums} | elastic | learning

    def pretrained(self) -> Params:
        """Weights of the agents that the config names, by name.

        Raises:
            ValueError: a work directory holds no such agent, or one of other sizes or of another vocabulary.
        """
        named = [name for name in agents.PAIRS if self._config[name]]
        return {name: agents.load(self._config[name], name, self._config) for name in named}

    def warm_start(self, state: TrainState) -> TrainState:
        """`state` with the pretrained agents that the config names."""
        params = state.params | self.pretrained()
        extra = self.extra(params, agents.checksums(self._config, translation.FIELDS))
        return state.replace(params=params, extra=extra)

    # ---- Loss --------------------------------------------------------------------------------------------------------

    @property
    def _relaxed(self) -> bool:
        """Whether the speaker learns through its own, relaxed message."""
        return self._config.algorithm == 'gumbel' and not self._config.freeze_speaker

    def send(self, speaker: Params, source: tuple[Array, Array], batch: Batch, key: Array) -> seq2seq.Message:
        """The speaker's English, drawn with `key`; differentiable in the speaker where it is relaxed."""
        settings = self._config.message
        return self.model.apply(
            {'params': speaker if self._relaxed else jax.lax.stop_gradient(speaker)}, *source, key=key,
            max_length=settings.max_length, min_length=settings.min_length,
            relaxation=self._config.loss.temperature if self._relaxed else None,
            max_lengths=batch['en_length'] - 2 if settings.reference_length else None, method='send')

    def score(self, speaker: Params, source: tuple[Array, Array], tokens: Array) -> tuple[Array, Array, Array]:
        """Log-probabilities of a message's tokens, entropies and values as `send` drew them, float32 [N, L + 1]."""
        begin = jnp.full((tokens.shape[0], 1), seq2seq.BOS, tokens.dtype)
        logits, values = self.model.apply({'params': speaker}, *source, jnp.concatenate([begin, tokens], -1))
        early = jnp.arange(tokens.shape[-1])[:, None] < self._config.message.min_length
        barred = early & (jnp.arange(logits.shape[-1]) == seq2seq.EOS)
        logprobs = jax.nn.log_softmax(jnp.where(barred, -1e9, logits))
        of_tokens = jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
        return of_tokens, -(jnp.exp(logprobs) * logprobs).sum(-1), values

    def loss(self, params: Params, state: TrainState, batch: Batch, rng: Array) -> tuple[Array, Metrics]:
        """The losses of both agents, added with the weights of `config.loss`."""
        draw_key, drop_key = jax.random.split(rng)
        dropout = drop_key if self._config.model.dropout else None
        source = agents.source(batch, 'fr')
        message = self.send(params['speaker'], source, batch, draw_key)

        # The listener learns German from the message; through a relaxed one the speaker learns with it.
        english = message.one_hot if self._relaxed else message.tokens
        logprobs, mask = agents.target_logprobs(self.model, params['listener'], (english, message.mask), batch, 'de',
                                                dropout)
        cross_entropy, rewards = agents.cross_entropy(logprobs, mask), translation.reward(logprobs, mask)
        total = self._config.loss.listener * cross_entropy
        metrics = {'ce_de': cross_entropy, 'reward': rewards.mean(), 'message_length': message.mask.sum(-1).mean()}
        if not self._config.freeze_speaker:
            value, of_speaker = self.speaker_loss(params['speaker'], state, source, message, rewards)
            total += value
            metrics |= of_speaker
        if self._config.pairs.every > 0:
            metrics['ce_pairs'] = self.pairs_loss(params, state, batch, dropout)
            total += self._config.pairs.coefficient * metrics['ce_pairs']
        return total, jax.lax.stop_gradient(metrics)

    def speaker_loss(self, speaker: Params, state: TrainState, source: tuple[Array, Array], message: seq2seq.Message,
                     rewards: Array) -> tuple[Array, Metrics]:
        """The speaker's policy gradient (of a relaxed message there is none: it learns through the listener), with the
        price of its KL from the reference."""
        beta, weights = self._config.kl.coefficient, self._config.loss
        logprobs, entropy, values = (message.logprobs, message.entropies, message.values) if self._relaxed else (
            self.score(speaker, source, message.tokens))
        metrics = {'entropy': masked.mean(entropy, message.drawn)}
        if beta:
            reference = elastic_reset.reference(self._method, state.extra['elastic'], state.params)['speaker']
            ref_logprobs = self.score(jax.lax.stop_gradient(reference), source, message.tokens)[0]
            metrics['kl'] = kl.sequence_kl(logprobs, ref_logprobs, message.drawn).mean()
        if self._relaxed:
            if not beta:
                return jnp.float32(0), metrics
            # k2, for its gradient, unlike that of k1, is the gradient of the KL
            return beta * kl.sequence_kl(logprobs, ref_logprobs, message.drawn, 'k2').mean(), metrics
        if beta:
            per_token = jax.lax.stop_gradient(kl.estimate(logprobs, ref_logprobs))
            rewards = kl.penalized_scores(rewards, per_token, message.drawn, beta)
        value, of_loss = translation.speaker_loss(
            logprobs, entropy, values, rewards, message.drawn, baseline_coefficient=weights.baseline,
            entropy_coefficient=weights.entropy)
        return weights.policy * value, metrics | of_loss

    def pairs_loss(self, params: Params, state: TrainState, batch: Batch, dropout: Array | None) -> Array:
        """Cross entropy of both agents on pretraining pairs at every `pairs.every`-th step ("S2P"), 0 at the others."""
        def both(params):
            total = 0.0
            for name, (first, second) in agents.PAIRS.items():
                part = {key.removeprefix(f'{name}_'): x for key, x in batch.items() if key.startswith(f'{name}_')}
                total += agents.cross_entropy(*agents.target_logprobs(
                    self.model, params[name], agents.source(part, first), part, second, dropout))
            return total
        return jax.lax.cond(state.step % self._config.pairs.every == 0, both, lambda _: 0.0, params)

    # ---- Step --------------------------------------------------------------------------------------------------------

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of both agents; it is one rollout and one update, so also an iteration of Elastic Reset."""
        rng = jax.random.fold_in(state.rng, state.step)
        (value, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(state.params, state, batch, rng)
        params, opt_state, norm = optim.apply(self._optimizer, grads, state)
        extra = dict(state.extra)
        if self._method:
            due = self._method.due('step', state.step)
            extra['elastic'], params, opt_state, metrics['kept'] = elastic_reset.apply_measured(
                self._method, extra['elastic'], params, opt_state, due)
        return (state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra),
                metrics | {'loss': value, 'grad_norm': norm})


# ---- Batches -------------------------------------------------------------------------------------------------------

def languages_of(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Languages of the game's own rows; English is read only for the length of its sentences."""
    return ('fr', 'de') + (('en',) if config.message.reference_length else ())


def batch_spec(config: ml_collections.ConfigDict, unit: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the largest batch, with those of the pretraining pairs beside the game's own."""
    spec = agents.batch_spec(config, languages_of(config), unit)
    if config.pairs.every > 0:
        for name, pair in agents.PAIRS.items():
            spec |= {f'{name}_{key}': x for key, x in agents.batch_spec(one_length(config), pair, unit).items()}
    return spec


def one_length(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """For pairs beside the game's own rows: one shape, or a step would compile for every combination of shapes."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        one.data.lengths = one.data.lengths[-1:]
    return one


def open_batches(config: ml_collections.ConfigDict, unit: int, share: placement.Share = placement.WHOLE) -> Any:
    """The game's own rows, and with `pairs.every` the pretraining pairs beside them; this process's `share` of both."""
    game_rows = agents.open_batches(config, languages_of(config), unit, share)
    if not config.pairs.every:
        return game_rows
    streams = {'': game_rows}
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
