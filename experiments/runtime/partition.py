"""Path rules -> shardings. A parameter that no rule covers, or an axis that does not divide, is an error."""
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, PartitionSpec]]


def path_name(path: tuple) -> str:
    """`('blocks', 'attn')` as jax key objects -> 'blocks/attn'."""
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """{'a/b/c': leaf} of any pytree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def prefixed(prefix: str, rules: Rules) -> tuple[tuple[str, PartitionSpec], ...]:
    """The same rules for a model that sits under `prefix` in a larger tree."""
    return tuple((f'{prefix}/(?:{pattern})', spec) for pattern, spec in rules)


def _spec_for(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    for pattern, spec in rules:  # noqa: B007, read after the break
        if re.fullmatch(pattern, name):
            break
    else:
        raise ValueError(f'partition: no rule covers parameter {name} {shape}; add one to PARTITION_RULES')
    if len(spec) > len(shape):
        raise ValueError(f'partition: {name} has shape {shape} but its rule {spec} names {len(spec)} axes')
    for size, axes in zip(shape, spec):
        ways = int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())]))
        if size % ways:
            raise ValueError(f'partition: {name} {shape}: {size} is not divisible by the {ways} devices of mesh axis '
                             f'{axes!r}; change mesh.{axes} or the model size')
    return spec


def param_shardings(params: Any, rules: Rules, mesh: Mesh) -> Any:
    """A `NamedSharding` for each leaf of `params` (arrays or `ShapeDtypeStruct`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec_for(path_name(path), leaf.shape, rules, mesh)), params)


def state_shardings(state: Any, rules: Rules, mesh: Mesh) -> Any:
    """Shardings of a whole `TrainState`: what mirrors a parameter (moments, EMA) is laid out like it, the rest
    replicated.

    A leaf mirrors a parameter when its path ends in the parameter's path and the shapes agree.
    """
    specs = {name: (leaf.shape, NamedSharding(mesh, _spec_for(name, leaf.shape, rules, mesh)))
             for name, leaf in flatten(state.params).items()}

    def one(path, leaf):
        parts = path_name(path).split('/')
        for start in range(len(parts)):
            shape, sharding = specs.get('/'.join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of `tree` under `shardings`."""
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))
