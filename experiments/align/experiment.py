"""A text-to-code model trained on the codes it writes, by a reward on the images that a frozen generator makes of them.

The policy is a masked-diffusion model (`writer.py`), its completions are codes, drawn and pictured in `rollouts.py` and
rewarded in `rewards.py`. Everything else is `experiments.rlhf.policy`: algorithms, staleness, transports, Elastic
Reset, adapters, resuming.
"""
import ml_collections
from jax.sharding import Mesh

from experiments.align import rollouts, writer
from experiments.rlhf.policy.experiment import build_policy
from experiments.rlhf.policy.kind import Kind
from experiments.runtime.experiment import Experiment

# Looked up when called, so that a test may put another in the place of one.
KIND = Kind(
    settled=lambda config: config, check=writer.check, check_inputs=rollouts.check_inputs, refusals=writer.refusals,
    networks=lambda config, has_critic: writer.CodeWriter(config),
    decoding=lambda config, mesh: rollouts.Decoding(config, mesh),
    generator=lambda config, mesh, weights: rollouts.CodeGenerator(config, mesh),
    sampler_program=lambda config, devices: rollouts.sampler_program(config, devices),
    batch_shapes=writer.batch_shapes, num_tokens=lambda config: writer.make_model(config).vocab_size,
    held_out=rollouts.held_out, models=lambda config, mesh: rollouts.models(config, mesh),
    models_are='models that draw')


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    return build_policy(KIND, config, mesh)
