"""LoRA (arXiv 2106.09685): low-rank updates `kernel + alpha / r A B`, as further leaves of the parameter tree.

    params = lora.init(key, module, params, rank=16, alpha=32, targets=llama.LORA_TARGETS)
    frozen, adapter = lora.split(params)            # differentiate lora.join(frozen, adapter) by `adapter`
    params = lora.merge(params)                     # plain parameters again, for the sampler or for another adapter

Beside `kernel` [*in, *out] stand `lora_a` [*in, r], `lora_b` [r, *out] and `lora_scale` [], each with the leading axis
of the blocks where those are stacked; `layers.Dense` uses them where they are. So every function of parameters
(sampling, checkpoints, `decoder.split_blocks`, averaging) works on a model with an adapter as on one without. B starts
at zero: the model starts unchanged.
"""
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import layers

Array = jax.Array
Params = Mapping[str, Any]

LEAVES = ('lora_a', 'lora_b', 'lora_scale', 'lora_key', 'lora_keep')
PARTITION_RULES = ((r'.*/lora_(a|b|scale)', P()),)  # a few megabytes; put them before the model's own rules


def init(key: Array, module: nn.Module, params: Params, *, rank: int, alpha: float, targets: Sequence[str],
         dtype: Any = jnp.float32) -> dict[str, Any]:
    """Adds an adapter to every dense layer of `params` whose path a target matches.

    A is uniform in +-1/sqrt(in) (what PEFT draws), B is zero.

    Args:
        key: typed key.
        module: the model of `params`, called with tokens.
        params: nested dict, with stacked or split blocks.
        rank: r.
        alpha: updates are scaled by alpha / r.
        targets: regexes of paths such as 'blocks/attn/q'; the models' files have `LORA_TARGETS`.
        dtype: of the new leaves. Keep float32 over bfloat16 kernels: an update is far below one of their steps.

    Raises:
        ValueError: a rank below 1; a target that matches no dense layer, or one that does not read an adapter; a layer
            that has an adapter already.
    """
    if rank < 1:
        raise ValueError(f'lora: rank={rank} must be at least 1')
    matched: set[str] = set()
    readers = adaptable_layers(module)
    count = itertools.count()

    def visit(tree, path):
        if not isinstance(tree, Mapping):
            return tree
        hits = [target for target in targets if re.fullmatch(target, path)] if 'kernel' in tree else []
        if not hits:
            return {name: visit(sub, f'{path}/{name}' if path else name) for name, sub in sorted(tree.items())}
        if 'lora_a' in tree:
            raise ValueError(f'lora: {path} has an adapter already; merge it first')
        matched.update(hits)
        if path not in readers:
            raise ValueError(f'lora: {path} (target {hits[0]!r}) would ignore its adapter; the layers of '
                             f'{type(module).__name__} that read one are {sorted(readers)}')
        lead, inputs, outputs = _axes(path, tree['kernel'].shape)
        limit = math.prod(inputs) ** -0.5
        a = jax.random.uniform(jax.random.fold_in(key, next(count)), (*lead, *inputs, rank), dtype, -limit, limit)
        return dict(tree) | {'lora_a': a, 'lora_b': jnp.zeros((*lead, rank, *outputs), dtype),
                             'lora_scale': jnp.full(lead, alpha / rank, dtype)}

    out = visit(params, '')
    for target in targets:
        if target not in matched:
            raise ValueError(f'lora: target {target!r} matches no dense layer')
    return out


