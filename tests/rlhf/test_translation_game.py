"""The translation game as trained experiments: its text, its batches, its losses, and Elastic Reset inside its step."""
import gzip
import importlib
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rlhf import translation as configs
from experiments import evaluate_translation, train
from experiments.rlhf.translation import agent as translation_agent
from experiments.rlhf.translation import data
from experiments.rlhf.translation import evaluation as translation_evaluation
from experiments.rlhf.translation import game as translation_game
from experiments.rlhf.translation.synthetic import rows as synthetic
from experiments.runtime import config_files, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import read_metrics
from experiments.runtime.stream import Share
from rlhf_jax.tasks.translation import BOS, EOS, PAD, UNK

ROOT = pathlib.Path(__file__).resolve().parents[2]


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(name, **fields):
    """A tiny config made tinier: width 16, one shape, short messages."""
    config = configs.get_config(f'tiny_{name}').unlock()
    config.update_from_flattened_dict({
        'model.width': 16, 'data.lengths': (20,), 'message.max_length': 6, 'message.min_length': 2, 'batch_size': 16,
        'num_steps': 8, 'checkpoint_every': 3, 'log_every': 1, 'evaluation.every': 0, 'evaluation.sentences': 40,
        'evaluation.rows': 32} | {name.replace('__', '.'): value for name, value in fields.items()})
    return config


@pytest.fixture(scope='module', autouse=True)
def built_once():
    """One experiment for each config and mesh, so that its step compiles once."""
    built, build = {}, train.build

    def once(config, mesh):
        key = config.to_json(), mesh
        if key not in built:
            built[key] = build(config.copy_and_resolve_references(), mesh)
        return built[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'build', once)
        yield


def agent_config(name):
    return config_of(name, num_steps=60, checkpoint_every=20, evaluation__every=30 * (name == 'speaker'))


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """Work directories of a speaker and a listener."""
    folder = tmp_path_factory.mktemp('pretrained')
    for name in ('speaker', 'listener'):
        train.train(agent_config(name), folder / name, mesh=one_device())
    return {name: str(folder / name) for name in ('speaker', 'listener')}


def game_config(pretrained, **fields):
    """A2C with Elastic Reset and a KL penalty: one program for most tests."""
    return config_of('game', **({'elastic__method': 'elastic_reset', 'elastic__period': 2, 'elastic__tick_every': 3,
                                 'elastic__decay': 0.5, 'kl__coefficient': 0.1} | pretrained | fields))


# ---- Text ----------------------------------------------------------------------------------------------------------

