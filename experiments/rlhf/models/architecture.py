"""The language models that a config's `model` describes: module, partition rules, fresh parameters."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.runtime import checks, modules, partition
from rlhf_jax.models import gpt2, gpt_neox, heads, layers, llama, lora, mistral, qwen2, qwen3

Params = dict[str, Any]
Config = ml_collections.ConfigDict

KINDS = {'gpt2': (gpt2, gpt2.GPT2), 'gpt_neox': (gpt_neox, gpt_neox.GPTNeoX), 'llama': (llama, llama.Llama),
         'mistral': (mistral, llama.Llama), 'qwen2': (qwen2, llama.Llama), 'qwen3': (qwen3, llama.Llama)}
FROM_WEIGHTS = 'weights'  # a `model.size`: fields are those of `config.weights`, see `loading.complete`
# Fields of a `model` config that are 0 or '' where the size decides.
_OF_SIZE = ('vocab_size', 'width', 'depth', 'num_heads', 'num_kv_heads', 'head_dim', 'hidden', 'max_length',
            'activation', 'eps', 'tied', 'attention_bias', 'qkv_bias', 'mlp_bias', 'qk_norm', 'parallel', 'window',
            'rope_base', 'rotary_fraction', 'rope_scaling')
_SWITCHES = {'yes': True, 'no': False}  # how a config says a bool that may also be left to the size
_ALL_TOKENS = -1  # `model.window` of a model without one
# How a model computes, not what it computes: may differ from the config of the weights.
_MANNER = ('dtype', 'param_dtype', 'remat', 'unroll', 'attention_impl', 'stacked', 'init_std', 'parent', 'name')
# What 0 stands for in a field.
_IMPLIED = {'hidden': lambda m: 4 * m.width, 'num_kv_heads': lambda m: m.num_heads,
            'head_dim': lambda m: m.width // m.num_heads}


def family(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """(file, class) that `model.kind` names.

    Raises:
        ValueError: another kind.
    """
    checks.choice('model.kind', model['kind'], KINDS)
    return KINDS[model['kind']]


def family_name(module: Any) -> str:
    """The first `model.kind` of which a decoder is; relatives of LLaMA share module and partition rules with it."""
    return next(kind for kind, (_, cls) in KINDS.items() if isinstance(module, cls))


def decoder(model: Mapping[str, Any]) -> Any:
    """The decoder that a `model` config describes.

    Raises:
        ValueError: an unknown kind, size, activation or field, or fields that are yet to be read from `weights`.
    """
    file, cls = family(model)
    fields = {name: value for name, value in dict(model).items() if name != 'kind' and name not in unset(model)}
    if fields['size'] == FROM_WEIGHTS and set(_OF_SIZE) & set(cls.__dataclass_fields__) & set(unset(model)):
        raise ValueError("model.size='weights': weights is empty; name the folder that says what the model is")
    for name, value in fields.items():
        if name in cls.__dataclass_fields__ and cls.__dataclass_fields__[name].type is bool and isinstance(value, str):
            checks.choice(f'model.{name}', value, _SWITCHES)
            fields[name] = _SWITCHES[value]
    if 'activation' in fields:
        checks.choice('model.activation', fields['activation'], layers.ACTIVATIONS)
    if fields.get('window') == _ALL_TOKENS:
        fields['window'] = 0
    if 'rope_scaling' in fields:
        scaling = dict(fields['rope_scaling'])
        fields['rope_scaling'] = None if scaling['kind'] == 'none' else layers.RopeScaling(**scaling)
    return modules.build(cls, {**file.SIZES, FROM_WEIGHTS: {}}, fields)


def unset(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of a `model` config that leave it to the size."""
    def left(value: Any) -> bool:
        value = value['kind'] if isinstance(value, Mapping) or hasattr(value, 'to_dict') else value
        return value is None or not (value or isinstance(value, bool))
    return tuple(name for name in _OF_SIZE if name in model and left(model[name]))


def fill(model: Config, module: Any) -> None:
    """Sets the fields that a `model` config leaves open to those of `module`."""
    for name in unset(model):
        if name not in module.__dataclass_fields__:
            continue
        value = getattr(module, name)
        if isinstance(value, bool):
            value = 'yes' if value else 'no'
        elif name == 'window':
            value = value or _ALL_TOKENS
        elif name == 'rope_scaling':
            value = {'kind': 'none'} if value is None else dataclasses.asdict(value)
        elif name in _IMPLIED:
            value = _meant(module, name)
        if isinstance(value, dict):
            model[name].update(value)
        else:
            model[name] = value


def reward_model(model: Mapping[str, Any]) -> heads.RewardModel:
    return heads.RewardModel(decoder(model))


def rules(model: Mapping[str, Any], prefix: str = '') -> partition.Rules:
    """Partition rules of the decoder, its adapter and scalar heads; `prefix`: where the decoder's parameters sit."""
    decoder_rules = family(model)[0].PARTITION_RULES
    decoder_rules = partition.prefixed(prefix, decoder_rules) if prefix else decoder_rules
    return (*lora.PARTITION_RULES, (r'(.*/)?(score|value)_head/.*', jax.sharding.PartitionSpec()), *decoder_rules)


def init_decoder(config: Config) -> Callable[[jax.Array], Params]:
    """key -> fresh parameters, with an adapter where `config.lora.rank` is set."""
    module = decoder(config.model)

    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        return with_adapter(config, params, jax.random.fold_in(key, 1))
    return init


def with_adapter(config: Config, params: Params, key: jax.Array) -> Params:
    """Adds an adapter drawn from `key` to the parameters of a decoder or reward model if `config.lora.rank` is set."""
    if not config.lora.rank:
        return params
    module = reward_model(config.model) if 'backbone' in params else decoder(config.model)
    targets = tuple(config.lora.targets) or family(config.model)[0].LORA_TARGETS
    return lora.init(key, module, params, rank=config.lora.rank, alpha=config.lora.alpha, targets=targets)


def _meant(module: Any, name: str) -> Any:
    value = getattr(module, name, None)
    return _IMPLIED[name](module) if name in _IMPLIED and not value else value


def check_same(path: Any, theirs: Any, ours: Any, field: str = 'weights') -> None:
    """Raises a ValueError unless both decoders are the same but for how they compute; `field`: which names `path`."""
    for name in type(ours).__dataclass_fields__:
        if name in _MANNER:
            continue
        a, b = (_meant(module, name) for module in (ours, theirs))
        if a != b and not (isinstance(a, float) and isinstance(b, (int, float)) and np.isclose(a, b, rtol=1e-6)):
            raise ValueError(f'model.{name}={a!r}, but {field}={path} have {b!r}')
