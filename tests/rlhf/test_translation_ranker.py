"""The ranker of images by captions, and what a speaker's English says of its image under it."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rlhf import translation as configs
from experiments import train
from experiments.rlhf.translation import agent as translation_agent
from experiments.rlhf.translation import data, evaluation, images, ranker, synthetic
from experiments.runtime import config_files
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import read_metrics
from rlhf_jax.losses.ranking import hardest_negatives
from rlhf_jax.models.image_ranker import ImageRanker

PLACES = ('garden', 'beach', 'bridge', 'station', 'street', 'river', 'kitchen', 'roof', 'field', 'harbour')
ANIMALS = ('dog', 'cat', 'cow', 'horse', 'mouse', 'sheep', 'goat', 'duck', 'hen', 'pig')


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(name, **fields):
    config = configs.get_config(f'tiny_{name}').unlock()
    config.update_from_flattened_dict({
        'model.width': 32, 'data.lengths': (12,), 'batch_size': 50, 'num_steps': 80, 'checkpoint_every': 80,
        'log_every': 20, 'evaluation.every': 0, 'evaluation.sentences': 0, 'evaluation.rows': 32} | fields)
    return config


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Folder of 100 captions, each of its own image, the same for both splits, and the features of these images."""
    folder = tmp_path_factory.mktemp('captions')
    lines = [f'a {animal} near the {place} .' for animal in ANIMALS for place in PLACES]
    for split in ('train', 'val'):
        (folder / f'{split}.en').write_text('\n'.join(lines) + '\n')
        (folder / f'{split}.fr').write_text('\n'.join(lines) + '\n')
        np.save(folder / f'{split}.npy', synthetic.images(lines, 24).astype(np.float16))
    return folder


@pytest.fixture(scope='module')
def trained(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('ranker') / 'run'
    config = config_of('ranker', **{'data.path': str(corpus), 'model.features': 24, 'evaluation.every': 40,
                                    'optimizer.learning_rate.peak': 2e-2, 'optimizer.clip_norm': 1.0})
    train.train(config, workdir, mesh=one_device())
    return workdir


def loaded(trained, corpus, split='val', folder=''):
    return ranker.load(trained, data.read(str(corpus), split, ('en',))['en'], split, str(folder), made_up=False)


# ---- Loss, model, ranks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('margin', [0.0, 0.3])
def test_the_loss_by_hand(margin):
    scores = np.random.default_rng(0).normal(0, 0.5, (5, 5)).astype(np.float32)
    total = first = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        total += max(max(margin + scores[i, j] - scores[i, i], 0) for j in others)
        total += max(max(margin + scores[j, i] - scores[i, i], 0) for j in others)
        first += all(scores[j, i] < scores[i, i] for j in others)
    loss, metrics = hardest_negatives(jnp.asarray(scores), margin=margin)
    assert loss == pytest.approx(total / 5, rel=1e-6) and metrics['first'] == pytest.approx(first / 5)
    apart = jnp.eye(5) * 2  # each pair ahead of all others by more than the margin
    assert hardest_negatives(apart, margin=margin)[0] == 0
    assert hardest_negatives(jnp.zeros((5, 5)), margin=margin)[0] == pytest.approx(2 * margin)


def test_sentences_do_not_depend_on_their_padding():
    model = ImageRanker(9, embedding=4, width=6, features=5)
    tokens, lengths = jnp.array([[4, 5, 3, 0, 0], [6, 7, 8, 5, 3]]), jnp.array([3, 5])
    features = jax.random.normal(jax.random.key(1), (2, 5))
    params = jax.jit(model.init)(jax.random.key(0), tokens, lengths, features)
    both = model.apply(params, tokens, lengths, method='sentences')
    alone = model.apply(params, tokens[:1, :3], lengths[:1], method='sentences')
    np.testing.assert_allclose(both[:1], alone, atol=1e-6)
    found = model.apply(params, features, method='images')
    np.testing.assert_allclose(np.linalg.norm([*both, *found], axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.apply(params, tokens, lengths, features), found @ both.T, atol=1e-6)


def test_ranks_and_what_is_read_from_them():
    rng = np.random.default_rng(0)
    sentences, of_images = rng.normal(size=(2, 7, 3)).astype(np.float32)
    scores = sentences @ of_images.T
    found = images.ranks(sentences, of_images, rows=3)
    assert list(found) == [1 + sum(scores[i, j] >= scores[i, i] for j in range(7) if j != i) for i in range(7)]
    same = np.ones((7, 3), np.float32)
    assert list(images.ranks(same, same)) == [7] * 7  # nothing is told apart
    assert list(images.ranks(np.full((7, 3), np.nan), same)) == [7] * 7
    found = images.measures(np.array([1, 1, 2, 6, 11, 12, 4, 3, 9, 10, 12, 7]))
    assert {name: found[name] for name in list(found)[:4]} == pytest.approx({
        'image_recall_1': 2 / 12, 'image_recall_5': 5 / 12, 'image_recall_10': 9 / 12, 'image_median_rank': 6.5})


def test_the_published_measure_is_the_mean_over_all_draws(monkeypatch):
    """Of distractors drawn with replacement from all images, the right one included, which does not beat itself."""
    monkeypatch.setattr(images, 'DISTRACTORS', 2)
    of_images = np.array([1, 3, 4, 2])
    draws = list(itertools.product(range(4), repeat=2))  # image i is the one at rank i + 1
    expected = np.mean([[all(i >= rank - 1 for i in draw) for draw in draws] for rank in of_images])
    assert images.measures(of_images)['image_first_of_3'] == pytest.approx(expected)


# ---- Runs ------------------------------------------------------------------------------------------------------------

def test_captions_find_their_images_and_shuffled_ones_do_not(trained, corpus):
    rows = [row for row in read_metrics(trained / 'metrics.jsonl') if 'image_recall_1' in row]
    assert [row['step'] for row in rows] == [40, 80] and rows[1]['image_recall_1'] > 0.5
    measure, params = loaded(trained, corpus)
    captions = data.read(str(corpus), 'val', ('en',))['en']
    found = measure(params, captions)
    assert found == {name: rows[1][name] for name in found}
    order = np.random.default_rng(0).permutation(100)
    shuffled = measure(params, [captions[i] for i in order])
    assert shuffled['image_recall_10'] < 0.25 and 30 < shuffled['image_median_rank'] < 70  # chance: 0.1 and 50
    assert shuffled['image_first_of_20'] < 0.2 < 0.8 < found['image_first_of_20']  # chance: 0.05
    less = [caption.split(' near')[0] for caption in captions]  # the animal alone leaves ten images
    assert found['image_recall_1'] > measure(params, less)['image_recall_1'] + 0.3
    assert np.isfinite(list(measure(params, [''] * 100).values())).all()


def test_batches_hand_out_each_captions_image(corpus):
    config = config_of('ranker', **{'data.path': str(corpus), 'model.features': 24, 'batch_size': 20})
    of_words = {tuple(tokens): image for tokens, image in zip(
        data.open_corpus(config, 'train', ('en',)).tokens['en'], np.load(corpus / 'train.npy').astype(np.float32))}
    batch = next(iter(train.build(config, one_device()).open_batches()))
    assert batch['image'].dtype == np.float32 and batch['image'].shape == (20, 24)
    for tokens, image in zip(batch['en'], batch['image']):
        np.testing.assert_array_equal(image, of_words[tuple(tokens)])


def test_a_speakers_english_is_ranked(trained, corpus):
    config = config_of('speaker', **{'data.path': str(corpus), 'evaluation.ranker': str(trained),
                                     'vocabulary.paths': ('', str(corpus)), 'message.max_length': 6})
    model = translation_agent.make_agent(config)
    scores = evaluation.AgentEvaluation(config, model)
    agent = jax.jit(lambda key: translation_agent.init_params(model, key))(jax.random.key(0))
    found = scores(agent)
    measure, params = loaded(trained, corpus)
    expected = measure(params, scores.translate(agent)['en'])
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {'bleu_en', 'nll_en', *expected} and found['image_recall_1'] < 0.1


# ---- Bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, written, message', [
    ('missing', None, r'images: no file .*val.npy; write the features'),
    ('rows', np.ones((99, 24), np.float32), r'val.npy has 99 rows and val.en 100 lines; give one row for each line'),
    ('width', np.ones((100, 8), np.float32), r'val.npy has 8 features a row, model.features=24; set it to 8'),
    ('whole numbers', np.ones((100, 24), int), r'val.npy holds int64 \(100, 24\); expected floating-point features'),
    ('shape', np.ones((100, 24, 1), np.float32), r'val.npy holds float32 \(100, 24, 1\); expected'),
    ('nan', np.where(np.arange(100)[:, None] == 7, np.nan, np.ones((100, 24))), r'images: row 7 of .*val.npy is not'),
    ('objects', np.array([[None]]), r'val.npy is no .npy file of numbers'),
    ('text', 'a dog', r'val.npy is no .npy file of numbers'),
], ids=lambda x: x if isinstance(x, str) and len(x) < 20 else '')
def test_features_that_do_not_fit(name, written, message, corpus, trained, tmp_path):
    if isinstance(written, str):
        (tmp_path / 'val.npy').write_text(written)
    elif written is not None:
        np.save(tmp_path / 'val.npy', written)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loaded(trained, corpus, folder=tmp_path)


