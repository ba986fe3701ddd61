"""SEM encoders (arXiv 2507.12318) under the names of the paper's training code: the released models, and the `teacher`
of a training checkpoint.

Two things a checkpoint may hold are left out on the way in: `sem_cls_norm`, which the original allocates and never
reads (written as ones and zeros on the way out, so that its strict loader is content), and the training heads
`dino_head.*`, `ibot_head.*` (see `dino_head.py`).
"""
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlc_jax.convert import dinov2
from dlc_jax.models.sem import SEMEncoder
from rlhf_jax.weights import rules as rules_lib
from rlhf_jax.weights.rules import FLAT, Fixed, Rule, linear, norm
from rlhf_jax.weights.state_dict import shape_of


def rules_of(module: SEMEncoder) -> tuple[Rule | Fixed, ...]:
    """Rules of both directions, `sem_cls_norm` included."""
    return dinov2.vit_rules(module.patch_size) + (
        Rule('sem_bias', 'sem_bias'),
        Rule('sem_embed.weight', 'sem_embed/kernel', linear()),
        *norm('sem_norm', 'sem_norm', FLAT),
        Rule('sem_out.weight', 'sem_out/kernel', linear(2)) if module.form == 'plain' else
        Rule('sem_out.weight', 'sem_out_shared/kernel', linear()),
        Fixed('sem_cls_norm.weight', np.ones(module.width, np.float32)),
        Fixed('sem_cls_norm.bias', np.zeros(module.width, np.float32)),
    )


def from_torch(state_dict: Mapping[str, Any], *, num_codes: int | None = None, vocab_size: int | None = None,
               num_heads: int | None = None, shardings: Any = None,
               **fields: Any) -> tuple[SEMEncoder, dict[str, Any]]:
    """`SEMEncoder` and its parameters.

    Args:
        num_codes, vocab_size: L and V. The tensors of a 'plain' encoder fix only L * V, so give one of them (512 or 256
            for the released one); the other forms tell.
        num_heads: default: width / 64, as in every released DINOv2.
        **fields: other fields of the module: `temperature`, `dtype` and the like.

    Raises:
        ValueError: a tensor that is missing, unknown, wrongly shaped or not finite, or L and V that do not fit.
    """
    state_dict = dinov2.clean_names(state_dict)
    logits = shape_of(state_dict, 'sem_embed.weight', 2)[0]
    columns = shape_of(state_dict, 'sem_out.weight', 2)[1]
    form = 'plain' if columns == logits else 'pos_shared' if 'sem_bias' in state_dict else 'shared'
    if form != 'plain':
        vocab_size = vocab_size or columns
    if not (num_codes or vocab_size):
        raise ValueError(f'sem: give num_codes or vocab_size; the tensors fix only their product, {logits}')
    num_codes = num_codes or logits // (vocab_size or logits)
    vocab_size = vocab_size or logits // num_codes
    if num_codes * vocab_size != logits:
        raise ValueError(f'sem: num_codes={num_codes} x vocab_size={vocab_size} is not the {logits} rows of '
                         'sem_embed.weight')
    module = SEMEncoder(**dinov2.vit_fields(state_dict, num_heads) | dict(
        num_codes=num_codes, vocab_size=vocab_size, form=form, pos_antialias=True) | fields)
    channels = shape_of(state_dict, 'patch_embed.proj.weight', 4)[1]
    return module, rules_lib.to_flax(state_dict, rules_of(module), shapes_of(module, channels), shardings=shardings)


shapes_of = dinov2.shapes_of
