"""Paper-size programs through the real TPU compiler, and what reads its answer. The former need libtpu, not a TPU."""
import importlib.util
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from configs.dlc import base, code_model_imagenet, generator_imagenet
from configs.rlhf import gsm8k, tldr
from experiments import compile as aot
from experiments import readiness, train
from experiments.rlhf.policy import roles
from experiments.runtime import compiler, config_files, hlo, partition, programs, slices
from experiments.runtime import mesh as mesh_lib
from experiments.train import build, mesh_of
from rlhf_jax.models import attention

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="pip install -e '.[tpu]'")


@needs_libtpu
@pytest.mark.parametrize('tensor, rows, shared', [(1, 256, ''), (8, 512, ', the same as process ')])
def test_a_dry_run_says_which_rows_a_process_has_and_what_it_writes(tensor, rows, shared, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['train', '--config=configs/dlc/code_model_imagenet.py:L512', '--dry_run',
                                     '--topology=v5e-16', '--config.batch_size=1024', f'--config.mesh.tensor={tensor}'])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    about = lines[lines.index('processes 4') + 1:]
    assert len(about) == 4 and all(f': 4 devices, {rows} rows of a batch{shared}' in line for line in about)
    assert ['config.json, metrics.jsonl' in line for line in about] == [True, False, False, False]
    written = [float(re.search(r'writes ([\d.]+) GiB of a checkpoint', line)[1]) for line in about]
    state = next(float(line.split()[0]) for line in lines if 'state (parameters' in line)  # of one of 16 devices
    if tensor == 1:  # every parameter is split over all 16
        assert sum(written) == pytest.approx(16 * state, rel=0.05)
    assert max(written) < 0.4 * sum(written)  # no process writes for all
    monkeypatch.setattr('sys.argv', ['train', '--config=configs/dlc/code_model_imagenet.py:L512', '--workdir=x',
                                     '--topology=v5e-16'])
    with pytest.raises(ValueError, match='--topology: only with --dry_run'):
        train.main()


