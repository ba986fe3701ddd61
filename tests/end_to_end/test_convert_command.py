"""Released weights in and out through the real commands: random weights of tiny models, under the released names."""
import json
import re
import sys

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tokenizers
from jax.extend.core import jaxprs_in_params
from PIL import Image

from dlc_jax import convert
from dlc_jax.convert import llada
from dlc_jax.models import dit, sedd, sem, vit
from dlc_jax.models.vae import AutoencoderKL
from dlc_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, CenterCrop
from experiments import convert as command
from experiments import sample
from experiments.dlc.code_model import CodeModel
from experiments.dlc.commands import features
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import Generator
from experiments.dlc.latents import LatentDecoder
from experiments.dlc.text_to_code import TextToCode
from experiments.dlc.weights import kinds, reading
from experiments.dlc.weights import llada as llada_weights
from experiments.runtime import config_files, launch, modules
from experiments.runtime.checkpoint import Checkpointer
from rlhf_jax.models.llama import Llama
from rlhf_jax.weights import files
from rlhf_jax.weights.files import load_state_dict, save_state_dict
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten

L, V = 6, 8
SEPARATOR = 62  # of 71 rows of a LLaDA
MODULES = {
    'sem': sem.SEMEncoder(width=32, depth=2, num_heads=4, patch_size=14, num_registers=4, pos_grid=3, num_codes=L,
                          vocab_size=V, temperature=0.5),
    'dit': dit.DiT(input_size=8, channels=4, patch_size=2, width=32, depth=2, num_heads=4, num_codes=L, vocab_size=V),
    'sedd': sedd.SEDD(vocab_size=V, length=L, width=128, depth=2, num_heads=2, cond_dim=16),
    'sd_vae': AutoencoderKL(widths=(32, 32), depth=1),
    'dinov2': vit.VisionTransformer(width=64, depth=2, num_heads=1, patch_size=14, pos_grid=3, num_registers=0,
                                    pos_antialias=False),
}
INPUTS = {
    'sem': (jnp.zeros((1, 28, 28, 3)),), 'dinov2': (jnp.zeros((1, 28, 28, 3)),), 'sd_vae': (jnp.zeros((1, 16, 16, 3)),),
    'dit': (jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, L), jnp.int32)),
    'sedd': (jnp.zeros((1, L), jnp.int32), jnp.ones(1)),
}
# What shapes do not tell, of models that are not of a published size.
FLAGS = {'sem': f'--num_heads=4 --num_codes={L} --temperature=0.5', 'dit': '--num_heads=4', 'sedd': '', 'sd_vae': '',
         'dinov2': ''}
FILES = {'sd_vae': 'diffusion_pytorch_model.safetensors'}


def random_params(kind):
    rng = np.random.default_rng(len(kind))
    return unflatten({name: rng.normal(float(name.endswith(('scale', 'gamma'))), 0.2, x.shape).astype(np.float32)
                      for name, x in flatten(param_shapes(MODULES[kind], *INPUTS[kind])).items()})


def tensors_of(path):
    return dict(load_state_dict(path))


def fields(module):
    """All of a module but how it drops things in training."""
    names = [name for name in module.__dataclass_fields__ if 'drop' not in name and name != 'parent']
    return {name: getattr(module, name) for name in names}


