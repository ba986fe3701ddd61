import json
import pickle
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax import convert
from dlc_jax.models import sem, vit
from dlc_jax.ssl import dino
from random_params import random_params
from rlhf_jax.weights import files, rules

TINY = dict(width=16, depth=3, num_heads=2, patch_size=4, num_registers=2, pos_grid=2)
IMAGES = jnp.zeros((1, 8, 8, 3))


def state_of(kind, module, *args):
    params = random_params(module, *args)
    return params, convert.to_torch(kind, module, params)


@pytest.mark.parametrize('fields', [
    dict(), dict(ffn='swiglu'), dict(num_registers=0, pos_antialias=False), dict(layer_scale=0.0, mlp_ratio=2.0)])
def test_dinov2_round_trip_is_exact(fields):
    module = vit.VisionTransformer(**TINY | fields)
    params, state = state_of('dinov2', module, IMAGES)
    assert state['blocks.2.attn.qkv.weight'].shape == (48, 16)
    assert state['patch_embed.proj.weight'].shape == (16, 3, 4, 4)
    again, converted = convert.from_torch('dinov2', state, num_heads=2, layer_scale=module.layer_scale)
    assert again == module
    chex.assert_trees_all_equal(converted, params)
    chex.assert_trees_all_equal(convert.to_torch('dinov2', again, converted), state)


@pytest.mark.parametrize('form', sem.FORMS)
def test_sem_round_trip_is_exact(form):
    module = sem.SEMEncoder(**TINY, num_codes=4, vocab_size=6, form=form)
    params, state = state_of('sem', module, IMAGES)
    assert state['sem_embed.weight'].shape == (24, 48)
    assert state['sem_out.weight'].shape == ((16, 24) if form == 'plain' else (16, 6))
    np.testing.assert_array_equal(state['sem_cls_norm.weight'], 1)  # for the original's strict loader
    again, converted = convert.from_torch('sem', state, num_heads=2, num_codes=4)
    assert again == module
    chex.assert_trees_all_equal(converted, params)
    chex.assert_trees_all_equal(convert.to_torch('sem', again, converted), state)


def test_dino_head_round_trip_is_exact():
    module = dino.DINOHead(hidden=6, bottleneck=5, prototypes=7)
    params, state = state_of('dino_head', module, jnp.zeros((1, 4)))
    assert state['last_layer.weight_g'].shape == (7, 1) and state['mlp.4.weight'].shape == (5, 6)
    checkpoint = {'module.dino_head.' + name: x for name, x in state.items()}
    checkpoint['module.backbone.norm.weight'] = np.ones(4)
    again, converted = convert.from_torch('dino_head', checkpoint)
    assert again == module
    chex.assert_trees_all_equal(converted, params)


def test_names_of_training_checkpoints():
    module = sem.SEMEncoder(**TINY, num_codes=4, vocab_size=6)
    params, state = state_of('sem', module, IMAGES)
    chunked = {'_orig_mod.module.backbone.' + name.replace('blocks.', 'blocks.1.'): x for name, x in state.items()}
    chunked['dino_head.mlp.0.weight'] = np.zeros((2, 2))
    del chunked['_orig_mod.module.backbone.sem_cls_norm.weight']
    chex.assert_trees_all_equal(convert.from_torch('sem', chunked, num_heads=2, vocab_size=6)[1], params)


