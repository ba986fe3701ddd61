"""The FID Inception, under the names of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid, torch-fidelity)."""
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dlc_jax.models.inception import InceptionV3
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import CONV, SAME, Fixed, Rule, linear
from rlhf_jax.weights.state_dict import shape_of, strip_prefixes

# Ends of parameter paths -> ends of tensor names. What comes before is the same on both sides.
_ENDS = {
    'conv/kernel': ('conv.weight', CONV),
    'bn/scale': ('bn.weight', SAME), 'bn/bias': ('bn.bias', SAME),
    'bn/mean': ('bn.running_mean', SAME), 'bn/var': ('bn.running_var', SAME),
    'fc/kernel': ('fc.weight', linear()), 'fc_bias': ('fc.bias', SAME),
}


def from_torch(state_dict: Mapping[str, Any], *, shardings: Any = None,
               **fields: Any) -> tuple[InceptionV3, dict[str, Any]]:
    """The network and its parameters, batch-norm statistics included.

    Args:
        state_dict: {name: array}; counts of batches (`num_batches_tracked`) are ignored.
        **fields: fields of `InceptionV3` (`image_size`, `precision`, `dtype`).

    Raises:
        ValueError: a tensor is missing, unknown, wrongly shaped or not finite.
    """
    state_dict = strip_prefixes(state_dict)
    module = InceptionV3(num_classes=shape_of(state_dict, 'fc.weight', 2)[0], **fields)
    return module, rules.to_flax(state_dict, rules_of(module), shapes_of(module), shardings=shardings)


def shapes_of(module: InceptionV3) -> dict[str, Any]:
    """Shapes of the parameters."""
    return rules.param_shapes(module, jnp.zeros((1, module.image_size, module.image_size, 3)))


def rules_of(module: InceptionV3) -> list[Rule | Fixed]:
    """Both directions."""
    out: list[Rule | Fixed] = []
    for path in rules.flatten(shapes_of(module)):
        end = next(end for end in _ENDS if path.endswith(end))
        before = path.removesuffix(end).replace('/', '.')
        out.append(Rule(before + _ENDS[end][0], path, _ENDS[end][1]))
        if end == 'bn/scale':
            out.append(Fixed(f'{before}bn.num_batches_tracked'))
    return out
