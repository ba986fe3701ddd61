"""Memory of a whole run: what the compile checks add up is what lies on the devices, measured on live arrays."""
import threading

import jax
import jax.numpy as jnp
import pytest

from experiments import train
from experiments.rlhf.models import architecture, loading
from experiments.rlhf.policy import generator as generator_lib
from experiments.rlhf.policy import reward_model as reward_model_lib
from experiments.runtime import partition
from experiments.runtime.programs import bytes_on_device
from policy_runs import config_of, devices
from rlhf_jax import convert
from rlhf_jax.rollout import publish
from rlhf_jax.weights import files


@pytest.fixture(scope='module')
def reward_model(tmp_path_factory):
    folder, module = tmp_path_factory.mktemp('reward'), architecture.reward_model(config_of().model)
    params = jax.jit(module.init)(jax.random.key(6), jnp.zeros((1, 2), jnp.int32))['params']
    files.save(folder, convert.to_torch('gpt_neox', module, params), convert.config_of('gpt_neox', module))
    return str(folder)


def on(device):
    """Bytes of all arrays that live on `device`; an array and its copy under another name count once."""
    shards = {(shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
              for x in jax.live_arrays() for shard in x.addressable_shards if not x.is_deleted()}
    return sum(size for (where, _), size in shards.items() if where == device)


@pytest.mark.parametrize('apart', [0, 2])
def test_residents_are_what_is_live_at_every_moment(apart, reward_model, tmp_path, monkeypatch):
    """The learner's step, a wave of samples, the reward model: in turn on the same devices, and apart with a version in
    flight."""
    config = config_of(
        num_steps=3, checkpoint_every=0, reward__kind='model', reward__model=reward_model, mesh=dict(data=1, fsdp=-1),
        rollout__devices=apart, rollout__max_staleness=1 if apart else 0)
    config.rollout.mesh.update(dict(data=1, fsdp=1, tensor=-1))
    everything = jax.devices()[:4] if apart else jax.devices()[:2]
    monkeypatch.setattr(jax, 'devices', lambda *backend, every=jax.devices: every(*backend) if backend else everything)
    learner, last = devices(2, fsdp=2), everything[-1]
    run = train.build(config, learner)
    programs = {program.name: program for program in run.programs(everything, 2 ** 40)}
    beside = {name: bytes_on_device(list(program.beside.values())) for name, program in programs.items()}
    beside['step'] = bytes_on_device(list(run.beside_step(everything).values()))
    weights, policy = (bytes_on_device(programs[name].args[0]) for name in ('sampler', 'publish'))
    state = policy + bytes_on_device(programs['publish'].beside['learner'])
    before, seen, published = {device: on(device) for device in everything}, {}, threading.Event()

    def look(moment, device):
        seen.setdefault(moment, []).append(on(device) - before[device])

    def generate(*args, inner=generator_lib.generate_lib.generate, **kwargs):
        if apart and len(seen.get('sampler', [])) == 1:
            assert published.wait(60)  # the next version comes while this one samples
        look('sampler', last)
        return inner(*args, **kwargs)

    def publish_one(self, version, params, inner=publish.InProcess.publish):
        inner(self, version, params)
        if version == 1:
            published.set()

    def scored(self, completions, inner=reward_model_lib.RewardModel.__call__):
        look('reward', last)
        return inner(self, completions)
    monkeypatch.setattr(generator_lib.generate_lib, 'generate', generate)
    monkeypatch.setattr(publish.InProcess, 'publish', publish_one)
    monkeypatch.setattr(reward_model_lib.RewardModel, '__call__', scored)
    train.train(config, tmp_path, mesh=learner, hooks=[lambda *_: look('step', everything[0])])
    small = 6000  # a batch, its keys and its metrics
    assert weights > 5 * small and beside['reward'] > 5 * small  # one copy more or less would show
    assert max(seen['sampler']) == pytest.approx(weights + beside['sampler'], abs=small)
    models = bytes_on_device(programs['reward'].args[0])
    assert max(seen['reward']) == pytest.approx(models + beside['reward'], abs=small)
    assert max(seen['step']) == pytest.approx(state + beside['step'], abs=small)


@pytest.mark.parametrize('transport, held', [('devices', 2), ('files', 0), ('transfer', 2)])
def test_what_generators_elsewhere_have_is_not_charged_to_the_learner(transport, held, reward_model):
    """Nor the learner's state to them. Of a transfer the learner holds the versions that nobody has pulled yet."""
    config = config_of(reward__kind='model', reward__model=reward_model, rollout__max_staleness=2,
                       rollout__transport=transport)
    everything, here = jax.devices()[:1], transport == 'devices'
    run = train.build(config, devices(1))
    beside = run.beside_step(everything)
    programs = {program.name: program for program in run.programs(everything, 2 ** 40)}
    assert len(beside.get('weights for decoding', [])) == held and ('reward models' in beside) == here
    for name in ('sampler', 'reward'):
        assert ('learner' in programs[name].beside) == here
        assert len(programs[name].beside['weights of other versions']) == 2


def test_a_reward_model_in_the_dtype_that_it_computes_in_scores_the_same():
    config = config_of()
    config.model.dtype = 'bfloat16'
    module = architecture.reward_model(config.model)
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 259)
    params = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape),
                          module.init(jax.random.key(0), tokens)['params'])
    small = loading.compacted(module, params)
    back = jnp.zeros(4, jnp.int32)
    scores = [reward_model_lib.last_scores(module, p, tokens, jnp.ones((4, 9), bool), back) for p in (params, small)]
    assert (scores[0] == scores[1]).all() and len(set(scores[0].tolist())) == 4
    dtypes = {name: leaf.dtype for name, leaf in partition.flatten(small).items()}
    assert dtypes['backbone/blocks/attn/qkv/kernel'] == jnp.bfloat16
    assert dtypes['backbone/blocks/attn_norm/scale'] == dtypes['score_head/kernel'] == jnp.float32
