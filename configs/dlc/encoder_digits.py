"""SEM encoder on scikit-learn's handwritten digits (8x8, shown at 16x16), codes of 32 tokens of 16 values.

    python -m experiments.train --config=configs/dlc/encoder_digits.py --workdir=runs/digits/encoder
"""
from configs.dlc import base


def get_config():
    config = base.encoder()
    config.num_steps, config.batch_size = 1200, 64
    config.log_every, config.checkpoint_every = 25, 300
    config.model.update(dict(size='S', width=128, depth=4, num_heads=4, patch_size=4, num_registers=2, pos_grid=4,
                             layer_scale=0.1, drop_path=0.0, num_codes=32, vocab_size=16, temperature=1.0))
    config.head.update(dict(hidden=256, bottleneck=64, prototypes=512))
    config.loss.teacher_temperature.update(dict(peak=0.07, init=0.04, warmup_steps=300))
    config.loss.koleo = 0.1
    config.ema.update(dict(decay=0.99, final=1.0))
    config.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=100, final=1e-5, decay='cosine'))
    config.optimizer.weight_decay.update(dict(peak=0.04, final=0.2, decay='cosine'))
    config.layer_decay, config.patch_embed_lr, config.freeze_last_layer = 1.0, 1.0, 50
    config.data.update(dict(
        name='digits', image_size=16, channels=1, mean=(0.5,), std=(0.5,),
        global_size=16, global_scale=(0.5, 1.0), local_size=8, local_scale=(0.15, 0.5), num_local=4,
        flip=0.0,  # a mirrored digit is another sign
        jitter=0.8, grayscale=0.0, solarize=0.0, blur=(0.0, 0.3, 0.3),
        mask_min_patches=1))
    return config