@needs_libtpu
@pytest.mark.tpu_compile
def test_step_and_sampler_fit_and_the_state_is_split():
    config, target, chips = code_model_imagenet.get_config('L512'), slices.named('v5e-16'), 16
    assert len(target.devices) == chips and len(slices.named('v4-16').devices) == 8  # v4 counts cores
    experiment = build(config, mesh_lib.make_mesh(config.mesh, target.devices))
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    size = lambda tree: sum(int(np.prod(x.shape)) * getattr(x.dtype, 'itemsize', 8) for x in jax.tree.leaves(tree))

    reports = dict(aot.compile_config(config, target, fast=True))
    assert set(reports) == {'step', 'sampler'}
    for name, report in reports.items():
        assert report['fits'] and 0 < report['bytes'] < target.hbm_bytes
        assert f'GiB a chip of {target.usable_bytes / slices.GIB:.2f}' in aot.describe(name, report, target)
    step, sampler = reports['step'], reports['sampler']
    # Parameters, both moments and EMA: a chip holds its share, padded to tiles of 128 where 16 chips leave 64 columns
    # of 1024. The donated state is returned in place.
    held = (size(state) + size(dict(experiment.batch))) / chips
    assert held <= step['arguments'] < 1.4 * held
    assert step['outputs'] < 0.01 * step['arguments']
    # Every matrix is gathered where it is used, a layer at a time, and nothing of the size of the scores ever is.
    scores = config.batch_size * 512 * 256 * 2
    assert {'all-gather', 'all-reduce'} <= set(step['collectives'])
    assert max(entry['largest_bytes'] for entry in step['collectives'].values()) < scores / 4
    assert size(state.params) <= sampler['arguments'] < 1.02 * size(state.params)
    # 424 M parameters in the blocks, 2 FLOPs each and token, forward, recomputed and backward; attention on top, whose
    # kernels count one product of 512 x 512 (width 1024, 24 blocks) more than XLA's own.
    tokens = config.batch_size * 512 / chips
    blocks = sum(x.size for x in jax.tree.leaves(state.params['blocks']) if x.ndim > 3 or x.shape[-1] == 4096)
    more = 2 * 512 * 1024 * 24 * tokens
    assert 4 * 2 * blocks * tokens < step['flops'] < 1.5 * 4 * 2 * blocks * tokens + more
    assert sampler['flops'] > 4096 * 2 * 0.9 * blocks * tokens  # every step of the loop counts


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_policy_trains_and_samples_in_its_share_of_the_slice():
    """Online DPO at the width and vocabulary of Pythia-410m: scores of the vocabulary stay where they are made."""
    config = tldr.get_config('online_dpo_410m')
    config.model.update(dict(depth=1))
    config.batch_size, config.accumulate = 64, 2
    config.sampling.update(dict(max_prompt=64, max_new_tokens=8))
    config.rollout.update(dict(max_staleness=1, devices=8))
    target = slices.named('v5e-16')
    split, whole = dict(data=1, fsdp=8, tensor=1), dict(data=8, fsdp=1, tensor=1)
    meshes = {program.name: dict(program.mesh.shape) for program in aot.programs_of(config, target, fast=True)}
    assert meshes == {'step': split, 'sampler': whole, 'reward': split, 'publish': split}
    reports = {name: report for only in ('step', 'sampler')
               for name, report in aot.compile_config(config, target, only=only, fast=True)}
    assert all(report['fits'] for report in reports.values())
    table = 50304 * 1024  # entries of the embedding, gathered in float32 at the most; its gradient is summed
    assert max(entry['largest_bytes'] for entry in reports['step']['collectives'].values()) <= 4 * table
    assert not reports['sampler']['collectives'] or max(
        entry['largest_bytes'] for entry in reports['sampler']['collectives'].values()) < 2 ** 20
    assert reports['sampler']['arguments'] < 2.2 * (2 * table + 14 * 1024 ** 2)  # in bfloat16, and nothing else


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize('topology', ['v5e-4', 'v5e-8', 'v6e-8', 'v5e-16', 'v5p-16'])
def test_a_slice_less_the_chip_that_generates_still_makes_a_mesh(topology):
    """3 of 4 chips make no torus; they are taken in plain order."""
    for config in (tldr.get_config('online_dpo_410m_async'), gsm8k.get_config('online_dpo_async')):
        devices = slices.named(topology).devices
        mesh = mesh_of(config, devices)
        assert set(mesh.devices.flat) == set(devices[:-1]) and mesh_lib.batch_shards(mesh) == len(devices) - 1


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize('file, name', [(tldr, 'online_dpo_410m_async'), (gsm8k, 'rloo_async')])
def test_asynchronous_steps_compile_for_the_smallest_slice(file, name):
    config, target = file.get_config(name), slices.named('v5e-4')
    config.model.update(dict(depth=1, width=256, num_heads=4, hidden=512))
    config.batch_size, config.accumulate = 12, 1
    config.sampling.update(dict(max_prompt=64, max_new_tokens=8))
    three, one = dict(data=3, fsdp=1, tensor=1), dict(data=1, fsdp=1, tensor=1)
    meshes = {program.name: dict(program.mesh.shape) for program in aot.programs_of(config, target, fast=True)}
    assert {name: meshes[name] for name in ('step', 'sampler', 'publish')} == {
        'step': three, 'sampler': one, 'publish': three}
    (_, report), = aot.compile_config(config, target, only='step', fast=True)
    assert report['fits'] and report['mesh'] == three


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize('length, heads, kv_heads, dim, causal, packed', [
    (256, 16, 16, 72, False, False), (261, 16, 16, 64, False, False), (565, 32, 32, 80, True, True),
    (1024, 32, 8, 128, True, True)], ids=['DiT-XL', 'ViT-L', 'Pythia-2.8b', 'LLaMA-8B'])
