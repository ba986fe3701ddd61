"""Reinforcement learning from human feedback in JAX/Flax: language models, sampler, objectives, weight conversion.

Pure functions and Linen modules; import the file you need, `from rlhf_jax.models.gpt_neox import GPTNeoX`.
"""
