"""Properties of the Gaussian process, its loss, its samplers and guidance."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlc_jax.diffusion import gaussian
from dlc_jax.diffusion.gaussian import GaussianDiffusion, guided, to_uint8

SHAPE = (4, 4, 4, 2)
PROCESS = GaussianDiffusion()


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


# --- the process ---

def test_first_step_is_almost_the_data_and_last_almost_the_prior():
    x0, noise = normal(0), normal(1)
    first = PROCESS.corrupt(x0, jnp.zeros(4, int), noise)
    np.testing.assert_allclose(first, x0, atol=0.05)
    last = PROCESS.corrupt(x0, jnp.full(4, 999), noise)
    np.testing.assert_allclose(last, noise, atol=0.05)
    assert np.abs(first - x0).max() > 1e-3 and np.abs(last - noise).max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 1000))
def test_respacing_keeps_the_marginals(num_steps):
    process = PROCESS.respaced(num_steps)
    assert len(process) == len(process.betas) == num_steps
    assert process.timesteps[0] == 0 and process.timesteps[-1] == 999 and (np.diff(process.timesteps) > 0).all()
    full = np.cumprod(1 - PROCESS.betas)
    np.testing.assert_allclose(np.cumprod(1 - process.betas), full[process.timesteps], rtol=1e-9)
    assert process.respaced(num_steps) == process == PROCESS.respaced(999).respaced(num_steps)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 1000), st.floats(0, 1))
def test_posterior_mean_leads_from_one_marginal_to_the_next(num_steps, where):
    """E[x_{t-1}] = sqrt(abar_{t-1}) x0 if x_t stands at its own mean sqrt(abar_t) x0."""
    t = PROCESS.respaced(num_steps)._tables
    i = round(where * (num_steps - 1))
    np.testing.assert_allclose(t.posterior_x0[i] + t.posterior_xt[i] * t.sqrt_alphas_cumprod[i],
                               np.sqrt(t.alphas_cumprod_prev[i]), rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-6, 0.5))
def test_discretised_likelihood_is_a_distribution(mean, log_scale):
    levels = jnp.arange(256) / 127.5 - 1
    mass = jnp.exp(gaussian._discretised_log_likelihood(levels, mean, log_scale))
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-4)


# --- the loss ---

def exact_output(process, x0, x, index, variance_logit=-1.0):
    """Network output that knows x0: the true noise, and the posterior's own variance at logit -1."""
    a = jnp.asarray(process._tables.sqrt_alphas_cumprod)[index][:, None, None, None]
    s = jnp.asarray(process._tables.sqrt_one_minus_alphas_cumprod)[index][:, None, None, None]
    noise = (x - a * x0) / s
    return jnp.concatenate([noise, jnp.full_like(noise, variance_logit)], -1)


def test_a_network_that_knows_the_image_has_no_loss():
    x0, index = 0.5 * normal(0), jnp.array([1, 10, 500, 999])
    losses = jax.jit(lambda logit: PROCESS.losses(
        lambda x, t: exact_output(PROCESS, x0, x, index, logit), x0, index, normal(1)))
    terms = losses(-1.0)
    np.testing.assert_allclose(terms['mse'], 0, atol=1e-6)
    np.testing.assert_allclose(terms['vb'], 0, atol=1e-4)
    assert (losses(1.0)['vb'][:2] > 1e-3).all()  # late in the process both bounds of the variance agree


def test_the_network_sees_timesteps_of_the_full_process():
    seen = []
    process, index = PROCESS.respaced(10), jnp.array([0, 3, 9, 5])
    process.losses(lambda x, t: seen.append(t) or jnp.zeros((*x.shape[:-1], 4)), normal(0), index, normal(1))
    np.testing.assert_array_equal(seen[0], [0, 333, 999, 555])


