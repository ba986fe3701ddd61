"""From configs to modules, and from a module to a program over all devices that takes any number of rows."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.runtime import checks, compiler, evaluation, partition
from experiments.runtime import mesh as mesh_lib

T = TypeVar('T')

FROM_SIZE = ('width', 'depth', 'num_heads', 'num_kv_heads', 'hidden', 'vocab_size', 'max_length')
_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build(cls: type[nn.Module], sizes: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Any:
    """A module from its named size and the other fields of a `model` config.

    Fields of `FROM_SIZE` that are 0 mean "as the size says"; `dtype` is a name.

    Raises:
        ValueError: an unknown size, field or dtype, with the nearest right name where there is one; or a 0 that the
            size does not replace.
    """
    fields = dict(config)
    size = fields.pop('size')
    if size not in sizes:
        raise ValueError(f'model.size={size!r} is not one of {tuple(sizes)}')
    fields = dict(sizes[size]) | {k: v for k, v in fields.items() if k not in FROM_SIZE or v}
    fields['dtype'] = dtype(fields)
    for field in dataclasses.fields(cls):
        if field.name in config and field.name not in fields and field.default is dataclasses.MISSING:
            raise ValueError(f'model.{field.name}={config[field.name]} must be at least 1: model.size={size!r} does '
                             'not say it')
    return build_dataclass(cls, 'model', fields)


def dtype(config: Mapping[str, Any], name: str = 'model') -> Any:
    """The dtype that `config['dtype']` names; `name`: of that part of the config."""
    if config['dtype'] not in _DTYPES:
        raise ValueError(f'{name}.dtype={config["dtype"]!r} is not one of {tuple(_DTYPES)}')
    return _DTYPES[config['dtype']]


def build_dataclass(cls: type[T], name: str, fields: Mapping[str, Any]) -> T:
    """`cls(**fields)`, where a field that `cls` does not have is an error that names the nearest."""
    allowed = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ('parent', 'name')]
    checks.fields(name, fields, allowed)
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
    checks.fields('sampler', given, tuple(config.sampler))
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


def row_keys(key: jax.Array, rows: range) -> np.ndarray:
    """Data of the keys `fold_in(key, i)` of rows i: what a row draws depends on its number alone."""
    return np.asarray(jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(rows))))


class Unit(NamedTuple):
    """How a set of rows is computed: `rows` of them at a time on each of `devices` of this process."""
    rows: int
    devices: int

    @classmethod
    def of(cls, batch_size: int, num: int) -> 'Unit':
        """For a set of `num` rows, whichever of them this process computes: the same program in every process, whose
        units begin at multiples of `rows`."""
        rows = min(batch_size, num)
        return cls(rows, min(len(jax.local_devices()), -(-num // rows)))


class Batched:
    """A function of rows, compiled once for a unit of rows a device and run on any number of rows over the devices of
    this process.

    A device computes whole units, each by the same program. What a row becomes then depends neither on how many devices
    there are nor on which process has it, as long as every process begins at a multiple of a unit.

    Args:
        one: `(params, rows) -> outputs`, row by row; pure.
        params: its parameters.
        unit: rows at a time; of sharded parameters all devices of the process are used.
        rules: PARTITION_RULES, for models too large for one device: each holds a share of the parameters, where their
            sizes can be divided, rather than all.
    """

    def __init__(self, one: Callable[[Any, Any], Any], params: Any, unit: Unit, rules: partition.Rules | None = None):
        devices = jax.local_devices() if rules else jax.local_devices()[:unit.devices]
        self._mesh = mesh_lib.make_mesh({'fsdp' if rules else 'data': -1}, devices)
        layout = mesh_lib.replicated(self._mesh)
        if rules and divisible(params, rules, self._mesh):
            layout = partition.param_shardings(params, rules, self._mesh)
        self._params = jax.device_put(params, layout)
        self._run = jax.jit(one, out_shardings=mesh_lib.batch_sharding(self._mesh),
                            compiler_options=compiler.options(self._mesh) if rules else None)
        self.batch_size = unit.rows * len(devices)

    def __call__(self, rows: Any, num: int, progress: Callable[[int], None] | None = None) -> Any:
        """Outputs for `num` rows (an array, a tree of them, or None) as numpy arrays; the last batch is filled up with
        its last row. A batch is begun before the one before it is fetched."""
        out: list[Any] = []
        running = None
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            for chosen, _ in evaluation.full_batches(num, self.batch_size):
                part = jax.tree.map(lambda x, chosen=chosen: np.asarray(x[chosen]), rows)
                begun = self._run(self._params, jax.device_put(part, mesh_lib.batch_sharding(self._mesh)))
                if running is not None:
                    self._fetch(running, out, num, progress)
                running = begun
            self._fetch(running, out, num, progress)
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:num], *out)

    def _fetch(self, running: Any, out: list[Any], num: int, progress: Callable[[int], None] | None) -> None:
        out.append(jax.tree.map(np.asarray, running))
        if progress:
            progress(min(len(out) * self.batch_size, num))


def divisible(params: Any, rules: partition.Rules, mesh: jax.sharding.Mesh) -> bool:
    """Whether `rules` can lay out `params` over `mesh`."""
    try:
        partition.param_shardings(params, rules, mesh)
    except ValueError:
        return False
    return True
