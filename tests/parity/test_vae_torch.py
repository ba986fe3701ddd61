"""The autoencoder against `diffusers.AutoencoderKL`: all tensors random, outputs, gradients, the weights both ways."""
import chex
import numpy as np
import pytest

from dlc_jax import convert
from torch_twins import assert_outputs_and_gradients_equal, load, state_dict, torch

diffusers = pytest.importorskip('diffusers')

WIDTHS, DEPTH, GROUPS, LATENT = (8, 8, 16), 1, 4, 4


class Original(diffusers.AutoencoderKL):
    def forward(self, images, latents):
        """Mean and log-variance of the latents of `images`, and images of `latents`."""
        posterior = self.encode(images).latent_dist
        return posterior.mean, posterior.logvar, self.decode(latents).sample


def make():
    return Original(
        down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3, latent_channels=LATENT,
        block_out_channels=WIDTHS, layers_per_block=DEPTH, norm_num_groups=GROUPS)


def randomise(model):
    """Every tensor random, and large enough that a wrong epsilon, bias or order shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 else 1.5 * (p[0].numel()) ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1) * 0.5)
            if name == 'encoder.conv_in.bias':  # a nearly constant image meets the norm at a variance like its epsilon
                p *= 1e-3
    return model.eval()


RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (2, 12, 20, 3)).astype(np.float32) * np.float32([1, 1e-3])[:, None, None, None]
LATENTS = RNG.normal(0, 2, (2, 3, 5, LATENT)).astype(np.float32)


def run(model):
    """What it makes of the images and latents, NHWC."""
    out = model(*(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (IMAGES, LATENTS)))
    return tuple(x.permute(0, 2, 3, 1) for x in out)


def outputs_of(vae, params):
    encoded = vae.apply({'params': params}, IMAGES, method='encode')
    return *encoded, vae.apply({'params': params}, LATENTS, method='decode')


@pytest.fixture(scope='module')
def original():
    return randomise(make())


def test_outputs_gradients_and_weights_both_ways(original):
    vae, params = convert.from_torch('sd_vae', original.state_dict(), num_groups=GROUPS)
    assert (tuple(vae.widths), vae.depth, vae.latent_channels) == (WIDTHS, DEPTH, LATENT)
    assert_outputs_and_gradients_equal(
        lambda p: outputs_of(vae, p), params, lambda p: convert.to_torch('sd_vae', vae, p), original, run(original),
        invariant=('to_k.bias',))
    back, wanted = convert.to_torch('sd_vae', vae, params), state_dict(original)
    assert sorted(back) == sorted(wanted)
    for key in wanted:
        np.testing.assert_array_equal(back[key], wanted[key], err_msg=key)
    for got, want in zip(run(load(make(), back)), run(original)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_released_files_have_older_attention_names(original):
    names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    state = {}
    for name, tensor in original.state_dict().items():
        for new, old in names.items():
            name = name.replace(f'attentions.0.{new}.', f'attentions.0.{old}.')
        state[name] = tensor
    assert 'encoder.mid_block.attentions.0.proj_attn.weight' in state and not any('to_' in name for name in state)
    got, want = (convert.from_torch('sd_vae', x, num_groups=GROUPS)[1] for x in (state, original.state_dict()))
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('decoder.mid_block.attentions.0.to_v.bias'), 'decoder.mid_block.attentions.0.to_v.bias'),
    (lambda s: s.update({'encoder.extra.weight': torch.zeros(1)}), 'encoder.extra.weight'),
    (lambda s: s.update({'quant_conv.bias': torch.zeros(3)}), 'quant_conv.bias'),
    (lambda s: s.update({'quant_conv.bias': torch.full((8,), float('nan'))}), 'quant_conv.bias'),
    (lambda s: s.update({'encoder.mid_block.attentions.0.query.bias': torch.zeros(16)}),
     'are both encoder.mid_block.attentions.0.to_q.bias'),
])
def test_wrong_state_dicts_are_named(original, change, message):
    state = dict(original.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        convert.from_torch('sd_vae', state, num_groups=GROUPS)
