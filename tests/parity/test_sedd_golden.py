"""SEDD and its process against the authors' modules: same weights, same inputs, float32."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax import convert
from dlc_jax.diffusion.discrete import DiscreteDiffusion

TOLERANCE = dict(rtol=1e-4, atol=1e-4)
DIFFUSION = DiscreteDiffusion(vocab_size=7)


@pytest.fixture(scope='module')
def sedd(golden):
    """{name below 'sedd/': array}."""
    return {name.removeprefix('sedd/'): array for name, array in golden.items() if name.startswith('sedd/')}


@pytest.fixture(scope='module')
def state_dict(sedd):
    return {name.removeprefix('param/'): array for name, array in sedd.items() if name.startswith('param/')}


@pytest.fixture(scope='module')
def score(state_dict, sedd):
    """t -> log-scores of the corrupted codes at that time."""
    module, params = convert.from_torch('sedd', state_dict, num_heads=4)
    xt = jnp.asarray(sedd['in/xt'], jnp.int32)
    apply = jax.jit(lambda sigma: module.apply({'params': params}, xt, jnp.broadcast_to(sigma, xt.shape[:1])))
    return lambda t: apply(DIFFUSION.sigma(t) * jnp.ones(3))


def test_weights_round_trip_exactly(state_dict):
    module, params = convert.from_torch('sedd', state_dict, num_heads=4)
    back = convert.to_torch('sedd', module, params)
    assert set(back) == set(state_dict)
    for name in state_dict:
        if name == 'rotary_emb.inv_freq':  # recomputed
            np.testing.assert_allclose(back[name], state_dict[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(back[name], state_dict[name], err_msg=name)


def test_size_is_read_from_the_tensors(state_dict):
    module, _ = convert.from_torch('sedd', state_dict, num_heads=4)
    assert (module.vocab_size, module.length, module.width, module.depth) == (7, 6, 32, 2)
    assert (module.cond_dim, module.mlp_ratio) == (128, 4)


def test_text_models_have_no_position_embedding(state_dict, sedd):
    text = {name: array for name, array in state_dict.items() if name != 'pos_embed'}
    module, params = convert.from_torch('sedd', text, num_heads=4, length=6)
    assert not module.learned_positions and 'pos_embed' not in params
    assert set(convert.to_torch('sedd', module, params)) == set(text)
    out = jax.jit(module.apply)({'params': params}, jnp.asarray(sedd['in/xt'], jnp.int32), jnp.ones(3))
    assert out.shape == (3, 6, 8) and bool(jnp.isfinite(out).all())


def test_a_table_for_each_position(state_dict):
    unshared = dict(state_dict)
    unshared['vocab_embed.embedding_table'] = np.repeat(unshared.pop('vocab_embed.embedding')[None], 6, 0)
    module, params = convert.from_torch('sedd', unshared, num_heads=4)
    assert not module.shared_embedding and params['embed_by_position'].shape == (6, 8, 32)
    shared, shared_params = convert.from_torch('sedd', state_dict, num_heads=4)
    x, sigma = jnp.array([[0, 7, 3, 6, 7, 1]]), jnp.array([0.7])
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, x, sigma),
                               jax.jit(shared.apply)({'params': shared_params}, x, sigma), atol=1e-6)


@pytest.mark.parametrize('fault, message', [
    (lambda d: d.pop('blocks.1.norm2.weight'), 'blocks.1.norm2.weight'),
    (lambda d: d.update(extra=np.zeros(3, np.float32)), 'extra'),
    (lambda d: d.update({'pos_embed': np.full((6, 32), np.nan, np.float32)}), 'pos_embed'),
    (lambda d: d.update({'rotary_emb.inv_freq': np.ones(4, np.float32)}), 'rotary_emb.inv_freq'),
])
def test_a_tensor_that_does_not_fit_is_named(state_dict, fault, message):
    broken = dict(state_dict)
    fault(broken)
    with pytest.raises(ValueError, match=message):
        convert.from_torch('sedd', broken, num_heads=4)


def test_noise(sedd):
    np.testing.assert_allclose(DIFFUSION.sigma(sedd['in/t']), sedd['out/sigma'], rtol=1e-5)
    np.testing.assert_allclose(DIFFUSION.dsigma(sedd['in/t']), sedd['out/dsigma'], rtol=1e-5)


def test_log_score(score, sedd):
    np.testing.assert_allclose(score(sedd['in/t']), sedd['out/log_score'], **TOLERANCE)


def test_score_entropy_and_loss(score, sedd):
    log_score, t = score(sedd['in/t']), jnp.asarray(sedd['in/t'])
    xt, x0 = jnp.asarray(sedd['in/xt']), jnp.asarray(sedd['in/x0'])
    entropy = DIFFUSION.score_entropy(log_score, xt, x0, DIFFUSION.sigma(t))
    np.testing.assert_allclose(entropy, sedd['out/score_entropy'], **TOLERANCE)
    np.testing.assert_allclose(DIFFUSION.example_loss(log_score, xt, x0, t), sedd['out/loss_per_example'], **TOLERANCE)


def test_analytic_step(score, sedd):
    got = DIFFUSION.transition_probs(score(0.4), jnp.asarray(sedd['in/xt']), 0.4, 1 / 64)
    np.testing.assert_allclose(got, sedd['out/tweedie_probs_t0.4_dt1_64'], rtol=1e-4, atol=1e-6)


def test_remasking_step_with_parity(score, sedd):
    options = dict(sampler='remasking', eta=0.01, parity=True)
    got = DIFFUSION.transition_probs(score(0.4), jnp.asarray(sedd['in/xt']), 0.4, 1 / 64, **options)
    np.testing.assert_allclose(got, sedd['out/corrector_probs_t0.4_dt1_64_eta0.01'], rtol=1e-4, atol=1e-6)


def test_clean_remasking_step_differs_from_it_by_the_mass_added_to_the_mask(score, sedd):
    x, want = jnp.asarray(sedd['in/xt']), sedd['out/corrector_probs_t0.4_dt1_64_eta0.01']
    got = np.asarray(DIFFUSION.transition_probs(score(0.4), x, 0.4, 1 / 64, sampler='remasking', eta=0.01))
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(got[..., :7], want[..., :7], rtol=3e-3, atol=1e-6)
    assert (want.sum(-1)[np.asarray(x) == 7] > 1.0001).all()


def test_euler_step(score, sedd):
    x = jnp.asarray(sedd['in/xt'])
    got = DIFFUSION.transition_probs(score(0.4), x, 0.4, 1 / 64, sampler='euler')
    got = got - np.eye(8)[np.asarray(x)]
    np.testing.assert_allclose(got, sedd['out/euler_revrate_t0.4_dt1_64'], rtol=1e-4, atol=1e-6)


def test_denoising_step(score, sedd):
    got = DIFFUSION.transition_probs(score(1e-5), jnp.asarray(sedd['in/xt']), 1e-5, 1e-5)[..., :DIFFUSION.vocab_size]
    want = sedd['out/denoiser_probs_t1e-5']
    # The original takes 1 - exp(-1e-5) in float32, 0.24 % off: a factor common to a row, without effect on the draw.
    np.testing.assert_allclose(got, want, rtol=3e-3, atol=1e-6)
    got, want = (p / p.sum(-1, keepdims=True) for p in (got, want))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
