"""The policy that writes codes: its scores, its step, and the run around it, synchronous, stale, killed and resumed."""
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_runs import CAPTIONS, B, K, L, V, config_of, devices, write_inputs
from dlc_jax import likelihood, text_to_code
from experiments import sample, train
from experiments.align import rollouts
from experiments.align.painter import Painter, noise_keys
from experiments.align.writer import CodeWriter, make_model, make_words
from experiments.dlc.text_to_code import TextToCode
from experiments.dlc.weights import llada
from experiments.runtime import config_files, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import read_metrics
from experiments.runtime.programs import bytes_on_device
from tests.end_to_end.policy_runs import shared_steps


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp('align'))


@pytest.fixture(scope='module', autouse=True)
def one_step_for_each_config():
    with shared_steps():
        yield


def assert_equal(tree, other):
    a, b = partition.flatten(tree), partition.flatten(other)
    assert set(a) == set(b)
    for name in a:
        x, y = a[name], b[name]
        if jnp.issubdtype(getattr(x, 'dtype', None), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=name)


# ---- Batches ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def sampled(root):
    """(config, the policy's parameters, batch 2 under version 1)."""
    config, mesh = config_of(root, likelihood__kind='exact', likelihood__num=0, algorithm__name='rloo'), devices(1)
    params = jax.jit(CodeWriter(config).init)(jax.random.key(0))
    decoding = rollouts.Decoding(config, mesh)
    return config, params, rollouts.CodeGenerator(config, mesh)(decoding.convert(params['policy']), index=2, version=1)


def network_of(config):
    """(policy's parameters, captions, their mask, codes [1, L]) -> logits [1, L, V]."""
    words, model = make_words(config), make_model(config)
    return jax.jit(lambda policy, captions, mask, codes: text_to_code.network(
        model, policy, captions, mask, words, L)(codes))


def test_a_batch_holds_captions_codes_and_what_they_were_drawn_with(sampled):
    config, params, batch = sampled
    words = make_words(config)
    codes = batch['tokens'][..., -L:] - words.separator - 1
    assert codes.shape == (B, K, L) and codes.min() >= 0 and codes.max() < V and batch['mask'].all()
    writer = CodeWriter(config)
    marked = writer.annotated({name: jnp.asarray(x) for name, x in batch.items()}, jax.random.key(5))
    again, _ = jax.jit(writer.forward)(params, marked)
    np.testing.assert_allclose(again, batch['logprobs'], atol=1e-5)  # all steps: exactly what was drawn
    # One token by hand: the first that was filled in a code saw nothing but masks and the caption.
    b, k = 1, 2
    first = int(np.argmin(batch['filled_at'][b, k]))
    logits = network_of(config)(params['policy'], batch['tokens'][b, k:k + 1, :-L], batch['prompt_mask'][b, k:k + 1],
                                jnp.full((1, L), V))[0, first]
    assert batch['logprobs'][b, k, first] == pytest.approx(
        float(jax.nn.log_softmax(logits)[codes[b, k, first]]), abs=1e-5)


def test_rewards_are_of_the_images_of_the_codes(sampled, root):
    config, _, batch = sampled
    painter = Painter.load(config)
    draws = np.arange(2 * B, 3 * B)
    noise = noise_keys(config.seed, draws, K, share=True)
    assert (noise[:, 0] == noise[:, 1]).all() and (noise[0, 0] != noise[1, 0]).any()
    codes = (batch['tokens'][..., -L:] - make_words(config).separator - 1).reshape(-1, L)
    images = jax.jit(painter._paint_rows)(painter.params, codes, noise.reshape(B * K, -1))
    rewards = np.asarray(images)[:, :2].mean((1, 2, 3)).reshape(B, K)
    np.testing.assert_allclose(batch['rewards'], rewards, atol=1e-6)
    assert len(np.unique(batch['rewards'].round(4))) > B  # the codes of a caption look different
    apart = noise_keys(config.seed, draws, K, share=False)
    assert len(np.unique(apart.reshape(B * K, -1), axis=0)) == B * K


def test_what_is_drawn_at_once_changes_no_image(root, sampled):
    config, params, batch = sampled
    small = config.copy_and_resolve_references()
    small.generator.batch_size = 5
    decoding = rollouts.Decoding(small, devices(1))
    again = rollouts.CodeGenerator(small, devices(1))(decoding.convert(params['policy']), index=2, version=1)
    np.testing.assert_allclose(again['rewards'], batch['rewards'], atol=1e-6)
    np.testing.assert_array_equal(again['tokens'], batch['tokens'])


