"""LLaDA (arXiv 2502.09992; GSAI-ML/LLaDA-8B-Base and -Instruct, and the text-to-code model made of it) <-> `Llama`.

    module, params = from_torch('llada', load_state_dict(folder), config=read_config(folder))
    logits = module.apply({'params': params}, tokens)                                   # [B, T, vocab_size]

The network is LLaMA without the causal mask, under the names of OLMo's code. The originals never look at an attention
mask: padding is attended there, so rows agree with them only without padding, or called without `mask`.
"""
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.models.llama import Llama
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import Fixed, Rule, linear
from rlhf_jax.weights.state_dict import Renamed, shape_of, without_prefixes

PREFIXES = ('model.', 'transformer.')

_TOP, _BLOCK = 'model.transformer.', 'model.transformer.blocks.{i}.'
_RULES: rules.Rules = (
    Rule(_TOP + 'wte.weight', 'embed'),
    Rule(_BLOCK + 'attn_norm.weight', 'blocks/attn_norm/scale'),
    *(Rule(f'{_BLOCK}{x}_proj.weight', f'blocks/attn/{x}/kernel', linear()) for x in 'qkv'),
    Rule(_BLOCK + 'attn_out.weight', 'blocks/attn/o/kernel', linear(2)),
    Rule(_BLOCK + 'ff_norm.weight', 'blocks/mlp_norm/scale'),
    Rule(_BLOCK + 'ff_proj.weight', 'blocks/mlp/gate/kernel', linear()),
    Rule(_BLOCK + 'up_proj.weight', 'blocks/mlp/up/kernel', linear()),
    Rule(_BLOCK + 'ff_out.weight', 'blocks/mlp/down/kernel', linear()),
    Rule(_TOP + 'ln_f.weight', 'norm/scale'),
    Rule(_TOP + 'ff_out.weight', 'lm_head/kernel', linear()),  # absent, as the parameter, where the weights are tied
    Fixed(_BLOCK + 'rotary_emb.inv_freq'),
)

# What the config may say, beside the sizes: the one architecture that was released. What is absent has its value there.
_ARCHITECTURE = {
    'block_type': 'llama', 'block_group_size': 1, 'activation_type': 'silu', 'layer_norm_type': 'rms',
    'layer_norm_with_affine': True, 'attention_layer_norm': False, 'bias_for_layer_norm': False, 'include_bias': False,
    'include_qkv_bias': False, 'input_emb_norm': False, 'rope': True, 'rope_full_precision': True, 'alibi': False,
    'scale_logits': False}


def from_torch(state_dict: Mapping[str, Any], *, config: Mapping[str, Any], shardings: Any = None,
               **fields: Any) -> tuple[Llama, dict[str, Any]]:
    """The module and its parameters, in `param_dtype` (a field; float32 by default).

    Args:
        state_dict: {name: numpy array or PyTorch tensor}, or a mapping that reads tensors when asked for them.
        config: the `config.json` beside the weights. The size of the vocabulary is read from the tensors: of a model
            with added tokens the config keeps the old `embedding_size`.
        shardings: a function from the parameters' shapes (nested dict of `ShapeDtypeStruct`) to a nested dict of
            shardings: the parameters are jax arrays, written shard by shard. None: numpy arrays.
        **fields: fields of the module beside those that `config` gives, `dtype` and the like.

    Raises:
        ValueError: a setting that the module does not have, or a tensor that does not fit.
    """
    state_dict = Renamed(state_dict, lambda name: _TOP + without_prefixes(name, PREFIXES))
    rows, _ = shape_of(state_dict, f'{_TOP}wte.weight', 2)
    module = Llama(**fields_of(config) | {'vocab_size': rows} | fields)
    return module, rules.to_flax(state_dict, _RULES, shapes_of(module), shardings=shardings)


def shapes_of(module: Llama) -> dict[str, Any]:
    """Shapes of the parameters."""
    return rules.param_shapes(module, np.zeros((1, 1), np.int32))


def rules_of(module: Llama) -> rules.Rules:
    """Both directions; the same for every size."""
    return _RULES


def config_of(module: Llama) -> dict[str, Any]:
    """The `config.json` with which the original's code builds the same model.

    Raises:
        ValueError: a module that is not LLaDA.
    """
    for field, value in (('causal', False), ('attention_bias', False), ('mlp_bias', False), ('rope_scaling', None),
                         ('activation', 'silu')):
        if getattr(module, field) != value:
            raise ValueError(f'convert: LLaDA has {field}={value!r}, this module {getattr(module, field)!r}')
    if module.head_dim not in (0, module.width // module.num_heads):
        raise ValueError(f'convert: LLaDA has heads as wide as width / num_heads, not head_dim={module.head_dim}')
    return _ARCHITECTURE | {
        'model_type': 'llada', 'architectures': ['LLaDAModelLM'], 'vocab_size': module.vocab_size,
        'embedding_size': module.vocab_size, 'd_model': module.width, 'n_layers': module.depth,
        'n_heads': module.num_heads, 'n_kv_heads': module.num_kv_heads or module.num_heads,
        'mlp_hidden_size': module.hidden, 'max_sequence_length': module.max_length, 'rope_theta': module.rope_base,
        'rms_norm_eps': module.eps, 'init_std': module.init_std, 'weight_tying': module.tied}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that a `config.json` gives, all but the size of the vocabulary.

    Raises:
        ValueError: a key that is missing, or a setting that the module does not have.
    """
    for name, value in _ARCHITECTURE.items():
        if config.get(name, value) != value:
            raise ValueError(f'convert: config has {name}={config[name]!r}; only {value!r} was released')
    for name in ('d_model', 'n_heads', 'n_layers', 'max_sequence_length', 'rope_theta'):
        if name not in config:
            raise ValueError(f'convert: config has no {name}')
    width, heads = config['d_model'], config['n_heads']
    kv_heads = config.get('n_kv_heads') or (1 if config.get('multi_query_attention') else heads)
    return dict(width=width, depth=config['n_layers'], num_heads=heads,
                num_kv_heads=0 if kv_heads == heads else kv_heads,
                hidden=config.get('mlp_hidden_size') or config['mlp_ratio'] * width,
                max_length=config['max_sequence_length'], rope_base=config['rope_theta'], causal=False,
                tied=config.get('weight_tying', False), eps=config.get('rms_norm_eps', 1e-5),
                init_std=config.get('init_std', 0.02))
