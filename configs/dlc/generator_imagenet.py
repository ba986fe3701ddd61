"""DiT-XL/2 on ImageNet-256 latents, conditioned on codes (default :L512), or ':class', ':embedding', ':none' as
baselines.

    python -m experiments.encode --encoder=RUN --vae=sd-vae-ft-ema/ --flip=0.5 --out=imagenet_codes
    python -m experiments.train --config=configs/dlc/generator_imagenet.py:L512 --workdir=… \\
        --config.data.path=imagenet_codes
    python -m experiments.sample --unconditional --code_model=RUN --generator=RUN --vae=sd-vae-ft-ema/ --num=50000 \\
        --out=samples.npz
    python -m experiments.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE

sd-vae-ft-ema/ is the released autoencoder as diffusers stores it; encode writes one posterior sample an image. arXiv
2507.12318 table 4: batch 256, AdamW 1e-4, EMA 0.9999, 1200 epochs (about 6 M steps), 5.2 steps/s on four H100. The
published launch script trains for 100 epochs (0.5 M steps) as it stands, or 1400 by its other line, in float16; here it
is the paper's 1200 in bfloat16. Guidance: 1.7 in their script for 50,000 images and 4 in their pipeline, which released
weights get (`released.py`); runs of one's own start from 1.4. Memory and time of a step on v5e-16 and other slices:
docs/readiness.md. A step on v5e-16 (`experiments.compile --only=step --fast`) takes 4.4 GiB a chip and 11.5 TFLOP in
matrix products; with remat='full' 2.1 GiB and 15.2 TFLOP, with 'none' 8.7 GiB and 11.4 TFLOP. Table 1 reports FID 1.59
(guided) and 2.00 (not) for codes drawn by the code model; table 2, at 400 epochs: 4.21.
"""
from configs.dlc import base
from configs.dlc.encoder_imagenet import CODES
from configs.parts import check_name


def get_config(condition: str = 'L512'):
    check_name('generator_imagenet:', condition, (*CODES, 'class', 'embedding', 'none'))
    config = base.generator()
    config.num_steps, config.batch_size = 6_000_000, 256
    if condition in CODES:
        config.model.num_codes, config.model.vocab_size = CODES[condition]
    else:
        config.model.condition = condition
    config.model.dtype = 'bfloat16'
    config.model.remat = 'dots_no_batch'
    config.checkpoint_every, config.log_every = 5000, 100
    return config
