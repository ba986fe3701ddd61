"""LLaMA-3.1-8B fine-tuned on No Robots (arXiv 2410.18252).

    python -m experiments.train --config=configs/rlhf/sft_no_robots.py --workdir=runs/no_robots/sft \\
        --config.data.path=no_robots --config.weights=Llama-3.1-8B --config.tokenizer=Llama-3.1-8B

Data: a folder with splits train (9,500 rows of `messages`) and test. Two epochs in batches of 128, learning rate 5e-6
falling linearly to 0 after 3 % of warm-up, no weight decay, 4096 tokens; that answers alone are trained on is our
choice. That is the paper's text; its code has three epochs in batches of 224 (--config.batch_size=224
--config.num_steps=127). The texts of a batch are packed, each by itself, which leaves its loss what it is. The
published RL runs had eight GPUs. 16 bytes for each of 8.0 billion parameters, 120 GiB in all, before what the backward
pass keeps.
"""
from configs.rlhf import base

ROWS, EPOCHS = 9500, 2


def get_config():
    config = base.sft()
    config.batch_size, config.accumulate = 128, 16
    config.num_steps = EPOCHS * ROWS // config.batch_size
    config.model.update(dict(kind='llama', size='3.1-8B', dtype='bfloat16', remat='full'))
    config.weights = config.tokenizer = 'models/Llama-3.1-8B'
    config.data.update(dict(task='no_robots', path='data/no_robots', heldout='test'))
    config.max_length, config.train_on_prompt = 4096, False
    config.pack_batch = True
    config.optimizer.learning_rate.update(
        dict(peak=5e-6, warmup_steps=round(0.03 * config.num_steps), first_step=1, decay='linear'))
    config.eval_every = 50
    return config
