"""LoRA adapters in the parameters of a run: separated from what stays frozen, and merged into the weights."""
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.runtime import partition
from rlhf_jax.models import lora

Params = dict[str, Any]


def divide(params: Params, also: Sequence[str] = ()) -> tuple[Params, Params]:
    """Splits parameters with an adapter into (frozen, trained); `lora.join` puts them together again.

    Trained are the adapter's A and B, and paths that a regex of `also` matches.
    """
    def visit(tree, path):
        frozen, trained = {}, {}
        for name, leaf in tree.items():
            here = f'{path}{name}'
            if isinstance(leaf, Mapping):
                parts = visit(leaf, f'{here}/')
                for out, part in zip((frozen, trained), parts):
                    if part:
                        out[name] = part
            elif name in ('lora_a', 'lora_b') or any(re.fullmatch(pattern, here) for pattern in also):
                trained[name] = leaf
            else:
                frozen[name] = leaf
        return frozen, trained
    return visit(params, '')


@jax.jit
def _merge(params: Params) -> Params:
    return lora.merge(params)


def merged(params: Params) -> Params:
    """Parameters without adapters, which become part of the weights."""
    has_adapter = any(name.endswith('/lora_a') for name in partition.flatten(params))
    return _merge(params) if has_adapter else params
