"""`transformers.Llama*` <-> `models.llama.Llama`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert import settings
from rlhf_jax.convert.rope import rope_fields, rope_settings
from rlhf_jax.weights.rules import Fixed, Rule, Tied, dense, linear
from rlhf_jax.convert.settings import COMMON, Setting
from rlhf_jax.models.llama import Llama as MODULE

PREFIX = 'model.'

RULES = (
    Rule('embed_tokens.weight', 'embed'),
    Rule('layers.{i}.input_layernorm.weight', 'blocks/attn_norm/scale'),
    *(rule for x in 'qkv' for rule in dense(f'layers.{{i}}.self_attn.{x}_proj', f'blocks/attn/{x}', linear())),
    *dense('layers.{i}.self_attn.o_proj', 'blocks/attn/o', linear(2)),
    Rule('layers.{i}.post_attention_layernorm.weight', 'blocks/mlp_norm/scale'),
    *(rule for x in ('gate', 'up', 'down')
      for rule in dense(f'layers.{{i}}.mlp.{x}_proj', f'blocks/mlp/{x}', linear())),
    Rule('norm.weight', 'norm/scale'),
    Fixed('layers.{i}.self_attn.rotary_emb.inv_freq'),  # the angles of old checkpoints
    Fixed('rotary_emb.inv_freq'),
)
RENAMED: dict[str, str] = {}
ANY_HEAD = (Tied('lm_head.weight', 'embed_tokens.weight'),)

_SETTINGS = (
    *COMMON, Setting('num_kv_heads', 'num_key_value_heads', 0), Setting('head_dim', 'head_dim', 0),
    Setting('attention_bias', 'attention_bias', False), Setting('mlp_bias', 'mlp_bias', False),
    Setting('activation', 'hidden_act', 'silu'), Setting('eps', 'rms_norm_eps', 1e-6))


def head_rules(module: MODULE) -> tuple[Rule | Tied, ...]:
    """Rules of the output head."""
    return ANY_HEAD if module.tied else (Rule('lm_head.weight', 'lm_head/kernel', linear()),)


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    fields = settings.fields_of(config, _SETTINGS) | rope_fields(config)
    return fields | {'num_kv_heads': fields['num_kv_heads'] or fields['num_heads']}


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module.

    Raises:
        ValueError: a model that is not causal; transformers has none.
    """
    if not module.causal:
        raise ValueError('convert: transformers has no LLaMA without the causal mask')
    return {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], **settings.config_of(module, _SETTINGS),
            'num_key_value_heads': module.num_kv_heads or module.num_heads,
            'head_dim': module.head_dim or module.width // module.num_heads, **rope_settings(module)}
