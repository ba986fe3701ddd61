"""Heads of a DINOv2 training checkpoint (`dino_head.*`, or `ibot_head.*` where they are separate)."""
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dlc_jax.ssl.dino import DINOHead
from rlhf_jax.weights import rules as rules_lib
from rlhf_jax.weights.rules import FLAT, Codec, Rule, dense, linear
from rlhf_jax.weights.state_dict import Renamed, shape_of, strip_prefixes

# weight_g is (K, 1) there.
_COLUMN = Codec(FLAT.to_flax, lambda p: p.reshape(-1, 1))


def rules_of(module: DINOHead) -> tuple[Rule, ...]:
    """Both directions; names without a prefix."""
    layers = [rule for i in range(module.num_layers)  # every other module of the Sequential is a GELU
              for rule in dense(f'mlp.{2 * i}', f'fc{i + 1}', linear())]
    return (*layers, Rule('last_layer.weight_g', 'last_layer/gain', _COLUMN),
            Rule('last_layer.weight_v', 'last_layer/kernel', linear()))


def shapes_of(module: DINOHead, width: int = 1024) -> dict[str, Any]:
    """Shapes of the parameters; `width` is that of the backbone (ViT-L)."""
    return rules_lib.param_shapes(module, jnp.zeros((1, width)))


def from_torch(state_dict: Mapping[str, Any], *, prefix: str = 'dino_head.', shardings: Any = None,
               **fields: Any) -> tuple[DINOHead, dict[str, Any]]:
    """`DINOHead` and its parameters, from tensors whose names may start with those of wrappers and `prefix`.

    Where any name starts with `prefix`, the others (the backbone's) are left alone.

    Raises:
        ValueError: a tensor that is missing, unknown, wrongly shaped or not finite.
    """
    state_dict = strip_prefixes(state_dict)
    inside = Renamed(state_dict, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
    state_dict = inside or state_dict
    prototypes, bottleneck = shape_of(state_dict, 'last_layer.weight_v', 2)
    hidden, width = shape_of(state_dict, 'mlp.0.weight', 2)
    num_layers = len([name for name in state_dict if name.startswith('mlp.') and name.endswith('.weight')])
    sizes = dict(hidden=hidden, bottleneck=bottleneck, prototypes=prototypes, num_layers=num_layers)
    module = DINOHead(**sizes | fields)
    return module, rules_lib.to_flax(state_dict, rules_of(module), shapes_of(module, width), shardings=shardings)
