"""Adapters against PEFT: the same A and B on the same model. Outputs, gradients, merged weights, its files and ours."""
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from hf_twins import KINDS, state_dict, torch, twin
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.models import lora
from rlhf_jax.weights import files
from rlhf_jax.weights.rules import flatten
from torch_twins import assert_gradients_equal, assert_outputs_and_gradients_equal

original_peft = pytest.importorskip('peft')

RANK, SCALE = 3, 4.0
TOKENS = np.random.default_rng(0).integers(0, 66, (2, 6))
TARGETS = {'gpt2': ['attn.c_proj', 'c_attn'], 'pythia': ['dense', 'dense_4h_to_h', 'query_key_value'],
           'llama3': ['o_proj', 'q_proj', 'up_proj', 'v_proj']}


def adapted(name, targets, cls='ForCausalLM', *, task='CAUSAL_LM', **fields):
    """PEFT's model with random A and B (and score head), and module and parameters without them."""
    base = twin(name, cls, **fields)
    module, params = convert.from_torch(KINDS[name], state_dict(base), config=base.config.to_dict())
    model = original_peft.get_peft_model(base, original_peft.LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=targets, task_type=task, fan_in_fan_out=name == 'gpt2'))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval(), module, params


def read(folder):
    """Tensors and settings of an adapter's folder."""
    return files.load_state_dict(folder), json.loads((folder / 'adapter_config.json').read_text())


def write(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    (folder / 'adapter_config.json').write_text(json.dumps(config))


def in_files(tensors):
    """{name in PEFT's memory: x} -> {name in its files: x}."""
    return {name.replace('.default.', '.'): x for name, x in tensors.items()}


def logits_of(model):
    return model(torch.tensor(TOKENS)).logits


def adapter_names(model):
    return {name for name in model.state_dict() if 'lora_' in name}


@pytest.mark.parametrize('name', TARGETS)
def test_language_model(name, tmp_path):
    model, module, plain = adapted(name, TARGETS[name])
    kind, theirs = KINDS[name], logits_of(model)
    model.save_pretrained(tmp_path / 'theirs')
    tensors, config = read(tmp_path / 'theirs')
    params = peft.from_torch(kind, tensors, module, plain, config=config)
    assert 'lora_a' not in str(jax.tree.structure(plain))  # the base was left alone
    frozen, adapter = lora.split(params)
    export = lambda adapter: peft.to_torch(kind, module, lora.join(frozen, adapter))
    assert_outputs_and_gradients_equal(
        lambda a: (module.apply({'params': lora.join(frozen, a)}, TOKENS),), adapter, lambda a: export(a)[0], model,
        (theirs,), file_names=in_files)

    back, settings = export(adapter)
    assert set(back) == set(tensors) and all(np.array_equal(back[key], tensors[key]) for key in tensors)
    for field in ('r', 'lora_alpha', 'fan_in_fan_out', 'bias', 'task_type', 'peft_type'):
        assert settings[field] == config[field], field
    write(tmp_path / 'ours', back, settings)
    loaded = original_peft.PeftModel.from_pretrained(twin(name), tmp_path / 'ours').eval()
    assert adapter_names(loaded) == adapter_names(model)  # no layer adapted that we did not name
    torch.testing.assert_close(logits_of(loaded), theirs, rtol=0, atol=1e-6)

    in_memory = {key.replace('.weight', '.default.weight'): x for key, x in tensors.items()}
    again = peft.from_torch(kind, in_memory, module, plain, config=config)
    assert all(np.array_equal(x, flatten(params)[path]) for path, x in flatten(again).items())

    merged, want = convert.to_torch(kind, module, lora.merge(params)), state_dict(model.merge_and_unload())
    assert set(merged) == set(want)
    for key in want:
        np.testing.assert_allclose(merged[key], want[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_gradients_are_those_of_the_merged_weights_times_the_other_factor():
    """W' = W + s B A, so dB = s dW' A^T and dA = s B^T dW'."""
    kind = 'gpt2'
    model, module, plain = adapted(kind, TARGETS[kind])
    tensors = {key: x.detach().numpy() for key, x in model.state_dict().items() if 'lora_' in key}
    params = peft.from_torch(kind, tensors, module, plain, config=model.peft_config['default'].to_dict())
    frozen, adapter = lora.split(params)

    def loss(params):
        logp = jax.nn.log_softmax(module.apply({'params': params}, TOKENS))
        return -jax.numpy.take_along_axis(logp, TOKENS[:, ::-1, None], -1).sum()

    of_merged = convert.to_torch(kind, module, jax.jit(jax.grad(loss))(lora.merge(params)))
    got = jax.jit(jax.grad(lambda a: loss(lora.join(frozen, a))))(adapter)
    got, wanted = peft.to_torch(kind, module, lora.join(frozen, got))[0], {}
    for a_name in (key for key in in_files(tensors) if '.lora_A.' in key):
        b_name = a_name.replace('.lora_A.', '.lora_B.')
        a, b = (in_files(tensors)[key] for key in (a_name, b_name))
        dw = of_merged[a_name.removeprefix('base_model.model.').replace('.lora_A.', '.')].T  # stored (in, out)
        wanted |= {a_name: SCALE * b.T @ dw, b_name: SCALE * dw @ a.T}
    assert set(wanted) == set(got)
    assert_gradients_equal(got, wanted)


def test_reward_model_with_its_head(tmp_path):
    reward = dict(cls='ForSequenceClassification', num_labels=1, pad_token_id=66)
    model, module, plain = adapted('llama', ['q_proj', 'v_proj'], task='SEQ_CLS', **reward)
    model.save_pretrained(tmp_path / 'theirs')
    tensors, config = read(tmp_path / 'theirs')
    assert 'base_model.model.score.weight' in tensors
    params = peft.from_torch('llama', tensors, module, plain, config=config)
    np.testing.assert_array_equal(params['score_head']['kernel'], tensors['base_model.model.score.weight'].T)
    rewards = jax.jit(module.apply)({'params': params}, TOKENS)[:, -1]
    theirs = logits_of(model)
    np.testing.assert_allclose(rewards, theirs[:, 0].detach().numpy(), rtol=1e-4, atol=1e-4)
    back, settings = peft.to_torch('llama', module, params)
    assert set(back) == set(tensors) and all(np.array_equal(back[key], tensors[key]) for key in tensors)
    assert settings['task_type'] == 'SEQ_CLS' and settings['modules_to_save'] == ['score']
    write(tmp_path / 'ours', back, settings)
    loaded = original_peft.PeftModel.from_pretrained(twin('llama', **reward), tmp_path / 'ours').eval()
    torch.testing.assert_close(logits_of(loaded), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize('fault, config, message', [
    (lambda a: a.pop('base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight'), {}, 'missing tensor'),
    (lambda a: a.update({'base_model.model.model.layers.0.self_attn.x.lora_A.weight': np.ones((3, 32))}), {}, 'attn.x'),
    (lambda a: None, {'r': 4}, 'lora_A.weight has shape'),
    (lambda a: None, {'use_dora': True}, 'use_dora=True'),
    (lambda a: a.clear(), {}, 'no adapter'),
])
def test_what_does_not_fit_is_named(fault, config, message):
    model, module, plain = adapted('llama', ['q_proj', 'v_proj'])
    adapter = in_files({key: x.numpy() for key, x in model.state_dict().items() if 'lora_' in key})
    fault(adapter)
    with pytest.raises(ValueError, match=message):
        peft.from_torch('llama', adapter, module, plain, config=model.peft_config['default'].to_dict() | config)
