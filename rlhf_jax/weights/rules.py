"""Total, two-way mapping between a PyTorch state dict and a flax parameter tree, one tensor at a time.

A model's file lists `Rule`s: which tensor(s) of the state dict make which parameter, and the pair of functions between
them. `to_flax` and `to_torch` run that list in either direction. A missing, unknown, wrongly shaped or non-finite
tensor is an error that names it and its file, and so is a parameter that no rule makes.

    RULES = (
        *norm('blocks.{i}.norm1', 'blocks/norm1'),                                          # weight, bias
        Rule('blocks.{i}.q_proj.weight', 'blocks/attn/q/kernel', linear()),                 # [D, H, hd]
        *dense('blocks.{i}.attn.proj', 'blocks/attn/proj', linear(2)),                      # [H, hd, D], [D]
        Fixed('rotary_emb.inv_freq'),
    )
    params = to_flax(state_dict, RULES, param_shapes(module, tokens))
    state_dict = to_torch(params, RULES)

`{i}` counts the blocks of a stack: tensors i = 0, 1, ... become the leading axis of the parameter. Rules whose
parameter the model does not have are skipped, so one list serves every variant of a model; what such a rule would have
read is then unknown to the model, hence an error.

Large models do not fit into memory twice. `state_dict` may be any mapping, one that reads a tensor from disk when it
is asked for included (`files.load_state_dict`); each tensor is cast and dropped before the next is read, and with
`shardings` each parameter goes into the shards of its devices before the next is begun, so that the host holds one
parameter's shards and one tensor at most, and of a tensor that is mapped from disk reads no more than lies in them.
`Tensors` is the way back, as lazy.
"""
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.weights.state_dict import name_pattern, original, specs_of, to_numpy, where

Array = Any


# ---- Rules -----------------------------------------------------------------------------------------------------------

class Codec(NamedTuple):
    """One tensor, both ways; views of it where possible. Array methods only: shapes are found by tracing `to_torch`.

    Attributes:
        to_flax: (tensor, shape of the parameter) -> parameter of that shape.
        to_torch: parameter -> tensor.
    """
    to_flax: Callable[[Array, tuple[int, ...]], Array]
    to_torch: Callable[[Array], Array]


SAME = Codec(lambda t, shape: t, lambda p: p)
# A vector there, any shape here: biases of attention and adaLN, norms over several axes.
FLAT = Codec(lambda t, shape: t.reshape(shape), lambda p: p.reshape(-1))


def linear(inputs: int = 1) -> Codec:
    """`nn.Linear` weight (out, in) <-> kernel whose first `inputs` axes are the input and the rest the output."""
    return Codec(lambda t, shape: t.transpose(1, 0).reshape(shape), lambda p: _matrix(p, inputs).transpose(1, 0))


def conv1d(inputs: int = 1) -> Codec:
    """Weight (in, out) of GPT-2's `Conv1D` <-> kernel whose first `inputs` axes are the input."""
    return Codec(lambda t, shape: t.reshape(shape), lambda p: _matrix(p, inputs))


# Convolution: (O, I, h, w) <-> (h, w, I, O).
CONV = Codec(lambda t, shape: t.transpose(2, 3, 1, 0), lambda p: p.transpose(3, 2, 0, 1))


def patch_conv(size: int) -> Codec:
    """Convolution (O, I, p, p) of stride p <-> dense kernel [p * p * I, O] on patches as (row, column, channel)."""
    return Codec(lambda t, shape: t.transpose(2, 3, 1, 0).reshape(shape),
                 lambda p: p.reshape(size, size, -1, p.shape[-1]).transpose(3, 2, 0, 1))


def _matrix(p: Array, inputs: int) -> Array:
    return p.reshape(math.prod(p.shape[:inputs]), math.prod(p.shape[inputs:]))


class Rule(NamedTuple):
    """`flax` (path 'a/b/c') is made of `torch`: one name, or several to be joined along their first axis."""
    torch: str | tuple[str, ...]
    flax: str
    codec: Codec = SAME

    @property
    def names(self) -> tuple[str, ...]:
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @property
    def stacked(self) -> bool:
        return '{i}' in self.names[0]