def test_codes_are_written_with_the_compiler_options_of_steps(sampled, monkeypatch):
    config, params, _ = sampled
    monkeypatch.setattr(rollouts.compiler, 'options', lambda mesh: {'no_such_option': '1'})
    generator = rollouts.CodeGenerator(config, devices(1))
    with pytest.raises(jax.errors.JaxRuntimeError, match='no_such_option'):
        generator(rollouts.Decoding(config, devices(1)).convert(params['policy']), index=2, version=1)


def test_the_real_configuration_writes_and_draws_by_shape():
    """LLaDA-8B, DiT-XL/2 and the autoencoder in one program, from config files alone."""
    config = config_files.load('configs/dlc/align_llada.py:lora')
    program, args, mesh = rollouts.sampler_program(config, jax.devices())
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        drawn, images = jax.eval_shape(program, *args)
    assert drawn.codes.shape == drawn.logprobs.shape == (64 * 4, 512) and images.shape == (64, 256, 256, 3)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (args[0], args[1]['generator'])]
    assert sizes[0] > 8e9 and sizes[1] == 825_266_336


def test_the_models_that_draw_lie_beside_the_step_and_are_sampled_with(root, sampled):
    config, everything = sampled[0], jax.devices()[:1]
    run = train.build(config, devices(1))
    frozen = sum(x.nbytes for x in jax.tree.leaves(Painter.load(config).params))
    beside = run.beside_step(everything)
    assert list(beside) == ['models that draw'] and bytes_on_device(beside['models that draw']) == frozen
    sampler = next(program for program in run.programs(everything, 2 ** 40) if program.name == 'sampler')
    assert list(sampler.beside) == ['learner'] and bytes_on_device(sampler.args[1]) == frozen


def test_a_run_reads_the_models_that_draw_once(root, sampled, tmp_path, monkeypatch):
    loads, load = [], Painter.load
    monkeypatch.setattr(Painter, 'load', lambda config: loads.append(config) or load(config))
    train.build(sampled[0], devices(1)).open_rollouts(tmp_path).close()
    assert len(loads) == 1


# ---- Steps -----------------------------------------------------------------------------------------------------------

def started(config):
    """(experiment, state that has moved away from its reference, step)."""
    experiment = train.build(config, devices(1))
    state = jax.jit(experiment.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.params)
    return experiment, state.replace(params=moved), jax.jit(experiment.step)


def made_up(config, seed=0):
    """A batch as the step gets it."""
    rng, words = np.random.default_rng(seed), make_words(config)
    captions = rng.integers(2, words.separator, (B, 1, config.caption_length)).repeat(K, 1)
    order = np.argsort(rng.random((B, K, L)), -1) // 2
    shape = (B, K, L)
    return {'tokens': np.concatenate([captions, words.separator + 1 + rng.integers(0, V, shape)], -1).astype(np.int32),
            'prompt_mask': np.broadcast_to(np.arange(5) < rng.integers(1, 6, (B, 1, 1)), (B, K, 5)).copy(),
            'mask': np.ones(shape, bool), 'filled_at': order.astype(np.int32),
            'logprobs': rng.normal(-1.4, 0.1, shape).astype(np.float32), 'policy_version': np.zeros(shape, np.int32),
            'rewards': rng.normal(size=(B, K)).astype(np.float32), 'ended': np.ones((B, K), bool),
            'replaced': np.zeros((B, K), bool)}


def bounds(config, network, policy, batch, b, k, masks):
    """The bound of one code, written out; `network`: what `network_of` makes."""
    codes = jnp.asarray(batch['tokens'][b, k, -L:] - make_words(config).separator - 1)
    total = 0.0
    for mask in masks:
        logits = network(policy, batch['tokens'][b, k:k + 1, :-L], batch['prompt_mask'][b, k:k + 1],
                         jnp.where(mask, V, codes)[None])
        logprobs = jax.nn.log_softmax(logits[0])
        total += L / mask.sum() * (logprobs[jnp.arange(L), codes] * mask).sum()
    return total / len(masks)


def test_online_dpo_compares_bounds_at_the_same_masks(root):
    config = config_of(root)
    experiment, state, step = started(config)
    batch = made_up(config)
    batch['rewards'][2] = 1.0  # a tie does not count
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(state.rng, 0), jnp.arange(B))
    reference, network, hs = state.extra['reference']['policy'], network_of(config), []
    for b in (0, 1, 3):
        masks = likelihood.draw_masks(keys[b], 4, L)
        pair = batch['rewards'][b].argmax(), batch['rewards'][b].argmin()
        s = [bounds(config, network, state.params['policy'], batch, b, k, masks)
             - bounds(config, network, reference, batch, b, k, masks) for k in pair]
        hs.append(float(s[0] - s[1]))
    _, metrics = step(state, batch)
    assert metrics['loss'] == pytest.approx(np.log1p(np.exp(-0.05 * np.array(hs))).mean(), rel=1e-4)
    assert metrics['pairs'] == 3 and metrics['margin'] == pytest.approx(0.05 * np.mean(hs), rel=1e-3)
    assert 'logprob_gap' not in metrics  # a bound says nothing of what tokens were drawn with


