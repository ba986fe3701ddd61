"""Weights of `sedd/` of lavoiems/DiscreteLatentCode, and of louaaron/sedd-small and -medium, <-> `models.sedd.SEDD`."""
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlc_jax.models.sedd import SEDD
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import Fixed, Rule, dense, linear
from rlhf_jax.weights.state_dict import num_blocks, shape_of, strip_prefixes

PREFIXES = ('model.', 'transformer.')

_RULES = (
    Rule('pos_embed', 'pos_embed'),
    Rule('vocab_embed.embedding', 'embed'),
    Rule('vocab_embed.embedding_table', 'embed_by_position'),
    *dense('sigma_map.mlp.0', 'sigma_embed/fc1', linear()),
    *dense('sigma_map.mlp.2', 'sigma_embed/fc2', linear()),
    Rule('blocks.{i}.norm1.weight', 'blocks/norm1/scale'),
    Rule('blocks.{i}.attn_qkv.weight', 'blocks/attn/qkv/kernel', linear()),
    Rule('blocks.{i}.attn_out.weight', 'blocks/attn/proj/kernel', linear(2)),
    Rule('blocks.{i}.norm2.weight', 'blocks/norm2/scale'),
    *dense('blocks.{i}.mlp.0', 'blocks/mlp/fc1', linear()),
    *dense('blocks.{i}.mlp.2', 'blocks/mlp/fc2', linear()),
    *dense('blocks.{i}.adaLN_modulation', 'blocks/adaln', linear()),
    Rule('output_layer.norm_final.weight', 'final/norm/scale'),
    *dense('output_layer.linear', 'final/linear', linear()),
    *dense('output_layer.adaLN_modulation', 'final/adaln', linear()),
)


def from_torch(state_dict: Mapping[str, Any], *, num_heads: int = 0, length: int = 1024, process: str = 'absorbing',
               shardings: Any = None, **fields: Any) -> tuple[SEDD, dict[str, Any]]:
    """The module and its parameters; vocabulary, width, depth and the rest are read from the tensors.

    Args:
        state_dict: {name: numpy array or PyTorch tensor}.
        num_heads: heads of width 64 where it is 0, as in every released model.
        length: of a sequence, where there is no position embedding to read it from (louaaron's text models: 1024).
        process: 'uniform' weights have no mask entry, nor scores scaled by sigma.
        **fields: other fields of `SEDD`.

    Raises:
        ValueError: a tensor that does not fit, or `num_heads` that does not divide the width.
    """
    state_dict = strip_prefixes(state_dict, PREFIXES)
    states, width = shape_of(state_dict, 'output_layer.linear.weight', 2)
    num_heads = num_heads or max(width // 64, 1)
    if width % (2 * num_heads):
        raise ValueError(f'convert: num_heads={num_heads} does not cut the width {width} into heads of even width')
    learned = 'pos_embed' in state_dict
    module = SEDD(
        vocab_size=states - (process == 'absorbing'),
        length=shape_of(state_dict, 'pos_embed', 2)[0] if learned else length,
        width=width, depth=num_blocks(state_dict, 'blocks.{i}.norm1.weight'), num_heads=num_heads,
        cond_dim=shape_of(state_dict, 'sigma_map.mlp.2.weight', 2)[0],
        mlp_ratio=shape_of(state_dict, 'blocks.0.mlp.0.weight', 2)[0] // width,
        process=process, learned_positions=learned,
        **{'scale_by_sigma': process == 'absorbing',
           'shared_embedding': 'vocab_embed.embedding_table' not in state_dict} | fields)
    return module, rules.to_flax(state_dict, rules_of(module), shapes_of(module), shardings=shardings)


def shapes_of(module: SEDD) -> dict[str, Any]:
    """Shapes of the parameters."""
    return rules.param_shapes(module, np.zeros((1, module.length), np.int32), np.ones(1, np.float32))


def rules_of(module: SEDD) -> tuple[Rule | Fixed, ...]:
    """Both directions, the original's rotary buffer included."""
    head_dim = module.width // module.num_heads
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    return (*_RULES, Fixed('rotary_emb.inv_freq', frequencies.astype(np.float32), exact=True))
