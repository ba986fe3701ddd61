"""A small LLaDA over captioned pairs of handwritten digits, codes of 32 tokens of 16 values: 16 a digit.

    python -m experiments.quickstart --which=text --workdir=runs/quickstart_text    # writes the codes, trains this too
    python -m experiments.train --config=configs/dlc/text_to_code_digits.py --workdir=runs/digits/text_to_code
    python -m experiments.sample --text "a seven above a two" --text_model=runs/digits/text_to_code \\
        --generator=runs/quickstart_text/generator --out=seven_two.png
"""
from configs.dlc import base

WORDS = ('a', 'above', 'below', 'eight', 'five', 'four', 'nine', 'of', 'on', 'one', 'seven', 'six', 'three', 'top',
         'two', 'under', 'zero')


def get_config():
    config = base.text_to_code()
    config.num_steps, config.batch_size = 1000, 64
    config.log_every, config.checkpoint_every = 50, 200
    config.model.update(dict(width=64, depth=3, num_heads=2, hidden=192, max_length=48,
                             text_vocab_size=2 + len(WORDS), num_codes=32, vocab_size=16,
                             init_std=0.1))  # about 1 / sqrt(width), for a narrow model from scratch
    config.words.update(dict(separator=2 + len(WORDS), mask_token=1, pad_token=0))
    config.tokenizer, config.vocabulary, config.caption_length = 'words', WORDS, 8
    config.objective.weighted = False  # weights of 1 / p are noise that a run this short cannot average out
    config.objective.drop_caption = 0.1  # so that sampling may be guided
    config.eval_every = 200
    config.optimizer.learning_rate.update(dict(peak=3e-3, warmup_steps=50, final=1e-5, decay='cosine'))
    config.data.update(dict(path='runs/quickstart_text/codes/train', heldout='runs/quickstart_text/codes/heldout'))
    config.sampler.update(dict(steps=16, temperature=0.2, remasking='low_confidence'))
    return config
