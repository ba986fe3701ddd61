"""The encoder's optimizer groups, schedules and loss at the paper's configuration, against the numbers of its
recipe."""
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compiled import optimized
from configs.dlc import encoder_imagenet, quickstart
from dlc_jax import convert
from dlc_jax.convert import dinov2
from dlc_jax.models import sem, vit
from experiments import train
from experiments.dlc import encoder, self_distillation
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import optim, partition
from experiments.runtime.state import TrainState
from rlhf_jax.weights import files, rules

DEPTH = 24


@pytest.fixture(scope='module')
def groups():
    """{path: Group} of every parameter of the L512 encoder, with all its forms of SEM."""
    config = encoder_imagenet.get_config('L512')
    with config.unlocked():
        config.model.form = 'pos_shared'
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    init = lambda key: {'encoder': encoder.make_model(config).init(key, jnp.zeros(images.shape))['params'],
                        'dino_head': encoder.make_head(config).init(key, jnp.zeros((1, 1024)))['params']}
    assigned = optim.assign_groups(jax.eval_shape(init, jax.random.key(0)), encoder.optimizer_groups(config))
    leaves = jax.tree_util.tree_leaves_with_path(assigned, is_leaf=lambda x: isinstance(x, optim.Group))
    return {partition.path_name(path): group for path, group in leaves}


def test_layer_wise_decay(groups):
    blocks = [g for name, g in groups.items() if name.startswith('encoder/blocks/')]
    assert len(blocks) == 14
    for group in blocks:
        np.testing.assert_allclose(np.ravel(group.learning_rate), 0.9 ** (24 - np.arange(24)), rtol=1e-5)
    for name in ('pos_embed', 'cls_token', 'register_tokens', 'mask_token'):
        assert groups[f'encoder/{name}'].learning_rate == pytest.approx(0.9 ** 25)
    for name in ('kernel', 'bias'):
        assert groups[f'encoder/patch_embed/{name}'].learning_rate == pytest.approx(0.2 * 0.9 ** 25)
    rest = {name: g for name, g in groups.items() if np.all(g.learning_rate == 1.0)}
    assert {name.split('/')[1] for name in rest if name.startswith('encoder')} == {
        'norm', 'sem_embed', 'sem_norm', 'sem_out_shared', 'sem_bias'}
    assert {name for name in groups if name.startswith('dino_head')} <= set(rest)


def test_weight_decay_spares_biases_norms_and_layer_scale_and_nothing_else(groups):
    spared = {name for name, g in groups.items() if g.weight_decay == 0}
    assert spared == {name for name in groups if name.endswith(('/bias', '/scale', '/gamma'))}
    assert not {'encoder/sem_bias', 'dino_head/last_layer/gain', 'encoder/pos_embed', 'encoder/mask_token'} & spared


def test_only_the_last_layer_waits(groups):
    assert {name: g.frozen_steps for name, g in groups.items() if g.frozen_steps} == {
        'dino_head/last_layer/kernel': 1250, 'dino_head/last_layer/gain': 1250}


def test_schedules():
    config = encoder_imagenet.get_config()
    o, steps = config.optimizer, config.num_steps
    rate, decay = optim.schedule(o.learning_rate, steps), optim.schedule(o.weight_decay, steps)
    temperature, momentum = optim.schedule(config.loss.teacher_temperature, steps), optim.ema_decay(config.ema, steps)
    assert [float(rate(s)) for s in (0, 12_499, 12_500, 125_000)] == pytest.approx([0, 5e-5, 5e-5, 1e-6])
    assert [float(decay(s)) for s in (0, 62_500, 125_000)] == pytest.approx([0.04, 0.22, 0.4])
    assert [float(temperature(s)) for s in (0, 37_499, 124_999)] == pytest.approx([0.04, 0.07, 0.07])
    # The n-th update of the teacher, counted from 1, is the original's iteration n - 1.
    assert [float(momentum(n)) for n in (1, 62_501, 125_000)] == pytest.approx([0.992, 0.996, 1.0], abs=1e-6)
    assert (o.clip_norm, o.clip_per_module, o.b1, o.b2, o.eps) == (3.0, True, 0.9, 0.999, 1e-8)


def test_groups_are_one_a_shard_and_microbatch_unless_given():
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.batch_size, config.accumulate, config.groups = 24, 2, 0
    assert encoder.num_groups(config, shards=3) == 6
    config.groups = 12
    assert encoder.num_groups(config, shards=3) == 12
    for config.groups in (9, 18):
        with pytest.raises(ValueError, match=f'groups={config.groups} must be a multiple of 3 batch shards x accumula'):
            encoder.num_groups(config, shards=3)


