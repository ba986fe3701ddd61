"""DiT and its diffusion against the originals' own outputs (lavoiems/DiscreteLatentCode `dit/`), fp32 on CPU."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax import convert
from dlc_jax.diffusion.gaussian import GaussianDiffusion, guided
from dlc_jax.models import dit

TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


@pytest.fixture(scope='module')
def twin(golden):
    weights = {k.removeprefix('dit/param/'): v for k, v in golden.items() if k.startswith('dit/param/')}
    module, params = convert.from_torch('dit', weights, num_heads=4)
    return weights, module, params


@pytest.fixture(scope='module')
def predict(twin):
    _, module, params = twin
    return jax.jit(lambda x, t, cond, drop=None: module.apply({'params': params}, x, t, cond, drop=drop))


def test_the_module_is_read_off_the_tensors(twin):
    _, module, _ = twin
    assert (module.input_size, module.channels, module.patch_size, module.width, module.depth) == (8, 4, 2, 48, 2)
    assert (module.condition, module.num_codes, module.vocab_size, module.learn_sigma) == ('code', 6, 5, True)


def test_round_trip_is_exact(twin):
    weights, module, params = twin
    back = convert.to_torch('dit', module, params)
    assert set(back) == set(weights)
    for name in set(weights) - {'pos_embed'}:
        np.testing.assert_array_equal(back[name], weights[name], err_msg=name)
    np.testing.assert_allclose(back['pos_embed'], weights['pos_embed'], atol=1e-6)


def test_forward(golden, predict):
    out = predict(nhwc(golden['dit/in/x']), golden['dit/in/t'], golden['dit/in/y'])
    np.testing.assert_allclose(out, nhwc(golden['dit/out/eps_sigma']), **TOLERANCE)


def test_embedders(golden, twin):
    _, module, params = twin
    t_emb = dit.TimestepEmbedder(48).apply({'params': params['time_embed']}, golden['dit/in/t'])
    np.testing.assert_allclose(t_emb, golden['dit/out/t_emb'], **TOLERANCE)
    embed = dit.ConditionEmbedder('code', 48, 6, 5, 0, 0)
    run = lambda cond, drop=None: embed.apply({'params': params['cond_embed']}, cond, drop)
    np.testing.assert_allclose(run(golden['dit/in/y']), golden['dit/out/sem_emb'], **TOLERANCE)
    null = golden['dit/out/null_emb']
    np.testing.assert_allclose(run(np.full((1, 6), 5)), null, **TOLERANCE)
    np.testing.assert_allclose(run(golden['dit/in/y'][:1], np.array([True])), null, **TOLERANCE)


def test_guidance_on_all_channels(golden, predict):
    x, codes = nhwc(golden['dit/in/x'])[:2], jnp.asarray(golden['dit/in/y'][:2])
    out = guided(predict, codes, scale=3.0)(x, jnp.full(2, 300))
    want = nhwc(golden['dit/out/cfg3_t300'])  # [cond; null] rows, of which samplers use the first half
    np.testing.assert_allclose(out, want[:2], **TOLERANCE)


def test_training_loss_terms(golden, predict):
    codes = golden['dit/in/y']
    terms = GaussianDiffusion().losses(lambda x, t: predict(x, t, codes), nhwc(golden['dit/in/x0']), golden['dit/in/t'],
                                       nhwc(golden['dit/in/noise']))
    np.testing.assert_allclose(terms['mse'], golden['dit/out/train_mse'], rtol=1e-5)
    # Row 0 is at t = 0, the discretised NLL.
    np.testing.assert_allclose(terms['vb'], golden['dit/out/train_vb'], rtol=1e-4)
    np.testing.assert_allclose(terms['mse'] + terms['vb'], golden['dit/out/train_loss'], rtol=1e-5)


def test_respacing(golden):
    process = GaussianDiffusion().respaced(250)
    np.testing.assert_array_equal(process.timesteps, golden['dit/out/timestep_map_250'])
    np.testing.assert_allclose(process.betas, golden['dit/out/betas_250'], rtol=1e-12)


def test_posterior_of_the_respaced_process(golden, predict):
    process, index = GaussianDiffusion().respaced(250), jnp.asarray(golden['dit/in/t_idx250'])
    x = nhwc(golden['dit/in/x'])
    output = predict(x, jnp.asarray(process.timesteps)[index], golden['dit/in/y'])
    p = process.posterior(output, x, index)
    np.testing.assert_allclose(p.mean, nhwc(golden['dit/out/p250_mean']), **TOLERANCE)
    np.testing.assert_allclose(p.log_variance, nhwc(golden['dit/out/p250_log_variance']), **TOLERANCE)
    # At the last index x0 is the noise times 157: compare relative to that.
    np.testing.assert_allclose(p.x0, nhwc(golden['dit/out/p250_pred_xstart']), rtol=1e-4, atol=1e-3)


def test_position_embedding(golden):
    np.testing.assert_allclose(dit.sincos_position_embedding(16, 1152), golden['dit/out/sincos_16x16_1152'], atol=1e-6)


# Parameters at real size. The originals count their fixed position embedding (256 x 1152) as a parameter; it is none
# here.
POSITION = 256 * 1152


@pytest.mark.parametrize('fields, cond, published, counts_position', [
    (dict(condition='code', num_codes=512, vocab_size=256), ((512,), jnp.int32), 825_266_336, False),
    (dict(condition='code', num_codes=512, vocab_size=256), ((512,), jnp.int32), 825_561_248, True),
    (dict(condition='code', num_codes=128, vocab_size=1024), ((128,), jnp.int32), 825_118_880, True),
    (dict(condition='code', num_codes=32, vocab_size=4096), ((32,), jnp.int32), 825_008_288, True),
    (dict(condition='class', num_classes=1000), ((), jnp.int32), 675_129_632, True),
    (dict(condition='embedding', embedding_dim=1024), ((1024,), jnp.float32), 675_157_152, True),
    (dict(condition='none'), None, 673_976_480, True),
], ids=['L512 trainable', 'L512', 'L128', 'L32', 'class', 'embedding', 'backbone'])
def test_parameter_counts_of_xl_2(fields, cond, published, counts_position):
    module = dit.DiT(input_size=32, channels=4, patch_size=2, **dit.SIZES['XL'], **fields)
    spec = None if cond is None else jax.ShapeDtypeStruct((1, *cond[0]), cond[1])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32),
                            jax.ShapeDtypeStruct((1,), jnp.int32), spec)['params']
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert count + POSITION * counts_position == published
