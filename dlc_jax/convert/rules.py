"""Total, two-way mapping between a PyTorch state dict and a flax parameter tree.

A model's file lists `Rule`s: which tensor(s) of the state dict make which parameter, and the pair of functions between
them. `to_flax` and `to_torch` run that list in either direction. A missing, unknown, wrongly shaped or non-finite
tensor is an error that names it, and so is a parameter that no rule makes.

    RULES = (
        Rule('norm.weight', 'norm/scale'),
        Rule('blocks.{i}.attn.qkv.weight', 'blocks/attn/qkv/kernel', linear()),       # [D, 3, H, hd]
        Rule('blocks.{i}.attn.proj.weight', 'blocks/attn/proj/kernel', linear(2)),    # [H, hd, D]
        Rule('blocks.{i}.attn.qkv.bias', 'blocks/attn/qkv/bias', FLAT),               # [3, H, hd]
        Fixed('rotary_emb.inv_freq'),
    )
    params = to_flax(state_dict, RULES, param_shapes(module, images))
    state_dict = to_torch(params, RULES)

`{i}` counts the blocks of a stack: tensors i = 0, 1, ... become the leading axis of the parameter. Rules whose
parameter the model does not have are skipped, so one list serves every variant of a model; what such a rule would have
read is then unknown to the model, hence an error. Parameters are float32 numpy arrays.
"""
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Array = Any


class Codec(NamedTuple):
    """One tensor, both ways. Use array methods only (reshape, transpose): shapes are found by tracing `to_torch`.

    Attributes:
        to_flax: (tensor, shape of the parameter) -> parameter of that shape.
        to_torch: parameter -> tensor.
    """
    to_flax: Callable[[Array, tuple[int, ...]], Array]
    to_torch: Callable[[Array], Array]


SAME = Codec(lambda t, shape: t, lambda p: p)
# A vector there, any shape here: biases of attention and adaLN, norms over several axes.
FLAT = Codec(lambda t, shape: t.reshape(shape), lambda p: p.reshape(-1))
# Convolution: (O, I, h, w) <-> (h, w, I, O).
CONV = Codec(lambda t, shape: t.transpose(2, 3, 1, 0), lambda p: p.transpose(3, 2, 0, 1))


def linear(inputs: int = 1) -> Codec:
    """`nn.Linear` weight (out, in) <-> dense kernel whose first `inputs` axes are the input and the rest the output."""
    def to_torch(p):
        size = 1
        for n in p.shape[:inputs]:
            size *= n
        return p.reshape(size, -1).transpose(1, 0)

    return Codec(lambda t, shape: t.transpose(1, 0).reshape(shape), to_torch)


def patch_conv(size: int) -> Codec:
    """Convolution (O, I, p, p) of stride p <-> dense kernel [p * p * I, O] on patches as (row, column, channel)."""
    return Codec(lambda t, shape: t.transpose(2, 3, 1, 0).reshape(shape),
                 lambda p: p.reshape(size, size, -1, p.shape[-1]).transpose(3, 2, 0, 1))


class Rule(NamedTuple):
    """`flax` (path 'a/b/c') is made of `torch`: one name, or several to be joined along their first axis."""
    torch: str | tuple[str, ...]
    flax: str
    codec: Codec = SAME

    @property
    def names(self) -> tuple[str, ...]:
        return (self.torch,) if isinstance(self.torch, str) else self.torch


class Fixed(NamedTuple):
    """A tensor that the model has no parameter for: a buffer, or one that the original never uses.

    Attributes:
        torch: its name; `{i}` stands for any block index (then `value` must be None).
        value: what `to_torch` writes; None writes nothing. On the way in the tensor may be absent.
        exact: on the way in, it must equal `value` to 1e-4; otherwise whatever it holds is dropped.
    """
    torch: str
    value: np.ndarray | None = None
    exact: bool = False


def to_numpy(tensor: Any) -> np.ndarray:
    """numpy array of a numpy array, or of a PyTorch tensor whatever its device and dtype (bfloat16 -> float32)."""
    if hasattr(tensor, 'detach'):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if 'bfloat16' in str(tensor.dtype) else tensor
    return np.asarray(tensor)


