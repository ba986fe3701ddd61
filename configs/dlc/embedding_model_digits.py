"""Diffusion over the digits' continuous embeddings: what the code model is compared with.

    python -m experiments.train --config=configs/dlc/embedding_model_digits.py --workdir=runs/digits/embedding_model
    python -m experiments.train --config=configs/dlc/generator_digits.py:embedding --workdir=runs/digits/on_embeddings
    python -m experiments.sample --unconditional --embedding_model=runs/digits/embedding_model \\
        --generator=runs/digits/on_embeddings --out=grid.png

It has about as many parameters as `code_model_digits.py` (0.46 and 0.48 million), as many steps, batches and the same
schedule.
"""
from configs.dlc import base


def get_config():
    config = base.embedding_model()
    config.num_steps, config.batch_size = 2000, 64
    config.log_every, config.checkpoint_every = 50, 500
    config.model.update(dict(width=240, depth=3, embedding_dim=96, time_dim=64))
    config.ema.update(dict(decay=0.995, ramp=True))
    config.optimizer.learning_rate.update(dict(peak=1e-3, warmup_steps=100, final=1e-5, decay='cosine'))
    config.data.path = 'runs/digits/codes/train'
    config.sampler.num_steps = 64
    return config
