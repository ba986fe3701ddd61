"""`transformers.GPTNeoX*` (Pythia) <-> `models.gpt_neox.GPTNeoX`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert import settings
from rlhf_jax.convert.rope import rope_fields, rope_settings
from rlhf_jax.convert.settings import COMMON, Setting
from rlhf_jax.models.gpt_neox import GPTNeoX as MODULE
from rlhf_jax.weights.rules import Fixed, Rule, Tied, dense, linear, norm

PREFIX = 'gpt_neox.'

RULES = (
    Rule('embed_in.weight', 'embed'),
    *norm('layers.{i}.input_layernorm', 'blocks/attn_norm'),
    *dense('layers.{i}.attention.query_key_value', 'blocks/attn/qkv', linear()),
    *dense('layers.{i}.attention.dense', 'blocks/attn/o', linear(2)),
    *norm('layers.{i}.post_attention_layernorm', 'blocks/mlp_norm'),
    *dense('layers.{i}.mlp.dense_h_to_4h', 'blocks/mlp/up', linear()),
    *dense('layers.{i}.mlp.dense_4h_to_h', 'blocks/mlp/down', linear()),
    *norm('final_layer_norm', 'norm'),
    Fixed('layers.{i}.attention.bias'),  # the causal mask and the angles of old checkpoints
    Fixed('layers.{i}.attention.masked_bias'),
    Fixed('layers.{i}.attention.rotary_emb.inv_freq'),
    Fixed('rotary_emb.inv_freq'),
)
RENAMED = {'lm_head.weight': 'embed_out.weight'}  # in the memory of transformers 5; files have the old name
ANY_HEAD = (Tied('embed_out.weight', 'embed_in.weight'),)

_SETTINGS = (
    *COMMON, Setting('parallel', 'use_parallel_residual', True, 'bool'),
    Setting('attention_bias', 'attention_bias', True, 'bool'),
    Setting('activation', 'hidden_act', 'gelu', 'activation'), Setting('eps', 'layer_norm_eps', 1e-5, 'real'),
    Setting('rotary_fraction', 'rotary_pct', 0.25, 'share'))


def head_rules(module: MODULE) -> tuple[Rule | Tied, ...]:
    """Rules of the output head."""
    return ANY_HEAD if module.tied else (Rule('embed_out.weight', 'lm_head/kernel', linear()),)


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    return settings.fields_of(config, _SETTINGS) | rope_fields(config, base_name='rotary_emb_base')


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module."""
    return {'model_type': 'gpt_neox', 'architectures': ['GPTNeoXForCausalLM'], **settings.config_of(module, _SETTINGS),
            'intermediate_size': module.hidden or 4 * module.width,
            **rope_settings(module, base_name='rotary_emb_base')}
