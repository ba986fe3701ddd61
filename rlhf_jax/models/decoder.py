"""Base of the decoder-only language models (GPT-2, GPT-NeoX, LLaMA) and how they are called.

    logits = module.apply({'params': p}, tokens)                                     # [B, T, V] float32
    logits = module.apply({'params': p}, tokens, mask=mask)                          # padded left or right, or packed
    hidden = module.apply({'params': p}, tokens, mask=mask, output='hidden')         # [B, T, D], after the final norm
    logits, cache = module.apply({'params': p}, prompt, mask=mask, at=last, cache_length=S)   # prefill: [B, V]
    logits, cache = split.apply({'params': q}, token, cache=cache)                   # decode: [B, 1, V]

with `split, q = split_blocks(module, p)`: training and prefill scan over blocks stacked on a leading axis, decoding
runs through them one by one, each with a cache buffer of its own. (Written within a scan, the stacked cache would be
copied whole for every token and layer.)

`mask` says which tokens are there. Positions count them, from 0 in each row, so that a row means the same however it is
padded; what a model returns at padding is unspecified, but finite. An int `mask` numbers the sequences packed in a row.
"""
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import attention, decode_attention, layers

Array = jax.Array


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in slots 0, 1, ... of each row.

    Attributes:
        keys, values: one [B, H / f, S, f D] a layer, H the key-value heads: the axes a decode step's two products want.
            `f` heads lie side by side (`heads_beside`), which the shapes say.
        mask: bool [B, S], slots that hold a token (padding of the prompt, and slots not written yet, do not).
        index: int32 [], the slot of the next token in all rows; or [B], one a row.
    """
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    index: Array

    @property
    def length(self) -> int:
        """S, slots in a row."""
        return self.mask.shape[1]

    def repeat(self, times: int) -> 'Cache':
        """Copies every row `times` times, beside each other: no row leaves its device."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, 0) if x.ndim else x, self)


@struct.dataclass
class Context:
    """Input of every block beside the tokens.

    Attributes:
        rotary: of `layers.rotary`; None for models with learned positions.
        mask: bool [B, 1, T, S], which keys a query sees; None: decided by causality alone.
        segments: int32 [B, T], where without a cache they say the same: a query sees its own segment.
        index: slot of the first of the T tokens in the cache; None without one.
    """
    rotary: Any = None
    mask: Array | None = None
    segments: Array | None = None
    index: Array | None = None


def positions_of(mask: Array) -> Array:
    """Position of each token in its sequence.

    Args:
        mask: bool [B, T], True where there is a token; or int [B, T], 0 at padding and else the number of the sequence
            among those packed in the row, increasing along it.

    Returns:
        int32 [B, T]; at padding, the position of the token before it, or 0.
    """
    present = mask != 0
    count = jnp.cumsum(present, 1, dtype=jnp.int32) - 1
    number = jax.lax.cummax(mask.astype(jnp.int32), axis=1)
    previous = jnp.pad(number, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(number != previous, count, 0), axis=1)
    return jnp.maximum(count - start, 0)


