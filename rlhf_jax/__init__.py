"""Reinforcement learning from human feedback in JAX/Flax: language models and their sampler, losses, asynchronous
rollouts, Elastic Reset, weight conversion.

Pure functions and Linen modules; import the file you need, `from rlhf_jax.losses import online_dpo`.

Conventions shared by all of it:

    N         rows of a batch: K completions of each of B prompts, K-major (`[p1..pB, p1..pB, ...]`), so that
              `x.reshape(K, B)` puts the completions of a prompt in one column
    L         response tokens; P, prompt tokens
    mask      [N, L], True where a token counts: up to and including EOS, nothing after it
    logprobs  [N, L] float32, of the tokens under the distribution that was sampled from (its temperature included)
    rewards   [N], one scalar a completion
"""
