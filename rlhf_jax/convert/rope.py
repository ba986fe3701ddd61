"""Rotary settings of a `config.json`: top-level keys and `rope_scaling` in transformers 4, `rope_parameters` in 5."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert.settings import checked
from rlhf_jax.models.layers import RopeScaling

_NEEDED = {'default': (), 'linear': ('factor',),
           'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')}


def rope_fields(config: Mapping[str, Any], *, base_name: str = 'rope_theta') -> dict[str, Any]:
    """`rope_base` and `rope_scaling` of the module, and `rotary_fraction` where `config` has a `partial_rotary_factor`.

    Args:
        base_name: top-level key of the base in transformers 4.

    Raises:
        ValueError: a kind of scaling that the modules do not have, or one without its factor.
    """
    parts = {name: config[name] for name in ('rope_scaling', 'rope_parameters') if config.get(name)}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f'convert: config has {name}={part!r:.60}, not an object')
    if len({str(part.get('rope_type', part.get('type', 'default'))) for part in parts.values()}) > 1:
        raise ValueError('convert: config has rope_scaling and rope_parameters of different types; leave out one')
    given = {key: value for part in parts.values() for key, value in part.items()}
    if any(isinstance(value, (Mapping, list)) for value in given.values()):
        raise ValueError(f'convert: config has rotary settings of parts of the model ({", ".join(map(str, given))}); '
                         'one for all of it is supported')
    base = given.get('rope_theta', config.get(base_name, config.get('rope_theta')))
    fields: dict[str, Any] = {
        'rope_base': float(checked(base_name, 10000.0 if base is None else base, 'real')), 'rope_scaling': None}
    fraction = given.get('partial_rotary_factor', config.get('partial_rotary_factor'))
    if fraction is not None:
        fields['rotary_fraction'] = checked('partial_rotary_factor', fraction, 'share')
    kind = given.get('rope_type', given.get('type', 'default'))
    if kind not in _NEEDED:
        raise ValueError(f"convert: rope scaling of type {kind!r:.60}; 'default', 'linear' and 'llama3' are supported")
    for name in _NEEDED[kind]:
        if name not in given:
            raise ValueError(f'convert: rope scaling of type {kind!r} without {name}')
    numbers = [checked(name, given[name], 'size' if name.startswith('original') else 'real') for name in _NEEDED[kind]]
    if kind == 'linear':
        fields['rope_scaling'] = RopeScaling('linear', float(numbers[0]))
    elif kind == 'llama3':
        factor, low, high = map(float, numbers[:3])
        fields['rope_scaling'] = RopeScaling('llama3', factor, low, high, original_length=numbers[3])
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
