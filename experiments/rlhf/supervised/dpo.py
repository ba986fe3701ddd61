"""Direct preference optimisation on given pairs (`rlhf_jax.losses.preference.dpo`).

The reference is what training starts from: a frozen copy, or with an adapter the same weights without it.
"""
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.models import architecture
from experiments.rlhf.supervised import experiment as supervised
from experiments.runtime.experiment import Experiment
from rlhf_jax.logprobs import sequence_logprobs, token_logprobs
from rlhf_jax.losses import preference


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    model = architecture.decoder(config.model)

    def logprobs(params, batch):
        """Log-probabilities [B, 2] of whole responses, EOS included: chosen, rejected."""
        tokens, mask = supervised.interleaved(batch)
        logits = model.apply({'params': params}, tokens, mask=mask)
        start = jnp.repeat(batch['prompt_length'], 2)[:, None]
        response = mask[:, 1:] & (jnp.arange(1, tokens.shape[1]) >= start)
        return sequence_logprobs(token_logprobs(logits[:, :-1], tokens[:, 1:]), response).reshape(-1, 2)

    def rows(params, reference, batch):
        policy, ref = logprobs(params, batch), logprobs(reference, batch)
        return {'chosen': policy[:, 0], 'rejected': policy[:, 1], 'ref_chosen': ref[:, 0], 'ref_rejected': ref[:, 1]}

    def reduce(rows):
        value, metrics = preference.dpo(
            *(jnp.asarray(rows[name]) for name in ('chosen', 'rejected', 'ref_chosen', 'ref_rejected')),
            beta=config.loss.beta, loss_type=config.loss.loss_type)
        return metrics | {'loss': value}

    def loss(params, reference, batch):
        metrics = reduce(rows(params, reference, batch))
        metrics['pairs'] *= config.accumulate  # metrics are means over microbatches; this one is a number of things
        return metrics.pop('loss'), metrics

    return supervised.build(config, mesh, supervised.Objective(
        init=lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))['params'], loss=loss, rows=rows, reduce=reduce,
        open=supervised.open_pairs, batch=supervised.pair_shapes(config), keeps_reference=True))
