"""Models whose fields come from the folder of their weights, and adapters of PEFT on them."""
import json

import jax
import numpy as np
import pytest

from configs.rlhf import base
from experiments import train
from experiments.rlhf.models import architecture, loading
from experiments.runtime import config_files
from experiments.runtime import mesh as mesh_lib
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.models import lora
from rlhf_jax.models.layers import RopeScaling
from rlhf_jax.weights import files
from rlhf_jax.weights.rules import flatten
from tiny_models import MODELS as TINY
from tiny_models import random_params

MODULES = {
    'gpt2': TINY['gpt2'], 'gpt_neox': TINY['gpt_neox'].clone(rope_scaling=RopeScaling('linear', 2.0), eps=1e-3),
    'llama': TINY['llama'].clone(rope_base=500.0, tied=True, head_dim=6, attention_bias=True, activation='gelu'),
    'mistral': TINY['llama'].clone(window=5, rope_scaling=None), 'qwen2': TINY['llama'].clone(qkv_bias=True, eps=1e-4),
    'qwen3': TINY['llama'].clone(qk_norm=True, head_dim=10),
}


def folder_of(root, kind):
    module = MODULES[kind]
    params = random_params(module)
    files.save(root / kind, convert.tensors(kind, module, params, tied=False), convert.config_of(kind, module))
    return root / kind, params


def config_of(kind, weights, *overrides):
    config = base.sft()
    config.model.update(dict(kind=kind, size='weights'))
    config.weights, config.num_steps, config.batch_size, config.max_length = str(weights), 1, 2, 16
    config.mesh.update(dict(data=1, fsdp=1))
    for override in overrides:
        name, value = override.split('=')
        config.model[name] = type(config.model[name])(value)
    return config


def same_model(module, kind):
    """`module` has the fields of MODULES[kind], written out or implied."""
    architecture.check_same('a', module, MODULES[kind])
    architecture.check_same('a', MODULES[kind], module)


@pytest.mark.parametrize('kind', MODULES)
def test_fields_of_a_folder(tmp_path, kind):
    weights, params = folder_of(tmp_path, kind)
    config = config_of(kind, weights)
    with pytest.raises(ValueError, match="model.size='weights': weights is empty"):
        architecture.decoder(config.model)
    train.build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    same_model(architecture.decoder(config.model), kind)
    got = loading.load_decoder(weights, config)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    # The config of the run says it without the folder.
    config_files.save(config, tmp_path / 'run')
    saved = config_files.read(tmp_path / 'run')
    assert architecture.decoder(saved.model) == architecture.decoder(config.model)
    # A later stage reads it from the run.
    later = config_of(kind, tmp_path / 'run')
    loading.complete(later)
    same_model(architecture.decoder(later.model), kind)


def test_fields_from_the_command_line(tmp_path):
    file = tmp_path / 'config.py'
    file.write_text('from configs.rlhf import base\nget_config = base.sft\n')
    given = ['kind=llama', 'size=7B', 'rope_base=500', 'tied=yes', 'eps=1e-3', 'head_dim=6', 'qkv_bias=yes',
             'window=4', 'rope_scaling.kind=linear', 'rope_scaling.factor=2']
    config = config_files.load(str(file), [f'--config.model.{x}' for x in given])
    module = architecture.decoder(config.model)
    assert (module.rope_base, module.tied, module.eps, module.head_dim, module.window) == (500.0, True, 1e-3, 6, 4)
    assert module.qkv_bias and module.rope_scaling == RopeScaling('linear', 2.0)
    config = config_files.load(str(file), ['--config.model.kind=mistral', '--config.model.size=7B-v0.1'])
    assert architecture.decoder(config.model).window == 4096
    config.model.window = -1
    assert architecture.decoder(config.model).window == 0
    tied = base.model('llama', '3.2-1B')  # a size whose head is tied
    assert architecture.decoder(tied).tied is True
    for off in ('no', False):
        assert architecture.decoder(tied | {'tied': off}).tied is False
    config.model.tied = 'maybe'
    with pytest.raises(ValueError, match="model.tied='maybe' is not one of"):
        architecture.decoder(config.model)
    config.model.update(base.model('llama', '7B'))
    assert architecture.decoder(config.model) == architecture.decoder(base.model('llama', '7B'))
    config.model.update(dict(kind='gpt2', size='124M', vocab_size=10, window=0, rope_base=1e4))
    with pytest.raises(ValueError, match='model.rope_base is not a field'):
        architecture.decoder(config.model)


