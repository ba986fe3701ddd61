"""`transformers.Llama*` <-> `models.llama.Llama`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert.rope import rope_fields, rope_settings
from rlhf_jax.convert.rules import Fixed, Rule, Tied, dense, linear
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

_ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu'}


def head_rules(module: MODULE) -> tuple[Rule | Tied, ...]:
    """Rules of the output head."""
    return ANY_HEAD if module.tied else (Rule('lm_head.weight', 'lm_head/kernel', linear()),)


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    activation = config.get('hidden_act', 'silu')
    if activation not in _ACTIVATIONS:
        raise ValueError(f'convert: config has hidden_act={activation!r}, not one of {sorted(_ACTIVATIONS)}')
    return dict(
        vocab_size=config['vocab_size'], width=config['hidden_size'], depth=config['num_hidden_layers'],
        num_heads=config['num_attention_heads'], hidden=config['intermediate_size'],
        num_kv_heads=config.get('num_key_value_heads') or config['num_attention_heads'],
        head_dim=config.get('head_dim') or 0, max_length=config.get('max_position_embeddings', 2048),
        **rope_fields(config), attention_bias=config.get('attention_bias', False),
        mlp_bias=config.get('mlp_bias', False), tied=config.get('tie_word_embeddings', False),
        activation=_ACTIVATIONS[activation], eps=config.get('rms_norm_eps', 1e-6),
        init_std=config.get('initializer_range', 0.02))


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module.

    Raises:
        ValueError: a model that is not causal; transformers has none.
    """
    if not module.causal:
        raise ValueError('convert: transformers has no LLaMA without the causal mask')
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'vocab_size': module.vocab_size,
        'hidden_size': module.width, 'num_hidden_layers': module.depth, 'num_attention_heads': module.num_heads,
        'num_key_value_heads': module.num_kv_heads or module.num_heads,
        'head_dim': module.head_dim or module.width // module.num_heads, 'intermediate_size': module.hidden,
        'max_position_embeddings': module.max_length, **rope_settings(module),
        'attention_bias': module.attention_bias, 'mlp_bias': module.mlp_bias, 'tie_word_embeddings': module.tied,
        'hidden_act': activations[module.activation], 'rms_norm_eps': module.eps, 'initializer_range': module.init_std}
