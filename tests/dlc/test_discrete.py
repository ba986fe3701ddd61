"""Properties of the discrete processes, and every sampler on a joint distribution whose scores are known exactly."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compiled import optimized
from dlc_jax.diffusion import discrete
from dlc_jax.diffusion.discrete import SAMPLERS, DiscreteDiffusion, Jumps, network_calls

PROPERTY = settings(max_examples=10, deadline=None)
V, L = 3, 2
# Far from independent: drawing both tokens at once from their marginals would be seen at once.
JOINT = np.array([[0.30, 0.02, 0.05], [0.01, 0.25, 0.04], [0.08, 0.05, 0.20]])
FAST = jax.random.key(0, impl='rbg')  # a generator that costs less where millions of draws are made
NOISES = [dict(noise='loglinear'), dict(noise='geometric', sigma_min=1e-4, sigma_max=12.0)]


def exact_score(process, joint=JOINT):
    """`score_fn` of the process started at `joint` [V, V]."""
    joint = jnp.asarray(joint, jnp.float32)
    if process == 'absorbing':
        masked = jnp.pad(joint, ((0, 1), (0, 1)))
        masked = masked.at[V, :].set(masked.sum(0)).at[:, V].set(masked.sum(1)).at[V, V].set(1.0)  # marginal over masks

        def score(tokens, sigma):
            first, second = tokens[:, 0], tokens[:, 1]
            clean = jnp.stack([masked[:V, second].T, masked[first, :V]], 1)
            log_p = jnp.log(clean / masked[first, second][:, None, None])
            scores = jnp.pad(log_p - jnp.log(jnp.expm1(sigma))[:, None, None], ((0, 0), (0, 0), (0, 1)))
            return jnp.where(tokens[..., None] == jnp.arange(V + 1), 0.0, scores)
    else:
        def score(tokens, sigma):
            keep = jnp.exp(-sigma)[:, None, None]
            kernel = keep * jnp.eye(V) - jnp.expm1(-sigma)[:, None, None] / V
            p = jnp.einsum('bix,ij,bjy->bxy', kernel, joint, kernel)
            row = jnp.arange(len(tokens))
            at = jnp.stack([p[row, :, tokens[:, 1]], p[row, tokens[:, 0], :]], 1)
            return jnp.log(at / p[row, tokens[:, 0], tokens[:, 1]][:, None, None])
    return score


def ignorant_score(tokens, sigma):
    """`score_fn` of the absorbing process that finds all tokens equally likely."""
    scale = -jnp.log(jnp.expm1(sigma))[:, None, None] - np.log(V)
    return jnp.where(tokens[..., None] == jnp.arange(V + 1), 0.0, scale)


def draw_data(key, num):
    flat = jax.random.categorical(key, jnp.log(jnp.asarray(JOINT.ravel())), shape=(num,))
    return jnp.stack([flat // V, flat % V], 1).astype(jnp.int32)


def chi_square(codes, probs):
    """Upper tail probability of the counts of `codes` under `probs`."""
    counts = np.bincount(np.ravel_multi_index(np.asarray(codes).T, probs.shape), minlength=probs.size)
    return stats.chisquare(counts, probs.ravel() * len(codes) / probs.sum()).pvalue


# ---- Noise and corruption ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('noise', NOISES)
@PROPERTY
@given(t=st.floats(1e-4, 1.0), share=st.floats(1e-3, 1.0))
def test_noise_is_consistent(noise, t, share):
    d, dt = DiscreteDiffusion(V, **noise), t * share
    t32 = np.float32(t)
    difference = float(d.sigma(t)) - float(d.sigma(t - dt))
    np.testing.assert_allclose(d.sigma_increment(t, dt), difference, rtol=2e-3, atol=1e-6)
    rate = (float(d.sigma(t32 * np.float32(1.01))) - float(d.sigma(t32 * np.float32(0.99)))) / (0.02 * float(t32))
    if t < 0.9:
        np.testing.assert_allclose(d.dsigma(t), rate, rtol=2e-2)


def test_log_linear_noise_keeps_its_digits_at_both_ends():
    d = DiscreteDiffusion(V)
    for t in (1e-5, 1e-3, 0.3, 0.4999, 0.5, 0.9, 0.9999, 1.0):
        exact = -np.log1p(-(1 - 1e-3) * np.float64(np.float32(t)))
        np.testing.assert_allclose(d.sigma(t), exact, rtol=2e-5 if t == 0.9999 else 2e-6)
    np.testing.assert_allclose(d.sigma(1.0), 6.9077553, rtol=1e-6)
    np.testing.assert_allclose(d.dsigma(1.0), 999.0, rtol=1e-5)


@pytest.mark.parametrize('process', ['absorbing', 'uniform'])
@PROPERTY
@given(seed=st.integers(0, 2 ** 31 - 1))
def test_time_zero_is_the_data_and_time_one_is_noise(process, seed):
    d = DiscreteDiffusion(V, process=process)
    key = jax.random.key(seed)
    x0 = jax.random.randint(key, (200, 50), 0, V)
    np.testing.assert_array_equal(d.corrupt(key, x0, jnp.zeros(200)), x0)
    x1 = np.asarray(d.corrupt(jax.random.fold_in(key, 1), x0, jnp.ones(200)))
    if process == 'absorbing':  # all but eps of 10 000; twice that is more than 8 standard deviations out
        assert (x1 != V).mean() < 5e-3 and set(np.unique(x1)) <= {0, 1, 2, 3}
    else:
        assert stats.chisquare(np.bincount(x1.ravel(), minlength=V)).pvalue > 1e-6 and x1.max() < V
        assert abs((x1 == np.asarray(x0)).mean() - 1 / V) < 0.03


@pytest.mark.parametrize('process', ['absorbing', 'uniform'])
@pytest.mark.parametrize('noise', NOISES)
def test_corruption_has_the_marginal_of_the_process(process, noise):
    d = DiscreteDiffusion(V, process=process, **noise)
    t = jnp.array([0.05, 0.4, 0.8])
    x0 = jnp.broadcast_to(jnp.array([0, 1, 2], jnp.int32)[:, None], (3, 20_000))
    x = np.asarray(d.corrupt(jax.random.key(0), x0, t))
    for row in range(3):
        kept = np.exp(-float(d.sigma(t[row])))
        want = kept * np.eye(d.num_states)[row]
        want = want + (1 - kept) * (np.eye(V + 1)[V] if process == 'absorbing' else np.full(V, 1 / V))
        got = np.bincount(x[row], minlength=d.num_states) / 20_000
        np.testing.assert_allclose(got, want, atol=0.02)
        assert (got[want == 0] == 0).all()


@pytest.mark.parametrize('how', ['uniform', 'antithetic', 'stratified'])
@pytest.mark.parametrize('num', [1, 7, 64])
def test_training_times(how, num):
    t = np.asarray(DiscreteDiffusion(V, time_sampling=how).sample_times(jax.random.key(0), num))
    assert t.shape == (num,) and (t >= 1e-3).all() and (t <= 1).all()
    if how == 'antithetic' and num == 64:
        np.testing.assert_allclose(t[:32] + t[32:], 1.001, rtol=1e-5)
    if how == 'stratified' and num == 64:  # one in each sixty-fourth of the interval
        np.testing.assert_allclose(np.diff(np.sort(t)), 0.999 / 64, rtol=1e-3)


# ---- Score entropy -------------------------------------------------------------------------------------------------

@PROPERTY
@given(seed=st.integers(0, 2 ** 31 - 1), t=st.floats(1e-3, 1.0))
def test_with_normalised_scores_the_loss_is_cross_entropy_over_time(seed, t):
    """If e^{s_y} = r p_y, H = r (-log p_{x0}); and for log-linear noise sigma' r = 1 / t."""
    d = DiscreteDiffusion(5)
    keys = jax.random.split(jax.random.key(seed), 3)
    log_p = jax.nn.log_softmax(3 * jax.random.normal(keys[0], (4, 6, 5)))
    x0 = jax.random.randint(keys[1], (4, 6), 0, 5)
    xt = jnp.where(jax.random.bernoulli(keys[2], 0.5, (4, 6)), 5, x0)
    sigma = jnp.full(4, d.sigma(t))
    log_score = jnp.pad(log_p - jnp.log(jnp.expm1(sigma))[:, None, None], ((0, 0), (0, 0), (0, 1)))
    nll = jnp.where(xt == 5, -jnp.take_along_axis(log_p, x0[..., None], -1)[..., 0], 0.0)
    r = 1 / np.expm1(np.float64(sigma[0]))
    np.testing.assert_allclose(d.score_entropy(log_score, xt, x0, sigma) / r, nll, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(float(d.dsigma(t)) * r * np.float32(t), 1.0, rtol=1e-3)
    np.testing.assert_allclose(t * d.example_loss(log_score, xt, x0, jnp.full(4, t)), nll.sum(-1), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize('process', ['absorbing', 'uniform'])
@PROPERTY
@given(seed=st.integers(0, 2 ** 31 - 1), t=st.floats(1e-2, 1.0))
def test_score_entropy_is_the_textbook_sum_and_least_at_the_true_ratio(process, seed, t):
    d = DiscreteDiffusion(V, process=process)
    keys = jax.random.split(jax.random.key(seed), 3)
    x0 = jax.random.randint(keys[0], (8, 4), 0, V)
    xt = d.corrupt(keys[1], x0, jnp.full(8, t))
    sigma = jnp.full(8, d.sigma(t))
    log_score = 2 * jax.random.normal(keys[2], (8, 4, d.num_states))

    s64, kept = np.asarray(log_score, np.float64), np.exp(-np.float64(sigma[0]))
    want, ratios = np.zeros((8, 4)), np.zeros((8, 4, d.num_states))
    for b, l in np.ndindex(8, 4):
        x, o = int(xt[b, l]), int(x0[b, l])
        if process == 'absorbing':
            prob = lambda y: 1 - kept if y == V else kept * (y == o)
            sources = range(V) if x == V else ()
        else:
            prob = lambda y: kept * (y == o) + (1 - kept) / V
            sources = [y for y in range(V) if y != x]
        for y in sources:
            r = prob(y) / prob(x)
            ratios[b, l, y] = r
            term = np.exp(s64[b, l, y]) - r * s64[b, l, y] + (r * (np.log(r) - 1) if r else 0)
            want[b, l] += term / (1 if process == 'absorbing' else V)
    got = d.score_entropy(log_score, xt, x0, sigma)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * max(1.0, ratios.max()) * 1e-2)
    best = jnp.log(jnp.maximum(jnp.asarray(ratios, jnp.float32), 1e-30))
    assert (got > -1e-4).all()
    assert (d.score_entropy(best, xt, x0, sigma) < got + 1e-3).all()


@pytest.mark.parametrize('process', ['absorbing', 'uniform'])
def test_the_loss_of_exact_scores_is_the_entropy_of_the_data(process):
    """The bound is tight at the true scores (arXiv 2310.16834, eq. 11 and after)."""
    d = DiscreteDiffusion(V, process=process, time_sampling='stratified')
    x0 = draw_data(FAST, 60_000)
    loss, metrics = jax.jit(lambda k, x: d.loss(exact_score(process), k, x))(jax.random.fold_in(FAST, 1), x0)
    entropy = -(JOINT * np.log(JOINT)).sum()
    np.testing.assert_allclose(loss, entropy, rtol=0.03)
    assert 0.3 < metrics['corrupted'] < 0.6


def test_loss_is_summed_over_positions_and_averaged_over_the_batch():
    d = DiscreteDiffusion(V)
    x0 = jnp.zeros((512, 8), jnp.int32)
    loss, _ = jax.jit(functools.partial(d.loss, ignorant_score))(jax.random.key(0), x0)
    np.testing.assert_allclose(loss, 8 * np.log(V), rtol=0.1)


# ---- Reverse steps -------------------------------------------------------------------------------------------------

@PROPERTY
@given(seed=st.integers(0, 2 ** 31 - 1), t=st.floats(0.31, 0.54), eta=st.floats(0.0, 0.2))
def test_rows_of_exact_scores_are_probabilities(seed, t, eta):
    x = jax.random.randint(jax.random.key(seed), (16, L), 0, V + 1)
    for process in SAMPLERS:
        d = DiscreteDiffusion(V, process=process)
        tokens = x if process == 'absorbing' else x % V
        log_score = exact_score(process)(tokens, jnp.full(16, d.sigma(t)))
        for sampler in set(SAMPLERS[process]) - {'first_hitting'}:
            rate = eta if sampler == 'remasking' else 0.0
            rows = d.transition_probs(log_score, tokens, t, 1 / 64, sampler=sampler, eta=rate)
            assert (rows >= 0).all(), (process, sampler)
            np.testing.assert_allclose(rows.sum(-1), 1.0, atol=1e-5, err_msg=f'{process} {sampler}')


@pytest.mark.parametrize('noise', NOISES)
@pytest.mark.parametrize('process', ['absorbing', 'uniform'])
def test_analytic_step_of_one_token_is_the_posterior(process, noise):
    """With one position Tweedie's step is Bayes' rule, whatever its size."""
    d = DiscreteDiffusion(V, process=process, **noise)
    prior, t, s = np.array([0.6, 0.3, 0.1]), 0.7, 0.25
    def marginal(kept):  # [clean, noisy]
        noisy = np.eye(V + 1)[V][None] if process == 'absorbing' else np.full((1, V), 1 / V)
        return kept * np.eye(V, d.num_states) + (1 - kept) * noisy
    kept_t, kept_s = (np.exp(-float(d.sigma(u))) for u in (t, s))
    at_t, at_s = prior @ marginal(kept_t), prior @ marginal(kept_s)
    step = marginal(kept_t / kept_s)
    if process == 'absorbing':
        step = np.vstack([step, np.eye(V + 1)[V]])
    posterior = (at_s[:, None] * step / at_t).T  # [noisy at t, state at s]
    x = jnp.arange(d.num_states)[:, None]
    log_score = jnp.log(jnp.asarray(at_t[None] / at_t[:, None], jnp.float32))[:, None]
    np.testing.assert_allclose(d.transition_probs(log_score, x, t, t - s)[:, 0], posterior, atol=2e-5)


@pytest.mark.parametrize('final_time, steps', [
    (1e-5, dict(sampler='analytic', num_steps=1)), (0.99, dict(sampler='analytic', num_steps=1)),  # the last step's
    (1e-5, dict(sampler='first_hitting', tokens_per_call=2))])
def test_temperature_changes_which_token_and_not_when(final_time, steps):
    """Both tokens of nearly every code are drawn at once, from their marginals."""
    d = DiscreteDiffusion(V, final_time=final_time)
    sample = optimized(lambda k: d.sample(exact_score('absorbing'), k, (4000, L), temperature=0.25, **steps))
    cold = np.asarray(sample(FAST))
    for position in range(L):
        sharp = JOINT.sum(1 - position) ** 4
        np.testing.assert_allclose(np.bincount(cold[:, position], minlength=V) / 4000, sharp / sharp.sum(), atol=0.04)
    move = Jumps(jnp.log(0.1 * jnp.full((1, 20_000, V), 1 / V)), jnp.full((1, 20_000), 0.9))
    moved = d._step(FAST, jnp.full((1, 20_000), V), move, 0.0, 0.25) != V
    assert abs(moved.mean() - 0.1) < 0.015


def test_jumps_that_float32_noise_cannot_resolve_happen_as_often_as_they_should():
    """Four tokens at 2.5e-8 each, 6e7 times. Gumbel noise on 23 bits ends at 15.9, where these would need 17.5."""
    d, shape = DiscreteDiffusion(4), (1000, 1000)
    move = Jumps(jnp.full((*shape, 4), np.log(2.5e-8), jnp.float32), jnp.full(shape, 1 - 1e-7))
    step = lambda i, move: d._step(jax.random.fold_in(FAST, i), jnp.full(shape, 4), move, 0.0, 1.0)
    count = lambda move: jax.lax.fori_loop(0, 60, lambda i, total: total + jnp.sum(step(i, move) != 4), 0)
    jumps = int(optimized(count)(move))  # an argument: what is made of a million constants would be computed to compile
    assert 2 <= jumps <= 15  # 6 expected; 0.2 with one float32 draw among tokens and staying


# ---- Samplers ------------------------------------------------------------------------------------------------------

CASES = [('absorbing', s, {}) for s in SAMPLERS['absorbing']] + [('uniform', s, {}) for s in SAMPLERS['uniform']] + [
    ('absorbing', 'remasking', dict(parity=True)),
    ('absorbing', 'analytic', dict(noise='geometric')), ('absorbing', 'first_hitting', dict(noise='geometric')),
]


@pytest.mark.parametrize('process, sampler, options', CASES)
def test_every_sampler_draws_the_known_joint(process, sampler, options):
    options = dict(options)
    noise = NOISES[1] if options.pop('noise', None) else NOISES[0]
    d = DiscreteDiffusion(V, process=process, **noise)
    score = exact_score(process)
    codes = optimized(lambda k: d.sample(score, k, (8000, L), sampler=sampler, num_steps=250, **options))(FAST)
    assert codes.dtype == jnp.int32 and codes.shape == (8000, L) and codes.min() >= 0 and codes.max() < V
    assert chi_square(codes, JOINT) > 1e-5
    assert chi_square(codes, np.outer(JOINT.sum(1), JOINT.sum(0))) < 1e-30  # the test could tell independent tokens


@pytest.mark.parametrize('noise', [dict(), dict(noise='geometric', sigma_min=0.3)])
def test_the_last_step_of_the_uniform_process_takes_all_the_noise(noise):
    """Geometric noise is not over at time 0; what is left of it would stay in every sample."""
    d, first = DiscreteDiffusion(V, process='uniform', **noise), jnp.arange(V) == 0

    def score(tokens, sigma):  # of codes that are all zeros
        log_p = jnp.log(jnp.exp(-sigma)[:, None] * first - jnp.expm1(-sigma)[:, None] / V)
        return log_p[:, None] - jnp.take_along_axis(log_p, tokens, 1)[..., None]
    assert not optimized(lambda k: d.sample(score, k, (4000, 1), num_steps=8))(FAST).any()


def test_tokens_drawn_together_are_independent():
    """What first_hitting gives up when it reveals both tokens in one call."""
    d = DiscreteDiffusion(V)
    options = dict(sampler='first_hitting', tokens_per_call=2)
    codes = optimized(lambda k: d.sample(exact_score('absorbing'), k, (8000, L), **options))(FAST)
    assert chi_square(codes, np.outer(JOINT.sum(1), JOINT.sum(0))) > 1e-5


@pytest.mark.parametrize('sampler, options, calls', [
    ('analytic', dict(num_steps=9), 10), ('euler', dict(num_steps=9), 10), ('remasking', dict(num_steps=9), 10),
    ('first_hitting', {}, 7), ('first_hitting', dict(tokens_per_call=3), 3),
    ('first_hitting', dict(tokens_per_call=10), 1)])
def test_network_calls_and_what_each_sees(sampler, options, calls):
    d, seen = DiscreteDiffusion(V), []

    def score(tokens, sigma):
        note = lambda *now: seen.append(tuple(map(np.asarray, now)))
        jax.debug.callback(note, (tokens == V).sum(-1), sigma, ordered=True)
        return ignorant_score(tokens, sigma)

    codes = jax.jit(lambda k: d.sample(score, k, (5, 7), sampler=sampler, **options))(jax.random.key(0))
    jax.effects_barrier()
    assert codes.max() < V
    step = options.get('tokens_per_call', 1)
    assert len(seen) == calls == network_calls(sampler, 7, num_steps=9, tokens_per_call=step)
    noise = np.stack([noise for _, noise in seen])
    assert (np.diff(noise, axis=0) < 0).all()
    if sampler == 'first_hitting':  # every call finds tokens_per_call masks fewer, at a time that is each code's own
        masks = np.stack([masks for masks, _ in seen])
        np.testing.assert_array_equal(masks, (7 - step * np.arange(calls))[:, None].repeat(5, 1))
        assert len(np.unique(noise[0])) == 5
    else:
        assert (noise == noise[:, :1]).all()
        np.testing.assert_allclose(noise[[0, -1], 0], [d.sigma(1.0), d.sigma(1e-5)], rtol=1e-5)


def test_first_hitting_times_follow_the_process():
    """Between calls, the share of masks must be that of the forward process at the time each call sees."""
    d, seen = DiscreteDiffusion(V, noise='geometric', sigma_max=1.0), []

    def score(tokens, sigma):
        note = lambda *now: seen.append(tuple(map(np.asarray, now)))
        jax.debug.callback(note, (tokens == V).sum(-1), sigma, ordered=True)
        return jnp.zeros((*tokens.shape, V + 1))

    run = optimized(lambda k: d.sample(score, k, (4000, 5), sampler='first_hitting'))
    jax.block_until_ready(run(jax.random.key(0)))
    jax.effects_barrier()
    # The n-th largest of 5 uniform draws has mean (6 - n) / 6; here they are shares of what is masked at time 1.
    share = np.stack([-np.expm1(-np.asarray(noise, np.float64)) for _, noise in seen]).mean(1)
    np.testing.assert_allclose(share, np.arange(5, 0, -1) / 6 * (1 - np.exp(-1)), atol=0.015)


@pytest.mark.parametrize('eta, window, parity', [
    (0.15, (0.3, 0.9), False), (0.15, (0.3, 0.9), True), (1.0, (0.05, 0.9), False)])
def test_remasking_keeps_the_share_of_masks_on_its_course(eta, window, parity):
    """At 0.15 tokens are redrawn several times over; a rate of 1 cannot be made up for by unmasking, and is capped."""
    d, seen, codes_of = DiscreteDiffusion(V), [], 3000

    def score(tokens, sigma):
        jax.debug.callback(lambda masks, noise: seen.append((float(masks), float(noise))),
                           jnp.mean(tokens == V, dtype=jnp.float32), sigma[0])
        return exact_score('absorbing')(tokens, sigma)

    options = dict(sampler='remasking', num_steps=100, eta=eta, window=window, parity=parity)
    run = optimized(lambda k: d.sample(score, k, (codes_of, L), **options))
    codes = np.asarray(run(FAST))
    jax.effects_barrier()
    assert len(seen) == 101
    for share, noise in seen[1:]:
        want = -np.expm1(-noise)
        assert abs(share - want) < 0.01 + 5 * np.sqrt(want * (1 - want) / (codes_of * L)), (share, want)
    for position in range(L):
        share = np.bincount(codes[:, position], minlength=V) / codes_of
        np.testing.assert_allclose(share, JOINT.sum(1 - position), atol=0.05)


def test_tokens_are_remasked_inside_the_window_and_nowhere_else():
    d, seen = DiscreteDiffusion(V), []

    def score(tokens, sigma):
        jax.debug.callback(lambda now: seen.append(np.asarray(now)), tokens, ordered=True)
        return ignorant_score(tokens, sigma)

    options = dict(sampler='remasking', num_steps=32, eta=0.2, window=(0.3, 0.4))
    codes = np.asarray(jax.jit(lambda k: d.sample(score, k, (200, L), **options))(jax.random.key(0)))
    jax.effects_barrier()
    remasked = [((now != V) & (then == V)).any() for now, then in zip(seen, [*seen[1:], codes], strict=True)]
    times = np.append(np.linspace(1.0, d.final_time, 33), 0.0)[:-1]
    np.testing.assert_array_equal(remasked, (times > 0.3) & (times < 0.4))


def test_same_key_same_codes():
    d = DiscreteDiffusion(V)
    sample = jax.jit(lambda k: d.sample(exact_score('absorbing'), k, (64, L), num_steps=8))
    np.testing.assert_array_equal(sample(jax.random.key(3)), sample(jax.random.key(3)))
    assert (sample(jax.random.key(3)) != sample(jax.random.key(4))).any()


@pytest.mark.parametrize('process, sampler', [(process, name) for process in SAMPLERS for name in SAMPLERS[process]])
def test_scores_that_do_not_add_up_still_give_tokens(process, sampler):
    d = DiscreteDiffusion(V, process=process)

    @jax.jit
    def sample(key, level, swing):
        wild = level + swing * jnp.sin(7.0 * jnp.arange(d.num_states))
        score = lambda x, s: jnp.where(x[..., None] == jnp.arange(d.num_states), 0.0, wild)
        return d.sample(score, key, (32, L), sampler=sampler, num_steps=5)

    for level, swing in ((0.0, 30.0), (-30.0, 0.0), (-200.0, 0.0), (200.0, 0.0)):
        codes = sample(FAST, level, swing)
        assert codes.min() >= 0 and codes.max() < V, (level, swing)


@pytest.mark.parametrize('fields, message', [
    (dict(process='masked'), 'process'), (dict(noise='cosine'), 'noise'),
    (dict(time_sampling='sobol'), 'time_sampling'),
    (dict(eps=0.0), 'eps'), (dict(sigma_min=2.0, sigma_max=1.0), 'sigma_min'), (dict(vocab_size=0), 'vocab_size')])
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DiscreteDiffusion(**(dict(vocab_size=V) | fields))


@pytest.mark.parametrize('process, arguments, message', [
    ('uniform', dict(sampler='remasking'), 'sampler'), ('uniform', dict(sampler='first_hitting'), 'sampler'),
    ('absorbing', dict(sampler='tweedie'), 'sampler'), ('absorbing', dict(num_steps=0), 'num_steps'),
    ('absorbing', dict(eta=-0.1), 'eta'), ('absorbing', dict(tokens_per_call=0), 'tokens_per_call'),
    ('absorbing', dict(temperature=0.0), 'temperature'), ('absorbing', dict(shape=(2, L, 1)), 'shape')])
def test_bad_arguments_are_named(process, arguments, message):
    with pytest.raises(ValueError, match=message):
        DiscreteDiffusion(V, process=process).sample(
            exact_score(process), jax.random.key(0), **dict(shape=(2, L)) | arguments)


@pytest.mark.parametrize('size', [1, 2, 11, 16])
@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_draws_follow_their_weights(size, temperature):
    """Counts of each index against the binomial, over weights of very different sizes, some of them 0."""
    num, rng = 200_000, np.random.default_rng(size)
    log_weights = rng.normal(-90, 3, size)  # so small that their exponentials underflow
    log_weights[rng.permutation(size)[:size // 4]] = -np.inf
    rows = jnp.broadcast_to(jnp.asarray(log_weights, jnp.float32), (num, size))
    draw = jax.jit(discrete._draw, static_argnums=2)
    counts = np.bincount(draw(jax.random.key(size), rows, temperature), minlength=size)
    p = np.exp((log_weights - log_weights.max()) / temperature)
    p /= p.sum()
    assert counts.size == size and not counts[p == 0].any()
    assert (np.abs(counts - num * p) < 5 * np.sqrt(num * p * (1 - p)) + 1e-9).all()


def test_a_draw_without_any_weight_is_the_first_index():
    assert (discrete._draw(jax.random.key(0), jnp.full((3, 10), -jnp.inf), 1.0) == 0).all()
