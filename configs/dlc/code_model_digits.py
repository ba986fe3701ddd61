"""SEDD over the digits' codes, 16 tokens of 16 values.

    python -m experiments.train --config=configs/dlc/code_model_digits.py --workdir=runs/digits/code_model
"""
from configs.dlc import base


def get_config():
    config = base.code_model()
    config.num_steps, config.batch_size = 2000, 64
    config.log_every, config.checkpoint_every = 50, 500
    config.model.update(dict(size='small', width=96, depth=3, num_heads=3, num_codes=16, vocab_size=16, cond_dim=64))
    config.ema.update(dict(decay=0.995, ramp=True))
    config.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=100, final=1e-5, decay='cosine'))
    config.data.path = 'runs/digits/codes/train'
    config.sampler.update(dict(name='analytic', num_steps=64))
    return config
