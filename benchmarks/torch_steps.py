"""Training steps of the other side, as one would write them in PyTorch for speed.

bfloat16 autocast over float32 weights, fused AdamW, `foreach` averages, no checkpointing. Each function returns a step:
a call without arguments that launches the work and does not wait for it.
"""
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import torch_encoder, torch_gpt_neox
from benchmarks import torch_reference as reference

Step = Callable[[], Any]


def autocast(device: torch.device, bf16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def compile_blocks(*models: torch.nn.Module) -> None:
    """Compiles the transformer blocks in place, one graph for all of them: the many layers cost one compilation."""
    for model in models:
        for module in model.modules():
            if 'Block' in type(module).__name__:
                module.compile(dynamic=False)


def scatter(model: torch.nn.Module, std: float = 0.03) -> torch.nn.Module:
    """Normal(0, std) weights, norms' scales about 1: zeros would make products faster than those of real weights."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, std)
            if 'norm' in name and name.endswith('weight'):
                p.add_(1)
    return model


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def dit(model: Any, process: reference.GaussianDiffusion, x0: torch.Tensor, codes: torch.Tensor, *, bf16: bool,
        cond_dropout: float, parts: int = 1) -> Step:
    """Loss, gradient, AdamW, EMA; `parts` microbatches."""
    params = trained(model)
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for x, c in zip(x0.chunk(parts), codes.chunk(parts)):
            drop = torch.rand(len(x), device=x.device) < cond_dropout
            index = torch.randint(0, 1000, (len(x),), device=x.device)
            with autocast(x.device, bf16):
                loss = process.loss(model, x, index, torch.randn_like(x), c, drop) / parts
            loss.backward()
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1e-4)
    return step


def sedd(model: Any, codes: torch.Tensor, *, bf16: bool, clip: float = 1.0, parts: int = 1, eps: float = 1e-3,
         min_time: float = 1e-3) -> Step:
    """Score entropy at random times, gradient, clipping, AdamW, EMA."""
    params = trained(model)
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=0.0, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for x0 in codes.chunk(parts):
            t = min_time + (1 - min_time) * torch.rand(len(x0), device=x0.device)
            moved = torch.rand(x0.shape, device=x0.device) < (1 - eps) * t[:, None]
            with autocast(x0.device, bf16):
                loss = reference.score_entropy(model, x0, torch.where(moved, model.vocab, x0), t, eps) / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1e-4)
    return step


def encoder(student: Any, teacher: Any, batch: dict[str, torch.Tensor], *, bf16: bool, temperature: float,
            clip: float, ema_decay: float) -> Step:
    """Multi-crop step: teacher, student, heads, losses, clipping, AdamW, EMA; without drop paths."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.04, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(batch['global_crops'].device, bf16):
            value = torch_encoder.loss(student, teacher, batch, temperature)
        value.backward()
        for part in (student.encoder, student.head):
            torch.nn.utils.clip_grad_norm_(part.parameters(), clip, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - ema_decay)
    return step


def dpo(policy: Any, frozen: Any, tokens: torch.Tensor, response: int, *, bf16: bool, beta: float, learning_rate: float,
        parts: int = 1) -> Step:
    """Reference, policy forward and backward, AdamW, on `tokens` [B, 2, T], the chosen response of each pair first."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)

    def step(tokens: torch.Tensor = tokens):
        optimizer.zero_grad(set_to_none=True)
        for pairs in tokens.chunk(parts):
            with autocast(tokens.device, bf16):
                loss = torch_gpt_neox.dpo_loss(policy, frozen, pairs, response, beta) / parts
            loss.backward()
        optimizer.step()
    return step


def tensors(device: torch.device, arrays: Sequence[Any]) -> list[torch.Tensor]:
    return [torch.tensor(a, device=device) for a in arrays]
