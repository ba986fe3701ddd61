"""The language model of captions, and the fluency of a speaker's English under it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rlhf import translation as configs
from experiments import train
from experiments.rlhf.translation import agent as translation_agent
from experiments.rlhf.translation import data, evaluation, language_model
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import read_metrics
from rlhf_jax.models.lstm import LSTMLanguageModel
from rlhf_jax.tasks.translation import BOS, EOS

SENTENCES = ['the dog sees a cat .', 'a young woman carries the mouse .', 'king']


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(name, **fields):
    config = configs.get_config(f'tiny_{name}').unlock()
    config.update_from_flattened_dict({
        'model.width': 16, 'data.lengths': (20,), 'batch_size': 16, 'num_steps': 60, 'checkpoint_every': 30,
        'log_every': 1, 'evaluation.every': 0, 'evaluation.sentences': 40, 'evaluation.rows': 32} | fields)
    return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('captions') / 'run'
    train.train(config_of('language_model', **{'evaluation.every': 30, 'optimizer.learning_rate.peak': 0.05}), workdir,
                mesh=one_device())
    return workdir


@pytest.fixture(scope='module')
def loaded(trained):
    return language_model.load(trained)


@pytest.mark.parametrize('name', ['speaker', 'listener', 'language_model'])
def test_microbatches_would_be_another_loss(name):
    with pytest.raises(ValueError, match='accumulate=2: losses are means over the tokens of a batch'):
        train.build(config_of(name, accumulate=2), one_device())


def test_a_word_is_predicted_from_those_before_it():
    model, tokens = LSTMLanguageModel(9, width=8), jnp.array([[2, 4, 5, 6, 3], [2, 4, 5, 8, 3]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    logits = np.asarray(jax.jit(model.apply)(params, tokens))
    assert logits.shape == (2, 4, 9)
    np.testing.assert_allclose(logits[0, :3], logits[1, :3], rtol=1e-6)  # the same until the word that differs is read
    assert np.abs(logits[0, 3] - logits[1, 3]).max() > 1e-3


def test_training_says_how_well_it_predicts(trained):
    rows = [row for row in read_metrics(trained / 'metrics.jsonl') if 'nll_en' in row]
    assert [row['step'] for row in rows] == [30, 60] and rows[1]['nll_en'] < rows[0]['nll_en'] - 0.1


def test_fluency_is_the_mean_over_tokens_whatever_the_padding(loaded):
    measure, params = loaded
    by_hand, count = 0.0, 0
    config = config_of('language_model')
    vocabulary, model = data.vocabularies(config, ('en',))['en'], language_model.make_model(config)
    for sentence in SENTENCES:
        ids = [BOS, *vocabulary.encode(sentence.split()), EOS]
        logp = jax.nn.log_softmax(model.apply({'params': params}, jnp.array([ids])))[0]
        by_hand -= sum(float(logp[i, token]) for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
    assert measure(params, SENTENCES) == pytest.approx(by_hand / count, rel=1e-5)
    many = SENTENCES * 20  # two batches, the second of them filled up
    assert measure(params, many) == pytest.approx(by_hand / count, rel=1e-5)
    shuffled = [' '.join(reversed(sentence.split())) for sentence in SENTENCES]
    assert measure(params, shuffled) > measure(params, SENTENCES) + 0.3
    assert np.isfinite(measure(params, ['', 'dog ' * 40]))  # nothing at all, and more than it has seen


def test_a_speakers_english_is_scored(trained, loaded):
    measure, params = loaded
    config = config_of('speaker', **{'evaluation.language_model': str(trained), 'message.max_length': 6})
    model = translation_agent.make_agent(config)
    scores = evaluation.AgentEvaluation(config, model)
    agent = jax.jit(lambda key: translation_agent.init_params(model, key))(jax.random.key(0))
    found = scores(agent)
    assert {'bleu_en', 'nll_en', 'fluency_en'} == set(found)
    assert found['fluency_en'] == pytest.approx(measure(params, scores.translate(agent)['en']))


def test_what_does_not_fit_is_named(trained, tmp_path):
    check = lambda name, workdir: train.build(config_of(name, **{'evaluation.language_model': str(workdir)}),
                                              one_device()).check()
    check('speaker', trained)
    with pytest.raises(ValueError, match='it reads English, and en to de writes none'):
        check('listener', trained)
    with pytest.raises(ValueError, match='no config.json there'):
        check('game', tmp_path)
    other = config_of('speaker')
    other.evaluation.language_model = str(tmp_path / 'speaker')
    train.config_files.save(config_of('speaker'), tmp_path / 'speaker')
    with pytest.raises(ValueError, match="one of 'translation_language_model'"):
        train.build(other, one_device()).check()