def prepare(tokens: Array, mask: Array | None, positions: Array | None, cache: Cache | None, *,
            window: int = 0) -> tuple[Array, Context]:
    """Positions of the tokens, and the context of the blocks without its rotary part.

    Args:
        window: a token sees itself and the `window` - 1 tokens of its sequence before it, padding not counted; 0: all.

    Raises:
        ValueError: shapes that do not agree.
    """
    if tokens.ndim != 2:
        raise ValueError(f'tokens have shape {tokens.shape}, expected [batch, length]')
    for name, x in (('mask', mask), ('positions', positions)):
        if x is not None and x.shape != tokens.shape:
            raise ValueError(f'{name} has shape {x.shape}, expected that of the tokens, {tokens.shape}')
    batch, length = tokens.shape
    if cache is None:
        segments = None if mask is None else mask.astype(jnp.int32)
        if mask is None:
            default, visible = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape), None
        else:
            default = positions_of(mask)
            visible = (mask[:, :, None] == mask[:, None, :]) & (mask[:, None, :] != 0)
            visible = visible[:, None]
        if 0 < window < length:  # a shorter row lies within it
            near = (default[:, :, None] - default[:, None, :] < window)[:, None]
            visible, segments = near if visible is None else visible & near, None
        return (default if positions is None else positions), Context(mask=visible, segments=segments)

    if batch != cache.mask.shape[0] or length > cache.length:
        raise ValueError(f'tokens have shape {tokens.shape}, the cache {cache.mask.shape[0]} rows of {cache.length}')
    present = jnp.ones(tokens.shape, bool) if mask is None else mask != 0
    if positions is None:
        positions = cache.mask.sum(1, dtype=jnp.int32)[:, None] + jnp.cumsum(present, 1, dtype=jnp.int32) - 1
    index = jnp.broadcast_to(cache.index, (batch,))
    slots = jnp.arange(cache.length)
    query_slots = index[:, None] + jnp.arange(length)
    new_mask = _written(cache, present).mask
    visible = new_mask[:, None, :] & (slots <= query_slots[..., None])
    if 0 < window < cache.length:
        count = jnp.cumsum(new_mask, 1, dtype=jnp.int32)
        visible &= jnp.take_along_axis(count, query_slots, 1)[..., None] - count[:, None, :] < window
    return positions, Context(mask=visible[:, None], index=cache.index)


def attend(q: Array, k: Array, v: Array, context: Context, kv: tuple[Array, Array] | None, *, causal: bool = True,
           impl: str = 'xla') -> tuple[Array, tuple[Array, Array]]:
    """Softmax attention over the tokens themselves, or over a cache that they are written to first.

    Args:
        q: [B, T, H, D].
        k, v: [B, T, Hkv, D]; each is read by H / Hkv queries.
        kv: keys and values of the layer in the cache, see `Cache`.
        causal: a token does not see later ones. With a cache it never does.
        impl: 'auto', 'xla', 'cudnn' or 'splash', see `attention.choose`; over a cache 'xla', or else `decode_attention`
            where it takes the call.

    Returns:
        [B, T, H, D], and keys and values: the updated `kv`, or `k` and `v` as a cache has them.
    """
    chex.assert_rank((q, k, v), 4)
    chex.assert_equal_shape((k, v))
    chex.assert_equal_shape((q, k), dims=(0, 1, 3))
    if kv is None:
        out = attention.fused(q, k, v, mask=context.mask, segments=context.segments, causal=causal, impl=impl)
        if out is None:
            out = jax.nn.dot_product_attention(q, k, v, mask=context.mask, is_causal=causal, implementation='xla')
        beside = heads_beside(*k.shape[2:])
        return out, (_side_by_side(k, beside), _side_by_side(v, beside))
    assert context.index is not None and context.mask is not None  # `prepare` gives both where there is a cache
    keys, values = (_write(buffer, new, context.index) for buffer, new in zip(kv, (k, v)))
    batch, length, heads, dim = q.shape
    if impl != 'xla' and decode_attention.takes(q, keys):
        ends = jnp.broadcast_to(context.index + 1, (batch,))
        return decode_attention.decode_attention(q, keys, values, context.mask[:, 0, 0], ends), (keys, values)
    beside = keys.shape[-1] // dim
    q = q.reshape(batch, length, k.shape[2], -1, dim)
    if beside > 1:
        q = _among(q, beside)
    scores = jnp.einsum('bthgd,bhsd->bhgts', q, keys.astype(q.dtype), preferred_element_type=jnp.float32) * dim ** -0.5
    scores = jnp.where(context.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, -1).astype(q.dtype)
    out = jnp.einsum('bhgts,bhsd->bthgd', probs, values.astype(q.dtype))
    if beside > 1:  # of what a query read, the columns of its own head
        out = jnp.einsum('bthigid->bthigd', out.reshape(*out.shape[:3], beside, -1, beside, dim))
    return out.reshape(batch, length, heads, dim), (keys, values)