def write_corpus(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        split, language = name.split('_')
        (folder / f'{split}.{language}').write_text(text)
    return str(folder)


def test_generated_sentences():
    assert synthetic(50, (0,)) == synthetic(50, (0,)) != synthetic(50, (1,))
    for row in synthetic(200, (0,)):
        if row['fr'].split()[0] in ("aujourd'hui", 'souvent', 'ici'):  # German inverts
            assert row['de'].split()[1].endswith('t')
        assert row['fr'][-1] == row['en'][-1] == row['de'][-1] == '.'
    assert not {row['en'] for row in synthetic(200, (1,))} <= {row['en'] for row in synthetic(4000, (0,))}


def test_words(tmp_path):
    folder = write_corpus(tmp_path / 'text', train_fr='Un chien.\nUn chat, un chien !\n', train_en='A dog.\nA cat\n',
                          train_de='Ein Hund.\nEine Katze\n')
    config = config_of('speaker', data__path=folder, vocabulary__size=7)
    made = data.vocabularies(config, ('fr', 'en'))
    assert made['fr'].tokens == data.SPECIALS + ('un', 'chien', '!')  # by count, then by the alphabet
    ids = made['fr'].encode(data.tokenize("Un Chien, n'aboie pas!", split=True))
    np.testing.assert_array_equal(ids, [4, 5, UNK, UNK, UNK, 6])
    assert made['fr'].decode([4, PAD, UNK, 9, EOS, 5]) == 'un <unk> <unk>'
    assert data.tokenize("L'homme (à droite) dort.", split=True) == ["l'homme", '(', 'à', 'droite', ')', 'dort', '.']
    assert data.tokenize('Deux @-@ tons .', split=False) == ['deux', '@-@', 'tons', '.']
    config.vocabulary.min_count = 2
    assert data.vocabularies(config, ('fr',))['fr'].tokens == data.SPECIALS + ('un', 'chien')
    assert data.vocabularies(config, ('en',))['en'].checksum != made['en'].checksum


def test_subwords_join_to_the_words_they_came_from():
    config = config_of('speaker', vocabulary__kind='subwords', vocabulary__subwords=90, vocabulary__size=200)
    made = data.vocabularies(config, ('fr', 'en', 'de'))
    for row in synthetic(20, (5,)):
        for language, text in row.items():
            ids = made[language].encode(text.split())
            assert made[language].decode(ids) == text and len(ids) > len(text.split())


def test_files_in_both_forms_are_read_and_sentences_cut(tmp_path):
    folder = write_corpus(tmp_path / 'text', train_fr='un chien dort ici .\nun chat .\n', train_de='ein hund\nzwei\n')
    with gzip.open(tmp_path / 'text' / 'train.en.gz', 'wt') as f:
        f.write('a dog\nA cat.\n')
    config = config_of('speaker', data__path=folder, data__lengths=(4, 5))
    corpus = data.open_corpus(config, 'train', ('fr', 'en'))
    made = data.vocabularies(config, ('fr', 'en'))
    un, chien, dort, chat, dot = (made['fr'].tokens.index(word) for word in ('un', 'chien', 'dort', 'chat', '.'))
    np.testing.assert_array_equal(corpus.tokens['fr'], [[BOS, un, chien, dort, EOS], [BOS, un, chat, dot, EOS]])
    np.testing.assert_array_equal(corpus.lengths['en'], [4, 5])
    assert corpus.words['en'] == ['a dog', 'a cat .'] and corpus.plain['en'] == ['a dog', 'A cat.']


# ---- Batches -------------------------------------------------------------------------------------------------------

def test_shapes_hold_about_as_many_tokens_each():
    config = config_of('speaker', batch_size=20, data__lengths=(12, 16, 24, 50))
    assert data.batch_shapes(config) == [(83, 12), (62, 16), (41, 24), (20, 50)]
    assert data.batch_shapes(config, 8) == [(80, 12), (56, 16), (40, 24), (16, 50)]
    for lengths in ((), (2, 5), (5, 4), (5, 5)):
        config.data.lengths = lengths
        with pytest.raises(ValueError, match='data.lengths='):
            data.batch_shapes(config)


def lengths_corpus(lengths):
    """Row i is all i + 1."""
    lengths = np.asarray(lengths, np.int32)
    tokens = np.where(np.arange(lengths.max()) < lengths[:, None], np.arange(1, len(lengths) + 1)[:, None], 0)
    return data.Corpus({}, {}, {'en': tokens.astype(np.int32), 'fr': tokens.astype(np.int32)},
                       {'en': lengths, 'fr': np.minimum(lengths, 4)})


def test_a_batch_by_hand():
    """Five rows of 3 tokens and one of 6, in batches of 4 x 3 and 2 x 6: one short row must wait for the long one."""
    stream = data.LengthBatches(lengths_corpus([3, 3, 3, 3, 3, 6]), [(4, 3), (2, 6)], seed=0)
    batches = sorted((next(stream) for _ in range(2)), key=lambda batch: batch['en'].shape)
    long, short = batches[0], batches[1]
    assert {name: x.shape for name, x in short.items()} == {'en': (4, 3), 'en_length': (4,), 'fr': (4, 3),
                                                             'fr_length': (4,)}
    assert long['en'].shape == (2, 6)
    ids = [*short['en'][:, 0], *long['en'][:, 0]]
    assert sorted(ids) == [1, 2, 3, 4, 5, 6]  # every row once
    row = list(long['en'][:, 0]).index(6)
    np.testing.assert_array_equal(long['en'][row], [6] * 6)
    np.testing.assert_array_equal(long['en'][1 - row], [long['en'][1 - row, 0]] * 3 + [PAD] * 3)
    assert long['en_length'][row] == 6 and long['fr_length'][row] == 4
    tokens, mask = translation_agent.source(long, 'en')
    assert tokens.shape == (2, 5) and int(mask.sum()) == 5 + 2


def test_epochs_hold_every_row_and_a_position_is_enough():
    rng = np.random.default_rng(0)
    corpus, shapes = lengths_corpus(rng.integers(3, 21, 101)), [(16, 8), (8, 12), (4, 20)]
    stream = data.LengthBatches(corpus, shapes, seed=1)
    epoch = []
    while len({i for batch in epoch for i in batch['en'][:, 0]}) < 101:
        epoch.append(next(stream))
        assert epoch[-1]['en'].shape in shapes and epoch[-1]['en_length'].max() <= epoch[-1]['en'].shape[1]
    assert sum(len(batch['en']) for batch in epoch) < 101 + 4  # only the last batch is filled up
    state, following = stream.get_state(), [next(stream) for _ in range(30)]
    again = data.LengthBatches(corpus, shapes, seed=1)
    again.set_state(json.loads(json.dumps(state)))
    parts = [data.LengthBatches(corpus, shapes, seed=1, share=Share((i,), 2)) for i in range(2)]
    for part in parts:
        part.set_state(state)
    for batch in following:
        np.testing.assert_array_equal(next(again)['en'], batch['en'])
        np.testing.assert_array_equal(np.concatenate([next(part)['en'] for part in parts]), batch['en'])
    assert not all((a['en'].shape == b['en'].shape) and (a['en'] == b['en']).all() for a, b in zip(epoch, following))


# ---- Losses --------------------------------------------------------------------------------------------------------

def padded(batch, columns=0, rows=0):
    """More padding to the right and below; what stands there must not matter."""
    out = {}
    for name, x in batch.items():
        fill = 0 if name.endswith('_length') else UNK
        width = ((0, rows),) + ((0, columns),) * (x.ndim - 1)
        out[name] = np.pad(x, width, constant_values=fill)
    return out


def test_losses_do_not_depend_on_padding(pretrained):
    experiment = train.build(agent_config('speaker'), one_device())
    state, batch = jax.jit(experiment.init)(jax.random.key(0)), next(experiment.open_batches())
    loss = jax.jit(experiment.loss)
    value, metrics = loss(state.params, state, batch, jax.random.key(1))
    more, more_metrics = loss(state.params, state, padded(batch, columns=7, rows=5), jax.random.key(1))
    np.testing.assert_allclose(more, value, rtol=1e-6)
    assert more_metrics['tokens'] == metrics['tokens'] == batch['en_length'].sum() - 16

    game = train.build(game_config(pretrained), one_device())
    state, batch = jax.jit(game.init)(jax.random.key(0)), next(game.open_batches())
    loss = jax.jit(game.loss)
    value, metrics = loss(state.params, state, batch, jax.random.key(1))
    more, more_metrics = loss(state.params, state, padded(batch, columns=3), jax.random.key(1))
    np.testing.assert_allclose(more, value, rtol=1e-6)
    for name, x in metrics.items():
        np.testing.assert_allclose(more_metrics[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_training_lowers_the_loss_and_evaluation_says_so(pretrained):
    for name in ('speaker', 'listener'):
        losses = [row['loss'] for row in read_metrics(f'{pretrained[name]}/metrics.jsonl') if 'loss' in row]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.6
    scores = [row for row in read_metrics(f'{pretrained["speaker"]}/metrics.jsonl') if 'bleu_en' in row]
    assert [row['step'] for row in scores] == [30, 60] and set(scores[0]) == {'step', 'bleu_en', 'nll_en'}
    assert scores[1]['nll_en'] < scores[0]['nll_en']


def stepper(config, mesh=None):
    """The experiment's jitted step, its warm-started state and its stream, on one device."""
    experiment = train.build(config, mesh or one_device())
    if not hasattr(stepper, 'made'):
        stepper.made = {}
    step = stepper.made.setdefault(id(experiment), (jax.jit(experiment.step), experiment))[0]
    state = experiment.warm_start(jax.jit(experiment.init)(jax.random.key(0)))
    return step, state, experiment.open_batches()


def test_a_reset_inside_the_step(pretrained):
    """Period 2 and a tick every 3 steps, so that the reset after step 3 goes to the average as it stood before."""
    step, state, batches = stepper(game_config(pretrained))
    start, pushed = partition.flatten(state.params), []
    for _ in range(3):
        state, metrics = step(state, next(batches))
        pushed.append(float(metrics['kept']))
    assert pushed[:2] == [0, 0] and pushed[2] == pytest.approx(0.5, abs=1e-4)  # one tick of decay 0.5
    before, batch = state, next(batches)
    after, _ = step(before, batch)
    ema, policy = partition.flatten(before.extra['elastic'].ema), partition.flatten(after.params)
    assert set(ema) == {name for name in policy if name.startswith('speaker/') and '/value_' not in name}
    for name, average in ema.items():
        np.testing.assert_array_equal(policy[name], average, err_msg=name)
        np.testing.assert_array_equal(partition.flatten(after.extra['elastic'].ema)[name], start[name], err_msg=name)
        np.testing.assert_array_equal(partition.flatten(after.extra['elastic'].init)[name], start[name], err_msg=name)
    # Another average changes where the speaker goes, and nothing else: not the listener, critic or optimizer.
    other = before.replace(extra=before.extra | {'elastic': before.extra['elastic'].replace(
        ema=jax.tree.map(lambda x: x + 1, before.extra['elastic'].ema))})
    elsewhere, _ = step(other, batch)
    for name, x in partition.flatten(elsewhere.params).items():
        if name in ema:
            np.testing.assert_array_equal(x, ema[name] + 1, err_msg=name)
        else:
            np.testing.assert_array_equal(x, policy[name], err_msg=name)
            moved = (x != partition.flatten(before.params)[name]).any()  # and has been trained
            assert moved != name.startswith('listener/value_'), name
    for name, x in partition.flatten(after.opt_state).items():
        np.testing.assert_array_equal(partition.flatten(elsewhere.opt_state)[name], x, err_msg=name)
    moments = [x for name, x in partition.flatten(after.opt_state).items() if name.endswith('mu/speaker/encoder_w_x')]
    assert len(moments) == 1 and moments[0].any()


def test_the_listener_is_averaged_and_reset_too_where_both_are(pretrained):
    averaged = {}
    for agents in ('speaker', 'both'):
        state = jax.eval_shape(train.build(game_config(pretrained, elastic__agents=agents), one_device()).init,
                               jax.random.key(0))
        averaged[agents] = {*partition.flatten(state.extra['elastic'].ema)}
    every = {name for name in partition.flatten(state.params) if not name.startswith('speaker/value_')}
    assert averaged['both'] == every and averaged['speaker'] == {n for n in every if n.startswith('speaker/')}


def test_kl_is_of_the_initial_speaker(pretrained):
    step, state, batches = stepper(game_config(pretrained))
    found = []
    for _ in range(2):
        state, metrics = step(state, next(batches))
        found.append(metrics)
    assert abs(float(found[0]['kl'])) < 1e-5 < abs(float(found[1]['kl']))
    assert -10 < float(found[0]['reward']) < 0 < float(found[0]['entropy'])
    assert 3 <= float(found[0]['message_length']) <= 7


def test_gumbel_trains_the_speaker_through_the_listener_and_pairs_come_every_second_step(pretrained):
    config = game_config(pretrained, algorithm='gumbel', elastic__method='', pairs__every=2)
    step, state, batches = stepper(config)
    first, metrics = step(state, next(batches))
    # The message's own log-probabilities against those of the same speaker, teacher-forced: EOS barred in both.
    assert abs(float(metrics['kl'])) < 1e-5 and 'policy_loss' not in metrics and float(metrics['ce_pairs']) > 0
    unpaired = first.replace(opt_state=state.opt_state)  # no momentum of the pairs' gradient
    second, metrics = step(unpaired, next(batches))
    assert float(metrics['ce_pairs']) == 0 != float(metrics['kl'])
    for agent in ('speaker', 'listener'):
        for name, x in partition.flatten(second.params[agent]).items():
            moved = bool((x != partition.flatten(first.params[agent])[name]).any())
            assert moved != name.startswith('value_'), (agent, name)


def test_a_relaxed_message_pays_half_the_square_of_its_log_ratios():
    config = game_config({}, algorithm='gumbel', elastic__method='')
    played = translation_game.TranslationGame(config, translation_game.make_method(config))
    state, other = played.init(jax.random.key(0)), played.init_params(jax.random.key(1))['speaker']
    batch = next(train.build(config, one_device()).open_batches())
    source = translation_agent.source(batch, 'fr')

    @jax.jit
    def priced(speaker):
        message = played.send(speaker, source, batch, jax.random.key(2))
        reference = played.score(state.params['speaker'], source, message.tokens)[0]
        return played.speaker_loss(speaker, state, source, message, None)[0], message, reference
    value, message, reference = priced(other)
    d = np.float64(message.logprobs) - np.float64(reference)
    np.testing.assert_allclose(value, .1 * (.5 * d ** 2 * message.drawn).sum(-1).mean(), rtol=1e-4)


def test_streams_side_by_side_have_one_position(pretrained):
    config = game_config(pretrained, pairs__every=1)
    stream, again = (train.build(config, one_device()).open_batches() for _ in range(2))
    batch = next(stream)
    assert {name: x.shape for name, x in batch.items()} == {
        name: x.shape for name, x in train.build(config, one_device()).batch.items()}
    again.set_state(json.loads(json.dumps(stream.get_state())))
    following, same = next(stream), next(again)
    for name, x in following.items():
        np.testing.assert_array_equal(same[name], x, err_msg=name)
        assert (x != batch[name]).any()


def test_a_frozen_speaker_stays_and_the_listener_learns(pretrained):
    config = game_config(pretrained, freeze_speaker=True, elastic__method='', kl__coefficient=0.0)
    config.num_steps = 40
    config.optimizer.learning_rate.peak = 3e-3
    step, state, batches = stepper(config)
    start, ce = state.params, []
    for _ in range(40):
        state, metrics = step(state, next(batches))
        ce.append(float(metrics['ce_de']))
    jax.tree.map(np.testing.assert_array_equal, state.params['speaker'], start['speaker'])
    assert np.mean(ce[-5:]) < np.mean(ce[:5]) - 0.1


# ---- Through the runner --------------------------------------------------------------------------------------------

def played_config(pretrained):
    """With a reset between the checkpoint that a killed run resumes from and its end, after which it is trained on."""
    return game_config(pretrained, elastic__period=7, evaluation__every=4)


@pytest.fixture(scope='module')
def game(pretrained, tmp_path_factory):
    """(work directory, final state) of a game that was played to its end."""
    workdir = tmp_path_factory.mktemp('game') / 'run'
    return workdir, train.train(played_config(pretrained), workdir, mesh=one_device())


class Kill(Exception):
    pass


@pytest.mark.parametrize('kind, at', [('listener', 47), ('game', 7)])
def test_killed_and_resumed_is_bit_identical(kind, at, pretrained, game, tmp_path):
    def kill(step, state, metrics):
        if step == at:
            raise Kill
    if kind == 'game':
        config, (_, whole) = played_config(pretrained), game
    else:
        config = agent_config(kind)
        whole = translation_agent.load_state(pretrained[kind], config, train.build)
    with pytest.raises(Kill):
        train.train(config, tmp_path / 'cut', mesh=one_device(), hooks=[kill])
    resumed = partition.flatten(train.train(config, tmp_path / 'cut', mesh=one_device()))
    assert int(resumed['step']) == config.num_steps
    for name, leaf in partition.flatten(whole).items():
        other = resumed[name]
        if name == 'rng':
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other, err_msg=name)


@pytest.mark.slow
def test_sharded_equals_unsharded(pretrained):
    config, mesh = game_config(pretrained), mesh_lib.make_mesh(dict(fsdp=8))
    step, state, batches = stepper(config)
    _, want = step(state, next(batches))
    experiment = train.build(config, mesh)
    shardings = partition.state_shardings(jax.eval_shape(experiment.init, jax.random.key(0)), experiment.rules, mesh)
    with jax.set_mesh(mesh):
        inputs = shardings, mesh_lib.batch_sharding(mesh)
        state, batch = jax.device_put((state, dict(next(experiment.open_batches()))), (shardings, inputs[1]))
        _, got = jax.jit(experiment.step, in_shardings=inputs)(state, batch)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# ---- Evaluation ----------------------------------------------------------------------------------------------------

def evaluate(monkeypatch, tmp_path, *flags):
    file = tmp_path / 'scores.json'
    monkeypatch.setattr(sys, 'argv', ['evaluate_translation', *map(str, flags), f'--json={file}'])
    evaluate_translation.main()
    return json.loads(file.read_text())


def test_scores_of_a_game_and_of_its_start(pretrained, game, monkeypatch, tmp_path):
    game, _ = game
    rows = [row for row in read_metrics(game / 'metrics.jsonl') if 'bleu_en' in row]
    assert [row['step'] for row in rows] == [4, 8] and set(rows[0]) == {'step', 'bleu_en', 'bleu_de', 'nll_en',
                                                                                   'reward_de'}
    whole = evaluate(monkeypatch, tmp_path, f'--game={game}')
    ends = evaluate(monkeypatch, tmp_path, f'--game={game}', '--interpolate=0,1')
    before = evaluate(monkeypatch, tmp_path, *(f'--{name}={path}' for name, path in pretrained.items()))
    start, end = ends
    assert (start['alpha'], end) == (0.0, {'alpha': 1.0} | whole) and start | {'alpha': 1.0} != end
    assert start['bleu_en'] == before['bleu_en'] and start['nll_en'] == before['nll_en']
    assert 0 < before['nll_en'] < 4
    assert {'bleu_en', 'bleu_de', 'nll_en'} <= set(whole)
    if importlib.util.find_spec('sacrebleu'):
        assert {'sacrebleu_en', 'sacrebleu_de'} <= set(whole)


def test_the_games_english_is_ranked_among_images(game, monkeypatch, tmp_path):
    """On the generated corpus, whose images are made of its sentences."""
    ranker = configs.get_config('tiny_ranker').unlock()
    ranker.update_from_flattened_dict({'model.width': 8, 'num_steps': 1, 'evaluation.every': 0})
    train.train(ranker, tmp_path / 'ranker', mesh=one_device())
    plain = evaluate(monkeypatch, tmp_path, f'--game={game[0]}')
    ranked = evaluate(monkeypatch, tmp_path, f'--game={game[0]}', f'--ranker={tmp_path / "ranker"}')
    assert {name: ranked[name] for name in plain} == plain and 1 <= ranked['image_median_rank'] <= 200
    assert set(ranked) - set(plain) == {'image_recall_1', 'image_recall_5', 'image_recall_10', 'image_median_rank',
                                        'image_first_of_20'}
    with pytest.raises(ValueError, match='are made up, and it has seen others'):
        evaluate(monkeypatch, tmp_path, f'--game={game[0]}', f'--ranker={tmp_path / "ranker"}', '--images=x')


def test_every_sentence_is_translated_by_both_agents_in_turn(pretrained):
    config = game_config(pretrained)
    model = translation_agent.make_agent(config)
    params = {name: translation_agent.load(pretrained[name], name, config) for name in pretrained}
    found = translation_evaluation.GameEvaluation(config, model).translate(params)
    assert len(found['en']) == len(found['de']) == 40  # one batch of 32 and one of 8 that is filled up
    made = data.vocabularies(config, ('fr', 'en', 'de'))
    corpus = data.open_corpus(config, 'val', ('fr', 'en', 'de'), most=40)
    tokens, mask = translation_agent.source({'fr': corpus.tokens['fr'][33:34], 'fr_length':
                                             jnp.asarray(corpus.lengths['fr'][33:34])}, 'fr')
    german = {'de': corpus.tokens['de'][33:34], 'de_length': jnp.asarray(corpus.lengths['de'][33:34])}
    for name, language in (('speaker', 'en'), ('listener', 'de')):
        if name == 'listener':
            logprobs, counted = translation_agent.target_logprobs(model, params[name], (tokens, mask), german, 'de')
            np.testing.assert_allclose(found['reward'][33], (logprobs * counted).sum() / counted.sum(), rtol=1e-5)
        message = model.apply({'params': params[name]}, tokens, mask, max_length=6, min_length=2, method='send')
        assert found[language][33] == made[language].decode(np.asarray(message.tokens[0]).tolist())
        tokens, mask = message.tokens, message.mask
    with pytest.raises(FileNotFoundError, match='no file val.fr'):
        translation_evaluation.GameEvaluation(game_config(pretrained, data__path='nowhere',
                                                          vocabulary__paths=('',)), model)


# ---- Configs and bad input -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [prefix + name for prefix in ('', 'medium_', 'small_', 'tiny_')
                                  for name in configs.CONFIGS])
