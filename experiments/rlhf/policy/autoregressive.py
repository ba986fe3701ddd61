"""The first kind of policy: a decoder that writes its response token by token after the prompt."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.rlhf.data import lengths
from experiments.rlhf.models import architecture, loading
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.policy import footprint, reward_model
from experiments.rlhf.policy import generator as generator_lib
from experiments.rlhf.policy.kind import Kind
from experiments.rlhf.policy.models import PolicyModels, carries_stop_tokens, sampling_of

Config = ml_collections.ConfigDict


def check(config: Config) -> None:
    """Raises a ValueError for settings of the sampler that cannot work."""
    sampling, module = config.sampling, architecture.decoder(config.model)
    sampling_of(config)
    lengths.check(config)
    if sampling.temperature <= 0:
        raise ValueError(f'sampling.temperature={sampling.temperature} must be positive: the learner needs the '
                         'probabilities that tokens were drawn with')
    if sampling.max_prompt < 1 or sampling.max_prompt + sampling.max_new_tokens > module.max_length:
        raise ValueError(f'sampling.max_prompt={sampling.max_prompt} and sampling.max_new_tokens='
                         f'{sampling.max_new_tokens} exceed the context of the model, {module.max_length}; lower one '
                         'of them')
    if any(not 0 < bucket <= sampling.max_prompt for bucket in sampling.buckets):
        raise ValueError(f'sampling.buckets={tuple(sampling.buckets)} must be lengths up to sampling.max_prompt='
                         f'{sampling.max_prompt}')


def check_inputs(config: Config) -> None:
    """Raises a ValueError or OSError for a tokenizer or weights that do not fit."""
    tokenizer_lib.tokenizer_of(config)
    if config.weights:
        loading.check_decoder(config.weights, config)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a rollout batch, [B, K, ...], prompts at their longest."""
    def shape(dtype, *more):
        return jax.ShapeDtypeStruct((config.batch_size, config.algorithm.num_samples, *more), dtype)
    length, prompt = config.sampling.max_new_tokens, config.sampling.max_prompt
    shapes = {'tokens': shape(jnp.int32, prompt + length), 'prompt_mask': shape(bool, prompt),
              'mask': shape(bool, length), 'logprobs': shape(jnp.float32, length),
              'policy_version': shape(jnp.int32, length)}
    if carries_stop_tokens(config):
        shapes['stop_tokens'] = shape(jnp.int32, 1)
    return shapes


def shortened(config: Config, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts prompts and responses of a rollout batch, each to one of `length_buckets` lengths."""
    sampling, count = config.sampling, config.length_buckets
    return lengths.cut_rollouts(batch, lengths.lengths(sampling.max_prompt, count),
                                lengths.lengths(sampling.max_new_tokens, count))


def held_out(config: Config) -> Config:
    """`config` with the prompts of `data.heldout`, sampled all at once."""
    config = config.copy_and_resolve_references()
    config.data.split = config.data.heldout
    config.rollout.update(dict(chunk=0, slots=0))
    return config


# Looked up when called, so that a test may put another in the place of one.
KIND = Kind(
    settled=tokenizer_lib.settled, check=check, check_inputs=check_inputs, refusals=lambda config: {},
    networks=lambda config, has_critic: PolicyModels(config, has_critic=has_critic),
    decoding=lambda config, mesh: generator_lib.Decoding(config, mesh),
    generator=lambda config, mesh, weights: generator_lib.Generator(config, mesh, weights),
    sampler_program=None, programs=lambda config, run: footprint.samplers(config, run) + footprint.scorers(config, run),
    models=lambda config, mesh: {path: params for path, (_, params) in reward_model.abstract(config, mesh).items()},
    batch_shapes=batch_shapes, num_tokens=lambda config: architecture.decoder(config.model).vocab_size,
    held_out=held_out, shortened=shortened)