def heads_beside(kv_heads: int, dim: int) -> int:
    """How many key-value heads of width `dim` a cache keeps side by side where it is traced for.

    A TPU pads the last axis of an array to 128 numbers: heads of 64 would take twice their memory, and twice the time
    that a decode step needs to read them. Elsewhere 1.
    """
    if attention.target()[0] != 'tpu':
        return 1
    of_a_device = kv_heads // layers.mesh_axes('heads')[1]
    return max((n for n in range(1, 128 // dim + 1) if of_a_device and of_a_device % n == 0), default=1)


def _among(q: Array, beside: int) -> Array:
    """Queries [B, T, H, G, D] as those of `beside` heads at once, [B, T, H / beside, beside G, beside D]: zero in the
    columns of the other heads, so that a product with all of them is that with their own."""
    batch, length, heads, group, dim = q.shape
    q = q.reshape(batch, length, heads // beside, beside, group, 1, dim)
    q = q * jnp.eye(beside, dtype=q.dtype)[:, None, :, None]
    return q.reshape(batch, length, heads // beside, beside * group, beside * dim)


def run_blocks(block: functools.partial[nn.Module], depth: int, x: Array, context: Context, *, cache: Cache | None,
               mask: Array | None, cache_length: int, stacked: bool, remat: str,
               unroll: bool) -> tuple[Array, Cache | None]:
    """All blocks of a model; call it in the model's compact method.

    Args:
        block: class of the blocks with its fields given; `block(name=...)(x, context, kv)` returns `(x, kv)`.
        x: [B, T, D].
        cache: to read and extend.
        mask: of the T tokens.
        cache_length: without a cache, start one of so many slots; 0: none.

    Returns:
        The output, and the cache with the T tokens in it.

    Raises:
        ValueError: a cache with stacked blocks, or a prompt longer than the cache to start.
    """
    if stacked and cache is not None:
        raise ValueError('decoding runs block by block: module, params = split_blocks(module, params)')
    if cache is None and 0 < cache_length < x.shape[1]:
        raise ValueError(f'prompt of {x.shape[1]} tokens is longer than the cache of {cache_length}')
    if stacked:
        scanned = layers.scan_blocks(block.func, depth, remat=remat, unroll=unroll, num_broadcast=1)
        x, kv = scanned(*block.args, **block.keywords, collect=cache_length > 0, name='blocks')(x, context)
        pairs = [] if kv is None else [(kv[0][i], kv[1][i]) for i in range(depth)]
    else:
        pairs = []
        for i in range(depth):
            kv = None if cache is None else (cache.keys[i], cache.values[i])
            x, kv = block(collect=cache is not None or cache_length > 0, name=f'block_{i}')(x, context, kv)
            pairs.append(kv)
    if cache is not None:
        present = jnp.ones(x.shape[:2], bool) if mask is None else mask != 0
        keys, values = zip(*pairs)
        return x, dataclasses.replace(_written(cache, present), keys=keys, values=values)
    if cache_length == 0:
        return x, None
    return x, _started(pairs, mask, x.shape[:2], cache_length)


class Head(nn.Module):
    """Logits, float32 [..., V]: `kernel` [D, V], or the embedding table [V, D] it is tied to."""
    vocab_size: int
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, table: Array | None = None) -> Array:
        if table is not None:
            return layers.logits(x, table, transposed=True, dtype=self.dtype)
        init = nn.initializers.normal(self.init_std)
        kernel = self.param('kernel', init, (x.shape[-1], self.vocab_size), self.param_dtype)
        return layers.logits(x, kernel, dtype=self.dtype)


OUTPUTS = ('logits', 'hidden', 'both')


def outputs(x: Array, head: Callable[[Array], Array], *, at: Array | slice | None, output: str,
            cache: Cache | None) -> Any:
    """Output of a decoder.

    Args:
        x: [B, T, D], normed output of the last block.
        head: x -> logits.
        at: int32 [B], only this token of each row; a slice: only these of all rows; None: all.
        output: 'logits'; 'hidden': `x`; 'both': the pair.
        cache: returned beside it, where there is one.

    Raises:
        ValueError: an `output` not named here.
    """
    if output not in OUTPUTS:
        raise ValueError(f'output={output!r} is not one of {OUTPUTS}')
    if isinstance(at, slice):
        x = x[:, at]
    elif at is not None:
        x = x[jnp.arange(x.shape[0]), at]
    out = x if output == 'hidden' else head(x) if output == 'logits' else (head(x), x)
    return out if cache is None else (out, cache)


class Decoder(nn.Module, kw_only=True):
    """Base of GPT-2, GPT-NeoX and LLaMA; a subclass gives its blocks, its norm and where positions go in.

    Attributes:
        vocab_size: V.
        width, depth, num_heads: see `SIZES` beside the subclass.
        max_length: longest context: positions that have an embedding, or nothing but a limit.
        tied: the output head is the embedding table.
        activation: key of `layers.ACTIVATIONS`.
        eps: of the norms.
        stacked: blocks stacked on a leading axis and scanned, or one parameter tree each (`split_blocks`).
        remat, unroll: of stacked blocks, see `layers.scan_blocks`.
        attention_impl: see `attend`.
        dtype: compute; norms' statistics, rotary angles, softmax and logits are float32.
    """
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    max_length: int = 2048
    tied: bool = False
    activation: str = 'gelu'
    eps: float = 1e-5
    init_std: float = 0.02
    stacked: bool = True
    remat: str = 'none'
    unroll: bool = False
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    norm: ClassVar[Any] = layers.LayerNorm
    window = 0  # see `prepare`; a field of the families that have one

    def block(self) -> functools.partial[nn.Module]:
        """Class of the blocks with its fields given, see `run_blocks`."""
        raise NotImplementedError

    def place(self, x: Array, positions: Array, context: Context) -> tuple[Array, Context]:
        """Embedded tokens [B, T, D] and the blocks' context, one of them with the positions int32 [B, T] in it."""
        raise NotImplementedError

    def check(self, cache: Cache | None) -> None:
        """Raises ValueError where fields do not go together."""
        if self.width % self.num_heads:
            raise ValueError(f'{type(self).__name__}: width {self.width} is not divisible by num_heads '
                             f'{self.num_heads}')

    @nn.compact
    def __call__(self, tokens: Array, *, mask: Array | None = None, positions: Array | None = None,
                 cache: Cache | None = None, cache_length: int = 0, at: Array | slice | None = None,
                 output: str = 'logits') -> Any:
        """Scores of the next token, or, where the model is not causal, of each token itself.

        Args:
            tokens: int32 [B, T].
            mask: bool or int [B, T], see `positions_of`.
            positions: int32 [B, T], where they are not those that the mask gives.
            cache: tokens before these, to be extended (split blocks only).
            cache_length: start a cache of so many slots.
            at: int32 [B], only this token of each row; or a slice, only these tokens of all rows.
            output: 'logits'; 'hidden': the normed output of the last block, D wide, in `dtype`; 'both': the pair.

        Returns:
            float32 [B, T, V], or [B, V] with an array `at`; with a cache, the pair of it and the cache.

        Raises:
            ValueError: shapes that do not agree, or more tokens than `max_length`.
        """
        longest = max(tokens.shape[-1], cache_length, 0 if cache is None else cache.length)
        if longest > self.max_length:
            raise ValueError(f'{type(self).__name__}: {longest} tokens, but max_length is {self.max_length}')
        self.check(cache)
        table = self.param('embed', nn.initializers.normal(self.init_std), (self.vocab_size, self.width),
                           self.param_dtype)
        positions, context = prepare(tokens, mask, positions, cache, window=self.window)
        x, context = self.place(layers.embed(table, tokens, dtype=self.dtype), positions, context)
        x, cache = run_blocks(self.block(), self.depth, x, context, cache=cache, mask=mask, cache_length=cache_length,
                              stacked=self.stacked, remat=self.remat, unroll=self.unroll)
        x = self.norm(self.eps, self.dtype, self.param_dtype, name='norm')(x)
        head = Head(self.vocab_size, self.init_std, self.dtype, self.param_dtype, name='lm_head')
        return outputs(x, lambda x: head(x, table if self.tied else None), at=at, output=output, cache=cache)


def split_blocks(module: Any, params: Mapping[str, Any], dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """Gives every block a parameter tree, 'block_0', 'block_1', ..., instead of the stacked 'blocks'.

    Args:
        module: a decoder.
        params: of it, stacked or split already.
        dtype: cast the matrices to it, so that decoding does not read and cast float32 masters for every token. With
            the module's own `dtype` this changes no result: norms, which compute in float32, are left alone.
    """
    out = {name: tree for name, tree in params.items() if name != 'blocks'}
    if 'blocks' in params:
        out |= {f'block_{i}': jax.tree.map(lambda p: p[i], params['blocks']) for i in range(module.depth)}
    return module.clone(stacked=False), out if dtype is None else in_compute_dtype(out, dtype)


def in_compute_dtype(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """`params` of a decoder with its matrices cast to the dtype it computes in, which changes no result: norms and
    biases, of a block one axis, stay as they are."""
    def cast(path: tuple, p: Any) -> Any:
        stacked = any(getattr(key, 'key', None) == 'blocks' for key in path)
        return p.astype(dtype) if p.ndim > 1 + stacked else p
    return jax.tree_util.tree_map_with_path(cast, dict(params))


def split_rules(rules: Sequence[tuple[str, P]]) -> tuple[tuple[str, P], ...]:
    """Turns the `PARTITION_RULES` of a model with stacked blocks into those of the same model with split ones."""
    return tuple((re.sub(r'^blocks/', r'block_\\d+/', pattern), P(*spec[1:]) if pattern.startswith('blocks/') else spec)
                 for pattern, spec in rules)


def _started(pairs: Sequence[tuple[Array, Array]], mask: Array | None, shape: tuple[int, ...], length: int) -> Cache:
    extra = length - shape[1]
    to_cache = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
    present = jnp.ones(shape, bool) if mask is None else mask != 0
    return Cache(keys=tuple(to_cache(k) for k, _ in pairs), values=tuple(to_cache(v) for _, v in pairs),
                 mask=jnp.pad(present, ((0, 0), (0, extra))), index=jnp.int32(shape[1]))


def _written(cache: Cache, present: Array) -> Cache:
    """Writes `present` [B, T] into the next slots of the cache's mask and moves its index past them."""
    if cache.index.ndim:
        update = jax.vmap(lambda row, new, i: jax.lax.dynamic_update_slice(row, new, (i,)))
        mask = update(cache.mask, present, cache.index)
    else:
        mask = jax.lax.dynamic_update_slice(cache.mask, present, (0, cache.index))
    return dataclasses.replace(cache, mask=mask, index=cache.index + present.shape[1])


def _side_by_side(x: Array, beside: int) -> Array:
    """Keys or values [B, T, H, D] as a cache has them, [B, H / beside, T, beside D]."""
    batch, length, heads, dim = x.shape
    return x.reshape(batch, length, heads // beside, beside * dim).transpose(0, 2, 1, 3)


def _write(buffer: Array, new: Array, index: Array) -> Array:
    """Writes `new` [B, T, H, D] into slots `index`, `index + 1`, ... of `buffer`, keys or values of a `Cache`."""
    new = _side_by_side(new, buffer.shape[-1] // new.shape[-1]).astype(buffer.dtype)
    if index.ndim:
        return jax.vmap(lambda row, x, i: jax.lax.dynamic_update_slice(row, x, (0, i, 0)))(buffer, new, index)
    return jax.lax.dynamic_update_slice(buffer, new, (0, 0, index, 0))
