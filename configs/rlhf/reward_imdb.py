"""A reward model of film reviews: which of two is the positive one, by their labels.

    python -m experiments.train --config=configs/rlhf/reward_imdb.py --workdir=runs/imdb/reward \\
        --config.data.path=imdb --config.weights=runs/imdb/sft --config.tokenizer=gpt2

The alternative, where only labelled reviews are at hand, to the released classifier that `imdb.py` takes
(arXiv 2312.07551 trains none); learning rate, batch and epochs are choices of this repository that have not been tuned.
Data: rows of `text` and `label` (1 positive, 0 negative). It reads stretches of 80 words, about as long as the 112
tokens that the policy reads and writes, at their last token: the policy is not allowed to end. 16 bytes for each of 124
million parameters.

`:small` and `:small_gold` are the two reward models of `imdb.py:small_ARM` (docs/papers.md has the commands), on the
model of `sft_imdb.py:small`: the one that is trained on sees 1000 reviews, the gold one 6000 others.
"""
from configs.parts import check_name
from configs.rlhf import base, sft_imdb

SIZES = ('124M', 'small', 'small_gold')
# Of the shuffled training rows, which the held-out ones are no part of.
SPLITS = {'small': 'train[:1000]', 'small_gold': 'train[8000:14000]'}


def get_config(size: str = '124M'):
    check_name('reward_imdb:', size, SIZES)
    config = base.reward_model()
    config.num_steps, config.batch_size, config.accumulate = 1000, 32, 0  # microbatches: the least that fit
    config.model.update(dict(kind='gpt2', size='124M', vocab_size=50257, dtype='bfloat16'))
    config.weights, config.tokenizer = 'runs/imdb/sft', 'models/gpt2'
    config.data.update(dict(task='imdb', path='data/imdb', heldout='validation'))
    config.data.options = dict(stretch=80)
    config.max_length, config.add_eos = 160, False
    config.optimizer.learning_rate.update(dict(peak=2e-5, warmup_steps=50, decay='cosine'))
    config.eval_every = 200
    if size in SPLITS:
        small(config, SPLITS[size], num_steps=200 if size == 'small' else 400)
    return config


def small(config, split: str, num_steps: int) -> None:
    """Changes the lines in which the small runs differ."""
    config.num_steps, config.batch_size, config.accumulate = num_steps, 32, 1
    config.log_every, config.checkpoint_every, config.eval_every = 50, 0, num_steps
    config.model.update(sft_imdb.SMALL | dict(dtype='float32'))
    config.weights, config.tokenizer = 'runs/imdb_small/sft', 'runs/imdb_small/tokenizer'
    config.data.split, config.data.heldout, config.data.options.stretch = split, 'validation[:500]', sft_imdb.STRETCH
    config.length_buckets, config.max_length = 1, sft_imdb.SMALL['max_length']
    config.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=20, decay='cosine'))
    config.optimizer.update(dict(b2=0.99, clip_norm=1.0))
