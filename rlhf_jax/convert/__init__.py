"""Language models of `transformers` <-> flax modules and parameters, one file an architecture.

    module, params = from_torch('llama', state_dict, config=json.load(open('config.json')))
    state_dict, config = to_torch('llama', module, params), config_of('llama', module)

Models larger than memory: `files.load_state_dict` maps tensors rather than reading them, `shardings` puts each into its
shards as it is read, and `tensors` makes them one by one on the way out.

`config` is the `config.json` beside the weights, as transformers 4 or 5 writes it. The tensors say what the model is: a
`score` head (sequence classification: reward models, value functions) makes a `heads.RewardModel`, TRL's `v_head` a
`heads.PolicyAndValue`, and else it is the language model itself. Adapters of PEFT are in `peft.py`.

The mapping is total: a missing, unknown, wrongly shaped or non-finite tensor is an error that names it and its file
(`rules.py`).
"""
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_jax.models import heads
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import Rule, dense, linear
from rlhf_jax.weights.state_dict import Renamed, without_prefixes

KINDS = ('gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3')  # each is a file beside this one

# Of TRL's models with a value head, and of those of arXiv 2403.17031.
_WRAPPERS = ('pretrained_model.', 'lm_backbone.')
_SCORE = dense('score', 'score_head', linear())
_VALUE = dense('v_head.summary', 'value_head', linear())
_RENAMED_HEAD = {'scalar_head.weight': 'score.weight', 'scalar_head.bias': 'score.bias'}


def from_torch(kind: str, state_dict: Mapping[str, Any], *, config: Mapping[str, Any],
               shardings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
               **fields: Any) -> tuple[Any, dict[str, Any]]:
    """The module that `state_dict` belongs to and its parameters, in `param_dtype` (a field; float32 by default).

    Args:
        kind: one of `KINDS`.
        state_dict: {name: numpy array or PyTorch tensor}, or a mapping that reads tensors when asked for them.
        config: the model's `config.json`.
        shardings: a function from the parameters' shapes (nested dict of `ShapeDtypeStruct`) to a nested dict of
            shardings: the parameters are jax arrays, written shard by shard. None: numpy arrays.
        **fields: fields of the module beside those that `config` gives, `dtype` and the like.

    Raises:
        ValueError: unknown kind, a setting in `config` that the model does not have, or a tensor that does not fit.
    """
    file, backbone = _file(kind), module_of(kind, config, **fields)
    module: Any
    state_dict = Renamed(state_dict, lambda name: _short_name(name, file))
    if 'score.weight' in state_dict:
        module = heads.RewardModel(backbone, use_bias='score.bias' in state_dict)
        # A language model's own head, which some reward models carry along, is never read.
        unused = tuple(rules.Fixed(rule.torch) for rule in file.head_rules(backbone))
        table = (*_SCORE, *_nested(file.RULES), *unused)
    elif 'v_head.summary.weight' in state_dict:
        module, table = heads.PolicyAndValue(backbone), (*_VALUE, *_nested(file.RULES + file.head_rules(backbone)))
    else:
        module, table = backbone, file.RULES + file.head_rules(backbone)
    return module, rules.to_flax(state_dict, table, _shapes_of(module), shardings=shardings)


def module_of(kind: str, config: Mapping[str, Any], **fields: Any) -> Any:
    """The language model of `config`, a `config.json`, without weights; `fields` as of `from_torch`.

    Raises:
        ValueError: unknown kind, or a setting that the model does not have.
    """
    file = _file(kind)
    if config.get('quantization_config'):
        raise ValueError('convert: config has a quantization_config; give the weights before they were quantised')
    return file.MODULE(**file.fields_of(config) | fields)


def to_torch(kind: str, module: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of `module` with `params` under the names of `transformers` (or TRL): float32 numpy arrays; what
    is laid out alike is a view of a numpy parameter, the rest a copy."""
    return dict(tensors(kind, module, params))


def tensors(kind: str, module: Any, params: Mapping[str, Any], *, dtype: Any = np.float32,
            tied: bool = True) -> Renamed:
    """The state dict of `to_torch`, each tensor made when it is asked for, in `dtype`.

    Args:
        tied: with a head that is the embedding table once more, as a PyTorch module has it; files do without.
    """
    file = _file(kind)
    table, outer = _tables(file, module)
    return Renamed(rules.Tensors(params, table, dtype, tied=tied), lambda name: _long_name(name, file, outer))


def tensor_shapes(kind: str, module: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the state dict of `module`; nothing is computed."""
    return {name: tuple(spec.shape) for name, spec in tensors(kind, module, _shapes_of(module)).specs.items()}


def config_of(kind: str, module: Any) -> dict[str, Any]:
    """The `config.json` with which transformers 4 and 5 build the same model."""
    backbone = getattr(module, 'backbone', module)
    config = _file(kind).config_of(backbone)
    if isinstance(module, heads.RewardModel):
        config |= {'architectures': [config['architectures'][0].replace('ForCausalLM', 'ForSequenceClassification')
                                     .replace('LMHeadModel', 'ForSequenceClassification')], 'num_labels': 1}
    return config


def _file(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise ValueError(f'convert: kind={kind!r} is not one of {KINDS}')
    return importlib.import_module(f'{__name__}.{kind}')


def _shapes_of(module: Any) -> dict[str, Any]:
    return rules.param_shapes(module, np.zeros((1, 1), np.int32))


def _short_name(name: str, file: ModuleType) -> str:
    name = without_prefixes(name, (*_WRAPPERS, file.PREFIX))
    return (_RENAMED_HEAD | file.RENAMED).get(name, name)


def _long_name(name: str, file: ModuleType, outer: str) -> str:
    if name.startswith('v_head.'):
        return name
    outside = name.startswith('score.') or name in {rule.torch for rule in file.ANY_HEAD}
    return outer + ('' if outside else file.PREFIX) + name


def _tables(file: ModuleType, module: Any) -> tuple[rules.Rules, str]:
    """Rules that write `module`, and what precedes all names but those of the scalar head."""
    if isinstance(module, heads.RewardModel):
        return (*_nested(file.RULES), *_SCORE), ''
    if isinstance(module, heads.PolicyAndValue):
        return (*_nested(file.RULES + file.head_rules(module.backbone)), *_VALUE), 'pretrained_model.'
    return file.RULES + file.head_rules(module), ''


def _nested(table: rules.Rules) -> tuple[Any, ...]:
    """Rules of a backbone -> of a model that holds it."""
    return tuple(rule._replace(flax=f'backbone/{rule.flax}') if isinstance(rule, Rule) else rule for rule in table)
