"""`transformers.GPT2*` <-> `models.gpt2.GPT2`."""
from collections.abc import Mapping
from typing import Any

from rlhf_jax.convert import settings
from rlhf_jax.convert.settings import Setting
from rlhf_jax.models.gpt2 import GPT2 as MODULE
from rlhf_jax.weights.rules import Fixed, Rule, Tied, conv1d, dense, linear, norm

PREFIX = 'transformer.'

RULES = (
    Rule('wte.weight', 'embed'),
    Rule('wpe.weight', 'pos_embed'),
    *norm('h.{i}.ln_1', 'blocks/attn_norm'),
    *dense('h.{i}.attn.c_attn', 'blocks/attn/qkv', conv1d()),
    *dense('h.{i}.attn.c_proj', 'blocks/attn/o', conv1d(2)),
    *norm('h.{i}.ln_2', 'blocks/mlp_norm'),
    *dense('h.{i}.mlp.c_fc', 'blocks/mlp/up', conv1d()),
    *dense('h.{i}.mlp.c_proj', 'blocks/mlp/down', conv1d()),
    *norm('ln_f', 'norm'),
    Fixed('h.{i}.attn.bias'),  # the causal mask of old checkpoints
    Fixed('h.{i}.attn.masked_bias'),
)
RENAMED: dict[str, str] = {}
ANY_HEAD = (Tied('lm_head.weight', 'wte.weight'),)

_SETTINGS = (
    Setting('vocab_size', 'vocab_size'), Setting('width', 'n_embd'), Setting('depth', 'n_layer'),
    Setting('num_heads', 'n_head'), Setting('max_length', 'n_positions', 1024),
    Setting('tied', 'tie_word_embeddings', True, 'bool'),
    Setting('activation', 'activation_function', 'gelu_new', 'activation'),
    Setting('eps', 'layer_norm_epsilon', 1e-5, 'real'), Setting('init_std', 'initializer_range', 0.02, 'real'))


def head_rules(module: MODULE) -> tuple[Rule | Tied, ...]:
    """Rules of the output head."""
    return ANY_HEAD if module.tied else (Rule('lm_head.weight', 'lm_head/kernel', linear()),)


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    for name, only in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
                       ('add_cross_attention', False)):
        if config.get(name, only) != only:
            raise ValueError(f'convert: config has {name}={config[name]!r}, but only {only!r} is supported')
    fields = settings.fields_of(config, _SETTINGS)
    hidden = settings.checked('n_inner', config.get('n_inner') or 4 * fields['width'], 'size')
    return fields | {'hidden': hidden}


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module."""
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], **settings.config_of(module, _SETTINGS),
            'n_inner': module.hidden or 4 * module.width, 'n_ctx': module.max_length}
