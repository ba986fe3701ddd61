"""Whole asynchronous runs of a trivial policy: learner and generator on devices of their own, weights between them."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import advantages, logprobs, losses, responses
from rlhf_jax import elastic_reset as er
from rlhf_jax.rollout.publish import InProcess
from rlhf_jax.rollout.stream import RolloutStream

EOS, VOCAB, LENGTH, PROMPTS, SAMPLES = 0, 5, 4, 8, 2
TX = optax.adam(.2)
ELASTIC = er.ElasticReset(period=6, decay=.5)


@jax.jit
def sample(params, key, prompts, version):
    """Each token from a table of logits, one row a position: the sampler's tokens, mask and log-probabilities."""
    keys = responses.sample_keys(key, prompts, SAMPLES, version)
    tokens = jax.vmap(jax.vmap(lambda k: jax.random.categorical(k, params['logits'])))(keys)
    mask = responses.mask(responses.lengths(tokens, EOS), LENGTH)
    return tokens, mask, logprobs.token_logprobs(jnp.broadcast_to(params['logits'], (*tokens.shape, VOCAB)), tokens)


def generate(params, *, index, version):
    prompts = jnp.arange(PROMPTS) + PROMPTS * index
    tokens, mask, drawn = map(np.asarray, sample(params, jax.random.key(7), prompts, version))
    rewards = ((tokens == 3) & mask).mean(-1).astype(np.float32)  # the more 3s before it ends, the better
    return {'tokens': tokens, 'mask': mask, 'logprobs': drawn, 'rewards': rewards}


def loss_of(algorithm, params, ref, batch):
    rows = lambda p: jnp.broadcast_to(p['logits'], (*batch['tokens'].shape, VOCAB))
    new, old = (logprobs.token_logprobs(rows(p), batch['tokens']) for p in (params, ref))
    if algorithm == 'online_dpo':
        return losses.online_dpo(new, old, batch['mask'], batch['rewards'], beta=.5)[0]
    a = advantages.leave_one_out(batch['rewards'])
    return losses.proximal_rloo(new, batch['logprobs'], a, batch['mask'])[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def step(algorithm, params, opt_state, ref, batch):
    grads = jax.grad(lambda p: loss_of(algorithm, p, ref, batch))(params)
    updates, opt_state = TX.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


def train(algorithm, num=24, *, elastic=False, **settings):
    learner, generator = jax.devices()[0], jax.devices()[1]
    params = jax.device_put({'logits': jnp.zeros((LENGTH, VOCAB))}, learner)
    ref, opt_state, state = jax.tree.map(jnp.copy, params), TX.init(params), er.init(ELASTIC, params)
    rewards = []
    with RolloutStream(generate, InProcess(generator), timeout=60, num_batches=num, **settings) as stream:
        stream.publish(0, params)
        for n in range(num):
            batch = next(stream)
            rewards.append(batch['rewards'].mean())
            params, opt_state = step(algorithm, params, opt_state, ref, batch)
            if elastic and any(due := ELASTIC.due('step', n)):
                state, params, opt_state = er.apply(ELASTIC, state, params, opt_state, due)
            stream.publish(n + 1, params)
        staleness = stream.metrics['staleness']
    return np.asarray(params['logits']), np.array(rewards), staleness


@pytest.mark.parametrize('algorithm', ['online_dpo', 'proximal_rloo'])
def test_asynchronous_training_improves_and_equals_its_serial_emulation(algorithm):
    threaded, rewards, staleness = train(algorithm, max_staleness=1)
    serial, in_order, _ = train(algorithm, max_staleness=1, threaded=False)
    np.testing.assert_array_equal(threaded, serial)
    np.testing.assert_array_equal(rewards, in_order)
    assert staleness == 1 and rewards[-4:].mean() > rewards[:4].mean() + .2


def test_staleness_zero_is_the_plain_loop():
    threaded, rewards, staleness = train('proximal_rloo', 8, max_staleness=0)
    params = {'logits': jnp.zeros((LENGTH, VOCAB))}
    ref, opt_state = jax.tree.map(jnp.copy, params), TX.init(params)
    for n in range(8):
        batch = generate(params, index=n, version=n)
        assert batch['rewards'].mean() == rewards[n]
        params, opt_state = step('proximal_rloo', params, opt_state, ref, batch)
    np.testing.assert_array_equal(threaded, params['logits'])
    assert staleness == 0


def test_resets_are_published_like_any_other_version():
    """Under Elastic Reset the generator gets the policy as it is after the reset."""
    plain, _, _ = train('proximal_rloo', 8, max_staleness=0)
    reset, rewards, _ = train('proximal_rloo', 8, max_staleness=0, elastic=True)
    again, same, _ = train('proximal_rloo', 8, max_staleness=0, elastic=True)
    assert np.abs(reset - plain).max() > 1e-2
    np.testing.assert_array_equal(reset, again)
    np.testing.assert_array_equal(rewards, same)
