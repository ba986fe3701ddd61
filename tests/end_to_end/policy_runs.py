"""A tiny policy run, and one compiled step for all runs that differ only in how their batches come about."""
import contextlib
import dataclasses

import jax
import pytest

from configs.rlhf import base
from experiments import train
from experiments.rlhf.policy import generator as generator_lib
from experiments.runtime import mesh as mesh_lib

B, P, L = 8, 14, 8


def config_of(**fields):
    """Eight bare sums a batch, two completions of eight bytes each; `a__b=x` sets `config.a.b`."""
    config = base.policy().copy_and_resolve_references().unlock()
    config.model.update(dict(size='70m', width=32, depth=2, num_heads=2, vocab_size=264, max_length=32))
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 8, B, 1, 3
    config.data.num_rows = 20
    config.data.options = dict(num_steps=1, words=False, max_number=30)
    config.sampling.update(dict(max_new_tokens=L, max_prompt=P, temperature=0.7))
    config.reward.update(dict(kind='function', function='policy_rewards:ascii_share'))
    config.optimizer.learning_rate.update(dict(peak=3e-2, decay='constant'))
    for name, value in fields.items():
        *path, last = name.split('__')
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def devices(count, **sizes):
    return mesh_lib.make_mesh(sizes, jax.devices()[:count])


@contextlib.contextmanager
def shared_steps():
    """One step for each config and mesh: jax then compiles it once. How batches come about is not the step's business,
    so runs that differ in that alone share it; they share the conversion of weights for decoding as well."""
    steps, decoders, build, decoding = {}, {}, train.build, generator_lib.Decoding

    def build_once(config, mesh):
        if config.experiment not in ('policy', 'align'):
            return build(config, mesh)
        same = config.copy_and_resolve_references()
        same.rollout, same.reward, same.data, same.checkpoint_every, same.weights = {}, {}, {}, 0, ''
        if 'critic_weights' in same.algorithm:
            same.algorithm.critic_weights = ''
        key, built = (same.to_json(), mesh), build(config.copy_and_resolve_references(), mesh)
        first = steps.setdefault(key, built)
        return dataclasses.replace(built, init=first.init, step=first.step, loss=first.loss)

    def convert_once(config, mesh):
        key = config.model.to_json(), config.lora.to_json(), config.algorithm.mask.to_json(), mesh
        if key not in decoders:
            decoders[key] = decoding(config, mesh)
        return decoders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'build', build_once)
        patch.setattr(generator_lib, 'Decoding', convert_once)
        yield
