"""DiT on small pictures, in pixels, conditioned on codes: ':fashion_mnist' (default), ':cifar10', ':imagenette'.

    python -m experiments.encode --encoder=runs/fashion/encoder --out=runs/fashion/codes/train
    python -m experiments.train --config=configs/dlc/generator_small.py:fashion_mnist \\
        --workdir=runs/fashion/generator --config.data.path=runs/fashion/codes/train

Measured on Fashion-MNIST behind the small encoder that `encoder_small.py` describes, at width 96, depth 3, patch 4,
2500 steps of 64 images (learning_rate.peak=0.001 after 100 steps, ema.decay=0.998, time_init_std=0.1,
code_init_std=1), about five minutes each on two CPU cores; one set of 2,000 samples in 50 steps against the 10,000
test images, in `experiments.evaluate`'s classifier features: Fréchet distance 57.9 on nothing, 43.4 on codes drawn by
a small code model (width 96, depth 3, 2000 steps); precision 0.68 and 0.78, recall 0.38 and 0.45.
"""
from configs.dlc import base
from configs.dlc.encoder_small import DATA
from configs.parts import check_name


def get_config(data: str = 'fashion_mnist'):
    check_name('generator_small:', data, DATA)
    _, pixels, channels, _, _ = DATA[data]
    config = base.generator()
    config.num_steps, config.batch_size = 50_000, 256
    config.model.update(dict(size='S', patch_size=2 if pixels <= 32 else 4, input_size=pixels, channels=channels,
                             num_codes=32, vocab_size=64))
    config.ema.update(dict(decay=0.999, ramp=True))
    config.optimizer.learning_rate.update(dict(peak=3e-4, warmup_steps=1000))
    config.optimizer.clip_norm = 1.0
    config.data.target = 'images'
    config.sampler.update(dict(num_steps=100, guidance=1.0))
    return config
