"""The Lewis game (Lu et al., arXiv 2003.12694), on which drift from a given language can be measured exactly.

A speaker sees an object of `properties` properties, each of one of `types` types, and names it in `properties` symbols;
a listener reads each symbol and guesses that property. The given language has a symbol of its own for every type of
every property. Both agents learn it from a few objects, and are then rewarded for understanding each other alone: they
come to succeed, and the language drifts.

Agents are linear, as in the authors' Elastic Reset code: `{'speaker': ..., 'listener': ...}`, nested dicts throughout.
A whole run is one program (`train`), which `jax.vmap` runs over seeds.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import elastic_reset as er
from rlhf_jax.tasks import lewis_imitation
from rlhf_jax.tasks.lewis_agents import Array, Game, Params, listen, pick, speak
from rlhf_jax.tasks.lewis_agents import init as init
from rlhf_jax.tasks.lewis_imitation import Imitation as Imitation

METHODS = ('a2c', 'reinforce', 'gumbel')


# ---- Losses --------------------------------------------------------------------------------------------------------

def supervised_losses(params: Params, game: Game, objects: Array) -> tuple[Array, Array]:
    """Cross entropy of the speaker and of the listener on the given language, means over symbols and properties."""
    messages = game.messages(objects)
    logits, _ = speak(params['speaker'], game, objects)
    heard = listen(params['listener'], jax.nn.one_hot(messages, game.num_symbols))
    return -pick(logits, messages).mean(), -pick(heard, objects).mean()


def self_play_loss(params: Params, game: Game, objects: Array, key: Array, *, method: str = 'a2c',
                   baseline: Array | float = 0.0, value_coefficient: float = 0.5, entropy_coefficient: float = 0.001,
                   reference: Params | None = None, kl_coefficient: Array | float = 0.0,
                   temperature: float = 1.0) -> tuple[Array, dict[str, Array]]:
    """Loss of both agents on a round of the game; the reward is `sum_i log p_listener(property i)`.

        a2c        -(R - V) sum_i log pi(m_i) + value_coefficient (R - V)^2 - entropy_coefficient H
        reinforce  -(R - baseline) sum_i log pi(m_i) - entropy_coefficient H
        gumbel     -R through straight-through Gumbel-softmax symbols
        and        -R for the listener;   + kl_coefficient KL(speaker || reference)

    The gradient of the last term is, in expectation, that of a per-symbol KL penalty in the reward.

    Args:
        objects: int [N, p].
        baseline: for 'reinforce', the running mean of rewards.
        reference: a speaker; needed if `kl_coefficient` is not 0.
        temperature: of 'gumbel', of the relaxed symbols that gradients go through.

    Returns:
        Metrics `reward`, `entropy` and, with a reference, `kl`; sums over a message, means over the batch.
    """
    if method not in METHODS:
        raise ValueError(f'method={method!r} is not one of {METHODS}')
    logits, value = speak(params['speaker'], game, objects)
    logprobs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(logprobs) * logprobs).sum((-2, -1)).mean()
    if method == 'gumbel':
        soft = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / temperature)
        hard = jax.nn.one_hot(soft.argmax(-1), game.num_symbols)
        symbols = hard + soft - jax.lax.stop_gradient(soft)
        reward = pick(listen(params['listener'], symbols), objects).sum(-1)
        loss = -reward.mean()
    else:
        messages = jax.random.categorical(key, logits)
        reward = pick(listen(params['listener'], jax.nn.one_hot(messages, game.num_symbols)), objects).sum(-1)
        fixed = jax.lax.stop_gradient(reward)
        advantage = fixed - (jax.lax.stop_gradient(value) if method == 'a2c' else baseline)
        loss = -(advantage * pick(logits, messages).sum(-1)).mean() - reward.mean() - entropy_coefficient * entropy
        if method == 'a2c':
            loss = loss + value_coefficient * jnp.square(fixed - value).mean()
    metrics = {'reward': reward.mean(), 'entropy': entropy}
    if reference is not None:
        kl = speaker_kl(params['speaker'], reference, game, objects)
        metrics |= {'kl': kl}
        loss = loss + kl_coefficient * kl
    elif kl_coefficient:
        raise ValueError(f'kl_coefficient={kl_coefficient} needs a reference')
    return loss, jax.lax.stop_gradient(metrics)


def speaker_kl(speaker: Params, reference: Params, game: Game, objects: Array) -> Array:
    """KL(speaker || reference) of whole messages in nats, exact, mean over objects."""
    p = jax.nn.log_softmax(speak(speaker, game, objects)[0])
    q = jax.lax.stop_gradient(jax.nn.log_softmax(speak(reference, game, objects)[0]))
    return (jnp.exp(p) * (p - q)).sum((-2, -1)).mean()


def evaluate(params: Params, game: Game, objects: Array) -> dict[str, Array]:
    """Task and drift of greedy agents on objects [N, p].

    Returns:
        `communication`: share of properties that the listener gets right from the speaker's message; `language`: share
        of symbols that the speaker takes from the given language; `understanding`: share of properties that the
        listener gets right from messages in the given language.
    """
    spoken = speak(params['speaker'], game, objects)[0].argmax(-1)
    given = game.messages(objects)
    heard = lambda m: listen(params['listener'], jax.nn.one_hot(m, game.num_symbols)).argmax(-1)
    share = lambda a, b: (a == b).mean(dtype=jnp.float32)
    return {'communication': share(heard(spoken), objects), 'language': share(spoken, given),
            'understanding': share(heard(given), objects)}


# ---- Training ------------------------------------------------------------------------------------------------------

def pretrain(key: Array, params: Params, game: Game, objects: Array, *, speaker_steps: int = 100,
             listener_steps: int = 50, batch_size: int = 5, learning_rate: float = 1e-3) -> Params:
    """Both agents after Adam on the given language, by batches drawn from `objects` with replacement."""
    tx = optax.adam(learning_rate)

    def step(carry, k):
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, k), (batch_size,), 0, len(objects))
        grads = jax.grad(lambda p: sum(supervised_losses(p, game, objects[rows])))(params)
        updates, new = tx.update(grads, state)
        # Each agent stops after its own number of steps. The two losses share no parameter.
        active = {'speaker': k < speaker_steps, 'listener': k < listener_steps}
        params = {name: jax.tree.map(lambda p, u: jnp.where(active[name], p + u, p), params[name], updates[name])
                  for name in params}
        return (params, new), None

    steps = jnp.arange(max(speaker_steps, listener_steps))
    return jax.lax.scan(step, (params, tx.init(params)), steps)[0][0]


@dataclasses.dataclass(frozen=True)
class Training:
    """Attributes: as in `self_play_loss`; `log_every` steps apart, `num_steps` in all; AdamW with `weight_decay`.

    `listener_pace`: how large the listener's updates are beside the speaker's, which AdamW takes at `learning_rate`.

    Published: a2c and gumbel with learning rate 1e-4, batch 50, 50000 steps; reinforce with 1e-3, 64, 25000; gumbel at
    a temperature of 10. Both agents at the same pace.
    """
    method: str = 'a2c'
    num_steps: int = 50_000
    batch_size: int = 50
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    kl_coefficient: float | Array = 0.0
    log_every: int = 100
    listener_pace: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f'method={self.method!r} is not one of {METHODS}')
        if self.log_every < 1 or self.num_steps % self.log_every:
            raise ValueError(f'log_every={self.log_every} must divide num_steps={self.num_steps}')
        if not 0 <= self.listener_pace <= 1:
            raise ValueError(f'listener_pace={self.listener_pace} must be in [0, 1]')
        if not self.temperature > 0:
            raise ValueError(f'temperature={self.temperature} must be positive')


def check_schedule(training: Training, elastic_config: er.ElasticReset) -> None:
    """Raises a ValueError unless every reset is at a log point, so that both its sides are logged."""
    k = np.arange(training.num_steps)
    due = elastic_config.due('step', k)
    late = np.flatnonzero((due.reset | due.reset_ema) & ((k + 1) % training.log_every != 0))
    if len(late):
        raise ValueError(f'log_every={training.log_every} must divide elastic.period={elastic_config.period}: the '
                         f'reset after step {late[0] + 1} is not at a log point')


class Carry(NamedTuple):
    """A run between two steps: agents, optimizer, average, running mean of the rewards, number of steps done; students,
    where there is imitation."""
    params: Params
    opt_state: Any
    elastic: er.Elastic
    mean_reward: Array
    step: Array
    students: lewis_imitation.Students | None = None


def train(key: Array, params: Params, game: Game, self_play: Array, held_out: Array, training: Training,
          elastic_config: er.ElasticReset, imitation: Imitation | None = None) -> tuple[Params, dict[str, Array]]:
    """Self-play under any of the compared methods (`elastic_reset.method`, or `imitation`), as one program: `begin`,
    then `advance` by all steps."""
    carry = begin(params, training, elastic_config, imitation)
    carry, history = advance(carry, key, params['speaker'], game, self_play, held_out, training, elastic_config,
                             training.num_steps, imitation=imitation)
    return carry.params, history


def begin(params: Params, training: Training, elastic_config: er.ElasticReset,
          imitation: Imitation | None = None) -> Carry:
    """The state before the first step.

    Raises:
        ValueError: a reset or a generation is not at a log point (`check_schedule`).
    """
    check_schedule(training, elastic_config)
    if imitation and imitation.period % training.log_every:
        raise ValueError(f'log_every={training.log_every} must divide imitation.period={imitation.period}')
    students = None
    if imitation:
        students = lewis_imitation.Students(params, lewis_imitation.optimizers(imitation, params))
    return Carry(params, _optimizer(training).init(params), er.init(_of_speaker(elastic_config), params),
                 jnp.float32(0), jnp.int32(0), students)


def advance(carry: Carry, key: Array, start: Params, game: Game, self_play: Array, held_out: Array, training: Training,
            elastic_config: er.ElasticReset, num_steps: int,
            decay: Array | float | None = None,
            imitation: Imitation | None = None) -> tuple[Carry, dict[str, Array]]:
    """Runs `num_steps` (a multiple of `log_every`) more steps. All calls of a run take the same arguments.

    The policy that is averaged and reset is the speaker with its value head, unless `elastic_config.policy` says
    otherwise; the listener stays. Order in a step: update, tick; then, every `log_every` steps, log, reset the policy,
    reset the average, log.

    Args:
        start: the pretrained speaker.
        self_play, held_out: int [N, p] objects.
        decay: in place of that in `elastic_config`; may be traced, as may `training.kl_coefficient`, so that runs
            which differ in these alone share a program.
        imitation: seeded iterated learning; a generation counts as a reset.

    Returns:
        The state, and float32 [num_steps / log_every] of each metric: `communication`, `language` and `understanding`
        (see `evaluate`) on self-play objects and, with the prefix `held_out_`, on the others; `kl` to the initial
        speaker on held-out objects; the same before the reset that may have been due, prefix `before_reset_`; `reward`
        of the last step; `kept` before the reset.
    """
    elastic_config = _of_speaker(elastic_config)
    decay = elastic_config.decay if decay is None else decay
    tx = _optimizer(training)

    def step(carry, _):
        params, opt_state, elastic, mean, k, students = carry
        rows, sample = jax.random.split(jax.random.fold_in(key, k))
        objects = self_play[jax.random.randint(rows, (training.batch_size,), 0, len(self_play))]
        reference = er.reference(elastic_config, elastic, params)['speaker']
        loss = lambda p: self_play_loss(p, game, objects, sample, method=training.method, baseline=mean,
                                        reference=reference, kl_coefficient=training.kl_coefficient,
                                        temperature=training.temperature)
        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        updates |= {'listener': jax.tree.map(lambda u: training.listener_pace * u, updates['listener'])}
        params = optax.apply_updates(params, updates)
        elastic = jax.lax.cond(elastic_config.due('step', k).tick, lambda e: er.tick(e, params, decay), lambda e: e,
                               elastic)
        mean = mean + (metrics['reward'] - mean) / (k + 1.0)
        return Carry(params, opt_state, elastic, mean, k + 1, students), metrics['reward']

    def block(carry, _):
        carry, reward = jax.lax.scan(step, carry, length=training.log_every)
        due = elastic_config.due('step', carry.step - 1)._replace(tick=False)  # the step itself has ticked
        elastic, params, opt_state, kept = er.apply_measured(elastic_config, carry.elastic, carry.params,
                                                             carry.opt_state, due)
        students = carry.students
        if imitation:
            generation = carry.step % imitation.period == 0
            key_now = jax.random.fold_in(jax.random.fold_in(key, carry.step), 1)
            taught = lambda s: lewis_imitation.transmit(key_now, s, params, game, self_play, imitation)
            students = jax.lax.cond(generation, taught, lambda s: s, students)
            params = jax.tree.map(lambda new, old: jnp.where(generation, new, old), students.params, params)
        sides = jax.tree.map(lambda *x: jnp.stack(x), carry.params, params)  # one program for both compiles faster
        both = jax.vmap(lambda p: measure(p, start, game, self_play, held_out))(sides)
        history = {'reward': reward[-1], 'kept': kept} | {name: x[1] for name, x in both.items()}
        return (carry._replace(params=params, opt_state=opt_state, elastic=elastic, students=students),
                history | {f'before_reset_{name}': x[0] for name, x in both.items()})

    return jax.lax.scan(block, carry, length=num_steps // training.log_every)


def measure(params: Params, start: Params, game: Game, self_play: Array, held_out: Array) -> dict[str, Array]:
    """Measures agents (`evaluate`) on self-play objects and, prefixed `held_out_`, on the others; there `kl` to the
    speaker `start`.
    """
    return evaluate(params, game, self_play) | {
        f'held_out_{name}': x for name, x in evaluate(params, game, held_out).items()} | {
            'kl': speaker_kl(params['speaker'], start, game, held_out)}


def _optimizer(training: Training) -> optax.GradientTransformation:
    return optax.adamw(training.learning_rate, weight_decay=training.weight_decay)


def _of_speaker(config: er.ElasticReset) -> er.ElasticReset:
    return dataclasses.replace(config, policy='speaker/.*') if config.policy == '.*' else config
