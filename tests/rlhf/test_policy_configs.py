"""Published settings: every policy config builds, and its numbers are the papers'."""
import importlib

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from experiments.rlhf.policy import experiment as policy
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from experiments.train import build
from rlhf_jax import elastic_reset
from rlhf_jax.models import lora

FILES = {'tldr': 'NAMES', 'gsm8k': 'RUNS', 'no_robots': 'NAMES', 'imdb': 'ARMS', 'stackexchange': 'ARMS',
         'arithmetic': 'NAMES'}
CASES = [(file, name) for file, names in FILES.items()
         for name in getattr(importlib.import_module(f'configs.rlhf.{file}'), names)]
CASES.append(('imdb', 'small_elastic_reset'))
DEVICES = {'no_robots': 8, 'imdb': 1, 'arithmetic': 1}
# Of the released models.
PARAMETERS = {'410m': 405_334_016, '1b': 1_011_781_632, '2.8b': 2_775_208_960, 'Rho-1B': 1_100_048_384,
              '3.1-8B': 8_030_261_248, '124M': 124_439_808, '7B': 6_738_415_616}


def get(file, name):
    return importlib.import_module(f'configs.rlhf.{file}').get_config(name)


def mesh_of(config, devices):
    """The learner's, out of so many devices that are not there."""
    shape = mesh_lib.mesh_shape(config.mesh, devices - config.rollout.devices)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize('file, name', CASES)
def test_it_builds_on_the_hardware_that_it_names(file, name):
    config = get(file, name)
    experiment = build(config, mesh_of(config, DEVICES.get(file, 4)))
    assert experiment.batch['mask'].shape == (config.batch_size, config.algorithm.num_samples,
                                              config.sampling.max_new_tokens)


@pytest.mark.parametrize('file, name', [('tldr', 'online_dpo_410m'), ('tldr', 'ppo_1b'), ('tldr', 'rloo_2.8b'),
                                        ('gsm8k', 'rloo'), ('no_robots', 'online_dpo'), ('imdb', 'elastic_reset'),
                                        ('stackexchange', 'elastic_reset')])
def test_it_has_the_parameters_of_the_released_model_and_divides_them(file, name):
    config = get(file, name)
    mesh = mesh_of(config, DEVICES.get(file, 4))
    experiment = build(config, mesh)
    params = jax.eval_shape(experiment.init, jax.random.key(0)).params
    size = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
    plain = lora.without(params['policy']) if config.lora.rank else params['policy']
    assert size(plain) == PARAMETERS[config.model.size]
    shardings = partition.param_shardings(params, experiment.rules, mesh)
    held = partition.bytes_per_device(params, shardings)
    assert held < 1.05 * 4 * size(params) / mesh.shape['fsdp']


@pytest.mark.parametrize('file', FILES)
def test_unknown_names_are_answered_with_the_known_ones(file):
    with pytest.raises(ValueError, match=f'{file}: .typo. is not one of .*'):
        get(file, 'typo')


def test_tldr_numbers():
    for size in ('410m', '1b', '2.8b'):
        config = get('tldr', f'online_dpo_{size}')
        assert (config.num_steps, config.num_steps * config.batch_size) == (256, 131_072)
        late = get('tldr', f'online_dpo_{size}_async')
        assert (late.num_steps, late.num_steps * late.batch_size) == (256, 129_024)
        assert late.batch_size // (3 * late.accumulate) == {'410m': 21, '1b': 8, '2.8b': 6}[size]
        assert (late.rollout.max_staleness, late.rollout.devices) == (1, 1)
        for found in (config, late):
            assert found.optimizer.learning_rate.peak == 3e-6 and found.optimizer.learning_rate.decay == 'linear'
            assert found.sampling.max_new_tokens == 53 and found.sampling.temperature == 0.7
            assert found.algorithm.beta == 0.1 and found.lr_per == 'batch' and found.reward.missing_eos == '-1'
    for name in ('ppo_410m', 'rloo_410m'):  # they count completions
        config = get('tldr', name)
        assert config.num_steps * config.batch_size * config.algorithm.num_samples == 131_072
        assert (config.algorithm.kl_coefficient, config.algorithm.clip) == (0.05, 0.2)
    assert get('tldr', 'ppo_1b').algorithm.critic_weights == 'runs/tldr_1b/reward'


