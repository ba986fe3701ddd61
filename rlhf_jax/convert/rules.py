"""Total, two-way mapping between a PyTorch state dict and a flax parameter tree, one tensor at a time.

A model's file lists `Rule`s: which tensor of the state dict makes which parameter, and the pair of functions between
them. `to_flax` and `to_torch` run that list in either direction. A missing, unknown, wrongly shaped or non-finite
tensor is an error that names it, and so is a parameter that no rule makes.

    RULES = (
        Rule('layers.{i}.self_attn.q_proj.weight', 'blocks/attn/q/kernel', linear()),      # [D, H, hd]
        Rule('layers.{i}.self_attn.o_proj.weight', 'blocks/attn/o/kernel', linear(2)),     # [H, hd, D]
        Fixed('layers.{i}.self_attn.rotary_emb.inv_freq'),
    )

`{i}` counts the blocks: tensors i = 0, 1, ... become the leading axis of the parameter. Rules whose parameter the model
does not have are skipped; what such a rule would have read is then unknown to the model, hence an error.

Language models do not fit into memory twice. `state_dict` may be any mapping, one that reads a tensor from disk when it
is asked for included; each tensor is dropped before the next is read, and with `shardings` a parameter goes straight
into the shards of its devices.
"""
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Array = Any


class Codec(NamedTuple):
    """One tensor, both ways; views of it where possible.

    Attributes:
        to_flax: (tensor, shape of the parameter) -> parameter of that shape.
        to_torch: parameter -> tensor.
        shape: shape of the parameter -> shape of the tensor.
    """
    to_flax: Callable[[Array, tuple[int, ...]], Array]
    to_torch: Callable[[Array], Array]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


SAME = Codec(lambda t, shape: t, lambda p: p, lambda shape: shape)
# A vector there, several axes here: biases of attention.
FLAT = Codec(lambda t, shape: t.reshape(shape), lambda p: p.reshape(-1), lambda shape: (math.prod(shape),))


def linear(inputs: int = 1) -> Codec:
    """`nn.Linear` weight (out, in) <-> kernel whose first `inputs` axes are the input and the rest the output."""
    def shape(p):
        return math.prod(p[inputs:]), math.prod(p[:inputs])

    return Codec(lambda t, p: t.transpose(1, 0).reshape(p), lambda p: p.reshape(shape(p.shape)[::-1]).transpose(1, 0),
                 shape)


def conv1d(inputs: int = 1) -> Codec:
    """Weight (in, out) of GPT-2's `Conv1D` <-> kernel whose first `inputs` axes are the input."""
    def shape(p):
        return math.prod(p[:inputs]), math.prod(p[inputs:])

    return Codec(lambda t, p: t.reshape(p), lambda p: p.reshape(shape(p.shape)), shape)


class Rule(NamedTuple):
    """`flax` (path 'a/b/c') is made of `torch`."""
    torch: str
    flax: str
    codec: Codec = SAME


class Fixed(NamedTuple):
    """A buffer that old checkpoints hold and the model computes itself: dropped on the way in, not written."""
    torch: str


class Tied(NamedTuple):
    """A tensor that must equal the one called `same`; written as a copy of it."""
    torch: str
    same: str


Rules = Sequence[Rule | Fixed | Tied]


def to_numpy(tensor: Any) -> np.ndarray:
    """numpy array of a numpy array, or of a PyTorch tensor whatever its device and dtype (bfloat16 -> float32)."""
    if hasattr(tensor, 'detach'):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if 'bfloat16' in str(tensor.dtype) else tensor
    return np.asarray(tensor)


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}."""
    out = {}
    for key, value in tree.items():
        out.update(flatten(value, f'{prefix}{key}/') if isinstance(value, Mapping) else {prefix + key: value})
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b/c': leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split('/')
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def param_shapes(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`module.init(key, *args, **kwargs)['params']` as nested dict of `ShapeDtypeStruct`; nothing is computed."""
    return jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))['params']


