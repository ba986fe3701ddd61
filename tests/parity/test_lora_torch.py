"""Adapters under PEFT's names, against the `transformers` model with `W + alpha / r B A` in place of W."""
import jax
import numpy as np
import pytest

from hf_twins import KINDS, state_dict, torch, twin
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.convert.rules import flatten

TOKENS = np.random.default_rng(0).integers(0, 66, (2, 6))
TARGETS = {'gpt2': 'c_attn', 'pythia': 'query_key_value', 'llama3': 'q_proj v_proj o_proj'}
CONFIG = dict(r=3, lora_alpha=12, bias='none', target_modules=None)


def adapter_of(model, targets):
    """Random A and B for the matching weights, and the model with them added."""
    rng = np.random.default_rng(1)
    adapter = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.removesuffix('.weight').rpartition('.')[2] in targets.split() and name.endswith('.weight'):
                conv1d = name.endswith('c_attn.weight')  # stored (in, out)
                outputs, inputs = weight.shape[::-1] if conv1d else weight.shape
                a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((3, inputs), (outputs, 3)))
                stem = 'base_model.model.' + name.removesuffix('.weight')
                adapter |= {f'{stem}.lora_A.weight': a, f'{stem}.lora_B.weight': b}
                update = torch.tensor(4.0 * b @ a)
                weight += update.T if conv1d else update
    return adapter


@pytest.mark.parametrize('name', TARGETS)
def test_adapter(name):
    original = twin(name)
    module, base = convert.from_torch(KINDS[name], state_dict(original), config=original.config.to_dict())
    adapter = adapter_of(original, TARGETS[name])
    params = peft.from_torch(KINDS[name], adapter, module, base, config=CONFIG)
    with torch.no_grad():
        want = original(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, TOKENS), want, rtol=1e-4, atol=2e-4)
    back, config = peft.to_torch(KINDS[name], module, params)
    assert set(back) == set(adapter) and all(np.array_equal(back[key], adapter[key]) for key in adapter)
    assert config['target_modules'] == sorted(TARGETS[name].split())
    assert (config['r'], config['lora_alpha'], config['fan_in_fan_out']) == (3, 12, name == 'gpt2')
    named = {key.replace('.weight', '.default.weight'): x for key, x in adapter.items()}  # as in memory
    again = peft.from_torch(KINDS[name], named, module, base, config=CONFIG)
    assert all(np.array_equal(x, flatten(params)[path]) for path, x in flatten(again).items())
    assert 'lora_a' not in str(jax.tree.structure(base))  # the base was left alone


def test_reward_model_with_its_head():
    original = twin('llama', 'ForSequenceClassification', num_labels=1, pad_token_id=66)
    module, base = convert.from_torch('llama', state_dict(original), config=original.config.to_dict())
    adapter = adapter_of(original, 'q_proj v_proj')
    score = np.random.default_rng(2).normal(size=(1, 32)).astype(np.float32)
    adapter |= {'base_model.model.score.weight': score}
    params = peft.from_torch('llama', adapter, module, base, config=CONFIG)
    np.testing.assert_array_equal(params['score_head']['kernel'], score.T)
    back, config = peft.to_torch('llama', module, params)
    assert set(back) == set(adapter) and all(np.array_equal(back[key], adapter[key]) for key in adapter)
    assert config['task_type'] == 'SEQ_CLS' and config['modules_to_save'] == ['score']


@pytest.mark.parametrize('fault, config, message', [
    (lambda a: a.pop('base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight'), {}, 'missing tensor'),
    (lambda a: a.update({'base_model.model.model.layers.0.self_attn.x.lora_A.weight': np.ones((3, 32))}), {}, 'attn.x'),
    (lambda a: None, {'r': 4}, 'lora_A.weight has shape'),
    (lambda a: None, {'use_dora': True}, 'use_dora=True'),
    (lambda a: a.clear(), {}, 'no adapter'),
])
def test_what_does_not_fit_is_named(fault, config, message):
    original = twin('llama')
    module, base = convert.from_torch('llama', state_dict(original), config=original.config.to_dict())
    adapter = adapter_of(original, 'q_proj v_proj')
    fault(adapter)
    with pytest.raises(ValueError, match=message):
        peft.from_torch('llama', adapter, module, base, config=CONFIG | config)
