"""Losses on given text and given preferences: supervised fine-tuning and the reward model."""
import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.logprobs import token_logprobs

Array = jax.Array
Loss = tuple[Array, dict[str, Array]]


def sft(logits: Array, tokens: Array, mask: Array, *, prompt_mask: Array | None = None,
        segment_ids: Array | None = None) -> Loss:
    """Next-token cross entropy, mean over the tokens that count:

        loss = -sum_t w_t log p(x_t | x_<t) / sum_t w_t

    Args:
        logits: [N, T, V], any float dtype; those at position t - 1 predict token t.
        tokens: int [N, T].
        mask: [N, T], True at text, EOS included, False at padding. Made from lengths, not by comparing with the pad id:
            with pad = eos that would untrain EOS.
        prompt_mask: [N, T], True at tokens of a prompt, which then are not trained on. None trains on all, as the
            paper's TL;DR models were.
        segment_ids: int [N, T], for rows that hold several packed texts: a text's first token is predicted by nothing.
            The model must keep attention and positions within segments. None: one text a row.

    Returns:
        Metrics `tokens` (how many counted), `accuracy` and `perplexity`. A batch in which nothing counts has loss 0.
    """
    weights = trained_tokens(mask, prompt_mask, segment_ids)
    logprobs = token_logprobs(logits[:, :-1], tokens[:, 1:])
    loss = -masked.mean(logprobs, weights)
    correct = jnp.argmax(logits[:, :-1], -1) == tokens[:, 1:]
    return loss, jax.lax.stop_gradient({'tokens': weights.sum().astype(jnp.float32), 'perplexity': jnp.exp(loss),
                                        'accuracy': masked.mean(correct.astype(jnp.float32), weights)})


def trained_tokens(mask: Array, prompt_mask: Array | None = None, segment_ids: Array | None = None) -> Array:
    """bool [N, T - 1]: whether `sft` trains on token t + 1, predicted at t; arguments [N, T] as of `sft`."""
    weights = mask[:, 1:] > 0
    if prompt_mask is not None:
        weights &= ~(prompt_mask[:, 1:] > 0)
    if segment_ids is not None:
        weights &= segment_ids[:, 1:] == segment_ids[:, :-1]
    return weights


def reward_model(chosen: Array, rejected: Array, *, margin: Array | float = 0.0, centering: float = 0.0) -> Loss:
    """Bradley-Terry loss of a scalar reward (arXiv 2203.02155, eq. 1; async RLHF §4):

        loss = mean_i [ -log sigmoid(r_c - r_r - margin_i) + centering (r_c + r_r)^2 ]

    Args:
        chosen, rejected: [N], scores read at the last token of each text (`responses.score_index`).
        margin: [N] or a number, by how much a pair's scores should at least differ (arXiv 2307.09288, §3.2.2).
        centering: weight of the pull of rewards towards zero mean (arXiv 2312.09244). 0, as in the paper: off.

    Returns:
        Metrics `accuracy` (ties count as wrong), `margin` (mean of r_c - r_r), `chosen` and `rejected` means.
    """
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin).mean()
    if centering:
        loss = loss + centering * jnp.square(chosen + rejected).mean()
    return loss, jax.lax.stop_gradient({
        'accuracy': (chosen > rejected).mean(dtype=jnp.float32), 'margin': (chosen - rejected).mean(),
        'chosen': chosen.mean(), 'rejected': rejected.mean()})
