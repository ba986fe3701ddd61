"""DINOv2 weights: the names of facebookresearch/dinov2 in and out, those of Hugging Face's Dinov2Model and
Dinov2WithRegistersModel, as on disk, in and (with `hf`) out."""
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dlc_jax.models.vit import VisionTransformer, swiglu_hidden
from rlhf_jax.weights import rules as rules_lib
from rlhf_jax.weights.rules import Rule, dense, linear, norm, patch_conv
from rlhf_jax.weights.state_dict import Renamed, num_blocks, shape_of, strip_prefixes, without_prefixes

_PREFIXES = ('backbone.',)
_TRAINING_HEADS = ('dino_head.', 'ibot_head.')  # beside the backbone in a training checkpoint; read by `dino_head.py`
_HF_PREFIXES = ('dinov2_with_registers.', 'dinov2.')
_HEAD_WIDTH = 64  # of every released DINOv2
_RATIO = 4  # MLP width over model width, of every released DINOv2


def vit_rules(patch_size: int) -> tuple[Rule, ...]:
    """Rules for `VisionTransformer`, in the order of the original's state dict."""
    block = 'blocks.{i}.'
    return (
        Rule('cls_token', 'cls_token'),
        Rule('pos_embed', 'pos_embed'),
        Rule('register_tokens', 'register_tokens'),
        Rule('mask_token', 'mask_token'),
        *dense('patch_embed.proj', 'patch_embed', patch_conv(patch_size)),
        *norm(block + 'norm1', 'blocks/norm1'),
        *dense(block + 'attn.qkv', 'blocks/attn/qkv', linear()),
        *dense(block + 'attn.proj', 'blocks/attn/proj', linear(2)),
        Rule(block + 'ls1.gamma', 'blocks/ls1/gamma'),
        *norm(block + 'norm2', 'blocks/norm2'),
        *(rule for name in ('fc1', 'fc2', 'w12', 'w3')  # MLP or fused SwiGLU
          for rule in dense(f'{block}mlp.{name}', f'blocks/mlp/{name}', linear())),
        Rule(block + 'ls2.gamma', 'blocks/ls2/gamma'),
        *norm('norm', 'norm'),
    )


# Original name -> Hugging Face's, as far as they differ; the three parts of qkv are joined.
_HF_NAMES = {
    'cls_token': 'embeddings.cls_token',
    'pos_embed': 'embeddings.position_embeddings',
    'register_tokens': 'embeddings.register_tokens',
    'mask_token': 'embeddings.mask_token',
    'patch_embed.proj': 'embeddings.patch_embeddings.projection',
    'blocks.{i}.': 'encoder.layer.{i}.',
    'attn.proj': 'attention.output.dense',
    'ls1.gamma': 'layer_scale1.lambda1',
    'ls2.gamma': 'layer_scale2.lambda1',
    'mlp.w12': 'mlp.weights_in',
    'mlp.w3': 'mlp.weights_out',
}


def _hf_rule(rule: Rule) -> Rule:
    name = rule.names[0]
    for original, theirs in _HF_NAMES.items():
        name = name.replace(original, theirs)
    if name.startswith('norm.'):
        name = 'layer' + name
    if 'attn.qkv' in name:
        parts = ('query', 'key', 'value')
        return rule._replace(torch=tuple(name.replace('attn.qkv', f'attention.attention.{part}') for part in parts))
    return rule._replace(torch=name)