def test_attention_writes_no_scores(length, heads, kv_heads, dim, causal, packed):
    """Forward and backward, rows over two chips and heads over two."""
    target = slices.named('v5e-4')
    mesh = mesh_lib.make_mesh({'fsdp': 2, 'tensor': 2}, target.devices)
    shape = lambda *sizes, dtype=jnp.bfloat16, spec: jax.ShapeDtypeStruct(
        sizes, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
    q, k = (shape(8, length, n, dim, spec=('fsdp', None, 'tensor')) for n in (heads, kv_heads))
    segments = shape(8, length, dtype=jnp.int32, spec=('fsdp',)) if packed else None

    def loss(q, k, v, segments):
        mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None]
        out = attention.fused(q, k, v, mask=mask, segments=segments, causal=causal, impl='splash')
        return out.astype(jnp.float32).sum()
    program = programs.Program('attention', jax.jit(jax.grad(loss, (0, 1, 2))), (q, k, k, segments), mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        text = program.jitted.lower(*program.args).compile().as_text()
    products = 2 * 8 * heads * length ** 2 * dim / 4  # of a chip; two forward, five backward
    assert 7 * products <= programs.compile_program(program, target)['flops'] < 7 * 2.4 * products
    assert 'splash_mha' in text and 'all-gather' not in text
    assert not re.search(rf'\[(\d+,)*{length},{length}\]', text)


@needs_libtpu
@pytest.mark.tpu_compile
def test_gathered_weights_are_no_loop_of_small_products():
    """Without the options of steps, the weights of a sharded network arrive in a loop of permutes, slice by slice."""
    target = slices.named('v5e-16')
    mesh = mesh_lib.make_mesh({'fsdp': -1}, target.devices)
    rows, weights = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (('fsdp',), ('fsdp', None)))
    program = jax.jit(lambda x, w: jnp.tanh(x @ w), in_shardings=(rows, weights), out_shardings=rows)
    args = (jax.ShapeDtypeStruct((65536, 1152), jnp.bfloat16), jax.ShapeDtypeStruct((1152, 4608), jnp.bfloat16))
    by = {name: programs.compile_program(programs.Program(name, program, args, mesh, options=options), target)
          for name, options in (('default', None), ('steps', compiler.options(mesh)))}
    by = {name: report['collectives'] for name, report in by.items()}
    assert by['default']['collective-permute']['runs'] >= 15
    assert 'collective-permute' not in by['steps'] and by['steps']['all-gather']['runs'] >= 1


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize('name, fsdp', [('v5p-8', 4), ('v4-32', 4)])
def test_gradients_of_an_odd_vocabulary_are_scattered_over_four_chips(name, fsdp):
    """Without an option of steps the compiler ends this process, at LLaDA's vocabulary with a code's tokens."""
    target = slices.named(name)
    mesh = mesh_lib.make_mesh({'data': -1, 'fsdp': fsdp}, target.devices)
    rows, table = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (('fsdp',), (None, 'fsdp')))
    grad = jax.grad(lambda w, x: jax.nn.logsumexp(x @ w.T, -1).sum())
    program = jax.jit(grad, in_shardings=(table, rows), out_shardings=table)
    args = (jax.ShapeDtypeStruct((126_606, 4096), jnp.float32), jax.ShapeDtypeStruct((1024, 4096), jnp.float32))
    report = programs.compile_program(programs.Program('step', program, args, mesh, options=compiler.options(mesh)),
                                      target)
    assert report['collectives']


@needs_libtpu
@pytest.mark.parametrize('path, name', [
    ('configs/rlhf/tldr.py:online_dpo_410m', 'reward'), ('configs/dlc/text_to_code_llada.py:L512', 'sampler'),
    ('configs/dlc/align_llada.py:lora', 'sampler')])
def test_programs_of_split_weights_are_compiled_with_the_options_of_steps(path, name):
    """Tables say of them what a run does; a decoder's sampler holds its weights whole."""
    target, config = slices.named('v5e-16'), config_files.load(path)
    config = readiness.divided(config, mesh_lib.batch_shards(mesh_of(config, target.devices)))
    options = {program.name: program.options for program in aot.programs_of(config, target)}
    assert options[name] == options['step'] == compiler.TPU_OPTIONS
    assert 'publish' not in options or options['publish'] is None


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize('name, divides', [('v5e-16', True), ('v5e-32', False), ('v6e-32', True), ('v5p-64', True),
                                           ('v4-64', True)])
