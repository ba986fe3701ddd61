"""Text to image through the real commands: random weights of a tiny LLaDA and DiT under the released names."""
import dataclasses
import json
import re
import sys
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.dlc import text_to_code_digits, text_to_code_llada
from dlc_jax import convert, text_to_code
from dlc_jax.convert import llada
from dlc_jax.models import dit
from dlc_jax.text_to_code import Sampling, Words
from experiments import encode, sample, train
from experiments.dlc.data import codestore, codestore_writer
from experiments.dlc.generator import Generator
from experiments.dlc.text_to_code import TextToCode, make_model
from experiments.dlc.weights import kinds, reading, writing
from experiments.runtime import config_files, launch, loop, modules, partition
from experiments.runtime import mesh as mesh_lib
from rlhf_jax.models.llama import Llama
from rlhf_jax.weights.files import save_state_dict
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten

L, V, WORDS_OF_TEXT = 8, 4, ('<pad>', '<mask>', 'red', 'blue', 'fox', 'snow', 'in')
WORDS = Words(separator=7, num_codes=V, mask_token=1, pad_token=0)
BASE = Llama(vocab_size=9, width=32, depth=2, num_heads=4, hidden=48, max_length=32, causal=False, rope_base=500000.0,
             eps=1e-5)
DIT = dit.DiT(input_size=4, channels=1, patch_size=2, width=32, depth=1, num_heads=4, num_codes=L, vocab_size=V)


def random_params(module, *args):
    rng = np.random.default_rng(0)
    return unflatten({name: rng.normal(float(name.endswith('scale')), 0.3, x.shape).astype(np.float32)
                      for name, x in flatten(param_shapes(module, *args)).items()})


def write_llada(folder, module, params, num_codes):
    """As it is released: config.json, two shards with their index, and a tokenizer.json with code tokens."""
    folder.mkdir()
    tensors = convert.to_torch('llada', module, params)
    shards = {name: f'model-{i % 2}.safetensors' for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_state_dict(folder / shard, {name: x for name, x in tensors.items() if shards[name] == shard})
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': shards}))
    (folder / 'config.json').write_text(json.dumps(llada.config_of(module) | {
        'mask_token_id': 1, 'embedding_size': BASE.vocab_size}))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS_OF_TEXT)}, unk_token='<pad>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if num_codes:
        tokenizer.add_tokens(['<|start_sem|>', *(f'<|sem_vocab_{v}|>' for v in range(num_codes))])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'special_tokens_map.json').write_text(json.dumps({'pad_token': '<pad>'}))


def own_config(at):
    """A text_to_code run as small as the released stand-ins."""
    config = text_to_code_digits.get_config().unlock()
    config.model.update(dict(width=32, depth=2, num_heads=4, hidden=48, max_length=32, num_codes=L, vocab_size=V,
                             text_vocab_size=10))  # more rows than the tokenizer has tokens
    config.words.update(dict(separator=7, mask_token=1, pad_token=0))
    config.tokenizer, config.pretrained, config.caption_length = '', str(at / 'base'), 4
    config.num_steps, config.batch_size, config.checkpoint_every, config.eval_every = 2, 16, 0, 0
    config.data.update(dict(path=str(at / 'store'), heldout=str(at / 'store')))
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    config.model.vocab_multiple, config.sampler.steps = 2, 0
    return config


@pytest.fixture(scope='module')
def at(tmp_path_factory):
    """Folders of released weights, a code store with captions and one without, runs, texts."""
    root = tmp_path_factory.mktemp('at')
    tokens = np.zeros((1, 2), np.int32)
    write_llada(root / 'base', BASE.clone(vocab_size=10), random_params(BASE.clone(vocab_size=10), tokens), 0)
    extended = BASE.clone(vocab_size=WORDS.size)
    write_llada(root / 'llada', extended, random_params(extended, tokens), V)
    write_llada(root / 'other_v', BASE.clone(vocab_size=14), random_params(BASE.clone(vocab_size=14), tokens), 6)
    write_llada(root / 'too_few_rows', BASE.clone(vocab_size=9), random_params(BASE.clone(vocab_size=9), tokens), V)
    write_llada(root / 'no_tokenizer', extended, random_params(extended, tokens), V)
    (root / 'no_tokenizer' / 'tokenizer.json').unlink()
    (root / 'dit').mkdir()
    params = random_params(DIT, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32), jnp.zeros((1, L), jnp.int32))
    config = config_files.load(kinds.published_config('dit'))
    config.unlock().model.update({name: getattr(DIT, name) for name in (
        'input_size', 'channels', 'patch_size', 'width', 'depth', 'num_heads', 'num_codes', 'vocab_size')})
    config.data.target, config.weights_only, config.sampler.num_steps = 'images', True, 2
    writing.write_run('dit', config, params, root / 'generator')
    rng = np.random.default_rng(0)
    for name, meta in (('store', dict(captions=True)), ('bare', {}), ('other', dict(captions=True))):
        length = 6 if name == 'other' else L
        with codestore_writer.writer(root / name, num=40, meta=dict(num_codes=length, vocab_size=V, **meta)) as store:
            store.append({'codes': rng.integers(0, V, (40, length))}, names=[str(i) for i in range(40)],
                         captions=['red fox in snow' if i % 2 else 'blue' for i in range(40)] if meta else None)
    (root / 'texts').write_text('red fox in blue\n\nblue fox in snow\n')
    (root / 'empty').write_text('\n')
    (root / 'photos').mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / 'photos' / 'a.png')
    (root / 'bad.jsonl').write_text('{"file": "a.png"}\n')
    return root


