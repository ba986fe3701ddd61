"""Each metric against a value worked out by hand or in closed form, and against itself on a differently cut stream."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from dlc_jax import codes as codes_lib
from dlc_jax.metrics import frechet, nearest, prdc, probes
from dlc_jax.metrics.inception_score import inception_score
from dlc_jax.metrics.vendi import vendi_score

RNG = np.random.default_rng(0)


def spd(size):
    a = RNG.normal(size=(size, size))
    return a @ a.T + 0.1 * np.eye(size)


# ---- Fréchet distance ----------------------------------------------------------------------------------------------

def test_frechet_of_commuting_gaussians():
    a = frechet.Statistics(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]), 10)
    b = frechet.Statistics(np.array([1.0, 0.0, 3.5]), np.diag([4.0, 4.0, 0.0]), 10)
    np.testing.assert_allclose(frechet.frechet_distance(a, b), 4.25 + 1 + 0 + 9, rtol=1e-12)
    np.testing.assert_allclose(frechet.frechet_distance(b, a), 14.25, rtol=1e-12)


def test_frechet_of_any_two_gaussians_in_the_plane():
    a, b = spd(2), spd(2)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))  # trace of the root of a 2 x 2 matrix
    got = frechet.frechet_distance(frechet.Statistics(np.zeros(2), a, 9), frechet.Statistics(np.ones(2), b, 9))
    np.testing.assert_allclose(got, 2 + np.trace(a) + np.trace(b) - 2 * root, rtol=1e-10)


def test_frechet_agrees_with_the_matrix_square_root():
    a, b = spd(12), spd(12)
    want = np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real
    got = frechet.frechet_distance(frechet.Statistics(np.zeros(12), a, 9), frechet.Statistics(np.zeros(12), b, 9))
    np.testing.assert_allclose(got, want, rtol=1e-8)


def test_frechet_with_fewer_samples_than_dimensions():
    x = RNG.normal(size=(5, 40))
    assert 0 <= frechet.frechet_distance(frechet.statistics(x), frechet.statistics(x)) < 1e-5
    moved = frechet.frechet_distance(frechet.statistics(x), frechet.statistics(x + 1.0))
    np.testing.assert_allclose(moved, 40, rtol=1e-6)


@pytest.mark.parametrize('batch', [1, 7, 64, 1000])
@pytest.mark.parametrize('offset', [0.0, 1e6])
def test_statistics_do_not_depend_on_the_batches(batch, offset):
    x = RNG.normal(size=(200, 6)) @ spd(6) + offset
    accumulator = frechet.Accumulator()
    for start in range(0, 200, batch):
        accumulator.add(x[start:start + batch])
    got = accumulator.statistics()
    assert got.count == 200
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(frechet.statistics(x, block=batch).covariance, got.covariance, rtol=1e-12)


def test_statistics_of_parts_merge():
    x, parts = RNG.normal(size=(90, 4)), [frechet.Accumulator() for _ in range(4)]
    for part, piece in zip(parts, (x[:10], x[10:11], x[11:11], x[11:])):
        part.add(piece)
    whole = frechet.Accumulator()
    for part in parts:
        whole.merge(part)
    np.testing.assert_allclose(whole.statistics().covariance, np.cov(x, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize('call, message', [
    (lambda: frechet.statistics(np.zeros((1, 3))), '2 feature vectors'),
    (lambda: frechet.statistics(np.zeros((0, 3))), '2 feature vectors'),
    (lambda: frechet.statistics(np.zeros(3)), r'\[N, F\]'),
    (lambda: frechet.statistics(np.array([[1.0], [np.nan]])), 'not finite'),
    (lambda: frechet.frechet_distance(frechet.statistics(np.eye(3)), frechet.statistics(np.eye(4))), 'dimensions')])
def test_frechet_names_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- Neighbours, precision and recall ------------------------------------------------------------------------------

@pytest.mark.parametrize('block', [1, 3, 100])
@pytest.mark.parametrize('k', [1, 4])
def test_nearest_distances(block, k):
    a, b = RNG.normal(size=(11, 5)) + 100, RNG.normal(size=(17, 5)) + 100
    table = np.linalg.norm(a[:, None] - b[None], axis=-1)
    distance, index = nearest.nearest_distances(a, b, k=k, return_index=True, block=block)
    np.testing.assert_allclose(distance, np.sort(table, 1)[:, k - 1], rtol=1e-9)
    np.testing.assert_array_equal(index, np.argsort(table, 1)[:, k - 1])
    own = np.linalg.norm(b[:, None] - b[None], axis=-1)
    got = nearest.nearest_distances(b, b, k=k, exclude_self=True, block=block)
    np.testing.assert_allclose(got, np.sort(own, 1)[:, k], rtol=1e-9)


def test_a_copy_is_at_distance_zero():
    x = RNG.normal(size=(30, 64)).astype(np.float32) * 50 + 1000
    np.testing.assert_array_equal(nearest.nearest_distances(x, x), 0.0)


REAL = np.array([0.0, 1.0, 2.0, 10.0, -50.0])[:, None]  # radii to the nearest other: 1, 1, 1, 8, 50
FAKE = np.array([1.5, 20.0, 3.0])[:, None]  # 1.5, 17, 1.5


@pytest.mark.parametrize('block', [1, 2, 100])
def test_prdc_by_hand(block):
    """1.5 is in the balls of 1 and 2; 3 on the edge of that of 2 and in that of 10; 20 in none. -50 is in no fake's."""
    scores = prdc.prdc(REAL, FAKE, k=1, block=block)
    want = {'precision': 2 / 3, 'recall': 4 / 5, 'density': 4 / 3, 'coverage': 3 / 5}
    assert scores == pytest.approx(want)


