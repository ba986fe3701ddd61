"""State dicts as the converters see them: under other names, with sizes to be read, and with a file to blame."""
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def to_numpy(tensor: Any) -> np.ndarray:
    """numpy array of a numpy array, or of a PyTorch tensor whatever its device and dtype (bfloat16 -> float32)."""
    if hasattr(tensor, 'detach'):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if 'bfloat16' in str(tensor.dtype) else tensor
    return np.asarray(tensor)


class Renamed(Mapping):
    """A state dict under other names; its tensors are still read one by one.

    Args:
        state_dict: the original.
        rename: name -> new name; None leaves the tensor out.

    Raises:
        ValueError: two names become one.
    """

    def __init__(self, state_dict: Mapping[str, Any], rename: Callable[[str], str | None]):
        self._state_dict = state_dict
        self._original: dict[str, str] = {}
        for name in state_dict:
            new = rename(name)
            if new in self._original:
                raise ValueError(f'convert: {name} and {self._original[new]} are both {new} of the model'
                                 f'{where(state_dict, name)}')
            if new is not None:
                self._original[new] = name

    def original(self, name: str) -> str:
        return original(self._state_dict, self._original.get(name, name))

    def where(self, name: str) -> str:
        return where(self._state_dict, self._original.get(name, name))

    @property
    def specs(self) -> dict[str, Any]:
        """{name: what has its shape and dtype}; nothing is read."""
        specs = getattr(self._state_dict, 'specs', self._state_dict)
        return {new: specs[name] for new, name in self._original.items()}

    def __getitem__(self, name: str) -> Any:
        return self._state_dict[self._original[name]]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._original

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)


def original(state_dict: Mapping[str, Any], name: str) -> str:
    """What the tensor called `name` was called before any renaming; for messages."""
    return state_dict.original(name) if hasattr(state_dict, 'original') else name


def where(state_dict: Mapping[str, Any], name: str) -> str:
    """' (in FILE)': the file that holds `name`, or would; '' where there is none. For messages."""
    return state_dict.where(name) if hasattr(state_dict, 'where') else ''


def without_prefixes(name: str, prefixes: Sequence[str]) -> str:
    """`name` with each of `prefixes`, in this order, removed where it starts with it."""
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def strip_prefixes(state_dict: Mapping[str, Any], prefixes: Sequence[str]) -> Renamed:
    """`state_dict` with each of `prefixes`, in this order, removed from the names that start with it.

    Raises:
        ValueError: two names become one.
    """
    return Renamed(state_dict, lambda name: without_prefixes(name, prefixes))


def name_pattern(name: str) -> re.Pattern[str]:
    """A regex of the names that `name`, with `{i}` for a block's index, stands for; its group is the index."""
    return re.compile(re.escape(name).replace(re.escape('{i}'), r'(\d+)'))


def num_blocks(state_dict: Mapping[str, Any], pattern: str) -> int:
    """How many blocks `state_dict` holds; each has a tensor `pattern`, such as 'blocks.{i}.norm1.weight'.

    Raises:
        ValueError: none.
    """
    found = [int(m[1]) for m in map(name_pattern(pattern).fullmatch, state_dict) if m]
    if not found:
        raise ValueError(f'convert: missing tensor {pattern.format(i=0)}; is this a state dict of that model?'
                         f'{where(state_dict, pattern)}')
    return max(found) + 1


def shape_of(state_dict: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of the tensor `name`, from which a model's size is read.

    Raises:
        ValueError: it is missing, or does not have `ndim` axes.
    """
    if name not in state_dict:
        raise ValueError(f'convert: missing tensor {name}; is this a state dict of that model?'
                         f'{where(state_dict, name)}')
    shape = tuple(state_dict[name].shape)
    if len(shape) != ndim:
        raise ValueError(f'convert: {original(state_dict, name)} has shape {shape}, expected {ndim} axes'
                         f'{where(state_dict, name)}')
    return shape
