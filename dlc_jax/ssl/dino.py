"""DINO: head, targets and loss on class tokens (arXiv 2104.14294; DINOv2, arXiv 2304.07193 §4).

After the original's `layers/dino_head.py` and `loss/dino_clstoken_loss.py`. With 65536 prototypes a row of logits is
256 KiB, so nothing here keeps more copies of them than it must; all of it is float32.
"""
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dlc_jax.models.vit import torch_default_init
from rlhf_jax.models.functions import gelu

Array = jax.Array

PARTITION_RULES = (
    (r'fc\d+/kernel', P('fsdp', None)),
    (r'fc\d+/bias', P()),
    (r'last_layer/kernel', P('fsdp', 'tensor')),
    (r'last_layer/gain', P('tensor')),
)


class WeightNormDense(nn.Module):
    """Dense layer without bias whose columns are `gain * kernel / ||kernel||`; float32 sums and outputs.

    `gain` starts at 1 and is trained, as in DINOv2 (DINO froze it).
    """
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param('kernel', torch_default_init, (x.shape[-1], self.features), self.param_dtype)
        gain = self.param('gain', nn.initializers.ones, (self.features,), self.param_dtype)
        kernel, gain = kernel.astype(jnp.float32), gain.astype(jnp.float32)
        kernel = (kernel * (gain * jax.lax.rsqrt(jnp.sum(kernel * kernel, 0)))).astype(self.dtype)
        return jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)


class DINOHead(nn.Module):
    """MLP (exact GELU), L2 normalisation, weight-normed layer of prototypes: [..., D] -> [..., K] float32 logits.

    Attributes:
        hidden: width of the MLP's inner layers.
        bottleneck: width of its output.
        prototypes: K.
        num_layers: layers of the MLP.
        init_std: of the MLP's weights; the original's 0.02 is about 1 / sqrt(hidden) there. A narrow head needs more,
            or its biases soon outweigh what it is given and every sample gets the same logits.
    """
    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536
    num_layers: int = 3
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.num_layers < 1:
            raise ValueError(f'num_layers={self.num_layers} must be at least 1')
        # With few rows the compiler would rather sum logits over devices than gather this small head.
        split = lambda x: nn.with_logical_constraint(x, ('batch',) + (None,) * (x.ndim - 1))
        for i in range(1, self.num_layers + 1):
            last = i == self.num_layers
            x = nn.Dense(self.bottleneck if last else self.hidden, dtype=self.dtype, param_dtype=self.param_dtype,
                         kernel_init=nn.initializers.normal(self.init_std), name=f'fc{i}')(x)
            x = split(x if last else gelu(x, False))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
        return split(WeightNormDense(self.prototypes, self.dtype, self.param_dtype, name='last_layer')(x))


def cross_entropy(logits: Array, targets: Array, temperature: float | Array = 0.1) -> Array:
    """Cross entropy `-sum_k targets_k log softmax(logits / temperature)_k`.

    Args:
        logits: [..., K] of the student.
        targets: [..., K], broadcast against `logits`; need not sum to one (a sum of several teachers' probabilities
            gives the sum of their losses).

    Returns:
        [...] float32. The log-softmax is never stored: its normaliser and its product with the targets are two sums.
    """
    logits = logits.astype(jnp.float32) / temperature
    targets = targets.astype(jnp.float32)
    return targets.sum(-1) * jax.nn.logsumexp(logits, -1) - jnp.sum(targets * logits, -1)


def dino_loss(student: Array, teacher: Array, temperature: float | Array = 0.1) -> Array:
    """Sum over every (student view, teacher view) pair of the mean cross entropy over the batch; scalar float32.

    Args:
        student: [S, B, K] logits.
        teacher: [T, B, K] probabilities.

    The original divides by the number of pairs in all its calls together (18 for 8 local crops and 2 globals, a global
    never being paired with itself): that is left to the caller.
    """
    chex.assert_rank((student, teacher), 3)
    chex.assert_equal_shape_suffix((student, teacher), 2)
    return cross_entropy(student, teacher.astype(jnp.float32).sum(0), temperature).mean(-1).sum()


def softmax_center(logits: Array, center: Array, temperature: float | Array) -> Array:
    """Teacher's probabilities `softmax((logits - center) / temperature)`, float32 [..., K]; `center` is [1, K]."""
    return jax.nn.softmax((logits.astype(jnp.float32) - center) / temperature)


def batch_center(logits: Array, weights: Array | None = None) -> Array:
    """Mean of the teacher's logits over all rows but those where `weights` is 0: [..., K], [...] -> [1, K] float32."""
    logits = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
    if weights is None:
        return logits.mean(0, keepdims=True)
    real = (weights.reshape(-1, 1) > 0).astype(jnp.float32)
    return (real * logits).sum(0, keepdims=True) / jnp.maximum(real.sum(), 1)


def update_center(center: Array, mean: Array, momentum: float = 0.9) -> Array:
    """EMA of `batch_center`. In the original the new center serves from the next step on."""
    return center * momentum + mean * (1 - momentum)


def sinkhorn_knopp(logits: Array, temperature: float | Array, *, weights: Array | None = None,
                   num_iterations: int = 3) -> Array:
    """Teacher's probabilities that use all prototypes equally (arXiv 2006.09882 §3.1, DINOv2 §4).

    `exp(logits / temperature)` is scaled in turn to equal mass on each prototype and on each row. Done in logarithms,
    on one vector of scales for prototypes and one for rows, so it neither overflows nor stores intermediate matrices.

    Args:
        logits: [B, K]. Under jit on a sharded batch, B is the global batch.
        weights: [B]; rows where it is 0 (False) are padding: they count for nothing and get zeros.

    Returns:
        [B, K] float32; rows sum to one.
    """
    chex.assert_rank(logits, 2)
    scores = logits.astype(jnp.float32) / temperature
    rows, prototypes = scores.shape
    real = jnp.ones((rows, 1), bool) if weights is None else (weights > 0)[:, None]
    count = jnp.maximum(real.sum(), 1).astype(jnp.float32)
    row_scale = jnp.zeros((rows, 1))
    for _ in range(num_iterations):
        mass = jax.nn.logsumexp(scores + row_scale, 0, keepdims=True, where=real)
        prototype_scale = -mass - jnp.log(prototypes)
        row_scale = -jax.nn.logsumexp(scores + prototype_scale, 1, keepdims=True) - jnp.log(count)
    return jnp.where(real, jnp.exp(scores + prototype_scale + row_scale + jnp.log(count)), 0.0)
