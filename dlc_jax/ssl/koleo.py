"""KoLeo: spreads embeddings apart (arXiv 1806.03198, from the Kozachenko-Leonenko estimate of entropy).

After the original's `loss/koleo_loss.py`.
"""
import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def koleo_loss(x: Array, *, groups: int = 1, eps: float = 1e-8) -> Array:
    """Loss `-mean_i log(||x_i - x_nn(i)|| + eps)` of L2-normalised embeddings and nearest neighbours; scalar float32.

    Args:
        x: [B, D].
        groups: parts of the batch, each of B / groups consecutive rows, within which neighbours are looked for (the
            original's GPUs). With groups equal to the shards of the batch nothing crosses devices.

    Raises:
        ValueError: `groups` does not divide B, or leaves groups of one row.
    """
    chex.assert_rank(x, 2)
    if x.shape[0] % groups or x.shape[0] // groups < 2:
        raise ValueError(f'koleo: {x.shape[0]} rows in {groups} groups; every group needs the same number, at least 2 '
                         '(raise batch_size)')
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), eps * eps))
    x = x.reshape(groups, -1, x.shape[-1])
    fixed = jax.lax.stop_gradient(x)
    cosines = jnp.einsum('gbd,gcd->gbc', fixed, fixed, precision=jax.lax.Precision.HIGHEST)
    cosines = jnp.where(jnp.eye(x.shape[1], dtype=bool), -2.0, cosines)  # below any cosine: no row is its own neighbour
    neighbour = jax.vmap(lambda rows, i: rows[i])(x, jnp.argmax(cosines, -1))
    # eps inside the norm too, as in PyTorch's PairwiseDistance: the gradient of two equal rows stays finite.
    distance = jnp.sqrt(jnp.sum((x - neighbour + eps) ** 2, -1))
    return -jnp.mean(jnp.log(distance + eps))
