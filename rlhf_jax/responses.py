"""Responses as token arrays: where they end, which tokens count, where the reward model reads, which keys draw them.

A response ends at its first EOS, which is part of it and is trained on. Its end is found from EOS and never from
padding: with pad = eos the two cannot be told apart, and a response cut at the first pad loses the token that ends it.
"""
import jax
import jax.numpy as jnp

Array = jax.Array


def first_true(x: Array) -> Array:
    """Index of the first True along the last axis, its length where there is none: bool [..., L] -> int32 [...]."""
    return jnp.where(x.any(-1), jnp.argmax(x, -1), x.shape[-1]).astype(jnp.int32)


def lengths(tokens: Array, eos: int) -> Array:
    """Tokens of each response including its first EOS; L where there is none: int [..., L] -> int32 [...]."""
    return jnp.minimum(first_true(tokens == eos) + 1, tokens.shape[-1])


def lengths_by_padding(tokens: Array, eos: int, pad: int) -> Array:
    """`lengths` as the published code finds it, from the first pad after truncation: int [..., L] -> int32 [...].

    Equal to `lengths` while no response holds `pad` before its EOS. With pad = eos it leaves EOS out, so EOS is never
    trained: use it only to repeat runs that did so (the published GSM8K runs).
    """
    return first_true(truncate(tokens, eos, pad) == pad)


def truncate(tokens: Array, eos: int, pad: int) -> Array:
    """Every token after the first EOS becomes `pad`; EOS stays. int [..., L] -> [..., L]."""
    return jnp.where(mask(lengths(tokens, eos), tokens.shape[-1]), tokens, pad)


def mask(lengths: Array, num_tokens: int) -> Array:
    """True at the first `lengths` of `num_tokens` positions: int [...] -> bool [..., L]."""
    return jnp.arange(num_tokens) < lengths[..., None]


def position_ids(attention_mask: Array) -> Array:
    """Positions that count attended tokens from 0, whatever the padding on the left: [..., T] -> int32 [..., T]."""
    attention_mask = (attention_mask > 0).astype(jnp.int32)
    return jnp.cumsum(attention_mask, -1) - attention_mask


def score_index(lengths: Array, num_prompt: int, *, before_eos: bool = False) -> Array:
    """Which position of a row [prompt, response] a reward model's score is read from: its last token (EOS if it ends).

    Args:
        lengths: int [...], response tokens, EOS included.
        num_prompt: P, prompt positions of the row, padding included.
        before_eos: read one token earlier, as a scorer with pad = eos does; gold scores were published that way.

    Returns:
        int32 [...].
    """
    return num_prompt + lengths - (2 if before_eos else 1)


def penalize_missing_eos(rewards: Array, tokens: Array, eos: int, penalty: float | None = -1.0) -> Array:
    """Rewards [...] with `penalty` in place of that of each response [..., L] that never ends. None leaves them."""
    if penalty is None:
        return rewards
    return jnp.where((tokens == eos).any(-1), rewards, penalty)


def pick(x: Array, index: Array) -> Array:
    """The completions `index` of each prompt: [B, K, ...], int [B, C] -> [B, C, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)


def sample_keys(key: Array, prompt_ids: Array, num_samples: int, version: int | Array = 0) -> Array:
    """One typed key for each (prompt, completion, policy version): int [B] -> [B, K].

    Key (b, k) is `key` folded with the version, then with `prompt_ids[b]`, then with k. A completion's randomness
    depends on its prompt's id and not on its place, so neither reordering prompts nor drawing more completions changes
    those that were drawn before.
    """
    key = jax.random.fold_in(key, version)
    per_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(prompt_ids, jnp.uint32))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(per_prompt, jnp.arange(num_samples, dtype=jnp.uint32))