def with_dropout(key: Array, params: Params, rate: float) -> dict[str, Any]:
    """Parameters whose adapters read their inputs with dropout (as PEFT's `lora_dropout`): each layer of each block
    drops by a key of its own, made of `key`. To be differentiated by what `params` holds, and not to be kept.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f'lora: dropout={rate} must be in [0, 1)')
    count = itertools.count()

    def visit(path, layer):
        lead, _, _ = _axes(path, layer['kernel'].shape)
        keys = jax.random.split(jax.random.fold_in(key, next(count)), lead)
        return dict(layer) | {'lora_key': jax.random.key_data(keys), 'lora_keep': jnp.full(lead, 1 - rate)}
    return _visit({name: params[name] for name in sorted(params)}, visit)


def adaptable_layers(module: nn.Module) -> frozenset[str]:
    """Paths of the layers of `module` that read an adapter where there is one: those of type `layers.Dense`.

    Found by tracing the module on one token; nothing is computed.

    Raises:
        ValueError: the module cannot be called with tokens.
    """
    paths: set[str] = set()

    def record(call, args, kwargs, context):
        if isinstance(context.module, layers.Dense):
            paths.add('/'.join(context.module.path))
        return call(*args, **kwargs)

    try:
        with nn.intercept_methods(record):
            jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    except Exception as error:  # whatever a module of another kind raises when it is given tokens
        raise ValueError(f'lora: {type(module).__name__} cannot be called with tokens [1, 1], as the language models '
                         f'of rlhf_jax.models are ({type(error).__name__})') from error
    return frozenset(paths)


def split(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates all that stays frozen from the adapter, A and B of every adapted layer: (frozen, adapter).

    Raises:
        ValueError: no adapter.
    """
    frozen, adapter = _divide(params)
    if not adapter:
        raise ValueError('lora: these parameters have no adapter; see lora.init')
    return frozen, adapter


def join(frozen: Params, adapter: Params) -> dict[str, Any]:
    """Inverse of `split`."""
    out = dict(frozen)
    for name, sub in adapter.items():
        out[name] = join(out.get(name, {}), sub) if isinstance(sub, Mapping) else sub
    return out


def merge(params: Params) -> dict[str, Any]:
    """Kernels with their updates added, and no adapter: the same function up to rounding."""
    return _visit(params, lambda path, layer: {
        name: leaf for name, leaf in layer.items() if name not in LEAVES} | {'kernel': _shifted(path, layer, 1)})


def without(params: Params) -> dict[str, Any]:
    """The model before the adapter (the reference model of a LoRA policy): A, B and scale dropped, kernels shared."""
    return _visit(params, lambda _, layer: {name: leaf for name, leaf in layer.items() if name not in LEAVES})


def delta(path: str, layer: Params) -> Array:
    """Update `alpha / r A B`, float32, shaped like the kernel of the layer at `path`."""
    lead, inputs, outputs = _axes(path, layer['kernel'].shape)
    a = layer['lora_a'].astype(jnp.float32).reshape(*lead, math.prod(inputs), -1)
    b = layer['lora_b'].astype(jnp.float32).reshape(*lead, -1, math.prod(outputs))
    scale = layer['lora_scale'].astype(jnp.float32).reshape(*lead, 1, 1)
    return (scale * jnp.matmul(a, b, precision='highest')).reshape(layer['kernel'].shape)


def _shifted(path: str, layer: Params, sign: int) -> Array:
    kernel = layer['kernel']
    return (kernel.astype(jnp.float32) + sign * delta(path, layer)).astype(kernel.dtype)


def _axes(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes (block axis, input axes, output axes) of the kernel of the layer at `path`.

    The decoders have one dense layer of two input axes, heads and their width: the output of attention, 'attn/o'.
    """
    lead = 1 if 'blocks' in path.split('/') else 0
    inputs = 2 if path.endswith('attn/o') else 1
    return shape[:lead], shape[lead:lead + inputs], shape[lead + inputs:]


def _visit(tree: Params, change: Any, path: str = '') -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if 'lora_a' in tree:
        return change(path, tree)
    return {name: _visit(sub, change, f'{path}/{name}' if path else name) for name, sub in tree.items()}


def _divide(tree: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    frozen, adapter = {}, {}
    for name, sub in tree.items():
        if isinstance(sub, Mapping):
            frozen[name], inner = _divide(sub)
            if inner:
                adapter[name] = inner
        elif name in ('lora_a', 'lora_b'):
            adapter[name] = sub
        else:
            frozen[name] = sub
    return frozen, adapter