def test_slices_that_can_be_divided_between_learner_and_generator(name, divides):
    """The refusal says what the compiler does; it does not depend on the program."""
    config = tldr.get_config('online_dpo_410m_async')
    devices = slices.named(name).devices
    half = mesh_lib.make_mesh({'data': -1}, devices[:len(devices) // 2])
    program = jax.jit(jnp.sum, in_shardings=mesh_lib.batch_sharding(half)).lower(
        jax.ShapeDtypeStruct((len(devices), 8), jnp.float32))
    if divides:
        program.compile()
        assert len(roles.learner_devices(config, devices)) == len(devices) - 1
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match='limited ICI routing'):
            program.compile()
        with pytest.raises(ValueError, match='rollout.devices=1: programs for a part of a v5e slice .*here are 32'):
            roles.learner_devices(config, devices)
        config.rollout.devices = 0
        assert roles.learner_devices(config, devices) == list(devices)


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_state_larger_than_a_chip_is_counted():
    target = slices.named('v5e-8')
    whole = mesh_lib.replicated(mesh_lib.make_mesh({}, target.devices[:1]))
    assert programs.bytes_on_device(jax.ShapeDtypeStruct((2 ** 30, 8), jnp.float32, sharding=whole)) >= 32 * slices.GIB


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_mesh_that_cannot_fit_is_reported(monkeypatch, capsys):
    config = generator_imagenet.get_config('L512')
    config.mesh.update(dict(data=-1, fsdp=1))  # 14 GiB of state on every chip
    monkeypatch.setattr(aot.launch, 'parse', lambda p, **_: (p.parse_args(['--only=step', '--fast']), config))
    with pytest.raises(ValueError, match='does not fit v5e-16: raise mesh.fsdp'):
        aot.main()
    assert 'DOES NOT FIT' in capsys.readouterr().out


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize('topology, sizes', [
    ('v5e-16', dict(fsdp=-1, tensor=2)), ('v5e-64', dict(data=2, fsdp=-1, tensor=2)),
    ('v5p-128', dict(fsdp=-1, tensor=8))])
def test_every_axis_finds_its_place_in_a_slice(topology, sizes):
    devices = slices.named(topology).devices
    mesh = mesh_lib.make_mesh(sizes, devices)
    assert set(mesh.devices.flat) == set(devices) and mesh.shape['tensor'] == sizes['tensor']


@pytest.mark.parametrize('name, message', [
    ('v7x-16', r"--topology='v7x-16': write GENERATION-SIZE with a generation of \('v4', 'v5e', 'v5p', 'v6e'\) or "),
    ('v5e', "--topology='v5e': write GENERATION-SIZE"),
    ('v5e-12', r"--topology='v5e-12': sizes of v5e are \(4, 8, 16,"),
    ('h100-12', "--topology='h100-12': up to 8 GPUs, or a multiple of 8"),
])
def test_unknown_slices_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        slices.named(name)


def test_a_missing_compiler_is_named(monkeypatch):
    def missing(**_):
        raise RuntimeError('Unable to find libtpu\nand more lines')
    monkeypatch.setattr(slices, 'get_topology_desc', missing)
    with pytest.raises(ValueError, match=r"v5e-16: pip install -e '\.\[tpu\]' \(Unable to find libtpu\)$"):
        slices.named('v5e-16')


def test_flops_count_loops_branches_and_recomputation():
    w = jnp.ones((8, 8))
    product = 2 * 4 * 8 * 8
    count = lambda f: programs.matmul_flops(jax.make_jaxpr(f)(jnp.ones((4, 8))))
    loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x)
    assert count(lambda x: x @ w) == product
    assert count(jax.jit(loop)) == 5 * product
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x @ w, x)) == 5 * product
    early = lambda x: jax.lax.while_loop(lambda c: (c[0] < 7) & (c[1][0, 0] < 1), lambda c: (c[0] + 1, c[1] @ w),
                                         (0, x))
    assert count(early) == 7 * product
    tower = lambda x: jnp.sin(jnp.sin(x @ w) @ w).sum()
    assert count(jax.grad(tower)) == 4 * product
    assert count(jax.grad(jax.checkpoint(tower))) == 6 * product
    image, kernel = jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    with jax.set_mesh(mesh_lib.make_mesh({'data': 2, 'tensor': 4})):  # two devices have rows of their own, all compute
        rows = jax.shard_map(lambda x: x @ w, in_specs=jax.P('data'), out_specs=jax.P('data'), check_vma=False)
        assert count(rows) == 4 * product
    blocks = lambda x: pl.pallas_call(lambda x, w, y: y.__setitem__(..., x[...] @ w[...]), grid=(2,), out_shape=x,
                                      in_specs=[pl.BlockSpec((2, 8), lambda i: (i, 0)), pl.BlockSpec()],
                                      out_specs=pl.BlockSpec((2, 8), lambda i: (i, 0)))(x, w)
    assert count(blocks) == product
    both = jax.make_jaxpr(lambda x: blocks(x) + x @ w)(jnp.ones((4, 8)))
    assert programs.matmul_flops(both) == 2 * product and programs.matmul_flops(both, in_kernels=True) == product
    conv = lambda x: jax.lax.conv_general_dilated(image, kernel, (1, 1), 'VALID',
                                                  dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    assert count(conv) == 2 * (4 * 4 * 5) * (3 * 3 * 3)


def test_an_iteration_adds_up_or_overlaps():
    seconds = lambda matmul, cycles=0.0: dict(matmul=matmul, memory=0.5, network=0.1, cycles=cycles)
    reports = {'step': {'seconds': seconds(3.0), 'times': 1}, 'publish': {'seconds': seconds(0.1), 'times': 1},
               'prefill': {'seconds': seconds(1.0), 'times': 2}, 'sampler': {'seconds': seconds(0.2, 2.0), 'times': 2},
               'gold reward': {'seconds': seconds(1.0), 'times': 4}}
    parts = aot.iteration(reports, overlaps=False)
    assert parts == {'step': 3.0, 'publish': 0.5, 'sampler': 2 * 1.0 + 2 * 2.0, 'reward': 4.0, 'all': 13.5}
    assert aot.iteration(reports, overlaps=True)['all'] == 10.0  # generating takes longer than 3.5 of learning
    assert programs.expected({'seconds': seconds(3.0, 3.2)}) == (3.2, 'matmul')
    assert programs.expected({'seconds': seconds(3.0, 9.0)}) == (9.0, 'latency')


@pytest.mark.parametrize('rollout, said', [
    ({}, '3.00 s: step 1.00, publish 1.00, sampler 1.00, reward 0.00, one after another'),
    (dict(devices=2), '3.00 s: step 1.00, publish 1.00, sampler 1.00, reward 0.00, one after another'),
    (dict(devices=2, max_staleness=1), '2.00 s: step 1.00, publish 1.00, sampler 1.00, reward 0.00, generating beside '
                                       'learning'),
    (dict(transport='files', max_staleness=1), '2.00 s: step 1.00, publish 1.00, sampler 1.00, reward 0.00, generating '
                                               'on as many chips elsewhere, generating beside learning')])
def test_a_run_says_where_it_generates(rollout, said):
    config = gsm8k.get_config().copy_and_resolve_references()
    config.rollout.update(rollout)
    seconds = dict(matmul=1.0, memory=0.0, network=0.0, cycles=0.0)
    reports = {name: {'seconds': seconds, 'times': 1, 'total': 0} for name in ('step', 'publish', 'sampler')}
    line = aot.describe_run('a config', config, reports, types.SimpleNamespace(name='a slice', usable_bytes=2 ** 30))
    assert line.endswith(said)


def test_the_memory_that_a_gpu_offers_is_jaxs_pool(monkeypatch):
    monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
    assert slices.pool_share() == 0.75
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')
    assert slices.pool_share() == 0.95


def test_no_logits_of_the_encoder_cross_devices():
    """Prototype and SEM logits are the largest arrays of its step; each stays where it was computed."""
    config = base.encoder()
    config.batch_size, config.num_steps = 32, 10
    config.model.update(dict(size='S', width=32, depth=1, num_heads=2, num_codes=64, vocab_size=64))
    config.head.update(dict(hidden=32, bottleneck=8, prototypes=8192))
    config.data.update(dict(global_size=28, local_size=14, num_local=2))
    mesh = mesh_lib.make_mesh({'fsdp': 8})
    experiment = build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    shardings = partition.state_shardings(state, experiment.rules, mesh)
    step = jax.jit(experiment.step, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)))
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        found = hlo.costs(step.lower(state, dict(experiment.batch)).compile(
            compiler_options={'xla_backend_optimization_level': 0}).as_text()).collectives
    matrix = 8 * 8192 * 4  # of the prototypes: gathered, and its gradient summed
    assert found and max(entry.largest_bytes for entry in found.values()) <= matrix, found
