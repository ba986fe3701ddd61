"""Models larger than memory: one tensor at a time on the way in and out, whatever the mesh."""
import json
import tracemalloc
import weakref
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax import convert as images
from dlc_jax.models import dit
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from rlhf_jax import convert
from rlhf_jax.models import llama
from rlhf_jax.weights import files, rules
from rlhf_jax.weights.rules import flatten
from tiny_models import random_params

MODULE = llama.Llama(vocab_size=24, width=32, depth=3, num_heads=4, num_kv_heads=2, hidden=48, max_length=16)
CONFIG = convert.config_of('llama', MODULE)
MESH = mesh_lib.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})


class Counted(Mapping):
    """A state dict that makes a tensor anew when it is asked for, and knows how many of them are still held."""

    def __init__(self, tensors):
        self.tensors, self.alive, self.most, self.reads = tensors, 0, 0, 0
        self.specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}

    def __getitem__(self, name):
        out = np.array(self.tensors[name])
        self.alive, self.reads = self.alive + 1, self.reads + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(out, self.drop)
        return out

    def drop(self):
        self.alive -= 1

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def shardings(shapes):
    return partition.param_shardings(shapes, llama.PARTITION_RULES, MESH)


@pytest.fixture(scope='module')
def tiny():
    params = random_params(MODULE)
    return params, convert.to_torch('llama', MODULE, params)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('place', [None, shardings], ids=['host', 'mesh'])
def test_one_tensor_at_a_time_into_its_shards(tiny, place, dtype):
    params, tensors = tiny
    counted = Counted(tensors)
    module, got = convert.from_torch('llama', counted, config=CONFIG, shardings=place, param_dtype=dtype)
    assert counted.most == 1 and counted.alive == 0 and counted.reads == len(tensors)
    wanted = flatten(shardings(rules.param_shapes(MODULE, np.zeros((1, 1), np.int32))))
    for path, x in flatten(got).items():
        assert x.dtype == dtype and isinstance(x, np.ndarray if place is None else jax.Array)
        np.testing.assert_array_equal(x, flatten(params)[path].astype(dtype), err_msg=path)
        if place:
            assert x.sharding == wanted[path]
            assert x.addressable_shards[0].data.shape == wanted[path].shard_shape(x.shape)
    assert {str(s.spec) for s in wanted.values()} != {'PartitionSpec()'}


def test_a_stack_split_between_devices(tiny):
    """Blocks themselves over devices: each of them gets its own."""
    params, tensors = tiny
    table = [rules.Rule('model.layers.{i}.mlp.up_proj.weight', 'up', rules.linear())]
    expected = {'up': jax.ShapeDtypeStruct((3, 32, 48), jnp.float32)}
    mesh = mesh_lib.make_mesh({'data': 3}, jax.devices()[:3])
    part = Counted({name: x for name, x in tensors.items() if 'up_proj' in name})
    got = rules.to_flax(part, table, expected, shardings=lambda shapes: {'up': NamedSharding(mesh, P('data'))})['up']
    assert [shard.data.shape for shard in got.addressable_shards] == [(1, 32, 48)] * 3 and part.most == 1
    np.testing.assert_array_equal(got, params['blocks']['mlp']['up']['kernel'])


def test_a_process_reads_its_own_part(tmp_path, monkeypatch):
    """Of eight with a device each, from a file: at no time is more in memory than its part and the check of a block."""
    rng = np.random.default_rng(0)
    tensors = {f'layers.{i}.weight': rng.normal(size=(256, 256)).astype(np.float32) for i in range(8)}
    files.save_state_dict(tmp_path / 'x.safetensors', tensors)
    sharding, device = NamedSharding(mesh_lib.make_mesh({'data': 8}), P(None, 'data')), jax.devices()[3]
    monkeypatch.setattr(NamedSharding, 'addressable_devices_indices_map',
                        lambda self, shape: {device: self.devices_indices_map(shape)[device]})
    monkeypatch.setattr(jax, 'make_array_from_callback', lambda shape, sharding, part: part(
        sharding.devices_indices_map(shape)[device]))
    state_dict = files.load_state_dict(tmp_path / 'x.safetensors')
    placed = jax.ShapeDtypeStruct((8, 256, 256), jnp.bfloat16, sharding=sharding)
    tracemalloc.start()
    table = [rules.Rule('layers.{i}.weight', 'up', rules.linear())]
    shapes = {'up': jax.ShapeDtypeStruct(placed.shape, jnp.float32)}
    part = rules.to_flax(state_dict, table, shapes, shardings=lambda _: {'up': placed})['up']
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = np.stack(list(tensors.values())).transpose(0, 2, 1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(part, whole[:, 96:128])
    assert part.nbytes < most < 2 * part.nbytes < whole.nbytes / 2


def test_tensors_are_made_when_they_are_asked_for(tiny):
    params, tensors = tiny
    placed = jax.device_put(params, shardings(params))
    lazy = convert.tensors('llama', MODULE, placed, dtype=jnp.bfloat16)
    assert list(lazy) == list(tensors) and len(lazy) == len(tensors)
    assert {name: spec.shape for name, spec in lazy.specs.items()} == convert.tensor_shapes('llama', MODULE)
    for name, want in tensors.items():
        got = lazy[name]
        assert isinstance(got, np.ndarray) and (got.shape, got.dtype) == (lazy.specs[name].shape, jnp.bfloat16)
        assert got.flags.c_contiguous and want.flags.c_contiguous  # writers of files take memory as it lies
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16), err_msg=name)


