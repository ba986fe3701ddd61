"""The whole method on small pictures, from images to a report: `python -m experiments.quickstart`.

    python -m experiments.quickstart                            # handwritten digits, on two CPU cores
    python -m experiments.quickstart --config=configs/dlc/quickstart.py:L8 --workdir=runs/L8
    python -m experiments.quickstart --config=configs/dlc/quickstart.py:fashion_mnist --workdir=runs/fashion \\
        --config.encoder.data.path=fashion_mnist.npz            # on one GPU
    python -m experiments.quickstart --config=configs/dlc/quickstart.py:cifar10 --workdir=runs/cifar10 \\
        --config.encoder.data.path=cifar10.npz                  # on one GPU

`:L4`, `:L8`, `:L16` and `:L32` are digits with codes of so many tokens, without the generators on nothing and on
embeddings. Another length or vocabulary, `--config.encoder.model.num_codes` and `vocab_size`, reaches every model, as
do the pictures' size and channels, `--config.encoder.data.image_size` (with `global_size` and `local_size`) and
`channels`.

`:fashion_mnist` (28 pixels, grey) and `:cifar10` (32 pixels, colour) read an .npz, of whose forms
`experiments/dlc/data/npz_images.py` tells; another source is one of `--config.encoder.data.name`. They are cut to
minutes of a GPU: twelve each on an H100 that seven programs shared. Three trainings of each are in docs/papers.md:
drawing a code first is better than drawing an embedding first or nothing, on both. `encoder_small.py` and
`generator_small.py` have sizes for hours.

`:pairs` and `:pairs_halves` are pictures of two digits, where a composition can show both of its sources: codes of
whole pictures, and codes of which each half speaks of one digit. 20 of the 100 pairs of digits are in no training set,
and compositions ask for those. Measured: digits and pairs in docs/images.md, lengths in docs/papers.md.

`:emoji` shows people of Noto Emoji at 16 pixels: 79 roles, each a person, a man and a woman, in no tone of skin and in
five. One tone of each is in no training set, and compositions ask for those: the figure of one picture in the tone of
another. On two CPU cores; measured in docs/images.md.

    python -m experiments.quickstart --config=configs/dlc/quickstart.py:emoji --workdir=runs/emoji \\
        --config.encoder.data.path=noto-emoji/png/128           # github.com/googlefonts/noto-emoji

`:tiny`, `:fashion_mnist_tiny` and `:cifar10_tiny` are the same in a few steps, to see that everything runs; their
numbers mean nothing.
"""
from configs.dlc import (
    base,
    code_model_digits,
    code_model_small,
    embedding_model_digits,
    encoder_digits,
    encoder_small,
    generator_digits,
    generator_small,
)
from configs.parts import check_name

METHODS = ('code', 'none', 'embedding')
PAIRS = {'pairs': 'whole', 'pairs_halves': 'halves'}  # how the encoder reads a picture of two digits
LENGTHS = {f'L{length}': length for length in (4, 8, 16, 32)}
PICTURES = {'fashion_mnist': 'pictures of clothes', 'cifar10': 'small photographs'}
SIZES = ('full', 'tiny', *LENGTHS,
         *(f'{name}{size}' for name in (*PICTURES, *PAIRS, 'emoji') for size in ('', '_tiny')))


def get_config(size: str = 'full'):
    check_name('quickstart: size', size, SIZES)
    name = size.removesuffix('_tiny')
    config = (pictures(name) if name in PICTURES else pairs(PAIRS[name]) if name in PAIRS else
              emoji() if name == 'emoji' else digits())
    if name in LENGTHS:
        config.encoder.model.num_codes = LENGTHS[name]
        config.generators = {'code': config.generators.code}
    if size.endswith('tiny'):
        shrink(config)
    return config.lock()


def digits():
    return whole(
        'handwritten digits', encoder_digits.get_config(),
        {condition: generator_digits.get_config(condition) for condition in METHODS},
        code_model_digits.get_config(), embedding_model_digits.get_config())


def pairs(encoded: str):
    """Two digits in a picture, 20 of the 100 pairs in no training set; generators as in `quickstart_text.py`.

    A code has twice the tokens of a digit's, whether the encoder reads the picture whole or each of its halves.
    """
    encoder = encoder_digits.get_config()
    generators = {condition: generator_digits.get_config(condition) for condition in ('code', 'embedding')}
    config = whole('pairs of handwritten digits', encoder, generators, code_model_digits.get_config(),
                   embedding_model_digits.get_config(), encoded=encoded)
    with config.encoder.data.unlocked():
        config.encoder.data.num_images = 4000  # of training, and a quarter as many held out
    if encoded == 'whole':
        config.encoder.data.update(dict(name='digit_pairs', image_size=16, global_size=16, local_size=12))
        config.encoder.model.update(dict(patch_size=4, num_codes=32))
        config.encoder.num_steps = 800
    for generator in config.generators.values():
        generator.num_steps = 3000
        generator.model.update(dict(width=96, num_heads=3, patch_size=4))
        generator.diffusion.beta_end = 0.01
        generator.sampler.update(dict(num_steps=25, guidance=2.5))
    code = config.generators.code
    code.model.code_init_std = 3.0
    code.optimizer.learning_rate.peak = 5e-3
    code.optimizer.groups = ((r'cond_embed/.*', dict(learning_rate=10.0)), (r'.*', {}))  # of codes alone
    return config


