"""Diffusion over embeddings of ImageNet, in front of `generator_imagenet.py:embedding`: RCG's way, and that of the row
"DINOv2" of arXiv 2507.12318 table 2.

    python -m experiments.train --config=configs/dlc/embedding_model_imagenet.py --workdir=… \\
        --config.data.path=imagenet_codes
    python -m experiments.sample --unconditional --embedding_model=RUN --generator=RUN --vae=sd-vae-ft-ema/ \\
        --num=50000 --out=samples.npz

Network, batch 512, 200 epochs (500,000 steps), AdamW at 5.12e-4 with a weight decay of 0.01 and sampling by DDIM at
eta 1 in 250 steps are those of RCG's code (LTH14/rcg, for MoCo v3). Its schedule of noise, prediction of the clean
embedding and normalization of each embedding by itself are not: noise is predicted on the linear schedule of the image
generator, coordinates are standardized over the data set, weights are averaged and gradients clipped at 1. The paper's
generator of DINOv2 embeddings, "with the same depth as the medium SEDD", was not published.
"""
from configs.dlc import base


def get_config():
    config = base.embedding_model()
    config.num_steps, config.batch_size = 500_000, 512
    config.optimizer.learning_rate.peak, config.optimizer.weight_decay.peak = 5.12e-4, 0.01
    config.checkpoint_every, config.log_every = 5000, 100
    return config
