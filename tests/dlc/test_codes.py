import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dlc_jax import codes as codes_lib

RNG = np.random.default_rng(0)


def random_codes(num, length=6, vocab=5, dtype=np.uint8):
    return RNG.integers(0, vocab, (num, length)).astype(dtype)


def test_lowest_index_wins_a_tie():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-3.0, -2.0, -1.0]])
    out = codes_lib.from_logits(logits)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, [1, 0, 2])


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int32])
def test_one_hot(dtype):
    codes = random_codes(7, dtype=dtype)
    out = codes_lib.one_hot(codes, 5)
    assert out.shape == (7, 6, 5) and out.dtype == np.float32
    np.testing.assert_array_equal(out, np.eye(5)[codes])


def test_statistics_by_hand():
    codes = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 0], [0, 2, 1], [0, 1, 2], [0, 2, 3], [0, 1, 0], [0, 2, 1]])
    stats_ = codes_lib.statistics(codes, 4)
    np.testing.assert_allclose(stats_['perplexity'], [1, 2, 4])
    np.testing.assert_allclose(stats_['dead'], [3 / 4, 2 / 4, 0])
    np.testing.assert_array_equal(stats_['histogram'], [[8, 0, 0, 0], [0, 4, 4, 0], [2, 2, 2, 2]])
    assert stats_['distinct'] == 6


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize('block', [1, 7, 1000])
def test_histogram_depends_on_neither_block_nor_dtype(dtype, block):
    codes = random_codes(50, vocab=200)
    want = np.stack([np.bincount(codes[:, l], minlength=200) for l in range(6)])
    np.testing.assert_array_equal(codes_lib.histogram(codes.astype(dtype), 200, block=block), want)


def test_distinct_codes():
    codes = random_codes(40, length=3, vocab=3)
    assert codes_lib.count_distinct(codes) == len({tuple(c) for c in codes})
    assert codes_lib.count_distinct(np.asfortranarray(codes.astype(np.int32))) == len({tuple(c) for c in codes})


@pytest.mark.parametrize('block', [(1, 1), (4, 7), (13, 29), (500, 500)])
def test_nearest_code_whatever_the_block(block):
    queries, references = random_codes(13), random_codes(29)
    references[-1] = queries[3]
    table = (queries[:, None] != references[None]).sum(-1)
    distance, index = codes_lib.nearest_hamming(queries, references, return_index=True, block=block)
    np.testing.assert_array_equal(distance, table.min(1))
    np.testing.assert_array_equal(index, table.argmin(1))
    np.testing.assert_array_equal(codes_lib.nearest_hamming(queries, references, block=block), distance)


def test_average_of_sharp_soft_codes_picks_a_source_for_each_position():
    sources = np.array([[0, 1, 2, 3], [4, 1, 0, 3], [4, 2, 2, 3]])
    sems = codes_lib.one_hot(sources, 5, np.float64)
    codes = np.asarray(codes_lib.compose(jax.random.key(0), sems, 6000, method='average'))
    assert codes.shape == (6000, 4) and codes.dtype == np.int32
    for position, want in enumerate(sems.mean(0)):
        counts = np.bincount(codes[:, position], minlength=5)
        assert (counts[want == 0] == 0).all()
        np.testing.assert_allclose(counts / 6000, want, atol=0.03)  # five standard deviations
    # Positions are drawn independently: were a source drawn for a whole code, (0, 0) could not occur.
    both = ((codes[:, 0] == 0) & (codes[:, 2] == 0)).mean()
    assert abs(both - 1 / 9) < 0.02


def test_average_of_warm_soft_codes_draws_from_their_mean():
    sems = RNG.dirichlet(np.ones(4), (2, 3))
    codes = np.asarray(codes_lib.compose(jax.random.key(0), sems, 20_000, weights=(3, 1)))
    mean = 0.75 * sems[0] + 0.25 * sems[1]
    for position in range(3):
        want = 20_000 * mean[position] / mean[position].sum()
        assert stats.chisquare(np.bincount(codes[:, position], minlength=4), want).pvalue > 1e-5


