"""What surrounds training: the code store with latents, every way to sample, the published scores. Untrained models."""
import functools
import json
import types

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.dlc import quickstart
from dlc_jax.metrics import frechet
from dlc_jax.models.inception import InceptionOutput
from dlc_jax.models.vae import SCALING_FACTOR, AutoencoderKL
from experiments import encode, evaluate, neighbours, sample
from experiments.dlc import code_model, embedding_model, generator
from experiments.dlc.code_model import CodeModel
from experiments.dlc.commands import conditions, sample_flags
from experiments.dlc.commands import features as features_lib
from experiments.dlc.data import codestore, codestore_writer, sources
from experiments.dlc.data.decode import ORIENTATION
from experiments.dlc.embedding_model import EmbeddingModel
from experiments.dlc.encoder import Encoder, make_model
from experiments.dlc.generator import Generator
from experiments.dlc.latents import LatentDecoder
from experiments.dlc.text_to_code import TextToCode
from experiments.runtime import launch, modules, png, steps

NUM = 7


def random_params(module, *args):
    """Random numbers of every parameter's shape: zero-initialised layers would hide what flows through them."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)['params']
    rng = np.random.default_rng(3)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(
        (path[-1].key in ('scale', 'gamma')) + rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope='module')
def encoder():
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.model.patch_size, config.data.global_size, config.data.local_size = 4, 16, 8
    return Encoder(config, random_params(make_model(config), jnp.zeros((1, 16, 16, 1)), jnp.zeros((1, 16), bool)))


@pytest.fixture(scope='module')
def vae():
    module = AutoencoderKL(widths=(8, 8), depth=1, num_groups=4, image_channels=1)
    return LatentDecoder(module, random_params(module, jnp.zeros((1, 16, 16, 1))))


@pytest.fixture(scope='module')
def pictures():
    """The first few digits, as a source without an `images` array, so that they are read one by one."""
    class Few(sources.ImageSource):
        def __init__(self):
            super().__init__(tuple('0123456789'))
            self._digits = sources.digits('train', channels=1, image_size=0, heldout=0.25, seed=0)

        def __len__(self):
            return NUM

        def name(self, i):
            return f'few/{i}'

        def read(self, i):
            return self._digits.read(i)
    return Few()


@functools.lru_cache(maxsize=None)
def make_generator(condition, target='images', **fields):
    config = quickstart.get_config('tiny').generators.code.copy_and_resolve_references()
    config.model.update(dict(condition=condition, input_size=16, patch_size=4) | fields)
    config.data.target, config.sampler.num_steps, config.sampler.guidance = target, 2, 1.5
    spec = generator.condition_spec(config, 1)
    cond = None if spec is None else jnp.zeros(spec.shape, spec.dtype)
    m = config.model
    return Generator(config, random_params(generator.make_model(config), jnp.zeros(
        (1, m.input_size, m.input_size, m.channels)), jnp.zeros(1, jnp.int32), cond))


# ---- Code stores ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def latent_store(encoder, vae, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp('latents') / 'codes'
    encode.encode(encoder, pictures, path, image_size=16, vae=vae, flip=0.5, batch_size=4)
    return codestore.open_code_store(path)


def test_latents_are_one_posterior_sample_of_the_flipped_image(latent_store, encoder, vae, pictures):
    latents = np.asarray(latent_store.array('latents'), np.float32)
    assert latents.shape == (NUM, 8, 8, 4)
    images = np.stack([encoder.transform(pictures[i]['image']) for i in range(NUM)])
    encoded = jax.jit(lambda x: vae.module.apply({'params': vae.params}, x, method='encode'))
    distances = []
    for x in (images, images[:, :, ::-1]):
        mean, logvar = map(np.asarray, encoded(x))
        z = (latents / SCALING_FACTOR - mean) / np.exp(0.5 * logvar)  # of the right image: standard normal
        distances.append(np.abs(z.std((1, 2, 3)) - 1) + np.abs(z.mean((1, 2, 3))))
    assert (np.minimum(*distances) < 0.2).all() and (np.maximum(*distances) > 0.2).sum() > NUM // 2
    assert 0 < np.sum(distances[1] < distances[0]) < NUM
    # The code is that of the image as it is: it says nothing of left and right.
    np.testing.assert_array_equal(latent_store.array('codes'), encoder.encode(images)['codes'])
    assert latent_store.names == [f'few/{i}' for i in range(NUM)]


def test_a_stores_rows_depend_on_the_image_alone(latent_store, encoder, vae, pictures, tmp_path):
    """Not on the batch size, nor on where an interrupted command went on."""
    encode.encode(encoder, pictures, tmp_path / 'codes', image_size=16, vae=vae, flip=0.5, batch_size=3)
    again = codestore.open_code_store(tmp_path / 'codes')
    for name in ('latents', 'codes', 'labels'):
        np.testing.assert_allclose(again.array(name), latent_store.array(name), rtol=2e-3, atol=2e-3, err_msg=name)


def test_worker_processes_are_not_sent_the_encoder(monkeypatch, encoder, pictures, tmp_path):
    """4 GB of parameters for each of 32 of them."""
    class Seen(Exception):
        pass

    def eval_batches(source, transform, batch_size, **kw):
        assert kw['num_workers'] == 5
        assert len(cloudpickle.dumps(transform)) < 10_000
        raise Seen
    monkeypatch.setattr(encode, 'eval_batches', eval_batches)
    with pytest.raises(Seen):
        encode.encode(encoder, pictures, tmp_path / 'codes', image_size=16, num_workers=5)


@pytest.mark.parametrize('change, field', [(dict(flip=0.0), 'flip'), (dict(vae=None), 'stored'), (dict(seed=1), 'seed'),
                                           (dict(image_size=8), 'image_size')])
def test_a_finished_store_of_other_settings_is_not_taken_for_this_one(latent_store, encoder, vae, pictures, change,
                                                                      field):
    settings = dict(image_size=16, vae=vae, flip=0.5) | change
    encode.encode(encoder, pictures, latent_store.path, image_size=16, vae=vae, flip=0.5)  # the same: returns at once
    with pytest.raises(ValueError, match=f'holds a store with {field}='):
        encode.encode(encoder, pictures, latent_store.path, **settings)


def test_codes_are_computed_in_float32_whatever_the_encoder_trained_with(encoder):
    config = encoder.config.copy_and_resolve_references()
    config.model.dtype, config.model.attention_impl = 'bfloat16', 'cudnn'  # which has no float32
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    fast = Encoder(config, encoder.params)
    np.testing.assert_array_equal(fast.encode(images)['sem'], encoder.encode(images)['sem'])
    run = encoder._compiled(modules.Unit(2, 1), None, ('codes',))
    program = run._run.lower(run._params, images).as_text()
    products = [line for line in program.splitlines() if 'dot_general' in line]
    assert products and all('HIGHEST' in line for line in products)


# ---- Samples -------------------------------------------------------------------------------------------------------

def run_sample(monkeypatch, tmp_path, arguments, models, encoder=None, vae=None):
    """`python -m experiments.sample …`, with these models in place of work directories; the images it writes."""
    monkeypatch.setattr(Generator, 'load', lambda path: models)
    monkeypatch.setattr(Encoder, 'load', lambda path: encoder)
    monkeypatch.setattr(LatentDecoder, 'load', lambda path: vae)
    monkeypatch.setattr('sys.argv', ['sample', *arguments, '--generator=x', f'--out={tmp_path}/out.npz'])
    sample.main()
    return np.load(tmp_path / 'out.npz')['arr_0']


def test_latents_are_decoded_to_bytes(monkeypatch, tmp_path, vae):
    model = make_generator('class', 'latents', input_size=8, channels=4, patch_size=4)
    arguments = ['--classes', '1', '2', '--num=5', '--batch_size=4', '--vae=x']
    images = run_sample(monkeypatch, tmp_path, arguments, model, vae=vae)
    assert images.shape == (5, 16, 16, 1) and images.dtype == np.uint8
    _, key = jax.random.split(jax.random.key(0))
    latents = model.sample(key, np.array([1, 2, 1, 2, 1]), 5, batch_size=4)
    decode = jax.jit(lambda z: vae.module.apply({'params': vae.params}, z, method='decode'))
    pixels = decode(latents / SCALING_FACTOR)
    want = np.clip(127.5 * np.asarray(pixels) + 128, 0, 255).astype(np.uint8)
    assert np.abs(images.astype(int) - want).max() <= 1 and want.std() > 1
    with pytest.raises(ValueError, match='--vae=DIR'):
        run_sample(monkeypatch, tmp_path, arguments[:-1], model)


def test_samples_are_those_of_their_row_whatever_the_batches():
    model, key = make_generator('class'), jax.random.key(3)
    cond = np.arange(5, dtype=np.int32)
    whole = model.sample(key, cond, 5, batch_size=8)
    near = dict(rtol=0, atol=1e-5 * np.abs(whole).max())  # the network's random weights make large numbers
    np.testing.assert_allclose(model.sample(key, cond, 5, batch_size=2), whole, **near)
    np.testing.assert_allclose(model.sample(key, cond[:3], 3, batch_size=3), whole[:3], **near)
    assert np.abs(whole[0] - whole[1]).max() > 0.1 and np.abs(
        model.sample(jax.random.key(4), cond, 5, batch_size=8) - whole).max() > 0.1


def test_codes_are_those_of_their_row_whatever_the_batches():
    config = quickstart.get_config('tiny').code_model.copy_and_resolve_references()
    config.sampler.num_steps = 4
    m = config.model
    model = CodeModel(config, random_params(code_model.make_model(config), jnp.zeros((1, m.num_codes), jnp.int32),
                                            jnp.ones(1)))
    for sampler in (dict(name='remasking', window=(0.0, 1.0), eta=0.2), dict(name='first_hitting')):
        whole = model.sample(jax.random.key(3), 5, batch_size=8, **sampler)
        np.testing.assert_array_equal(model.sample(jax.random.key(3), 5, batch_size=2, **sampler), whole)
        np.testing.assert_array_equal(model.sample(jax.random.key(3), 3, batch_size=3, **sampler), whole[:3])
        assert (whole[0] != whole[1]).any()


def write_digits(tmp_path, pictures):
    for i in range(2):
        png.save(tmp_path / f'{i}.png', pictures[i]['image'])
    return [str(tmp_path / f'{i}.png') for i in range(2)]


def test_embedding_generator_samples_from_images_and_their_mean(monkeypatch, tmp_path, encoder, pictures):
    model, paths = make_generator('embedding'), write_digits(tmp_path, pictures)
    seen = []
    real = Generator.sample
    monkeypatch.setattr(Generator, 'sample', lambda self, key, cond, num, **kw: seen.append(cond) or real(
        self, key, cond, num, **kw))
    images = run_sample(monkeypatch, tmp_path, ['--from_images', *paths, '--encoder=x', '--num=3'], model, encoder)
    assert images.shape == (3, 16, 16, 1)
    run_sample(monkeypatch, tmp_path, ['--compose', *paths, '--encoder=x', '--num=2'], model, encoder)
    want = encoder.encode_images([pictures[i]['image'] for i in range(2)])['embeddings']
    np.testing.assert_allclose(seen[0], want[[0, 1, 0]], rtol=1e-5)
    np.testing.assert_allclose(seen[1], np.repeat(want.mean(0, keepdims=True), 2, 0), rtol=1e-5)


def test_embedding_generator_samples_from_drawn_embeddings(monkeypatch, tmp_path):
    model, config = make_generator('embedding'), quickstart.get_config('tiny').embedding_model
    known = {'mean': jnp.arange(32.0), 'std': jnp.full(32, 0.5)}
    network = random_params(embedding_model.make_model(config), jnp.zeros((1, 32)), jnp.zeros(1, jnp.int32))
    drawn = EmbeddingModel(config, {'network': network, 'embeddings': known})
    monkeypatch.setattr(EmbeddingModel, 'load', lambda path, step: drawn)
    seen = []
    monkeypatch.setattr(Generator, 'sample', lambda self, key, cond, num, **kw: seen.append(cond) or np.zeros(
        (num, 16, 16, 1), np.float32))
    arguments = ['--unconditional', '--embedding_model=x', '--num=3', '--embedding_steps=4']
    assert run_sample(monkeypatch, tmp_path, arguments, model).shape == (3, 16, 16, 1)
    code_key, _ = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(seen[0], drawn.sample(code_key, 3, num_steps=4))
    with pytest.raises(ValueError, match='embedding_steps=1 must lie in 2..1000'):
        run_sample(monkeypatch, tmp_path, [*arguments[:-1], '--embedding_steps=1'], model)
    with pytest.raises(ValueError, match='of 32 numbers, but the generator takes 16'):
        run_sample(monkeypatch, tmp_path, arguments, make_generator('embedding', embedding_dim=16))


def test_composed_codes_come_from_their_sources(monkeypatch, tmp_path, encoder, pictures):
    model, paths = make_generator('code'), write_digits(tmp_path, pictures)
    seen = []
    monkeypatch.setattr(Generator, 'sample', lambda self, key, cond, num, **kw: seen.append(cond) or np.zeros(
        (num, 16, 16, 1), np.float32))
    for method in ('average', 'positions'):
        run_sample(monkeypatch, tmp_path, ['--compose', *paths, '--encoder=x', '--num=64', f'--composition={method}',
                                           '--temperature=1e-5'], model, encoder)
    codes = encoder.encode_images([pictures[i]['image'] for i in range(2)])['codes']
    differ = codes[0] != codes[1]
    assert differ.any()
    for composed in seen:
        match = composed[:, None] == codes[None]
        assert match.any(1).all()
        assert 0.3 < match[:, 0, differ].mean() < 0.7


@pytest.mark.parametrize('what', ['--from_images', '--compose'])
def test_images_that_are_named_are_decoded_as_flags_say_and_what_is_lost_is_said(monkeypatch, tmp_path, encoder, caplog,
                                                                                 what):
    exif, seen = Image.Exif(), []
    exif[ORIENTATION] = 6
    Image.fromarray(np.full((8, 16), 9, np.uint8)).save(tmp_path / 'turned.jpg', exif=exif)
    Image.fromarray(np.zeros((8, 16, 4), np.uint8)).save(tmp_path / 'hidden.png')
    encode_images = encoder.encode_images
    spy = types.SimpleNamespace(config=encoder.config, encode_images=lambda images, **kw: seen.extend(images)
                                or encode_images(images, **kw))
    monkeypatch.setattr(Generator, 'sample', lambda self, key, cond, num, **kw: np.zeros((len(cond), 16, 16, 1)))

    def run(*options):
        seen.clear(), caplog.clear(), (tmp_path / 'out.npz').unlink(missing_ok=True)
        run_sample(monkeypatch, tmp_path, [what, *(str(tmp_path / name) for name in ('turned.jpg', 'hidden.png')),
                                           '--num=2', '--encoder=x', *options], make_generator('code'), spy)
        return [x.shape[:2] for x in seen], int(seen[1].max())
    assert run() == ([(8, 16), (8, 16)], 0)
    assert 'turned.jpg) carry an EXIF orientation that is not applied' in caplog.text
    assert 'hidden.png) are transparent in places and lose their alpha' in caplog.text
    assert run('--exif_orientation=apply', '--transparency=white') == ([(16, 8), (8, 16)], 255)
    assert '(the first:' not in caplog.text


def test_saved_codes_are_sampled_by_the_recipe_of_their_origin(monkeypatch, tmp_path, encoder, pictures, latent_store):
    """In two commands as in one; labels of a store as those of --classes."""
    config = quickstart.get_config('tiny').code_model.copy_and_resolve_references()
    m, seen = config.model, {}
    drawing = CodeModel(config, random_params(code_model.make_model(config), jnp.zeros((1, m.num_codes), jnp.int32),
                                              jnp.ones(1)))
    monkeypatch.setattr(CodeModel, 'load', lambda path: drawing)
    monkeypatch.setattr(Generator, 'sample', lambda self, key, cond, num, **kw: seen.update(kw) or np.zeros(
        (len(cond), 16, 16, 1), np.float32))

    def guidance(*arguments, condition='code'):
        model, place = make_generator(condition), tmp_path / str(len(list(tmp_path.iterdir())))
        config = model.config.copy_and_resolve_references().unlock()
        config.recipes = dict(unconditional=dict(guidance=1.7), classes=dict(guidance=3.0))
        place.mkdir()
        seen.clear()
        run_sample(monkeypatch, place, arguments, Generator(config, model.params), encoder)
        return seen.get('guidance')

    paths = write_digits(tmp_path, pictures)
    for arguments, want in ((['--from_images', *paths, '--encoder=x'], None),
                            (['--compose', *paths, '--encoder=x'], None),
                            (['--unconditional', '--code_model=x', '--num=2', '--code_steps=2'], 1.7)):
        codes, copy = (str(tmp_path / f'{arguments[0]}{name}') for name in ('', '_copy'))
        assert guidance(*arguments, f'--save_codes={codes}') == want
        assert guidance(f'--codes={codes}', f'--save_codes={copy}') == guidance(f'--codes={copy}') == want
        meta = json.loads((tmp_path / arguments[0] / 'meta.json').read_text())
        del meta['origin']  # a store of before: still there, and taken for drawn
        (tmp_path / arguments[0] / 'meta.json').write_text(json.dumps(meta))
        assert guidance(*arguments, f'--save_codes={codes}') == want and guidance(f'--codes={codes}') == 1.7
    assert guidance(f'--codes={latent_store.path}') is None  # of encode
    for arguments in ([f'--codes={latent_store.path}'], ['--classes', '1']):
        assert guidance(*arguments, condition='class') == 3.0


@pytest.mark.parametrize('condition, arguments, cls', [
    ('code', ['--unconditional', '--code_model=x'], CodeModel),
    ('code', ['--from_images', 'a.png', '--encoder=x'], Encoder),
    ('code', ['--text=a', '--text_model=x'], TextToCode),
    ('embedding', ['--unconditional', '--embedding_model=x'], EmbeddingModel)])
def test_processes_of_a_job_take_the_step_that_the_first_finds(monkeypatch, condition, arguments, cls):
    """Of a model beside the generator too, whose run may still be training."""
    def load(path, step=None, **settings):
        raise InterruptedError(f'step {step}')
    monkeypatch.setattr(cls, 'load', load)
    monkeypatch.setattr(steps.processes, 'agreed', lambda value: 7)
    monkeypatch.setattr('sys.argv', ['sample', *arguments, '--generator=x', '--out=x.png'])
    args, _ = launch.parse(sample_flags.parser(''))
    for alone, step in ((True, None), (False, 7)):
        monkeypatch.setattr(steps.processes, 'alone', lambda alone=alone: alone)
        with pytest.raises(InterruptedError, match=f'step {step}'):
            conditions.conditions_of(args, make_generator(condition), args.text or (), jax.random.key(0), None)


@pytest.mark.parametrize('condition, arguments, match', [
    ('class', ['--unconditional'], 'use --classes'), ('embedding', ['--unconditional'], 'use --from_images'),
    ('code', ['--unconditional', '--embedding_model=x'], "conditioned on 'code', not on embeddings"),
    ('embedding', ['--from_images', 'a.png', '--encoder=x', '--embedding_model=x'], 'only with --unconditional'),
    ('embedding', ['--unconditional', '--embedding_steps=4'], 'only with --embedding_model'),
    ('class', ['--classes', '1', '--transparency=white'], '--transparency: only with --from_images or --compose'),
    ('code', ['--unconditional'], '--code_model=RUN'), ('code', ['--from_images', 'a.png'], '--encoder=RUN'),
    ('code', ['--compose', 'a.png', '--encoder=x'], 'two images'),
    ('code', ['--classes', '1'], "conditioned on 'code'"),
    ('class', ['--classes', '10'], 'outside 0..9'), ('none', ['--unconditional', '--vae=x'], 'leave --vae out')])
def test_what_does_not_fit_the_generator_is_named(monkeypatch, tmp_path, encoder, condition, arguments, match):
    with pytest.raises(ValueError, match=match):
        run_sample(monkeypatch, tmp_path, arguments, make_generator(condition), encoder)


# ---- Scores --------------------------------------------------------------------------------------------------------

def features(seed, num, shift=0.0):
    rng = np.random.default_rng(seed)
    draw = lambda width: rng.normal(shift, 1, (num, width))
    return InceptionOutput(draw(6), draw(4), draw(5), draw(5))


def test_published_fid_is_against_the_reference_files_statistics(tmp_path):
    """The ADM suite's file holds 10 000 images for precision and recall, and statistics of the whole training set."""
    ours, theirs, everything = features(0, 60), features(1, 40, 3.0), features(2, 500, 1.0)
    pool, spatial = frechet.statistics(everything.pool), frechet.statistics(everything.spatial)
    np.savez(tmp_path / 'reference.npz', arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=pool.mean, sigma=pool.covariance,
             mu_s=spatial.mean, sigma_s=spatial.covariance)
    scores = evaluate.inception_scores(ours, theirs, evaluate.load_statistics(str(tmp_path / 'reference.npz')))
    assert scores['fid'] == pytest.approx(frechet.frechet_distance(frechet.statistics(ours.pool), pool))
    assert scores['sfid'] == pytest.approx(frechet.frechet_distance(frechet.statistics(ours.spatial), spatial))
    plain = evaluate.inception_scores(ours, theirs, {})
    assert plain['fid'] == pytest.approx(
        frechet.frechet_distance(frechet.statistics(ours.pool), frechet.statistics(theirs.pool)))
    assert plain['fid'] > 2 * scores['fid'] and plain['precision'] == scores['precision']
    np.savez(tmp_path / 'images.npz', arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert evaluate.load_statistics(str(tmp_path / 'images.npz')) == {}


def test_an_encoder_may_be_the_feature_space(monkeypatch, tmp_path, encoder, pictures, capsys):
    images = np.stack([pictures[i]['image'] for i in range(NUM)])
    images = np.repeat(np.repeat(images, 2, 1), 2, 2)
    np.savez(tmp_path / 'x.npz', arr_0=images[:5])
    np.savez(tmp_path / 'y.npz', arr_0=images)
    monkeypatch.setattr(Encoder, 'load', lambda path: encoder)

    def measure(*arguments):
        monkeypatch.setattr('sys.argv', ['evaluate', f'--samples={tmp_path}/x.npz', '--dinov2=x', *arguments])
        evaluate.main()
        return json.loads(capsys.readouterr().out)['dinov2']
    seen = encoder.encode_images(list(images))['embeddings']
    want = frechet.frechet_distance(frechet.statistics(seen[:5]), frechet.statistics(seen))
    scores = measure(f'--reference={tmp_path}/y.npz')
    assert scores['frechet'] == pytest.approx(want, rel=1e-4) and want > 0
    assert measure() == {'vendi': scores['vendi']} and 1 < scores['vendi'] < 5  # which needs no reference


def test_an_interrupted_measurement_goes_on(monkeypatch, tmp_path, encoder, capsys):
    """It repeats no block that was finished, and ends as one that nobody disturbed; what was seen of other images is
    not taken for these."""
    rng = np.random.default_rng(0)
    for name, num in (('x', 80), ('y', 40), ('others', 80)):
        np.savez(tmp_path / f'{name}.npz', arr_0=rng.integers(0, 256, (num, 16, 16, 1), np.uint8))
    monkeypatch.setattr(Encoder, 'load', lambda path: encoder)
    monkeypatch.setattr(features_lib, 'BLOCK', 1)
    prepared, looked_at, scores = features_lib._prepared, [], tmp_path / 'scores.json'

    def measure(samples='x', *, json_file=scores, dies_at=None):
        def prepare(transform, images, channels):
            looked_at.append(len(images))
            if len(looked_at) == dies_at:
                raise RuntimeError('killed')
            return prepared(transform, images, channels)
        looked_at.clear()
        monkeypatch.setattr(features_lib, '_prepared', prepare)
        arguments = [f'--json={json_file}'] if json_file else []
        monkeypatch.setattr('sys.argv', ['evaluate', f'--samples={tmp_path}/{samples}.npz', '--dinov2=x',
                                         f'--reference={tmp_path}/y.npz', '--batch_size=4', *arguments])
        evaluate.main()
        return json.loads(capsys.readouterr().out)

    size, kept = 4 * len(jax.local_devices()), tmp_path / 'scores.json.partial'
    whole = measure(json_file=None)
    blocks = [*looked_at]
    assert blocks[0] == size and sum(blocks) == 120
    with pytest.raises(RuntimeError, match='killed'):
        measure(dies_at=2)
    progress, = kept.rglob('progress.json')
    assert json.loads(progress.read_text())['done'] == size and not scores.exists()
    with pytest.raises(RuntimeError, match='killed'):
        measure('others', dies_at=2)
    assert len(list(kept.rglob('progress.json'))) == 2
    assert measure() == whole == json.loads(scores.read_text()) and looked_at == blocks[1:]
    assert not kept.exists()

    with pytest.raises(RuntimeError, match='killed'):
        measure(dies_at=len(blocks))  # in the reference
    assert measure('others') != whole
    assert len(looked_at) < len(blocks)  # the reference is the same
    with pytest.raises(RuntimeError, match='killed'):
        measure(dies_at=2)
    next(kept.rglob('progress.json')).write_text('{')
    with pytest.raises(OSError, match='progress.json: damaged .*; delete .*scores.json.partial/samples/dinov2-'):
        measure()


def test_samples_and_what_they_are_nearest_to(monkeypatch, tmp_path, encoder, pictures, capsys):
    images = np.stack([pictures[i]['image'] for i in range(NUM)])
    np.savez(tmp_path / 'train.npz', arr_0=images)
    np.savez(tmp_path / 'copies.npz', arr_0=images[[4, 2]])
    np.savez(tmp_path / 'heldout.npz', arr_0=255 - images)
    monkeypatch.setattr(Encoder, 'load', lambda path: encoder)
    for features in ([], ['--dinov2=x']):
        monkeypatch.setattr('sys.argv', [
            'neighbours', '--samples', f'{tmp_path}/copies.npz', f'--among={tmp_path}/train.npz', '--k=3', *features,
            f'--heldout={tmp_path}/heldout.npz', f'--out={tmp_path}/near.png'])
        neighbours.main()
        found = json.loads((tmp_path / 'near.json').read_text())
        assert [row[0] for row in found['rows']] == [4, 2]
        assert all(row == sorted(row) for row in found['distances']) and np.shape(found['rows']) == (2, 3)
        assert found['median_nearest'] < 1e-3 < found['median_nearest_heldout']
    flat = images.reshape(NUM, -1).astype(float)
    distances = np.sqrt(((flat[4] - flat) ** 2).mean(1))
    pixels = neighbours.neighbours(neighbours.pixels(images[[4]]), neighbours.pixels(images), 3)
    assert pixels['rows'][0].tolist() == np.argsort(distances)[:3].tolist()
    np.testing.assert_allclose(pixels['distances'][0], np.sort(distances)[:3], atol=1e-4)
    for arguments, match in ((['--k=9'], '--k=9: .*holds 7 images'), (['--out=x.jpg'], 'end it in .png')):
        monkeypatch.setattr('sys.argv', ['neighbours', f'--samples={tmp_path}/copies.npz', f'--out={tmp_path}/x.png',
                                         f'--among={tmp_path}/train.npz', *arguments])
        with pytest.raises(ValueError, match=match):
            neighbours.main()


def test_codes_without_embeddings_are_probed_alone(monkeypatch, tmp_path, capsys):
    """Imported codes (`experiments.import_codes`) have none."""
    rng = np.random.default_rng(0)
    for name, num in (('train', 60), ('heldout', 30)):
        with codestore_writer.writer(tmp_path / name, num=num, meta=dict(num_codes=4, vocab_size=8)) as store:
            store.append({'codes': rng.integers(0, 8, (num, 4)), 'labels': (np.arange(num) % 3).astype(np.int32)},
                         names=[str(i) for i in range(num)])
    monkeypatch.setattr(evaluate.evaluation.probes, 'linear_probe_accuracy', lambda *args, **settings: 0.5)
    monkeypatch.setattr('sys.argv', ['evaluate', f'--train={tmp_path}/train', f'--heldout={tmp_path}/heldout'])
    evaluate.main()
    out = json.loads(capsys.readouterr().out)
    assert out['representation'].keys() == {'codes'} and out['representation']['codes']['linear'] == 0.5


def test_representation_leaves_images_on_disk(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, num in (('train', 60), ('heldout', 30)):
        labels = np.arange(num) % 3
        with codestore_writer.writer(tmp_path / name, num=num, meta=dict(num_codes=4, vocab_size=8)) as store:
            store.append({'codes': np.minimum(labels[:, None] * 2 + rng.integers(0, 2, (num, 4)), 7),
                          'embeddings': rng.normal(size=(num, 5)).astype(np.float32), 'labels': labels.astype(np.int32),
                          'images': np.zeros((num, 4, 4, 1), np.uint8)}, names=[str(i) for i in range(num)])
    read = codestore.CodeStore.array

    def array(self, name):
        assert name != 'images', 'of ImageNet these are 250 GB'
        return read(self, name)
    real = evaluate.evaluation.representation

    def representation(train, heldout, num_classes, vocab_size, *, probe, get):
        return [len(train['labels']), len(heldout['embeddings']), num_classes, vocab_size, probe]
    monkeypatch.setattr(codestore.CodeStore, 'array', array)
    monkeypatch.setattr(evaluate.evaluation, 'representation', representation)

    def measure(*arguments):
        monkeypatch.setattr('sys.argv', ['evaluate', f'--train={tmp_path}/train', f'--heldout={tmp_path}/heldout',
                                         *arguments])
        evaluate.main()
        return json.loads(capsys.readouterr().out)
    out = measure('--probe=sgd')
    assert out['representation'] == [60, 30, 3, 8, 'sgd'] and set(out['codes']) == {'train', 'heldout'}

    # Interrupted, it measures what is missing.
    monkeypatch.setattr(evaluate.evaluation, 'representation', real)
    scores, fitted, dies_at = tmp_path / 'scores.json', [], [2]

    def fit(*args, method, **settings):
        fitted.append(method)
        if len(fitted) in dies_at:
            raise KeyboardInterrupt
        return len(fitted) / 7
    monkeypatch.setattr(evaluate.evaluation.probes, 'linear_probe_accuracy', fit)
    with pytest.raises(KeyboardInterrupt):
        measure(f'--json={scores}')
    out = measure(f'--json={scores}')
    assert fitted == ['lbfgs'] * 3 and [out['representation'][view]['linear'] for view in ('codes', 'embedding')] == [
        1 / 7, 3 / 7]
    assert json.loads(scores.read_text()) == out and not (tmp_path / 'scores.json.partial').exists()
    dies_at[:] = [5]
    with pytest.raises(KeyboardInterrupt):
        measure(f'--json={scores}')
    measure('--probe=sgd', f'--json={scores}')
    assert fitted[5:] == ['sgd'] * 2  # which does not take an accuracy of the other
