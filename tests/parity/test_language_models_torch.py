"""GPT-2, GPT-NeoX and LLaMA against `transformers`: same weights, same tokens, float32.

Language models, reward models and policies with a value head: outputs, gradients, and the weights both ways.
"""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hf_twins import CONFIGS, KINDS, file_names, state_dict, torch, transformers, twin
from rlhf_jax import convert
from rlhf_jax.models import heads
from rlhf_jax.weights import files
from rlhf_jax.weights.rules import flatten
from torch_twins import assert_gradients_equal, assert_outputs_and_gradients_equal

TOLERANCE = dict(rtol=1e-4, atol=1e-4)
TOKENS = np.random.default_rng(0).integers(0, 67, (3, 9))
LENGTHS = np.array([9, 4, 6])
RIGHT = np.arange(9) < LENGTHS[:, None]  # mask of right-padded rows
LEFT = np.arange(9) >= 9 - LENGTHS[:, None]


@pytest.fixture(scope='module', params=CONFIGS)
def pair(request):
    """(kind, torch model, module, params, jitted apply)."""
    kind = KINDS[request.param]
    original = twin(request.param)
    module, params = convert.from_torch(kind, state_dict(original), config=original.config.to_dict())
    return kind, original, module, params, jax.jit(module.apply)


def original_logits(model, tokens, mask):
    """With positions that count the tokens, as the RL trainers call it."""
    mask = torch.tensor(mask)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask.long(),
                     position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits.numpy()


@pytest.mark.parametrize('mask', [RIGHT, LEFT], ids=['right', 'left'])
def test_logits_of_padded_rows(pair, mask):
    _, original, _, params, apply = pair
    got = apply({'params': params}, TOKENS, mask=mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[mask], original_logits(original, TOKENS, mask)[mask], **TOLERANCE)
    assert np.isfinite(got).all()


def test_weights_round_trip_exactly(pair):
    kind, original, module, params, _ = pair
    want, got = state_dict(original), convert.to_torch(kind, module, params)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_transformers_loads_our_export(pair, tmp_path):
    kind, original, module, params, _ = pair
    files.save(tmp_path, convert.to_torch(kind, module, params), convert.config_of(kind, module))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager').eval()
    np.testing.assert_allclose(original_logits(model, TOKENS, LEFT), original_logits(original, TOKENS, LEFT), atol=1e-6)


def test_we_load_what_transformers_saves(pair, tmp_path):
    kind, original, module, params, _ = pair
    original.save_pretrained(tmp_path, max_shard_size='20KB')  # several shards
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    got_module, got = convert.from_torch(kind, files.load_state_dict(tmp_path), config=files.read_config(tmp_path))
    assert got_module == module
    chex.assert_trees_all_equal(got, params)


def test_gradients_of_the_likelihood(pair):
    kind, original, module, params, _ = pair

    def loss(params):
        logp = jax.nn.log_softmax(module.apply({'params': params}, TOKENS, mask=RIGHT))[:, :-1]
        picked = jnp.take_along_axis(logp, TOKENS[:, 1:, None], -1)[..., 0]
        return -jnp.where(RIGHT[:, 1:], picked, 0).sum()

    got = convert.to_torch(kind, module, jax.jit(jax.grad(loss))(params))
    labels = torch.tensor(np.where(RIGHT, TOKENS, -100))
    original.zero_grad()
    logits = original(torch.tensor(TOKENS), attention_mask=torch.tensor(RIGHT).long()).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction='sum').backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in original.named_parameters()}
    assert_gradients_equal(got, file_names(original, wanted))


@pytest.mark.parametrize('fault, message', [
    (lambda d, name: d.pop(name), 'missing tensor'),
    (lambda d, name: d.update(extra=np.zeros(3, np.float32)), 'unknown tensor extra'),
    (lambda d, name: d.update({name: d[name][:-1]}), 'has shape'),
    (lambda d, name: d.update({name: np.full_like(d[name], np.nan)}), 'not finite'),
])
def test_a_tensor_that_does_not_fit_is_named(pair, fault, message):
    kind, original, *_ = pair
    broken = state_dict(original)
    name = [name for name in broken if '.1.' in name][0]
    fault(broken, name)
    with pytest.raises(ValueError, match=message) as error:
        convert.from_torch(kind, broken, config=original.config.to_dict())
    assert message.startswith('unknown') or name.split('.', 1)[1] in str(error.value)


