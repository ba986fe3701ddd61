"""Released PyTorch weights <-> flax parameters, one file a model.

    module, params = from_torch('dinov2', load_state_dict('dinov2_vitl14_reg4_pretrain.pth'))
    state_dict = to_torch('dinov2', module, params)

Every file defines `from_torch(state_dict, **fields) -> (module, params)`, which reads the module's size from the
tensors (what they do not fix comes as `fields`), and its exact inverse `to_torch(module, params) -> {name: array}`.
The mapping is total: a missing, unknown, wrongly shaped or non-finite tensor is an error that names it (`rules.py`).
`files.py` reads and writes the files, without PyTorch and without running code that a file holds.
"""
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

KINDS = ('dinov2', 'sem', 'dino_head', 'dit', 'sedd', 'sd_vae', 'inception', 'llada')  # each is a file beside this one


def from_torch(kind: str, state_dict: Mapping[str, Any], **fields: Any) -> tuple[Any, dict[str, Any]]:
    """The module that `state_dict` belongs to and its parameters, as nested dict of float32 numpy arrays.

    Args:
        kind: one of `KINDS`.
        state_dict: {name: numpy array or PyTorch tensor}.
        **fields: fields of the module that the tensors do not fix (see the file of that kind), `dtype` and the like.

    Raises:
        ValueError: unknown kind, or a tensor that does not fit.
    """
    return _file(kind).from_torch(state_dict, **fields)


def to_torch(kind: str, module: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict, under its original names, of `module` with `params`: float32 numpy arrays."""
    return _file(kind).to_torch(module, params)


def _file(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise ValueError(f'convert: kind={kind!r} is not one of {KINDS}')
    return importlib.import_module(f'{__name__}.{kind}')
