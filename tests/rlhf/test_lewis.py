"""The Lewis game: language, agents, losses in closed form, and the compared methods on a small game."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import elastic_reset as er
from rlhf_jax.tasks import lewis, lewis_imitation

GAME = lewis.Game(properties=2, types=3)
OBJECTS = jnp.asarray(GAME.objects())


@pytest.fixture(scope='module')
def agents():
    return lewis.init(jax.random.key(0), GAME, hidden=6, scale=.5)


def test_published_game():
    game = lewis.Game()
    parts = game.split(np.random.default_rng(0))
    assert [len(p) for p in parts] == [20, 30, 3075]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 3125 == 5 ** 5
    agents = jax.eval_shape(lambda k: lewis.init(k, game), jax.random.key(0))
    sizes = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
    assert sizes(agents['speaker']) == 25 * 200 + 200 + 200 * 125 + 125 + 200 + 1
    assert sizes(agents['listener']) == 25 * 200 + 200 * 5
    with pytest.raises(ValueError, match='supervised: no object'):
        lewis.Game(2, 2).split(np.random.default_rng(0), supervised=.01)


def test_the_given_language_has_a_symbol_for_each_type_of_each_property():
    np.testing.assert_array_equal(GAME.messages(jnp.array([[0, 0], [2, 1]])), [[0, 3], [2, 4]])
    np.testing.assert_array_equal(GAME.encode(jnp.array([2, 1])), [0, 0, 1, 0, 1, 0])
    assert len(np.unique(GAME.messages(OBJECTS))) == 6


def test_agents_are_linear(agents):
    logits, value = lewis.speak(agents['speaker'], GAME, OBJECTS)
    assert logits.shape == (9, 2, 6) and value.shape == (9,)
    by = lambda o: np.concatenate([np.ravel(x) for x in lewis.speak(agents['speaker'], GAME, jnp.array([o]))])
    np.testing.assert_allclose(by([1, 2]) - by([1, 0]), by([0, 2]) - by([0, 0]), atol=1e-5)  # no interaction
    heard = lewis.listen(agents['listener'], jax.nn.one_hot(jnp.array([3, 3]), 6))
    np.testing.assert_array_equal(heard[0], heard[1])  # of a symbol alone, wherever it stands


def exact(params, kl_coefficient=0.0, reference=None):
    """Expected reward minus the KL's price, by enumeration of all messages."""
    logits, _ = lewis.speak(params['speaker'], GAME, OBJECTS)
    heard = jax.nn.log_softmax(lewis.listen(params['listener'], jnp.eye(6)[:, None]))[:, 0]  # [symbol, type]
    expected = jnp.einsum('nps,snp->', jax.nn.softmax(logits), heard[:, OBJECTS]) / len(OBJECTS)
    if reference is not None:
        expected -= kl_coefficient * lewis.speaker_kl(params['speaker'], reference, GAME, OBJECTS)
    return expected


@pytest.mark.parametrize('method', ['a2c', 'reinforce'])
def test_policy_gradient_is_that_of_the_expected_reward(agents, method):
    reference = lewis.init(jax.random.key(5), GAME, hidden=6, scale=.5)['speaker']
    settings = dict(method=method, baseline=-2.0, value_coefficient=0., entropy_coefficient=0., reference=reference,
                    kl_coefficient=.3)
    grad = jax.grad(lambda p, k: lewis.self_play_loss(p, GAME, OBJECTS, k, **settings)[0])
    keys = jax.random.split(jax.random.key(1), 2000)
    sampled = jax.jit(jax.vmap(grad, (None, 0)))(agents, keys)
    exactly = jax.jit(jax.grad(lambda p: -exact(p, .3, reference)))(agents)

    def compare(path, g, samples):
        error = np.std(samples, 0) / len(keys) ** .5
        assert (np.abs(np.mean(samples, 0) - g) < 5 * error + 1e-4).all(), path
    jax.tree_util.tree_map_with_path(compare, exactly, sampled)


