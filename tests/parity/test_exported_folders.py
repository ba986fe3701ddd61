"""Exported folders, written shard by shard from parameters on a mesh, in the libraries that they are for."""
import jax
import numpy as np
import pytest

from dlc_jax import convert as images
from dlc_jax.convert import dinov2
from dlc_jax.models import vae, vit
from experiments.dlc.weights import writing
from experiments.rlhf.models.export import special_ids
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.models import gpt2, gpt_neox, heads, llama, lora
from rlhf_jax.tokenizers import JsonTokenizer
from rlhf_jax.weights import files
from rlhf_jax.weights.rules import flatten, unflatten
from tests.rlhf.tiny_tokenizers import byte_level

torch = pytest.importorskip('torch')
MESH = mesh_lib.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 7))
SMALL = dict(vocab_size=64, width=32, depth=2, num_heads=4, hidden=48, max_length=16)
LANGUAGE = {
    'gpt2': (gpt2, gpt2.GPT2(**SMALL)),
    'gpt_neox': (gpt_neox, gpt_neox.GPTNeoX(**SMALL, rotary_fraction=0.5)),
    'llama': (llama, llama.Llama(**SMALL, num_kv_heads=2, eps=1e-5)),
}


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten({name: rng.normal(float(name.endswith(('scale', 'gamma'))), 0.2, x.shape).astype(np.float32)
                      for name, x in flatten(shapes).items()})


def params_of(module, rules, prefix=''):
    shapes = jax.eval_shape(lambda key: module.init(key, TOKENS), jax.random.key(0))['params']
    params = random_like(shapes)
    table = (*partition.prefixed(prefix, rules), (r'score_head/.*', jax.sharding.PartitionSpec())) if prefix else rules
    return params, jax.device_put(params, partition.param_shardings(params, table, MESH))


@pytest.mark.parametrize('kind', LANGUAGE)
def test_language_models_in_transformers(kind, tmp_path):
    transformers = pytest.importorskip('transformers')
    file, module = LANGUAGE[kind]
    params, placed = params_of(module, file.PARTITION_RULES)
    files.save(tmp_path, convert.tensors(kind, module, placed), convert.config_of(kind, module), shard_bytes=20_000)
    assert len(list(tmp_path.glob('model-*-of-*.safetensors'))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = model(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(module.apply({'params': params}, TOKENS), want, rtol=1e-4, atol=1e-4)


def test_a_reward_model_in_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    module = heads.RewardModel(LANGUAGE['llama'][1])
    params, placed = params_of(module, llama.PARTITION_RULES, prefix='backbone')
    config = convert.config_of('llama', module) | {'pad_token_id': 0}
    files.save(tmp_path, convert.tensors('llama', module, placed), config)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = np.maximum(TOKENS, 1)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).logits[:, 0].numpy()
    np.testing.assert_allclose(module.apply({'params': params}, tokens)[:, -1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_an_adapter_in_peft(kind, tmp_path):
    pytest.importorskip('peft')
    transformers = pytest.importorskip('transformers')
    from peft import PeftModel
    file, module = LANGUAGE[kind]
    base, _ = params_of(module, file.PARTITION_RULES)
    params = lora.init(jax.random.key(0), module, base, rank=2, alpha=3.0, targets=file.LORA_TARGETS)
    rng = np.random.default_rng(1)
    params = unflatten({name: rng.normal(0, 0.3, x.shape).astype(np.float32) if name.endswith(('_a', '_b')) else x
                        for name, x in flatten(params).items()})
    files.save(tmp_path / 'base', convert.tensors(kind, module, base), convert.config_of(kind, module))
    tensors, config = peft.to_torch(kind, module, params)
    files.save(tmp_path / 'adapter', tensors, config, name='adapter_model')
    (tmp_path / 'adapter' / 'config.json').rename(tmp_path / 'adapter' / 'adapter_config.json')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    model = PeftModel.from_pretrained(model, tmp_path / 'adapter').eval()
    with torch.no_grad():
        want = model(torch.from_numpy(TOKENS)).logits.numpy()
    got = module.apply({'params': params}, TOKENS)
    assert np.abs(got - module.apply({'params': base}, TOKENS)).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('fields', [dict(), dict(num_registers=3), dict(ffn='swiglu')],
                         ids=['plain', 'registers', 'swiglu'])
def test_a_dinov2_in_transformers(fields, tmp_path):
    transformers = pytest.importorskip('transformers')
    module = vit.VisionTransformer(**dict(width=32, depth=2, num_heads=4, patch_size=4, pos_grid=4, num_registers=0)
                                   | fields)
    params = random_like(dinov2.shapes_of(module))
    placed = jax.device_put(params, partition.param_shardings(params, vit.PARTITION_RULES, MESH))
    tensors = images.tensors('dinov2', module, placed, hf=True)
    files.save(tmp_path, tensors, dinov2.config_of(module), shard_bytes=20_000)
    assert (tmp_path / 'model.safetensors.index.json').exists()
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    out = module.apply({'params': params}, x)
    got = np.concatenate([out.cls[:, None], out.registers, out.patches], 1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_in_diffusers(tmp_path):
    diffusers = pytest.importorskip('diffusers')
    module = vae.AutoencoderKL(widths=(8, 16), depth=1, num_groups=4)
    from dlc_jax.convert import sd_vae
    params = random_like(sd_vae.shapes_of(module))
    writing.write_released('sd_vae', module, params, tmp_path / 'new')
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / 'new').eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        moments = model.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).latent_dist
        back = model.decode(moments.mean).sample.numpy().transpose(0, 2, 3, 1)
    mean, _ = module.apply({'params': params}, x, method='encode')
    np.testing.assert_allclose(mean, moments.mean.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(module.apply({'params': params}, mean, method='decode'), back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('has_pad', [True, False])
def test_scores_of_an_exported_reward_model_whatever_its_tokenizer_pads_with(has_pad, tmp_path):
    """`transformers` reads the last token that is no pad: with EOS for a pad that was one token too early."""
    transformers = pytest.importorskip('transformers')
    tokenizer = JsonTokenizer(byte_level(tmp_path / 'tokenizer', pad='<|pad|>' if has_pad else None))
    module = heads.RewardModel(llama.Llama(**(SMALL | dict(vocab_size=tokenizer.vocab_size)), num_kv_heads=2, eps=1e-5))
    params, placed = params_of(module, llama.PARTITION_RULES, prefix='backbone')
    ids = special_ids(tokenizer)
    assert ids['pad_token_id'] == (tokenizer.pad if has_pad else None)
    files.save(tmp_path / 'rm', convert.tensors('llama', module, placed), convert.config_of('llama', module) | ids)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'rm').eval()
    for text in ('two and two? four.', '7.', 'hello there'):
        tokens = np.array([[*tokenizer.encode(text), tokenizer.eos]])
        with torch.no_grad():
            want = model(torch.from_numpy(tokens)).logits[:, 0].numpy()
        np.testing.assert_allclose(module.apply({'params': params}, tokens)[:, -1], want, rtol=1e-4, atol=1e-4)
