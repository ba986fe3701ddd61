"""Fine-tuning, reward model and DPO: golden values, killed and resumed, sharded and not, adapters, warm starts."""
import functools
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rlhf import base
from experiments import train
from experiments.rlhf.data import texts
from experiments.rlhf.models import architecture, loading
from experiments.rlhf.supervised import experiment as supervised
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition, runs
from experiments.runtime.metrics import read_metrics
from rlhf_jax import convert
from rlhf_jax.models import lora
from rlhf_jax.weights import files

KINDS = ('sft', 'reward_model', 'dpo')
TINY = dict(kind='gpt_neox', size='70m', vocab_size=264, width=32, depth=2, num_heads=2, max_length=192)


@pytest.fixture(scope='module', autouse=True)
def built_once():
    """One experiment for each config and mesh, so that its step is compiled once (see test_training.py)."""
    built, build = {}, train.build

    def once(config, mesh):
        key = config.to_json(), mesh
        if key not in built:
            built[key] = build(config.copy_and_resolve_references(), mesh)
        return built[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'build', once)
        yield


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(kind, **fields):
    """The reward model with an adapter, DPO with a copy for its reference, fine-tuning with packed texts."""
    config = getattr(base, kind)()
    config.num_steps, config.batch_size, config.checkpoint_every, config.log_every = 8, 8, 4, 4
    config.model.update(TINY)
    config.max_length = 96
    config.data.num_rows, config.data.heldout = 48, 'validation[:20]'
    config.data.options = dict(num_steps=1, max_number=9, num_heldout=20)
    config.optimizer.learning_rate.peak = 1e-3
    if kind == 'sft':
        config.packing, config.max_length, config.train_on_prompt = True, 176, False  # two texts a row, some one
        config.data.num_rows = 37
    if kind == 'reward_model':
        config.lora.rank = 2
    config.update(fields)
    return config


@functools.lru_cache(maxsize=None)
def fresh(kind):
    return jax.jit(train.build(config_of(kind), one_device()).init)(jax.random.key(0))


def run(config, mesh, steps):
    """Final state and metrics of a few steps."""
    start = jax.tree.map(lambda x: jnp.array(x, copy=True), fresh(config.experiment))
    experiment, found = train.build(config, mesh), []
    batches = experiment.open_batches()
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        shardings = partition.state_shardings(start, experiment.rules, mesh)
        state = jax.device_put(start, shardings)
        step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
                       out_shardings=(shardings, mesh_lib.replicated(mesh)))
        for _ in range(steps):
            state, metrics = step(state, jax.device_put(next(batches), mesh_lib.batch_sharding(mesh)))
            found.append({name: float(value) for name, value in metrics.items()})
    return state, found


@functools.lru_cache(maxsize=None)
def unsharded(kind):
    return run(config_of(kind), one_device(), 3)


# If a value here moves, the training step computes something else: say in the commit what and why it should.
GOLDEN = {
    'sft': {
        'loss': (5.617811, 5.425075, 5.338598),
        'grad_norm': (4.206594, 2.861676, 2.100625),
        'accuracy': (0, 0.08536585, 0.4057377),
        'tokens': (231, 246, 244)},
    'reward_model': {
        'loss': (0.6996905, 0.7006735, 0.6905943),
        'grad_norm': (0.7724304, 0.8783051, 0.2270662),
        'chosen': (3.692852, 3.823652, 3.948698)},
    'dpo': {
        'loss': (0.6931472, 0.6681919, 0.6879237),
        'grad_norm': (1.404111, 0.9958198, 0.5573556),
        'chosen': (0, 0.2187082, 0.2107228)},
}


@pytest.mark.parametrize('kind', KINDS)
def test_golden_metrics_of_three_steps(kind):
    _, found = unsharded(kind)
    for name, values in GOLDEN[kind].items():
        np.testing.assert_allclose([row[name] for row in found], values, rtol=2e-5, atol=1e-5,
                                   err_msg=f'{kind}: {name}')


@pytest.mark.parametrize('kind,sizes', [
    ('sft', dict(data=2, fsdp=2, tensor=2)), ('reward_model', dict(data=2, fsdp=2, tensor=2)),
    ('dpo', dict(data=2, fsdp=2, tensor=2)), ('dpo', dict(fsdp=8))])
