"""A byte-level model that does small sums, from scratch on two CPU cores: where the small RL runs start.

    python -m experiments.train --config=configs/rlhf/sft_arithmetic.py --workdir=runs/arithmetic/sft

Sums of two steps with numbers up to 9, made up on the spot. The demonstrations are careless: six in ten have a fault,
which for half of those costs the right answer. Reinforcement learning has something to mend.
"""
from configs.rlhf import base

PROBLEMS = dict(num_steps=2, max_number=9, operations='+-', words=False, seed=0, num_heldout=100, faults=0.6)
MODEL = dict(kind='gpt_neox', size='70m', vocab_size=259, width=64, depth=3, num_heads=4, max_length=128,
             init_std=0.1)
ROWS = 1000


def get_config():
    config = base.sft()
    config.num_steps, config.batch_size = 800, 64
    config.log_every, config.checkpoint_every = 50, 0
    config.model.update(MODEL)
    config.data.update(dict(task='arithmetic', num_rows=ROWS))
    config.data.options = PROBLEMS
    config.max_length, config.train_on_prompt = 64, False
    config.optimizer.learning_rate.update(dict(peak=4e-3, final=0.0, warmup_steps=20, decay='cosine'))
    config.optimizer.update(dict(b2=0.98, clip_norm=1.0))
    return config
