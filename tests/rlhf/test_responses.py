"""Ends of responses, masks, layout and log-probabilities."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from rlhf_jax import logprobs, masked, responses

# Ends and masks

def test_golden_truncation_and_lengths():
    np.testing.assert_array_equal(responses.truncate(golden.TOKENS, 0, 1),
                                  [[5, 6, 0, 1, 1, 1], [5, 6, 7, 8, 9, 4], [5, 6, 7, 8, 9, 0]])
    lengths = responses.lengths(golden.TOKENS, 0)
    np.testing.assert_array_equal(lengths - 1, [2, 5, 5])  # the index of EOS, or of the last token
    np.testing.assert_array_equal(responses.lengths_by_padding(golden.TOKENS, 0, 1), lengths)
    np.testing.assert_array_equal((golden.TOKENS == 0).any(-1), [True, False, True])


def test_eos_is_trained_where_pad_is_eos():
    tokens = np.array([[5, 6, 2, 0, 0, 0], [5, 6, 7, 8, 9, 2], [5, 6, 7, 8, 9, 4]])
    np.testing.assert_array_equal(responses.lengths(tokens, 2) - 1, [2, 5, 5])
    mask = responses.mask(responses.lengths(tokens, 2), 6)
    np.testing.assert_array_equal(mask.sum(-1), [3, 6, 6])
    assert mask[0, 2] and mask[1, 5] and not mask[0, 3]  # the two EOS count, what follows does not
    # As published: EOS masked out, so the last trained index is one too early.
    np.testing.assert_array_equal(responses.lengths_by_padding(tokens, 2, 2) - 1, [1, 4, 5])


def test_lengths_of_responses_that_begin_with_eos_or_are_padded_with_it():
    tokens = np.array([[0, 3, 3], [3, 0, 0], [3, 3, 3]])
    np.testing.assert_array_equal(responses.lengths(tokens, 0), [1, 2, 3])


def test_first_true_is_the_length_where_there_is_none():
    np.testing.assert_array_equal(responses.first_true(jnp.array([[0, 1, 1], [0, 0, 0], [1, 0, 0]], bool)), [1, 3, 0])


def test_positions_skip_padding_on_the_left():
    np.testing.assert_array_equal(responses.position_ids(jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])),
                                  [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_scores_are_read_at_eos_or_before_it():
    lengths = responses.lengths(golden.TOKENS, 0)
    index = responses.score_index(lengths, 4)
    rows = np.concatenate([np.full((3, 4), 9), golden.TOKENS], 1)
    np.testing.assert_array_equal(rows[np.arange(3), index], [0, 4, 0])  # EOS, the last token, EOS
    # A gold scorer with pad = eos pools at the first pad minus one: the token before EOS.
    np.testing.assert_array_equal(responses.score_index(lengths, 4, before_eos=True), index - 1)


def test_missing_eos_replaces_the_reward():
    rewards = jnp.array([2.0, 5.0, 3.0])
    np.testing.assert_array_equal(responses.penalize_missing_eos(rewards, golden.TOKENS, 0), [2, -1, 3])
    np.testing.assert_array_equal(responses.penalize_missing_eos(rewards, golden.TOKENS, 0, -10.), [2, -10, 3])
    np.testing.assert_array_equal(responses.penalize_missing_eos(rewards, golden.TOKENS, 0, None), rewards)


# Completions of prompts

def test_picked_completions_stay_with_their_prompts():
    x = np.arange(24).reshape(3, 4, 2)
    picked = responses.pick(x, jnp.array([[3, 0], [1, 1], [0, 2]]))
    np.testing.assert_array_equal(picked, [x[0, [3, 0]], x[1, [1, 1]], x[2, [0, 2]]])
    np.testing.assert_array_equal(responses.pick(x[..., 0], jnp.array([[2], [0], [1]])), [[4], [8], [18]])


def test_keys_hang_on_prompt_sample_and_version_not_on_place():
    draw = lambda keys: np.asarray(jax.vmap(jax.vmap(jax.random.uniform))(keys))
    key = jax.random.key(0)
    a = draw(responses.sample_keys(key, np.array([7, 3, 5]), 2, version=4))
    b = draw(responses.sample_keys(key, np.array([5, 7, 3]), 3, version=4))
    assert a.shape == (3, 2) and len(np.unique(a)) == 6
    np.testing.assert_array_equal(a, b[[1, 2, 0], :2])  # reordered, and with one more completion each
    assert not np.intersect1d(a, draw(responses.sample_keys(key, np.array([7, 3, 5]), 2, version=5))).size
    folded = functools.reduce(jax.random.fold_in, (4, 3, 1), key)  # the version, the prompt's id, the completion
    assert jax.random.uniform(folded) == a[1, 1]


# Log-probabilities

def test_token_logprobs_are_those_of_the_tempered_distribution():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    tokens = np.array([[0, 4, 2], [1, 1, 3]])
    p = np.exp(np.float64(logits) / 0.7)
    expected = np.log(np.take_along_axis(p / p.sum(-1, keepdims=True), tokens[..., None], -1)[..., 0])
    np.testing.assert_allclose(logprobs.token_logprobs(logits, tokens, 0.7), expected, atol=1e-6)
    untempered = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    entropy = -(np.exp(untempered) * untempered).sum(-1)
    np.testing.assert_allclose(logprobs.entropy(logits), entropy, atol=1e-6)


def test_derivatives_of_token_logprobs_are_those_of_the_plain_formula():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    logits[0, 0, 1] = -np.inf  # a token that sampling has cut away
    tokens, direction = np.array([[0, 4, 2], [1, 1, 3]]), np.cos(np.arange(30, dtype=np.float32)).reshape(2, 3, 5)
    weights = np.array([[1, -2, 0.5], [0, 3, 1]], np.float32)
    plain = lambda x: jnp.take_along_axis(jax.nn.log_softmax(x / 0.7), tokens[..., None], -1)[..., 0]
    ours = lambda x: logprobs.token_logprobs(x, tokens, 0.7)
    kinds = {'gradient': lambda f: jax.grad(lambda x: jnp.sum(weights * f(x)))(logits),
             'forward mode': lambda f: jax.jvp(f, (logits,), (direction,))[1],
             'second derivative': lambda f: jax.jvp(jax.grad(lambda x: jnp.sum(weights * f(x))), (logits,),
                                                    (direction,))[1]}
    for kind, derivative in kinds.items():
        np.testing.assert_allclose(derivative(ours), derivative(plain), rtol=1e-5, atol=1e-6, err_msg=kind)
    assert kinds['gradient'](ours)[0, 0, 1] == 0


def test_half_precision_logits_are_summed_in_float32():
    logits = np.random.default_rng(1).normal(size=(1, 40, 64)).astype(jnp.bfloat16)
    tokens = np.random.default_rng(2).integers(0, 64, (1, 40))
    ours = logprobs.token_logprobs(logits, tokens)
    exact = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    exact = np.take_along_axis(exact, tokens[..., None], -1)[..., 0].sum()
    assert ours.dtype == jnp.float32
    assert abs(ours.sum() - exact) < 1e-4
    rough = np.take_along_axis(np.float64(jax.nn.log_softmax(jnp.asarray(logits))), tokens[..., None], -1).sum()
    assert abs(rough - exact) > 1e-3  # what the cast is there to avoid


def test_each_response_token_is_predicted_one_position_before_it():
    logits = np.full((1, 5, 3), -50.0, np.float32)
    tokens = np.array([[0, 1, 2, 1, 0]])
    for t in range(1, 5):
        logits[0, t - 1, tokens[0, t]] = 50.0
    np.testing.assert_allclose(logprobs.response_logprobs(logits, tokens, 3), 0, atol=1e-6)
    np.testing.assert_array_equal(logprobs.response_logprobs(logits, tokens, 3).shape, (1, 3))
    for length in (0, 5):
        with pytest.raises(ValueError, match=f'length={length}'):
            logprobs.response_logprobs(logits, tokens, length)


def test_golden_sequence_logprobs():
    for x, sums in ((golden.LOGPROBS, [-1.7, -6, -2.1]), (golden.REF_LOGPROBS, [-1.9, -6, -1.2])):
        np.testing.assert_allclose(logprobs.sequence_logprobs(x, golden.MASK), sums, atol=1e-6)


def test_entropy_of_impossible_tokens_is_finite():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    assert abs(logprobs.entropy(logits) - np.log(2)) < 1e-6


# Masked statistics

def test_masked_statistics_ignore_what_the_mask_hides():
    x = np.array([[1., 2, np.nan], [4, np.inf, 9]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 1]])
    kept = np.array([1., 2, 4, 9])
    assert abs(masked.mean(x, mask) - kept.mean()) < 1e-6
    assert abs(masked.variance(x, mask) - kept.var(ddof=1)) < 1e-5
    np.testing.assert_allclose(masked.mean(x, mask, -1), [1.5, 6.5])
    white = masked.whiten(x, mask)
    np.testing.assert_allclose(white[0, :2], (kept[:2] - 4) / np.sqrt(kept.var(ddof=1) + 1e-8), rtol=1e-6)
    np.testing.assert_allclose(masked.whiten(x, mask, shift_mean=False)[0, 0] - white[0, 0], 4, rtol=1e-6)
    grads = jax.grad(lambda x: masked.mean(x, mask))(x)
    np.testing.assert_allclose(grads, mask / 4)


def test_an_empty_mask_gives_zero():
    assert masked.mean(jnp.ones(3), jnp.zeros(3, bool)) == 0
    assert masked.variance(jnp.ones(3), jnp.array([True, False, False])) == 0
