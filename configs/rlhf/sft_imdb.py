"""GPT-2 on film reviews: the model that the IMDB runs of arXiv 2312.07551 start from, made from data.

    python -m experiments.train --config=configs/rlhf/sft_imdb.py --workdir=runs/imdb/sft \\
        --config.data.path=imdb --config.weights=gpt2 --config.tokenizer=gpt2

The paper starts from a released model, `lvwerra/gpt2-imdb`, which the policy config takes as it is. This is the
alternative where only the data is at hand; learning rate, batch and epochs are choices of this repository that have not
been tuned. Reviews are packed into rows of 1024 tokens, each by itself; longer ones are left out. 16 bytes for each of
124 million parameters.

`:small` is a GPT-2 of 0.9 million parameters, from scratch in nine minutes of a busy core: the start of
`imdb.py:small_ARM`, whose commands are in docs/papers.md. It reads stretches of 32 words, about as long as what the
policy reads and writes (58 tokens on the average; the 7% of more than 72 are left out). They have no EOS: the policy
may not write it, and a model that has seen it end every stretch expects it (with 0.4 where a text begins within a
review). Its vocabulary is learnt from the reviews (needs the package `tokenizers`):

    from pathlib import Path
    from rlhf_jax.tasks import rows
    from tokenizers import ByteLevelBPETokenizer
    folder, end = Path('runs/imdb_small/tokenizer'), '<|endoftext|>'
    folder.mkdir(parents=True, exist_ok=True)
    reviews = (row['text'] for row in rows.read('data/imdb', ['text'], split='train'))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(reviews, vocab_size=2048, special_tokens=[end])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text('{"eos_token": "%s"}' % end)
"""
from configs.parts import check_name
from configs.rlhf import base

SIZES = ('124M', 'small')
SMALL = dict(kind='gpt2', size='124M', vocab_size=2048, width=128, depth=3, num_heads=4, max_length=72, init_std=0.05)
STRETCH = 32  # words


def get_config(size: str = '124M'):
    check_name('sft_imdb:', size, SIZES)
    config = base.sft()
    config.num_steps, config.batch_size, config.accumulate = 1000, 16, 2
    config.model.update(dict(kind='gpt2', size='124M', vocab_size=50257, dtype='bfloat16'))
    config.weights = config.tokenizer = 'models/gpt2'
    config.data.update(dict(task='imdb', path='data/imdb', heldout='validation'))
    config.max_length, config.packing = 1024, True
    config.optimizer.learning_rate.update(dict(peak=5e-5, warmup_steps=50, decay='cosine'))
    config.eval_every = 200
    if size == 'small':
        small(config)
    return config


def small(config) -> None:
    """Changes the lines in which the small run differs."""
    config.num_steps, config.batch_size, config.accumulate = 1200, 32, 1
    config.add_eos, config.length_buckets = False, 1
    config.log_every, config.checkpoint_every, config.eval_every = 50, 0, 0
    config.model.update(SMALL | dict(dtype='float32'))
    config.weights, config.tokenizer = '', 'runs/imdb_small/tokenizer'
    config.data.split, config.data.options = 'train[:8000]', dict(stretch=STRETCH)
    config.max_length, config.packing = SMALL['max_length'], False
    config.optimizer.learning_rate.update(dict(peak=3e-3, warmup_steps=50, decay='cosine'))
    config.optimizer.update(dict(b2=0.98, clip_norm=1.0))
