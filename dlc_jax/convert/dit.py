"""DiT weights: `DiTSEM`, `DiTCONT` and `DiT` of lavoiems/DiscreteLatentCode `dit/models.py`, and of
facebookresearch/DiT."""
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlc_jax.models.dit import DiT, sincos_position_embedding
from rlhf_jax.weights.rules import Codec, Fixed, Rule, dense, linear, param_shapes, patch_conv, to_flax
from rlhf_jax.weights.state_dict import num_blocks, shape_of, strip_prefixes

PREFIXES = ('model.', 'transformer.')

_ROW = Codec(lambda t, shape: t.reshape(shape), lambda p: p.reshape(1, -1))


def rules_of(module: DiT) -> tuple[Rule | Fixed, ...]:
    """Both directions. The originals store the fixed position embedding as a frozen parameter [1, N, D]."""
    position = sincos_position_embedding(module.input_size // module.patch_size, module.width)[None]
    return (
        Fixed('pos_embed', position, exact=True),
        *dense('x_embedder.proj', 'patch_embed', patch_conv(module.patch_size)),
        *dense('t_embedder.mlp.0', 'time_embed/fc1', linear()),
        *dense('t_embedder.mlp.2', 'time_embed/fc2', linear()),
        Rule('sem_embedder.embedding_table', 'cond_embed/codes'),
        Rule('y_embedder.embedding_table.weight', 'cond_embed/classes'),
        Rule('y_embedder.embedding_table.weight', 'cond_embed/proj/kernel', linear()),
        Rule('y_embedder.fake_latent', 'cond_embed/null', _ROW),
        *dense('blocks.{i}.attn.qkv', 'blocks/attn/qkv', linear()),
        *dense('blocks.{i}.attn.proj', 'blocks/attn/proj', linear(2)),
        *dense('blocks.{i}.mlp.fc1', 'blocks/mlp/fc1', linear()),
        *dense('blocks.{i}.mlp.fc2', 'blocks/mlp/fc2', linear()),
        *dense('blocks.{i}.adaLN_modulation.1', 'blocks/adaln', linear()),
        *dense('final_layer.linear', 'final/linear', linear()),
        *dense('final_layer.adaLN_modulation.1', 'final/adaln', linear()),
    )


def _condition(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the condition, from the embedder's tensors."""
    if 'sem_embedder.embedding_table' in state_dict:
        length, entries, _ = shape_of(state_dict, 'sem_embedder.embedding_table', 3)
        return dict(condition='code', num_codes=length, vocab_size=entries - 1)
    if 'y_embedder.fake_latent' in state_dict:
        return dict(condition='embedding', embedding_dim=shape_of(state_dict, 'y_embedder.fake_latent', 2)[1])
    if 'y_embedder.embedding_table.weight' in state_dict:
        return dict(condition='class', num_classes=shape_of(state_dict, 'y_embedder.embedding_table.weight', 2)[0] - 1)
    return dict(condition='none')


def from_torch(state_dict: Mapping[str, Any], *, num_heads: int, shardings: Any = None,
               **fields: Any) -> tuple[DiT, dict[str, Any]]:
    """A `DiT` and its parameters, for any size, patch and condition.

    Args:
        state_dict: {name: array}; prefixes `PREFIXES` are removed.
        num_heads: the tensors do not fix it (16 for XL and L, 12 for B, 6 for S).
        **fields: further fields of `DiT`, as `dtype`.

    Raises:
        ValueError: a tensor that does not fit, or `num_heads` that does not divide the width.
    """
    state_dict = strip_prefixes(state_dict, PREFIXES)
    width, channels, patch, _ = shape_of(state_dict, 'x_embedder.proj.weight', 4)
    tokens = shape_of(state_dict, 'pos_embed', 3)[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(f'convert: pos_embed has {tokens} tokens, which is not a square grid')
    if width % num_heads:
        raise ValueError(f'convert: num_heads={num_heads} does not divide the width {width}')
    features = shape_of(state_dict, 'final_layer.linear.weight', 2)[0]
    hidden = shape_of(state_dict, 'blocks.0.mlp.fc1.weight', 2)[0]
    module = DiT(**dict(
        input_size=grid * patch, channels=channels, patch_size=patch, width=width,
        depth=num_blocks(state_dict, 'blocks.{i}.attn.qkv.weight'), num_heads=num_heads, mlp_ratio=hidden / width,
        learn_sigma=features == 2 * channels * patch ** 2) | _condition(state_dict) | fields)
    return module, to_flax(state_dict, rules_of(module), shapes_of(module), shardings=shardings)


def shapes_of(module: DiT) -> dict[str, Any]:
    """Shapes of the parameters."""
    side = module.input_size
    cond = {'code': np.zeros((1, module.num_codes), np.int32), 'class': np.zeros(1, np.int32),
            'embedding': np.zeros((1, module.embedding_dim), np.float32), 'none': None}[module.condition]
    return param_shapes(module, np.zeros((1, side, side, module.channels), np.float32), np.zeros(1, np.int32), cond)
