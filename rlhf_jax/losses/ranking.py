"""Ranking images by captions (VSE++, arXiv 1707.05612, equation 6)."""
import jax
import jax.numpy as jnp

Array = jax.Array


def hardest_negatives(scores: Array, *, margin: float = 0.0) -> tuple[Array, dict[str, Array]]:
    """How far each pair falls short of its hardest rivals in the batch:

        mean over i of  max over j != i of [margin + s_ij - s_ii]_+  +  max over j != i of [margin + s_ji - s_ii]_+

    Args:
        scores: float32 [N, N], of image i with sentence j; those of a pair stand on the diagonal.
        margin: by which a pair should be ahead.

    Returns:
        The loss, and `first`: the share of sentences whose own image scores highest in the batch.
    """
    others = ~jnp.eye(len(scores), dtype=bool)
    of_pairs = jnp.diagonal(scores)
    of_sentences = jnp.where(others, jnp.maximum(margin + scores - of_pairs[:, None], 0), 0).max(1)
    of_images = jnp.where(others, jnp.maximum(margin + scores - of_pairs[None], 0), 0).max(0)
    first = (jnp.where(others, scores, -jnp.inf).max(0) < of_pairs).mean(dtype=jnp.float32)
    return (of_sentences + of_images).mean(), {'first': jax.lax.stop_gradient(first)}
