"""A policy trained on what it samples: Online DPO, PPO, RLOO, Proximal RLOO, GRPO, Best-of-N (arXiv 2410.18252 §2-3),
each under Elastic Reset or a method it is compared with (arXiv 2312.07551) where `config.elastic.method` says so.

`models.py` has the networks, `algorithms.py` the losses, `step.py` the training step, `rollouts.py` the batches,
`rewards.py` and `evaluation.py` what completions are worth.
"""
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from experiments.rlhf.models import architecture, loading
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.policy import algorithms, evaluation, rollouts
from experiments.rlhf.policy.models import PolicyModels, carries_stop_tokens, sampling_of
from experiments.rlhf.policy.step import PolicyStep
from experiments.runtime import launch, modules, optim
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from rlhf_jax import elastic_reset as er


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    config = tokenizer_lib.settled(config)
    shards = mesh_lib.batch_shards(mesh)
    algorithm = algorithms.get(config.algorithm)
    check(config, shards)
    models = PolicyModels(config, has_critic=algorithm.critic)
    step = PolicyStep(config, algorithm, models, elastic_config(config), make_optimizer(config, models), shards)

    def check_inputs() -> None:
        tokenizer_lib.tokenizer_of(config)
        if config.weights:
            loading.check_decoder(config.weights, config)

    def warm_start(state: TrainState) -> TrainState:
        return jax.jit(step.start)(models.load(state.params), state.rng)

    def hooks(writer):
        return (evaluation.HeldOutPrompts(config, mesh, step.divergence, writer),) if config.eval_every else ()

    return Experiment(step.init, step.loss, step.__call__, models.rules, batch_shapes(config), None,
                      check=check_inputs, warm_start=warm_start, hooks=hooks,
                      sampler_program=lambda devices: rollouts.sampler_program(config, devices),
                      open_rollouts=lambda workdir: rollouts.open_rollouts(config, mesh, workdir), config=config)


def make_optimizer(config: ml_collections.ConfigDict, models: PolicyModels) -> optax.GradientTransformation:
    """AdamW of the trained parameters; its schedules move once an update, or once a batch (`lr_per`).

    Once a batch is how the published runs did it: ahead of the batch, so that the last one trains at a rate of 0.
    """
    groups = ml_collections.ConfigDict(dict(config.optimizer))
    trained = models.divide(jax.eval_shape(models.init, jax.random.key(0)))[1]
    updates = config.algorithm.num_minibatches * config.algorithm.num_epochs
    if config.lr_per == 'batch':
        return optim.adamw(groups, trained, config.num_steps, clock=lambda n: n // updates + 1)
    return optim.adamw(groups, trained, config.num_steps * updates)


def check(config: ml_collections.ConfigDict, shards: int) -> None:
    """Raises a ValueError for settings that cannot work together."""
    sampling, module = config.sampling, architecture.decoder(config.model)
    parts = shards * config.accumulate * config.algorithm.num_minibatches
    if config.batch_size % parts:
        raise ValueError(f'batch_size={config.batch_size} prompts is not divisible by {shards} batch shards x '
                         f'accumulate={config.accumulate} x algorithm.num_minibatches='
                         f'{config.algorithm.num_minibatches}; use a multiple of {parts}')
    sampling_of(config)
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
    launch.check_choice('lr_per', config.lr_per, ('step', 'batch'))
    modules.dtype(config.reference, 'reference')
    rollouts.check(config)
    evaluation.check(config)
    elastic_config(config)


def elastic_config(config: ml_collections.ConfigDict) -> er.ElasticReset | None:
    """The method that `config.elastic` names; None without one.

    Raises:
        ValueError: an unknown method, or periods with which it would never act.
    """
    elastic, algorithm = config.elastic, config.algorithm
    if not elastic.method:
        return None
    launch.check_choice('elastic.method', elastic.method, er.METHODS)
    fields = {name: value for name, value in elastic.items() if name not in ('method', 'period', 'ema_period')}
    if elastic.ema_period:
        fields['ema_period'] = elastic.ema_period
    needs_period = ('reset_to_init', 'reset_to_ema', 'elastic_reset', 'reference_reset')
    if elastic.method in needs_period and elastic.period < 1:
        raise ValueError(f'elastic.period={elastic.period}: {elastic.method} needs how many {elastic.reset_on}s lie '
                         'between two resets')
    fields['policy'] = r'policy/.*/lora_(a|b)' if config.lora.rank else r'policy/.*'
    fields['critic'] = r'value/.*' if algorithms.get(algorithm).critic else ''
    method = er.method(elastic.method, elastic.period, **fields)
    events = {'iteration': 1, 'epoch': algorithm.num_epochs, 'step': algorithm.num_epochs * algorithm.num_minibatches}
    method.resets(config.num_steps * events[method.reset_on])
    return method


def batch_shapes(config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """A rollout batch as the step gets it, [B, K, ...], prompts at their longest."""
    def shape(dtype, *more):
        return jax.ShapeDtypeStruct((config.batch_size, config.algorithm.num_samples, *more), dtype)
    length, prompt = config.sampling.max_new_tokens, config.sampling.max_prompt
    shapes = {'tokens': shape(jnp.int32, prompt + length), 'prompt_mask': shape(bool, prompt),
              'mask': shape(bool, length), 'logprobs': shape(jnp.float32, length),
              'policy_version': shape(jnp.int32, length), 'rewards': shape(jnp.float32), 'ended': shape(bool),
              'replaced': shape(bool)}
    if carries_stop_tokens(sampling_of(config)):
        shapes['stop_tokens'] = shape(jnp.int32, 1)
    if config.reward.gold:
        shapes['gold'] = shape(jnp.float32)
    return shapes
