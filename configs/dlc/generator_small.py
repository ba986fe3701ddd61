"""DiT on small pictures, in pixels, conditioned on codes: ':fashion_mnist' (default), ':cifar10', ':imagenette'.

    python -m experiments.encode --encoder=runs/fashion/encoder --out=runs/fashion/codes/train
    python -m experiments.train --config=configs/dlc/generator_small.py:fashion_mnist \\
        --workdir=runs/fashion/generator --config.data.path=runs/fashion/codes/train
"""
from configs.dlc import base
from configs.dlc.encoder_small import DATA


def get_config(data: str = 'fashion_mnist'):
    if data not in DATA:
        raise ValueError(f'generator_small: {data!r} is not one of {tuple(DATA)}')
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
