"""SEDD against a PyTorch twin under the original's names: all tensors random, same tokens and noise."""
import jax
import numpy as np
import pytest

from dlc_jax import convert
from dlc_jax.models import sedd
from rlhf_jax.weights import files
from torch_twins import assert_outputs_and_gradients_equal, load, randomise, state_dict, torch

F = torch.nn.functional
LENGTH, VOCAB, WIDTH, DEPTH, HEADS, COND = 5, 7, 16, 2, 2, 12


class Norm(torch.nn.Module):
    """No bias, epsilon 1e-5."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, shift, scale):
        return F.layer_norm(x, (WIDTH,), self.weight, eps=1e-5) * (1 + scale[:, None]) + shift[:, None]


def rotate(x, inv_freq):
    """[B, L, H, D]: value i and value i + D/2 are a point, turned by position * inv_freq[i]."""
    angle = (torch.arange(x.shape[1])[:, None] * inv_freq)[:, None]
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.attn_qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attn_out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU('tanh'), torch.nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = torch.nn.Linear(COND, 6 * WIDTH)

    def forward(self, x, cond, inv_freq):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond).chunk(6, 1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in self.attn_qkv(self.norm1(x, shift_a, scale_a)).chunk(3, -1))
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, inv_freq), rotate(k, inv_freq), v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_a[:, None] * self.attn_out(attended)
        return x + gate_m[:, None] * self.mlp(self.norm2(x, shift_m, scale_m))


class Twin(torch.nn.Module):
    """The code models: `positions`; the text models: none, and their process masks or draws `uniform`ly."""

    def __init__(self, positions=True, shared=True, process='absorbing'):
        super().__init__()
        self.absorbing, states = process == 'absorbing', VOCAB + (process == 'absorbing')
        self.pos_embed = torch.nn.Parameter(torch.zeros(LENGTH, WIDTH)) if positions else None
        self.vocab_embed = torch.nn.Module()
        if shared:
            self.vocab_embed.embedding = torch.nn.Parameter(torch.zeros(states, WIDTH))
        else:
            self.vocab_embed.embedding_table = torch.nn.Parameter(torch.zeros(LENGTH, states, WIDTH))
        self.sigma_map = torch.nn.Module()
        self.sigma_map.mlp = torch.nn.Sequential(
            torch.nn.Linear(256, COND), torch.nn.SiLU(), torch.nn.Linear(COND, COND))
        self.rotary_emb = torch.nn.Module()
        half = WIDTH // HEADS // 2
        self.rotary_emb.register_buffer('inv_freq', 1e4 ** (-torch.arange(half) / half))
        self.blocks = torch.nn.ModuleList([Block() for _ in range(DEPTH)])
        self.output_layer = torch.nn.Module()
        self.output_layer.norm_final = Norm()
        self.output_layer.linear = torch.nn.Linear(WIDTH, states)
        self.output_layer.adaLN_modulation = torch.nn.Linear(COND, 2 * WIDTH)

    def forward(self, tokens, sigma):
        table, = self.vocab_embed.parameters()
        x = table[tokens] if table.ndim == 2 else table[torch.arange(LENGTH), tokens]
        x = x if self.pos_embed is None else x + self.pos_embed
        angle = sigma[:, None] * 1e4 ** (-torch.arange(128) / 128)
        cond = F.silu(self.sigma_map.mlp(torch.cat([angle.cos(), angle.sin()], 1)))
        for block in self.blocks:
            x = block(x, cond, self.rotary_emb.inv_freq)
        out = self.output_layer
        scores = out.linear(out.norm_final(x, *out.adaLN_modulation(cond).chunk(2, 1)))
        if self.absorbing:
            scores = scores - (sigma.expm1().log() + np.log(VOCAB))[:, None, None]
        return scores.scatter(-1, tokens[..., None], 0.0)


SIGMA = np.float32([1e-3, 0.7, 6.9])


@pytest.mark.parametrize('fields', [
    dict(), dict(shared=False), dict(positions=False), dict(positions=False, process='uniform')],
    ids=['codes', 'a table a position', 'text', 'uniform'])
def test_sedd(fields):
    original = randomise(Twin(**fields), faint=('embed',))
    process = fields.get('process', 'absorbing')
    net, params = convert.from_torch('sedd', state_dict(original), num_heads=HEADS, length=LENGTH, process=process)
    tokens = np.random.default_rng(0).integers(0, net.num_states, (3, LENGTH))
    theirs = original(torch.from_numpy(tokens), torch.from_numpy(SIGMA))
    assert_outputs_and_gradients_equal(
        lambda p: (net.apply({'params': p}, tokens, SIGMA),), params, lambda p: convert.to_torch('sedd', net, p),
        original, (theirs,))
    back = load(Twin(**fields), convert.to_torch('sedd', net, params))
    torch.testing.assert_close(back(torch.from_numpy(tokens), torch.from_numpy(SIGMA)), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('size, length, vocab, published', [
    ('small', 512, 256, 93_168_897), ('small', 128, 1024, 94_054_401), ('small', 32, 4096, 98_702_337),
    ('medium', 512, 256, 322_549_249), ('medium', 128, 1024, 323_729_665), ('medium', 32, 4096, 329_925_889)])
def test_parameter_counts(size, length, vocab, published):
    net = sedd.SEDD(vocab_size=vocab, length=length, **sedd.SIZES[size])
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, length), np.int32),
                            jax.ShapeDtypeStruct((1,), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published


def test_a_training_checkpoint_gives_the_average(tmp_path):
    """As the original saves it: the average is a list without names, in the order of the parameters."""
    model, path = randomise(Twin()), tmp_path / 'checkpoint.pth'
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    weights = state_dict(model)
    shadow = [p.detach() + i + 1 for i, p in enumerate(model.parameters())]
    saved = {'optimizer': optimizer.state_dict(), 'model': model.state_dict(), 'step': 1,
             'ema': {'decay': 0.9999, 'num_updates': 1, 'shadow_params': shadow}}
    torch.save(saved, path)
    offsets = {name: i + 1 for i, (name, _) in enumerate(model.named_parameters())}
    assert set(weights) - set(offsets) == {'rotary_emb.inv_freq'}  # a buffer between the parameters
    for key, scale in ((None, 1), ('ema', 1), ('model', 0)):
        read = files.load_state_dict(path, key=key)
        for name, want in weights.items():
            np.testing.assert_allclose(read[name], want + scale * offsets.get(name, 0), atol=1e-6, err_msg=name)

    torch.save(saved | {'ema': {'shadow_params': shadow + shadow[:1]}}, path)
    with pytest.raises(ValueError, match='1 of the .* tensors of ema.shadow_params fit none'):
        files.load_state_dict(path)
