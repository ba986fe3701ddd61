"""SEM encoder on ImageNet-2012: ViT-L/14 reg4 with a SEM head, L x V = 512 x 256, 128 x 1024 or 32 x 4096.

    python -m experiments.train --config=configs/dlc/encoder_imagenet.py:L512 --workdir=gs://… \\
        --config.pretrained=dinov2_vitl14_reg4_pretrain.pth

arXiv 2507.12318 section 5 and appendix E: from released DINOv2 weights, 125 000 steps, about a day on two A100; linear
probe of the codes 85.3 % (DINOv2: 85.9 %). Batch 256 is four of the original's GPUs at 64; the learning rate follows
1e-4 sqrt(batch / 1024). The published script (`vitl14_sem_L512.yaml`) computes in float16 and writes a checkpoint every
6250 steps; here it is bfloat16, which needs no loss scale, and every 2500, the newest two of which stay. Without
--config.pretrained it trains from scratch, which the paper does not report. Memory and time of a step on v5e-16 and
other slices: docs/readiness.md.
"""
from configs.dlc import base
from configs.parts import check_name

CODES = {'L512': (512, 256), 'L128': (128, 1024), 'L32': (32, 4096)}


def get_config(codes: str = 'L512'):
    check_name('encoder_imagenet:', codes, CODES)
    config = base.encoder()
    config.num_steps, config.batch_size = 125_000, 256
    config.model.num_codes, config.model.vocab_size = CODES[codes]
    config.model.dtype = 'bfloat16'
    config.model.remat = 'full'
    config.optimizer.learning_rate.peak = 1e-4 * (config.batch_size / 1024) ** 0.5
    config.data.update(dict(name='imagenet2012', num_workers=32))
    config.checkpoint_every = 2500
    return config
