"""DINOv2 and the SEM encoder against PyTorch: the models of `transformers`, and a twin under the original's names.

All tensors random, same images, some patches masked: outputs, gradients, and the weights both ways.
"""
import copy

import jax
import numpy as np
import pytest

from dlc_jax import convert
from rlhf_jax.weights.files import load_state_dict, save_state_dict
from torch_twins import FAINT, assert_equal, assert_outputs_and_gradients_equal, load, randomise, state_dict, torch

F = torch.nn.functional
WIDTH, DEPTH, HEADS, PATCH, GRID = 16, 2, 2, 4, 5
STREAM = ('token', 'pos', 'patch_embed', 'gamma', 'lambda1')  # what writes to the residual stream
MASKS = np.random.default_rng(1).random((2, 15)) < 0.3


def images(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


def nchw(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


# A twin under the names of facebookresearch/dinov2.

class Attention(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // HEADS) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = -(-int(4 * width * 2 / 3) // 8) * 8
        self.w12, self.w3 = torch.nn.Linear(width, 2 * hidden), torch.nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(torch.nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(width, 1e-6), torch.nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = Attention(width), ffn(width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(torch.nn.Module):
    def __init__(self, registers, ffn=Mlp):
        super().__init__()
        parameter = lambda *shape: torch.nn.Parameter(torch.zeros(shape))
        self.cls_token, self.pos_embed = parameter(1, 1, WIDTH), parameter(1, 1 + GRID ** 2, WIDTH)
        self.mask_token = parameter(1, WIDTH)
        self.registers = registers
        if registers:
            self.register_tokens = parameter(1, registers, WIDTH)
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = torch.nn.ModuleList([Block(WIDTH, ffn) for _ in range(DEPTH)])
        self.norm = torch.nn.LayerNorm(WIDTH, 1e-6)

    def positions(self, rows, columns):
        patches = self.pos_embed[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        if (rows, columns) != (GRID, GRID):
            # Models with registers: to the wanted size, smoothed. Without: by a factor a little too large, as it is.
            how = dict(size=(rows, columns), antialias=True) if self.registers else dict(
                scale_factor=((rows + 0.1) / GRID, (columns + 0.1) / GRID))
            patches = F.interpolate(patches, mode='bicubic', **how)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    def tokens(self, x, masks):
        x = self.patch_embed.proj(x)
        rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(torch.from_numpy(masks)[..., None], self.mask_token[None], x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(rows, columns)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x, masks=None):
        """Normalised and bare tokens, these at unit size."""
        x = self.tokens(x, masks)
        return self.norm(x), x / FAINT


CODES, VOCAB, REGISTERS = 3, 5, 2


class SEM(ViT):
    def __init__(self, form):
        super().__init__(REGISTERS)
        self.form = form
        self.sem_embed = torch.nn.Linear((1 + REGISTERS) * WIDTH, CODES * VOCAB, bias=False)
        self.sem_norm = torch.nn.LayerNorm(CODES * VOCAB, 1e-6)  # over all of them together
        self.sem_out = torch.nn.Linear(CODES * VOCAB if form == 'plain' else VOCAB, WIDTH, bias=False)
        self.sem_cls_norm = torch.nn.LayerNorm(WIDTH, 1e-6)  # never used
        if form == 'pos_shared':
            self.sem_bias = torch.nn.Parameter(torch.zeros(CODES, WIDTH))

    def forward(self, x, masks=None, temperature=1.0):
        """Class token, registers and patches, normalised; logits and simplicial embedding [B, L, V]."""
        x = self.tokens(x, masks)
        logits = self.sem_norm(self.sem_embed(x[:, :1 + REGISTERS].flatten(1))).view(-1, CODES, VOCAB)
        sem = (logits / temperature).softmax(-1)
        if self.form == 'plain':
            out = self.sem_out(sem.flatten(1))
        else:
            out = self.sem_out(sem)
            out = (out + self.sem_bias if self.form == 'pos_shared' else out).mean(1)
        rest = self.norm(x[:, 1:])
        return self.norm(out), rest[:, :REGISTERS], rest[:, REGISTERS:], logits, sem


def outputs_of(module, params, x, masks=None):
    out = module.apply({'params': params}, x, masks)
    return jax.numpy.concatenate([out.cls[:, None], out.registers, out.patches], 1), out.prenorm / FAINT


@pytest.mark.parametrize('registers, ffn', [(2, Mlp), (0, Mlp), (2, SwiGLU)], ids=['registers', 'none', 'swiglu'])
def test_vision_transformer(registers, ffn):
    original = randomise(ViT(registers, ffn), faint=STREAM)
    module, params = convert.from_torch('dinov2', state_dict(original), num_heads=HEADS)
    x = images(12, 20)  # 3 x 5 patches, of the 5 x 5 stored
    assert_outputs_and_gradients_equal(
        lambda p: outputs_of(module, p, x, MASKS), params, lambda p: convert.to_torch('dinov2', module, p), original,
        original(nchw(x), MASKS))
    back = load(ViT(registers, ffn), convert.to_torch('dinov2', module, params))
    for got, want in zip(back(nchw(x)), original(nchw(x))):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize('form', ['plain', 'shared', 'pos_shared'])
def test_sem_encoder(form):
    original = randomise(SEM(form), faint=STREAM)
    module, params = convert.from_torch('sem', state_dict(original), num_codes=CODES, num_heads=HEADS, temperature=0.7)
    x = images(12, 20)

    def apply(params):
        out = module.apply({'params': params}, x, MASKS)
        return out.cls, out.registers, out.patches, out.logits, out.sem

    theirs = original(nchw(x), MASKS, temperature=0.7)
    assert_outputs_and_gradients_equal(apply, params, lambda p: convert.to_torch('sem', module, p), original, theirs,
                                       unused=('sem_cls_norm.weight', 'sem_cls_norm.bias'))
    back = load(SEM(form), convert.to_torch('sem', module, params))
    for got, want in zip(back(nchw(x), MASKS, 0.7), theirs):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


# `transformers`

HF_SIZE = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, patch_size=PATCH,
               image_size=GRID * PATCH, mlp_ratio=4, attn_implementation='eager')
HF_CASES = {  # class, its fields, image: without registers, theirs interpolates positions unlike the original
    'plain': ('Dinov2', {}, (20, 20)),
    'swiglu': ('Dinov2', dict(use_swiglu_ffn=True), (20, 20)),
    'registers': ('Dinov2WithRegisters', dict(num_register_tokens=REGISTERS), (12, 20)),
}


@pytest.mark.parametrize('case', HF_CASES)
def test_transformers(case, tmp_path):
    transformers = pytest.importorskip('transformers')
    family, fields, size = HF_CASES[case]
    cls = getattr(transformers, f'{family}Model')
    original = randomise(cls(getattr(transformers, f'{family}Config')(**HF_SIZE, **fields)), faint=STREAM)

    def file_names(tensors):
        """What it calls them in files, where versions 4 and 5 agree."""
        model = load(copy.deepcopy(original), state_dict(original) | tensors)
        model.save_pretrained(tmp_path / 'theirs')
        return load_state_dict(tmp_path / 'theirs')

    module, params = convert.from_torch('dinov2', file_names({}), num_heads=HEADS)
    x = images(*size)
    masks = np.random.default_rng(1).random((2, size[0] * size[1] // PATCH ** 2)) < 0.3
    export = lambda params: convert.to_torch('dinov2', module, params, hf=True)

    def run(model):
        out = model(nchw(x), bool_masked_pos=torch.from_numpy(masks), output_hidden_states=True)
        return out.last_hidden_state, out.hidden_states[-1] / FAINT

    assert_outputs_and_gradients_equal(lambda p: outputs_of(module, p, x, masks), params, export, original,
                                       run(original), invariant=('key.bias',), file_names=file_names)
    original.config.save_pretrained(tmp_path / 'ours')
    save_state_dict(tmp_path / 'ours' / 'model.safetensors', export(params))
    with torch.no_grad():
        assert_equal([o.detach().numpy() for o in run(original)], run(cls.from_pretrained(tmp_path / 'ours').eval()))