@pytest.fixture
def run(at, monkeypatch, capfd):
    """Runs a command in this process: exit status and what it said on stderr."""
    def call(command, *arguments):
        monkeypatch.setattr(sys, 'argv', ['command', *(str(a).format(at=at) for a in arguments)])
        capfd.readouterr()
        try:
            launch.main(command.main, stopped=launch.NOTHING_WRITTEN, status=None)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, capfd.readouterr().err
    return call


# ---- From released weights to a run ----------------------------------------------------------------------------------

def test_training_starts_from_released_weights_with_new_rows(at, tmp_path):
    """On a mesh: old rows and all blocks as released, rows of separator and codes as `extend_vocabulary` draws them."""
    config = own_config(at)
    mesh = mesh_lib.make_mesh(config.mesh)
    experiment = train.build(config, mesh)
    shardings = partition.state_shardings(jax.eval_shape(experiment.init, jax.random.key(0)), experiment.rules, mesh)
    fresh = jax.jit(experiment.init, out_shardings=shardings)(jax.random.key(0))
    state = experiment.warm_start(fresh)
    base = BASE.clone(vocab_size=10)
    old = random_params(base, np.zeros((1, 2), np.int32))
    module, want = text_to_code.extend_vocabulary(base, old, jax.random.key(config.seed), WORDS, multiple=2)
    assert module == make_model(config).clone(init_std=module.init_std) and module.vocab_size == 12
    for name, leaf in partition.flatten(state.params).items():
        np.testing.assert_allclose(leaf, partition.flatten(want)[name], atol=1e-6, err_msg=name)
        assert leaf.sharding == partition.flatten(shardings.params)[name]
    np.testing.assert_array_equal(np.asarray(state.params['embed'])[:10], old['embed'])


def test_held_out_loss_is_that_of_the_whole_store_at_the_same_noise(at, tmp_path):
    config = own_config(at)
    config.pretrained, config.eval_every, config.tokenizer = '', 1, str(at / 'llada')
    state = train.train(config, tmp_path / 'run', mesh=mesh_lib.make_mesh({}, jax.devices()[:1]))
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    found = [row['heldout_loss'] for row in rows if 'heldout_loss' in row]
    assert len(found) == 2
    hook = train.build(config, mesh_lib.make_mesh({}, jax.devices()[:1])).hooks(None)[0]
    model, objective = make_model(config), text_to_code.Objective(**config.objective)
    loss = jax.jit(lambda key, batch: text_to_code.loss(model, state.params, key, batch['codes'], batch['captions'],
                                                        batch['caption_mask'], WORDS, objective)[0])
    values = [loss(jax.random.fold_in(jax.random.key(0), i), hook._rows.rows(16 * i, 16 * i + 16)) for i in range(2)]
    assert found[-1] == pytest.approx(np.mean(values), rel=1e-5)
    # The run is loaded without an average, which there is none of.
    model = TextToCode.load(tmp_path / 'run')
    chex.assert_trees_all_equal(model.params, jax.device_get(state.params))


# ---- From text to images ---------------------------------------------------------------------------------------------

draw_codes = jax.jit(text_to_code.sample, static_argnums=(0, 5, 6))


def direct_codes(prompts, count, key, **changes):
    """Row by row, unpadded, with `text_to_code.sample` on the weights as they were made."""
    module = BASE.clone(vocab_size=WORDS.size, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(module, np.zeros((1, 2), np.int32)))
    sampling, out = Sampling(**dict(length=L, remasking='random', temperature=0.2) | changes), []
    for prompt in prompts:
        tokens = np.array([[WORDS_OF_TEXT.index(word) for word in prompt.split()]])
        for k in range(count):
            row = jax.random.fold_in(jax.random.fold_in(key, np.uint32(zlib.crc32(prompt.encode()))), k)
            codes = draw_codes(module, params, row[None], tokens, np.ones(tokens.shape, bool), WORDS, sampling).codes
            out.append(codes[0])
    return np.array(out)