def test_config_builds_and_shards(name):
    config = config_files.load(f'configs/rlhf/translation.py:{name}')
    mesh = mesh_lib.make_mesh(dict(data=2), jax.devices()[:2])
    experiment = train.build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    partition.state_shardings(state, experiment.rules, mesh)
    if not name.startswith('tiny'):
        jax.eval_shape(experiment.step, state, dict(experiment.batch))


def test_docstring_commands_name_real_files():
    text = configs.__doc__
    for module in re.findall(r'python -m ([\w.]+)', text):
        assert importlib.util.find_spec(module), module
    for path, name in re.findall(r'--config=(configs/[\w/]+\.py):(\w+)', text):
        assert (ROOT / path).is_file() and configs.get_config(name)
    with pytest.raises(ValueError, match="'big_game' is not one of"):
        configs.get_config('big_game')


def no_method(**fields):
    return {'elastic__method': '', 'kl__coefficient': 0.0} | fields


@pytest.mark.parametrize('fields, message', [
    (dict(accumulate=2), 'accumulate=2: losses are means over the tokens of a batch'),
    (dict(elastic__period=9), 'elastic.period=9 is longer than the run of 8 steps'),
    (dict(elastic__method='warp'), "method='warp' is not one of"),
    (dict(elastic__agents='listener'), "elastic.agents='listener' is not one of"),
    (dict(elastic__method='ema_anchor', kl__coefficient=0.0), "elastic.method='ema_anchor' acts through the KL"),
    (dict(freeze_speaker=True), "freeze_speaker leaves 'elastic_reset' nothing"),
    (no_method(kl__coefficient=-1.0), 'kl.coefficient=-1.0 must not be negative'),
    (no_method(algorithm='ppo'), "algorithm='ppo' is not one of"),
    (no_method(message__min_length=7), 'message.min_length=7 must be between'),
    (no_method(loss__temperature=0.0), 'loss.temperature=0.0 must be positive'),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else None)
def test_what_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.build(game_config({}, **fields), one_device())


def test_languages_of_an_agent():
    with pytest.raises(ValueError, match=r"languages=\('de', 'fr'\) is not one of"):
        train.build(config_of('speaker', languages=('de', 'fr')), one_device())


def test_text_that_does_not_fit(tmp_path):
    folder = write_corpus(tmp_path / 'text', train_fr='un\ndeux\n', train_en='one\n', val_fr='un\n')
    stream = lambda **fields: train.build(config_of('speaker', **fields), one_device()).open_batches()
    with pytest.raises(FileNotFoundError, match='data.path=.*no file train.fr'):
        stream(data__path=str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match='different numbers of lines'):
        stream(data__path=folder)
    with pytest.raises(ValueError, match='data.path is empty and the generated corpus has no split'):
        stream(data__train='test')
    with pytest.raises(FileNotFoundError, match='vocabulary: no file train.de'):
        data.vocabularies(config_of('listener', data__path=folder), ('en', 'de'))
    for fields, message in ((dict(vocabulary__kind='bytes'), 'vocabulary.kind'), (dict(vocabulary__size=4), 'size=4')):
        with pytest.raises(ValueError, match=message):
            stream(**fields)


def test_agents_that_do_not_fit(pretrained, tmp_path):
    start = lambda **fields: train.build(game_config(pretrained, **fields), one_device()).check()
    with pytest.raises(ValueError, match='speaker=.*holds a run of translation_agent en to de; give one of'):
        start(speaker=pretrained['listener'])
    with pytest.raises(ValueError, match='no config.json there'):
        start(listener=str(tmp_path))
    with pytest.raises(ValueError, match='speaker=.*was trained with model.width=16, not 8'):
        start(model__width=8)
    other = write_corpus(tmp_path / 'text', **{f'{split}_{language}': f'{language} one\n' for split in ('train', 'val')
                                               for language in ('fr', 'en', 'de')})
    with pytest.raises(ValueError, match='speaker=.*was trained on another fr vocabulary'):
        start(data__path=other)
    with pytest.raises(ValueError, match='pairs.speaker is empty'):
        train.build(game_config(pretrained, data__path=other, pairs__every=1), one_device()).open_batches()


@pytest.mark.parametrize('flags, message', [
    ((), 'give --game, or both'), (('--speaker=a',), 'give --game, or both'),
    (('--speaker=a', '--listener=b', '--interpolate=0'), '--interpolate needs --game'),
    (('--game=a', '--interpolate=x'), '--interpolate=x: numbers with commas between'),
    (('--game=a',), 'a: no config.json there')], ids=str)
def test_flags_that_do_not_add_up(flags, message, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['evaluate_translation', *flags])
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_translation.main()