def write_shards(folder, tensors):
    """As Hugging Face splits a large model: two files and their index."""
    names = sorted(tensors)
    parts = {f'model-0000{i + 1}-of-00002.safetensors': names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_state_dict(folder / file, {name: tensors[name] for name in part})
    index = {'weight_map': {name: file for file, part in parts.items() for name in part}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command in this process: exit status, stdout and stderr."""
    def call(module, arguments):
        monkeypatch.setattr(sys, 'argv', ['command', *str(arguments).split()])
        capfd.readouterr()
        try:
            launch.main(module.main, stopped=launch.NOTHING_WRITTEN, status=None)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()
    return call


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """kind -> parameters; and folders of released weights named after them, of which dit's is in shards."""
    root, params = tmp_path_factory.mktemp('released'), {}
    for kind, module in MODULES.items():
        (root / kind).mkdir()
        params[kind] = random_params(kind)
        tensors = convert.to_torch(kind, module, params[kind])
        if kind == 'dit':
            write_shards(root / kind, tensors)
        else:
            save_state_dict(root / kind / 'model.safetensors', tensors)
    # The makers' own config.json does not make it a work directory; what it says of the weights is used.
    notes = {'sem': dict(L=L, temp=0.5, num_heads=4), 'dit': dict(num_heads=4, input_size=8),
             'sd_vae': dict(_class_name='AutoencoderKL'), 'sedd': dict(tokens=V, graph=dict(type='absorb'))}
    for kind, noted in notes.items():
        (root / kind / 'config.json').write_text(json.dumps(noted))
    return root, params


@pytest.fixture(scope='module')
def bare(weights, tmp_path_factory):
    """The same without config.json."""
    root = tmp_path_factory.mktemp('bare')
    for kind in MODULES:
        (root / kind).mkdir()
        save_state_dict(root / kind / 'model.safetensors', convert.to_torch(kind, MODULES[kind], weights[1][kind]))
    return root


LOADERS = {'sem': Encoder, 'dit': Generator, 'sedd': CodeModel}


@pytest.mark.parametrize('kind', LOADERS)
def test_work_directory_and_back(run, weights, bare, tmp_path, kind):
    params = weights[1][kind]
    status, said, error = run(command, f'--kind={kind} --src={bare}/{kind} --dst={tmp_path}/run {FLAGS[kind]}')
    assert (status, error) == (0, ''), error
    count = sum(x.size for x in jax.tree.leaves(params))
    assert said.count('\n') == 1 and f'{kind}: {count:,} parameters, L x V = {L} x {V}' in said
    loaded = LOADERS[kind].load(tmp_path / 'run')
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, loaded.params), params)
    make_model = sys.modules[LOADERS[kind].__module__].make_model
    assert fields(make_model(loaded.config)) == fields(MODULES[kind])

    status, said, error = run(command, f'--reverse --kind={kind} --src={tmp_path}/run --dst={tmp_path}/out')
    assert (status, error) == (0, ''), error
    chex.assert_trees_all_equal(tensors_of(tmp_path / 'out'), tensors_of(weights[0] / kind))
    # What was written says all that the tensors do not.
    again = reading.load(LOADERS[kind], tmp_path / 'out')
    chex.assert_trees_all_equal(again.params, params)
    assert again.config.model.to_dict() == loaded.config.model.to_dict()


def test_the_noise_of_a_code_model_goes_along(run, weights, tmp_path):
    settings = dict(noise='geometric', eps=2e-4, sigma_min=3e-5, sigma_max=7.5)
    given = ' '.join(f'--config.diffusion.{name}={value}' for name, value in settings.items())
    assert run(command, f'--kind=sedd --src={weights[0]}/sedd --dst={tmp_path}/run {given}')[0] == 0
    assert run(command, f'--reverse --kind=sedd --src={tmp_path}/run --dst={tmp_path}/out')[0] == 0
    published = config_files.load(kinds.published_config('sedd')).diffusion.to_dict()
    assert reading.load(CodeModel, tmp_path / 'out').config.diffusion.to_dict() == published | settings
    assert reading.load(CodeModel, weights[0] / 'sedd').config.diffusion.to_dict() == published  # which says nothing


def test_networks_used_as_they_are_released(run, weights, tmp_path):
    for kind in ('sd_vae', 'dinov2'):
        status, said, error = run(command, f'--kind={kind} --src={weights[0]}/{kind} --dst={tmp_path}/{kind}')
        assert (status, error) == (0, ''), error
        chex.assert_trees_all_equal(tensors_of(tmp_path / kind), tensors_of(weights[0] / kind / 'model.safetensors'))
    assert (tmp_path / 'sd_vae' / FILES['sd_vae']).exists()
    noted = json.loads((tmp_path / 'sd_vae' / 'config.json').read_text())
    assert noted['_class_name'] == 'AutoencoderKL' and noted['block_out_channels'] == [32, 32]
    chex.assert_trees_all_equal(LatentDecoder.load(tmp_path / 'sd_vae').params, weights[1]['sd_vae'])


