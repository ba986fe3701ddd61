"""The translation game: two agents pretrained on pairs, then played on French and German alone.

    # from nothing, on sentences of a small grammar
    python -m experiments.train --config=configs/rlhf/translation.py:tiny_speaker --workdir=runs/tiny/speaker
    python -m experiments.train --config=configs/rlhf/translation.py:tiny_listener --workdir=runs/tiny/listener
    python -m experiments.train --config=configs/rlhf/translation.py:tiny_game --workdir=runs/tiny/game \\
        --config.speaker=runs/tiny/speaker --config.listener=runs/tiny/listener

    # Multi30k on a CPU: DATA holds train.fr.gz, train.en.gz, train.de.gz, val.fr.gz, ... as its task1/raw does. Agents
    # that know all of it have nothing to learn from playing on it, so they are pretrained on some and play on the rest
    mkdir pairs played
    for l in fr en de; do
      zcat DATA/train.$l.gz | head -n 8000 > pairs/train.$l; zcat DATA/train.$l.gz | tail -n +8001 > played/train.$l
      zcat DATA/val.$l.gz | tee pairs/val.$l > played/val.$l
    done
    python -m experiments.train --config=configs/rlhf/translation.py:small_speaker --workdir=runs/small/speaker \\
        --config.data.path=pairs --config.vocabulary.paths="('DATA',)"
    python -m experiments.train --config=configs/rlhf/translation.py:small_listener --workdir=runs/small/listener \\
        --config.data.path=pairs --config.vocabulary.paths="('DATA',)"
    python -m experiments.train --config=configs/rlhf/translation.py:small_game --workdir=runs/small/elastic \\
        --config.data.path=played --config.vocabulary.paths="('DATA',)" --config.speaker=runs/small/speaker \\
        --config.listener=runs/small/listener --config.elastic.method=elastic_reset
    python -m experiments.evaluate_translation --game=runs/small/elastic
    # fluency of the English, by a language model of captions (English text of any folder)
    python -m experiments.train --config=configs/rlhf/translation.py:small_language_model \\
        --workdir=runs/small/captions --config.data.path=DATA
    python -m experiments.evaluate_translation --game=runs/small/elastic --language_model=runs/small/captions
    # five seeds (docs/papers.md): reward -2.597 +- 0.093 and English BLEU 20.7 +- 4.9 for the plain game, -2.522 +-
    # 0.014 and 27.0 +- 3.2 for Elastic Reset before a reset, -2.5031 +- 0.0098 and 34.05 +- 0.40 for a KL price of 0.1
    # larger, on one GPU: medium_ in the place of small_
    # how well the English finds its image: IMAGES holds train.npy and val.npy, a row of features for each line of DATA
    python -m experiments.train --config=configs/rlhf/translation.py:small_ranker --workdir=runs/small/ranker \\
        --config.data.path=DATA --config.images=IMAGES
    python -m experiments.evaluate_translation --game=runs/small/elastic --ranker=runs/small/ranker

`speaker`, `listener`, `game` and `game_gumbel` have the published sizes and rates (of arXiv 2003.12694's code, which
Elastic Reset's game descends from; its own period, decay and number of steps were not published). The speaker and the
listener learn on IWSLT and the game on Multi30k, with one vocabulary: give all three runs the same
`--config.vocabulary.paths="('MULTI30K', 'IWSLT_FR_EN', 'IWSLT_EN_DE')"`.

Unlike the published code: a batch has 40 pairs (20 in the game), not as many as make 2000 (1024) tokens; losses do not
depend on padding; the clipping of the pretraining, which came before its gradients and did nothing, is left out;
subwords are learnt on training text alone; German words come from every path; learning rates do decay; a message is not
cut to the length of the reference unless `message.reference_length` says so.
"""
import ml_collections

from configs.parts import adamw, check_name, runner, schedule

ConfigDict = ml_collections.ConfigDict
PAIRS = {'speaker': ('fr', 'en'), 'listener': ('en', 'de')}


