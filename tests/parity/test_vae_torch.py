"""The autoencoder against a PyTorch twin with random weights, and against diffusers where it is installed."""
import jax
import numpy as np
import pytest

from dlc_jax import convert

torch = pytest.importorskip('torch')
F = torch.nn.functional

WIDTHS, DEPTH, GROUPS, LATENT = (8, 8, 16), 1, 4, 4


class Resnet(torch.nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.GroupNorm(GROUPS, inputs, 1e-6), torch.nn.GroupNorm(GROUPS, width, 1e-6)
        self.conv1 = torch.nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1)
        if inputs != width:
            self.conv_shortcut = torch.nn.Conv2d(inputs, width, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, 'conv_shortcut') else x)


class Attention(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.group_norm = torch.nn.GroupNorm(GROUPS, width, 1e-6)
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(width, width) for _ in range(3))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(width, width)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        scores = self.to_q(tokens) @ self.to_k(tokens).transpose(1, 2) / x.shape[1] ** 0.5
        out = self.to_out[0](scores.softmax(-1) @ self.to_v(tokens))
        return x + out.transpose(1, 2).reshape(x.shape)


def module(**parts):
    out = torch.nn.Module()
    for name, part in parts.items():
        setattr(out, name, torch.nn.ModuleList(part) if isinstance(part, list) else part)
    return out


