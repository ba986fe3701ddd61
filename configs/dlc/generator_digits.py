"""DiT on digits (8x8 pixels), conditioned on codes (default), on the encoder's embedding, on the class, or on nothing.

    python -m experiments.train --config=configs/dlc/generator_digits.py --workdir=runs/digits/generator
    python -m experiments.train --config=configs/dlc/generator_digits.py:none --workdir=runs/digits/unconditional
"""
from configs.dlc import base


def get_config(condition: str = 'code'):
    config = base.generator()
    config.num_steps, config.batch_size = 2000, 64
    config.log_every, config.checkpoint_every = 50, 500
    config.model.update(dict(size='S', width=64, depth=3, num_heads=2, patch_size=2, input_size=8, channels=1,
                             condition=condition or 'code', num_codes=16, vocab_size=16, num_classes=10,
                             embedding_dim=96,
                             time_init_std=0.15, code_init_std=1.0))  # a narrow model needs them; see base.py
    config.ema.update(dict(decay=0.995, ramp=True))
    config.optimizer.learning_rate.update(dict(peak=3e-3, warmup_steps=100, final=1e-5, decay='cosine'))
    config.optimizer.clip_norm = 1.0
    config.data.update(dict(path='runs/digits/codes/train', target='images'))
    config.sampler.update(dict(name='ddpm', num_steps=50, guidance=1.0))
    return config