class Renamed(Mapping):
    """A state dict under other names; its tensors are still read one by one.

    Args:
        state_dict: the original.
        rename: name -> new name.

    Raises:
        ValueError: two names become one.
    """

    def __init__(self, state_dict: Mapping[str, Any], rename: Callable[[str], str]):
        self._state_dict = state_dict
        self._original: dict[str, str] = {}
        for name in state_dict:
            if rename(name) in self._original:
                raise ValueError(f'convert: {name} and {self._original[rename(name)]} are the same tensor of the model')
            self._original[rename(name)] = name

    def original(self, name: str) -> str:
        """What `state_dict` calls it, or would; for messages."""
        return self._original.get(name, name)

    def __getitem__(self, name: str) -> Any:
        return self._state_dict[self._original[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)


def to_flax(state_dict: Mapping[str, Any], rules: Rules, expected: Mapping[str, Any], *,
            shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters of the shapes and dtypes of `expected` (see `param_shapes`) from `state_dict`.

    Args:
        state_dict: {name: numpy array or PyTorch tensor}, or a mapping that reads them when asked.
        shardings: nested dict like `expected` of `jax.sharding.Sharding`: the parameters are jax arrays laid out so.
            None: numpy arrays.

    Raises:
        ValueError: a missing, unknown, wrongly shaped or non-finite tensor, or a parameter without a rule.
    """
    original = getattr(state_dict, 'original', lambda name: name)
    wanted = flatten(expected)
    layout = flatten(shardings) if shardings is not None else {}
    unread = set(state_dict)
    flat: dict[str, Any] = {}
    for rule in rules:
        if isinstance(rule, Fixed):
            unread = {name for name in unread if not _regex(rule.torch).fullmatch(name)}
        elif isinstance(rule, Tied):
            if rule.torch in unread:
                unread.discard(rule.torch)
                if not np.array_equal(to_numpy(state_dict[rule.torch]), to_numpy(state_dict[rule.same])):
                    raise ValueError(f'convert: {original(rule.torch)} differs from {original(rule.same)}, which the '
                                     'config says it is tied to')
        elif rule.flax in wanted:
            if rule.flax in flat:
                raise ValueError(f'convert: two rules make parameter {rule.flax}')
            leaf = wanted[rule.flax]
            names = [rule.torch.format(i=i) for i in range(leaf.shape[0])] if '{i}' in rule.torch else [rule.torch]
            flat[rule.flax] = _read(state_dict, rule, names, leaf, layout.get(rule.flax))
            unread -= set(names)
    if set(wanted) - set(flat):
        raise ValueError(f'convert: no rule makes parameter {sorted(set(wanted) - set(flat))[0]}')
    if unread:
        raise ValueError(f'convert: unknown tensor {original(sorted(unread)[0])} (and {len(unread) - 1} more); it has '
                         'no place in this model')
    return unflatten(flat)


def to_torch(params: Mapping[str, Any], rules: Rules) -> dict[str, np.ndarray]:
    """The state dict, in the order of `rules` and block by block, that `to_flax` would turn into `params`; float32.

    Raises:
        ValueError: a parameter without a rule.
    """
    flat = flatten(params)
    out: dict[str, np.ndarray] = {}
    used = set()
    for rule in rules:
        if isinstance(rule, Tied):
            out[rule.torch] = out[rule.same].copy()
        elif isinstance(rule, Rule) and rule.flax in flat:
            used.add(rule.flax)
            value = np.asarray(flat[rule.flax]).astype(np.float32)
            blocks = value if '{i}' in rule.torch else value[None]
            out |= {rule.torch.format(i=i): np.array(rule.codec.to_torch(p), order='C') for i, p in enumerate(blocks)}
    if set(flat) - used:
        raise ValueError(f'convert: no rule writes parameter {sorted(set(flat) - used)[0]}')
    return out


def tensor_shapes(expected: Mapping[str, Any], rules: Rules) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the state dict that `to_torch` writes for parameters of the shapes of `expected`."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    out: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        if isinstance(rule, Tied):
            out[rule.torch] = out[rule.same]
        elif isinstance(rule, Rule) and rule.flax in shapes:
            shape = shapes[rule.flax]
            if '{i}' in rule.torch:
                out |= {rule.torch.format(i=i): rule.codec.shape(shape[1:]) for i in range(shape[0])}
            else:
                out[rule.torch] = rule.codec.shape(shape)
    return out


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(re.escape('{i}'), r'\d+'))


def _read(state_dict: Mapping[str, Any], rule: Rule, names: Sequence[str], leaf: Any, sharding: Any) -> Any:
    """The parameter of `rule`, made of the tensors `names`."""
    stacked = '{i}' in rule.torch
    one = tuple(leaf.shape[1:] if stacked else leaf.shape)
    read = lambda name: rule.codec.to_flax(_checked(state_dict, name, rule, rule.codec.shape(one)), one)
    if sharding is None:
        out = np.empty(leaf.shape, leaf.dtype)
        for i, name in enumerate(names):
            out[i if stacked else ...] = read(name)
        return out
    if not stacked:
        tensor = read(names[0])
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: tensor[index].astype(leaf.dtype))
    # One block is on the host at a time, and every device's part of it is cut out of that one reading.
    parts: dict[Any, list[np.ndarray]] = {}
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    for i, name in enumerate(names):
        tensor = read(name)
        for device, index in indices.items():
            if i in range(*index[0].indices(len(names))):
                parts.setdefault(device, []).append(jax.device_put(tensor[index[1:]].astype(leaf.dtype), device))
    arrays = [jax.numpy.stack(parts.pop(device)) for device in indices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _checked(state_dict: Mapping[str, Any], name: str, rule: Rule, shape: tuple[int, ...]) -> np.ndarray:
    original = getattr(state_dict, 'original', lambda name: name)
    if name not in state_dict:
        raise ValueError(f'convert: missing tensor {name} {shape}, from which {rule.flax} is made')
    tensor = to_numpy(state_dict[name])
    if tensor.shape != tuple(shape):
        raise ValueError(f'convert: {original(name)} has shape {tensor.shape}, expected {tuple(shape)}')
    if not np.isfinite(tensor).all():
        raise ValueError(f'convert: {original(name)} holds values that are not finite')
    return tensor