@pytest.mark.parametrize('heads', [('dino_head',), ('dino_head', 'ibot_head')])
def test_the_teacher_of_a_dinov2_training_checkpoint(heads):
    """As facebookresearch/dinov2 saves it: a backbone in chunks of blocks, and one head or two beside it."""
    module = vit.VisionTransformer(**TINY)
    params, state = state_of('dinov2', module, IMAGES)
    head = dino.DINOHead(hidden=6, bottleneck=5, prototypes=7)
    head_params, head_state = state_of('dino_head', head, jnp.zeros((1, 16)))
    teacher = {'backbone.' + name.replace('blocks.', 'blocks.0.'): x for name, x in state.items()}
    teacher |= {f'{prefix}.{name}': x for prefix in heads for name, x in head_state.items()}
    again, converted = convert.from_torch('dinov2', teacher, num_heads=2)
    assert again == module
    chex.assert_trees_all_equal(converted, params)
    for prefix in heads:
        chex.assert_trees_all_equal(convert.from_torch('dino_head', teacher, prefix=f'{prefix}.')[1], head_params)
    with pytest.raises(ValueError, match='unknown tensor backbone.linear_head.weight'):
        convert.from_torch('dinov2', teacher | {'backbone.linear_head.weight': np.ones((2, 16))}, num_heads=2)


@pytest.mark.parametrize('prefix', ['module._orig_mod.', '_orig_mod.module.', 'module.module.', '_orig_mod._orig_mod.'])
def test_wrappers_in_any_order(prefix):
    module = vit.VisionTransformer(**TINY)
    params, state = state_of('dinov2', module, IMAGES)
    prefixed = {prefix + name: x for name, x in state.items()}
    chex.assert_trees_all_equal(convert.from_torch('dinov2', prefixed, num_heads=2)[1], params)
    # Blocks that were compiled, or checkpointed, one by one.
    block = 'blocks.1._orig_mod._checkpoint_wrapped_module.'
    inside = {name.replace('blocks.1.', block): x for name, x in state.items()}
    assert set(inside) != set(state)
    prefixed = {prefix + name: x for name, x in inside.items()}
    chex.assert_trees_all_equal(convert.from_torch('dinov2', prefixed, num_heads=2)[1], params)


@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
def test_hugging_face_names(ffn):
    module = vit.VisionTransformer(**TINY, ffn=ffn)
    params, state = state_of('dinov2', module, IMAGES)
    names = {
        'cls_token': 'embeddings.cls_token', 'pos_embed': 'embeddings.position_embeddings',
        'mask_token': 'embeddings.mask_token', 'register_tokens': 'embeddings.register_tokens',
        'norm.weight': 'layernorm.weight', 'norm.bias': 'layernorm.bias',
        'patch_embed.proj.weight': 'embeddings.patch_embeddings.projection.weight',
        'patch_embed.proj.bias': 'embeddings.patch_embeddings.projection.bias'}
    theirs = {}
    for name, tensor in state.items():
        if 'attn.qkv' in name:
            _, i, _, _, kind = name.split('.')
            for part, rows in zip(('query', 'key', 'value'), np.split(tensor, 3)):
                theirs[f'dinov2.encoder.layer.{i}.attention.attention.{part}.{kind}'] = rows
            continue
        new = names.get(name) or name.replace('blocks.', 'encoder.layer.')
        for old, to in (('attn.proj', 'attention.output.dense'), ('ls1.gamma', 'layer_scale1.lambda1'),
                        ('ls2.gamma', 'layer_scale2.lambda1'), ('mlp.w12', 'mlp.weights_in'),
                        ('mlp.w3', 'mlp.weights_out')):
            new = new.replace(old, to)
        theirs['dinov2.' + new] = tensor
    again, converted = convert.from_torch('dinov2', theirs, num_heads=2)
    assert again == module
    chex.assert_trees_all_equal(converted, params)
    del theirs['dinov2.encoder.layer.1.attention.attention.key.bias']
    with pytest.raises(ValueError, match='missing tensor encoder.layer.1.attention.attention.key.bias'):
        convert.from_torch('dinov2', theirs, num_heads=2)


