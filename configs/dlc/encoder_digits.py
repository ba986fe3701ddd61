"""SEM encoder on scikit-learn's handwritten digits (8x8), codes of 16 tokens of 16 values.

    python -m experiments.train --config=configs/dlc/encoder_digits.py --workdir=runs/digits/encoder
"""
from configs.dlc import base


def get_config():
    config = base.encoder()
    config.num_steps, config.batch_size = 400, 64
    config.log_every, config.checkpoint_every = 20, 100
    config.model.update(dict(size='S', width=96, depth=3, num_heads=3, patch_size=2, num_registers=2, pos_grid=4,
                             layer_scale=1.0, drop_path=0.0, num_codes=16, vocab_size=16,
                             temperature=0.2,  # 16 values are too few for logits of variance 1 to choose between at 1
                             init_std=0.1, pos_init_std=0.5))  # a narrow model that learns positions in few steps
    config.head.update(dict(hidden=192, bottleneck=64, prototypes=128, init_std=0.1))
    config.loss.centering = 'sinkhorn_knopp'  # the running center drifts to uniform targets on so few prototypes
    config.loss.teacher_temperature.update(dict(peak=0.02, init=0.02, warmup_steps=0))
    config.ema.update(dict(decay=0.97, final=1.0))
    config.optimizer.learning_rate.update(dict(peak=2e-3, warmup_steps=50, final=1e-5, decay='cosine'))
    config.optimizer.weight_decay.update(dict(peak=0.04, final=0.2, decay='cosine'))
    config.layer_decay, config.patch_embed_lr, config.freeze_last_layer = 1.0, 1.0, 0
    config.data.update(dict(
        name='digits', image_size=8, channels=1, mean=(0.5,), std=(0.5,),
        global_size=8, global_scale=(0.6, 1.0), local_size=6, local_scale=(0.35, 0.7), num_local=2,
        flip=0.0,  # a mirrored digit is another sign
        jitter=0.8, grayscale=0.0, solarize=0.0, blur=(0.0, 0.3, 0.3),
        mask_min_patches=1))
    return config