def test_what_does_not_belong_together_is_named(tmp_path):
    weights, _ = folder_of(tmp_path, 'qwen2')
    with pytest.raises(ValueError, match="model.kind='llama', but weights=.* are of a 'qwen2'"):
        loading.complete(config_of('llama', weights))
    config = config_of('qwen2', weights, 'eps=0.5')
    loading.complete(config)
    with pytest.raises(ValueError, match='model.eps=0.5, but weights=.*qwen2 have 0.0001'):
        loading.load_decoder(weights, config)
    settings = json.loads((weights / 'config.json').read_text())
    for changed, message in (({'model_type': 'qwen2_moe'}, "config.json: model_type='qwen2_moe' is not one of"),
                             ({'model_type': None}, 'config.json: model_type=None is not one of'),
                             ({'hidden_size': 'x'}, "config.json: config has hidden_size='x', not a positive integer")):
        (weights / 'config.json').write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError, match=message):
            loading.complete(config_of('qwen2', weights))
    with pytest.raises(FileNotFoundError, match='weights=.*nothing: no config.json there'):
        loading.complete(config_of('qwen2', tmp_path / 'nothing'))


def test_a_trained_llama_from_its_folder(shared_data):
    """Real weights: the logits that transformers computes."""
    weights = shared_data / 'weights' / 'stories260k_llama'
    config = config_of('llama', weights)
    loading.complete(config)
    module, params = architecture.decoder(config.model), loading.load_decoder(weights, config)
    with np.load(weights / 'golden.npz') as golden:
        got = jax.jit(module.apply)({'params': params}, golden['ids'][None])[0]
        np.testing.assert_allclose(got, golden['logits'], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
    """Folder of a model, folder of an adapter on it, and the parameters with the adapter merged."""
    root = tmp_path_factory.mktemp('adapted')
    weights, params = folder_of(root, 'qwen2')
    targets = (r'.*/attn/[qv]', r'.*/mlp/up')
    with_lora = lora.init(jax.random.key(0), MODULES['qwen2'], params, rank=2, alpha=3.0, targets=targets)
    with_lora = jax.tree.map(lambda x: x + 0.1 * (x == 0) if x.ndim > 1 else x, with_lora)  # B starts at zero
    tensors, settings = peft.to_torch('qwen2', MODULES['qwen2'], with_lora)
    files.save_state_dict(root / 'adapter' / 'adapter_model.safetensors', tensors)
    (root / 'adapter' / 'adapter_config.json').write_text(json.dumps(settings))
    merged = lora.merge(with_lora)
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params)))
    return weights, root / 'adapter', merged


def test_an_adapter_of_peft_is_merged(adapted):
    weights, adapter, merged = adapted
    config = config_of('qwen2', weights)
    config.adapter = str(adapter)
    loading.complete(config)
    got = loading.load_decoder(weights, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, merged)
    _, got, _ = loading.load_policy(weights, adapter=str(adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, merged)


@pytest.mark.parametrize('changed, message', [
    ({'peft_type': 'IA3'}, "has peft_type='IA3', but only 'LORA'"), ({'use_dora': True}, 'use_dora=True'),
    ({'init_lora_weights': 'pissa_niter_4'}, 'init_lora_weights=.* changes the base model'),
    ({'init_lora_weights': 'lora_ga'}, 'init_lora_weights=.* changes the base model'),
    ({'alora_invocation_tokens': [1, 2]}, r'has alora_invocation_tokens=\[1, 2\], but only None'),
    ({'r': 'x'}, "r='x', not a positive integer"), ({'lora_alpha': None}, 'lora_alpha=None, not a positive number'),
    ({'r': 3}, r'has shape \(2, 16\), expected \(3, 16\)'),
])
def test_adapters_that_do_not_fit_are_named(adapted, tmp_path, changed, message):
    weights, adapter, _ = adapted
    settings = json.loads((adapter / 'adapter_config.json').read_text())
    (tmp_path / 'adapter_config.json').write_text(json.dumps(settings | changed))
    (tmp_path / 'adapter_model.safetensors').write_bytes((adapter / 'adapter_model.safetensors').read_bytes())
    with pytest.raises(ValueError, match=f'adapter={tmp_path}: .*{message}'):
        loading.load_policy(weights, adapter=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f'adapter={weights}: no adapter_config.json there'):
        loading.load_policy(weights, adapter=str(weights))


def test_tied_heads_are_written_once(tmp_path):
    weights, params = folder_of(tmp_path, 'llama')
    assert 'lm_head' not in flatten(params) and 'lm_head.weight' not in files.load_state_dict(weights)
    assert 'lm_head.weight' in convert.to_torch('llama', MODULES['llama'], params)
