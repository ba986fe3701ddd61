"""Discrete Latent Codes: models, losses, diffusion processes, metrics and weight conversion in JAX/Flax.

Pure functions and Linen modules; import the file you need, `from dlc_jax.models.dit import DiT`.
"""