def test_texts_become_images_by_the_published_recipe(at, run, monkeypatch, tmp_path):
    """Prompts of different lengths in one batch: each has the codes that it has alone."""
    seen, draw = {}, Generator.sample
    monkeypatch.setattr(Generator, 'sample', lambda self, key, cond, num, **kw: seen.update(cond=cond) or draw(
        self, key, cond, num, **kw))
    status, error = run(sample, '--text', 'red fox in snow', '--text', 'blue', '--per_text=3', '--llada={at}/llada',
                        '--dit={at}/generator', f'--out={tmp_path}/out', '--seed=4')
    assert status == 0, error
    key = jax.random.split(jax.random.key(4))[0]
    want = direct_codes(['red fox in snow', 'blue'], 3, key)
    np.testing.assert_array_equal(seen['cond'], want)
    assert len(np.unique(want, axis=0)) > 2
    files = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert files == sorted(f'00000{i}.{end}' for i in range(6) for end in ('png', 'txt'))
    assert (tmp_path / 'out' / '000003.txt').read_text() == 'blue\n'
    # Its own settings in place of the published ones, and texts from a file.
    flags = ('--text_steps=4', '--text_temperature=1', '--remasking=low_confidence', '--block_length=4',
             '--text_guidance=0.5')
    status, error = run(sample, '--text_file={at}/texts', '--llada={at}/llada', '--dit={at}/generator',
                        f'--out={tmp_path}/two.npz', f'--save_codes={tmp_path}/codes', '--seed=4', *flags)
    assert status == 0, error
    want = direct_codes(['red fox in blue', 'blue fox in snow'], 1, key, steps=4, temperature=1.0, block_length=4,
                        remasking='low_confidence', guidance=0.5)
    np.testing.assert_array_equal(seen['cond'], want)
    assert np.load(tmp_path / 'two.npz')['arr_0'].shape == (2, 4, 4, 1)
    assert codestore.open_code_store(tmp_path / 'codes').meta['origin'] == 'text'


def test_codes_do_not_depend_on_the_layout(at):
    """Weights and rows over eight devices, or one."""
    model = reading.load(TextToCode, at / 'llada', num_codes=L)
    prompts = ['red fox in snow', 'blue', 'snow']
    got = model.sample(jax.random.key(0), prompts, num_per_prompt=2)
    spread = model._compiled(modules.Unit.of(256, 6), ())
    assert spread.batch_size == 8 * 6 and len(spread._params['embed'].sharding.device_set) == 8
    assert spread._params['blocks']['mlp']['up']['kernel'].addressable_shards[0].data.shape[1] == 32 // 8
    np.testing.assert_array_equal(got, direct_codes(prompts, 2, jax.random.key(0)))


def test_a_text_that_is_given_again_has_codes_of_its_own(at):
    """They are those of more codes of it, in whatever parts the list is sampled."""
    model, key = reading.load(TextToCode, at / 'llada', num_codes=L), jax.random.key(0)
    prompts = ['blue', 'snow', 'blue']
    got = model.sample(key, prompts, num_per_prompt=2)
    blue, snow = direct_codes(['blue'], 4, key), direct_codes(['snow'], 2, key)
    np.testing.assert_array_equal(got, np.concatenate([blue[:2], snow, blue[2:]]))
    assert (got[:2] != got[4:]).any(1).all()
    np.testing.assert_array_equal(model.sample(key, prompts, num_per_prompt=2, part=range(3, 6)), got[3:])


def test_published_settings():
    config = config_files.load(kinds.published_config('llada'))
    assert dict(config.sampler) == dict(steps=0, block_length=0, remasking='random', temperature=0.2, guidance=0.0)
    for codes, shape, objective in (('L512', (512, 256), text_to_code.AUTHORS),
                                    ('L128', (128, 1024), text_to_code.AUTHORS_BEFORE_WEIGHTING)):
        config = text_to_code_llada.get_config(codes)
        assert (config.model.num_codes, config.model.vocab_size) == shape
        assert text_to_code.Objective(**config.objective) == dataclasses.replace(objective, groups=4)
        assert config.batch_size // config.accumulate // config.objective.groups == 4  # images of a GPU


# ---- Bad input -------------------------------------------------------------------------------------------------------

