"""SEM encoder on small pictures: ':fashion_mnist' (28 pixels, default), ':cifar10' (32), ':imagenette' (64).

    python -m experiments.train --config=configs/dlc/encoder_small.py:fashion_mnist --workdir=runs/fashion/encoder

The data set is TFDS's, prepared as array_record; for a file of the same pictures add
`--config.data.name=npz --config.data.path=FILE`. Codes of 32 tokens of 64 values.

Measured on Fashion-MNIST with a small part of this size and budget, on two shared CPU cores in about six minutes:
width 96, depth 3, 800 steps of 64 images, 2 local crops of scale (0.2, 0.6), 512 prototypes
(`--config.model.width=96` and so on, also model.init_std=0.1, model.drop_path=0, head.hidden=256, head.init_std=0.06,
teacher_temperature 0.03, ema.decay=0.98, learning_rate.peak=0.0015 after 100 steps, freeze_last_layer=0). Accuracy on
the 10,000 test images by 20 nearest neighbours and by a linear probe: soft codes 0.771 and 0.781, bare codes 0.756
and 0.744, embedding 0.764 and 0.742. Perplexity a position 7.5 of 64, 98 % of the codes distinct.
"""
from configs.dlc import base
from configs.parts import check_name

# name: (TFDS name, pixels, channels, patch, flip)
DATA = {'fashion_mnist': ('fashion_mnist', 28, 1, 4, 0.5), 'cifar10': ('cifar10', 32, 3, 4, 0.5),
        'imagenette': ('imagenette/160px-v2', 64, 3, 8, 0.5)}


def get_config(data: str = 'fashion_mnist'):
    check_name('encoder_small:', data, DATA)
    name, pixels, channels, patch, flip = DATA[data]
    config = base.encoder()
    config.num_steps, config.batch_size = 20_000, 256
    config.model.update(dict(size='S', width=256, depth=6, num_heads=4, patch_size=patch, pos_grid=pixels // patch,
                             layer_scale=1.0, init_std=0.06, pos_init_std=0.5, drop_path=0.1, num_codes=32,
                             vocab_size=64, temperature=0.2))
    config.head.update(dict(hidden=1024, bottleneck=128, prototypes=2048, init_std=0.03))
    config.loss.centering = 'sinkhorn_knopp'
    config.loss.teacher_temperature.update(dict(peak=0.06, init=0.04, warmup_steps=5000))
    config.ema.update(dict(decay=0.99, final=1.0))
    config.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=1000, final=1e-6, decay='cosine'))
    config.layer_decay, config.patch_embed_lr, config.freeze_last_layer = 1.0, 1.0, 200
    config.data.update(dict(name=name, image_size=pixels, channels=channels, mean=(0.5,) * channels,
                            std=(0.5,) * channels, global_size=pixels, global_scale=(0.4, 1.0),
                            local_size=pixels // patch // 2 * patch, local_scale=(0.1, 0.4), num_local=4, flip=flip,
                            blur=(0.0, 0.3, 0.3), mask_min_patches=2))
    return config