def test_losses_of_a2c_by_hand(agents):
    key = jax.random.key(2)
    loss, metrics = lewis.self_play_loss(agents, GAME, OBJECTS, key)
    logits, value = lewis.speak(agents['speaker'], GAME, OBJECTS)
    logp = np.float64(jax.nn.log_softmax(logits))
    said = np.asarray(jax.random.categorical(key, logits))
    heard = np.float64(jax.nn.log_softmax(lewis.listen(agents['listener'], jax.nn.one_hot(said, 6))))
    n, i = np.arange(9)[:, None], np.arange(2)
    reward = heard[n, i, OBJECTS].sum(-1)
    advantage = reward - np.float64(value)
    entropy = -(np.exp(logp) * logp).sum((-2, -1)).mean()
    expected = (-(advantage * logp[n, i, said].sum(-1)).mean() - reward.mean() - .001 * entropy
                + .5 * (advantage ** 2).mean())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose([metrics['reward'], metrics['entropy']], [reward.mean(), entropy], rtol=1e-5)
    # The value head is trained by its own term alone, and does not reach the listener.
    grads = jax.grad(lambda p: lewis.self_play_loss(p, GAME, OBJECTS, key, value_coefficient=0.)[0])(agents)
    np.testing.assert_array_equal(grads['speaker']['value']['kernel'], 0)


def test_gumbel_symbols_are_hard_forwards_and_soft_backwards(agents):
    loss = lambda p: lewis.self_play_loss(p, GAME, OBJECTS, jax.random.key(3), method='gumbel')
    value, metrics = loss(agents)
    assert value == -metrics['reward']
    grads = jax.grad(lambda p: loss(p)[0])(agents)
    assert all(np.abs(grads['speaker'][layer]['kernel']).sum() > 0 for layer in ('hidden', 'symbols'))


def test_gumbel_temperature_is_of_the_gradient_alone(agents):
    """The symbols are the likeliest at any temperature; through them goes the gradient of a softmax of logits / T."""
    grad = lambda t: jax.value_and_grad(lambda p: lewis.self_play_loss(
        p, GAME, OBJECTS, jax.random.key(3), method='gumbel', temperature=t)[0])(agents)
    (one, sharp), (ten, smooth) = grad(1.0), grad(10.0)
    np.testing.assert_allclose(one, ten, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharp['listener'],
                 smooth['listener'])
    logits, _ = lewis.speak(agents['speaker'], GAME, OBJECTS)
    noisy = logits + jax.random.gumbel(jax.random.key(3), logits.shape)
    hard = jax.nn.one_hot(noisy.argmax(-1), GAME.num_symbols)

    def loss_of(symbols):
        guesses = jax.nn.log_softmax(lewis.listen(agents['listener'], symbols))
        return -jnp.take_along_axis(guesses, jnp.asarray(OBJECTS)[..., None], -1).sum((1, 2)).mean()
    towards = jax.grad(loss_of)(hard)
    for t, grads in ((1.0, sharp), (10.0, smooth)):
        back = jax.vjp(lambda x: jax.nn.softmax(x / t), noisy)[1](towards)[0]
        np.testing.assert_allclose(grads['speaker']['symbols']['bias'], back.reshape(len(OBJECTS), -1).sum(0),
                                   rtol=1e-4, atol=1e-7)


def test_what_is_unknown_is_refused(agents):
    with pytest.raises(ValueError, match="method='ppo'"):
        lewis.self_play_loss(agents, GAME, OBJECTS, jax.random.key(0), method='ppo')
    with pytest.raises(ValueError, match='kl_coefficient=0.1 needs a reference'):
        lewis.self_play_loss(agents, GAME, OBJECTS, jax.random.key(0), kl_coefficient=.1)
    with pytest.raises(ValueError, match='log_every=30 must divide num_steps=100'):
        lewis.Training(num_steps=100, log_every=30)
    with pytest.raises(ValueError, match='temperature=0.0 must be positive'):
        lewis.Training(temperature=0.0)


