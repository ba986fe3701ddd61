"""`transformers.Qwen3*`, dense <-> `models.llama.Llama`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert.llama import (
    ANY_HEAD,
    MODULE,
    PREFIX,
    RENAMED,
    SETTINGS,
    head_rules,
    relative_config,
    relative_fields,
)
from rlhf_jax.convert.llama import RULES as _LLAMA_RULES
from rlhf_jax.convert.qwen2 import qwen_window, window_keys, with_defaults
from rlhf_jax.convert.settings import Setting
from rlhf_jax.weights.rules import Rule

__all__ = ['ANY_HEAD', 'MODULE', 'PREFIX', 'RENAMED', 'RULES', 'config_of', 'fields_of', 'head_rules']

RULES = (*_LLAMA_RULES, *(Rule(f'layers.{{i}}.self_attn.{x}_norm.weight', f'blocks/attn/{x}_norm/scale') for x in 'qk'))
_SETTINGS = (*SETTINGS, Setting('attention_bias', 'attention_bias', False, 'bool'))
_HEAD_DIM = {'head_dim': 128}  # where the config does not say


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    config = _HEAD_DIM | with_defaults(config)
    return relative_fields(config, _SETTINGS) | {'qk_norm': True, 'window': qwen_window(config)}


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module.

    Raises:
        ValueError: a model that is not Qwen3's.
    """
    if not module.qk_norm:
        raise ValueError('convert: transformers has no qwen3 without norms of queries and keys')
    has = ('attention_bias', 'qk_norm', 'window')
    return relative_config(module, _SETTINGS, 'qwen3', 'Qwen3ForCausalLM', has) | window_keys(module)
