"""GPT-2, GPT-NeoX and LLaMA against `transformers`: same weights, same tokens, float32."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hf_twins import CONFIGS, KINDS, file_name, state_dict, torch, transformers, twin
from rlhf_jax import convert
from rlhf_jax.convert import files
from rlhf_jax.convert.rules import flatten
from rlhf_jax.models import heads

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
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_gradients_of_the_likelihood(pair):
    kind, original, module, params, _ = pair

    def loss(params):
        logp = jax.nn.log_softmax(module.apply({'params': params}, TOKENS, mask=RIGHT))[:, :-1]
        picked = jnp.take_along_axis(logp, TOKENS[:, 1:, None], -1)[..., 0]
        return -jnp.where(RIGHT[:, 1:], picked, 0).sum()

    got = convert.to_torch(kind, module, jax.jit(jax.grad(loss))(params))
    model = twin_copy(original)
    labels = torch.tensor(np.where(RIGHT, TOKENS, -100))
    model.zero_grad()
    logits = model(torch.tensor(TOKENS), attention_mask=torch.tensor(RIGHT).long()).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction='sum').backward()
    for name, parameter in model.named_parameters():
        want = parameter.grad.numpy()
        np.testing.assert_allclose(got[file_name(model, name)], want, rtol=1e-3, atol=1e-3, err_msg=name)


def twin_copy(model):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


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


@pytest.mark.parametrize('name', ['gpt2', 'pythia', 'llama3'])
def test_reward_model(name):
    original = twin(name, 'ForSequenceClassification', num_labels=1, pad_token_id=66)
    weights = state_dict(original)
    module, params = convert.from_torch(KINDS[name], weights, config=original.config.to_dict())
    tokens = np.where(RIGHT, TOKENS % 66, 66)  # the original finds the last token by its id
    got = heads.at_last_token(jax.jit(module.apply)({'params': params}, tokens, mask=RIGHT), RIGHT)
    with torch.no_grad():
        want = original(torch.tensor(tokens), attention_mask=torch.tensor(RIGHT).long()).logits[:, 0].numpy()
    np.testing.assert_allclose(got, want, **TOLERANCE)
    back = convert.to_torch(KINDS[name], module, params)
    assert set(back) == set(weights)
    assert all(np.array_equal(back[key], weights[key]) for key in weights)
    rebuilt = transformers.AutoConfig.for_model(**convert.config_of(KINDS[name], module))
    assert rebuilt.num_labels == 1 and rebuilt.architectures == [type(original).__name__]


def test_value_head_of_trl():
    original = twin('llama')
    rng = np.random.default_rng(1)
    weights = {f'pretrained_model.{name}': x for name, x in state_dict(original).items()}
    weights |= {'v_head.summary.weight': rng.normal(size=(1, 32)).astype(np.float32),
                'v_head.summary.bias': np.float32([0.3])}
    module, params = convert.from_torch('llama', weights, config=original.config.to_dict())
    logits, values = jax.jit(module.apply)({'params': params}, TOKENS)
    with torch.no_grad():
        out = original(torch.tensor(TOKENS), output_hidden_states=True)
    np.testing.assert_allclose(logits, out.logits.numpy(), **TOLERANCE)
    want = out.hidden_states[-1].numpy() @ weights['v_head.summary.weight'][0] + 0.3
    np.testing.assert_allclose(values, want, **TOLERANCE)
    back = convert.to_torch('llama', module, params)
    assert set(back) == set(weights)
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


def test_reward_model_of_the_tldr_reproduction():
    original = twin('pythia')
    body = {name: x for name, x in state_dict(original).items() if not name.startswith('embed_out')}
    weights = {'lm_backbone.' + name.removeprefix('gpt_neox.'): x for name, x in body.items()}
    weights |= {'scalar_head.weight': np.ones((1, 32), np.float32), 'scalar_head.bias': np.zeros(1, np.float32)}
    module, params = convert.from_torch('gpt_neox', weights, config=original.config.to_dict())
    assert module.use_bias and 'lm_head' not in params['backbone']
    with torch.no_grad():
        want = original.gpt_neox(torch.tensor(TOKENS)).last_hidden_state.sum(-1).numpy()
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, TOKENS), want, rtol=1e-4, atol=1e-3)


def test_parameters_go_straight_into_their_shards():
    from experiments.runtime import mesh as mesh_lib, partition
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