TEXT = ('--llada={at}/llada', '--dit={at}/generator', '--out={at}/new.png')
BAD = {
    'no text model': (sample, ('--text', 'red', *TEXT[1:]), 'give the model .* --text_model=RUN or --llada'),
    'empty text': (sample, ('--text', ' ', *TEXT), '--text: empty'),
    'num': (sample, ('--text', 'red', '--num=3', *TEXT), '--num=3: with texts it is --per_text'),
    'per_text without text': (sample, ('--unconditional', '--per_text=3', *TEXT), '--per_text: only with --text'),
    'no texts': (sample, ('--text_file={at}/empty', *TEXT), 'empty: no text in it'),
    'no file of texts': (sample, ('--text_file={at}/none', *TEXT), 'none: no such file'),
    'too long': (sample, ('--text', 'red ' * 30, *TEXT), '30 tokens, the model has room for 23'),
    'steps': (sample, ('--text', 'red', '--text_steps=9', *TEXT), 'steps=9 is not a multiple'),
    'block': (sample, ('--text', 'red', '--block_length=3', *TEXT), 'block_length=3 does not divide'),
    'temperature': (sample, ('--text', 'red', '--text_temperature=-1', *TEXT), '--text_temperature=-1.0 must not'),
    'before fine-tuning': (sample, ('--text', 'red', '--llada={at}/base', *TEXT[1:]), 'no <.start_sem.>.*train it'),
    'no tokenizer': (sample, ('--text', 'red', '--llada={at}/no_tokenizer', *TEXT[1:]), 'no tokenizer.json there'),
    'other vocabulary': (sample, ('--text', 'red', '--llada={at}/other_v', *TEXT[1:]), 'codes of 8 x 6 .* takes 8 x 4'),
    'rows': (sample, ('--text', 'red', '--llada={at}/too_few_rows', *TEXT[1:]), '9 rows of words; tokenizer and weig'),
    'not a text model': (sample, ('--text', 'red', '--text_model={at}/generator', *TEXT[1:]),
                         "experiment='generator'; give the --workdir of one of 'text_to_code'"),
    'captions damaged': (encode, ('--encoder=x', '--out={at}/new', '--captions={at}/bad.jsonl'), 'bad.jsonl: line 1'),
    'captions absent': (encode, ('--encoder=x', '--out={at}/new', '--captions={at}/none'), 'none: no such file'),
}
CHANGES = {
    'store without captions': ({'data.path': '{at}/bare'}, 'bare: holds codes without captions; encode'),
    'store of other codes': ({'data.path': '{at}/other'}, 'L x V = 6 x 4 but model.num_codes=8'),
    'pretrained absent': (dict(pretrained='{at}/none'), 'none: no (such file|config.json there)'),
    'pretrained of another size': ({'model.width': 64}, 'model.width=64, but pretrained=.*base has 32'),
    'pretrained with other rows': ({'model.text_vocab_size': 8}, '10 rows of words; model.text_vocab_size=8'),
    'tokenizer': ({'words.separator': 6}, 'has 7 tokens before .*words.separator=6'),
    'context': (dict(caption_length=30), 'make 39 tokens; model.max_length=32'),
    'groups': ({'objective.groups': 3}, 'objective.groups=3 does not divide'),
    'objective': ({'objective.masked': 'text'}, "objective.masked='text' is not one of"),
    'sampler': ({'sampler.steps': 9}, 'steps=9 is not a multiple'),
    'held-out store too small': (dict(batch_size=64, eval_every=1), '40 rows, fewer than the 64'),
}


@pytest.fixture
def nothing_computed(monkeypatch):
    def refuse(*unused, **also):
        raise AssertionError('computed something before the error')
    for target, name in ((loop, 'run'), (modules.Batched, '__init__'), (TextToCode, '_compiled')):
        monkeypatch.setattr(target, name, refuse)


@pytest.mark.parametrize('command, arguments, says', BAD.values(), ids=BAD)
def test_one_line_that_names_the_thing(command, arguments, says, at, run, nothing_computed):
    status, said = run(command, *arguments)
    assert status == 2 and len(said.strip().splitlines()) == 1 and re.search(says, said), said
    assert not (at / 'new').exists()


@pytest.mark.parametrize('changes, says', CHANGES.values(), ids=CHANGES)
def test_config_that_does_not_fit_is_named(changes, says, at, nothing_computed):
    config = own_config(at)
    config.update_from_flattened_dict({name: value.format(at=at) if isinstance(value, str) else value
                                       for name, value in changes.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        experiment = train.build(config, mesh_lib.make_mesh(config.mesh))
        experiment.check()
        experiment.open_batches()
        experiment.hooks(None)