def clean_names(state_dict: Mapping[str, Any]) -> Renamed:
    """`state_dict` of the backbone alone, without the prefixes of wrappers and without training heads; blocks that
    training kept in chunks are counted through (`blocks.1.7.` -> `blocks.7.`)."""
    def clean(name: str) -> str | None:
        name = without_prefixes(name, _PREFIXES)
        return None if name.startswith(_TRAINING_HEADS) else re.sub(r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.', name)

    return Renamed(state_dict, clean)


def vit_fields(state_dict: Mapping[str, Any], num_heads: int | None = None, *, hf: bool = False) -> dict[str, Any]:
    """Fields of the `VisionTransformer` whose tensors, with clean names, are in `state_dict`.

    Raises:
        ValueError: a tensor that fixes a field is missing or of the wrong rank, or the sizes make no such model.
    """
    def name_of(original, block=0):
        return (_hf_rule(Rule(original, '')).names[0] if hf else original).replace('{i}', str(block))

    def shape(original, ndim):
        return shape_of(state_dict, name_of(original), ndim)

    width, _, patch, _ = shape('patch_embed.proj.weight', 4)
    positions = shape('pos_embed', 3)[1] - 1
    grid = round(positions ** 0.5)
    if grid * grid != positions:
        raise ValueError(f'convert: {name_of("pos_embed")} has {positions} positions, which are not a square grid')
    fields = dict(
        width=width, depth=num_blocks(state_dict, name_of('blocks.{i}.norm1.weight', '{i}')),
        patch_size=patch, pos_grid=grid, num_heads=num_heads or max(width // _HEAD_WIDTH, 1),
        num_registers=shape('register_tokens', 3)[1] if name_of('register_tokens') in state_dict else 0)
    fields['pos_antialias'] = fields['num_registers'] > 0  # how the released models were trained
    if name_of('blocks.{i}.ls1.gamma') not in state_dict:
        fields['layer_scale'] = 0.0
    w3 = name_of('blocks.{i}.mlp.w3.weight')
    if w3 in state_dict:
        fields['ffn'] = 'swiglu'
        hidden = shape('blocks.{i}.mlp.w3.weight', 2)[1]
        if hidden != swiglu_hidden(_RATIO * width):
            raise ValueError(f'convert: {w3} has {hidden} hidden values; a fused SwiGLU of width {width} has '
                             f'{swiglu_hidden(_RATIO * width)}')
    else:
        fields['mlp_ratio'] = shape('blocks.{i}.mlp.fc1.weight', 2)[0] / width
    return fields


def shapes_of(module: VisionTransformer, channels: int = 3) -> dict[str, Any]:
    """Shapes of the parameters, by tracing the smallest image."""
    return rules_lib.param_shapes(module, jnp.zeros((1, module.patch_size, module.patch_size, channels)))


def rules_of(module: VisionTransformer, *, hf: bool = False) -> tuple[Rule, ...]:
    """Both directions, under the names of facebookresearch/dinov2, with `hf` under those of Hugging Face's files."""
    rules = vit_rules(module.patch_size)
    return tuple(map(_hf_rule, rules)) if hf else rules


def config_of(module: VisionTransformer) -> dict[str, Any]:
    """The `config.json` with which transformers builds the same model.

    Raises:
        ValueError: a model that it does not have.
    """
    if not module.layer_scale:
        raise ValueError('convert: transformers has no DINOv2 without LayerScale')
    family = 'Dinov2WithRegisters' if module.num_registers else 'Dinov2'
    registers = {'num_register_tokens': module.num_registers} if module.num_registers else {}
    kind = 'dinov2_with_registers' if module.num_registers else 'dinov2'
    return {
        'model_type': kind, 'architectures': [f'{family}Model'],
        'hidden_size': module.width, 'num_hidden_layers': module.depth, 'num_attention_heads': module.num_heads,
        'mlp_ratio': int(module.mlp_ratio), 'hidden_act': 'gelu', 'layer_norm_eps': 1e-6, 'qkv_bias': True,
        'image_size': module.pos_grid * module.patch_size, 'patch_size': module.patch_size, 'num_channels': 3,
        'use_swiglu_ffn': module.ffn == 'swiglu', 'torch_dtype': 'float32', **registers}


def from_torch(state_dict: Mapping[str, Any], *, num_heads: int | None = None, shardings: Any = None,
               **fields: Any) -> tuple[VisionTransformer, dict[str, Any]]:
    """`VisionTransformer` and its parameters.

    Args:
        state_dict: under the names of facebookresearch/dinov2 or of Hugging Face's files (in memory, transformers 5
            uses others).
        num_heads: default: width / 64, as in every released model (the tensors do not tell).
        **fields: other fields of the module, `dtype` and the like.

    Raises:
        ValueError: a tensor that is missing, unknown, wrongly shaped or not finite.
    """
    state_dict = clean_names(state_dict)
    hf = any('embeddings.' in name for name in state_dict)
    if hf:
        state_dict = strip_prefixes(state_dict, _HF_PREFIXES)
    module = VisionTransformer(**vit_fields(state_dict, num_heads, hf=hf) | fields)
    rules = rules_of(module, hf=hf)
    channels = shape_of(state_dict, next(r for r in rules if r.flax == 'patch_embed/kernel').names[0], 4)[1]
    return module, rules_lib.to_flax(state_dict, rules, shapes_of(module, channels), shardings=shardings)
