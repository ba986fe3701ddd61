"""Refilled slots draw what the plain sampler draws, in fewer steps, and say with which weights."""
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.runtime import mesh as mesh_lib
from rlhf_jax import refill
from rlhf_jax.generate import Sampling, generate, pad_prompts
from rlhf_jax.refill import Statistics, generate_refilled
from tiny_models import MODELS, random_params

MODULE = MODELS['llama']
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [8], [7, 9, 3, 2]]
KEY = jax.random.key(3)
SAMPLING = Sampling(max_new_tokens=9, temperature=3.0, stop_tokens=(0, 1, 2), pad_token=0)


@pytest.fixture(scope='module')
def params():
    return random_params(MODULE)


@pytest.fixture(scope='module')
def plain(params):
    return generate(MODULE, params, *pad_prompts(PROMPTS, buckets=(8,)), KEY, SAMPLING, num_samples=2)


def test_same_responses_as_the_plain_sampler(params, plain):
    statistics = Statistics()
    got = generate_refilled(MODULE, lambda: (params, 0), *pad_prompts(PROMPTS, buckets=(8,)), KEY, SAMPLING, slots=3,
                            chunk=2, num_samples=2, statistics=statistics)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    np.testing.assert_array_equal(got.mask, plain.mask)
    np.testing.assert_allclose(got.logprobs, plain.logprobs, atol=1e-5)
    np.testing.assert_array_equal(got.versions, np.where(plain.mask, 0, -1))
    lengths = np.asarray(plain.lengths).T.ravel()  # as they are taken up: every prompt's first completion comes first
    assert len(set(lengths)) > 2  # rows ended at different times
    assert statistics.tokens == lengths.sum() - len(lengths) <= statistics.slot_steps
    # Batches of as many rows would each run until their longest row ends.
    assert statistics.slot_steps < 3 * sum(max(lengths[i:i + 3]) for i in range(0, 10, 3))


def test_slots_lie_over_the_devices(params, plain, monkeypatch):
    """Two slots on each of four devices: a cache is prefilled and decoded where its slot is, never copied to all."""
    mesh, seen = mesh_lib.make_mesh({'data': 4}, jax.devices()[:4]), []

    def advance(split, params, state, *rest, inner=refill.advance):
        state, steps = inner(split, params, state, *rest)
        seen.extend([state.cache.keys[0].sharding, state.samples.tokens.sharding])
        return state, steps
    monkeypatch.setattr(refill, 'advance', advance)
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        got = generate_refilled(MODULE, lambda: (params, 0), *pad_prompts(PROMPTS, buckets=(8,)), KEY, SAMPLING,
                                slots=7, chunk=2, num_samples=2, shards=4)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    np.testing.assert_array_equal(got.mask, plain.mask)
    assert {sharding.shard_shape((8,))[0] for sharding in seen} == {2}


def test_weights_change_in_flight(params, plain):
    other = random_params(MODULE, seed=1)
    count = itertools.count()

    def weights():
        version = next(count)
        return (params if version == 0 else other), version

    got = generate_refilled(MODULE, weights, *pad_prompts(PROMPTS, buckets=(8,)), KEY, SAMPLING, slots=3, chunk=2,
                            num_samples=2)
    first = got.versions == 0
    assert first[:3, 0].any(1).all() and not first[3:].any() and not first[:, 1].any()  # three slots held these
    np.testing.assert_array_equal(got.tokens[first], np.asarray(plain.tokens)[first])
    assert (np.diff(np.where(got.mask, got.versions, 99), axis=-1) >= 0).all()
    assert (got.versions[got.mask] > 1).any()


def test_bad_calls_are_named(params):
    prompts = pad_prompts(PROMPTS, buckets=(8,))
    with pytest.raises(ValueError, match='slots=0'):
        generate_refilled(MODULE, lambda: (params, 0), *prompts, KEY, SAMPLING, slots=0)
    with pytest.raises(ValueError, match='chunk=0'):
        generate_refilled(MODULE, lambda: (params, 0), *prompts, KEY, SAMPLING, slots=1, chunk=0)