@pytest.mark.parametrize('block', [1, 13, 1000])
def test_prdc_does_not_depend_on_the_block(block):
    real, fake = RNG.normal(size=(60, 8)), RNG.normal(size=(45, 8)) * 0.8
    fake[:9] = real[3:12]  # copies lie on edges
    assert prdc.prdc(real, fake, block=block) == prdc.prdc(real, fake, block=7)


def test_prdc_of_a_set_with_itself_and_with_something_far():
    x = RNG.normal(size=(50, 4))
    same = prdc.prdc(x, x)
    assert same['precision'] == same['recall'] == same['coverage'] == 1.0
    assert set(prdc.prdc(x, x + 100).values()) == {0.0}
    collapsed = prdc.prdc(x, x[:1] + 1e-3 * RNG.normal(size=(50, 4)))
    assert collapsed['precision'] == 1.0 and collapsed['recall'] < 0.1 and collapsed['coverage'] < 0.5


@pytest.mark.parametrize('call, message', [
    (lambda: prdc.prdc(np.zeros((3, 2)), np.zeros((9, 2))), 'k=3'),
    (lambda: prdc.prdc(np.zeros((9, 2)), np.zeros((3, 2))), 'k=3'),
    (lambda: prdc.prdc(np.zeros((9, 2)), np.zeros((9, 3))), 'cannot be compared'),
    (lambda: nearest.nearest_distances(np.zeros((1, 2)), np.zeros((0, 2))), 'k=1'),
    (lambda: nearest.nearest_distances(np.full((1, 2), np.inf), np.zeros((3, 2))), 'not finite')])
def test_neighbours_name_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- Inception score, Vendi ----------------------------------------------------------------------------------------

def test_inception_score_by_hand():
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    want = np.exp(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5))
    np.testing.assert_allclose(inception_score(np.log(p) + 7.0), (want, 0.0), rtol=1e-12)
    np.testing.assert_allclose(inception_score(1e4 * np.eye(10)), (10.0, 0.0), rtol=1e-9)
    np.testing.assert_allclose(inception_score(np.tile(RNG.normal(size=(1, 5)), (20, 1))), (1.0, 0.0), atol=1e-12)


