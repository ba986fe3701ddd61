"""SEDD-medium over ImageNet codes (default :L512; ':small_L512' and so on for the small one).

    python -m experiments.train --config=configs/dlc/code_model_imagenet.py:L512 --workdir=… \\
        --config.data.path=imagenet_codes

arXiv 2507.12318 table 5: batch 512, AdamW 3e-4, warm-up 2500, clip 1, EMA 0.9999, 200 epochs (500 000 steps), about two
days on four H100. The published configuration files say 1.3 to 1.5 M iterations with two microbatches; the paper's 500
000 in one are kept (--config.num_steps, --config.accumulate). Sampling: 4096 steps with remasking (eta 0.01, window 0.3
to 0.55) for unguided images, 1024 analytic steps for guided ones. Memory and time of a step on v5e-16 and other slices:
docs/readiness.md.
"""
from configs.dlc import base
from configs.dlc.encoder_imagenet import CODES
from configs.parts import check_name

NAMES = tuple(size + codes for size in ('', 'small_', 'medium_') for codes in CODES)


def get_config(name: str = 'L512'):
    check_name('code_model_imagenet:', name, NAMES)
    size, _, codes = name.rpartition('_')
    config = base.code_model()
    config.num_steps, config.batch_size = 500_000, 512
    config.model.size = size or 'medium'
    config.model.num_codes, config.model.vocab_size = CODES[codes]
    config.model.dtype = 'bfloat16'
    config.model.remat = 'full'
    config.checkpoint_every, config.log_every = 5000, 100
    return config
