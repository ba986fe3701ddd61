"""Mapped safetensors files against the format's own library."""
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax import convert
from rlhf_jax.convert import settings
from rlhf_jax.weights import files
from tiny_models import MODELS as TINY

TENSORS = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b.c': np.asarray([1.5, -2.0], jnp.bfloat16),
           'ids': np.array([[7]]), 'empty': np.zeros((0, 4), np.float16)}


def check(state_dict):
    assert set(state_dict) == set(TENSORS) and len(state_dict) == 4
    for name, want in TENSORS.items():
        got = state_dict[name]
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_one_file(tmp_path):
    save_file(TENSORS, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    check(files.load_state_dict(tmp_path / 'model.safetensors'))
    check(files.load_state_dict(tmp_path))
    assert isinstance(files.load_state_dict(tmp_path)['a'], np.memmap)  # mapped, not read
    with pytest.raises(KeyError):
        files.load_state_dict(tmp_path)['d']


def test_shards(tmp_path):
    names = {'a': '1.safetensors', 'b.c': '2.safetensors', 'ids': '1.safetensors', 'empty': '2.safetensors'}
    for shard in set(names.values()):
        save_file({name: TENSORS[name] for name in names if names[name] == shard}, tmp_path / shard)
    with pytest.raises(ValueError, match=r'holds 2 files \*.safetensors'):
        files.load_state_dict(tmp_path)
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': names}))
    check(files.load_state_dict(tmp_path))
    index.write_text(json.dumps({'weight_map': names | {'d': '1.safetensors'}}))
    with pytest.raises(ValueError, match='tensor d is missing'):
        files.load_state_dict(tmp_path)
    index.write_text(json.dumps({'weight_map': {'a': '../1.safetensors'}}))
    with pytest.raises(ValueError, match='not a plain file name'):
        files.load_state_dict(tmp_path)
    index.write_text('{}')
    with pytest.raises(ValueError, match='not an index'):
        files.load_state_dict(tmp_path)


@pytest.mark.parametrize('damage', [
    lambda data: data[:5], lambda data: data[:40], lambda data: data[:-1], lambda data: b'\xff' * 8 + data[8:],
    lambda data: data[:9] + b'!' + data[10:], lambda data: data.replace(b'[2,3]', b'[9,9]'),
    lambda data: data.replace(b'F32', b'F99'),
])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / 'model.safetensors'
    save_file(TENSORS, path)
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(OSError, match='model.safetensors: (truncated|not a safetensors)'):
        files.load_state_dict(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.load_state_dict(tmp_path / 'x.safetensors')
    with pytest.raises(FileNotFoundError, match='no .safetensors, .bin, .pth or .pt file'):
        files.load_state_dict(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='not JSON'):
        files.read_config(tmp_path)


def test_saved_files_open_again(tmp_path):
    files.save(tmp_path / 'new', TENSORS, {'model_type': 'llama'})
    check(files.load_state_dict(tmp_path / 'new'))
    assert files.read_config(tmp_path / 'new') == {'model_type': 'llama'}


@pytest.mark.parametrize('weights, beside', [
    ('pytorch_model.bin', ('adapter_model.safetensors', 'training_args.bin', 'optimizer.pt', 'scheduler.pt',
                           'rng_state_0.pth')),
    ('model.safetensors', ('adapter_model.safetensors', 'consolidated.safetensors', 'pytorch_model.bin')),
    ('model.safetensors', ('pytorch_model.bin.index.json', 'pytorch_model-00001-of-00002.bin')),
    ('model.safetensors.index.json', ('consolidated.safetensors', 'training_args.bin')),
])
def test_a_folder_as_trainers_leave_it(tmp_path, weights, beside):
    for name in beside:
        (tmp_path / name).write_bytes(b'not read')
    if weights.endswith('.bin'):
        torch = pytest.importorskip('torch')
        torch.save({'a': torch.from_numpy(TENSORS['a'])}, tmp_path / weights)
    else:
        shard = weights.replace('.index.json', '')
        save_file({'a': TENSORS['a']}, tmp_path / shard)
        if shard != weights:
            (tmp_path / weights).write_text(json.dumps({'weight_map': {'a': shard}}))
    np.testing.assert_array_equal(files.load_state_dict(tmp_path)['a'], TENSORS['a'])


def test_an_adapter_alone_is_read(tmp_path):
    save_file(TENSORS, tmp_path / 'adapter_model.safetensors')
    check(files.load_state_dict(tmp_path))


RELATIVES = dict(mistral=dict(window=8), qwen2=dict(qkv_bias=True, window=8), qwen3=dict(qk_norm=True))
MODULES = TINY | {kind: TINY['llama'].clone(**fields) for kind, fields in RELATIVES.items()}


@pytest.mark.parametrize('kind', convert.KINDS)
def test_settings_of_a_config(kind):
    module = convert.module_of(kind, convert.config_of(kind, MODULES[kind]))
    assert convert.config_of(kind, module) == convert.config_of(kind, MODULES[kind])
    config = convert.config_of(kind, MODULES[kind])
    # What transformers leaves out, or writes as null, is its default.
    eps = next(key for key in config if 'norm' in key and 'eps' in key)
    assert convert.module_of(kind, config | {eps: None}) == convert.module_of(
        kind, {key: x for key, x in config.items() if key != eps})
    assert convert.module_of(kind, config | {eps: None}).eps in (1e-5, 1e-6)
    with pytest.raises(ValueError, match='config has no vocab_size'):
        convert.module_of(kind, {key: x for key, x in config.items() if key != 'vocab_size'})
    name = 'activation_function' if kind == 'gpt2' else 'hidden_act'
    with pytest.raises(ValueError, match=f"config has {name}='swish', not one of"):
        convert.module_of(kind, config | {name: 'swish'})


@pytest.mark.parametrize('kind', RELATIVES)
def test_a_module_of_another_family_is_not_exported(kind):
    for other in {'llama', *RELATIVES} - {kind}:
        with pytest.raises(ValueError, match=f'transformers has no {other} with'):
            convert.config_of(other, MODULES[kind].clone(qkv_bias=other == 'qwen2' or MODULES[kind].qkv_bias,
                                                         qk_norm=other == 'qwen3' or MODULES[kind].qk_norm,
                                                         mlp_bias=other in ('mistral', 'qwen2', 'qwen3')))
    lacking = MODULES[kind].clone(qkv_bias=False, qk_norm=False)
    if kind == 'mistral':
        assert convert.config_of(kind, lacking)['sliding_window'] == 8
    else:
        with pytest.raises(ValueError, match=f'transformers has no {kind} without'):
            convert.config_of(kind, lacking)


@pytest.mark.parametrize('kind', convert.KINDS)
def test_odd_values_in_a_config_are_one_line_or_harmless(kind):
    config = convert.config_of(kind, MODULES[kind])
    for key in config:
        for value in ('x', [], {}, {'a': 1}, -1, 0, 2.5, 10 ** 30, True, None, 'a\n' * 99, float('nan'), [1], 10 ** 9):
            try:
                module = convert.module_of(kind, config | {key: value})
            except ValueError as error:
                assert str(error).isprintable() and len(str(error)) < 300, (key, value)
            else:
                assert module.vocab_size == 19 or key == 'vocab_size'


@pytest.mark.parametrize('value, ids', [(2, (2,)), ([128001, 128009], (128001, 128009)), (None, ()), ([], ())])
def test_special_tokens_of_a_config(value, ids):
    assert settings.token_ids({'eos_token_id': value}, 'eos') == ids
    assert settings.token_ids({}, 'eos') == ()
    for wrong in ('2', [None], -1, True, {'a': 1}):
        with pytest.raises(ValueError, match='eos_token_id='):
            settings.token_ids({'eos_token_id': wrong}, 'eos')


def test_special_tokens_of_the_released_gpt2(shared_data):
    config = files.read_config(shared_data / 'weights' / 'gpt2_release_files')
    assert settings.token_ids(config, 'eos') == settings.token_ids(config, 'bos') == (50256,)
    module = convert.module_of('gpt2', config)
    assert (module.width, module.tied, module.activation) == (768, True, 'gelu_tanh')