def test_inception_score_is_taken_part_by_part():
    parts = 1e3 * np.eye(4)[[0, 1, 2, 3, 0, 0, 1, 1, 2, 2]]
    mean, spread = inception_score(parts, split_size=4)  # four classes, two, one
    np.testing.assert_allclose((mean, spread), (7 / 3, np.std([4, 2, 1])), rtol=1e-9)


def test_vendi_by_hand():
    np.testing.assert_allclose(vendi_score(np.ones((7, 3)) * np.arange(1, 8)[:, None]), 1.0, rtol=1e-9)
    np.testing.assert_allclose(vendi_score(3.0 * np.eye(6)), 6.0, rtol=1e-9)
    np.testing.assert_allclose(vendi_score(np.eye(5)[[0, 0, 3, 3]]), 2.0, rtol=1e-9)
    want = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(vendi_score(np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])), want, rtol=1e-9)


@pytest.mark.parametrize('shape', [(4, 30), (30, 4)])
def test_vendi_of_features_is_that_of_their_kernel(shape):
    x = RNG.normal(size=shape)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(unit @ unit.T / len(x))
    p = p[p > 1e-12]
    np.testing.assert_allclose(vendi_score(x), np.exp(-np.sum(p * np.log(p))), rtol=1e-8)


@pytest.mark.parametrize('call, message', [
    (lambda: inception_score(np.zeros((0, 3))), 'at least one'),
    (lambda: inception_score(np.full((2, 3), np.nan)), 'not finite'),
    (lambda: inception_score(np.zeros((2, 3)), split_size=0), 'split_size'),
    (lambda: vendi_score(np.zeros((2, 3))), 'zero'),
])
def test_scores_name_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- Probes --------------------------------------------------------------------------------------------------------

def clusters(num, spread):
    labels = RNG.integers(0, 3, num)
    return (4 * np.eye(3, 10)[labels] + spread * RNG.normal(size=(num, 10))).astype(np.float32), labels


def test_knn_votes_by_weight():
    """One neighbour at cosine 1 against two at 0.5: exp(1 / 0.07) beats 2 exp(0.5 / 0.07), though not at T = 10."""
    train = np.array([[1, 0], [0.5, np.sqrt(0.75)], [0.5, -np.sqrt(0.75)]], np.float32)
    query = np.array([[5.0, 0.0]], np.float32)
    one = lambda **kw: probes.knn_accuracy(train, np.array([0, 1, 1]), query, np.array([0]), num_classes=2, **kw)
    assert one(k=3) == 1.0 and one(k=3, temperature=10.0) == 0.0 and one(k=(1, 3), temperature=10.0) == {1: 1.0, 3: 0.0}


@pytest.mark.parametrize('block', [1, 7, 512])
def test_knn_does_not_depend_on_the_block(block):
    (x, y), (tx, ty) = clusters(40, 2.5), clusters(33, 2.5)
    want = probes.knn_accuracy(x, y, tx, ty, num_classes=3, k=(1, 5, 20), block=33)
    assert probes.knn_accuracy(x, y, tx, ty, num_classes=3, k=(1, 5, 20), block=block) == want
    assert 1 / 3 < want[5] < 1.0


def test_knn_of_codes_is_that_of_their_one_hot_encoding():
    codes, tests = RNG.integers(0, 6, (60, 8)).astype(np.uint8), RNG.integers(0, 6, (50, 8)).astype(np.uint8)
    y, ty = (codes[:, 0] + codes[:, 1]) % 3, (tests[:, 0] + tests[:, 1]) % 3
    flat = lambda c: codes_lib.one_hot(c, 6).reshape(len(c), -1)
    # All vote, as among equally distant neighbours rounding would decide who is the k-th.
    got = probes.knn_accuracy(codes, y, tests, ty, num_classes=3, k=60)
    assert got == probes.knn_accuracy(flat(codes), y, flat(tests), ty, num_classes=3, k=60)
    assert probes.knn_accuracy(codes, y, codes, y, num_classes=3, k=1) == 1.0