def test_loss_is_finite_and_trains_noise_by_mse_and_variance_by_vb():
    x0, index, noise = normal(0), jnp.array([0, 1, 400, 999]), normal(1)

    @functools.partial(jax.jit, static_argnums=1)
    def total(output, name):
        return PROCESS.losses(lambda x, t: output, x0, index, noise)[name].sum()

    output = 0.3 * normal(2, (*SHAPE[:-1], 4))
    mse, vb = (jax.grad(total)(output, name) for name in ('mse', 'vb'))
    assert jnp.isfinite(mse).all() and jnp.isfinite(vb).all()
    assert (mse[..., :2] != 0).any() and (mse[..., 2:] == 0).all()
    assert (vb[..., :2] == 0).all() and (jnp.abs(vb[..., 2:]).max((1, 2, 3)) > 0).all()


def test_loss_draws_every_step_and_returns_its_parts():
    seen = []
    process = PROCESS.respaced(4)
    model = lambda x, t: seen.append(np.asarray(t)) or jnp.zeros((*x.shape[:-1], 4))
    loss, metrics = process.loss(model, jax.random.key(0), jnp.zeros((200, 2, 2, 2)))
    assert set(np.concatenate(seen)) == {0, 333, 666, 999}
    np.testing.assert_allclose(loss, metrics['mse'] + metrics['vb'], rtol=1e-6)
    np.testing.assert_allclose(metrics['mse'], 1, atol=0.15)  # E[noise²] against a network that says 0


def test_fixed_variance_has_no_variational_term():
    process = GaussianDiffusion(variance='fixed_small')
    loss, metrics = process.loss(lambda x, t: jnp.zeros_like(x), jax.random.key(0), normal(0))
    assert set(metrics) == {'mse'} and jnp.isfinite(loss)


def test_fixed_variances_are_the_bounds_of_the_learned_one():
    x, index = normal(0), jnp.full(4, 1)
    processes = [GaussianDiffusion(variance=v).respaced(10) for v in ('fixed_large', 'fixed_small')]
    large, small = (p.posterior(jnp.zeros(SHAPE), x, index).log_variance for p in processes)
    betas, kept = processes[0].betas, np.cumprod(1 - processes[0].betas)
    np.testing.assert_allclose(large, np.full(SHAPE, np.log(betas[1])), rtol=1e-5)
    np.testing.assert_allclose(small, np.full(SHAPE, np.log(betas[1] * betas[0] / (1 - kept[1]))), rtol=1e-5)
    assert (small < large - 0.1).all()


# --- the samplers ---

MEAN, STD = 0.7, 0.4


def gaussian_oracle(process, x, t):
    """Exact network for data N(MEAN, STD²): E[noise | x_t], and logits that give Var[x_{t-1} | x_t]."""
    index = jnp.searchsorted(jnp.asarray(process.timesteps), t)
    at = lambda name: process._at(name, index, x.ndim)
    a = at('alphas_cumprod')
    noise = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD ** 2 + 1 - a)
    x0_variance = STD ** 2 * (1 - a) / (a * STD ** 2 + 1 - a)
    variance = jnp.where(at('alphas_cumprod_prev') == 1, 0, jnp.exp(at('posterior_log_variance')))
    log_variance = jnp.log(variance + at('posterior_x0') ** 2 * x0_variance)
    share = (log_variance - at('posterior_log_variance')) / (at('log_betas') - at('posterior_log_variance'))
    return jnp.concatenate([noise, jnp.broadcast_to(2 * share - 1, x.shape)], -1)


@pytest.mark.parametrize('num_steps, options', [
    (200, dict(sampler='ddpm')), (200, dict(sampler='ddim')), (200, dict(sampler='ddim', eta=1.0))],
    ids=['ddpm', 'ddim', 'ddim eta=1'])
def test_exact_network_recovers_a_gaussian(num_steps, options):
    process = PROCESS.respaced(num_steps)
    run = jax.jit(lambda key: process.sample(
        functools.partial(gaussian_oracle, process), key, (2, 64, 64, 1), **options))
    x = np.asarray(run(jax.random.key(3)))
    assert abs(x.mean() - MEAN) < 0.02
    assert abs(x.std() / STD - 1) < 0.05  # first-order steps lose a little
    assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.05  # rows get noise of their own


