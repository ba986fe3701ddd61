"""`transformers.Llama*` <-> `models.llama.Llama`, and what `qwen2.py`, `qwen3.py` and `mistral.py` share with it."""
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.convert import settings
from rlhf_jax.convert.rope import rope_fields, rope_settings
from rlhf_jax.convert.settings import COMMON, Setting
from rlhf_jax.models.llama import Llama as MODULE
from rlhf_jax.weights.rules import Fixed, Rule, Tied, dense, linear

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

# Of all relatives; what an absent key means differs for some.
SETTINGS = (
    *COMMON, Setting('num_kv_heads', 'num_key_value_heads', 0, 'count'), Setting('head_dim', 'head_dim', 0, 'count'),
    Setting('activation', 'hidden_act', 'silu', 'activation'), Setting('eps', 'rms_norm_eps', 1e-6, 'real'))
_SETTINGS = (*SETTINGS, Setting('attention_bias', 'attention_bias', False, 'bool'),
             Setting('mlp_bias', 'mlp_bias', False, 'bool'))
# What LLaMA does without; a relative has some of it.
_WITHOUT = dict(causal=True, window=0, attention_bias=False, qkv_bias=False, mlp_bias=False, qk_norm=False)


def head_rules(module: MODULE) -> tuple[Rule | Tied, ...]:
    """Rules of the output head."""
    return ANY_HEAD if module.tied else (Rule('lm_head.weight', 'lm_head/kernel', linear()),)


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the module that `config.json` gives.

    Raises:
        ValueError: a setting that the module does not have.
    """
    return relative_fields(config, _SETTINGS)


def config_of(module: MODULE) -> dict[str, Any]:
    """`config.json` of the module.

    Raises:
        ValueError: a model that is not LLaMA's.
    """
    return relative_config(module, _SETTINGS, 'llama', 'LlamaForCausalLM', ('attention_bias', 'mlp_bias'))


# ---- For the relatives -----------------------------------------------------------------------------------------------

def relative_fields(config: Mapping[str, Any], table: Sequence[Setting]) -> dict[str, Any]:
    """Fields that `table` and the rotary settings give.

    Raises:
        ValueError: a setting that the module does not have.
    """
    fields = settings.fields_of(config, table) | rope_fields(config)
    if fields.pop('rotary_fraction', 1.0) != 1.0:
        raise ValueError('convert: config has a partial_rotary_factor; this family rotates whole heads')
    return fields | {'num_kv_heads': fields['num_kv_heads'] or fields['num_heads'],
                     'head_dim': fields['head_dim'] or fields['width'] // fields['num_heads']}


def relative_config(module: MODULE, table: Sequence[Setting], kind: str, architecture: str,
                    has: Sequence[str]) -> dict[str, Any]:
    """Keys that `table` and the rotary settings give.

    Args:
        has: fields of `_WITHOUT` that this family has; `table` or the caller writes them.

    Raises:
        ValueError: the module has what the family has not.
    """
    for field, value in _WITHOUT.items():
        if field not in has and getattr(module, field) != value:
            raise ValueError(f'convert: transformers has no {kind} with {field}={getattr(module, field)!r}')
    return {'model_type': kind, 'architectures': [architecture], **settings.config_of(module, table),
            'num_key_value_heads': module.num_kv_heads or module.num_heads,
            'head_dim': module.head_dim or module.width // module.num_heads, **rope_settings(module)}


def window_of(config: Mapping[str, Any], window: Any, layers_before: int = 0) -> int:
    """The window of all layers, 0 for none.

    Args:
        window: tokens, what `config` says of the layers that have one; None: no layer has.
        layers_before: so many of the first layers have none, where `layer_types` does not tell.

    Raises:
        ValueError: some layers have one and some not, or attend in another way.
    """
    depth = settings.checked('num_hidden_layers', config.get('num_hidden_layers'), 'size')
    kinds = config.get('layer_types')
    if kinds is None:
        few = min(layers_before, depth) if window is not None else depth
        kinds = {'full_attention'} if few == depth else {'sliding_attention'} if few == 0 else {'full_attention', ''}
    if not isinstance(kinds, (list, set)) or len({str(kind) for kind in kinds}) != 1:
        raise ValueError('convert: config has a sliding window in some layers only (max_window_layers, layer_types); '
                         'all or none are supported')
    kind, = {str(kind) for kind in kinds}
    if kind not in ('full_attention', 'sliding_attention'):
        raise ValueError(f'convert: config has layer_types of {kind!r:.60}; full_attention and sliding_attention are '
                         'supported')
    return settings.checked('sliding_window', window, 'size') if kind == 'sliding_attention' else 0
