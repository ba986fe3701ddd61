"""From configs to modules, and from a module to a program over all devices that takes any number of rows."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.runtime import evaluation, launch, partition
from experiments.runtime import mesh as mesh_lib

T = TypeVar('T')

_FROM_SIZE = ('width', 'depth', 'num_heads', 'num_kv_heads', 'hidden', 'vocab_size', 'max_length')
_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build(cls: type[nn.Module], sizes: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Any:
    """A module from its named size and the other fields of a `model` config.

    Fields of `_FROM_SIZE` that are 0 mean "as the size says"; `dtype` is a name.

    Raises:
        ValueError: an unknown size, field or dtype, with the nearest right name where there is one.
    """
    fields = dict(config)
    size = fields.pop('size')
    if size not in sizes:
        raise ValueError(f'model.size={size!r} is not one of {tuple(sizes)}')
    fields = dict(sizes[size]) | {k: v for k, v in fields.items() if k not in _FROM_SIZE or v}
    fields['dtype'] = dtype(fields)
    return build_dataclass(cls, 'model', fields)


def dtype(config: Mapping[str, Any], name: str = 'model') -> Any:
    """The dtype that `config['dtype']` names; `name`: of that part of the config."""
    if config['dtype'] not in _DTYPES:
        raise ValueError(f'{name}.dtype={config["dtype"]!r} is not one of {tuple(_DTYPES)}')
    return _DTYPES[config['dtype']]


def build_dataclass(cls: type[T], name: str, fields: Mapping[str, Any]) -> T:
    """`cls(**fields)`, where a field that `cls` does not have is an error that names the nearest."""
    allowed = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ('parent', 'name')]
    launch.check_fields(name, fields, allowed)
    return cls(**fields)


def host() -> jax.Device:
    """The CPU, or the first device where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:
        return jax.local_devices()[0]


def with_sampler(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """`config` with fields of `config.sampler` replaced; None keeps what the config says."""
    given = {k: v for k, v in overrides.items() if v is not None}
    launch.check_fields('sampler', given, tuple(config.sampler))
    config = config.copy_and_resolve_references()
    config.sampler.update(given)
    return config


class _Unread(Exception):
    """Raised in place of reading tensors whose names and shapes are as they should be."""


def check_released(convert: Callable[[Callable[[Any], Any]], Any],
                   compare: Callable[[Any], None] | None = None) -> None:
    """Lets `convert` look at the names and shapes of released weights, and ends it before it reads one.

    Args:
        convert: takes `shardings`, which it calls with the parameters' shapes between the two (`convert.from_torch`).
        compare: is shown these shapes.

    Raises:
        ValueError, OSError: what `convert` or `compare` finds.
    """
    def stop(shapes):
        if compare:
            compare(shapes)
        raise _Unread

    try:
        convert(stop)
    except _Unread:
        pass


def row_keys(key: jax.Array, num: int) -> np.ndarray:
    """Data of the keys `fold_in(key, i)` of rows i = 0..num - 1: what a row draws depends on its number alone."""
    return np.asarray(jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(num))))


class Batched:
    """A function of rows, compiled once for one batch size and run on any number of rows over all devices.

    Args:
        one: `(params, key, rows) -> outputs` on `batch_size` rows; pure.
        params: its parameters.
        batch_size: rows at once; spread over all devices when their number divides it.
        rules: PARTITION_RULES, for models too large for one device: each holds a share of the parameters, where their
            sizes can be divided, rather than all.
    """

    def __init__(self, one: Callable[[Any, jax.Array, Any], Any], params: Any, batch_size: int,
                 rules: partition.Rules | None = None):
        devices = jax.devices() if rules or batch_size % len(jax.devices()) == 0 else jax.devices()[:1]
        batch_size += -batch_size % len(devices)
        self._mesh = mesh_lib.make_mesh({'fsdp' if rules else 'data': -1}, devices)
        layout = mesh_lib.replicated(self._mesh)
        if rules and divisible(params, rules, self._mesh):
            layout = partition.param_shardings(params, rules, self._mesh)
        self._params = jax.device_put(params, layout)
        self._run = jax.jit(one, out_shardings=mesh_lib.batch_sharding(self._mesh))
        self.batch_size = batch_size

    def __call__(self, key: jax.Array, rows: Any, num: int, progress: Callable[[int], None] | None = None) -> Any:
        """Outputs for `num` rows (an array, a tree of them, or None) as numpy arrays; batch b draws from
        `fold_in(key, b)`, and the last one is padded."""
        size, out = self.batch_size, []
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            for index, (chosen, _) in enumerate(evaluation.full_batches(num, size)):
                part = jax.tree.map(lambda x, chosen=chosen: np.asarray(x[chosen]), rows)
                part = jax.device_put(part, mesh_lib.batch_sharding(self._mesh))
                out.append(jax.tree.map(np.asarray, self._run(self._params, jax.random.fold_in(key, index), part)))
                if progress:
                    progress(min((index + 1) * size, num))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:num], *out)


def divisible(params: Any, rules: partition.Rules, mesh: jax.sharding.Mesh) -> bool:
    """Whether `rules` can lay out `params` over `mesh`."""
    try:
        partition.param_shardings(params, rules, mesh)
    except ValueError:
        return False
    return True