def test_shards_of_a_file(tiny, tmp_path):
    _, tensors = tiny
    counted = Counted(tensors)
    largest = max(x.nbytes for x in tensors.values())
    files.save(tmp_path / 'deep' / 'new', counted, CONFIG, shard_bytes=3 * largest)
    assert counted.most == 1 and counted.reads == len(tensors)
    folder = tmp_path / 'deep' / 'new'
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
    names = sorted(p.name for p in folder.glob('*.safetensors'))
    assert len(names) > 2 and names[0] == f'model-00001-of-{len(names):05}.safetensors'
    assert set(index['weight_map'].values()) == set(names)
    for name in names:  # the format's own reader finds what the index says, and no shard is too large
        from safetensors.numpy import load_file
        held = load_file(folder / name)
        assert set(held) == {tensor for tensor, file in index['weight_map'].items() if file == name}
        assert sum(x.nbytes for x in held.values()) <= 3 * largest
        for tensor, x in held.items():
            np.testing.assert_array_equal(x, tensors[tensor])
    back = files.load_state_dict(folder)
    assert set(back) == set(tensors)
    _, params = convert.from_torch('llama', back, config=files.read_config(folder))
    chex.assert_trees_all_equal(params, tiny[0])


def test_numbers_of_several_widths_stay_aligned(tmp_path):
    tensors = {'a': np.ones((3, 1), np.int8), 'b': np.arange(4.0), 'c': np.ones(3, jnp.bfloat16), 'd': np.zeros((0, 2)),
               'e': np.float32(2)[None].T, 'f': np.arange(6, dtype=np.float32).reshape(2, 3).T}
    files.save_state_dict(tmp_path / 'x.safetensors', tensors)
    from safetensors.numpy import load_file
    for held in (load_file(tmp_path / 'x.safetensors'), files.load_state_dict(tmp_path / 'x.safetensors')):
        assert set(held) == set(tensors)
        for name, x in tensors.items():
            np.testing.assert_array_equal(held[name], x)
            assert held[name].dtype == x.dtype and held[name].flags.aligned
    with pytest.raises(ValueError, match='x.safetensors: c is complex64'):
        files.save_state_dict(tmp_path / 'x.safetensors', {'c': np.ones(1, np.complex64)})


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file'):
        files.save_state_dict(tmp_path / 'file' / 'x.safetensors', {'a': np.ones(1)})


@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
     r'missing tensor layers.1.mlp.up_proj.weight \(48, 32\), from which blocks/mlp/up/kernel is made \(in {folder}\)'),
    (lambda t: t.update(extra=np.ones(1, np.float32)),
     r'unknown tensor extra .*\(in {folder}/model-0000\d-of-0000\d.safetensors\)'),
    (lambda t: t.update({'model.norm.weight': np.ones(3, np.float32)}),
     r'model.norm.weight has shape \(3,\), expected \(32,\) \(in {folder}/model-0000\d-of-0000\d.safetensors\)'),
    (lambda t: t.update({'model.norm.weight': np.full(32, np.nan, np.float32)}),
     r'model.norm.weight holds values that are not finite \(in {folder}/model-0000\d-of-0000\d.safetensors\)'),
    (lambda t: t.update({'model.norm.weight': np.full(32, 1e300)}),  # float32 cannot hold it
     r'model.norm.weight holds values that are not finite \(in {folder}/model-0000\d-of-0000\d.safetensors\)'),
    (lambda t: t.update({'module.model.norm.weight': np.ones(32, np.float32)}),
     r'are both norm.weight of the model \(in {folder}/model-0000\d-of-0000\d.safetensors\)'),
])
def test_errors_name_the_tensor_and_its_file(tiny, tmp_path, change, message):
    tensors = dict(tiny[1])
    change(tensors)
    files.save(tmp_path, tensors, CONFIG, shard_bytes=20_000)
    assert (tmp_path / 'model.safetensors.index.json').exists()
    with pytest.raises(ValueError, match=message.format(folder=tmp_path)):
        convert.from_torch('llama', files.load_state_dict(tmp_path), config=CONFIG)


def test_what_is_missing_or_too_much_shows_before_anything_is_read(tiny):
    counted = Counted({name: x for name, x in tiny[1].items() if name != 'lm_head.weight'})
    with pytest.raises(ValueError, match='missing tensor lm_head.weight'):
        convert.from_torch('llama', counted, config=CONFIG)
    assert counted.reads == 0


def test_image_models_go_into_their_shards():
    module = dit.DiT(input_size=8, channels=4, patch_size=2, width=32, depth=2, num_heads=4, num_codes=6, vocab_size=7)
    from dlc_jax.convert import dit as file
    shapes = flatten(file.shapes_of(module))
    rng = np.random.default_rng(0)
    params = rules.unflatten({name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()})
    place = lambda shapes: partition.param_shardings(shapes, dit.PARTITION_RULES, MESH)
    state = images.to_torch('dit', module, params)
    again, got = images.from_torch('dit', Counted(state), num_heads=4, shardings=place)
    assert again == module
    for path, x in flatten(got).items():
        np.testing.assert_array_equal(x, flatten(params)[path], err_msg=path)
        assert x.sharding == flatten(place(file.shapes_of(module)))[path]
    lazy = images.tensors('dit', module, got)
    for name, want in state.items():
        np.testing.assert_array_equal(lazy[name], want, err_msg=name)