class Fixed(NamedTuple):
    """A tensor that the model has no parameter for: a buffer, or one that the original never uses.

    Attributes:
        torch: its name; `{i}` stands for any block index (then `value` must be None).
        value: what `to_torch` writes; None writes nothing. On the way in the tensor may be absent.
        exact: on the way in, it must equal `value` to 1e-4, or as closely as its dtype can; otherwise whatever it holds
            is dropped.
    """
    torch: str
    value: np.ndarray | None = None
    exact: bool = False


class Tied(NamedTuple):
    """A tensor that must equal the one called `same`, where it is there; written as a copy of it."""
    torch: str
    same: str


Rules = Sequence[Rule | Fixed | Tied]


def dense(torch: str, flax: str, codec: Codec) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer or a convolution."""
    return Rule(f'{torch}.weight', f'{flax}/kernel', codec), Rule(f'{torch}.bias', f'{flax}/bias', FLAT)


def norm(torch: str, flax: str, codec: Codec = SAME) -> tuple[Rule, Rule]:
    """Weight and bias of a normalisation."""
    return Rule(f'{torch}.weight', f'{flax}/scale', codec), Rule(f'{torch}.bias', f'{flax}/bias', codec)


# ---- Parameter trees -------------------------------------------------------------------------------------------------

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


# ---- From a state dict -----------------------------------------------------------------------------------------------

def to_flax(state_dict: Mapping[str, Any], rules: Rules, expected: Mapping[str, Any], *,
            shardings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Parameters of the shapes and dtypes of `expected` (see `param_shapes`) from `state_dict`.

    Args:
        state_dict: {name: numpy array or PyTorch tensor}, or a mapping that reads them when asked.
        shardings: `expected` -> nested dict like it of `jax.sharding.Sharding`: the parameters are jax arrays, laid
            out so one by one, and of each this process reads the parts that its devices hold. A `ShapeDtypeStruct`
            with a sharding, in place of one, gives the dtype too. None, or a function that returns None: numpy arrays.

    Raises:
        ValueError: a missing, unknown, wrongly shaped or non-finite tensor, or a parameter without a rule.
    """
    wanted = flatten(expected)
    makers: dict[str, Rule] = {}
    unread = set(state_dict)
    for rule in rules:  # names and shapes first: what does not fit shows before gigabytes are read or allocated
        if isinstance(rule, Rule) and rule.flax in wanted:
            if rule.flax in makers:
                raise ValueError(f'convert: two rules make parameter {rule.flax}')
            makers[rule.flax] = rule
            for name in _names(rule, wanted[rule.flax].shape):
                if name not in state_dict:
                    raise ValueError(f'convert: missing tensor {name} {_tensor_shape(rule, wanted[rule.flax].shape)}, '
                                     f'from which {rule.flax} is made{where(state_dict, name)}')
                unread.discard(name)
        elif isinstance(rule, Fixed):
            regex = name_pattern(rule.torch)
            unread = {name for name in unread if not regex.fullmatch(name)}
        elif isinstance(rule, Tied):
            unread.discard(rule.torch)
    if set(wanted) - set(makers):
        raise ValueError(f'convert: no rule makes parameter {sorted(set(wanted) - set(makers))[0]}')
    if unread:
        name = sorted(unread)[0]
        raise ValueError(f'convert: unknown tensor {original(state_dict, name)} (and {len(unread) - 1} more); it has '
                         f'no place in this model{where(state_dict, name)}')
    shapes = {path: _tensor_shape(rule, wanted[path].shape) for path, rule in makers.items()}
    specs = specs_of(state_dict)
    for path, rule in makers.items():
        for name in _names(rule, wanted[path].shape):
            _check_shape(state_dict, name, tuple(specs[name].shape), shapes[path])
    for rule in rules:
        if isinstance(rule, (Fixed, Tied)) and rule.torch in state_dict:
            _check(state_dict, rule)
    layout = flatten((shardings(expected) if shardings is not None else None) or {})
    return unflatten({path: _read(state_dict, rule, wanted[path], layout.get(path)) for path, rule in makers.items()})