def _shared() -> dict:
    return dict(
        model=dict(width=256, dropout=0.0),  # of embeddings, states and attention; on embeddings of teacher-forced text
        vocabulary=dict(
            kind='subwords',  # subwords | words
            size=16_000,  # rows of every embedding, special tokens included; those without a token stay unused
            subwords=25_000,  # of all languages together
            min_count=1,  # occurrences below which a token is unknown
            paths=(),  # folders whose training text it is made of; (): data.path
        ),
        data=dict(
            path='',  # folder of {split}.{language}, also .gz and .xz; '': a small grammar's sentences
            train='train', valid='val',  # splits
            tokenize=True,  # set signs apart from words; False: the text is tokenized already
            lengths=(12, 16, 24, 50),  # tokens a row, BOS and EOS included; a sentence is padded to the next, or cut
        ),
        message=dict(max_length=50, min_length=3,  # tokens before the end of sentence
                     reference_length=False),  # cut to the length of the reference English, which nobody can know
        evaluation=dict(
            every=500, sentences=0, rows=128,  # steps, 0: never; of data.valid, 0: all; at once
            language_model='',  # work directory of one; '': the fluency of the English is not measured
            ranker='',  # work directory of one; '': whether the English finds its image is not measured
            images='',  # folder of {split}.npy, the images' features for it; '': the ranker's own
        ),
    )


def agent(name: str) -> ConfigDict:
    """'speaker' or 'listener', pretrained."""
    config = ConfigDict(dict(experiment='translation_agent', **runner(), languages=PAIRS[name], **_shared(),
                             optimizer=adamw(schedule(3e-4, final=1e-5, decay='linear', decay_steps=500_000),
                                             schedule(0.0), b1=0.9, b2=0.98, eps=1e-9)))
    config.batch_size, config.num_steps = 40, 1_000_000  # 2000 tokens
    config.model.dropout = {'speaker': 0.2, 'listener': 0.3}[name]
    config.log_every, config.checkpoint_every = 100, 5000
    return config


def game(algorithm: str = 'a2c') -> ConfigDict:
    """Fine-tuning of both."""
    config = ConfigDict(dict(
        experiment='translation_game', **runner(), **_shared(),
        speaker='', listener='',  # work directories of pretrained agents; '': from scratch
        algorithm=algorithm,  # a2c | gumbel
        freeze_speaker=False,  # "fix sender": only the listener learns
        loss=dict(
            policy=1.0, baseline=10.0, entropy=0.001,  # weights of the speaker's terms; a2c
            listener=1.0,  # weight of the German cross entropy
            temperature=0.5,  # of the relaxed tokens; gumbel
        ),
        kl=dict(coefficient=0.0),  # price of a nat that a message is less likely under the reference; 0: off
        elastic=dict(
            method='',  # '' | fixed_reference | ema_anchor | reference_reset | reset_to_init | reset_to_ema |
                        # elastic_reset
            agents='speaker',  # who is averaged and reset: speaker | both, the listener too
            period=2000,  # steps between resets
            decay=0.995, tick_every=100,  # of the average, at each tick; steps between ticks
            reset_optimizer=False, reset_critic=False,
        ),
        imitation=dict(  # seeded iterated learning; published: 4000, 400, 1e-4
            every=0,  # steps between generations; 0: none
            steps=400, learning_rate=1e-4,  # of either agent's imitation
        ),
        pairs=dict(
            every=0,  # steps between supervised steps on pretraining pairs ("S2P"); 0: none
            coefficient=1.0,
            speaker='', listener='',  # folders of pairs; '' only where data.path is too
        ),
        optimizer=adamw(schedule(1e-5), schedule(0.0), b1=0.9, b2=0.98, eps=1e-9, clip_norm=0.1),
    ))
    config.batch_size, config.num_steps = 20, 100_000  # 1000 tokens
    config.log_every, config.checkpoint_every = 100, 5000
    if algorithm == 'gumbel':
        config.message.max_length = 40
    return config


def language_model() -> ConfigDict:
    """An LSTM over English captions. Embeddings and states of 512 are published (of COCO's captions); the rest is
    ours."""
    shared = _shared()
    _measures_others(shared)
    config = ConfigDict(dict(experiment='translation_language_model', **runner(), **shared,
                             optimizer=adamw(schedule(1e-3, final=1e-5, decay='linear'), schedule(0.0), clip_norm=1.0)))
    config.model.update(dict(width=512, dropout=0.2))
    config.batch_size, config.num_steps = 40, 50_000
    config.log_every, config.checkpoint_every = 100, 5000
    return config


def ranker() -> ConfigDict:
    """A ranker of images by captions. Sizes, margin, rate, clipping and length are the released ones (of ResNet-152 and
    the five captions of each Flickr30k image; the margin is 0, the clipping is of a sum over the batch there, of a mean
    here); evaluation and dropout are ours."""
    shared = _shared()
    _measures_others(shared)
    config = ConfigDict(dict(
        experiment='translation_ranker', **runner(), **shared,
        images='',  # folder of {split}.npy, float [lines, features], a row for each line; '': data.path
        loss=dict(margin=0.0),  # by which a caption's image should score above all others of the batch
        optimizer=adamw(schedule(3e-4, final=1e-5, decay='linear', decay_steps=3000), schedule(0.0), b1=0.9, b2=0.98,
                        eps=1e-9, clip_norm=2.0 / 256)))
    config.model.update(dict(width=1024, embedding=300, features=2048))
    config.data.lengths = (50,)  # of all batches: the rivals of an image are the others of its batch
    config.batch_size, config.num_steps = 256, 50_000
    config.log_every, config.checkpoint_every = 100, 5000
    return config


