"""Released PyTorch weights <-> flax parameters, one file a model.

    module, params = from_torch('dinov2', load_state_dict('dinov2_vitl14_reg4_pretrain.pth'))
    state_dict = to_torch('dinov2', module, params)

Every file defines `from_torch(state_dict, *, shardings=None, **fields) -> (module, params)`, which reads the module's
size from the tensors (what they do not fix comes as `fields`); `rules_of(module)`, the table that is read in both
directions; and `shapes_of(module)`, the shapes of its parameters. The mapping is total: a missing, unknown, wrongly
shaped or non-finite tensor is an error that names it and its file (`rules.py`). `files.py` reads and writes the files,
without PyTorch and without running code that a file holds.

Large models never stand in memory twice: `load_state_dict` maps tensors rather than reading them, `shardings` puts each
into its shards as it is read, and `tensors` makes them one by one on the way out:

    module, params = from_torch('dit', load_state_dict('DLC_DiT_L512'), num_heads=16, shardings=lambda shapes: ...)
    files.save('exported', tensors('dit', module, params), config)
"""
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_jax.weights import rules

KINDS = ('dinov2', 'sem', 'dino_head', 'dit', 'sedd', 'sd_vae', 'inception', 'llada')  # each is a file beside this one


def from_torch(kind: str, state_dict: Mapping[str, Any], *,
               shardings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
               **fields: Any) -> tuple[Any, dict[str, Any]]:
    """The module that `state_dict` belongs to and its parameters, in `param_dtype` (a field; float32 by default).

    Args:
        kind: one of `KINDS`.
        state_dict: {name: numpy array or PyTorch tensor}, or a mapping that reads tensors when asked for them.
        shardings: a function from the parameters' shapes (nested dict of `ShapeDtypeStruct`) to a nested dict of
            shardings: the parameters are jax arrays, written shard by shard. None: numpy arrays.
        **fields: fields of the module that the tensors do not fix (see the file of that kind), `dtype` and the like.

    Raises:
        ValueError: unknown kind, or a tensor that does not fit.
    """
    return _file(kind).from_torch(state_dict, shardings=shardings, **fields)


def to_torch(kind: str, module: Any, params: Mapping[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """The state dict, under its original names, of `module` with `params`: float32 numpy arrays; what is laid out alike
    is a view of a numpy parameter, the rest a copy.

    Args:
        **options: of `rules_of` of that kind: hf=True of a dinov2.
    """
    return dict(tensors(kind, module, params, **options))


def tensors(kind: str, module: Any, params: Mapping[str, Any], *, dtype: Any = np.float32,
            **options: Any) -> rules.Tensors:
    """The state dict of `to_torch`, each tensor made when it is asked for, in `dtype`."""
    return rules.Tensors(params, _file(kind).rules_of(module, **options), dtype)


def tensor_shapes(kind: str, module: Any, **options: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the state dict of `module`, of RGB images where it reads images; nothing is computed."""
    file = _file(kind)
    return rules.tensor_shapes(file.shapes_of(module), file.rules_of(module, **options))


def _file(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise ValueError(f'convert: kind={kind!r} is not one of {KINDS}')
    return importlib.import_module(f'{__name__}.{kind}')
