"""GPT-2 on film reviews: the model that the IMDB runs of arXiv 2312.07551 start from, made from data.

    python -m experiments.train --config=configs/rlhf/sft_imdb.py --workdir=runs/imdb/sft \\
        --config.data.path=imdb --config.weights=gpt2 --config.tokenizer=gpt2

The paper starts from a released model, `lvwerra/gpt2-imdb`, which the policy config takes as it is. This is the
alternative where only the data is at hand; learning rate, batch and epochs are choices of this repository that have not
been tuned. Reviews are packed into rows of 1024 tokens, each by itself; longer ones are left out. 16 bytes for each of
124 million parameters.
"""
from configs.rlhf import base


def get_config():
    config = base.sft()
    config.num_steps, config.batch_size, config.accumulate = 1000, 16, 2
    config.model.update(dict(kind='gpt2', size='124M', vocab_size=50257, dtype='bfloat16'))
    config.weights = config.tokenizer = 'models/gpt2'
    config.data.update(dict(task='imdb', path='data/imdb', heldout='validation'))
    config.max_length, config.packing = 1024, True
    config.optimizer.learning_rate.update(dict(peak=5e-5, warmup_steps=50, decay='cosine'))
    config.eval_every = 200
    return config
