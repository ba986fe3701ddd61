"""Scalar heads on a language model: reward models, value functions, and a policy that shares its trunk with its value.

The backbone is any of the decoders; its parameters sit under 'backbone'. `decoder.split_blocks` and the partition rules
of the backbone apply to that subtree.
"""
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Array = jax.Array

PARTITION_RULES = ((r'(score|value)_head/.*', P()),)  # beside the backbone's, which sit under 'backbone'


class ScalarHead(nn.Module):
    """Linear map to a scalar, [..., D] -> float32 [...]. Parameters: `kernel` [D, 1], `bias` [1].

    The kernel starts at standard deviation 1 / sqrt(D + 1), as in the reward models of arXiv 2009.01325 and 2403.17031.
    """
    use_bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        kernel = self.param('kernel', nn.initializers.normal((width + 1) ** -0.5), (width, 1), self.param_dtype)
        out = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32), precision='highest')
        if self.use_bias:
            out += self.param('bias', nn.initializers.zeros, (1,), self.param_dtype).astype(jnp.float32)
        return out[..., 0]


class RewardModel(nn.Module):
    """One number at every token: a reward model is read `at_last_token`, a value function everywhere.

    Attributes:
        backbone: a decoder; its output head has no parameters here.
        use_bias: of the head.
    """
    backbone: nn.Module
    use_bias: bool = False

    @nn.compact
    def __call__(self, tokens: Array, *, mask: Array | None = None, positions: Array | None = None) -> Array:
        """Scores float32 [B, T] of int32 `tokens` [B, T]; `mask` and `positions` as of the backbone."""
        hidden = self.backbone(tokens, mask=mask, positions=positions, output='hidden')
        return ScalarHead(self.use_bias, self.backbone.param_dtype, name='score_head')(hidden)


class PolicyAndValue(nn.Module):
    """A policy and its value function on one trunk (StackLLaMA).

    Attributes:
        backbone: a decoder, with its output head.
    """
    backbone: nn.Module

    @nn.compact
    def __call__(self, tokens: Array, *, mask: Array | None = None,
                 positions: Array | None = None) -> tuple[Array, Array]:
        """Logits, float32 [B, T, V], and values, float32 [B, T]."""
        logits, hidden = self.backbone(tokens, mask=mask, positions=positions, output='both')
        return logits, ScalarHead(True, self.backbone.param_dtype, name='value_head')(hidden)


def last_token(mask: Array) -> Array:
    """Index of the last token of each row, int32 [B], for `mask` [B, T]; 0 where there is none.

    From the mask, never from a padding id: with pad = eos the id cannot tell a final eos from padding.
    """
    return jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1], dtype=jnp.int32), 0), 1)


def at_last_token(values: Array, mask: Array, *, back: int = 0) -> Array:
    """Reads `values` [B, T] at the last token of each row, [B].

    Args:
        back: so many tokens before it. 1 reproduces a gold reward model whose pad is its eos and which therefore is
            read at the token before eos.
    """
    chex.assert_equal_shape((values, mask))
    index = jnp.maximum(last_token(mask) - back, 0)
    return jnp.take_along_axis(values, index[:, None], 1)[:, 0]
