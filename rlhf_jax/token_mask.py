"""A policy that may draw only what another policy, its mask, finds likely: NLPO (arXiv 2210.01241 §4).

The mask policy is an earlier copy of the policy. At every token the sampler keeps the likeliest tokens of the mask
policy and draws among them from the policy, renormalised:

    pi(a | s) 1[a in S(s)] / sum over b in S(s) of pi(b | s)        S(s): the top-p set of the mask policy

    decoder = MaskedDecoder(module, top_p=0.9, min_tokens=100, stop_tokens=(0,))
    weights = {'policy': params, 'mask': earlier}                                       # both split (`split_blocks`)
    samples = generate(decoder, weights, tokens, mask, key, sampling)
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.decoder import Cache

Array = jax.Array


def allowed_tokens(logits: Array, stop_tokens: Array, *, top_p: float, min_tokens: int) -> Array:
    """The tokens that may be drawn where the mask policy has `logits`.

    Args:
        logits: [..., V] of the mask policy, at temperature 1.
        stop_tokens: int [..., S], which broadcasts against `logits` but for the last axis. They are always allowed.
        top_p: the fewest likeliest tokens that together have this probability are allowed,
        min_tokens: and the so many likeliest in any case; ties with the last are included.

    Returns:
        bool [..., V].
    """
    logits = jax.lax.stop_gradient(logits.astype(jnp.float32))
    ranked = jnp.sort(logits, -1, descending=True)
    probs = jax.nn.softmax(ranked, -1)
    is_kept = (jnp.cumsum(probs, -1) - probs < top_p) | (jnp.arange(logits.shape[-1]) < min_tokens)
    threshold = jnp.min(jnp.where(is_kept, ranked, jnp.inf), -1, keepdims=True)
    is_stop = (stop_tokens[..., None] == jnp.arange(logits.shape[-1])).any(-2)
    return (logits >= threshold) | is_stop


def pack(allowed: Array) -> Array:
    """Sets of tokens, bool [..., V], at a bit a token: uint8 [..., ceil(V / 8)]."""
    return jnp.packbits(allowed, axis=-1)


def masked(logits: Array, packed: Array, tokens: Array) -> Array:
    """`logits` with -inf at all tokens but those that may be drawn, and the one that was.

    A mask policy that is read again has other last bits, and may leave out a token at the edge of its set; its
    probability would be 0, and nothing could be learned from it.

    Args:
        logits: [..., V].
        packed: uint8 [..., ceil(V / 8)], see `pack`.
        tokens: int [...], which were drawn.
    """
    vocab = logits.shape[-1]
    allowed = jnp.unpackbits(packed, axis=-1, count=vocab).astype(bool)
    return jnp.where(allowed | (tokens[..., None] == jnp.arange(vocab)), logits, -jnp.inf)


@struct.dataclass
class Caches:
    """What the two policies have read so far."""
    policy: Cache
    mask: Cache

    def repeat(self, times: int) -> 'Caches':
        """Copies every row `times` times, beside each other."""
        return Caches(self.policy.repeat(times), self.mask.repeat(times))


@dataclasses.dataclass(frozen=True)
class MaskedDecoder:
    """A decoder for `generate.generate` whose logits are the policy's where the mask policy allows the token, else
    -inf. Its parameters are `{'policy': ..., 'mask': ...}`, each those of `decoder` with split blocks.

    Attributes:
        decoder: of both policies.
        top_p, min_tokens, stop_tokens: see `allowed_tokens`.
    """
    decoder: Any
    top_p: float
    min_tokens: int
    stop_tokens: tuple[int, ...] = ()

    @property
    def dtype(self) -> Any:
        return self.decoder.dtype

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_length(self) -> int:
        return self.decoder.max_length

    def clone(self, **fields: Any) -> 'MaskedDecoder':
        """The same with other fields of the decoder."""
        return dataclasses.replace(self, decoder=self.decoder.clone(**fields))

    def apply(self, variables: Any, tokens: Array, *, cache: Caches | None = None,
              **arguments: Any) -> tuple[Array, Caches]:
        """Logits and caches of a prompt or of a token more, as `Decoder.__call__` gives them where it has a cache."""
        def read(name: str) -> tuple[Array, Cache]:
            before = None if cache is None else getattr(cache, name)
            return self.decoder.apply({'params': variables['params'][name]}, tokens, cache=before, **arguments)
        (logits, policy), (likely, mask) = read('policy'), read('mask')
        allowed = allowed_tokens(likely, jnp.array(self.stop_tokens, jnp.int32), top_p=self.top_p,
                                 min_tokens=self.min_tokens)
        return jnp.where(allowed, logits, -jnp.inf), Caches(policy, mask)
