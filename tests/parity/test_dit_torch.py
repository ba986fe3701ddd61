"""DiT with each of its conditions against a PyTorch twin under the original's names: all tensors random, same input."""
import jax
import numpy as np
import pytest

from dlc_jax import convert
from torch_twins import assert_outputs_and_gradients_equal, load, randomise, state_dict, torch

F = torch.nn.functional
SIDE, CHANNELS, PATCH, WIDTH, DEPTH, HEADS = 6, 4, 2, 16, 2, 2  # a patch has as many numbers as the width
CODES, VOCAB, CLASSES, DIM = 3, 5, 4, 6


def module(**parts):
    out = torch.nn.Module()
    for name, part in parts.items():
        setattr(out, name, part)
    return out


def frequencies(half):
    return torch.exp(-np.log(1e4) * torch.arange(half, dtype=torch.float64) / half)


def position(grid):
    """Half of the channels for the column, then half for the row, each its sines and then its cosines."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing='ij')
    angles = [axis.flatten()[:, None] * frequencies(WIDTH // 4) for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)[None].float()


def norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def adaln(parts):
    return torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(WIDTH, parts * WIDTH))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = module(qkv=torch.nn.Linear(WIDTH, 3 * WIDTH), proj=torch.nn.Linear(WIDTH, WIDTH))
        self.mlp = module(fc1=torch.nn.Linear(WIDTH, 4 * WIDTH), fc2=torch.nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = adaln(6)

    def forward(self, x, cond):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond).chunk(6, 1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for y in self.attn.qkv(norm(x, shift_a, scale_a)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_a[:, None] * self.attn.proj(attended)
        hidden = F.gelu(self.mlp.fc1(norm(x, shift_m, scale_m)), approximate='tanh')
        return x + gate_m[:, None] * self.mlp.fc2(hidden)


class Twin(torch.nn.Module):
    def __init__(self, condition, learn_sigma=True):
        super().__init__()
        self.condition, grid = condition, SIDE // PATCH
        self.outputs = CHANNELS * (2 if learn_sigma else 1)
        self.pos_embed = torch.nn.Parameter(position(grid), requires_grad=False)
        self.x_embedder = module(proj=torch.nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH))
        self.t_embedder = module(mlp=torch.nn.Sequential(
            torch.nn.Linear(256, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH)))
        if condition in ('code', 'soft code'):
            self.sem_embedder = module(embedding_table=torch.nn.Parameter(torch.zeros(CODES, VOCAB + 1, WIDTH)))
        elif condition == 'class':
            self.y_embedder = module(embedding_table=torch.nn.Embedding(CLASSES + 1, WIDTH))
        elif condition == 'embedding':
            self.y_embedder = module(embedding_table=torch.nn.Linear(DIM, WIDTH, bias=False),
                                     fake_latent=torch.nn.Parameter(torch.zeros(1, DIM)))
        self.blocks = torch.nn.ModuleList([Block() for _ in range(DEPTH)])
        self.final_layer = module(linear=torch.nn.Linear(WIDTH, PATCH ** 2 * self.outputs), adaLN_modulation=adaln(2))

    def embed(self, cond, drop):
        if self.condition == 'class':
            return self.y_embedder.embedding_table(torch.where(drop, CLASSES, cond))
        if self.condition == 'embedding':
            return self.y_embedder.embedding_table(torch.where(drop[:, None], self.y_embedder.fake_latent, cond))
        table = self.sem_embedder.embedding_table
        if self.condition == 'code':
            one_hot = F.one_hot(torch.where(drop[:, None], VOCAB, cond), VOCAB + 1).float()
        else:
            one_hot = torch.where(drop[:, None, None], F.one_hot(torch.tensor(VOCAB), VOCAB + 1), F.pad(cond, (0, 1)))
        return sum(one_hot[:, i] @ table[i] for i in range(CODES)) / CODES

    def forward(self, x, t, cond, drop):
        """[B, C, H, W], [B] -> [B, H, W, C or 2 C]."""
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        angle = t[:, None].float() * frequencies(128).float()
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1))
        if self.condition != 'none':
            c = c + self.embed(cond, drop)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, 1)
        x = self.final_layer.linear(norm(x, shift, scale))
        grid = SIDE // PATCH
        x = x.view(len(x), grid, grid, PATCH, PATCH, self.outputs)
        return torch.einsum('nhwpqc->nhpwqc', x).reshape(len(x), SIDE, SIDE, self.outputs)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, SIDE, SIDE, CHANNELS)).astype(np.float32)
T = np.array([3, 500, 999])
DROP = np.array([False, True, False])
CONDITIONS = {
    'code': RNG.integers(0, VOCAB, (3, CODES)),
    'soft code': RNG.dirichlet(np.ones(VOCAB), (3, CODES)).astype(np.float32),
    'class': np.array([0, 3, 1]),
    'embedding': RNG.normal(size=(3, DIM)).astype(np.float32),
    'none': None,
}


def faint_image(original):
    """[C, H, W] whose patches cancel their positions but for 0.03: only so does the norms' epsilon show."""
    conv, grid = original.x_embedder.proj, SIDE // PATCH
    wanted = 0.03 * torch.from_numpy(RNG.normal(size=(grid ** 2, WIDTH))) - original.pos_embed[0] - conv.bias
    patches = torch.linalg.solve(conv.weight.flatten(1).double(), wanted.double().T).float()
    return F.fold(patches, SIDE, PATCH, stride=PATCH)


@pytest.mark.parametrize('condition', CONDITIONS)
def test_dit(condition):
    learn_sigma, cond = condition != 'class', CONDITIONS[condition]
    original = randomise(Twin(condition, learn_sigma))
    net, params = convert.from_torch('dit', state_dict(original), num_heads=HEADS)
    with torch.no_grad():
        x = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
        x[2] = faint_image(original)
    assert net.condition == condition.removeprefix('soft ') and net.learn_sigma == learn_sigma
    tensors = [x, *(None if a is None else torch.from_numpy(a) for a in (T, cond, DROP))]
    theirs = original(*tensors)
    x = x.permute(0, 2, 3, 1).numpy()
    drop = None if cond is None else DROP
    cond = None if cond is None else jax.numpy.asarray(cond)
    assert_outputs_and_gradients_equal(
        lambda p: (net.apply({'params': p}, x, T, cond, drop=drop),), params,
        lambda p: convert.to_torch('dit', net, p), original, (theirs,))
    back = load(Twin(condition, learn_sigma), convert.to_torch('dit', net, params))
    torch.testing.assert_close(back(*tensors), theirs, rtol=1e-6, atol=1e-6)  # the positions are made anew
