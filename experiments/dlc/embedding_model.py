"""The rival of the code model: a diffusion model over an encoder's continuous embeddings, in front of a generator that
is conditioned on them (RCG, arXiv 2312.03701; the row "DINOv2" of arXiv 2507.12318 table 2 is of this kind).

Every coordinate is standardized by the mean and deviation that the code store's embeddings have; the two travel with
the weights. (RCG normalizes each embedding by itself, which forgets its length.)
"""
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dlc_jax.diffusion import gaussian
from dlc_jax.models import rdm
from experiments.dlc import trained
from experiments.dlc.data.codestore import open_code_store
from experiments.runtime import modules, partition, placement
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from experiments.runtime.stream import ArrayBatches
from experiments.runtime.training import training

RULES = ((r'embeddings/(mean|std)', P()), *partition.prefixed('network', rdm.PARTITION_RULES))
LEAST_STD = 1e-6  # of a coordinate; below it there is nothing to draw


def make_model(config: ml_collections.ConfigDict) -> rdm.RDM:
    return modules.build(rdm.RDM, rdm.SIZES, config.model)


def make_diffusion(config: ml_collections.ConfigDict) -> gaussian.GaussianDiffusion:
    return modules.build_dataclass(gaussian.GaussianDiffusion, 'diffusion',
                                   dict(config.diffusion) | {'variance': 'fixed_large'})


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    model, diffusion, dim = make_model(config), make_diffusion(config), config.model.embedding_dim
    if dim < 1:
        raise ValueError(f'model.embedding_dim={dim} must be the size of the embeddings in data.path')

    def init_params(key):
        return {'network': model.init(key, jnp.zeros((1, dim)), jnp.zeros(1, jnp.int32))['params'],
                'embeddings': {'mean': jnp.zeros(dim), 'std': jnp.ones(dim)}}

    def loss(params, state, batch, rng):
        known = jax.lax.stop_gradient(params['embeddings'])
        predict = lambda x, t: model.apply({'params': params['network']}, x, t)
        return diffusion.loss(predict, rng, (batch['embeddings'] - known['mean']) / known['std'])

    def warm_start(state: TrainState) -> TrainState:
        known = statistics(open_embeddings(config))
        with_known = lambda params: params | {'embeddings': jax.tree.map(jnp.asarray, known)}
        return state.replace(params=with_known(state.params), ema=with_known(state.ema))

    fixed = (r'embeddings/.*', dict(learning_rate=0.0, weight_decay=0.0))
    trained = training(config, mesh, init_params, loss, groups=(fixed, *(config.optimizer.groups or ((r'.*', {}),))))
    return Experiment(trained.init, loss, trained.step, RULES,
                      {'embeddings': jax.ShapeDtypeStruct((config.batch_size, dim), jnp.float32)},
                      lambda: open_batches(config, placement.share_of(mesh)), warm_start=warm_start,
                      sampler=lambda params, key: sample(
                          config, params, jax.random.split(key, config.batch_size), config.batch_size))


def open_embeddings(config: ml_collections.ConfigDict) -> np.ndarray:
    """Embeddings [N, D] of the code store `data.path`.

    Raises:
        OSError, ValueError: no store there, one without embeddings, or with embeddings of another size.
    """
    embeddings = open_code_store(config.data.path).array('embeddings')
    if embeddings.shape[1:] != (config.model.embedding_dim,):
        raise ValueError(f'{config.data.path}: embeddings have {embeddings.shape[1]} dimensions but '
                         f'model.embedding_dim={config.model.embedding_dim}')
    return embeddings


def open_batches(config: ml_collections.ConfigDict, share: placement.Share = placement.WHOLE) -> ArrayBatches:
    return ArrayBatches({'embeddings': open_embeddings(config)}, config.batch_size, seed=config.seed, share=share,
                        casts={'embeddings': np.float32})


def statistics(embeddings: np.ndarray, block: int = 2 ** 14) -> dict[str, np.ndarray]:
    """Mean and standard deviation of each coordinate of [N, D], float32, read `block` rows at a time; a coordinate that
    does not vary has a deviation of 1."""
    parts = [np.asarray(embeddings[i:i + block], np.float64) for i in range(0, len(embeddings), block)]
    mean = sum(part.sum(0) for part in parts) / len(embeddings)
    std = np.sqrt(sum(np.square(part - mean).sum(0) for part in parts) / len(embeddings))
    return {'mean': mean.astype(np.float32), 'std': np.where(std < LEAST_STD, 1, std).astype(np.float32)}


def sample(config: ml_collections.ConfigDict, params: Any, key: jax.Array, num: int) -> jax.Array:
    """`num` embeddings [num, D] float32 by `config.sampler`; pure, so that it can be jitted whole.

    `key`: one, or one a row.
    """
    model, sampler = make_model(config), config.sampler
    diffusion = make_diffusion(config).respaced(sampler.num_steps)
    x = diffusion.sample(lambda x, t: model.apply({'params': params['network']}, x, t), key,
                         (num, config.model.embedding_dim), sampler=sampler.name, eta=sampler.ddim_eta)
    return x * params['embeddings']['std'] + params['embeddings']['mean']


class EmbeddingModel(trained.Sampler):
    """A trained embedding model; `sample` draws embeddings, float32 [num, D]."""
    experiment, build, draw = 'embedding_model', staticmethod(build), staticmethod(sample)
