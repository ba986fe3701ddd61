"""`transformers.Mistral*` <-> `models.llama.Llama`."""
from collections.abc import Mapping
from typing import Any

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

# What an absent key means; a null `sliding_window` is none.
_DEFAULTS = {'max_position_embeddings': 4096 * 32, 'num_key_value_heads': 8, 'sliding_window': 4096}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    config = _DEFAULTS | dict(config)
    return relative_fields(config, SETTINGS) | {'window': window_of(config, config['sliding_window'])}


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module.

    Raises:
        ValueError: a model that is not Mistral's.
    """
    return relative_config(module, SETTINGS, 'mistral', 'MistralForCausalLM', ('window',)) | {
        'sliding_window': module.window or None}