def test_masked_patches_are_picked_within_their_group():
    patches = jnp.arange(4 * 3.0).reshape(4, 3, 1)  # four crops in two groups of 6 patches
    picked = self_distillation.gather_masked(patches, jnp.array([[5, 0], [1, 1]]))
    np.testing.assert_array_equal(picked[:, 0], [5, 0, 7, 7])


def test_collapse_shows_in_its_metrics():
    one = jnp.eye(4)[jnp.zeros((6, 2), int)]  # every position of every code takes entry 0
    spread = jnp.eye(4)[jnp.arange(8).reshape(4, 2) % 4]
    for codes, usage in ((one, 1.0), (spread, 2.0)):
        values = self_distillation.collapse(jnp.full((3, 8), 1 / 8), codes)
        assert float(values['sem_usage']) == pytest.approx(usage, rel=1e-5)
        assert float(values['sem_entropy']) == pytest.approx(0, abs=1e-5)
        assert float(values['teacher_entropy']) == pytest.approx(np.log(8), rel=1e-5)


@pytest.mark.parametrize('centering', ['center', 'sinkhorn_knopp'])
def test_patches_without_a_weight_do_not_change_the_targets_of_others(centering):
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.loss.centering, config.model.depth = centering, 1
    objective = encoder.make_objective(config, 1)
    side, channels = config.data.global_size, config.data.channels
    teacher = optimized(objective.init_params, static_argnums=1)(jax.random.key(0), (side, side, channels))
    real = np.arange(6) < 4
    batch = dict(global_crops=jax.random.normal(jax.random.key(1), (2, 2, side, side, channels)),
                 mask_weights=jnp.where(real, 0.25, 0.0)[None])
    see = optimized(lambda indices: objective.targets(
        teacher, objective.init_centers(), batch | dict(mask_indices=indices), jnp.int32(0)))
    indices = jnp.array([[1, 5, 2, 7, 0, 0]])
    got, other = see(indices), see(jnp.where(real, indices, jnp.array([3, 6, 4, 0, 8, 9])))
    np.testing.assert_allclose(got.patches[:4], other.patches[:4], rtol=1e-5)
    np.testing.assert_allclose(got.means['ibot'], other.means['ibot'], rtol=1e-5, atol=1e-7)
    exchanged = see(indices.at[0, 0].set(9))  # one with a weight does
    assert jnp.abs(got.means['ibot'] - exchanged.means['ibot']).max() > 1e-4