class Tower(torch.nn.Module):
    def __init__(self, inputs, outputs, widths, depth, way):
        super().__init__()
        self.way = way
        middle = widths[0] if way == 'up' else widths[-1]
        self.conv_in = torch.nn.Conv2d(inputs, widths[0], 3, padding=1)
        blocks, before = [], widths[0]
        for i, width in enumerate(widths):
            block = module(resnets=[Resnet(width if j else before, width) for j in range(depth)])
            if i < len(widths) - 1:
                kw = dict(padding=1) if way == 'up' else dict(stride=2)
                sampler = module(conv=torch.nn.Conv2d(width, width, 3, **kw))
                setattr(block, f'{way}samplers', torch.nn.ModuleList([sampler]))
            blocks.append(block)
            before = width
        setattr(self, f'{way}_blocks', torch.nn.ModuleList(blocks))
        self.mid_block = module(resnets=[Resnet(middle, middle), Resnet(middle, middle)],
                                attentions=[Attention(middle)])
        self.conv_norm_out = torch.nn.GroupNorm(GROUPS, before, 1e-6)
        self.conv_out = torch.nn.Conv2d(before, outputs, 3, padding=1)

    def middle(self, x):
        return self.mid_block.resnets[1](self.mid_block.attentions[0](self.mid_block.resnets[0](x)))

    def forward(self, x):
        x = self.conv_in(x)
        x = self.middle(x) if self.way == 'up' else x
        for block in getattr(self, f'{self.way}_blocks'):
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, 'downsamplers'):
                x = block.downsamplers[0].conv(F.pad(x, (0, 1, 0, 1)))
            if hasattr(block, 'upsamplers'):
                x = block.upsamplers[0].conv(F.interpolate(x, scale_factor=2, mode='nearest'))
        x = x if self.way == 'up' else self.middle(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Twin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Tower(3, 2 * LATENT, WIDTHS, DEPTH, 'down')
        self.decoder = Tower(LATENT, 3, WIDTHS[::-1], DEPTH + 1, 'up')
        self.quant_conv = torch.nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.post_quant_conv = torch.nn.Conv2d(LATENT, LATENT, 1)

    def encode(self, x):
        return self.quant_conv(self.encoder(x)).chunk(2, 1)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


def randomise(model, seed=0):
    """Every tensor random, and large enough that a wrong epsilon, bias or order shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.ndim == 1 else 1.5 * (p[0].numel()) ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1) * 0.5)
    return model.eval()


def nhwc(x):
    return np.asarray(x.detach()).transpose(0, 2, 3, 1)


@pytest.fixture(scope='module')
def twin():
    model = randomise(Twin())
    with torch.no_grad():  # the nearly constant image then meets the first norm at a variance like its epsilon
        model.encoder.conv_in.bias *= 1e-3
    return model


@pytest.fixture(scope='module')
def inputs():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 3, 12, 20)).astype(np.float32)
    images[1] *= 1e-3
    return torch.from_numpy(images), torch.from_numpy(rng.normal(0, 2, (2, LATENT, 3, 5)).astype(np.float32))


@pytest.fixture(scope='module')
def converted(twin):
    vae, params = convert.from_torch('sd_vae', twin.state_dict(), num_groups=GROUPS)
    encode = jax.jit(lambda p, x: vae.apply({'params': p}, x, method='encode'))
    decode = jax.jit(lambda p, z: vae.apply({'params': p}, z, method='decode'))
    return vae, params, encode, decode


def assert_equal(outputs, encode, decode, params, images, latents):
    mean, logvar, decoded = map(nhwc, outputs)
    got_mean, got_logvar = encode(params, nhwc(images))
    np.testing.assert_allclose(got_mean, mean, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(got_logvar, np.clip(logvar, -30, 20), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(decode(params, nhwc(latents)), decoded, atol=1e-4, rtol=1e-4)


def test_equals_the_twin(twin, converted, inputs):
    vae, params, encode, decode = converted
    assert (tuple(vae.widths), vae.depth, vae.latent_channels) == (WIDTHS, DEPTH, LATENT)
    assert_equal((*twin.encode(inputs[0]), twin.decode(inputs[1])), encode, decode, params, *inputs)


def test_round_trip_is_exact_and_loads_back(twin, converted, inputs):
    vae, params, _, _ = converted
    back = convert.to_torch('sd_vae', vae, params)
    state = twin.state_dict()
    assert sorted(back) == sorted(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)
    other = Twin()
    other.load_state_dict({name: torch.from_numpy(x) for name, x in back.items()})
    torch.testing.assert_close(other.decode(inputs[1]), twin.decode(inputs[1]))


def test_flax_weights_run_in_the_twin(converted, inputs):
    vae, params, encode, decode = converted
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    params = tree.unflatten([(x + rng.normal(0, 0.02, x.shape)).astype(np.float32) for x in leaves])
    other = Twin().eval()
    other.load_state_dict({name: torch.from_numpy(x) for name, x in convert.to_torch('sd_vae', vae, params).items()})
    assert_equal((*other.encode(inputs[0]), other.decode(inputs[1])), encode, decode, params, *inputs)


def test_released_files_have_older_attention_names(twin, converted):
    names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    state = {}
    for name, tensor in twin.state_dict().items():
        for new, old in names.items():
            name = name.replace(f'attentions.0.{new}.', f'attentions.0.{old}.')
        state[name] = tensor
    assert 'encoder.mid_block.attentions.0.proj_attn.weight' in state and not any('to_' in name for name in state)
    params = convert.from_torch('sd_vae', state, num_groups=GROUPS)[1]
    jax.tree.map(np.testing.assert_array_equal, params, converted[1])


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('decoder.mid_block.attentions.0.to_v.bias'), 'decoder.mid_block.attentions.0.to_v.bias'),
    (lambda s: s.update({'encoder.extra.weight': torch.zeros(1)}), 'encoder.extra.weight'),
    (lambda s: s.update({'quant_conv.bias': torch.zeros(3)}), 'quant_conv.bias'),
    (lambda s: s.update({'quant_conv.bias': torch.full((8,), float('nan'))}), 'quant_conv.bias'),
    (lambda s: s.update({'encoder.mid_block.attentions.0.query.bias': torch.zeros(16)}),
     'are both encoder.mid_block.attentions.0.to_q.bias'),
])
def test_wrong_state_dicts_are_named(twin, change, message):
    state = dict(twin.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        convert.from_torch('sd_vae', state, num_groups=GROUPS)


def test_equals_diffusers(converted, inputs):
    diffusers = pytest.importorskip('diffusers')
    oracle = randomise(diffusers.AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3, latent_channels=LATENT,
        block_out_channels=WIDTHS, layers_per_block=DEPTH, norm_num_groups=GROUPS), seed=2)
    params = convert.from_torch('sd_vae', oracle.state_dict(), num_groups=GROUPS)[1]
    posterior = oracle.encode(inputs[0]).latent_dist
    assert_equal((posterior.mean, posterior.logvar, oracle.decode(inputs[1]).sample), *converted[2:], params, *inputs)
    twin = Twin()
    twin.load_state_dict(oracle.state_dict())  # the twin above has the names and shapes of the original
