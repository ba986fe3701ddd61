"""Seeded iterated learning in the translation game: what students learn, and how they take their teachers' places."""
import re

import jax
import numpy as np
import pytest

from configs.rlhf import translation as configs
from experiments import train
from experiments.rlhf.translation import game, imitation
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(**fields):
    config = configs.get_config('tiny_game').unlock()
    config.update_from_flattened_dict({
        'model.width': 16, 'data.lengths': (20,), 'message.max_length': 6, 'message.min_length': 2, 'batch_size': 16,
        'num_steps': 8, 'evaluation.every': 0, 'imitation.every': 4, 'imitation.steps': 12,
        'imitation.learning_rate': 0.02} | fields)
    return config


@pytest.fixture(scope='module')
def played():
    """The hook of a game, and a state whose agents have left their students behind."""
    config, mesh = config_of(), one_device()
    experiment = train.build(config, mesh)
    state = jax.jit(experiment.init)(jax.random.key(0))
    noise = lambda path, x: x + 0.3 * np.random.default_rng(len(str(path))).normal(size=x.shape).astype(x.dtype)
    hook, = experiment.hooks(None)
    return hook, state.replace(params=jax.tree_util.tree_map_with_path(noise, state.params))


def test_students_begin_as_the_agents_do(played):
    _, state = played
    fresh = jax.jit(train.build(config_of(), one_device()).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.extra['students']['params'], fresh.params)


def test_a_generation(played):
    hook, state = played
    assert hook(3, state, None) is None
    after = hook(4, state, None)
    learnt, before = after.extra['students'], state.extra['students']['params']
    jax.tree.map(np.testing.assert_array_equal, after.params, learnt['params'])  # they took the teachers' places
    for agent in ('speaker', 'listener'):
        assert int(learnt['opt_state'][agent][0].count) == 12
        a, b = partition.flatten(learnt['params'][agent]), partition.flatten(before[agent])
        moved = {name for name in a if (a[name] != b[name]).any()}
        assert moved == {name for name in a if not name.startswith('value_')}
    batch = hook._place(next(hook._batches))
    speaker_loss, listener_loss = jax.jit(hook.speaker_loss), jax.jit(hook.listener_loss)
    teacher, student = state.params['speaker'], learnt['params']['speaker']
    assert speaker_loss(student, teacher, batch) < speaker_loss(before['speaker'], teacher, batch) - 0.3
    assert listener_loss(learnt['params']['listener'], student, batch) < listener_loss(before['listener'], student,
                                                                                      batch) - 0.3
    # The run's step donates its state: the students must not be the same buffers.
    pointers = lambda tree: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
    assert not pointers(after.params) & pointers(learnt)


def test_generations_continue_and_are_functions_of_the_step(played):
    hook, state = played
    first = hook(4, state, None)
    second = hook(8, first, None)
    assert int(second.extra['students']['opt_state']['listener'][0].count) == 24
    again = hook(4, state, None)  # after the stream has moved on
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_a_padded_message_is_scored_up_to_its_end(played):
    """By hand: the mean of the student's log-probabilities of the tokens its teacher says, end of sentence included."""
    hook, state = played
    batch = hook._place(next(hook._batches))
    message = jax.jit(hook.say)(state.params['speaker'], batch)
    student = state.extra['students']['params']['speaker']
    logits, _ = jax.jit(hook._model.apply)({'params': student}, *game.agents.source(batch, 'fr'), np.concatenate(
        [np.full((16, 1), 2), message.tokens], 1))
    tokens, mask = np.asarray(message.tokens), np.asarray(message.mask)
    want = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)[..., 0][mask].mean()
    assert jax.jit(hook.speaker_loss)(student, state.params['speaker'], batch) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('fields, message', [
    ({'imitation.every': -1}, 'imitation.every=-1 must not be negative'),
    ({'imitation.every': 9}, 'imitation.every=9 is longer than the run of 8 steps'),
    ({'imitation.steps': 0}, 'imitation.steps=0 must be at least 1'),
    ({'imitation.learning_rate': 0.0}, 'imitation.learning_rate=0.0 must be positive'),
    ({'freeze_speaker': True}, 'freeze_speaker leaves the speaker nothing to drift by')])
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        imitation.check(config_of(**fields))
