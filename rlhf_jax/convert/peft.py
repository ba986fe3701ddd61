"""LoRA adapters of PEFT <-> the leaves of `models.lora`.

    params = from_torch('llama', adapter_state_dict, module, params, config=json.load(open('adapter_config.json')))
    adapter_state_dict, adapter_config = to_torch('llama', module, params)

`module` and `params` are those of the base model (`convert.from_torch`). For a `heads.RewardModel` the adapter's file
may hold the score head too, as PEFT saves it for sequence classification; it replaces the one in `params`.
"""
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.convert import KINDS
from rlhf_jax.convert.settings import checked
from rlhf_jax.models import heads, lora
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import Rule, linear
from rlhf_jax.weights.state_dict import Renamed

_OUTER = 'base_model.model.'
_CHANGES_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')  # initialisations that subtract the start from the base
_SCORE = Rule('score.weight', 'score_head/kernel', linear())


def from_torch(kind: str, state_dict: Mapping[str, Any], module: Any, params: Mapping[str, Any], *,
               config: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the adapter.

    Args:
        kind: of the base model, see `convert`.
        state_dict: of `adapter_model.safetensors`; {name: numpy array or PyTorch tensor}.
        module, params: the base model.
        config: `adapter_config.json`.

    Raises:
        ValueError: a variant of LoRA that `models.lora` does not have, or a tensor that does not fit.
    """
    _check_config(config)
    file, prefix = _file(kind), 'backbone/' if hasattr(module, 'backbone') else ''
    state_dict = Renamed(state_dict, lambda name: _short_name(name, file.PREFIX))
    adapted = [rule for rule in file.RULES
             if isinstance(rule, Rule) and f'{_stem(rule).format(i=0)}.lora_A.weight' in state_dict]
    layers = [prefix + rule.flax.removesuffix('/kernel') for rule in adapted]
    if not adapted:
        raise ValueError('convert: no adapter for this model in these tensors')
    scale = config['lora_alpha'] / (config['r'] ** 0.5 if config.get('use_rslora') else config['r'])
    params = jax.tree.map(lambda x: x, dict(params))  # new containers, the same arrays
    init = lambda p: lora.init(jax.random.key(0), module, p, rank=config['r'], alpha=1.0, targets=layers)
    with_lora = jax.eval_shape(init, params)
    _, expected = lora.split(with_lora)
    table = [rule for pair in zip(adapted, layers) for rule in _rules(*pair, with_lora)]
    if isinstance(module, heads.RewardModel) and 'score.weight' in state_dict:
        table, expected = [*table, _SCORE], expected | {'score_head': {'kernel': params['score_head']['kernel']}}
    out = lora.join(params, rules.to_flax(state_dict, table, expected))
    scales = {f'{layer}/lora_scale': np.full(lead, scale, np.float32) for layer, lead in
              ((layer, _at(with_lora, layer)['lora_scale'].shape) for layer in layers)}
    return lora.join(out, rules.unflatten(scales))


def to_torch(kind: str, module: Any, params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The adapter in `params` as PEFT's state dict and `adapter_config.json`, with the score head of a reward model.

    Raises:
        ValueError: no adapter, or layers that differ in rank or scale, which one such file cannot say.
    """
    file, prefix = _file(kind), 'backbone/' if hasattr(module, 'backbone') else ''
    _, adapter = lora.split(params)
    layers = sorted({path.rpartition('/')[0] for path in rules.flatten(adapter)})
    adapted = [rule for rule in file.RULES if isinstance(rule, Rule) and
             prefix + rule.flax.removesuffix('/kernel') in layers and rule.flax.endswith('/kernel')]
    settings = {(_at(params, layer)['lora_b'].shape[_lead(layer)], float(s))
                for layer in layers for s in np.ravel(_at(params, layer)['lora_scale'])}
    if len(settings) != 1:
        raise ValueError(f'convert: layers have adapters of different rank or scale, {sorted(settings)}')
    (rank, scale), = settings
    table = [rule for r in adapted for rule in _rules(r, prefix + r.flax.removesuffix('/kernel'), params)]
    reward = isinstance(module, heads.RewardModel)
    if reward:
        table, adapter = [*table, _SCORE], adapter | {'score_head': {'kernel': params['score_head']['kernel']}}
    state_dict = {_OUTER + ('' if name.startswith('score.') else file.PREFIX) + name: tensor
                  for name, tensor in rules.to_torch(adapter, table).items()}
    return state_dict, {
        'peft_type': 'LORA', 'task_type': 'SEQ_CLS' if reward else 'CAUSAL_LM', 'r': rank, 'lora_alpha': scale * rank,
        'lora_dropout': 0.0, 'bias': 'none', 'fan_in_fan_out': kind == 'gpt2',
        'target_modules': sorted({_target(rule, adapted, file.RULES) for rule in adapted}),
        'modules_to_save': ['score'] if reward else None}


def _rules(rule: Rule, layer: str, params: Mapping[str, Any]) -> tuple[Rule, Rule]:
    """Rules of A and B of the layer whose kernel `rule` makes; both are the weights of linear layers in PEFT."""
    inputs = len(_at(params, layer)['lora_a'].shape) - 1 - _lead(layer)
    return (Rule(f'{_stem(rule)}.lora_A.weight', f'{layer}/lora_a', linear(inputs)),
            Rule(f'{_stem(rule)}.lora_B.weight', f'{layer}/lora_b', linear()))


def _target(rule: Rule, adapted: list[Rule], table: rules.Rules) -> str:
    """The shortest end of the layer's name that no layer without an adapter shares.

    PEFT adapts every layer that ends so, and GPT-2 has a `c_proj` in its attention and another in its MLP.
    """
    others = ['.' + _stem(other) for other in table
              if isinstance(other, Rule) and other.flax.endswith('/kernel') and other not in adapted]
    parts = _stem(rule).split('.')
    ends = ('.'.join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(end for end in ends if not any(other.endswith('.' + end) for other in others))


def _lead(layer: str) -> int:
    return int('blocks' in layer.split('/'))


def _at(tree: Mapping[str, Any], path: str) -> Any:
    for name in path.split('/'):
        tree = tree[name]
    return tree


def _stem(rule: Rule) -> str:
    return rule.names[0].removesuffix('.weight')


def _short_name(name: str, prefix: str) -> str:
    name = name.removeprefix(_OUTER).removeprefix(prefix)
    for adapter in ('lora_A', 'lora_B', 'modules_to_save'):  # in memory PEFT also names the adapter
        name = name.replace(f'.{adapter}.default.', f'.{adapter}.')
    return name.replace('.modules_to_save.', '.')


def _check_config(config: Mapping[str, Any]) -> None:
    for name, only in (('peft_type', 'LORA'), ('use_dora', False), ('bias', 'none'), ('lora_bias', False),
                       ('rank_pattern', {}), ('alpha_pattern', {}), ('layer_replication', None),
                       ('alora_invocation_tokens', None)):
        if (config.get(name) or only) != only:
            raise ValueError(f'convert: adapter_config has {name}={config[name]!r:.60}, but only {only!r} is supported')
    start = config.get('init_lora_weights', True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(f'convert: adapter_config has init_lora_weights={start!r:.60}, which changes the base model '
                         'too; convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)')
    for name, type_ in (('r', 'size'), ('lora_alpha', 'real')):
        if name not in config:
            raise ValueError(f'convert: adapter_config has no {name}')
        checked(name, config[name], type_)


def _file(kind: str) -> Any:
    if kind not in KINDS:
        raise ValueError(f'convert: kind={kind!r} is not one of {KINDS}')
    return importlib.import_module(f'rlhf_jax.convert.{kind}')