def _measures_others(shared: dict) -> None:
    """Takes out what a model has no use for that writes nothing and reads what others write."""
    del shared['message']
    for name in ('language_model', 'ranker', 'images'):
        del shared['evaluation'][name]


def _small(config: ConfigDict) -> ConfigDict:
    """Multi30k for all three, in minutes on a CPU."""
    config.vocabulary.update(dict(kind='words', size=3000))
    config.model.update(dict(width=128, dropout=0.0))
    config.data.lengths = (12, 16, 20, 32)
    if 'message' in config:
        config.message.max_length = 24
    config.evaluation.update(dict(every=500, sentences=256))
    config.log_every, config.checkpoint_every = 50, 500
    if config.experiment == 'translation_ranker':
        config.model.embedding, config.data.lengths = 128, (32,)
        config.batch_size, config.num_steps = 128, 3000
    elif config.experiment != 'translation_game':
        agents = config.experiment == 'translation_agent'
        config.model.dropout, config.num_steps = (0.2, 5000) if agents else (0.1, 3000)
        config.batch_size = 32
        config.optimizer.learning_rate.update(dict(peak=2e-3, final=1e-4, decay_steps=0))
    else:
        config.batch_size, config.num_steps = 20, 1000
        config.optimizer.learning_rate.peak = 1e-4
        config.elastic.update(dict(period=250, decay=0.99, tick_every=5))
    return config


def _medium(config: ConfigDict) -> ConfigDict:
    """Multi30k for all three, in minutes on a GPU: larger models and batches, and rows of one length, so that a step
    compiles once (the few longer sentences are cut). Games are measured in the middle of a period and just before its
    reset."""
    config = _small(config)
    config.vocabulary.size = 8000
    config.batch_size, config.num_steps, config.log_every, config.checkpoint_every = 128, 2000, 50, 0
    config.evaluation.update(dict(every=1000, sentences=0))
    if config.experiment == 'translation_ranker':
        return config
    config.data.lengths = (24,)
    config.model.update(dict(width=256, dropout=0.2))
    if config.experiment == 'translation_game':
        config.num_steps, config.evaluation.every = 1000, 124
        config.model.dropout, config.message.max_length = 0.0, 22
        config.optimizer.learning_rate.peak = 3e-4
        config.elastic.update(dict(period=250, decay=0.98, tick_every=5))
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    """A small grammar's sentences, in a minute or two; for tests, fewer steps of it."""
    config.vocabulary.update(dict(kind='words', size=80))
    config.model.update(dict(width=64, dropout=0.0))
    config.data.lengths = (14, 20)
    if 'message' in config:
        config.message.max_length = 18
    config.evaluation.update(dict(every=200, sentences=64, rows=64))
    config.log_every, config.checkpoint_every, config.batch_size = 20, 200, 32
    if config.experiment == 'translation_ranker':
        config.model.update(dict(embedding=64, features=64))
        config.data.lengths, config.loss.margin = (20,), 0.2
    if config.experiment != 'translation_game':
        config.num_steps = 2000
        config.optimizer.learning_rate.update(dict(peak=5e-3, final=1e-3, decay_steps=0))
        if config.experiment == 'translation_ranker':
            config.num_steps = 400
    else:
        config.num_steps = 400
        config.optimizer.learning_rate.peak = 3e-4
        config.elastic.update(dict(period=100, decay=0.99, tick_every=1))
    return config


CONFIGS = {'speaker': lambda: agent('speaker'), 'listener': lambda: agent('listener'), 'game': game,
           'game_gumbel': lambda: game('gumbel'), 'language_model': language_model, 'ranker': ranker}


SMALLER = {'': lambda config: config, 'medium_': _medium, 'small_': _small, 'tiny_': _tiny}
NAMES = {f'{prefix}{kind}': (prefix, kind) for prefix in SMALLER for kind in CONFIGS}


def get_config(name: str = 'tiny_speaker') -> ConfigDict:
    """`name`: one of `CONFIGS`, alone (as published) or after 'medium_', 'small_' or 'tiny_'."""
    check_name('translation:', name, NAMES)
    prefix, kind = NAMES[name]
    return SMALLER[prefix](CONFIGS[kind]()).lock()
