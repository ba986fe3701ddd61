"""A byte-level model that does sums in words, from scratch on two CPU cores: where the small RL runs start.

    python -m experiments.train --config=configs/rlhf/sft_arithmetic.py --workdir=runs/arithmetic/sft

Problems of one step with numbers up to 9, made up on the spot; of the demonstrations four in ten have a fault. Training
stops early on purpose, for reinforcement learning needs room: after a minute, 52 % of held-out answers sampled at
temperature 0.7 are right and 37 % at 1.0 (one run, 256 problems with two samples each).
"""
from configs.rlhf import base

PROBLEMS = dict(num_steps=1, max_number=9, operations='+-', seed=0, num_heldout=256, faults=0.4)
MODEL = dict(kind='gpt_neox', size='70m', vocab_size=259, width=64, depth=2, num_heads=4, max_length=128)
ROWS = 5000


def get_config():
    config = base.sft()
    config.num_steps, config.batch_size = 400, 64
    config.log_every, config.checkpoint_every = 50, 0
    config.model.update(MODEL)
    config.data.update(dict(task='arithmetic', num_rows=ROWS))
    config.data.options = PROBLEMS
    config.max_length, config.train_on_prompt = 98, False
    config.optimizer.learning_rate.update(dict(peak=3e-3, final=1e-5, warmup_steps=50, decay='cosine'))
    config.optimizer.update(dict(b2=0.99, clip_norm=1.0))
    return config
