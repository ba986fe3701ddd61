"""State dicts as the converters see them: under other names, with sizes to be read, and with a file to blame."""
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# Names of modules that wrap another one, wherever they stand in a tensor's name: of torch.compile, of FSDP and of
# activation checkpointing.
_WRAPPERS = re.compile(r'\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
_PARALLEL = 'module.'  # DataParallel and DistributedDataParallel, around the whole model


def to_numpy(tensor: Any) -> np.ndarray:
    """numpy array of a numpy array, or of a PyTorch tensor whatever its device and dtype."""
    if hasattr(tensor, 'detach'):
        tensor = tensor.detach().cpu()
        if 'bfloat16' in str(tensor.dtype):
            return tensor.float().numpy().astype(jnp.bfloat16)
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
        specs = specs_of(self._state_dict)
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


def specs_of(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """{name: what has its shape and dtype}; nothing is read where `state_dict` reads tensors when asked."""
    return getattr(state_dict, 'specs', state_dict)


def without_prefixes(name: str, prefixes: Sequence[str] = ()) -> str:
    """`name` without the names of wrapping modules, and without 'module.' and `prefixes` at its start, in any order."""
    name, before = _WRAPPERS.sub('', name), ''
    while name != before:
        before = name
        for prefix in (_PARALLEL, *prefixes):
            name = name.removeprefix(prefix)
    return name


def strip_prefixes(state_dict: Mapping[str, Any], prefixes: Sequence[str] = ()) -> Renamed:
    """`state_dict` under the names that `without_prefixes` leaves.

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
    indices = [int(m[1]) for m in map(name_pattern(pattern).fullmatch, state_dict) if m]
    if not indices:
        raise ValueError(f'convert: missing tensor {pattern.format(i=0)}; is this a state dict of that model?'
                         f'{where(state_dict, pattern)}')
    return max(indices) + 1


def shape_of(state_dict: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of the tensor `name`, from which a model's size is read.

    Raises:
        ValueError: it is missing, or does not have `ndim` axes.
    """
    if name not in state_dict:
        raise ValueError(f'convert: missing tensor {name}; is this a state dict of that model?'
                         f'{where(state_dict, name)}')
    shape = tuple(specs_of(state_dict)[name].shape)
    if len(shape) != ndim:
        raise ValueError(f'convert: {original(state_dict, name)} has shape {shape}, expected {ndim} axes'
                         f'{where(state_dict, name)}')
    return shape