def test_elastic_reset_on_tldr_has_the_numbers_of_the_authors():
    config, plain = get('tldr', 'ppo_elastic_410m'), get('tldr', 'ppo_410m')
    method = policy.elastic_config(config)
    assert method.resets(config.num_steps) == [87, 175]  # after each ceil(0.34 x 256) updates
    assert (method.decay, method.tick_on, method.tick_every, method.reset_to) == (0.995, 'step', 1, 'ema')
    assert (config.algorithm.kl_coefficient, plain.algorithm.kl_coefficient) == (0.001, 0.05)
    assert config.algorithm.critic_weights == plain.algorithm.critic_weights == 'runs/tldr_410m/reward'


def test_the_earlier_scripts_of_gsm8k():
    rloo, ppo = get('gsm8k', 'rloo_early'), get('gsm8k', 'ppo_early')
    assert [c.num_steps * c.batch_size * c.algorithm.num_samples for c in (rloo, ppo)] == [131_072, 131_072]
    for config in (rloo, ppo):
        assert (config.algorithm.num_epochs, config.algorithm.kl_coefficient) == (2, 1e-4)
        assert (config.sampling.max_new_tokens, config.sampling.temperature) == (400, 0.6)
        assert config.optimizer.learning_rate.peak == 1e-6 and config.reward.missing_eos == '-1'


def test_gsm8k_and_no_robots_numbers():
    runs = {name: get('gsm8k', name) for name in ('online_dpo', 'online_dpo_async', 'rloo', 'rloo_async', 'ppo')}
    assert [c.num_steps for c in runs.values()] == [128, 512, 512, 2048, 512]
    assert [c.algorithm.num_samples for c in runs.values()] == [4, 8, 4, 4, 8]
    assert [c.batch_size * c.algorithm.num_samples for c in runs.values()] == [1024, 1152, 256, 252, 256]
    assert runs['online_dpo_async'].optimizer.learning_rate.peak == 5e-6 and runs['ppo'].algorithm.num_epochs == 2
    chat = get('no_robots', 'online_dpo_async')
    assert (chat.optimizer.learning_rate.peak, chat.algorithm.beta, chat.sampling.max_new_tokens) == (8e-7, 0.03, 1024)
    assert chat.reward.missing_eos == '-10' and chat.num_steps == 390


def test_small_arms_on_imdb_differ_as_the_published_ones_do():
    from configs.rlhf import imdb, reward_imdb, sft_imdb
    schedule = ('kl_coefficient', 'kl_target', 'kl_unit', 'mask', 'clip', 'gamma', 'lam')
    for arm in imdb.ARMS:
        small, published = get('imdb', f'small_{arm}'), get('imdb', arm)
        assert small.elastic == published.elastic and small.num_steps == published.num_steps
        for name in schedule:
            assert small.algorithm[name] == published.algorithm[name], name
        # One model and one tokenizer in all stages, and room for what the policy reads and writes.
        stages = sft_imdb.get_config('small'), reward_imdb.get_config('small'), reward_imdb.get_config('small_gold')
        assert all(stage.model == small.model and stage.tokenizer == small.tokenizer for stage in stages)
        assert stages[1].weights == stages[2].weights == small.weights
        assert small.sampling.min_new_tokens == small.sampling.max_new_tokens and not stages[1].add_eos
        assert small.sampling.max_prompt + small.sampling.max_new_tokens <= stages[1].max_length
    # Reward, gold reward and prompts are of different reviews.
    assert [config.data.split for config in (*stages[1:], small)] == ['train[:1000]', 'train[8000:14000]',
                                                                      'train[1000:3000]']


@pytest.mark.parametrize('file, task, resets', [('imdb', 'imdb', [0, 17, 34]),
                                                ('stackexchange', 'stackllama', [260, 520])])
def test_elastic_reset_has_the_released_schedule(file, task, resets):
    config = get(file, 'elastic_reset')
    found, released = policy.elastic_config(config), elastic_reset.released(task)
    assert found.resets(config.num_steps) == resets
    for name in ('period', 'decay', 'tick_on', 'tick_every', 'reset_on', 'reset_offset', 'reset_skip_first', 'reset_to',
                 'reset_ema', 'reset_critic', 'reset_optimizer', 'kl_reference'):
        assert getattr(found, name) == getattr(released, name), name
    a = config.algorithm
    expected = {'imdb': (0.001, 1.0, 'token', 0.99), 'stackexchange': (0.02, 6.0, 'sequence', 1.0)}[file]
    assert (a.kl_coefficient, a.kl_target, a.kl_unit, a.gamma) == expected