def test_best_of_n_trains_on_the_bound_of_the_best(root):
    config = config_of(root, algorithm__name='best_of_n')
    experiment, state, step = started(config)
    batch = made_up(config)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(state.rng, 0), jnp.arange(B))
    network = network_of(config)
    want = [bounds(config, network, state.params['policy'], batch, b, batch['rewards'][b].argmax(),
                   likelihood.draw_masks(keys[b], 4, L)) for b in range(B)]
    assert step(state, batch)[1]['loss'] == pytest.approx(-np.mean(want), rel=1e-4)


def exact(config, policy, batch):
    """Log-probabilities as drawn of every token, [B, K, L]."""
    writer = CodeWriter(config_of_all(config))
    rows = {name: jnp.asarray(x) for name, x in batch.items()}
    rows['steps'] = jnp.broadcast_to(jnp.arange(4), (B, K, 4))
    return np.asarray(jax.jit(writer.forward)({'policy': policy}, rows)[0])


def config_of_all(config):
    config = config.copy_and_resolve_references()
    config.likelihood.num = 0
    return config


@pytest.mark.parametrize('name', ['rloo', 'grpo'])
def test_ratio_methods_on_some_steps_of_the_sampler(name, root):
    """Two of the four steps: ratios are exact for their tokens, sums are scaled by two."""
    config = config_of(root, algorithm__name=name, likelihood__kind='exact', likelihood__num=2,
                       algorithm__kl_coefficient=0.1)
    experiment, state, step = started(config)
    batch = made_up(config)
    _, metrics = step(state, batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(state.rng, 0), jnp.arange(B))
    steps = np.stack([likelihood.draw_steps(key, 2, 4) for key in keys])
    counted = (batch['filled_at'][..., None] == steps[:, None, None]).any(-1)
    new, ref = exact(config, state.params['policy'], batch), exact(config, state.extra['reference']['policy'], batch)
    drawn = batch['logprobs']
    d = np.where(counted, drawn - ref, 0).sum(-1)
    assert metrics['kl'] == pytest.approx(2 * d.mean(), rel=1e-4)
    if name == 'rloo':
        scores = batch['rewards'] - 0.1 * 2 * d
        advantages = scores - (scores.sum(1, keepdims=True) - scores) / (K - 1)
        want = -(2 * advantages * np.where(counted, new, 0).sum(-1)).mean()
    else:
        r = batch['rewards']
        advantages = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-7)
        ratio = np.exp(new - drawn)
        surrogate = np.maximum(-advantages[..., None] * ratio, -advantages[..., None] * np.clip(ratio, 0.8, 1.2))
        k3 = np.expm1(ref - new) + new - ref
        want = np.where(counted, surrogate + 0.1 * k3, 0).sum(-1) / counted.sum(-1)
        want = want.mean()
    assert metrics['loss'] == pytest.approx(float(want), rel=1e-4)
    assert metrics['logprob_gap'] == pytest.approx(np.abs(new - drawn)[counted].mean(), rel=1e-4)


# ---- Whole runs ------------------------------------------------------------------------------------------------------

class Kill(Exception):
    pass


def kill_at(step):
    def hook(n, state, metrics):
        if n == step:
            raise Kill
    return hook


@pytest.fixture(scope='module')
def trained(root, tmp_path_factory):
    """settings -> (work directory, final state, rows of metrics), each trained once."""
    done = {}

    def run(count=1, **fields):
        key = count, tuple(sorted(fields.items()))
        if key not in done:
            workdir = tmp_path_factory.mktemp('run')
            state = train.train(config_of(root, **fields), workdir, mesh=devices(count, data=count))
            done[key] = workdir, jax.device_get(state), read_metrics(workdir / 'metrics.jsonl')
        return done[key]
    return run


SERIAL = dict(rollout__threaded=False)


def test_synchronous_training_is_the_plain_loop(trained, root):
    config, mesh = config_of(root), devices(1)
    experiment = train.build(config, mesh)
    generator, decoding = rollouts.CodeGenerator(config, mesh), rollouts.Decoding(config, mesh)
    state = jax.jit(experiment.init)(jax.random.key(0))
    shardings = partition.state_shardings(state, experiment.rules, mesh)
    placed = shardings, mesh_lib.batch_sharding(mesh)  # compiled as the runner does, or last bits may differ
    step = jax.jit(experiment.step, donate_argnums=0, in_shardings=placed,
                   out_shardings=(shardings, mesh_lib.replicated(mesh)))
    state = jax.device_put(state, shardings)
    for n in range(config.num_steps):
        batch = generator(decoding.convert(state.params['policy']), index=n, version=n)
        batch['policy_version'] = np.full(batch['mask'].shape, n, np.int32)
        with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            state, _ = step(state, jax.device_put(batch, placed[1]))
    _, threaded, rows = trained()
    assert_equal(trained(**SERIAL)[1], jax.device_get(state))
    assert_equal(threaded, jax.device_get(state))
    assert [row['rollout_staleness'] for row in rows] == [0] * len(rows)
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-5)
    assert abs(rows[-1]['kl']) > 1e-3


