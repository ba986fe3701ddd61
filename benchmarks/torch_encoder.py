"""The encoder's training objective in plain PyTorch: ViT with a SEM bottleneck, DINO head, DINO + iBOT + KoLeo.

The second half of what `benchmarks/dlc.py` measures against; as `torch_reference.py`, under the originals' names.
"""
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_reference import Attention, Mlp


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width, 4 * width, 'none')
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class SEMEncoder(nn.Module):
    """Images NHWC -> class token rebuilt from SEM [B, D], patches [B, N, D]."""

    def __init__(self, *, width, depth, num_heads, patch_size, num_registers, pos_grid, num_codes, vocab_size,
                 channels):
        super().__init__()
        self.patch, self.grid, self.registers, self.code = patch_size, pos_grid, num_registers, (num_codes, vocab_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pos_grid ** 2, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, width, patch_size, patch_size)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.sem_embed = nn.Linear((1 + num_registers) * width, num_codes * vocab_size, bias=False)
        self.sem_norm = nn.LayerNorm(num_codes * vocab_size, eps=1e-6)
        self.sem_out = nn.Linear(num_codes * vocab_size, width, bias=False)

    def forward(self, images, masks=None):
        x = self.patch_embed.proj(images.permute(0, 3, 1, 2))
        rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        pos = self.pos_embed[:, 1:]
        if (rows, columns) != (self.grid, self.grid):
            square = pos.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2).float()
            pos = F.interpolate(square, (rows, columns), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
        b = x.shape[0]
        cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        registers = self.register_tokens.to(x.dtype).expand(b, -1, -1)
        x = torch.cat([cls.expand(b, -1, -1), registers, x + pos.to(x.dtype)], 1)
        for block in self.blocks:
            x = block(x)
        first = 1 + self.registers
        sem = self.sem_norm(self.sem_embed(x[:, :first].flatten(1)).float()).unflatten(-1, self.code).softmax(-1)
        return self.norm(self.sem_out(sem.flatten(1))), self.norm(x)[:, first:]


class DINOHead(nn.Module):
    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.last_layer = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.last_layer.weight_v = nn.Parameter(torch.zeros(prototypes, bottleneck))

    def forward(self, x):
        x = F.normalize(self.mlp(x).float(), dim=-1)
        return F.linear(x, F.normalize(self.last_layer.weight_v, dim=-1) * self.last_layer.weight_g).float()


class SelfDistillation(nn.Module):
    """Encoder and head together; `forward` is one crop size's pass through both."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images, masks=None, patches_at=None):
        """Head logits of the class tokens [B, K] and of the patches at flat positions [M, K], and the class tokens."""
        cls, patches = self.encoder(images, masks)
        if patches_at is None:
            return self.head(cls), None, cls
        return self.head(cls), self.head(patches.flatten(0, 1)[patches_at]), cls


def koleo(x):
    x = F.normalize(x.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -(((x - x[nearest] + 1e-8) ** 2).sum(-1).sqrt() + 1e-8).log().mean()


def loss(student, teacher, batch, temperature, student_temperature=0.1):
    """DINO + 0.1 KoLeo + iBOT of a batch; centers at zero, where a run starts.

    `batch`: global_crops [B, 2, ...], local_crops [B, n, ...], masks [B, 2, N], mask_indices and mask_weights [M].
    """
    b, n = batch['local_crops'].shape[:2]
    globals_, at, weights = batch['global_crops'].flatten(0, 1), batch['mask_indices'], batch['mask_weights']
    with torch.no_grad():
        cls, patches, _ = teacher(globals_, None, at)
        targets = (cls / temperature).softmax(-1).unflatten(0, (b, 2))
        patch_targets = (patches / temperature).softmax(-1)
    logits, patches, cls = student(globals_, batch['masks'].flatten(0, 1), at)
    local, _, _ = student(batch['local_crops'].flatten(0, 1))
    log = lambda x: (x / student_temperature).log_softmax(-1)
    pairs = 2 * n + 2
    local_term = -(targets.sum(1, keepdim=True) * log(local).unflatten(0, (b, n))).sum(-1).mean() * n / pairs
    global_term = -(targets.flip(1) * log(logits).unflatten(0, (b, 2))).sum(-1).mean() * 2 / pairs
    ibot = -((patch_targets * log(patches)).sum(-1) * weights).sum() / (2 * b)
    cls = cls.unflatten(0, (b, 2))
    return local_term + global_term + ibot + 0.1 * (koleo(cls[:, 0]) + koleo(cls[:, 1]))