def test_settings_of_transformers_4_and_5_agree(pair):
    kind, original, module, *_ = pair
    old = convert.config_of(kind, module)  # version 4's keys
    assert 'rope_parameters' not in old
    assert convert.module_of(kind, old) == convert.module_of(kind, original.config.to_dict()) == module


def test_unsupported_settings_are_named():
    rope = {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}
    config = twin('llama').config.to_dict() | {'rope_parameters': rope}
    with pytest.raises(ValueError, match='yarn'):
        convert.from_torch('llama', {}, config=config)
    with pytest.raises(ValueError, match='scale_attn_by_inverse_layer_idx'):
        convert.from_torch('gpt2', {}, config=twin('gpt2').config.to_dict() | {'scale_attn_by_inverse_layer_idx': True})
    with pytest.raises(ValueError, match="kind='bert'"):
        convert.from_torch('bert', {}, config={})


@pytest.mark.parametrize('kind, changed, message', [
    ('qwen2', {'use_sliding_window': True, 'max_window_layers': 1, 'layer_types': None}, 'in some layers only'),
    ('qwen2', {'layer_types': ['full_attention', 'sliding_attention']}, 'in some layers only'),
    ('qwen2', {'layer_types': ['chunked_attention'] * 2}, "layer_types of 'chunked_attention'"),
    ('qwen2', {'rope_parameters': {'rope_type': 'default', 'mrope_section': [2, 1, 1]}}, 'parts of the model'),
    ('qwen3', {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "type 'yarn'"),
    ('qwen3', {'rope_parameters': {'full_attention': {'rope_type': 'default'}}}, 'parts of the model'),
    ('mistral', {'rope_parameters': None, 'rope_scaling': {'type': 'dynamic', 'factor': 4.0}}, "type 'dynamic'"),
    ('mistral', {'rope_scaling': {'type': 'dynamic', 'factor': 4.0}}, 'rope_scaling and rope_parameters of different'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor; this family rotates whole heads'),
    ('llama', {'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config'),
])
def test_what_a_family_does_not_have_is_named(kind, changed, message):
    with pytest.raises(ValueError, match=message):
        convert.module_of(kind, twin(kind).config.to_dict() | changed)


def test_windows_of_configs():
    mistral, qwen = (twin(kind).config.to_dict() for kind in ('mistral', 'qwen2'))
    del qwen['layer_types']
    assert convert.module_of('mistral', mistral | {'sliding_window': None}).window == 0
    del mistral['sliding_window']
    assert convert.module_of('mistral', mistral).window == transformers.MistralConfig().sliding_window == 4096
    assert convert.module_of('qwen2', qwen | {'use_sliding_window': False}).window == 0
    assert convert.module_of('qwen2', qwen | {'max_window_layers': 2}).window == 0
    assert convert.module_of('qwen2', qwen).window == 4


def test_partly_rotated_heads_under_either_key():
    config = twin('pythia').config.to_dict()
    del config['rope_parameters']
    config.pop('rotary_pct', None)
    assert convert.module_of('gpt_neox', config).rotary_fraction == 0.25
    for changed in ({'rotary_pct': 0.5}, {'partial_rotary_factor': 0.5},
                    {'rotary_pct': 0.25, 'rope_parameters': {'partial_rotary_factor': 0.5}}):
        assert convert.module_of('gpt_neox', config | changed).rotary_fraction == 0.5


def test_names_of_transformers_5():
    original = twin('pythia')
    weights = {name: x.numpy() for name, x in original.state_dict().items()}
    if 'lm_head.weight' not in weights:
        pytest.skip('an older transformers')
    _, params = convert.from_torch('gpt_neox', weights, config=original.config.to_dict())
    np.testing.assert_array_equal(params['lm_head']['kernel'], weights['lm_head.weight'].T)


def test_a_head_that_is_not_what_the_config_ties_it_to():
    original = twin('llama3')
    weights = state_dict(original) | {'lm_head.weight': np.zeros((67, 32), np.float32)}
    with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tokens.weight'):
        convert.from_torch('llama', weights, config=original.config.to_dict())


@pytest.mark.parametrize('name', ['gpt2', 'pythia', 'llama3', 'qwen2'])
def test_reward_model(name):
    original = twin(name, 'ForSequenceClassification', num_labels=1, pad_token_id=66)
    weights = state_dict(original)
    module, params = convert.from_torch(KINDS[name], weights, config=original.config.to_dict())
    tokens = np.where(RIGHT, TOKENS % 66, 66)  # the original finds the last token by its id
    run = lambda model: model(torch.tensor(tokens), attention_mask=torch.tensor(RIGHT).long()).logits[:, 0]
    assert_outputs_and_gradients_equal(
        lambda p: (heads.at_last_token(module.apply({'params': p}, tokens, mask=RIGHT), RIGHT),), params,
        functools.partial(convert.to_torch, KINDS[name], module), original, (run(original),),
        file_names=functools.partial(file_names, original))
    back = convert.to_torch(KINDS[name], module, params)
    assert set(back) == set(weights)
    assert all(np.array_equal(back[key], weights[key]) for key in weights)
    rebuilt = transformers.AutoConfig.for_model(**convert.config_of(KINDS[name], module))
    assert rebuilt.num_labels == 1 and rebuilt.architectures == [type(original).__name__]
    loaded = twin(name, 'ForSequenceClassification', seed=1, num_labels=1, pad_token_id=66)
    loaded.load_state_dict({key: torch.tensor(x) for key, x in back.items()})
    torch.testing.assert_close(run(loaded), run(original), rtol=0, atol=0)


class WithValueHead(torch.nn.Module):
    """TRL's `AutoModelForCausalLMWithValueHead`."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.v_head = model, torch.nn.Module()
        self.v_head.summary = torch.nn.Linear(32, 1)
        torch.nn.init.normal_(self.v_head.summary.weight, std=0.2, generator=torch.Generator().manual_seed(0))
        torch.nn.init.constant_(self.v_head.summary.bias, 0.3)

    def forward(self, tokens, mask):
        """Logits and values where `mask` is true."""
        out = self.pretrained_model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(),
                                    output_hidden_states=True)
        return out.logits[mask], self.v_head.summary(out.hidden_states[-1])[mask][:, 0]


@pytest.mark.parametrize('name', ['gpt2', 'pythia', 'llama'])
def test_policy_with_the_value_head_of_trl(name):
    original = WithValueHead(twin(name))
    body = original.pretrained_model
    in_files = functools.partial(file_names, body)
    weights = in_files({key: x.detach().numpy().copy() for key, x in original.state_dict().items()})
    module, params = convert.from_torch(KINDS[name], weights, config=body.config.to_dict())

    def apply(params):
        logits, values = module.apply({'params': params}, TOKENS, mask=RIGHT)
        return logits[RIGHT], values[RIGHT]

    assert_outputs_and_gradients_equal(
        apply, params, functools.partial(convert.to_torch, KINDS[name], module), original, original(TOKENS, RIGHT),
        file_names=in_files)
    back = convert.to_torch(KINDS[name], module, params)
    assert set(back) == set(weights)
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


def test_reward_model_of_the_tldr_reproduction():
    original = twin('pythia')
    body = {name: x for name, x in state_dict(original).items() if not name.startswith('embed_out')}
    weights = {'lm_backbone.' + name.removeprefix('gpt_neox.'): x for name, x in body.items()}
    weights |= {'scalar_head.weight': np.ones((1, 32), np.float32), 'scalar_head.bias': np.float32([0.3])}
    module, params = convert.from_torch('gpt_neox', weights, config=original.config.to_dict())
    assert module.use_bias and 'lm_head' not in params['backbone']
    with torch.no_grad():
        want = original.gpt_neox(torch.tensor(TOKENS)).last_hidden_state.sum(-1).numpy() + 0.3
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, TOKENS), want, rtol=1e-4, atol=1e-3)


def test_parameters_go_straight_into_their_shards():
    from experiments.runtime import mesh as mesh_lib
    from experiments.runtime import partition
    from rlhf_jax.models.llama import PARTITION_RULES
    original = twin('llama')
    mesh = mesh_lib.make_mesh({'fsdp': 4, 'tensor': 2})
    rules = ((r'embed|lm_head/kernel', jax.sharding.PartitionSpec()), *PARTITION_RULES)  # 67 tokens divide by nothing
    config = original.config.to_dict()
    _, want = convert.from_torch('llama', state_dict(original), config=config)
    _, got = convert.from_torch('llama', state_dict(original), config=config, param_dtype=jnp.bfloat16,
                                shardings=lambda shapes: partition.param_shardings(shapes, rules, mesh))
    q = got['blocks']['attn']['q']['kernel']
    assert q.dtype == jnp.bfloat16 and q.sharding.shard_shape(q.shape) == (2, 8, 2, 8)
    for name, array in flatten(got).items():
        np.testing.assert_array_equal(np.asarray(array), flatten(want)[name].astype(jnp.bfloat16), err_msg=name)
