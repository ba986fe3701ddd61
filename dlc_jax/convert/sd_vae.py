"""Stable Diffusion's autoencoder, under the names of diffusers' `AutoencoderKL` (sd-vae-ft-ema, sd-vae-ft-mse)."""
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from dlc_jax.models.vae import AutoencoderKL
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import CONV, Rule, dense, linear, norm
from rlhf_jax.weights.state_dict import Renamed, num_blocks, shape_of, without_prefixes

# The released files have the first names, files written by diffusers since 0.18 the second.
_ATTENTION_NAMES = (('.query.', '.to_q.'), ('.key.', '.to_k.'), ('.value.', '.to_v.'), ('.proj_attn.', '.to_out.0.'))


def from_torch(state_dict: Mapping[str, Any], *, shardings: Any = None,
               **fields: Any) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The autoencoder and its parameters; widths, depth and channels are read from the tensors.

    Args:
        state_dict: {name: array}, with either generation of attention names.
        **fields: other fields of `AutoencoderKL` (`dtype`, and `num_groups` where it is not 32).

    Raises:
        ValueError: a tensor is missing, unknown, wrongly shaped or not finite.
    """
    state_dict = Renamed(state_dict, _modern_name)
    levels = num_blocks(state_dict, 'encoder.down_blocks.{i}.resnets.0.conv1.weight')
    module = AutoencoderKL(
        widths=tuple(shape_of(state_dict, f'encoder.down_blocks.{i}.resnets.0.conv1.weight', 4)[0]
                     for i in range(levels)),
        depth=num_blocks(state_dict, 'encoder.down_blocks.0.resnets.{i}.conv1.weight'),
        latent_channels=shape_of(state_dict, 'post_quant_conv.weight', 4)[0],
        image_channels=shape_of(state_dict, 'encoder.conv_in.weight', 4)[1], **fields)
    return module, rules.to_flax(state_dict, rules_of(module), shapes_of(module), shardings=shardings)


def shapes_of(module: AutoencoderKL) -> dict[str, Any]:
    """Shapes of the parameters, by tracing the smallest image."""
    return rules.param_shapes(module, jnp.zeros((1, module.stride, module.stride, module.image_channels)))


def _modern_name(name: str) -> str:
    name = without_prefixes(name)
    if '.attentions.0.' in name:
        for old, new in _ATTENTION_NAMES:
            name = name.replace(old, new)
    return name


def rules_of(module: AutoencoderKL) -> tuple[Rule, ...]:
    """Both directions, with the newer attention names."""
    return tuple(_tower('encoder', 'down', module, module.depth)) + tuple(
        _tower('decoder', 'up', module, module.depth + 1)) + tuple(
        rule for name in ('quant_conv', 'post_quant_conv') for rule in dense(name, name, CONV))


def _tower(name: str, way: str, module: AutoencoderKL, depth: int) -> Iterator[Rule]:
    yield from dense(f'{name}.conv_in', f'{name}/conv_in', CONV)
    for i in range(len(module.widths)):
        for j in range(depth):
            yield from _resnet(f'{name}.{way}_blocks.{i}.resnets.{j}', f'{name}/level_{i}/resnet_{j}')
        yield from dense(f'{name}.{way}_blocks.{i}.{way}samplers.0.conv', f'{name}/level_{i}/{way}sample', CONV)
    for j in range(2):
        yield from _resnet(f'{name}.mid_block.resnets.{j}', f'{name}/middle/resnet_{j}')
    yield from _attention(f'{name}.mid_block.attentions.0', f'{name}/middle/attention')
    yield from norm(f'{name}.conv_norm_out', f'{name}/norm_out')
    yield from dense(f'{name}.conv_out', f'{name}/conv_out', CONV)


def _resnet(torch: str, flax: str) -> Iterator[Rule]:
    for i in (1, 2):
        yield from norm(f'{torch}.norm{i}', f'{flax}/norm{i}')
        yield from dense(f'{torch}.conv{i}', f'{flax}/conv{i}', CONV)
    yield from dense(f'{torch}.conv_shortcut', f'{flax}/shortcut', CONV)


def _attention(torch: str, flax: str) -> Iterator[Rule]:
    yield from norm(f'{torch}.group_norm', f'{flax}/norm')
    for theirs, ours in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj')):
        yield from dense(f'{torch}.{theirs}', f'{flax}/{ours}', linear())