def broken(change):
    _, state = state_of('dinov2', vit.VisionTransformer(**TINY), IMAGES)
    change(state)
    return state


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('blocks.1.mlp.fc1.bias'), r'missing tensor blocks.1.mlp.fc1.bias \(64,\)'),
    (lambda s: s.pop('pos_embed'), 'missing tensor pos_embed'),
    (lambda s: s.pop('patch_embed.proj.weight'), 'missing tensor patch_embed.proj.weight'),
    (lambda s: [s.pop(n) for n in list(s) if n.startswith('blocks')], 'missing tensor blocks.0.norm1.weight'),
    (lambda s: s.update(extra=np.zeros(3)), 'unknown tensor extra'),
    (lambda s: s.update({'blocks.3.norm1.weight': np.ones(16)}), 'missing tensor blocks.3.norm1.bias'),
    (lambda s: s.update({'blocks.0.attn.proj.bias': np.ones(15)}),
     r'blocks.0.attn.proj.bias has shape \(15,\), expected \(16,\)'),
    (lambda s: s.update({'blocks.0.mlp.fc2.weight': s['blocks.0.mlp.fc2.weight'].T}),
     r'fc2.weight has shape \(64, 16\), expected \(16, 64\)'),
    (lambda s: s.update({'norm.bias': np.full(16, np.nan)}), 'norm.bias holds values that are not finite'),
    (lambda s: s.update({'norm.bias': np.full(16, np.inf, np.float16)}), 'norm.bias holds values that are not finite'),
    (lambda s: s.update(pos_embed=np.zeros((1, 7, 16))), 'pos_embed has 6 positions, which are not a square'),
    (lambda s: s.update({'module.norm.bias': s['norm.bias']}),
     'module.norm.bias and norm.bias are both norm.bias of the model'),
])
def test_a_tensor_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        convert.from_torch('dinov2', broken(change), num_heads=2)


def test_codes_and_vocabulary_must_fit():
    _, state = state_of('sem', sem.SEMEncoder(**TINY, num_codes=4, vocab_size=6), IMAGES)
    for fields, message in ((dict(), 'give num_codes or vocab_size'),
                            (dict(num_codes=5), 'num_codes=5 x vocab_size=4 is not the 24'),
                            (dict(num_codes=4, vocab_size=5), 'num_codes=4 x vocab_size=5')):
        with pytest.raises(ValueError, match=message):
            convert.from_torch('sem', state, num_heads=2, **fields)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind='vit' is not one of"):
        convert.from_torch('vit', {})


def test_rules_must_cover_the_model():
    expected = {'a': jax.ShapeDtypeStruct((2,), jnp.float32), 'b': jax.ShapeDtypeStruct((2,), jnp.float32)}
    one = (rules.Rule('x', 'a'),)
    with pytest.raises(ValueError, match='no rule makes parameter b'):
        rules.to_flax({'x': np.ones(2)}, one, expected)
    with pytest.raises(ValueError, match='no rule writes parameter b'):
        rules.to_torch({'a': np.ones(2), 'b': np.ones(2)}, one)


def test_fixed_tensors():
    table = np.arange(3, dtype=np.float32)
    entries = (rules.Rule('x', 'a'), rules.Fixed('table', table, exact=True), rules.Fixed('blocks.{i}.buffer'))
    expected = {'a': jax.ShapeDtypeStruct((), jnp.float32)}
    state = {'x': np.float32(2), 'table': table, 'blocks.0.buffer': np.zeros(9), 'blocks.11.buffer': np.zeros(1)}
    params = rules.to_flax(state, entries, expected)
    assert params == {'a': 2.0} and set(rules.to_torch(params, entries)) == {'x', 'table'}
    assert rules.to_flax({'x': np.float32(2)}, entries, expected) == params  # may be absent
    for bad, message in ((table + 1, 'table differs'), (np.zeros(2), r'table has shape \(2,\)')):
        with pytest.raises(ValueError, match=message):
            rules.to_flax(state | {'table': bad}, entries, expected)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_constants_of_a_file_in_half_precision(dtype):
    table = np.sin(np.arange(64, dtype=np.float32))
    entries = (rules.Rule('x', 'a'), rules.Fixed('table', table, exact=True))
    expected = {'a': jax.ShapeDtypeStruct((), jnp.float32)}
    state = {'x': dtype(2), 'table': table.astype(dtype)}
    assert np.abs(state['table'].astype(np.float32) - table).max() > 2e-4
    assert rules.to_flax(state, entries, expected) == {'a': 2.0}
    for bad in (state['table'].astype(np.float32), table.astype(dtype) + dtype(0.03)):
        with pytest.raises(ValueError, match='table differs'):
            rules.to_flax(state | {'table': bad}, entries, expected)