def test_a_run_looks_at_its_features_before_it_is_compiled(corpus, tmp_path):
    for split in ('train', 'val'):
        np.save(tmp_path / f'{split}.npy', np.ones((100 if split == 'train' else 5, 24), np.float32))
    fields = {'data.path': str(corpus), 'model.features': 24, 'images': str(tmp_path)}
    check = lambda **more: train.build(config_of('ranker', **fields | more), one_device()).check()
    check()
    with pytest.raises(ValueError, match='val.npy has 5 rows'):
        check(**{'evaluation.every': 10})
    with pytest.raises(ValueError, match='accumulate=2: the rivals of an image'):
        check(accumulate=2)
    with pytest.raises(ValueError, match='loss.margin=-0.1 must not be negative'):
        check(**{'loss.margin': -0.1})


def test_rankers_that_do_not_fit(trained, corpus, tmp_path):
    check = lambda name, **fields: train.build(config_of(name, **fields), one_device()).check()
    text = {'data.path': str(corpus), 'vocabulary.paths': ('', str(corpus))}
    check('speaker', **text | {'evaluation.ranker': str(trained)})
    with pytest.raises(ValueError, match='evaluation.ranker=.*it reads English, and en to de writes none'):
        check('listener', **text | {'evaluation.ranker': str(trained)})
    with pytest.raises(ValueError, match="images of the generated corpus .data.path=''. are made up"):
        check('speaker', **{'evaluation.ranker': str(trained)})
    with pytest.raises(ValueError, match='evaluation.images=x: features are for a ranker; name one'):
        check('speaker', **text | {'evaluation.images': 'x'})
    with pytest.raises(ValueError, match='no config.json there'):
        check('speaker', **text | {'evaluation.ranker': str(tmp_path)})
    config_files.save(config_of('ranker'), tmp_path / 'made_up')
    with pytest.raises(ValueError, match='it has seen the made-up images of the generated corpus'):
        check('speaker', **text | {'evaluation.ranker': str(tmp_path / 'made_up')})