@pytest.mark.parametrize('method, options', [('lbfgs', {}), ('sgd', dict(num_steps=300, batch_size=32))])
def test_linear_probe_separates_what_is_separable(method, options):
    (x, y), (tx, ty) = clusters(200, 0.5), clusters(100, 0.5)
    options = options | dict(num_classes=3, method=method)
    fit = lambda labels, **kw: probes.linear_probe_accuracy(x, labels, tx, ty, **options, **kw)
    assert fit(y) == 1.0 and fit(y, selection='test') == 1.0
    assert fit((y + 1) % 3) == 0.0


@pytest.mark.parametrize('method, options', [('lbfgs', {}), ('sgd', dict(num_steps=400, batch_size=64))])
def test_linear_probe_reads_codes(method, options):
    codes, tests = (RNG.integers(0, 8, (n, 5)).astype(np.uint8) for n in (400, 200))
    label = lambda c: (c[:, 2] // 2).astype(int)  # which values of one position mean what
    y, ty, options = label(codes), label(tests), options | dict(num_classes=4, method=method)
    got = probes.linear_probe_accuracy(codes, y, tests, ty, vocab_size=8, **options)
    assert got > 0.97
    elsewhere = probes.linear_probe_accuracy(codes[:, :2], y, tests[:, :2], ty, **options)
    assert elsewhere < 0.5  # the other positions say nothing


@pytest.fixture
def spy(monkeypatch):
    """Lists of the arguments that functions of `probes` are called with, by name."""
    calls = {name: [] for name in ('_fit_lbfgs', '_fit_sgd', '_scores')}
    for name, log in calls.items():
        real = getattr(probes, name)
        monkeypatch.setattr(probes, name, lambda *args, real=real, log=log: log.append(args) or real(*args))
    return calls


@pytest.mark.parametrize('method', probes.METHODS)
def test_settings_are_chosen_on_rows_that_were_not_trained_on(spy, method):
    (x, y), (tx, ty) = clusters(50, 2.0), clusters(10, 2.0)
    probes.linear_probe_accuracy(x, y, tx, ty, num_classes=3, method=method, validation=0.2, num_steps=10,
                                 batch_size=10, learning_rates=(0.1, 1.0), penalties=(1e-2, 1e-1), max_iterations=2)
    if method == 'sgd':  # 10 steps of 10 are two rounds and a half of 40 rows, and two of 50
        fits = [np.unique(order) for _, _, order, *_ in spy['_fit_sgd']]
    else:
        fits = [np.flatnonzero(weights) for _, _, weights, *_ in spy['_fit_lbfgs']][1:]
    assert [len(rows) for rows in fits] == [40, 50]
    held_out = spy['_scores'][0][1]
    trained = np.asarray((spy['_fit_sgd'] or spy['_fit_lbfgs'])[0][0])
    left = {row.tobytes() for row in trained} - {row.tobytes() for row in trained[fits[0]]}
    assert {row.tobytes() for row in np.asarray(held_out)} == left and len(left) == 10


def test_learning_rates_are_scaled_by_the_batch(spy):
    (x, y), (tx, ty) = clusters(20, 2.0), clusters(10, 2.0)
    probes.linear_probe_accuracy(x, y, tx, ty, num_classes=3, method='sgd', selection='test', num_steps=2,
                                 batch_size=64, learning_rates=(0.1, 1.0))
    np.testing.assert_allclose(spy['_fit_sgd'][0][3], [0.025, 0.25], rtol=1e-6)


def test_sgd_by_hand():
    """Momentum 0.9 without decay, at a rate that falls as a cosine to 0: of four steps 1, 0.854, 0.5 and 0.146."""
    x, y = clusters(8, 2.0)
    order, rates = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 0], [5, 1, 3]]), (0.2, 0.01)
    got = probes._fit_sgd(jnp.asarray(x), jnp.asarray(y), jnp.asarray(order), jnp.asarray(rates), jax.random.key(3),
                          (10, 3))
    for i, rate in enumerate(rates):
        kernel, bias = 0.01 * np.asarray(jax.random.normal(jax.random.key(3), (10, 3)), np.float64), np.zeros(3)
        speed = [0.0, 0.0]
        for rows, share in zip(order, (1.0, (2 + 2 ** 0.5) / 4, 0.5, (2 - 2 ** 0.5) / 4)):
            logits = np.exp(x[rows] @ kernel + bias)
            error = (logits / logits.sum(1, keepdims=True) - np.eye(3)[y[rows]]) / 3
            speed = [0.9 * v + g for v, g in zip(speed, (x[rows].T @ error, error.sum(0)))]
            kernel, bias = kernel - rate * share * speed[0], bias - rate * share * speed[1]
        np.testing.assert_allclose(got.kernel[i], kernel, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got.bias[i], bias, rtol=1e-3, atol=1e-5)


