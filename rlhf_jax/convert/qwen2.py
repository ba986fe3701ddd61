"""`transformers.Qwen2*` (Qwen2 and Qwen2.5) <-> `models.llama.Llama`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert import settings
from rlhf_jax.convert.llama import (
    ANY_HEAD,
    MODULE,
    PREFIX,
    RENAMED,
    RULES,
    SETTINGS,
    head_rules,
    relative_config,
    relative_fields,
    window_of,
)

__all__ = ['ANY_HEAD', 'MODULE', 'PREFIX', 'RENAMED', 'RULES', 'config_of', 'fields_of', 'head_rules']

_MAX_LENGTH = 32768  # where the config does not say
_WINDOW_FROM = 28  # layer, where the config does not say


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    return relative_fields(with_defaults(config), SETTINGS) | {'qkv_bias': True, 'window': qwen_window(config)}


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module.

    Raises:
        ValueError: a model that is not Qwen2's.
    """
    if not module.qkv_bias:
        raise ValueError('convert: transformers has no qwen2 without biases of query, key and value')
    return relative_config(module, SETTINGS, 'qwen2', 'Qwen2ForCausalLM', ('qkv_bias', 'window')) | window_keys(module)


# ---- For Qwen3 too ---------------------------------------------------------------------------------------------------

def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with what an absent key means in Qwen's configs.

    Raises:
        ValueError: no number of key-value heads, for which transformers' default fits no small model.
    """
    if 'num_key_value_heads' not in config:
        raise ValueError('convert: config has no num_key_value_heads')
    return {'max_position_embeddings': _MAX_LENGTH} | dict(config)


def qwen_window(config: Mapping[str, Any]) -> int:
    """The window of all layers, 0 for none; Qwen has one only where `use_sliding_window` says so."""
    used = settings.checked('use_sliding_window', config.get('use_sliding_window', False), 'bool')
    before = settings.checked('max_window_layers', config.get('max_window_layers', _WINDOW_FROM), 'count')
    return window_of(config, config.get('sliding_window', 4096) if used else None, before)


def window_keys(module: MODULE) -> dict[str, Any]:
    """Keys of the window."""
    return {'use_sliding_window': module.window > 0, 'sliding_window': module.window or None,
            'max_window_layers': 0 if module.window else module.depth}