@pytest.mark.parametrize('weights, shares', [(None, (1 / 3, 1 / 3, 1 / 3)), ((1, 0, 3), (0.25, 0, 0.75))])
def test_positions_come_from_one_source_each(weights, shares):
    sources = np.array([[0] * 8, [1] * 8, [2] * 8])
    codes = codes_lib.compose_positions(jax.random.key(0), sources, 3000, weights=weights)
    np.testing.assert_allclose(np.bincount(np.asarray(codes).ravel(), minlength=3) / 24_000, shares, atol=0.015)
    share = np.asarray(codes)[:, :2] == 2  # drawn anew for each position, not once a code
    np.testing.assert_allclose(share.all(1).mean(), shares[2] ** 2, atol=0.05)
    origin = codes_lib.token_origin(np.asarray(codes), sources)
    np.testing.assert_allclose(origin['source'], shares, atol=0.015)
    assert origin['shared'] == origin['none'] == 0
    sems = codes_lib.one_hot(sources, 3)
    by_sem = codes_lib.compose(jax.random.key(0), sems, 3000, method='positions', weights=weights)
    np.testing.assert_array_equal(by_sem, codes)


def test_a_source_that_has_all_of_a_position_gives_its_token():
    weights = np.array([[1, 0, 1, 1], [0, 1, 0, 1]])  # the last position is drawn
    codes = np.asarray(codes_lib.compose_positions(jax.random.key(0), np.array([[0] * 4, [1] * 4]), 500,
                                                   weights=weights))
    np.testing.assert_array_equal(np.unique(codes[:, :3], axis=0), [[0, 1, 0]])
    np.testing.assert_allclose(codes[:, 3].mean(), 0.5, atol=0.1)
    sems = np.stack([np.full((4, 2), (0.9, 0.1)), np.full((4, 2), (0.2, 0.8))])
    drawn = np.asarray(codes_lib.compose(jax.random.key(0), sems, 4000, weights=weights))
    np.testing.assert_allclose(drawn.mean(0), [0.1, 0.8, 0.1, 0.45], atol=0.03)


def test_explained_is_the_share_of_the_variance_between_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    of_class, noise = labels.astype(float), rng.normal(size=300)
    features = np.stack([of_class, noise, of_class + noise, np.ones(300)], 1)[..., None]
    means = np.array([features[labels == c].mean(0) for c in range(3)])[labels][:, :3]
    shares = codes_lib.explained(features, labels)
    np.testing.assert_allclose(shares[:3], (means.var(0) / features[:, :3].var(0))[:, 0], rtol=1e-6)
    assert shares[0] == pytest.approx(1) and shares[1] < 0.05 and shares[3] == 0
    # Goodman and Kruskal's tau by hand: classes 0, 0, 1, 1 with tokens 0, 0, 0, 1.
    tokens = codes_lib.one_hot(np.array([[0], [0], [0], [1]]), 2)
    assert codes_lib.explained(tokens, np.array([0, 0, 1, 1])) == pytest.approx([1 / 3])


def test_token_origin_by_hand():
    sources = np.array([[0, 1, 2, 3], [0, 2, 2, 4]])
    composed = np.array([[0, 1, 2, 4], [0, 3, 1, 3]])
    origin = codes_lib.token_origin(composed, sources)
    np.testing.assert_allclose(origin['source'], [2 / 8, 1 / 8])
    assert (origin['shared'], origin['none']) == (3 / 8, 2 / 8)


@pytest.mark.parametrize('call, message', [
    (lambda: codes_lib.statistics(np.array([[0, 5]]), 5), 'token 5'),
    (lambda: codes_lib.one_hot(np.array([-1]), 5), 'token -1'),
    (lambda: codes_lib.histogram(np.zeros(3, int), 5), 'N, L'),
    (lambda: codes_lib.nearest_hamming(np.zeros((2, 3)), np.zeros((2, 4))), 'cannot be compared'),
    (lambda: codes_lib.nearest_hamming(np.zeros((2, 3)), np.zeros((0, 3))), 'references'),
    (lambda: codes_lib.compose(jax.random.key(0), np.ones((2, 3, 4)), 1, method='mix'), 'composition'),
    (lambda: codes_lib.compose(jax.random.key(0), np.ones((3, 4)), 1), 'sems'),
    (lambda: codes_lib.compose(jax.random.key(0), np.ones((2, 3, 4)), 1, weights=(1, 2, 3)), 'weights'),
    (lambda: codes_lib.compose(jax.random.key(0), np.ones((2, 3, 4)), 1, weights=np.ones((2, 4))), 'the 3 positions'),
    (lambda: codes_lib.compose(jax.random.key(0), np.ones((2, 3, 4)), 1, weights=np.eye(2, 3)), 'the 3 positions'),
    (lambda: codes_lib.explained(np.ones((4, 3)), np.ones(4)), r'expected \[N, P, F\]'),
    (lambda: codes_lib.compose(jax.random.key(0), np.ones((2, 3, 4)), 1, weights=(1, -1)), 'weights')])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
