"""Seeded iterated learning on the Lewis game (SIL, arXiv 2003.12694): students, who began as the pretrained agents,
imitate the agents now and then and take their places.

What is regular in a language survives being learnt anew in few steps; drift, which is not, should be lost on the way.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.tasks.lewis_agents import Array, Game, Params, listen, pick, speak

LISTENER_TARGETS = ('teacher', 'objects')


@dataclasses.dataclass(frozen=True)
class Imitation:
    """Seeded iterated learning (arXiv 2003.12694): after every `period` steps, students who began as the pretrained
    agents imitate the agents, by `transmit`, and take their places.

    Attributes:
        period: steps, a multiple of `Training.log_every`.
        speaker_steps, listener_steps: of imitation, the speaker's first.
        batch_size, learning_rate: of Adam, whose state the students keep from one generation to the next.
        listener_target: what the student listener learns to guess from the student speaker's messages: 'teacher', the
            likeliest guess of its teacher, or 'objects', what the messages are about.

    Published: a period of 2000, 200 steps of either (400 under reinforce) at 1e-3.
    """
    period: int = 2000
    speaker_steps: int = 200
    listener_steps: int = 200
    batch_size: int = 50
    learning_rate: float = 1e-3
    listener_target: str = 'teacher'

    def __post_init__(self):
        for name in ('period', 'speaker_steps', 'listener_steps', 'batch_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'imitation.{name}={getattr(self, name)} must be at least 1')
        if not self.learning_rate > 0:
            raise ValueError(f'imitation.learning_rate={self.learning_rate} must be positive')
        if self.listener_target not in LISTENER_TARGETS:
            raise ValueError(f'imitation.listener_target={self.listener_target!r} is not one of {LISTENER_TARGETS}')


class Students(NamedTuple):
    """Agents between two generations of `Imitation`, and the state of each one's optimizer."""
    params: Params
    opt_state: Any


def transmit(key: Array, students: Students, teachers: Params, game: Game, objects: Array,
             imitation: Imitation) -> Students:
    """Students after one generation: cross entropy of the student speaker on its teacher's likeliest symbols, then of
    the student listener on messages that the student speaker draws; objects come from `objects` [N, p], with
    replacement."""
    tx = optax.adam(imitation.learning_rate)
    batch = lambda k: objects[jax.random.randint(k, (imitation.batch_size,), 0, len(objects))]

    def learn(name, loss, num_steps):
        def step(carry, k):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, jax.random.fold_in(key, k)), state)
            return (optax.apply_updates(params, updates), state), None
        first = imitation.speaker_steps if name == 'listener' else 0
        start = students.params[name], students.opt_state[name]
        return jax.lax.scan(step, start, first + jnp.arange(num_steps))[0]

    def speaker_loss(speaker, k):
        shown = batch(k)
        symbols = speak(teachers['speaker'], game, shown)[0].argmax(-1)
        return -pick(speak(speaker, game, shown)[0], symbols).mean()
    speaker, speaker_state = learn('speaker', speaker_loss, imitation.speaker_steps)

    def listener_loss(listener, k):
        rows, draw = jax.random.split(k)
        shown = batch(rows)
        symbols = jax.random.categorical(draw, speak(speaker, game, shown)[0])
        symbols = jax.nn.one_hot(symbols, game.num_symbols)
        target = shown if imitation.listener_target == 'objects' else listen(teachers['listener'], symbols).argmax(-1)
        return -pick(listen(listener, symbols), target).mean()
    listener, listener_state = learn('listener', listener_loss, imitation.listener_steps)
    return Students({'speaker': speaker, 'listener': listener},
                    {'speaker': speaker_state, 'listener': listener_state})


def optimizers(imitation: Imitation, params: Params) -> dict[str, Any]:
    """Fresh states of the students' optimizers, by agent."""
    return {name: optax.adam(imitation.learning_rate).init(agent) for name, agent in params.items()}