def test_ddim_without_eta_is_deterministic_given_its_first_noise():
    process = PROCESS.respaced(10)

    @functools.partial(jax.jit, static_argnames=('sampler', 'eta'))
    def run(key, **options):
        return process.sample(
            functools.partial(gaussian_oracle, process), jax.random.key(key), SHAPE, noise=normal(5), **options)

    np.testing.assert_array_equal(run(0, sampler='ddim'), run(1, sampler='ddim'))
    assert (run(0, sampler='ddim', eta=0.5) != run(1, sampler='ddim', eta=0.5)).any()
    assert (run(0) != run(1)).any()
    np.testing.assert_array_equal(run(0), run(0))


def test_the_last_step_adds_no_noise():
    """From one x at index 0 every key leads to the same image."""
    process = GaussianDiffusion(variance='fixed_large')
    p = process.posterior(jnp.zeros(SHAPE), normal(0), jnp.zeros(1, int))
    steps = [process._ddpm_step(p, normal(0), jnp.int32(index), jax.random.key(key))
             for index in (0, 1) for key in (0, 1)]
    np.testing.assert_array_equal(steps[0], steps[1])
    assert (steps[2] != steps[3]).any()


def test_clip_denoised_bounds_the_prediction():
    output, x, index = jnp.zeros((*SHAPE[:-1], 4)), 3 * normal(0), jnp.full(4, 500)
    assert jnp.abs(PROCESS.posterior(output, x, index).x0).max() > 1
    assert jnp.abs(PROCESS.posterior(output, x, index, clip_denoised=True).x0).max() <= 1


def test_sampling_is_one_loop_with_one_network_call():
    calls = []
    jaxpr = jax.make_jaxpr(lambda key: PROCESS.sample(
        lambda x, t: calls.append(0) or jnp.zeros((*x.shape[:-1], 4)), key, SHAPE))(jax.random.key(0))
    assert len(calls) == 1 and sum(e.primitive.name in ('while', 'scan') for e in jaxpr.eqns) == 1


# --- guidance ---

def toy(x, t, cond, drop):
    """Linear in the condition; a dropped row is conditioned on 0."""
    cond = cond if drop is None else jnp.where(drop, 0.0, cond)
    signal = x * 0.1 + cond[:, None, None, None] * (1 + jnp.arange(x.shape[-1]))
    return jnp.concatenate([signal, jnp.tanh(signal)], -1)


CONTROL = jnp.array([1.0, -2.0, 3.0, 0.5])
TIMES = jnp.full(4, 300)