def test_sharded_equals_unsharded(kind, sizes):
    expected, expected_found = unsharded(kind)
    state, found = run(config_of(kind), mesh_lib.make_mesh(sizes), 3)
    for got, want in zip(found, expected_found):
        assert got['loss'] == pytest.approx(want['loss'], rel=2e-5)
    a, b = partition.flatten(state.params), partition.flatten(expected.params)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=3e-5, rtol=1e-4, err_msg=name)
    if kind == 'dpo':  # the reference lies like the parameters
        for name, leaf in partition.flatten(state.extra['reference']).items():
            assert leaf.sharding == partition.flatten(state.params)[name].sharding, name


class Kill(Exception):
    pass


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """kind -> (work directory, final state) of a whole run."""
    @functools.lru_cache(maxsize=None)
    def of(kind):
        workdir = tmp_path_factory.mktemp(kind)
        return workdir, train.train(config_of(kind), workdir, mesh=one_device())
    return of


@pytest.mark.parametrize('kind', KINDS)
def test_killed_and_resumed_is_bit_identical(kind, trained, tmp_path):
    def kill(step, state, metrics):
        if step == 6:
            raise Kill
    config, mesh = config_of(kind), one_device()
    _, whole = trained(kind)
    with pytest.raises(Kill):
        train.train(config, tmp_path, hooks=[kill], mesh=mesh)
    resumed = train.train(config, tmp_path, mesh=mesh)
    assert int(resumed.step) == config.num_steps
    for name, leaf in partition.flatten(whole).items():
        other = partition.flatten(resumed)[name]
        if name == 'rng':
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other, err_msg=name)


@pytest.mark.parametrize('kind', ['sft', 'dpo'])
def test_metrics_do_not_depend_on_microbatches(kind):
    """Rows hold different numbers of answers: the loss is the mean over the tokens of the batch all the same."""
    (_, (whole, *_)), (_, (parts,)) = unsharded(kind), run(config_of(kind, accumulate=2), one_device(), 1)
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_bfloat16_and_recomputation_change_no_more_than_rounding():
    state, (found,) = run(config_of('sft', model=dict(dtype='bfloat16', remat='full')), one_device(), 1)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    whole = unsharded('sft')[1][0]
    assert found['loss'] == pytest.approx(whole['loss'], rel=1e-3) and found['loss'] != whole['loss']
    assert found['grad_norm'] == pytest.approx(whole['grad_norm'], rel=2e-2)


# ---- Adapters --------------------------------------------------------------------------------------------------------

def test_only_adapter_and_head_are_trained_and_have_moments():
    state, _ = unsharded('reward_model')
    start = partition.flatten(fresh('reward_model').params)
    changed = {name for name, leaf in partition.flatten(state.params).items()
               if not np.array_equal(leaf, start[name])}
    assert changed == {name for name in start if name.endswith(('lora_a', 'lora_b'))} | {'score_head/kernel'}
    assert set(partition.flatten(state.opt_state[0].mu)) == changed


def test_the_reference_of_an_adapter_is_the_model_without_it():
    plain = train.build(config_of('dpo'), one_device())
    config = config_of('dpo', lora=dict(rank=2))
    adapted = train.build(config, one_device())
    assert jax.eval_shape(adapted.init, jax.random.key(0)).extra is None
    state, rng = fresh('dpo').replace(extra=None), np.random.default_rng(0)
    params = architecture.with_adapter(config, state.params, jax.random.key(1))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if path[-1].key == 'lora_b' else x, params)
    batch = next(adapted.open_batches())
    want, _ = plain.loss(lora.merge(params), state.replace(extra={'reference': lora.without(params)}), batch, None)
    got, _ = adapted.loss(params, state, batch, None)
    assert abs(float(got) - np.log(2)) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Dropout is drawn anew with each key, in training alone: the reference has no adapter to drop inputs of.
    dropping = train.build(config_of('dpo', lora=dict(rank=2, dropout=0.5)), one_device())
    draws = [float(dropping.loss(params, state, batch, jax.random.key(seed))[0]) for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1] and abs(draws[0] - float(got)) > 1e-4


