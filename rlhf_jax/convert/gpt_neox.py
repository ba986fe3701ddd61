"""`transformers.GPTNeoX*` (Pythia) <-> `models.gpt_neox.GPTNeoX`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert.rope import rope_fields, rope_settings
from rlhf_jax.convert.rules import Fixed, Rule, Tied, dense, linear, norm
from rlhf_jax.models.gpt_neox import GPTNeoX as MODULE

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

_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
                'relu': 'relu', 'silu': 'silu'}


def head_rules(module: MODULE) -> tuple[Rule | Tied, ...]:
    """Rules of the output head."""
    return ANY_HEAD if module.tied else (Rule('embed_out.weight', 'lm_head/kernel', linear()),)


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    activation = config.get('hidden_act', 'gelu')
    if activation not in _ACTIVATIONS:
        raise ValueError(f'convert: config has hidden_act={activation!r}, not one of {sorted(_ACTIVATIONS)}')
    rope = rope_fields(config, base_name='rotary_emb_base')
    return dict(
        vocab_size=config['vocab_size'], width=config['hidden_size'], depth=config['num_hidden_layers'],
        num_heads=config['num_attention_heads'], hidden=config['intermediate_size'],
        max_length=config.get('max_position_embeddings', 2048),
        rotary_fraction=rope.pop('rotary_fraction', config.get('rotary_pct', 0.25)), **rope,
        parallel=config.get('use_parallel_residual', True), attention_bias=config.get('attention_bias', True),
        tied=config.get('tie_word_embeddings', False), activation=_ACTIVATIONS[activation],
        eps=config.get('layer_norm_eps', 1e-5), init_std=config.get('initializer_range', 0.02))


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module."""
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        'model_type': 'gpt_neox', 'architectures': ['GPTNeoXForCausalLM'], 'vocab_size': module.vocab_size,
        'hidden_size': module.width, 'num_hidden_layers': module.depth, 'num_attention_heads': module.num_heads,
        'intermediate_size': module.hidden or 4 * module.width, 'max_position_embeddings': module.max_length,
        'rotary_pct': module.rotary_fraction, **rope_settings(module, base_name='rotary_emb_base'),
        'use_parallel_residual': module.parallel, 'attention_bias': module.attention_bias,
        'tie_word_embeddings': module.tied, 'hidden_act': activations[module.activation],
        'layer_norm_eps': module.eps, 'initializer_range': module.init_std}
