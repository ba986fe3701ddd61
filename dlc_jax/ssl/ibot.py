"""iBOT: the DINO loss on masked patches (arXiv 2111.07832; the original's `loss/ibot_patch_loss.py`)."""
import chex
import jax
import jax.numpy as jnp

from dlc_jax.ssl.dino import cross_entropy

Array = jax.Array


def ibot_loss(student: Array, teacher: Array, weights: Array, *, num_crops: int,
              temperature: float | Array = 0.1) -> Array:
    """Mean over crops of the mean cross entropy over a crop's masked patches; scalar float32.

    Args:
        student: [M, K] logits of the masked patches of all crops, padded to a static M.
        teacher: [M, K] probabilities for the same patches, which the teacher saw.
        weights: [M], 1 / (number of masked patches in that patch's crop), 0 on padding (`masking.pack_masks`).
        num_crops: global crops in the batch, masked or not.
    """
    chex.assert_equal_shape((student, teacher))
    chex.assert_shape(weights, student.shape[:1])
    # Padding points at some real patch, so its loss is finite; the weight of 0 removes it and its gradient.
    return jnp.sum(cross_entropy(student, teacher, temperature) * weights.astype(jnp.float32)) / num_crops