@pytest.mark.parametrize('lora, message', [(dict(rank=2, dropout=1.0), r'lora.dropout=1.0 must be in \[0, 1\)'),
                                           (dict(dropout=0.1), 'lora.dropout=0.1: there is no adapter')])
def test_dropout_that_cannot_be_is_named(lora, message):
    with pytest.raises(ValueError, match=message):
        train.build(config_of('sft', lora=lora), one_device())


# ---- Starting weights ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def fine_tuned(trained, tmp_path_factory):
    """(work directory, Hugging Face folder, parameters) of one model."""
    (workdir, state), folder = trained('sft'), tmp_path_factory.mktemp('folder')
    params, module = jax.device_get(state.params), architecture.decoder(config_of('sft').model)
    files.save(folder, convert.to_torch('gpt_neox', module, params), convert.config_of('gpt_neox', module))
    return workdir, folder, params


def start_of(config):
    return train.build(config, one_device()).warm_start(fresh(config.experiment))


@pytest.mark.parametrize('which', [0, 1], ids=['work directory', 'Hugging Face folder'])
def test_warm_start(which, fine_tuned):
    path, params = str(fine_tuned[which]), fine_tuned[2]
    chex.assert_trees_all_equal(start_of(config_of('sft', weights=path)).params, params)
    state = start_of(config_of('dpo', weights=path))
    chex.assert_trees_all_equal(state.params, params)
    chex.assert_trees_all_equal(state.extra['reference'], params)
    assert all(a is not b for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.extra['reference'])))
    state = start_of(config_of('reward_model', weights=path))
    headless = {k: v for k, v in params.items() if k != 'lm_head'}
    chex.assert_trees_all_equal(lora.without(state.params)['backbone'], headless)
    assert state.params['score_head']['kernel'].std() > 0


def test_weights_are_read_into_the_shards_of_a_mesh(fine_tuned, trained, monkeypatch):
    """From a run, a folder, and a run with an adapter, none of which the host has whole; a reward model may come in the
    dtype that it computes in."""
    expected = loading.load_reward_model(trained('reward_model')[0], dict(dtype='bfloat16'), compact=True)
    monkeypatch.setattr(runs, 'on_host', None)
    mesh = mesh_lib.make_mesh({'fsdp': 4}, jax.devices()[:4])
    for path in fine_tuned[:2]:
        params = loading.load_decoder(path, config_of('sft'), mesh)
        wanted = loading.layout('gpt_neox', mesh)(params)
        assert jax.tree.map(lambda x: x.sharding, params) == wanted
        chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(fine_tuned[2]))
    assert params['blocks']['mlp']['up']['kernel'].addressable_shards[0].data.shape == (2, 8, 128)
    with jax.set_mesh(mesh_lib.make_mesh({}, jax.devices()[4:5])):  # as where others generate than train
        module, params = loading.load_reward_model(trained('reward_model')[0], dict(dtype='bfloat16'), mesh=mesh,
                                                   compact=True)
    assert jax.tree.map(lambda x: x.sharding, params) == loading.layout('gpt_neox', mesh, 'backbone')(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, expected[1])
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(expected[1]), rtol=1e-2)
    assert params['backbone']['blocks']['mlp']['up']['kernel'].dtype == module.backbone.dtype


def test_a_reward_model_run_is_read_back_with_its_adapter_merged(fine_tuned, trained):
    workdir, state = trained('reward_model')
    module, params = loading.load_reward_model(workdir)
    tokens = np.random.default_rng(0).integers(0, 259, (2, 5))
    score = lambda params: module.apply({'params': params}, tokens)
    assert not any('lora' in name for name in partition.flatten(params))
    np.testing.assert_allclose(score(params), score(state.params), atol=1e-5)
    with pytest.raises(ValueError, match="experiment='sft'; give the --workdir of one of 'reward_model'"):
        loading.load_reward_model(fine_tuned[0])
    with pytest.raises(ValueError, match="'reward_model'; give the --workdir of one of 'sft', 'dpo', 'policy'"):
        start_of(config_of('sft', weights=str(workdir)))


@pytest.mark.parametrize('which', [0, 1], ids=['work directory', 'Hugging Face folder'])
def test_weights_of_another_model_are_an_error(which, fine_tuned):
    config = config_of('sft', weights=str(fine_tuned[which]))
    config.model.vocab_size = 272
    with pytest.raises(ValueError, match='model.vocab_size=272, but weights=.* have 264'):
        start_of(config)


