"""Heads of a DINOv2 training checkpoint (`dino_head.*`, or `ibot_head.*` where they are separate)."""
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlc_jax.convert import rules as rules_lib
from dlc_jax.convert.rules import FLAT, Codec, Rule, linear
from dlc_jax.ssl.dino import DINOHead

# weight_g is (K, 1) there.
_COLUMN = Codec(FLAT.to_flax, lambda p: p.reshape(-1, 1))


def _rules(num_layers: int) -> tuple[Rule, ...]:
    layers = [rule for i in range(num_layers) for rule in (  # every other module of the Sequential is a GELU
        Rule(f'mlp.{2 * i}.weight', f'fc{i + 1}/kernel', linear()),
        Rule(f'mlp.{2 * i}.bias', f'fc{i + 1}/bias'))]
    return (*layers, Rule('last_layer.weight_g', 'last_layer/gain', _COLUMN),
            Rule('last_layer.weight_v', 'last_layer/kernel', linear()))


def from_torch(state_dict: Mapping[str, Any], *, prefix: str = 'dino_head.',
               **fields: Any) -> tuple[DINOHead, dict[str, Any]]:
    """`DINOHead` and its parameters, from tensors whose names may start with `_orig_mod.`, `module.` and `prefix`.

    Where any name starts with `prefix`, the others (the backbone's) are left alone.

    Raises:
        ValueError: a tensor that is missing, unknown, wrongly shaped or not finite.
    """
    state_dict = rules_lib.strip_prefixes(state_dict, ('_orig_mod.', 'module.'))
    inside = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
    state_dict = inside or state_dict
    prototypes, bottleneck = rules_lib.shape_of(state_dict, 'last_layer.weight_v', 2)
    hidden, width = rules_lib.shape_of(state_dict, 'mlp.0.weight', 2)
    num_layers = len([name for name in state_dict if name.startswith('mlp.') and name.endswith('.weight')])
    sizes = dict(hidden=hidden, bottleneck=bottleneck, prototypes=prototypes, num_layers=num_layers)
    module = DINOHead(**sizes | fields)
    expected = rules_lib.param_shapes(module, jnp.zeros((1, width)))
    return module, rules_lib.to_flax(state_dict, _rules(num_layers), expected)


def to_torch(module: DINOHead, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """State dict of `params` under the original's names, without a prefix."""
    return rules_lib.to_torch(params, _rules(module.num_layers))