def emoji():
    """Who and in which tone, at 16 pixels: no two views of a picture differ in colour or in direction."""
    generators = {condition: generator_digits.get_config(condition) for condition in ('code', 'embedding')}
    config = whole('emoji of people', encoder_digits.get_config(), generators, code_model_digits.get_config(),
                   embedding_model_digits.get_config())
    config.judge = 'nearest'
    config.encoder.num_steps, config.code_model.num_steps = 1200, 1500
    config.encoder.model.update(dict(width=128, num_heads=4, patch_size=4, num_codes=32))
    config.encoder.data.update(dict(name='emoji', in_memory=True, transparency='white', jitter=0.0, image_size=16,
                                    global_size=16, local_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3))
    for generator in config.generators.values():
        generator.num_steps = 4000
        generator.model.update(dict(width=128, depth=4, num_heads=4, patch_size=4))
        generator.optimizer.learning_rate.peak = 2e-3
        generator.sampler.guidance = 2.5
    return config


def pictures(name: str):
    """Models of three to seven million parameters, trained for one to three thousand steps each."""
    encoder, code_model, embedding_model = (
        encoder_small.get_config(name), code_model_small.get_config(), embedding_model_digits.get_config())
    generators = {condition: generator_small.get_config(name) for condition in METHODS}
    config = whole(PICTURES[name], encoder, generators, code_model, embedding_model)

    encoder, generators = config.encoder, config.generators
    encoder.num_steps, encoder.batch_size = 1200, 128
    encoder.data.update(dict(name='npz', in_memory=True, num_local=2, local_scale=(0.2, 0.6)))
    encoder.model.update(dict(width=192, depth=4, num_heads=3, num_codes=16, vocab_size=32, init_std=0.07,
                              drop_path=0.0))
    encoder.head.update(dict(hidden=512, bottleneck=128, prototypes=1024, init_std=0.045))
    encoder.loss.teacher_temperature.update(dict(peak=0.03, init=0.03, warmup_steps=0))
    encoder.ema.decay, encoder.freeze_last_layer = 0.98, 0
    encoder.optimizer.learning_rate.update(dict(peak=1.5e-3, warmup_steps=100))

    for condition, generator in generators.items():
        generator.num_steps, generator.batch_size = 2500, 128
        generator.model.update(dict(width=256, depth=6, num_heads=4, patch_size=4, condition=condition,
                                    time_init_std=0.06, code_init_std=1.0))
        generator.ema.update(dict(decay=0.998, ramp=True))
        generator.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=200, final=1e-5, decay='cosine'))
        generator.sampler.num_steps = 50
    code_model.num_steps, code_model.batch_size = 2500, 128
    code_model.model.update(dict(width=256, depth=4, num_heads=4))
    code_model.ema.decay = 0.998
    code_model.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=200, final=1e-5, decay='cosine'))
    code_model.sampler.num_steps = 64
    embedding_model.num_steps, embedding_model.batch_size = 2500, 128
    embedding_model.model.update(dict(width=512, depth=6, time_dim=128))  # about as many parameters as the code model
    embedding_model.ema.decay = 0.998
    embedding_model.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=200))
    for stage in (encoder, code_model, embedding_model, *generators.values()):
        stage.model.dtype = 'bfloat16'
        stage.log_every, stage.checkpoint_every = 50, 0
        if 'attention_impl' in stage.model:
            stage.model.attention_impl = 'xla'  # so few patches are no work for a fused kernel
    config.judge = 'convolutional'
    config.composition.pairs = 128  # with four samples each a batch of samples: one program for both
    return config


def whole(pictures: str, encoder, generators: dict, code_model, embedding_model, *, encoded: str = 'whole'):
    """The stages' configs in one, where the encoder alone says L, V, the size of pictures and embeddings; of one that
    reads `halves`, codes, embeddings and pictures are twice as long."""
    parts = 2 if encoded == 'halves' else 1
    tokens = dict(num_codes=encoder.model.get_ref('num_codes') * parts, vocab_size=encoder.model.get_ref('vocab_size'))
    embedding_dim = encoder.model.get_ref('width') * parts
    for generator in generators.values():
        generator.model.update(tokens | dict(
            embedding_dim=embedding_dim, input_size=encoder.data.get_ref('image_size') * parts,
            channels=encoder.data.get_ref('channels')))
    code_model.model.update(tokens)
    embedding_model.model.embedding_dim = embedding_dim
    return base.ConfigDict(dict(
        pictures=pictures,  # what they show, for the report
        encoded=encoded,  # whole | halves: how the encoder reads a picture; halves, of two digits, by themselves
        encoder=encoder, generators=generators, code_model=code_model, embedding_model=embedding_model,
        sample_seeds=(0, 1, 2),  # every sample set is drawn once a seed; tables give mean and standard deviation
        composition=dict(pairs=48, samples=4, temperature=0.001),  # pairs of held-out images of different classes
        sample_batch=512,
        judge='perceptron',  # perceptron | convolutional | nearest (emoji): what everything is measured by
    ))


def shrink(config) -> None:
    """A few steps of small models."""
    for stage in (config.encoder, config.code_model, config.embedding_model, *config.generators.values()):
        stage.num_steps, stage.checkpoint_every, stage.log_every, stage.batch_size = 8, 4, 2, 32
        stage.model.update(dict(width=32, depth=2))
        if 'num_heads' in stage.model:
            stage.model.num_heads = 2
    config.encoder.head.update(dict(hidden=32, bottleneck=16, prototypes=64))
    for generator in config.generators.values():
        generator.sampler.num_steps = 4
    config.code_model.sampler.num_steps = config.embedding_model.sampler.num_steps = 8
    config.sample_seeds, config.composition.pairs = (0, 1), 6
