"""Files of `torch.save`: which of the things in one is the state dict that was asked for."""
import math
import pathlib
from collections.abc import Mapping
from typing import Any, TypeGuard

from rlhf_jax.weights import torch_pickle
from rlhf_jax.weights.tensor import Tensor
from rlhf_jax.weights.torch_pickle import Placeholder


def tensors(path: pathlib.Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in the file, which is one or holds one, under `key` where it holds several.

    Training checkpoints of DiT and SEDD keep an average of the weights beside them, and that is what is sampled from:
    so 'ema' is read where no `key` is given. SEDD's, `ema.shadow_params`, has no names; it takes them from 'model'.
    What else a checkpoint holds (arguments, an optimizer, whole modules) is never built, and hinders only its own
    reading.

    Raises:
        OSError: truncated or damaged.
        ValueError: not a file of `torch.save`, no state dict in it, or an object in it that only code could build.
    """
    content = torch_pickle.load(path)
    if isinstance(content, Mapping) and key in (None, 'ema') and isinstance(content.get('ema'), Mapping):
        if 'shadow_params' in content['ema']:
            content, key = {'ema': _averaged(path, content)}, 'ema'
        elif key is None and _is_state_dict(content['ema']):
            key = 'ema'
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            entries = sorted(map(str, content))[:8] if isinstance(content, Mapping) else []
            raise ValueError(f'{path}: no entry {key!r}; it has {entries}')
        content = content[key]
    elif isinstance(content, Mapping) and not _is_state_dict(content):
        names = [name for name, x in content.items() if _is_state_dict(x)]
        if len(names) > 1:
            raise ValueError(f'{path}: holds {len(names)} state dicts {names[:8]}; choose one with key=')
        if names:
            content = content[names[0]]
    return _checked(path, content)


def _checked(path: pathlib.Path, content: Any) -> dict[str, Tensor]:
    """`content` as a state dict.

    Raises:
        ValueError: it is none, or one with tensors that cannot be read.
    """
    if isinstance(content, Placeholder):
        raise ValueError(f'{path}: refused, because reading it would run {content.wanted}; export its state dict as '
                         'safetensors')
    if not isinstance(content, Mapping):
        raise ValueError(f'{path}: not a state dict (a mapping from names to tensors)')
    for name, x in content.items():
        if isinstance(x, Placeholder):
            raise ValueError(f'{path}: refused, because reading {str(name)[:80]!r} would run {x.wanted}; export its '
                             'state dict as safetensors')
    if not _is_state_dict(content):
        raise ValueError(f'{path}: holds 0 state dicts (mappings from names to tensors); its entries are '
                         f'{[str(name)[:40] for name in content][:8]}')
    for name, tensor in content.items():
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides or ()))
        if tensor.strides and math.prod(tensor.shape) > reach:
            raise ValueError(f'{path}: {name!r} of shape {tensor.shape} repeats {reach} numbers (torch.expand); save a '
                             'contiguous copy')
    return dict(content)


def _averaged(path: pathlib.Path, content: Mapping) -> dict[str, Tensor]:
    """The state dict 'model' with the average in place of its parameters; buffers, which are not averaged, stay.

    Raises:
        ValueError: they do not belong together.
    """
    model, shadow = content.get('model'), content['ema']['shadow_params']
    if not _is_state_dict(model) or not isinstance(shadow, list) or not all(isinstance(x, Tensor) for x in shadow):
        raise ValueError(f'{path}: ema.shadow_params is no list of tensors beside a state dict `model`; choose with '
                         'key=')
    averaged, rest = {}, list(shadow)
    for name, tensor in model.items():  # parameters stand in the order of the list, with buffers between them
        averaged[name] = rest.pop(0) if rest and rest[0].shape == tensor.shape else tensor
    if rest:
        raise ValueError(f'{path}: {len(rest)} of the {len(shadow)} tensors of ema.shadow_params fit none of `model`, '
                         f'the first of shape {rest[0].shape}; read `model` with key=')
    return averaged


def _is_state_dict(x: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(x, Mapping) and bool(x) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in x.items())
