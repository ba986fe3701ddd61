"""The StackExchange reward model: LLaMA-7B with LoRA and a scalar head (arXiv 2312.07551).

    python -m experiments.train --config=configs/rlhf/reward_stackexchange.py --workdir=runs/stackexchange/reward \\
        --config.data.path=stack_exchange_paired/data/reward --config.weights=runs/stackexchange/sft \\
        --config.tokenizer=llama-7b

Data: the first 100,000 rows of `question`, `response_j`, `response_k`; pairs of more than 512 tokens are left out. One
epoch in batches of 4 a device (how many is not published), rank 8, alpha 32, learning rate 2e-5 falling linearly to 0,
weight decay 0.001, dropout on the adapter 0.1. Memory as in `sft_stackexchange.py`.
"""
from configs.rlhf import base

PAIRS = 100_000


def get_config():
    config = base.reward_model()
    config.batch_size = 4
    config.num_steps = PAIRS // config.batch_size
    config.model.update(dict(kind='llama', size='7B', dtype='bfloat16', remat='full'))
    config.lora.update(dict(rank=8, alpha=32.0, dropout=0.1))
    config.weights, config.tokenizer, config.bos = 'runs/stackexchange/sft', 'models/llama-7b', True
    config.data.update(dict(task='stackexchange', path='data/stack_exchange_paired/data/reward', num_rows=PAIRS,
                            split='train', heldout='train[100000:104000]'))
    config.max_length = 512
    config.optimizer.learning_rate.update(dict(peak=2e-5, decay='linear'))
    config.optimizer.weight_decay.peak = 0.001
    config.eval_every = 1000
    return config
