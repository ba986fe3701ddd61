"""The code model: SEDD, a discrete diffusion over codes (arXiv 2507.12318 §4, arXiv 2310.16834)."""
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dlc_jax.diffusion import discrete
from dlc_jax.models import sedd
from experiments.dlc import trained
from experiments.dlc.data.codestore import open_code_store
from experiments.runtime import modules, placement
from experiments.runtime.experiment import Experiment
from experiments.runtime.stream import ArrayBatches
from experiments.runtime.training import training


def make_model(config: ml_collections.ConfigDict) -> sedd.SEDD:
    fields = dict(config.model) | {'length': config.model.num_codes, 'process': config.diffusion.process}
    fields.pop('num_codes')
    return modules.build(sedd.SEDD, sedd.SIZES, fields)


def make_diffusion(config: ml_collections.ConfigDict) -> discrete.DiscreteDiffusion:
    return modules.build_dataclass(discrete.DiscreteDiffusion, 'diffusion',
                                   dict(config.diffusion) | {'vocab_size': config.model.vocab_size})


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    model, diffusion, num_codes = make_model(config), make_diffusion(config), config.model.num_codes

    def init_params(key):
        return model.init(key, jnp.zeros((1, num_codes), jnp.int32), jnp.ones(1))['params']

    def loss(params, state, batch, rng):
        noise_key, drop_key = jax.random.split(rng)
        score = lambda tokens, sigma: model.apply(
            {'params': params}, tokens, sigma, train=True, rngs={'dropout': drop_key})
        return diffusion.loss(score, noise_key, batch['codes'])

    trained = training(config, mesh, init_params, loss)

    def step(state, batch):
        state, metrics = trained.step(state, batch)
        # The bound on -log p(code), per token: perplexity is its exponential.
        return state, metrics | {'nats_per_token': metrics['loss'] / num_codes}

    return Experiment(trained.init, loss, step, sedd.PARTITION_RULES,
                      {'codes': jax.ShapeDtypeStruct((config.batch_size, num_codes), jnp.int32)},
                      lambda: open_batches(config, placement.share_of(mesh)),
                      sampler=lambda params, key: sample(
                          config, params, jax.random.split(key, config.batch_size), config.batch_size))


def open_batches(config: ml_collections.ConfigDict, share: placement.Share = placement.WHOLE) -> ArrayBatches:
    store = open_code_store(config.data.path, num_codes=config.model.num_codes, vocab_size=config.model.vocab_size)
    return ArrayBatches({'codes': store.array('codes')}, config.batch_size, seed=config.seed,
                        share=share, casts={'codes': np.int32})


def sample(config: ml_collections.ConfigDict, params: Any, key: jax.Array, num: int) -> jax.Array:
    """`num` codes [num, L] int32 by `config.sampler`; pure, so that it can be jitted whole.

    `key`: one, or one a row.
    """
    model, sampler = make_model(config), config.sampler
    score = lambda tokens, sigma: model.apply({'params': params}, tokens, sigma)
    return make_diffusion(config).sample(score, key, (num, config.model.num_codes), sampler=sampler.name,
                                         num_steps=sampler.num_steps, eta=sampler.eta, window=tuple(sampler.window))


class CodeModel(trained.Sampler):
    """A trained code model; `sample` draws codes, int32 [num, L]."""
    experiment, build, draw = 'code_model', staticmethod(build), staticmethod(sample)
