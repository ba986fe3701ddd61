"""The reward model of the No Robots runs: LLaMA-3.1-8B on preferences between answers (arXiv 2410.18252).

    python -m experiments.train --config=configs/rlhf/reward_no_robots.py --workdir=runs/no_robots/reward \\
        --config.data.path=preferences --config.num_steps=STEPS --config.weights=runs/no_robots/sft \\
        --config.tokenizer=Llama-3.1-8B

Data: a folder with splits train and test; rows hold `messages` up to the question, `chosen` and `rejected` answers, or
two whole conversations under the latter names. One epoch in batches of 256, so STEPS is the number of pairs / 256 (the
paper does not name the set); learning rate 3e-6 falling linearly to 0, 1024 tokens. Memory as in `sft_no_robots.py`.
"""
from configs.rlhf import base


def get_config():
    config = base.reward_model()
    config.batch_size, config.accumulate = 256, 32
    config.model.update(dict(kind='llama', size='3.1-8B', dtype='bfloat16', remat='full'))
    config.weights, config.tokenizer = 'runs/no_robots/sft', 'models/Llama-3.1-8B'
    config.data.update(dict(task='no_robots', path='data/preferences', heldout='test'))
    config.max_length = 1024
    config.optimizer.learning_rate.update(dict(peak=3e-6, decay='linear'))
    config.eval_every = 50
    return config