def test_nothing_is_read_where_shapes_do_not_fit():
    class Unread(dict):
        specs = {'x': np.ones(2), 'y': np.ones(3)}

        def __getitem__(self, name):
            raise AssertionError(f'{name} is read')

    expected = {'a': jax.ShapeDtypeStruct((2,), jnp.float32), 'b': jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError, match=r'y has shape \(3,\), expected \(2,\)'):
        rules.to_flax(Unread(x=0, y=0), (rules.Rule('x', 'a'), rules.Rule('y', 'b')), expected)


# Files

STATE = {'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.array([1.5], np.float16)}


def test_safetensors_whole_and_sharded(tmp_path):
    whole = tmp_path / 'model.safetensors'
    files.save_state_dict(whole, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors']
    chex.assert_trees_all_equal(dict(files.load_state_dict(whole)), STATE)
    chex.assert_trees_all_equal(dict(files.load_state_dict(tmp_path)), STATE)
    shards = tmp_path / 'shards'
    shards.mkdir()
    for i, name in enumerate(STATE):
        files.save_state_dict(shards / f'{i}.safetensors', {name: STATE[name]})
    index = shards / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {name: f'{i}.safetensors' for i, name in enumerate(STATE)}}))
    chex.assert_trees_all_equal(dict(files.load_state_dict(shards)), STATE)
    index.write_text(json.dumps({'weight_map': {'c': '0.safetensors'}}))
    with pytest.raises(ValueError, match='tensor c is missing'):
        files.load_state_dict(shards)
    index.write_text(json.dumps({'weight_map': {'a': '../model.safetensors'}}))
    with pytest.raises(ValueError, match='not a plain file name'):
        files.load_state_dict(shards)
    (tmp_path / 'other.safetensors').write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match='holds 2 files'):
        files.load_state_dict(tmp_path)
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(OSError, match='truncated'):
        files.load_state_dict(whole)
    with pytest.raises(FileNotFoundError, match='no such file'):
        files.load_state_dict(tmp_path / 'nothing.pth')
    with pytest.raises(ValueError, match='change the name'):
        files.save_state_dict(tmp_path / 'x.pth', STATE)


def write_zip(path, pickled):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickled)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    ran = tmp_path / 'ran'

    class Attack:
        def __reduce__(self):
            return (open, (str(ran), 'w'))

    write_zip(tmp_path / 'evil.pth', pickle.dumps({'a': Attack()}))
    with pytest.raises(ValueError, match='would run .*open'):
        files.load_state_dict(tmp_path / 'evil.pth')
    assert not ran.exists()


def test_files_that_are_no_state_dict(tmp_path):
    (tmp_path / 'old.pth').write_bytes(pickle.dumps(STATE))
    with pytest.raises(ValueError, match='neither safetensors nor a file of torch.save'):
        files.load_state_dict(tmp_path / 'old.pth')
    write_zip(tmp_path / 'list.pth', pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match='not a state dict'):
        files.load_state_dict(tmp_path / 'list.pth')
    write_zip(tmp_path / 'numbers.pth', pickle.dumps({'step': 1}))
    with pytest.raises(ValueError, match='holds 0 state dicts'):
        files.load_state_dict(tmp_path / 'numbers.pth')
    with pytest.raises(ValueError, match="no entry 'ema'"):
        files.load_state_dict(tmp_path / 'numbers.pth', key='ema')
    whole = (tmp_path / 'numbers.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(OSError, match='truncated'):
        files.load_state_dict(tmp_path / 'cut.pth')