def strip_prefixes(state_dict: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    """`state_dict` with each of `prefixes`, in this order, removed from the names that start with it.

    Raises:
        ValueError: two names become one.
    """
    out = {}
    for full, tensor in state_dict.items():
        name = full
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if name in out:
            raise ValueError(f'convert: {full} and another tensor are both called {name} without the prefixes '
                             f'{tuple(prefixes)}')
        out[name] = tensor
    return out


def num_blocks(state_dict: Mapping[str, Any], pattern: str) -> int:
    """How many blocks `state_dict` holds; each has a tensor `pattern`, such as 'blocks.{i}.norm1.weight'.

    Raises:
        ValueError: none.
    """
    regex = _regex(pattern)
    found = [int(m[1]) for m in map(regex.fullmatch, state_dict) if m]
    if not found:
        raise ValueError(f'convert: missing tensor {pattern.format(i=0)}; is this a state dict of that model?')
    return max(found) + 1


def shape_of(state_dict: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of the tensor `name`, from which a model's size is read.

    Raises:
        ValueError: it is missing, or does not have `ndim` axes.
    """
    if name not in state_dict:
        raise ValueError(f'convert: missing tensor {name}; is this a state dict of that model?')
    shape = tuple(state_dict[name].shape)
    if len(shape) != ndim:
        raise ValueError(f'convert: {name} has shape {shape}, expected {ndim} axes')
    return shape


def param_shapes(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`module.init(key, *args, **kwargs)['params']` as nested dict of `ShapeDtypeStruct`; nothing is computed."""
    return jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))['params']


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


def to_flax(state_dict: Mapping[str, Any], rules: Sequence[Rule | Fixed],
            expected: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters shaped like `expected` (see `param_shapes`) from `state_dict`, as float32 numpy arrays.

    Args:
        state_dict: {name: numpy array or PyTorch tensor}.

    Raises:
        ValueError: a missing, unknown, wrongly shaped or non-finite tensor, or a parameter without a rule.
    """
    state_dict = dict(state_dict)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        if isinstance(rule, Fixed):
            _drop(state_dict, rule)
        elif rule.flax in shapes:
            if rule.flax in flat:
                raise ValueError(f'convert: two rules make parameter {rule.flax}')
            flat[rule.flax] = _read(state_dict, rule, shapes[rule.flax])
    if set(shapes) - set(flat):
        raise ValueError(f'convert: no rule makes parameter {sorted(set(shapes) - set(flat))[0]}')
    if state_dict:
        raise ValueError(f'convert: unknown tensor {sorted(state_dict)[0]} (and {len(state_dict) - 1} more); '
                         'it has no place in this model')
    return unflatten(flat)


def to_torch(params: Mapping[str, Any], rules: Sequence[Rule | Fixed]) -> dict[str, np.ndarray]:
    """The state dict, in the order of `rules` and block by block, that `to_flax` would turn into `params`; float32.

    Raises:
        ValueError: a parameter without a rule.
    """
    flat = flatten(params)
    out: dict[str, np.ndarray] = {}
    used = set()
    for rule in rules:
        if isinstance(rule, Fixed):
            if rule.value is not None:
                out[rule.torch] = np.asarray(rule.value, np.float32)
            continue
        if rule.flax not in flat:
            continue
        used.add(rule.flax)
        value = np.asarray(flat[rule.flax], np.float32)
        stacked = '{i}' in rule.names[0]
        for i, block in enumerate(value if stacked else value[None]):
            tensor = rule.codec.to_torch(block)
            parts = np.split(tensor, len(rule.names)) if len(rule.names) > 1 else [tensor]
            out.update({name.format(i=i): np.array(part, order='C') for name, part in zip(rule.names, parts)})
    if set(flat) - used:
        raise ValueError(f'convert: no rule writes parameter {sorted(set(flat) - used)[0]}')
    return out


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(re.escape('{i}'), r'(\d+)'))


def _drop(state_dict: dict[str, Any], rule: Fixed) -> None:
    regex = _regex(rule.torch)
    for name in [name for name in state_dict if regex.fullmatch(name)]:
        tensor = state_dict.pop(name)
        if rule.value is None:
            continue
        if tuple(tensor.shape) != rule.value.shape:
            raise ValueError(f'convert: {name} has shape {tuple(tensor.shape)}, expected {rule.value.shape}')
        if rule.exact and not np.allclose(to_numpy(tensor), rule.value, atol=1e-4, rtol=1e-4):
            raise ValueError(f'convert: {name} differs from the values that this model computes for it')


def _read(state_dict: dict[str, Any], rule: Rule, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter of `rule`; its tensors are taken out of `state_dict`."""
    stacked = '{i}' in rule.names[0]
    one = shape[1:] if stacked else shape
    whole = jax.eval_shape(rule.codec.to_torch, jax.ShapeDtypeStruct(one, np.float32)).shape
    wanted = whole if len(rule.names) == 1 else (whole[0] // len(rule.names), *whole[1:])
    out = np.empty(shape, np.float32)
    for i in range(shape[0] if stacked else 1):
        parts = []
        for name in (n.format(i=i) for n in rule.names):
            if name not in state_dict:
                raise ValueError(f'convert: missing tensor {name} {wanted}, from which {rule.flax} is made')
            tensor = to_numpy(state_dict.pop(name))
            if tensor.shape != wanted:
                raise ValueError(f'convert: {name} has shape {tensor.shape}, expected {wanted}')
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise ValueError(f'convert: {name} holds values that are not finite')
            parts.append(tensor)
        out[i if stacked else ...] = rule.codec.to_flax(parts[0] if len(parts) == 1 else np.concatenate(parts), one)
    return out