def test_mistakes_are_told_before_anything_is_compiled(tmp_path):
    config = config_of('sft')
    config.model.vocab_size = 200
    with pytest.raises(ValueError, match='tokenizer=bytes has 259 ids, the model model.vocab_size=200'):
        train.build(config, one_device()).open_batches()
    with pytest.raises(ValueError, match='max_length=200 exceeds the context of the model, model.max_length=192'):
        train.build(config_of('sft', max_length=200), one_device())
    with pytest.raises(FileNotFoundError, match='no config.json there'):
        start_of(config_of('sft', weights=str(tmp_path / 'none')))
    with pytest.raises(ValueError, match='max_length=20: all 48 pairs are longer'):
        train.build(config_of('dpo', max_length=20), one_device()).open_batches()
    with pytest.raises(ValueError, match='bos=True, but'):
        texts.Encoder(type('NoBos', (), {'bos': None}), bos=True)


# ---- Held-out data, and whether it learns ----------------------------------------------------------------------------

def test_held_out_loss_is_that_of_all_rows_at_once():
    config = config_of('sft', eval_every=4)
    mesh = one_device()
    experiment = train.build(config, mesh)
    (hook,), state = experiment.hooks(None), unsharded('sft')[0]
    whole = supervised.open_demonstrations(config, config.data.heldout)
    assert len(whole['tokens']) % config.batch_size
    want, metrics = experiment.loss(state.params, state, {name: jnp.asarray(x) for name, x in whole.items()}, None)
    got = hook.measure(state)
    np.testing.assert_allclose([got['heldout_loss'], got['heldout_accuracy']], [want, metrics['accuracy']], rtol=1e-5)
    assert got['heldout_perplexity'] == pytest.approx(np.exp(want), rel=1e-5)


@pytest.mark.parametrize('kind', ['reward_model', 'dpo'])
def test_learns_to_tell_two_kinds_of_answers_apart(kind, tmp_path):
    rng = np.random.default_rng(0)
    word = lambda letters: ''.join(rng.choice(list(letters), 3))
    rows = [dict(prompt=word('abc'), chosen=word('xyz'), rejected=word('uvw')) for _ in range(60)]
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows[:40])))
    (tmp_path / 'validation.jsonl').write_text('\n'.join(map(json.dumps, rows[40:])))
    config = config_of(kind, lora=dict(rank=0), num_steps=30, eval_every=30, max_length=8, checkpoint_every=0)
    config.data.update(dict(task='pairs', path=str(tmp_path), heldout='validation', num_rows=0))
    config.data.options = {}
    config.optimizer.learning_rate.peak = 3e-3
    train.train(config, tmp_path / 'run', mesh=one_device())
    found = [row for row in read_metrics(tmp_path / 'run' / 'metrics.jsonl') if 'heldout_accuracy' in row]
    assert [row['step'] for row in found] == [30]
    assert found[0]['heldout_accuracy'] > 0.9
    assert found[0]['heldout_loss'] < 0.6


def test_batches_hold_what_the_experiment_says():
    for kind in KINDS:
        experiment = train.build(config_of(kind), one_device())
        batch = next(experiment.open_batches())
        assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
            k: (x.shape, x.dtype) for k, x in experiment.batch.items()}
        assert kind != 'sft' or batch['mask'].max() > 1  # rows do hold several texts


def test_a_step_on_a_packed_batch_is_the_step_on_its_texts():
    """Four microbatches of two texts: two of two rows."""
    found = []
    for pack_batch in (False, True):
        config = config_of('sft', packing=False, pack_batch=pack_batch, accumulate=4)
        experiment = train.build(config, one_device())
        batch = next(experiment.open_batches())
        assert len(batch['tokens']) == (4 if pack_batch else 8)
        found.append(jax.jit(experiment.step)(jax.jit(experiment.init)(jax.random.key(0)), batch))
    (state, metrics), (packed_state, packed_metrics) = found
    chex.assert_trees_all_close(packed_metrics, metrics, rtol=1e-5)
    chex.assert_trees_all_close(packed_state.params, state.params, atol=2e-5)