def _names(rule: Rule, shape: tuple[int, ...]) -> Iterator[str]:
    for i in range(shape[0] if rule.stacked else 1):
        yield from (name.format(i=i) for name in rule.names)


def _tensor_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each tensor of `rule`, whose parameter has `shape`."""
    one = jax.ShapeDtypeStruct(shape[1:] if rule.stacked else shape, np.float32)
    rows, *rest = jax.eval_shape(rule.codec.to_torch, one).shape or (None,)
    return () if rows is None else (rows // len(rule.names), *rest)


def _check_shape(state_dict: Mapping[str, Any], name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(f'convert: {original(state_dict, name)} has shape {shape}, expected {wanted}'
                         f'{where(state_dict, name)}')


def _check(state_dict: Mapping[str, Any], rule: Fixed | Tied) -> None:
    name, specs = rule.torch, specs_of(state_dict)
    if isinstance(rule, Tied):
        _check_shape(state_dict, name, tuple(specs[name].shape), tuple(specs[rule.same].shape))
        if not np.array_equal(to_numpy(state_dict[name]), to_numpy(state_dict[rule.same])):
            raise ValueError(f'convert: {original(state_dict, name)} differs from {original(state_dict, rule.same)}, '
                             f'which the config says it is tied to{where(state_dict, name)}')
    elif rule.value is not None:
        _check_shape(state_dict, name, tuple(specs[name].shape), rule.value.shape)
        if not rule.exact:
            return
        tensor = to_numpy(state_dict[name])
        # A file in half precision holds the rounded constant.
        real = jnp.issubdtype(tensor.dtype, jnp.floating)
        tolerance = max(1e-4, float(jnp.finfo(tensor.dtype).eps)) if real else 1e-4
        if not np.allclose(tensor.astype(np.float64), rule.value, atol=tolerance, rtol=tolerance):
            raise ValueError(f'convert: {original(state_dict, name)} differs from the values that this model computes '
                             f'for it{where(state_dict, name)}')


def _read(state_dict: Mapping[str, Any], rule: Rule, leaf: Any, placed: Any) -> Any:
    """The parameter of `rule`, like `leaf`: a numpy array, or laid out as `placed` says."""
    whole = tuple((0, size) for size in leaf.shape)
    if placed is None:
        return _read_parts(state_dict, rule, leaf, leaf.dtype, {whole})[whole]
    sharding, dtype = placed, leaf.dtype
    if isinstance(placed, jax.ShapeDtypeStruct):
        sharding, dtype = placed.sharding, placed.dtype
    bounds = lambda index: tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape))
    places = sharding.addressable_devices_indices_map(leaf.shape)
    parts = _read_parts(state_dict, rule, leaf, dtype, set(map(bounds, places.values())))
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: parts[bounds(index)])


Bounds = tuple[tuple[int, int], ...]  # (begin, end) on each axis


def _read_parts(state_dict: Mapping[str, Any], rule: Rule, leaf: Any, dtype: Any,
                wanted: Iterable[Bounds]) -> dict[Bounds, np.ndarray]:
    """Parts of the parameter of `rule`. Each tensor is asked for once, if it has a share in one of them; of one that is
    mapped no more is read than that."""
    one = tuple(leaf.shape[1:] if rule.stacked else leaf.shape)
    shape = _tensor_shape(rule, leaf.shape)
    parts = {bounds: np.empty([end - begin for begin, end in bounds], dtype) for bounds in wanted}
    for i in range(leaf.shape[0] if rule.stacked else 1):
        targets = []  # what block i fills, and with which of its values
        for bounds, part in parts.items():
            if not rule.stacked:
                targets.append((part, bounds))
            elif bounds[0][0] <= i < bounds[0][1]:
                targets.append((part[i - bounds[0][0], ...], bounds[1:]))
        if not targets:
            continue
        names = [name.format(i=i) for name in rule.names]
        tensors = [_tensor(state_dict, name, shape) for name in names]
        block = rule.codec.to_flax(tensors[0] if len(tensors) == 1 else np.concatenate(tensors), one)
        for target, inside in targets:
            with np.errstate(over='ignore'):  # what `dtype` cannot hold is found below
                target[...] = block[tuple(slice(*bounds) for bounds in inside)]
            if not np.isfinite(target).all():
                raise ValueError(_not_finite(state_dict, dict(zip(names, tensors)), dtype))
        del tensors, block
    return parts


def _tensor(state_dict: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = to_numpy(state_dict[name])
    _check_shape(state_dict, name, tensor.shape, shape)
    return tensor


def _not_finite(state_dict: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any) -> str:
    """The error that names the first of `tensors` that is not finite in `dtype`."""
    with np.errstate(over='ignore'):
        name = next(name for name, x in tensors.items() if not np.isfinite(x.astype(dtype)).all())
    return f'convert: {original(state_dict, name)} holds values that are not finite{where(state_dict, name)}'


# ---- To a state dict -------------------------------------------------------------------------------------------------

class Tensors(Mapping):
    """The state dict that `to_flax` would turn into `params`, in the order of `rules` and block by block. Each tensor
    is made when it is asked for, and of a parameter in shards no more than that tensor is brought to the host.

    Args:
        params: arrays, of numpy or jax. Of `ShapeDtypeStruct`s there is nothing but `specs`.
        dtype: of the tensors.
        tied: with the copies that `Tied` rules make; files do without them.

    Attributes:
        specs: {name: ShapeDtypeStruct}, known without making any.

    Raises:
        ValueError: a parameter without a rule.
    """

    def __init__(self, params: Mapping[str, Any], rules: Rules, dtype: Any = np.float32, *, tied: bool = True):
        flat = flatten(params)
        self._dtype, used = np.dtype(dtype), set()
        self._makers: dict[str, Callable[[], np.ndarray]] = {}
        self.specs: dict[str, jax.ShapeDtypeStruct] = {}
        for rule in rules:
            if isinstance(rule, Fixed) and rule.value is not None:
                self._add(rule.torch, rule.value.shape, functools.partial(np.asarray, rule.value))
            elif isinstance(rule, Tied) and tied:
                self._add(rule.torch, self.specs[rule.same].shape, self._makers[rule.same])
            elif isinstance(rule, Rule) and rule.flax in flat:
                used.add(rule.flax)
                value = flat[rule.flax]
                shape = _tensor_shape(rule, value.shape)
                for place, name in enumerate(_names(rule, value.shape)):
                    self._add(name, shape, functools.partial(_part, rule, value, place))
        if set(flat) - used:
            raise ValueError(f'convert: no rule writes parameter {sorted(set(flat) - used)[0]}')

    def _add(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> None:
        self._makers[name], self.specs[name] = make, jax.ShapeDtypeStruct(shape, self._dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        # In C order: writers of files take an array's memory as it lies.
        return np.ascontiguousarray(np.asarray(self._makers[name]()).astype(self._dtype, copy=False))

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the tensor
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _part(rule: Rule, value: Any, place: int) -> np.ndarray:
    """The tensor at `place` among those of `rule`."""
    i, part = divmod(place, len(rule.names))
    if rule.stacked:
        value = value[i]
    elif isinstance(value, jax.Array):
        value = jax.numpy.array(value)  # a copy, for an array holds on to what it has once brought to the host
    tensor = rule.codec.to_torch(np.asarray(value))
    return tensor if len(rule.names) == 1 else np.split(tensor, len(rule.names))[part]


def to_torch(params: Mapping[str, Any], rules: Rules) -> dict[str, np.ndarray]:
    """All of `Tensors`, float32; what is laid out alike is a view of a numpy parameter, the rest a copy.

    Raises:
        ValueError: a parameter without a rule.
    """
    return dict(Tensors(params, rules))


def tensor_shapes(expected: Mapping[str, Any], rules: Rules) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the state dict of parameters of the shapes of `expected` (see `param_shapes`)."""
    return {name: tuple(spec.shape) for name, spec in Tensors(expected, rules).specs.items()}
