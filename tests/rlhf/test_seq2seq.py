"""Messages of the translation game's agents: where they end, and what gradients pass through them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.seq2seq import BOS, EOS, PAD, Seq2Seq
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten

AGENT = Seq2Seq(source_vocab=8, target_vocab=8, width=4)
SOURCE, MASK, TARGET = np.full((64, 3), 5), np.ones((64, 3), bool), np.full((64, 4), BOS)
APPLY = jax.jit(AGENT.apply)
SEND = jax.jit(lambda p, key, **kw: AGENT.apply({'params': p}, SOURCE, MASK, key=key, method='send', **kw),
               static_argnames=('max_length', 'min_length', 'relaxation'))


@pytest.fixture(scope='module')
def params():
    rng = np.random.default_rng(0)
    shapes = flatten(param_shapes(AGENT, SOURCE, MASK, TARGET))
    return jax.tree.map(jnp.asarray, unflatten({k: rng.normal(0, 0.5, x.shape).astype(np.float32)
                                                for k, x in shapes.items()}))


def test_messages_end_once(params):
    limits = jnp.asarray(np.arange(64) % 5 + 2)
    message = SEND(params, jax.random.key(0), max_length=5, min_length=2, max_lengths=limits)
    tokens, mask, drawn = (np.asarray(x) for x in (message.tokens, message.mask, message.drawn))
    assert tokens.shape == (64, 6)
    for row in range(64):
        ends = np.flatnonzero(tokens[row] == EOS)
        assert len(ends) == 1 and 2 <= ends[0] <= min(limits[row], 5)
        np.testing.assert_array_equal(mask[row], np.arange(6) <= ends[0])
        assert (tokens[row, ends[0] + 1:] == PAD).all()
        appended = ends[0] == min(limits[row], 5)
        np.testing.assert_array_equal(drawn[row], np.arange(6) < ends[0] + (not appended))
    for x in (message.logprobs, message.entropies, message.values):
        assert (np.asarray(x)[~drawn] == 0).all() and (np.asarray(x)[drawn] != 0).all()
    assert (drawn.sum(1) < np.minimum(limits, 5)).any() and (mask.sum(1) > drawn.sum(1)).any()


def test_logprobs_of_a_message_are_those_of_the_teacher_forced_pass(params):
    message = SEND(params, jax.random.key(1), max_length=4, min_length=0)
    target = jnp.concatenate([jnp.full((64, 1), BOS), message.tokens], 1)
    logits, values = APPLY({'params': params}, SOURCE, MASK, target)
    logp = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logp, message.tokens[..., None], -1)[..., 0]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    for got, want in ((message.logprobs, picked), (message.entropies, entropy), (message.values, values)):
        np.testing.assert_allclose(got, jnp.where(message.drawn, want, 0), atol=1e-5)


def test_gradients_pass_through_a_relaxed_message_alone(params):
    def listen(p, one_hot):
        message = SEND(p, jax.random.key(2), max_length=3, relaxation=0.5 if one_hot else None)
        heard = message.one_hot if one_hot else message.tokens
        logits, _ = AGENT.apply({'params': jax.lax.stop_gradient(p)}, heard, message.mask, TARGET)
        return (logits ** 2).mean(), (logits, message)

    grad = jax.jit(jax.value_and_grad(listen, has_aux=True), static_argnums=1)
    (_, (relaxed, message)), grads = grad(params, True)
    hard, _ = APPLY({'params': params}, message.tokens, message.mask, TARGET)
    np.testing.assert_allclose(relaxed, hard, atol=1e-5)  # the forward pass is that of the tokens
    assert np.abs(grads['head']['kernel']).max() > 1e-6
    _, grads = grad(params, False)
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(grads))


def test_value_gradients_stay_in_the_value_network(params):
    value = lambda p: AGENT.apply({'params': p}, SOURCE, MASK, TARGET)[1].sum()
    moved = {path.split('/')[0] for path, g in flatten(jax.jit(jax.grad(value))(params)).items() if np.abs(g).max() > 0}
    assert moved == {'value_hidden', 'value_out'}


def test_padding_of_the_source_is_not_heard(params):
    padded = np.concatenate([SOURCE, np.full((64, 2), 7)], 1)
    got, _ = APPLY({'params': params}, padded, np.arange(5) < np.full((64, 1), 3), TARGET)
    want, _ = APPLY({'params': params}, SOURCE, MASK, TARGET)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_dropout_is_for_training(params):
    apply = jax.jit(AGENT.clone(dropout=0.5).apply, static_argnames='train')
    rngs = {'dropout': jax.random.key(0)}
    run = lambda train: apply({'params': params}, SOURCE, MASK, TARGET, train=train, rngs=rngs)[0]
    want = APPLY({'params': params}, SOURCE, MASK, TARGET)[0]
    np.testing.assert_array_equal(run(False), want)
    assert np.abs(run(True) - want).max() > 1e-3


def test_bad_calls_are_named(params):
    with pytest.raises(ValueError, match='needs a key'):
        AGENT.apply({'params': params}, SOURCE, MASK, relaxation=0.5, method='send')
    with pytest.raises(ValueError, match='min_length=3 must be between 0 and max_length=2'):
        AGENT.apply({'params': params}, SOURCE, MASK, max_length=2, method='send')
