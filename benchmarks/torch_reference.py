"""DiT, SEDD and their samplers and losses in plain PyTorch: what `benchmarks/dlc.py` measures against.

The same maths as `dlc_jax`, under the parameter names of the originals (so `dlc_jax.convert` moves the weights),
written for speed as one would in PyTorch: fused layer norm and SDPA, `torch.compile`-able, no checkpointing.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def sinusoidal(t, dim=256, max_period=10000.0):
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], -1)


def modulate(x, shift, scale):
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Attention(nn.Module):
    def __init__(self, width, num_heads, bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width, hidden, approximate='tanh'):
        super().__init__()
        self.fc1, self.fc2, self.approximate = nn.Linear(width, hidden), nn.Linear(hidden, width), approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


# ---- DiT -------------------------------------------------------------------------------------------------------------


class DiTBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(norm(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m[:, None], self.mlp(modulate(norm(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class DiT(nn.Module):
    """Code-conditioned; images NHWC, as in `dlc_jax`."""

    def __init__(self, *, input_size, channels, patch_size, width, depth, num_heads, num_codes, vocab_size):
        super().__init__()
        self.grid, self.patch, self.vocab = input_size // patch_size, patch_size, vocab_size
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, width), requires_grad=False)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch_size, patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.sem_embedder = nn.Module()
        self.sem_embedder.embedding_table = nn.Parameter(torch.zeros(num_codes, vocab_size + 1, width))
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size ** 2 * 2 * channels)
        self.register_buffer('positions', torch.arange(num_codes), persistent=False)

    def forward(self, x, t, codes, drop=None):
        """x [B, S, S, C], t [B], codes [B, L], drop [B] bool or None -> [B, S, S, 2C] float32."""
        h = self.x_embedder.proj(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        h = h + self.pos_embed.to(h.dtype)  # what runs between blocks is in the compute dtype, as in `dlc_jax`
        if drop is not None:
            codes = torch.where(drop[:, None], self.vocab, codes)
        table = self.sem_embedder.embedding_table
        # One flat lookup: index_select and its scatter-add are the fast pair of forward and backward.
        flat = (self.positions * (self.vocab + 1) + codes).reshape(-1)
        rows = F.embedding(flat, table.reshape(-1, table.shape[-1])).view(*codes.shape, -1)
        c = self.t_embedder.mlp(sinusoidal(t))
        c = c + rows.mean(1).to(c.dtype)
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c)
        b, g, p = h.shape[0], self.grid, self.patch
        return h.view(b, g, g, p, p, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, g * p, g * p, -1).float()


# ---- Gaussian diffusion ----------------------------------------------------------------------------------------------


class GaussianDiffusion:
    """Linear schedule, learned variance, kept `steps`; tables as `dlc_jax.diffusion.gaussian` has them."""

    def __init__(self, steps, device):
        betas = np.linspace(1e-4, 0.02, 1000)
        kept = np.cumprod(1 - betas)[np.asarray(steps)]
        previous = np.append(1.0, kept[:-1])
        betas = 1 - kept / previous
        variance = betas * (1 - previous) / (1 - kept)
        table = lambda x: torch.tensor(x, dtype=torch.float32, device=device)
        self.timesteps = torch.tensor(steps, device=device)
        self.signal, self.noise = table(np.sqrt(kept)), table(np.sqrt(1 - kept))
        self.from_x, self.from_noise = table(np.sqrt(1 / kept)), table(np.sqrt(1 / kept - 1))
        self.log_betas, self.log_variance = table(np.log(betas)), table(np.log(np.append(variance[1], variance[1:])))
        self.mean_x0 = table(betas * np.sqrt(previous) / (1 - kept))
        self.mean_xt = table((1 - previous) * np.sqrt(1 - betas) / (1 - kept))

    def posterior(self, noise, logits, x, index):
        at = lambda table: table[index].view(-1, 1, 1, 1)
        share = (logits + 1) / 2
        x0 = at(self.from_x) * x - at(self.from_noise) * noise
        return (at(self.mean_x0) * x0 + at(self.mean_xt) * x,
                share * at(self.log_betas) + (1 - share) * at(self.log_variance))

    def loss(self, model, x0, index, noise, codes, drop=None):
        at = lambda table: table[index].view(-1, 1, 1, 1)
        xt = at(self.signal) * x0 + at(self.noise) * noise
        predicted, logits = model(xt, self.timesteps[index], codes, drop).chunk(2, -1)
        mean, log_variance = self.posterior(predicted.detach(), logits, xt, index)
        true_mean = at(self.mean_x0) * x0 + at(self.mean_xt) * xt
        true_log = at(self.log_variance)
        kl = 0.5 * (-1 + log_variance - true_log + (true_log - log_variance).exp()
                    + (true_mean - mean) ** 2 * (-log_variance).exp())
        cdf = lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
        inverse = (-0.5 * log_variance).exp()
        above, below = cdf(inverse * (x0 - mean + 1 / 255)), cdf(inverse * (x0 - mean - 1 / 255))
        mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
        nll = -mass.clamp_min(1e-12).log()
        vb = torch.where(index == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2.0)
        return ((noise - predicted) ** 2).mean() + vb.mean()

    @torch.inference_mode()
    def sample(self, model, x, codes, scale, noises=None):
        """Guided ancestral sampling, the conditional and the null rows in one call of twice the batch."""
        rows = x.shape[0]
        both, drop = codes.repeat(2, 1), torch.arange(2 * rows, device=x.device) >= rows
        for i in reversed(range(len(self.timesteps))):
            out = model(x.repeat(2, 1, 1, 1), self.timesteps[i].expand(2 * rows), both, drop)
            (with_cond, logits), without = out[:rows].chunk(2, -1), out[rows:].chunk(2, -1)[0]
            mean, log_variance = self.posterior(without + scale * (with_cond - without), logits, x, [i])
            if i == 0:
                return mean
            noise = torch.randn_like(x) if noises is None else noises[i]
            x = torch.addcmul(mean, (0.5 * log_variance).exp(), noise)


# ---- SEDD ------------------------------------------------------------------------------------------------------------


class SEDDBlock(nn.Module):
    def __init__(self, width, num_heads, cond_dim, dropout=0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn_qkv, self.attn_out = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU('tanh'), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * width)

    def forward(self, x, c, cos, sin):
        b, n, d = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        h = modulate(self.norm1(x), shift_a, scale_a)
        q, k, v = self.attn_qkv(h).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        drop = lambda h: F.dropout(h, self.dropout, self.training) if self.dropout else h
        x = torch.addcmul(x, gate_a[:, None], drop(self.attn_out(h)))
        return torch.addcmul(x, gate_m[:, None], drop(self.mlp(modulate(self.norm2(x), shift_m, scale_m))))


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class SEDDHead(nn.Module):
    def __init__(self, width, states, cond_dim):
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(width, bias=False), nn.Linear(width, states)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * width)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SEDD(nn.Module):
    """Absorbing process, scores scaled by sigma."""

    def __init__(self, *, vocab_size, length, width, depth, num_heads, cond_dim=128, dropout=0.0):
        super().__init__()
        self.vocab = vocab_size
        self.pos_embed = nn.Parameter(torch.zeros(length, width))
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.zeros(vocab_size + 1, width))
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.blocks = nn.ModuleList(SEDDBlock(width, num_heads, cond_dim, dropout) for _ in range(depth))
        self.output_layer = SEDDHead(width, vocab_size + 1, cond_dim)
        self.rotary_emb = nn.Module()
        half = torch.arange(0, width // num_heads, 2) / (width // num_heads)
        self.rotary_emb.register_buffer('inv_freq', 10000.0 ** -half)
        angle = torch.arange(length)[:, None] * self.rotary_emb.inv_freq
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)

    def forward(self, tokens, sigma):
        x = F.embedding(tokens, self.vocab_embed.embedding) + self.pos_embed
        c = F.silu(self.sigma_map.mlp(sinusoidal(sigma)))
        x = x.to(c.dtype)
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)
        with torch.autocast(x.device.type, enabled=False):
            score = self.output_layer(x.float(), c.float())
        score = score - (torch.expm1(sigma).log() + math.log(self.vocab))[:, None, None]
        return score.scatter(-1, tokens[..., None], 0.0)


def score_entropy(model, x0, xt, t, eps=1e-3):
    """Mean training loss of codes x0 [B, L], corrupted to xt, at times t [B]: `DiscreteDiffusion.example_loss`."""
    kept = (1 - t) + eps * t
    sigma = torch.where(t < 0.5, -torch.log1p(-(1 - eps) * t), -kept.log())
    score = model(xt, sigma)[..., :model.vocab]
    log_r = -torch.expm1(sigma).log()[:, None]
    d = score - log_r[..., None]
    at_x0 = d.gather(-1, x0[..., None])[..., 0]
    entropy = torch.where(xt == model.vocab, log_r.exp() * (d.exp().sum(-1) - 1 - at_x0), 0.0)
    return ((1 - eps) / kept * entropy.sum(-1)).mean()


def jumps(score, vocab, t, dt, eps=1e-3):
    """Weights [B, L, V] of the tokens in a step from t to t - dt, and the probability of none [B, L] (analytic)."""
    step = math.log1p((1 - eps) * dt / ((1 - t) + eps * t))
    weights = score[..., :vocab].exp() * math.expm1(step)
    return weights, 1 - weights.sum(-1)


@torch.inference_mode()
def sample_codes(model, batch, length, vocab, num_steps, device, eps=1e-3, final=1e-5):
    x = torch.full((batch, length), vocab, device=device)
    dt = (1 - final) / num_steps
    for i in range(num_steps + 1):
        t = 1 - i * dt if i < num_steps else final
        score = model(x, torch.full((batch,), -math.log1p(-(1 - eps) * t), device=device))
        weights, stay = jumps(score, vocab, t, dt if i < num_steps else t, eps)
        stay = stay.clamp_min(0) if i < num_steps else torch.zeros_like(stay)
        total = weights.sum(-1)
        chance = torch.where(stay > 0, total / (total + stay), 1.0)
        value = (weights / torch.empty_like(weights).exponential_()).argmax(-1)  # a categorical draw
        x = torch.where((x == vocab) & (torch.rand_like(chance) < chance), value, x)
    return x