def fluent(spoken=range(6), understood=range(6)):
    """Agents whose speaker says symbol `spoken[i]`, and whose listener understands `understood[i]`, for the given i."""
    agents = lewis.init(jax.random.key(0), GAME, hidden=6, scale=0.)
    symbols = np.zeros((6, 2, 6), np.float32)
    symbols[np.arange(6), np.arange(6) // 3, np.asarray(spoken)] = 9
    types = np.zeros((6, 3), np.float32)
    types[np.asarray(understood)] = np.tile(9 * np.eye(3), (2, 1))
    for agent in agents.values():
        agent['hidden']['kernel'] = jnp.eye(6)
    agents['speaker']['symbols']['kernel'] = jnp.asarray(symbols.reshape(6, 12))
    agents['listener']['types']['kernel'] = jnp.asarray(types)
    return agents


def test_agents_that_know_the_language_score_one():
    assert all(x == 1 for x in lewis.evaluate(fluent(), GAME, OBJECTS).values())
    assert sum(lewis.supervised_losses(fluent(), GAME, OBJECTS)) < 1e-2
    # Another convention, shared by both: they understand each other and the language is gone.
    order = [1, 2, 0, 4, 5, 3]
    scores = lewis.evaluate(fluent(order, order), GAME, OBJECTS)
    assert scores['communication'] == 1 and scores['language'] == 0 and scores['understanding'] == 0


@pytest.fixture(scope='module')
def trained():
    """40 steps of some methods from the same pretrained agents: `{method: (params, history)}`, and the start."""
    start = jax.jit(lambda k: lewis.pretrain(k, lewis.init(k, GAME, hidden=6), GAME, OBJECTS, learning_rate=.02))(
        jax.random.key(0))
    training = lewis.Training(num_steps=40, batch_size=8, learning_rate=.02, log_every=10, kl_coefficient=.1)
    runs = {}
    for name in ('fixed_reference', 'reset_to_init', 'reset_to_ema', 'elastic_reset'):
        config = er.method(name, 20, decay=.9)
        runs[name] = jax.jit(lambda k, p: lewis.train(k, p, GAME, OBJECTS, OBJECTS, training, config))(
            jax.random.key(1), start)
    return start, runs


def test_pretraining_teaches_the_language(trained):
    start, _ = trained
    assert lewis.evaluate(start, GAME, OBJECTS)['language'] > .9


def test_each_agent_is_pretrained_for_its_own_number_of_steps(agents):
    learnt = lewis.pretrain(jax.random.key(0), agents, GAME, OBJECTS, speaker_steps=0, listener_steps=3)
    jax.tree.map(np.testing.assert_array_equal, learnt['speaker'], agents['speaker'])
    assert (learnt['listener']['types']['kernel'] != agents['listener']['types']['kernel']).any()


def test_the_baseline_is_the_mean_of_all_rewards_so_far(agents):
    training = lewis.Training('reinforce', num_steps=6, batch_size=8, learning_rate=.02, log_every=1)
    config = er.method('fixed_reference', 20)
    carry, history = lewis.advance(lewis.begin(agents, training, config), jax.random.key(1), agents['speaker'], GAME,
                                   OBJECTS, OBJECTS, training, config, 6)
    np.testing.assert_allclose(carry.mean_reward, np.mean(history['reward']), rtol=1e-5)


def test_methods_share_their_path_until_they_differ(trained):
    start, runs = trained
    history = {name: h['kl'] for name, (_, h) in runs.items()}
    assert all(h.shape == (4,) for h in history.values())
    # Each is a program of its own, whose sums XLA may round otherwise; another path would differ in the second digit.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    for name in ('reset_to_init', 'reset_to_ema', 'elastic_reset'):
        same(history[name][0], history['fixed_reference'][0])
    assert history['reset_to_init'][1] == history['reset_to_init'][3] == 0  # it logs after the reset of steps 20 and 40
    jax.tree.map(np.testing.assert_array_equal, runs['reset_to_init'][0]['speaker'], start['speaker'])
    assert 0 < history['elastic_reset'][1] < history['fixed_reference'][1]
    same(history['elastic_reset'][1], history['reset_to_ema'][1])
    assert history['elastic_reset'][3] != history['reset_to_ema'][3]
    listener = runs['elastic_reset'][0]['listener']
    assert np.abs(listener['types']['kernel'] - start['listener']['types']['kernel']).max() > 1e-2  # never reset


def test_a_run_is_reproducible_and_its_seeds_can_be_mapped(trained):
    start, runs = trained
    training = lewis.Training(num_steps=40, batch_size=8, learning_rate=.02, log_every=10, kl_coefficient=.1)
    config = er.method('elastic_reset', 20, decay=.9)
    keys = jnp.stack([jax.random.key(1), jax.random.key(2)])
    _, history = jax.jit(jax.vmap(lambda k: lewis.train(k, start, GAME, OBJECTS, OBJECTS, training, config)))(keys)
    np.testing.assert_allclose(history['kl'][0], runs['elastic_reset'][1]['kl'], rtol=1e-3, atol=1e-5)
    assert np.abs(history['kl'][0] - history['kl'][1]).max() > 1e-4


# ---- Seeded iterated learning ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('target', lewis_imitation.LISTENER_TARGETS)
def test_students_learn_their_teachers_language_and_guesses(target):
    """Of teachers who do not understand each other: the speaker has a language of its own, the listener the given."""
    order = [1, 2, 0, 4, 5, 3]
    teachers, begun = fluent(spoken=order), lewis.init(jax.random.key(4), GAME, hidden=6, scale=.5)
    imitation = lewis.Imitation(10, 200, 100, batch_size=16, learning_rate=.03, listener_target=target)
    students = lewis_imitation.Students(begun, lewis_imitation.optimizers(imitation, begun))
    learnt = jax.jit(lambda key, s: lewis_imitation.transmit(key, s, teachers, GAME, OBJECTS, imitation))(
        jax.random.key(0), students)
    assert [int(learnt.opt_state[name][0].count) for name in ('speaker', 'listener')] == [200, 100]
    said = lewis.speak(learnt.params['speaker'], GAME, OBJECTS)[0].argmax(-1)
    np.testing.assert_array_equal(said, np.asarray(order)[GAME.messages(OBJECTS)])
    heard = jax.nn.one_hot(said, GAME.num_symbols)
    guesses = lewis.listen(learnt.params['listener'], heard).argmax(-1)
    wanted = OBJECTS if target == 'objects' else lewis.listen(teachers['listener'], heard).argmax(-1)
    np.testing.assert_array_equal(guesses, wanted)
    assert (wanted == OBJECTS).all() == (target == 'objects')


def test_students_take_their_teachers_places(trained):
    """After steps 20 and 40; until then the run is the plain one, and the second generation continues the first."""
    start, runs = trained
    training = lewis.Training(num_steps=40, batch_size=8, learning_rate=.02, log_every=10, kl_coefficient=.1)
    imitation = lewis.Imitation(20, 5, 5, batch_size=8, learning_rate=.02)
    config, key = er.method('fixed_reference', 20), jax.random.key(1)
    carry = lewis.begin(start, training, config, imitation)
    half, history = jax.jit(lambda key, carry: lewis.advance(
        carry, key, start['speaker'], GAME, OBJECTS, OBJECTS, training, config, 20, imitation=imitation))(key, carry)
    np.testing.assert_allclose(history['before_reset_kl'], runs['fixed_reference'][1]['kl'][:2], rtol=1e-4)
    assert abs(float(history['kl'][1] - history['before_reset_kl'][1])) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, half.params, half.students.params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), half.params, start)
    assert moved['listener']['types']['kernel'] > 1e-3 and moved['speaker']['value']['kernel'] == 0
    with pytest.raises(ValueError, match='log_every=10 must divide imitation.period=15'):
        lewis.begin(start, training, config, lewis.Imitation(15))
