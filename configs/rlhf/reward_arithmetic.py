"""A reward model of worked sums, a proxy for the gold reward that labels its pairs
(`experiments/rlhf/data/tasks/arithmetic_gold.py`).

    python -m experiments.train --config=configs/rlhf/reward_arithmetic.py --workdir=runs/arithmetic/reward

Starts from `sft_arithmetic.py`; it sees few pairs and small ones, so that a policy can find what it gets wrong.
"""
from configs.rlhf import base, sft_arithmetic


def get_config():
    config = base.reward_model()
    config.num_steps, config.batch_size = 200, 32
    config.log_every, config.checkpoint_every, config.eval_every = 50, 0, 200
    config.model.update(sft_arithmetic.MODEL)
    config.weights = 'runs/arithmetic/sft'
    config.data.update(dict(task='arithmetic', num_rows=sft_arithmetic.ROWS))
    config.data.options = sft_arithmetic.PROBLEMS
    config.max_length = 96
    config.optimizer.learning_rate.update(dict(peak=1e-3, final=1e-5, warmup_steps=20, decay='cosine'))
    config.optimizer.update(dict(b2=0.99, clip_norm=1.0))
    return config
