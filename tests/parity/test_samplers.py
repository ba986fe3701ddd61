"""Samplers against the originals' maths, written out in float64 after the papers: same network, same noise.

DDPM and DDIM with guidance as openai/guided-diffusion and facebookresearch/DiT run them, whole chains; the rows of
SEDD's reverse steps from the rate matrix itself. LLaDA's step is in tests/dlc/test_text_to_code.py.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from dlc_jax.diffusion.discrete import DiscreteDiffusion
from dlc_jax.diffusion.gaussian import GaussianDiffusion, guided

# ---- Gaussian --------------------------------------------------------------------------------------------------------

SHAPE, STEPS, NULL = (2, 3, 3, 4), 10, 5
RNG = np.random.default_rng(0)
MIX, TABLE = RNG.normal(0, 0.5, (4, 4)), RNG.normal(size=(NULL + 1, 4))
CODES, KEY = np.array([1, 4]), jax.random.key(3)


def network(x, t, code, xp):
    """Noise and variance logits [..., 8], no two times, conditions or channels alike; `xp` is numpy or jax.numpy."""
    h = x @ MIX + xp.sin(t / 200)[:, None, None, None] + xp.asarray(TABLE)[code][:, None, None]
    return xp.concatenate([x + 0.3 * xp.tanh(h), 1.5 * xp.sin(2 * h)], -1)


def chain(first, noises, *, sampler, scale, channels=4, t_max=1000, eta=0.0, clip=False):
    """[B, H, W, 4] float64.

    Guided as the originals do it: images twice, once with the null, of which only the first half is read; `channels` of
    the noise are extrapolated, and the other channels and the variance logits are the conditional ones.
    """
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    kept = np.round(np.linspace(0, 999, STEPS)).astype(int)
    now, before = alphas_cumprod[kept], np.append(1.0, alphas_cumprod[kept[:-1]])
    betas = 1 - now / before
    true_variance = betas * (1 - before) / (1 - now)
    true_variance[0] = true_variance[1]  # it is 0, and its logarithm is needed
    batch = len(first)
    rest = np.random.default_rng(1)
    x = np.concatenate([first, first]).astype(np.float64)
    for i in reversed(range(STEPS)):
        codes = np.concatenate([CODES, np.full(batch, NULL)])
        out = network(np.concatenate([x[:batch]] * 2), np.full(2 * batch, kept[i]), codes, np)
        guide, other = out[..., :channels], out[..., channels:]
        if kept[i] <= t_max:
            half = guide[batch:] + scale * (guide[:batch] - guide[batch:])
            guide = np.concatenate([half, half])
        noise, logits = np.split(np.concatenate([guide, other], -1), 2, -1)
        x0 = (x - np.sqrt(1 - now[i]) * noise) / np.sqrt(now[i])
        if clip:
            x0 = np.clip(x0, -1, 1)
            noise = (x - np.sqrt(now[i]) * x0) / np.sqrt(1 - now[i])
        drawn = np.concatenate([noises[i], rest.normal(size=first.shape)])  # the second half's go nowhere
        if sampler == 'ddpm':
            mean = (np.sqrt(before[i]) * betas[i] * x0 + np.sqrt(1 - betas[i]) * (1 - before[i]) * x) / (1 - now[i])
            share = (logits + 1) / 2
            variance = np.exp(share * np.log(betas[i]) + (1 - share) * np.log(true_variance[i]))
            x = mean + (i > 0) * np.sqrt(variance) * drawn
        else:
            sigma = eta * np.sqrt((1 - before[i]) / (1 - now[i]) * (1 - now[i] / before[i]))
            x = np.sqrt(before[i]) * x0 + np.sqrt(1 - before[i] - sigma ** 2) * noise + sigma * drawn
    return x[:batch]


@pytest.mark.parametrize('options', [
    dict(sampler='ddpm', scale=1.0), dict(sampler='ddpm', scale=3.0), dict(sampler='ddpm', scale=3.0, channels=3),
    dict(sampler='ddpm', scale=3.0, t_max=444, clip=True), dict(sampler='ddim', scale=3.0),
    dict(sampler='ddim', scale=3.0, eta=0.7, channels=3), dict(sampler='ddim', scale=3.0, clip=True)], ids=str)
def test_chain_of_ten_guided_steps(options):
    process = GaussianDiffusion().respaced(STEPS)
    first_key, step_key = jax.random.split(KEY)
    first = np.asarray(jax.random.normal(first_key, SHAPE))
    noises = [np.asarray(jax.random.normal(jax.random.fold_in(step_key, i), SHAPE)) for i in range(STEPS)]
    want = chain(first, noises, **options)

    def predict(x, t, cond, drop):
        return network(x, t, cond if drop is None else jnp.where(drop, NULL, cond), jnp)

    model = guided(predict, jnp.asarray(CODES), scale=options['scale'], channels=options.get('channels'),
                   interval=(0.0, options.get('t_max', 1000) / 1000))
    got = jax.jit(lambda key: process.sample(
        model, key, SHAPE, sampler=options['sampler'], eta=options.get('eta', 0.0),
        clip_denoised=options.get('clip', False)))(KEY)
    assert 0.1 < want.std() < 10
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# ---- Discrete --------------------------------------------------------------------------------------------------------

V, L, T, DT = 6, 5, 0.4, 1 / 64


def sigma(noise, t):
    return -np.log(1 - (1 - 1e-3) * t) if noise == 'loglinear' else 1e-4 ** (1 - t) * 20.0 ** t


def rates(process):
    """[from, to], a row for each state."""
    if process == 'uniform':
        return np.full((V, V), 1 / V) - np.eye(V)
    matrix = -np.eye(V + 1)
    matrix[:, V] += 1
    return matrix


def tweedie(score, x, q, step):
    """(s exp(-step Q))_y exp(step Q)_{y x} (arXiv 2310.16834, eq. 19)."""
    return score @ expm(-step * q) * expm(step * q)[:, x]


def euler(score, x, q, step):
    row = score * q[:, x] * step
    row[x] = 0
    row[x] = 1 - row.sum()
    return row


def remasking(score, x, q, step, eta):
    """The step of `corrector` in lavoiems/DiscreteLatentCode; `step` reaches dt + eta (1 - t) back."""
    if x != V:
        return (1 - eta) * np.eye(V + 1)[x] + eta * np.eye(V + 1)[V]
    row = tweedie(score, x, q, step)
    moved = eta * (1 - row[V])
    best = row.argmax()
    row[best] -= moved * (best != V)
    row[V] += moved
    return row


@pytest.mark.parametrize('process, noise, sampler', [
    ('absorbing', 'loglinear', 'analytic'), ('absorbing', 'geometric', 'analytic'), ('absorbing', 'loglinear', 'euler'),
    ('absorbing', 'loglinear', 'remasking'), ('absorbing', 'loglinear', 'denoise'),
    ('uniform', 'loglinear', 'analytic'), ('uniform', 'geometric', 'euler')])
def test_rows_of_a_reverse_step(process, noise, sampler):
    d, rng, t, eta = DiscreteDiffusion(V, process=process, noise=noise), np.random.default_rng(0), T, 0.45
    x = rng.integers(0, d.num_states, (4, L))
    if process == 'absorbing':
        x[:2] = V
    dt, back = DT, DT
    if sampler == 'denoise':
        t = dt = back = 1e-5
    elif sampler == 'remasking':
        back += eta * (1 - t)
    log_score = rng.normal(size=(*x.shape, d.num_states))
    if process == 'absorbing':  # p / (e^sigma - 1), sharp enough that remasking meets tokens likelier than the mask
        log_score *= 2
        log_score -= np.log(np.exp(log_score[..., :V]).sum(-1, keepdims=True) * np.expm1(sigma(noise, t)))
    np.put_along_axis(log_score, x[..., None], 0.0, -1)
    log_score = log_score.astype(np.float32)
    step = sigma(noise, t) - sigma(noise, t - back)
    if sampler == 'euler':
        step = dt * (sigma(noise, t + 1e-6) - sigma(noise, t - 1e-6)) / 2e-6
    rule, extra = {'euler': (euler, ()), 'remasking': (remasking, (eta,))}.get(sampler, (tweedie, ()))
    want = np.array([[rule(np.exp(np.float64(s)), token, rates(process), step, *extra) for s, token in zip(*row)]
                     for row in zip(log_score, x)])
    if sampler == 'denoise':
        rows = d.transition_probs(log_score, jnp.asarray(x), d.final_time, d.final_time)
        got, want = rows[..., :V], want[..., :V]
    else:
        options = dict(eta=eta, parity=True) if sampler == 'remasking' else {}
        got = d.transition_probs(log_score, jnp.asarray(x), t, dt, sampler=sampler, **options)
    if sampler == 'remasking':
        taken = np.isclose(want[x == V].sum(-1), 1)  # else the mask's share was added to a row of 1
        assert taken.any() and not taken.all()
        want = np.maximum(want, 0)  # what is negative never wins the draw
    assert (want.max(-1) > 1e-3).all() and (want >= 0).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
