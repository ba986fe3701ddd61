"""SEDD over the codes of small pictures, 32 tokens of 64 values.

    python -m experiments.train --config=configs/dlc/code_model_small.py --workdir=runs/fashion/code_model \\
        --config.data.path=runs/fashion/codes/train
"""
from configs.dlc import base


def get_config():
    config = base.code_model()
    config.num_steps, config.batch_size = 20_000, 256
    config.model.update(dict(size='small', width=384, depth=6, num_heads=6, num_codes=32, vocab_size=64))
    config.ema.update(dict(decay=0.999, ramp=True))
    config.optimizer.learning_rate.update(dict(peak=5e-4, warmup_steps=500))
    config.sampler.update(dict(name='analytic', num_steps=128))
    return config
