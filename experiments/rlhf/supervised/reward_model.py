"""A reward model from preference pairs: Bradley-Terry on a scalar read at the last token of each text, its EOS unless
`add_eos` is False."""
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.models import architecture
from experiments.rlhf.supervised import experiment as supervised
from experiments.runtime.experiment import Experiment
from rlhf_jax.losses import supervised as losses
from rlhf_jax.models import heads


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    """The experiment. `config.weights` gives the trunk; the head on it is fresh."""
    model = architecture.reward_model(config.model)

    def rows(params, _, batch):
        tokens, mask = supervised.interleaved(batch)
        scores = heads.at_last_token(model.apply({'params': params}, tokens, mask=mask), mask).reshape(-1, 2)
        return {'chosen': scores[:, 0], 'rejected': scores[:, 1]}

    def loss(params, _, batch):
        scores = rows(params, None, batch)
        return losses.reward_model(scores['chosen'], scores['rejected'], margin=config.margin,
                                   centering=config.centering)

    def reduce(scores):
        value, metrics = losses.reward_model(*(jnp.asarray(scores[name]) for name in ('chosen', 'rejected')),
                                             margin=config.margin, centering=config.centering)
        return metrics | {'loss': value}

    return supervised.build(config, mesh, supervised.Objective(
        init=lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))['params'], loss=loss, rows=rows, reduce=reduce,
        open=supervised.open_pairs, batch=supervised.pair_shapes(config), prefix='backbone',
        trained=('score_head/.*',)))
