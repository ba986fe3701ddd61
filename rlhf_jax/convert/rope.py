"""Rotary settings of a `config.json`: top-level keys and `rope_scaling` in transformers 4, `rope_parameters` in 5."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.layers import RopeScaling


def rope_fields(config: Mapping[str, Any], *, base_name: str = 'rope_theta') -> dict[str, Any]:
    """`rope_base` and `rope_scaling` of the module, and `rotary_fraction` where `rope_parameters` has it.

    Args:
        base_name: top-level key of the base in transformers 4.

    Raises:
        ValueError: a kind of scaling that the modules do not have, or one without its factor.
    """
    settings = dict(config.get('rope_scaling') or {}) | dict(config.get('rope_parameters') or {})
    base = settings.get('rope_theta', config.get(base_name, config.get('rope_theta', 10000.0)))
    fields: dict[str, Any] = {'rope_base': float(base), 'rope_scaling': None}
    if 'partial_rotary_factor' in settings:
        fields['rotary_fraction'] = settings['partial_rotary_factor']
    kind = settings.get('rope_type', settings.get('type', 'default'))
    if kind in ('linear', 'llama3'):
        needed = ('factor',) if kind == 'linear' else (
            'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
        for name in needed:
            if name not in settings:
                raise ValueError(f'convert: rope scaling of type {kind!r} without {name}')
        values = [float(settings[name]) for name in needed[:3]]
        original = {'original_length': settings[needed[3]]} if kind == 'llama3' else {}
        fields['rope_scaling'] = RopeScaling(kind, *values, **original)
    elif kind != 'default':
        raise ValueError(f"convert: rope scaling of type {kind!r}; 'default', 'linear' and 'llama3' are supported")
    return fields


def rope_settings(module: Any, *, base_name: str = 'rope_theta') -> dict[str, Any]:
    """The keys of transformers 4, which transformers 5 reads as well."""
    scaling = module.rope_scaling
    if scaling is None:
        return {base_name: module.rope_base, 'rope_scaling': None}
    settings: dict[str, Any] = {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind == 'llama3':
        settings |= {'low_freq_factor': scaling.low_freq_factor, 'high_freq_factor': scaling.high_freq_factor,
                     'original_max_position_embeddings': scaling.original_length}
    return {base_name: module.rope_base, 'rope_scaling': settings}