@pytest.mark.parametrize('num_local', [2, 0])
def test_loss_is_the_sum_over_pairs_of_views(num_local):
    """Term by term and view by view, on two globals and two locals: 2 x 2 local and 2 global pairs, each a sixth. On
    the globals alone they are halves."""
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.batch_size, config.loss.centering, config.model.depth = 4, 'center', 1
    config.loss.teacher_temperature.update(dict(init=0.04, peak=0.04))
    config.data.num_local, pairs = num_local, 2 * num_local + 2
    experiment = encoder.build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    scramble = lambda tree: jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(
        (path[-1].key in ('scale', 'gain', 'gamma')) + rng.normal(0, 0.1, leaf.shape), jnp.float32), tree)
    center = scramble(shapes.extra)
    state = shapes.replace(step=jnp.int32(0), params=scramble(shapes.params), ema=scramble(shapes.ema), extra=center,
                           opt_state=None, rng=None)
    batch = next(experiment.open_batches())
    got, aux = optimized(experiment.loss)(state.params, state, batch, jax.random.key(0))

    model, head = encoder.make_model(config), encoder.make_head(config)
    see = optimized(lambda p, x, masks=None: model.apply({'params': p['encoder']}, x, masks))
    score = optimized(lambda p, x: head.apply({'params': p['dino_head']}, x))
    soft = lambda logits, name: np.asarray(jax.nn.softmax((logits - center[name]) / 0.04), np.float64)
    cross = lambda logits, target: -(target * np.asarray(jax.nn.log_softmax(logits / 0.1), np.float64)).sum(-1)
    views = batch['global_crops'].shape[1]
    teacher = [see(state.ema, batch['global_crops'][:, v]) for v in range(views)]
    student = [see(state.params, batch['global_crops'][:, v], batch['masks'][:, v]) for v in range(views)]
    targets = [soft(score(state.ema, t.cls), 'dino') for t in teacher]
    glimpses = [score(state.params, see(state.params, batch['local_crops'][:, v]).cls) for v in range(num_local)]
    local = sum(cross(g, t).mean() for g in glimpses for t in targets) / pairs
    across = sum(cross(score(state.params, student[v].cls), targets[1 - v]).mean() for v in range(2)) / pairs
    masked = 0.0
    for v in range(views):
        each = cross(score(state.params, student[v].patches), soft(score(state.ema, teacher[v].patches), 'ibot'))
        for row, mask in zip(each, batch['masks'][:, v]):
            masked += row[mask].mean() if mask.any() else 0.0
    spread = 0.0
    for s in student:
        x = np.asarray(s.cls, np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        spread -= np.log((np.linalg.norm(x[:, None] - x[None], axis=-1) + 10 * np.eye(len(x))).min(1)).mean()
    want = {'loss_local': local, 'loss_global': across, 'loss_koleo': spread, 'loss_ibot': masked / (2 * 4)}
    for name, value in want.items():
        assert float(aux['metrics'][name]) == pytest.approx(value, rel=1e-3), name
    assert float(got) == pytest.approx(local + across + 0.1 * spread + masked / 8, rel=1e-3)
    assert batch['masks'].any((1, 2)).any() and masked > 0


def test_released_backbones_go_into_the_shards_of_the_state(tmp_path):
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.pretrained = str(tmp_path / 'dino.safetensors')
    module = encoder.make_model(config)
    released = vit.VisionTransformer(**{name: getattr(module, name) for name in (
        'width', 'depth', 'num_heads', 'patch_size', 'num_registers', 'pos_grid', 'pos_antialias', 'mlp_ratio')})
    rng = np.random.default_rng(0)
    draw = lambda shapes: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    weights, fresh = (draw(dinov2.shapes_of(m, config.data.channels)) for m in (released, module))
    files.save_state_dict(config.pretrained, convert.tensors('dinov2', released, weights))
    mesh = mesh_lib.make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    shardings = partition.param_shardings(fresh, sem.PARTITION_RULES, mesh)
    state = TrainState(jnp.int32(0), {'encoder': jax.device_put(fresh, shardings)}, None, None, jax.random.key(0))
    found = encoder.warm_start(config, state)
    flat, ours, theirs = (rules.flatten(x) for x in (found.params['encoder'], fresh, weights))
    assert set(flat) == set(ours) and set(ours) - set(theirs)
    for path, x in flat.items():
        np.testing.assert_array_equal(x, theirs.get(path, ours[path]), err_msg=path)
        assert x.sharding == rules.flatten(shardings)[path], path
    chex.assert_trees_all_equal(found.ema, found.params)
    # What does not fit is named.
    wrong = draw(dinov2.shapes_of(released.clone(pos_grid=module.pos_grid + 1), config.data.channels))
    files.save_state_dict(config.pretrained, convert.tensors('dinov2', released, wrong))
    with pytest.raises(ValueError, match=r'dino.safetensors: pos_embed is \(1, \d+, \d+\) there but'):
        encoder.warm_start(config, state)


@pytest.fixture
def pretrained(tmp_path):
    """A config that starts from released weights, and what writes these."""
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.pretrained, config.model.num_registers = str(tmp_path / 'dino.safetensors'), 2
    module = encoder.make_model(config)
    fields = {name: getattr(module, name) for name in (
        'width', 'depth', 'num_heads', 'patch_size', 'num_registers', 'pos_grid', 'pos_antialias', 'mlp_ratio')}

    def write(left_out=(), **changes):
        released = vit.VisionTransformer(**fields | changes)
        shapes = dinov2.shapes_of(released, config.data.channels)
        weights = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
        tensors = convert.tensors('dinov2', released, weights)
        files.save_state_dict(config.pretrained, {name: tensors[name] for name in tensors if name not in left_out})
    return config, write


@pytest.mark.parametrize('change, match', [
    (dict(num_registers=0), 'dino.safetensors: has no register_tokens, which would start at random; .*num_registers=0'),
    (dict(pos_grid=9), r'dino.safetensors: pos_embed is \(1, 82, \d+\) there but'),
    (dict(left_out=('norm.bias',)), 'dino.safetensors: .*norm.bias'), (dict(depth=1), 'dino.safetensors: blocks/')])
def test_weights_of_another_model_are_named_before_a_state_is_built(pretrained, tmp_path, monkeypatch, capsys, change,
                                                                   match):
    config, write = pretrained
    write(**change)
    monkeypatch.setattr(jax, 'jit', lambda *unused, **also: pytest.fail('built a state'))
    with pytest.raises(ValueError, match=match) as error:
        train.train(config, tmp_path / 'run')
    assert '\n' not in str(error.value)
    # A dry run looks at them too, after its report.
    monkeypatch.setattr(train.launch, 'parse', lambda p: (p.parse_args(['--dry_run']), config))
    with pytest.raises(ValueError, match=match):
        train.main()
    assert 'memory a device' in capsys.readouterr().out


def test_weights_that_fit_are_not_read_to_see_it(pretrained, monkeypatch):
    config, write = pretrained
    write()
    experiment = train.build(config, mesh_lib.make_mesh(config.mesh))
    monkeypatch.setattr(rules, '_read', lambda *unused: pytest.fail('read a tensor'))
    experiment.check()