@pytest.mark.parametrize('what', ['dinov2', 'decode', 'posterior'])
def test_products_of_frozen_networks_are_not_rounded(what, weights, monkeypatch):
    """Whatever a GPU or TPU does with float32 by default."""
    highest, found = (jax.lax.Precision.HIGHEST,) * 2, []

    def batched(one, params, unit):
        def run(x, num, progress=None):
            found.extend(precisions(jax.make_jaxpr(one)(params, x).jaxpr))
            return jax.tree.map(np.asarray, one(params, x))
        return run
    monkeypatch.setattr(modules, 'Batched', batched)
    if what == 'dinov2':
        assert features.encoder(weights[0] / 'dinov2', 2)(np.zeros((2, 28, 28, 3), np.uint8)).shape == (2, 64)
    else:
        shape = (1, 8, 8, 4) if what == 'decode' else (1, 16, 16, 3)
        getattr(LatentDecoder(MODULES['sd_vae'], weights[1]['sd_vae']), what)(np.zeros(shape, np.float32))
    assert len(found) > 5 and set(found) == {highest}


def precisions(jaxpr):
    """Of all products in `jaxpr`."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
            yield eqn.params['precision']
        for inner in jaxprs_in_params(eqn.params):
            yield from precisions(inner)


def test_backbone_of_an_encoder_is_a_dinov2(run, weights, tmp_path):
    assert run(command, f'--kind=sem --src={weights[0]}/sem --dst={tmp_path}/run')[0] == 0
    status, _, error = run(command, f'--reverse --kind=dinov2 --src={tmp_path}/run --dst={tmp_path}/backbone')
    assert status == 0, error
    whole = load_state_dict(weights[0] / 'sem' / 'model.safetensors')
    without_sem = {n: x for n, x in whole.items() if not n.startswith('sem_')}
    chex.assert_trees_all_equal(tensors_of(tmp_path / 'backbone'), without_sem)
    _, params = convert.from_torch('dinov2', load_state_dict(tmp_path / 'backbone'), num_heads=4)
    chex.assert_trees_all_equal(params, {n: x for n, x in weights[1]['sem'].items() if not n.startswith('sem_')})


def test_entry_of_a_training_checkpoint(run, weights, tmp_path):
    torch = pytest.importorskip('torch')
    tensors = convert.to_torch('sem', MODULES['sem'], weights[1]['sem'])
    teacher = {f'backbone.{name}': torch.from_numpy(x) for name, x in tensors.items()}
    torch.save({'teacher': teacher, 'student': {'x': torch.zeros(1)}}, tmp_path / 'checkpoint.pth')
    arguments = f'--kind=sem --src={tmp_path}/checkpoint.pth --dst={tmp_path}/run {FLAGS["sem"]}'
    status, _, error = run(command, arguments)
    assert status == 2 and 'holds 2 state dicts' in error
    status, _, error = run(command, arguments + ' --key=teacher')
    assert status == 0, error
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, Encoder.load(tmp_path / 'run').params), weights[1]['sem'])


# ---- LLaDA ---------------------------------------------------------------------------------------------------------

LLADA = Llama(vocab_size=71, width=32, depth=2, num_heads=4, hidden=40, max_length=32, causal=False, rope_base=5e5)


@pytest.fixture(scope='module')
def llada_folder(tmp_path_factory):
    """As released: shards in bfloat16, a config.json with more in it than the model needs, tokenizer files."""
    folder = tmp_path_factory.mktemp('llada')
    shapes = flatten(llada.shapes_of(LLADA))
    params = unflatten({name: np.random.default_rng(0).normal(0, 0.2, x.shape).astype(jnp.bfloat16)
                        for name, x in shapes.items()})
    tensors = convert.tensors('llada', LLADA, params, dtype=jnp.bfloat16)
    files.save(folder, tensors, llada.config_of(LLADA) | {'mask_token_id': 50, 'vocab_size': 64}, shard_bytes=10_000)
    assert (folder / 'model.safetensors.index.json').exists()
    vocabulary = {f'w{i}': i for i in range(SEPARATOR)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, 'w0')).save(str(folder / 'tokenizer.json'))
    return folder, params


def test_llada_is_checked_and_written_again(run, llada_folder, tmp_path):
    folder, _ = llada_folder
    status, said, error = run(command, f'--kind=llada --src={folder} --dst={tmp_path}/new')
    assert (status, error) == (0, ''), error
    count = sum(x.size for x in jax.tree.leaves(llada.shapes_of(LLADA)))
    assert said.count('\n') == 1 and f'llada: {count:,} parameters, vocabulary of 71' in said and 'bfloat16' in said
    chex.assert_trees_all_equal(tensors_of(tmp_path / 'new'), tensors_of(folder))
    noted = json.loads((tmp_path / 'new' / 'config.json').read_text())
    assert (noted['vocab_size'], noted['mask_token_id'], noted['torch_dtype']) == (71, 50, 'bfloat16')
    assert (tmp_path / 'new' / 'tokenizer.json').exists()
    status, _, error = run(command, f'--kind=llada --src={folder} --dst={tmp_path}/wide --dtype=float32')
    assert status == 0, error
    assert {x.dtype for x in tensors_of(tmp_path / 'new').values()} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in tensors_of(tmp_path / 'wide').values()} == {np.dtype(np.float32)}
    widened = {n: x.astype(np.float32) for n, x in tensors_of(folder).items()}
    chex.assert_trees_all_equal(tensors_of(tmp_path / 'wide'), widened)


def test_a_run_of_text_to_code_becomes_llada(run, llada_folder, tmp_path):
    folder, params = llada_folder
    checkpointer = Checkpointer(tmp_path / 'run' / 'checkpoints')
    checkpointer.save(3, {'params': jax.tree.map(lambda x: x.astype(np.float32), params), 'step': np.int32(3)})
    checkpointer.close()
    sizes = ('width', 'depth', 'num_heads', 'hidden', 'max_length', 'rope_base')
    model = dict(size='LLaDA-8B', dtype='float32', num_codes=L, vocab_size=V,  # of the codes
                 **{name: getattr(LLADA, name) for name in sizes})
    config_files.save(ml_collections.ConfigDict(dict(
        experiment='text_to_code', tokenizer=str(folder), model=model,
        words=dict(separator=SEPARATOR, mask_token=50, pad_token=3))),
        tmp_path / 'run')
    status, said, error = run(command, f'--reverse --kind=llada --src={tmp_path}/run --dst={tmp_path}/out '
                              '--dtype=bfloat16')
    assert (status, error) == (0, ''), error
    chex.assert_trees_all_equal(tensors_of(tmp_path / 'out'), tensors_of(folder))
    assert {x.dtype for x in tensors_of(tmp_path / 'out').values()} == {np.dtype(jnp.bfloat16)}
    noted = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (noted['vocab_size'], noted['mask_token_id']) == (71, 50)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / 'out' / 'tokenizer.json'))
    assert [tokenizer.token_to_id(name) for name in ('<|start_sem|>', '<|sem_vocab_0|>', f'<|sem_vocab_{V - 1}|>')] == [
        SEPARATOR, SEPARATOR + 1, SEPARATOR + V]
    assert tokenizer.token_to_id(f'<|sem_vocab_{V}|>') is None
    status, _, error = run(command, f'--kind=llada --src={tmp_path}/out --dst={tmp_path}/again')
    assert status == 0, error
    loaded = llada_weights.load(TextToCode, tmp_path / 'out', num_codes=L)  # what --llada reads
    assert (loaded.config.words.separator, loaded.config.model.vocab_size) == (SEPARATOR, V)


@pytest.mark.parametrize('change, said', [
    (lambda t, c: t.pop('model.transformer.ln_f.weight'), 'missing tensor model.transformer.ln_f.weight .*in {src}'),
    (lambda t, c: t.update({'model.transformer.ln_f.weight': np.full(32, np.nan, np.float32)}),
     r'model.transformer.ln_f.weight holds values that are not finite \(in {src}/model.safetensors\)'),
    (lambda t, c: c.pop('n_heads'), '{src}/config.json: config has no n_heads'),
    (lambda t, c: c.update(alibi=True), '{src}/config.json: config has alibi=True'),
])
def test_a_llada_that_does_not_fit_is_one_line(run, llada_folder, tmp_path, change, said):
    folder, _ = llada_folder
    tensors, config = tensors_of(folder), json.loads((folder / 'config.json').read_text())
    change(tensors, config)
    files.save(tmp_path / 'src', tensors, config)
    status, _, error = run(command, f'--kind=llada --src={tmp_path}/src --dst={tmp_path}/new')
    assert status == 2 and error.count('\n') == 1
    assert re.search(said.format(src=tmp_path / 'src'), error), error


def test_a_dinov2_under_the_names_of_transformers(run, weights, tmp_path):
    status, _, error = run(command, f'--kind=dinov2 --src={weights[0]}/dinov2 --dst={tmp_path}/hf --hf')
    assert (status, error) == (0, ''), error
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['model_type'] == 'dinov2'
    assert 'encoder.layer.1.attention.attention.key.bias' in tensors_of(tmp_path / 'hf')
    assert run(command, f'--kind=dinov2 --src={tmp_path}/hf --dst={tmp_path}/back')[0] == 0
    chex.assert_trees_all_equal(tensors_of(tmp_path / 'back'), tensors_of(weights[0] / 'dinov2'))


# ---- Sampling from what was downloaded -----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    for i in range(2):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / f'{i}.png')
    return root


def test_released_folders_are_sampled_as_the_modules_in_memory(run, weights, tmp_path):
    root, params = weights
    status, _, error = run(sample, f'--unconditional --sedd={root}/sedd --dit={root}/dit --vae={root}/sd_vae --num=2 '
                           f'--steps=3 --code_steps=4 --out={tmp_path}/x.npz')
    assert status == 0, error
    images = np.load(tmp_path / 'x.npz')['arr_0']
    assert images.shape == (2, 16, 16, 3) and images.std() > 0
    # The same by hand, from modules and parameters that no file has seen.
    code_key, image_key = jax.random.split(jax.random.key(0))
    config = lambda kind: reading.as_run(kind, MODULES[kind], params[kind], config_files.load(
        kinds.published_config(kind)))[0]
    codes = CodeModel(config('sedd'), params['sedd']).sample(code_key, 2, name='analytic', num_steps=4)
    x = Generator(config('dit'), params['dit']).sample(image_key, codes, 2, num_steps=3, guidance=1.7)
    np.testing.assert_array_equal(images, LatentDecoder(MODULES['sd_vae'], params['sd_vae']).decode(x))


def test_released_encoders_read_images(run, weights, pictures, tmp_path, monkeypatch):
    root, params = weights
    seen = {}

    def draw(self, key, cond, num, *, batch_size, part, **sampler):
        seen.update(sampler, codes=cond, config=self.config.sampler)
        return np.zeros((num, 8, 8, 4), np.float32)
    monkeypatch.setattr(Generator, 'sample', draw)
    monkeypatch.setattr(LatentDecoder, 'decode', lambda self, x, *unused: np.zeros((len(x), 16, 16, 3), np.uint8))
    status, _, error = run(sample, f'--from_images {pictures}/0.png {pictures}/1.png --sem={root}/sem --dit={root}/dit '
                           f'--vae={root}/sd_vae --out={tmp_path}/x.npz')
    assert status == 0, error
    encoder = Encoder(reading.as_run('sem', MODULES['sem'], params['sem'], config_files.load(
        kinds.published_config('sem')))[0], params['sem'])
    images = [np.asarray(Image.open(pictures / f'{i}.png')) for i in range(2)]
    assert encoder.transform(images[0]).shape == (224, 224, 3)
    np.testing.assert_array_equal(seen['codes'], encoder.encode_images(images)['codes'])
    assert len(np.unique(seen['codes'])) > 2
    assert (seen['config'].guidance, seen['config'].num_steps, 'guidance' in seen) == (4.0, 250, False)


def test_features_of_released_weights(weights):
    root, params = weights
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), np.uint8)
    seen = features.encoder(root / 'dinov2', batch_size=2)(images)
    inputs = np.stack([CenterCrop(224, IMAGENET_MEAN, IMAGENET_STD)(image.repeat(3, -1)) for image in images])
    want = MODULES['dinov2'].apply({'params': params['dinov2']}, inputs).cls
    np.testing.assert_allclose(seen, want, atol=1e-5)
    sem = features.encoder(root / 'sem', batch_size=2)(images)
    assert sem.shape == (3, 32) and np.abs(sem[0] - sem[1]).max() > 1e-3
    with pytest.raises(ValueError, match='weights of kind dit'):
        features.encoder(root / 'dit', batch_size=2)


def test_published_recipe_gives_way_to_flags(run, weights, tmp_path, monkeypatch):
    root, calls = weights[0], []
    monkeypatch.setattr(CodeModel, 'sample', lambda self, *unused, **kw: calls.append(self.config.sampler) or np.zeros(
        (1, L), np.int32))
    monkeypatch.setattr(Generator, 'sample', lambda self, *unused, **kw: calls.append(kw) or np.zeros(
        (1, 8, 8, 4), np.float32))
    monkeypatch.setattr(LatentDecoder, 'decode', lambda self, x, *unused: np.zeros((1, 16, 16, 3), np.uint8))
    arguments = (f'--unconditional --sedd={root}/sedd --dit={root}/dit --vae={root}/sd_vae --num=1 '
                 f'--out={tmp_path}/x.npz')
    assert run(sample, arguments)[0] == run(sample, arguments + ' --guidance=1 --steps=50')[0] == 0
    assert (calls[0].name, calls[0].num_steps) == ('analytic', 1024)
    assert (calls[1]['num_steps'], calls[1]['guidance']) == (256, 1.7)
    assert (calls[3]['num_steps'], calls[3]['guidance']) == (50, 1.0)


# ---- Bad input -----------------------------------------------------------------------------------------------------

def change(tensors, what):
    name = 'blocks.1.mlp.fc1.bias'
    if what == 'missing':
        return {n: x for n, x in tensors.items() if n != name}
    return tensors | {'unknown': {'extra.weight': np.ones(3, np.float32)}, 'misshaped': {name: tensors[name][:-1]},
                      'nan': {name: np.full_like(tensors[name], np.nan)}}[what]


@pytest.mark.parametrize('what, said', [
    ('missing', 'missing tensor blocks.1.mlp.fc1.bias'), ('unknown', 'unknown tensor extra.weight'),
    ('misshaped', r'blocks.1.mlp.fc1.bias has shape \(127,\), expected \(128,\)'),
    ('nan', 'blocks.1.mlp.fc1.bias holds values that are not finite')])
def test_a_bad_tensor_is_named_with_its_file(run, weights, tmp_path, what, said):
    tensors = convert.to_torch('dit', MODULES['dit'], weights[1]['dit'])
    save_state_dict(tmp_path / 'bad.safetensors', change(tensors, what))
    status, _, error = run(command, f'--kind=dit --src={tmp_path}/bad.safetensors --dst={tmp_path}/run --num_heads=4')
    assert status == 2 and error.count('\n') == 1
    assert re.search(r'error: \S*bad\.safetensors: ' + said, error), error
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_bad_tensor_is_named_with_its_shard(run, weights, tmp_path):
    write_shards(tmp_path, change(convert.to_torch('dit', MODULES['dit'], weights[1]['dit']), 'nan'))
    shard = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map']['blocks.1.mlp.fc1.bias']
    status, _, error = run(command, f'--kind=dit --src={tmp_path} --dst={tmp_path}/run --num_heads=4')
    said = f'blocks.1.mlp.fc1.bias holds values that are not finite (in {tmp_path}/{shard})'
    assert status == 2 and said in error, error


BAD = {
    'kind': ('--kind=vae --src={at}/dit --dst={new}', "argument --kind: invalid choice: 'vae'"),
    'no kind': ('--src={at}/dit --dst={new}', 'required: --kind'),
    'kind of another': ('--kind=sem --src={at}/dit --dst={new}',
                        r'dit: these are the weights of kind dit .*x_embedder.proj.weight.*, not of sem'),
    'vae for an inception': ('--kind=inception --src={at}/sd_vae --dst={new}', 'weights of kind sd_vae'),
    'no source': ('--kind=dit --src={at}/nowhere --dst={new}', '--src=.*nowhere: nothing there'),
    'empty source': ('--kind=dit --src={at} --dst={new}', 'no released weights there'),
    'destination taken': ('--kind=dit --src={at}/dit --dst={at}/sem', '--dst=.*sem: something is there already'),
    'heads unknown': ('--kind=dit --src={bare}/dit --dst={new}',
                      'no DiT of width 32 was published; give its --num_heads'),
    'heads': ('--kind=dit --src={at}/dit --dst={new} --num_heads=5', 'num_heads=5 does not divide the width 32'),
    'codes': ('--kind=sem --src={at}/sem --dst={new} --num_codes=7', 'num_codes=7 x vocab_size=6 is not the 48 rows'),
    'codes of a dit': ('--kind=dit --src={at}/dit --dst={new} --num_codes=7',
                       '--num_codes: the tensors of a dit say it'),
    'negative': ('--kind=sem --src={at}/sem --dst={new} --temperature=-1', '--temperature=-1.0 must be positive'),
    'config of a vae': ('--kind=sd_vae --src={at}/sd_vae --dst={new} --config.seed=1',
                        '--config: only a work directory'),
    'config of another kind': ('--kind=dit --src={at}/dit --dst={new} --config=configs/dlc/encoder_digits.py',
                               "experiment='encoder', but a dit makes 'generator'"),
    'config that does not fit': ('--kind=sem --src={at}/sem --dst={new} --config.data.global_size=30',
                                 'data.global_size=30 is not divisible by model.patch_size=14'),
    'dtype of a dit': ('--kind=dit --src={at}/dit --dst={new} --dtype=bfloat16',
                       '--dtype: a dit is written in float32'),
    'hf of a dit': ('--kind=dit --src={at}/dit --dst={new} --hf', '--hf: only a dinov2'),
    'llada without config': ('--kind=llada --src={bare}/dit --dst={new}', 'dit: no config.json there'),
    'reverse of a folder of llada': ('--reverse --kind=llada --src={bare}/dit --dst={new}', 'no config.json there'),
    'reverse of weights': ('--reverse --kind=dit --src={at}/dit --dst={new}', 'released weights already'),
    'reverse of nothing': ('--reverse --kind=dit --src={at} --dst={new}', 'no config.json there'),
    'reverse of a vae': ('--reverse --kind=sd_vae --src={at} --dst={new}', 'no sd_vae is trained here'),
    'damaged config': ('--kind=dit --src={bare}/damaged --dst={new}', 'config.json: damaged'),
}


@pytest.mark.parametrize('arguments, said', BAD.values(), ids=BAD)
def test_what_does_not_fit_is_one_line(run, weights, bare, tmp_path, arguments, said):
    if 'damaged' in arguments and not (bare / 'damaged').exists():
        (bare / 'damaged').mkdir()
        save_state_dict(bare / 'damaged' / 'model.safetensors', load_state_dict(bare / 'dit'))
        (bare / 'damaged' / 'config.json').write_text('{"num_heads": ')
    status, _, error = run(command, arguments.format(at=weights[0], bare=bare, new=tmp_path / 'new'))
    assert status == 2 and error.startswith('error: ') and error.count('\n') == 1, error
    assert re.search(said, error), error


def test_released_weights_of_another_kind_are_refused_by_sample(run, weights, tmp_path):
    root = weights[0]
    status, _, error = run(sample, f'--unconditional --sedd={root}/dit --dit={root}/dit --vae={root}/sd_vae '
                           f'--out={tmp_path}/x.png')
    assert status == 2 and ('/dit: these are the weights of kind dit (they have x_embedder.proj.weight), not of sedd\n'
                            in error), error
