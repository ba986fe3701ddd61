"""LLaDA against a bidirectional LLaMA written out in PyTorch under the released names.

All tensors random, same tokens: outputs, gradients, and the weights both ways.
"""
import math

import chex
import jax
import numpy as np
import pytest

from dlc_jax import convert
from dlc_jax.convert import llada
from rlhf_jax.models.llama import SIZES, Llama
from rlhf_jax.weights.rules import param_shapes
from torch_twins import assert_outputs_and_gradients_equal, randomise, torch

nn, F = torch.nn, torch.nn.functional

TOLERANCE = dict(rtol=1e-4, atol=1e-4)
# The settings of GSAI-ML/LLaDA-8B-Base, at a tiny size and with fewer heads of key and value.
CONFIG = {
    'activation_type': 'silu', 'alibi': False, 'attention_layer_norm': False, 'bias_for_layer_norm': False,
    'block_group_size': 1, 'block_type': 'llama', 'd_model': 24, 'embedding_size': 64, 'include_bias': False,
    'include_qkv_bias': False, 'input_emb_norm': False, 'layer_norm_type': 'rms', 'layer_norm_with_affine': True,
    'mask_token_id': 50, 'max_sequence_length': 32, 'mlp_hidden_size': 40, 'mlp_ratio': 4, 'model_type': 'llada',
    'n_heads': 4, 'n_kv_heads': 2, 'n_layers': 3, 'rms_norm_eps': 1e-5, 'rope': True, 'rope_full_precision': True,
    'rope_theta': 500000.0, 'scale_logits': False, 'vocab_size': 71, 'weight_tying': False}
RELEASED = CONFIG | {'d_model': 4096, 'embedding_size': 126464, 'vocab_size': 126464, 'max_sequence_length': 4096,
                     'mlp_hidden_size': 12288, 'n_heads': 32, 'n_kv_heads': 32, 'n_layers': 32}
TOKENS = np.random.default_rng(0).integers(0, 71, (3, 9))


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG['rms_norm_eps']))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, self.head_dim = c['d_model'], c['d_model'] // c['n_heads']
        narrow = c['n_kv_heads'] * self.head_dim
        self.attn_norm, self.ff_norm = Norm(width), Norm(width)
        self.q_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(width, c['mlp_hidden_size'], bias=False) for _ in range(2))
        self.ff_out = nn.Linear(c['mlp_hidden_size'], width, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def rotate(self, x):
        half = self.head_dim // 2
        angle = torch.arange(x.shape[2])[:, None] * CONFIG['rope_theta'] ** (-torch.arange(half) / half)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x):
        h = self.attn_norm(x)
        q, k, v = (self.heads(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (self.rotate(k), v))
        h = F.scaled_dot_product_attention(self.rotate(q), k, v)  # no mask at all
        x = x + self.attn_out(h.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class TorchLLaDA(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.transformer = t = nn.Module()
        t.wte = nn.Embedding(c['vocab_size'], c['d_model'])
        t.blocks = nn.ModuleList(Block(c) for _ in range(c['n_layers']))
        t.ln_f = Norm(c['d_model'])
        if not c['weight_tying']:
            t.ff_out = nn.Linear(c['d_model'], c['vocab_size'], bias=False)

    def forward(self, tokens):
        t = self.model.transformer
        x = t.wte(tokens)
        for block in t.blocks:
            x = block(x)
        return F.linear(t.ln_f(x), t.ff_out.weight if hasattr(t, 'ff_out') else t.wte.weight)


STREAM = ('wte', 'attn_out', *(f'blocks.{i}.ff_out' for i in range(CONFIG['n_layers'])))


def torch_llada(**changes):
    model = randomise(TorchLLaDA(CONFIG | changes), faint=STREAM)
    if changes.get('weight_tying'):  # a head tied to so faint an embedding needs large features
        model.model.transformer.ln_f.weight.data *= 50
    return model


@pytest.fixture(scope='module')
def pair():
    """(torch model, module, params)."""
    original = torch_llada()
    return original, *convert.from_torch('llada', original.state_dict(), config=CONFIG)


def test_outputs_and_gradients(pair):
    original, module, params = pair
    assert set(convert.to_torch('llada', module, params)) == set(original.state_dict())
    assert_outputs_and_gradients_equal(
        lambda p: (module.apply({'params': p}, TOKENS),), params, lambda p: convert.to_torch('llada', module, p),
        original, (original(torch.tensor(TOKENS)),))


def test_weights_of_ours_in_the_original(pair):
    original, module, _ = pair
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32),
                          param_shapes(module, np.zeros((1, 1), np.int32)))
    model = TorchLLaDA(CONFIG)
    model.load_state_dict({name: torch.tensor(x) for name, x in convert.to_torch('llada', module, params).items()})
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).numpy()
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, TOKENS), want, **TOLERANCE)
    back = convert.from_torch('llada', model.state_dict(), config=CONFIG)[1]
    chex.assert_trees_all_equal(back, params)


