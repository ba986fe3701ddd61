"""NLPO: PPO under the mask of an earlier policy, from the sampler to the checkpoint."""
import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import train
from experiments.rlhf.models import loading
from experiments.rlhf.policy import experiment as policy
from experiments.rlhf.policy import generator as generator_lib
from experiments.rlhf.policy import rollouts, waves
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from experiments.runtime.metrics import read_metrics
from policy_runs import config_of, devices, shared_steps

EVERY = 2  # batches between two renewals of the mask


@pytest.fixture(scope='module', autouse=True)
def built_once():
    with shared_steps():
        yield


def masked(**fields):
    """Five batches, of which the second and fourth end in a reset, too."""
    return config_of(**dict(
        algorithm__name='ppo', algorithm__mask=dict(top_p=0.6, min_tokens=20, every=EVERY), num_steps=5,
        elastic__method='elastic_reset', elastic__period=2, elastic__decay=0.5, sampling__min_new_tokens=4,
        eval_every=3, eval_prompts=8, data__heldout='train') | fields)


class Kill(Exception):
    pass


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(states by step, rows of metrics) of a run to its end."""
    workdir, states = tmp_path_factory.mktemp('masked'), {}
    keep = lambda n, state, metrics: states.update({n: jax.device_get(state)})
    train.train(masked(), workdir, mesh=devices(1), hooks=[keep])
    return states, read_metrics(workdir / 'metrics.jsonl')


def assert_equal(tree, other):
    a, b = partition.flatten(tree), partition.flatten(other)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(*(jax.random.key_data(x) if name == 'rng' else x for x in (a[name], b[name])),
                                      err_msg=name)


def differs(tree, other):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other)))


def test_learner_and_sampler_have_the_same_mask(run):
    """Before a batch's first update the ratio is 1, whichever policy is the mask; KL is of the policies without it."""
    rows = [row for row in run[1] if 'loss' in row]
    assert all(row['logprob_gap_max'] < 1e-4 for row in rows)
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-4) and abs(rows[1]['kl']) > 1e-3
    assert all(20 <= row['allowed_tokens'] < 200 for row in rows)  # of 264
    assert all(row['clip_fraction'] < 1 and np.isfinite(row['loss']) for row in rows)
    assert len([row for row in run[1] if 'eval_kl' in row]) == 2


def test_the_policy_becomes_the_mask_every_so_many_batches(run):
    states = run[0]
    mask = {n: state.extra['mask']['policy'] for n, state in states.items()}
    assert_equal(mask[1], states[1].extra['elastic'].init['policy'])
    for n in (2, 4):  # after the reset
        assert_equal(mask[n], states[n].params['policy'])
        assert_equal(mask[n + 1], mask[n])
        assert differs(states[n + 1].params['policy'], mask[n + 1])
    assert differs(mask[2], mask[4]) and differs(mask[1], states[1].params['policy'])


def test_killed_and_resumed_is_bit_identical(run, tmp_path):
    """From step 3: the mask is that of step 2, which nothing but the checkpoint has."""
    def kill(n, state, metrics):
        if n == 4:
            raise Kill
    with pytest.raises(Kill):
        train.train(masked(), tmp_path, mesh=devices(1), hooks=[kill])
    resumed = train.train(masked(), tmp_path, mesh=devices(1))
    assert_equal(jax.device_get(resumed), run[0][5])
    read = loading.load_decoder(str(tmp_path), masked())  # as other stages and commands do: the policy alone
    assert_equal(jax.device_get(read), run[0][5].params['policy'])


def test_the_mask_policy_is_laid_out_and_counted_like_the_policy():
    config, mesh = masked(), devices(4, fsdp=2, tensor=2)
    experiment = train.build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    laid_out = partition.state_shardings(state, experiment.rules, mesh)
    assert laid_out.extra['mask']['policy'] == laid_out.params['policy']
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    plain = generator_lib.Decoding(config_of(), mesh)
    both = generator_lib.Decoding(config, mesh)
    assert size(both.shapes) == 2 * size(plain.shapes)
    alone = masked(algorithm__mask__top_p=0.0)
    assert waves.wave_bytes(config, 8, mesh) > 1.8 * waves.wave_bytes(alone, 8, mesh)  # two caches, two sets of logits
    programs = {program.name: program for program in experiment.programs(jax.devices()[:4], 2 ** 30)}
    assert size(programs['publish'].args) == size(rollouts.sampler_params(state)) == 2 * size(state.params['policy'])
    assert size(programs['publish'].beside['learner']) + size(programs['publish'].args) == size(
        [state.params, state.opt_state, state.extra])
    sampler = programs['sampler']
    assert size(sampler.args[0]) == size(both.shapes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        drawn = jax.eval_shape(sampler.jitted, *sampler.args)
    assert drawn.tokens.shape == (config.batch_size, config.algorithm.num_samples, config.sampling.max_new_tokens)


@pytest.mark.parametrize('fields, message', [
    (dict(algorithm__mask__top_p=1.0), 'algorithm.mask.top_p=1.0 must be at least 0 and below 1; 0: no mask'),
    (dict(algorithm__mask__every=0), 'algorithm.mask.every=0 must be at least 1'),
    (dict(algorithm__mask__min_tokens=0), 'algorithm.mask.min_tokens=0 must be at least 1'),
    (dict(algorithm__name='rloo'), 'algorithm.mask.top_p=0.6: rloo has no mask, only ppo; set it to 0'),
    (dict(algorithm__correction='mask'), "algorithm.correction='mask': under algorithm.mask no sample is stale"),
    (dict(lora__rank=2), 'lora.rank=2 under algorithm.mask: .* set it to 0'),
    (dict(rollout__max_staleness=1), 'rollout.max_staleness=1 under algorithm.mask: .* set it to 0'),
    (dict(rollout__devices=1), 'rollout.devices=1 under algorithm.mask: .* set it to 0'),
    (dict(rollout__slots=4), 'rollout.slots=4 under algorithm.mask: .* set it to 0'),
    (dict(rollout__transport='files'), "rollout.transport='files' under algorithm.mask: .* set it to 'devices'"),
    (dict(sampling__scored='all'), "sampling.scored='all' under algorithm.mask: .* set it to 'drawn'"),
])
def test_what_a_mask_cannot_work_with_is_refused(fields, message):
    config = masked()
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace('__', '.'): value})
    with pytest.raises(ValueError, match=message):
        policy.build(config, devices(1))


def test_a_set_of_stop_tokens_alone_is_refused():
    config = masked()
    config.algorithm.mask.min_tokens = 1
    with pytest.raises(ValueError, match='algorithm.mask.min_tokens=1 with sampling.min_new_tokens=4: .* set it to 2'):
        generator_lib.Generator(config, devices(1))