def test_guidance_extrapolates_from_null_to_condition():
    x = normal(0)
    cond, null = toy(x, TIMES, CONTROL, None), toy(x, TIMES, 0 * CONTROL, None)
    out = guided(toy, CONTROL, scale=3.0)(x, TIMES)
    np.testing.assert_allclose(out[..., :2], (null + 3 * (cond - null))[..., :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[..., 2:], cond[..., 2:])  # variance logits: conditional
    np.testing.assert_allclose(guided(toy, CONTROL, scale=0.0)(x, TIMES)[..., :2], null[..., :2], rtol=1e-5, atol=1e-5)


def test_guidance_of_the_first_channels_only():
    x = normal(0)
    one, every, plain = (guided(toy, CONTROL, scale=s, channels=c)(x, TIMES)
                         for s, c in ((3.0, 1), (3.0, None), (1.0, None)))
    np.testing.assert_array_equal(one[..., :1], every[..., :1])
    np.testing.assert_array_equal(one[..., 1:], plain[..., 1:])


def test_scale_one_is_the_plain_network():
    drops = []
    spy = lambda x, t, cond, drop: drops.append(drop) or toy(x, t, cond, drop)
    np.testing.assert_array_equal(
        guided(spy, CONTROL, scale=1.0)(normal(0), TIMES), toy(normal(0), TIMES, CONTROL, None))
    assert drops == [None]  # and no null batch is computed


@pytest.mark.parametrize('interval, inside, outside', [
    ((0.0, 0.3), (0, 299, 300), (301, 999)), ((0.3, 0.6), (300, 600), (299, 601)), ((0.9, 1.0), (900, 999), (899, 0))])
def test_guidance_interval(interval, inside, outside):
    """Its ends are included; t_max of the original is (0, t_max / T). Outside, the null half does not even run."""
    def poisoned(x, t, cond, drop):
        out = toy(x, t, cond, drop)
        return out if drop is None else jnp.where(drop.any(), out + 1e3, out)

    x = normal(0)
    model = jax.jit(guided(poisoned, CONTROL, scale=3.0, interval=interval))
    for t in inside:
        assert (model(x, jnp.full(4, t)) > 500).any(), t
    for t in outside:
        np.testing.assert_allclose(model(x, jnp.full(4, t)), toy(x, TIMES, CONTROL, None), rtol=1e-6, err_msg=str(t))


def test_guidance_interval_with_rows_at_different_times():
    model = guided(toy, CONTROL, scale=3.0, interval=(0.0, 0.3))
    out = model(normal(0), jnp.array([300, 301, 300, 301]))
    full, plain = guided(toy, CONTROL, scale=3.0)(normal(0), TIMES), toy(normal(0), TIMES, CONTROL, None)
    np.testing.assert_allclose(out, jnp.stack([full[0], plain[1], full[2], plain[3]]), rtol=1e-5, atol=1e-6)


def test_guided_sampling_equals_plain_sampling_where_it_must():
    process = PROCESS.respaced(8)
    run = lambda **options: jax.jit(
        lambda key: process.sample(guided(toy, CONTROL, **options), key, SHAPE))(jax.random.key(0))
    plain = run(scale=1.0)
    # Above the last step.
    np.testing.assert_allclose(run(scale=4.0, interval=(0.9991, 1.0)), plain, rtol=1e-5, atol=1e-5)
    assert jnp.abs(run(scale=4.0) - plain).max() > 0.1


def test_without_a_condition_there_is_nothing_to_guide():
    out = guided(
        lambda x, t, cond, drop: x if cond is None and drop is None else None, None, scale=4.0)(normal(0), TIMES)
    np.testing.assert_array_equal(out, normal(0))


# --- the edges ---

def test_to_uint8_cuts_off():
    x = jnp.array([-2.0, -1.0, -1 + 1.9 / 127.5, 0.0, 0.999, 1.0, 5.0])
    np.testing.assert_array_equal(to_uint8(x), np.array([0, 0, 2, 128, 255, 255, 255], np.uint8))


@pytest.mark.parametrize('call, word', [
    (lambda: GaussianDiffusion(variance='learned'), 'variance'),
    (lambda: GaussianDiffusion(beta_end=2.0), 'beta_end'),
    (lambda: PROCESS.respaced(1), 'num_steps'),
    (lambda: PROCESS.respaced(1001), 'num_steps'),
    (lambda: PROCESS.sample(lambda x, t: x, jax.random.key(0), SHAPE, sampler='euler'), 'sampler'),
    (lambda: PROCESS.sample(lambda x, t: x, jax.random.key(0), SHAPE), 'learn_sigma'),
    (lambda: PROCESS.sample(lambda x, t: x, jax.random.key(0), SHAPE, noise=jnp.zeros((1, 4, 4, 2))), 'noise'),
    (lambda: guided(toy, CONTROL, scale=2.0, interval=(0.6, 0.3)), 'interval'),
    (lambda: guided(toy, CONTROL, scale=2.0, channels=0), 'channels'),
])
def test_bad_input_is_one_line_that_names_it(call, word):
    with pytest.raises(ValueError, match=word) as error:
        call()
    assert '\n' not in str(error.value)