def test_tied_weights():
    original = torch_llada(weight_tying=True)
    module, params = convert.from_torch('llada', original.state_dict(), config=CONFIG | {'weight_tying': True})
    assert 'lm_head' not in params and set(convert.to_torch('llada', module, params)) == set(original.state_dict())
    with torch.no_grad():
        want = original(torch.tensor(TOKENS)).numpy()
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, TOKENS), want, **TOLERANCE)


def test_size_is_that_of_the_tensors_and_the_config(pair):
    _, module, _ = pair
    assert module.vocab_size == 71  # not the embedding_size that the config kept from before tokens were added
    state_dict = {f'module.{name}': x for name, x in pair[0].state_dict().items()}
    assert convert.from_torch('llada', state_dict, config=llada.config_of(module))[0] == module


@pytest.mark.parametrize('fault, message', [
    (lambda d, name: d.pop(name), 'missing tensor'),
    (lambda d, name: d.update(extra=np.zeros(3, np.float32)), 'unknown tensor extra'),
    (lambda d, name: d.update({name: d[name][:-1]}), 'has shape'),
    (lambda d, name: d.update({name: torch.full_like(d[name], math.nan)}), 'not finite')])
def test_a_tensor_that_does_not_fit_is_named(pair, fault, message):
    broken = dict(pair[0].state_dict())
    name = 'model.transformer.blocks.1.up_proj.weight'
    fault(broken, name)
    with pytest.raises(ValueError, match=message) as error:
        convert.from_torch('llada', broken, config=CONFIG)
    assert message.startswith('unknown') or 'blocks.1.up_proj.weight' in str(error.value)


def test_a_setting_of_another_architecture_is_named(pair):
    with pytest.raises(ValueError, match="block_type='sequential'"):
        convert.from_torch('llada', pair[0].state_dict(), config=CONFIG | {'block_type': 'sequential'})
    with pytest.raises(ValueError, match='causal'):
        llada.config_of(pair[1].clone(causal=True))


def test_names_and_shapes_of_the_released_model():
    module = Llama(**SIZES['LLaDA-8B'])
    shapes = convert.tensor_shapes('llada', module)
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_015_581_184
    wide, block = (4096, 4096), 'model.transformer.blocks.{}.{}.weight'
    want = {'model.transformer.wte.weight': (126464, 4096), 'model.transformer.ff_out.weight': (126464, 4096),
            'model.transformer.ln_f.weight': (4096,)}
    for i in range(32):
        want |= {block.format(i, name): (4096,) for name in ('attn_norm', 'ff_norm')}
        want |= {block.format(i, name): wide for name in ('q_proj', 'k_proj', 'v_proj', 'attn_out')}
        want |= {block.format(i, name): (12288, 4096) for name in ('ff_proj', 'up_proj')}
        want |= {block.format(i, 'ff_out'): (4096, 12288)}
    assert shapes == want
    assert Llama(**llada.fields_of(RELEASED), vocab_size=126464) == module