def test_linear_map_of_codes_is_that_of_their_one_hot_encoding():
    codes = RNG.integers(0, 4, (9, 3))
    kernel, bias = RNG.normal(size=(3, 4, 5)).astype(np.float32), RNG.normal(size=5).astype(np.float32)
    probe = probes.Linear(jnp.asarray(kernel), jnp.asarray(bias))
    want = codes_lib.one_hot(codes, 4).reshape(9, -1) @ kernel.reshape(12, 5) + bias
    np.testing.assert_allclose(probes._logits(probe, jnp.asarray(codes)), want, rtol=1e-5, atol=1e-5)


def test_lbfgs_reaches_the_optimum_of_the_weighted_penalised_loss():
    x, y = clusters(60, 2.0)
    weights = np.where(np.arange(60) < 45, 1 / 45, 0.0).astype(np.float32)
    probe = probes._fit_lbfgs(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights), 1e-2, (10, 3), 200)
    p = np.asarray(jax.nn.softmax(x @ probe.kernel + probe.bias))
    error = (p - np.eye(3)[y]) * weights[:, None]
    np.testing.assert_allclose(x.T @ error + 1e-2 * probe.kernel, 0.0, atol=3e-4)  # the gradient, by hand
    np.testing.assert_allclose(error.sum(0), 0.0, atol=3e-4)


@pytest.mark.parametrize('change, message', [
    (dict(k=5), 'k=5'), (dict(test_features=np.zeros((2, 3), np.float32)), 'expected'),
    (dict(test_features=np.zeros((2, 2), int)), 'codes'),
    (dict(train_labels=np.array([0])), 'labels'), (dict(test_labels=np.array([0, 7])), 'num_classes'),
    (dict(train_features=np.full((4, 2), np.nan, np.float32)), 'not finite'), (dict(method='adam'), 'method'),
    (dict(selection='none'), 'selection')])
def test_probes_name_bad_input(change, message):
    arguments = dict(train_features=np.ones((4, 2), np.float32), train_labels=np.array([0, 1, 0, 1]),
                     test_features=np.ones((2, 2), np.float32), test_labels=np.array([0, 1]), num_classes=2) | change
    probe = probes.linear_probe_accuracy if {'method', 'selection'} & set(change) else probes.knn_accuracy
    with pytest.raises(ValueError, match=message):
        probe(**arguments)


def test_a_code_beyond_the_vocabulary_is_named():
    codes, y = np.array([[0, 1], [2, 3]]), np.array([0, 1])
    with pytest.raises(ValueError, match='token 3'):
        probes.linear_probe_accuracy(codes, y, codes, y, num_classes=2, vocab_size=3)
