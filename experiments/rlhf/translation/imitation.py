"""Seeded iterated learning in the translation game (SIL, arXiv 2003.12694): between steps, students who began as the
pretrained agents imitate the agents and take their places.

Every `imitation.every` steps the student speaker learns the English that its teacher is likeliest to say, and then the
student listener the gold German from the English that the student speaker is likeliest to say, each on
`imitation.steps` batches. Students and the state of their optimizers stay from one generation to the next, and with the
run's checkpoints.
"""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from experiments.rlhf.translation import agent as agents
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import placement
from experiments.runtime.state import TrainState
from rlhf_jax.models import seq2seq

Array = jax.Array
Params = dict[str, Any]


def wanted(config: ml_collections.ConfigDict) -> bool:
    """Whether `config` asks for imitation, which configs of earlier runs do not name."""
    return 'imitation' in config and config.imitation.every != 0


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for settings out of range, or of a game in which nothing would be imitated."""
    if not wanted(config):
        return
    settings = config.imitation
    if settings.every < 0:
        raise ValueError(f'imitation.every={settings.every} must not be negative; 0: no imitation')
    if settings.every > config.num_steps:
        raise ValueError(f'imitation.every={settings.every} is longer than the run of {config.num_steps} steps: '
                         'nothing would be imitated')
    if settings.steps < 1:
        raise ValueError(f'imitation.steps={settings.steps} must be at least 1')
    if not settings.learning_rate > 0:
        raise ValueError(f'imitation.learning_rate={settings.learning_rate} must be positive')
    if config.freeze_speaker:
        raise ValueError('imitation.every is set, but freeze_speaker leaves the speaker nothing to drift by')


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    return optax.adam(config.imitation.learning_rate, b1=config.optimizer.b1, b2=config.optimizer.b2,
                      eps=config.optimizer.eps)


def students(config: ml_collections.ConfigDict, params: Params) -> dict[str, Any]:
    """Students who begin as the agents `params`: `params` and `opt_state`, by agent. Copies, for the run's own are
    donated."""
    copied = jax.tree.map(jnp.copy, {name: params[name] for name in agents.PAIRS})
    return {'params': copied, 'opt_state': {name: optimizer(config).init(agent) for name, agent in copied.items()}}


class Generations:
    """The hook that lets students imitate their teachers and take their places.

    Args:
        config: of a game with `imitation.every`.
        model: of every agent.
        mesh: of the run.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: seq2seq.Seq2Seq, mesh: Mesh):
        self._config, self._model = config, model
        self._batches = agents.open_batches(config, ('fr', 'de'), mesh_lib.batch_shards(mesh), placement.share_of(mesh))
        self._place = functools.partial(placement.place_batch, sharding=mesh_lib.batch_sharding(mesh))
        self._whole = mesh_lib.replicated(mesh)
        self._learn = {'speaker': self._step('speaker', self.speaker_loss),
                       'listener': self._step('listener', self.listener_loss)}

    def __call__(self, step: int, state: TrainState, metrics: Any) -> TrainState | None:
        settings = self._config.imitation
        if step % settings.every:
            return None
        # Batches are a function of the step: a resumed run draws the same.
        self._batches.set_state({'position': (step // settings.every - 1) * 2 * settings.steps})
        learning = state.extra['students']
        for name, teacher in (('speaker', state.params['speaker']), ('listener', None)):
            for _ in range(settings.steps):
                # The listener hears the student speaker, who has learnt by then.
                heard = learning['params']['speaker'] if teacher is None else teacher
                learning = self._learn[name](learning, heard, self._place(next(self._batches)))
        return state.replace(params=state.params | jax.tree.map(jnp.copy, learning['params']),
                             extra=state.extra | {'students': learning})

    def _step(self, name: str, loss: Callable[..., Array]) -> Callable[..., dict[str, Any]]:
        """(students, who speaks, batch) -> students after one update of the agent `name`."""
        def step(learning, speaker, batch):
            grads = jax.grad(loss)(learning['params'][name], speaker, batch)
            updates, moments = optimizer(self._config).update(grads, learning['opt_state'][name])
            agent = optax.apply_updates(learning['params'][name], updates)
            return {'params': learning['params'] | {name: agent},
                    'opt_state': learning['opt_state'] | {name: moments}}
        return jax.jit(step, out_shardings=self._whole)

    def say(self, speaker: Params, batch: dict[str, Array]) -> seq2seq.Message:
        """The English that the speaker is likeliest to say."""
        message = self._config.message
        return self._model.apply({'params': speaker}, *agents.source(batch, 'fr'), max_length=message.max_length,
                                 min_length=message.min_length, method='send')

    def speaker_loss(self, student: Params, teacher: Params, batch: dict[str, Array]) -> Array:
        """Cross entropy of the student on what its teacher says."""
        message = self.say(teacher, batch)
        begin = jnp.full((message.tokens.shape[0], 1), seq2seq.BOS, message.tokens.dtype)
        said = {'en': jnp.concatenate([begin, message.tokens], -1), 'en_length': message.mask.sum(-1) + 1}
        return agents.cross_entropy(*agents.target_logprobs(self._model, student, agents.source(batch, 'fr'), said,
                                                            'en'))

    def listener_loss(self, student: Params, speaker: Params, batch: dict[str, Array]) -> Array:
        """Cross entropy of the student on the gold German, after what the speaker says."""
        message = self.say(speaker, batch)
        return agents.cross_entropy(*agents.target_logprobs(self._model, student, (message.tokens, message.mask), batch,
                                                            'de'))