def one_generates(**fields):
    return dict(rollout__max_staleness=1, rollout__devices=1) | fields


@pytest.fixture(scope='module')
def two_devices():
    """As on a machine of two."""
    with pytest.MonkeyPatch.context() as patch:
        two = jax.devices()[:2]
        patch.setattr(jax, 'devices', lambda *unused: two)
        yield


def test_stale_training_equals_its_serial_emulation_also_when_it_is_killed(trained, root, tmp_path, two_devices):
    _, threaded, rows = trained(**one_generates())
    assert_equal(trained(**one_generates(**SERIAL))[1], threaded)
    assert [row['rollout_staleness'] for row in rows][:2] == [0, 1]
    with pytest.raises(Kill):
        train.train(config_of(root, **one_generates()), tmp_path, mesh=devices(1), hooks=[kill_at(3)])
    resumed = train.train(config_of(root, **one_generates()), tmp_path, mesh=devices(1))
    assert_equal(jax.device_get(resumed), threaded)


def test_an_adapter_under_elastic_reset_starts_from_a_run_and_is_sampled_merged(trained, root, tmp_path, monkeypatch):
    """What it begins as is the run it starts from; what it becomes is read by the commands that take a text model."""
    start, state, _ = trained()
    config = config_of(root, weights=str(start), lora__rank=2, elastic__method='elastic_reset', elastic__period=2,
                       elastic__decay=0.5, num_steps=3, eval_every=3, eval_prompts=4,
                       optimizer__learning_rate__peak=0.1)
    mesh = devices(1)
    final = train.train(config, tmp_path / 'run', mesh=mesh)
    begun = TextToCode.load(start)
    assert_equal(begun.params, state.params['policy'])
    for name, x in partition.flatten(begun.params).items():
        np.testing.assert_array_equal(partition.flatten(jax.device_get(final.params['policy']))[name], x)
    model = TextToCode.load(tmp_path / 'run')
    assert set(partition.flatten(model.params)) == set(partition.flatten(begun.params))
    assert any((np.asarray(x) != y).any() for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(begun.params)))
    for name, x in partition.flatten(llada.read_run(tmp_path / 'run')[1]).items():  # what convert writes
        np.testing.assert_array_equal(partition.flatten(model.params)[name], x)
    monkeypatch.setattr(sys, 'argv', ['sample', '--text', CAPTIONS[0], f'--text_model={tmp_path / "run"}',
                                      f'--generator={root / "generator"}', f'--out={tmp_path / "drawn.npz"}',
                                      '--steps=2'])
    sample.main()
    assert np.load(tmp_path / 'drawn.npz')['arr_0'].shape == (1, 4, 4, 1)
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-5) and any(row.get('reset') for row in rows)
    assert {'eval_reward', 'eval_kl', 'eval_code_distance'} <= set(next(row for row in rows if 'eval_kl' in row))


def test_labels_reach_the_reward_and_missing_ones_are_left_out(root):
    mesh = devices(1)
    batch_of = lambda **fields: rollouts.CodeGenerator(config_of(root, **fields), mesh)
    config = config_of(root)
    params = rollouts.Decoding(config, mesh).convert(jax.jit(CodeWriter(config).init)(jax.random.key(0))['policy'])
    generate = batch_of(reward__function='align_rewards:with_row', reward__gold='align_rewards:brightness')
    batch = generate(params, index=0, version=0)
    labels = [row['label'] for row in generate.rows(0)]
    assert (np.floor(batch['rewards']) == np.array(labels)[:, None]).all() and batch['gold'].max() < 1
    batch = batch_of(reward__function='align_rewards:some_missing')(params, index=0, version=0)
    assert np.isnan(batch['rewards'].ravel()[::3]).all() and np.isnan(batch['rewards']).sum() == B * K / 3
    replaced = batch_of(reward__function='align_rewards:some_missing', reward__replacement='-1')
    batch = replaced(params, index=0, version=0)
    assert (batch['rewards'].ravel()[::3] == -1).all()
    slow = batch_of(reward__function='align_rewards:slow', reward__timeout=0.2, reward__replacement='0')
    assert slow(params, index=0, version=0)['replaced'].all()
    with pytest.raises(ValueError, match=r'rewards have shape \(1,\), expected \(12,\)'):
        batch_of(reward__function='align_rewards:too_few')(params, index=0, version=0)
