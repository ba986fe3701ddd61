"""Likelihoods of a masked-diffusion model against full enumeration, V = 3 and L = 4: a table over all 256 canvases."""
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax import likelihood
from dlc_jax.diffusion import remasking

V, L = 3, 4
PLACES = (V + 1) ** np.arange(L)
TABLE = np.random.default_rng(0).normal(0, 1.5, ((V + 1) ** L, L, V))  # logits of every canvas, masks included
CODES = np.array([[0, 2, 1, 1], [2, 2, 0, 1]], np.int32)
SUBSETS = {k: [np.isin(np.arange(L), places) for places in itertools.combinations(range(L), k)]
           for k in range(1, L + 1)}
# All sets of positions, so often that each size weighs the same: their plain mean is the expectation.
ALL_MASKS = np.array([mask for k, masks in SUBSETS.items() for mask in masks * (12 // len(masks))])


def network(table):
    return lambda codes: jnp.asarray(table)[(codes * PLACES).sum(-1)]


def log_p(table, canvas, i, value):
    logits = np.asarray(table, np.float64)[(canvas * PLACES).sum(), i]
    return logits[value] - np.log(np.exp(logits).sum())


def enumerated_bound(table, code):
    """Equation (1) of `likelihood`, size by size and set by set."""
    by_size = []
    for k, masks in SUBSETS.items():
        sums = [L / k * sum(log_p(table, np.where(mask, V, code), i, code[i]) for i in np.flatnonzero(mask))
                for mask in masks]
        by_size.append(np.mean(sums))
    return np.mean(by_size)


def along(table, code, order, temperature=1.0):
    """Log-probability of filling `code` one position after another."""
    canvas, total = np.full(L, V), 0.0
    for i in order:
        total += log_p(np.asarray(table) / temperature, canvas, i, code[i])
        canvas[i] = code[i]
    return total


def finite_differences(f, entries, step=1e-4):
    """Derivatives of `f(table)` by some entries of the table."""
    out = []
    for entry in entries:
        up, down = TABLE.copy(), TABLE.copy()
        up[entry] += step
        down[entry] -= step
        out.append((f(up) - f(down)) / (2 * step))
    return np.array(out)


def read_entries(gradient):
    """Some entries with a gradient, some without."""
    seen = np.argwhere(np.abs(gradient) > 1e-3)
    assert len(seen) >= 4
    rng = np.random.default_rng(1)
    return [tuple(seen[i]) for i in rng.permutation(len(seen))[:12]] + [tuple(rng.integers(TABLE.shape))
                                                                        for _ in range(6)]


def test_the_bound_is_its_enumeration_and_the_mean_over_orders():
    terms = likelihood.bound_terms(network(TABLE), CODES, ALL_MASKS, V)
    assert terms.shape == CODES.shape and terms.dtype == jnp.float32
    for code, total in zip(CODES, np.asarray(terms).sum(1)):
        orders = np.array([along(TABLE, code, order) for order in itertools.permutations(range(L))])
        assert total == pytest.approx(enumerated_bound(TABLE, code), rel=1e-5)
        assert total == pytest.approx(orders.mean(), rel=1e-5)
        log_mean = np.log(np.exp(orders).mean())  # an order drawn first, then the code
        assert total < log_mean - 0.01


def test_its_gradient_is_that_of_the_enumeration():
    gradient = np.asarray(jax.grad(lambda table: likelihood.bound_terms(
        network(table), CODES, ALL_MASKS, V)[0].sum())(jnp.asarray(TABLE, jnp.float32)))
    entries = read_entries(gradient)
    want = finite_differences(lambda table: enumerated_bound(table, CODES[0]), entries)
    np.testing.assert_allclose([gradient[entry] for entry in entries], want, atol=2e-5)


@pytest.mark.parametrize('stratified', [True, False])
def test_drawn_masks_are_unbiased(stratified):
    masks = np.asarray(jax.vmap(lambda key: likelihood.draw_masks(key, 4, L, stratified=stratified))(
        jax.random.split(jax.random.key(0), 4000)))
    sizes = masks.sum(-1)
    np.testing.assert_allclose([(sizes == k).mean() for k in range(1, L + 1)], 0.25, atol=0.02)
    if stratified:  # with as many strata as sizes each comes once
        assert (np.sort(sizes, 1) == np.arange(1, L + 1)).all()
    for k, sets in SUBSETS.items():
        chosen = masks.reshape(-1, L)[sizes.ravel() == k]
        shares = [(chosen == mask).all(1).mean() for mask in sets]
        np.testing.assert_allclose(shares, 1 / len(sets), atol=0.03)
    terms = jax.vmap(lambda masks: likelihood.bound_terms(network(TABLE), CODES[:1], masks, V).sum())(masks)
    terms = np.asarray(terms, np.float64)
    error = float(terms.std()) / math.sqrt(len(terms))
    assert terms.mean() == pytest.approx(enumerated_bound(TABLE, CODES[0]), abs=4 * error) and error < 0.05


def test_masks_of_its_own_for_each_row():
    masks = likelihood.draw_masks(jax.random.key(3), 6, L)[None] & np.ones((2, 1, 1), bool)
    masks = np.stack([masks[0, :3], masks[0, 3:]])
    got = likelihood.bound_terms(network(TABLE), CODES, masks, V)
    for row, code, mask in zip(got, CODES, masks):
        np.testing.assert_allclose(row, likelihood.bound_terms(network(TABLE), code[None], mask, V)[0], rtol=1e-6)


@pytest.mark.parametrize('filled_at', [[2, 0, 3, 1], [1, 0, 0, 1]])
def test_what_a_sampler_drew_is_scored_exactly(filled_at):
    """Also where a step fills two positions, neither of which sees the other."""
    filled_at, temperature = np.array([filled_at] * 2), 0.7
    num_steps = filled_at.max() + 1

    def direct(table, code, steps):
        total = 0.0
        for step in steps:
            canvas = np.where(filled_at[0] >= step, V, code)
            total += sum(log_p(np.asarray(table) / temperature, canvas, i, code[i])
                         for i in np.flatnonzero(filled_at[0] == step))
        return total
    terms = lambda table, steps: likelihood.sampled_terms(
        network(table), CODES, filled_at, jnp.asarray(steps), V, temperature)
    got, counted = terms(TABLE, np.arange(num_steps))
    assert np.asarray(counted).all()
    for code, row in zip(CODES, np.asarray(got)):
        assert row.sum() == pytest.approx(direct(TABLE, code, range(num_steps)), rel=1e-5)
        if num_steps == L:
            assert row.sum() == pytest.approx(along(TABLE, code, np.argsort(filled_at[0]), temperature), rel=1e-5)
    # A subset gives the same terms for its tokens, and nothing for others.
    some, counted = terms(TABLE, [1])
    np.testing.assert_array_equal(counted, filled_at == 1)
    np.testing.assert_allclose(some, np.where(filled_at == 1, got, 0), rtol=1e-6)
    gradient = np.asarray(jax.grad(lambda table: terms(table, [0, 1])[0][1].sum())(jnp.asarray(TABLE, jnp.float32)))
    entries = read_entries(gradient)
    want = finite_differences(lambda table: direct(table, CODES[1], [0, 1]), entries)
    np.testing.assert_allclose([gradient[entry] for entry in entries], want, atol=2e-5)


@pytest.mark.parametrize('num', [1, 3, 4, 5])
def test_steps_are_drawn_alike_and_never_twice(num):
    steps = np.asarray(jax.vmap(lambda key: likelihood.draw_steps(key, num, 5))(
        jax.random.split(jax.random.key(1), 4000)))
    assert (np.diff(steps, axis=1) > 0).all() and steps.min() == 0 and steps.max() == 4
    np.testing.assert_allclose([(steps == s).any(1).mean() for s in range(5)], num / 5, atol=0.03)


@pytest.mark.parametrize('sampling', [
    remasking.Sampling(L, remasking='random', temperature=0.7),
    remasking.Sampling(L, steps=2, remasking='random', temperature=1.3),
    remasking.Sampling(L, steps=2, block_length=2, remasking='random')])
def test_the_sampler_says_what_it_drew_with(sampling):
    """The log-probabilities it returns are those of its steps scored again; and codes are drawn so often."""
    keys = jax.random.split(jax.random.key(2), 3000)
    table = jnp.asarray(TABLE, jnp.float32)

    def logits_of(codes, start):
        return jax.lax.dynamic_slice_in_dim(table[(codes * PLACES).sum(-1)], start, sampling.block, 1)
    drawn = jax.jit(lambda keys: remasking.fill(logits_of, keys, sampling, V))(keys)
    again, counted = likelihood.sampled_terms(network(table), drawn.codes, drawn.filled_at,
                                              jnp.arange(sampling.num_steps), V, sampling.temperature)
    assert np.asarray(counted).all()
    np.testing.assert_allclose(drawn.logprobs, again, atol=1e-5)
    # Of all codes filled in one order the probabilities add up to 1; how often each comes, is its own.
    order, chosen = np.asarray(drawn.filled_at), np.asarray(drawn.codes)
    same = (order == order[0]).all(1)
    codes, index = np.unique(chosen[same], axis=0, return_index=True)
    probabilities = np.exp(np.asarray(drawn.logprobs).sum(1))[same][index]
    counts = np.array([(chosen[same] == code).all(1).sum() for code in codes])
    spread = np.sqrt(same.sum() * probabilities * (1 - probabilities))
    assert (np.abs(counts - same.sum() * probabilities) < 5 * spread + 3).all()


def test_impossible_numbers_are_refused():
    for call, message in ((lambda: likelihood.draw_masks(jax.random.key(0), 0, 4), 'num=0'),
                          (lambda: likelihood.draw_steps(jax.random.key(0), 5, 4), 'num=5 must be in 1..4')):
        with pytest.raises(ValueError, match=message):
            call()
