"""Memory of a whole run: what the compile checks add up is what lies on the devices, measured on live arrays."""
import jax
import jax.numpy as jnp
import pytest

from experiments import train
from experiments.rlhf.models import architecture
from experiments.rlhf.policy import experiment as policy
from experiments.rlhf.policy import rewards, rollouts, waves
from experiments.runtime import mesh as mesh_lib
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
    """The learner on its step, publication, a wave, a reward model's call: sharing devices, and apart."""
    config = config_of(
        num_steps=3, checkpoint_every=0, reward__kind='model', reward__model=reward_model, mesh=dict(data=1, fsdp=-1),
        rollout__devices=apart, rollout__max_staleness=1 if apart else 0, rollout__threaded=False)
    config.rollout.mesh.update(dict(data=1, fsdp=1, tensor=-1))
    learner = devices(2, fsdp=2)
    generating = mesh_lib.reshaped(devices(4, data=4), {'data': 4}) if apart else learner
    if apart:
        monkeypatch.setattr(rollouts.jax, 'devices', lambda: generating.devices.flatten().tolist())
    run = train.build(config, learner)
    step = {'step': run.beside_step(learner.devices.flatten().tolist())}
    programs = {p.name: p for p in run.programs(generating.devices.flatten().tolist(), 2 ** 40)}
    state = jax.eval_shape(run.init, jax.random.key(0))
    expected = {name: bytes_on_device(list(p.beside.values())) + bytes_on_device(p.args) for name, p in programs.items()}
    before, seen = {d: on(d) for d in jax.devices()}, {}

    def look(name, device):
        seen[name] = max(seen.get(name, 0), on(device) - before[device])

    def spied(module, name, moment, device):
        inner = getattr(module, name)

        def spy(*args, **kwargs):
            look(moment, device)
            return inner(*args, **kwargs)
        monkeypatch.setattr(module, name, spy)
    last = generating.devices.flat[-1]
    spied(rollouts.generate_lib, 'generate', 'sampler', last)
    spied(rewards.RewardModel, '__call__', 'reward', last)
    spied(publish.InProcess, 'publish', 'published', last)
    state_bytes = bytes_on_device(programs['publish'].beside['learner']) + bytes_on_device(programs['publish'].args)
    train.train(config, tmp_path, mesh=learner, hooks=[lambda *_: look('step', learner.devices.flat[0])])
    del state
    small = 6000  # the batch, its keys and the metrics
    assert seen['sampler'] == pytest.approx(expected['sampler'], abs=small)
    assert expected['reward'] - small < seen['reward'] + bytes_on_device(programs['reward'].args[1:]) < expected[
        'reward'] + small
    assert seen['step'] == pytest.approx(state_bytes + bytes_on_device(list(step['step'].values())), abs=small)
    weights = bytes_on_device(programs['sampler'].args[0])
    assert weights > 5 * small  # one copy more or less would show
