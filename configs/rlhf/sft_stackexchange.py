"""LLaMA-7B with LoRA fine-tuned on StackExchange answers (arXiv 2312.07551, after StackLLaMA).

    python -m experiments.train --config=configs/rlhf/sft_stackexchange.py --workdir=runs/stackexchange/sft \\
        --config.data.path=stack_exchange_paired/data/finetune --config.weights=llama-7b --config.tokenizer=llama-7b

Data: a folder with a split train of `question` and the better answer `response_j`. Rank 16, alpha 32 on queries and
values, 5000 steps of 8 rows a device (4 x 2 microbatches; the number of devices is not published), learning rate 1e-5
on a cosine after 100 steps, weight decay 0.05. Rows hold 1024 tokens. Unlike the published packing, which cuts texts
anywhere and lets one attend to the last, texts stay whole and by themselves. Dropout on the adapter is 0.05. The
published 8-bit base is left out: the base is float32 here, 4 bytes for each of 6.7 billion parameters; moments and
gradients exist for the adapter alone.
"""
from configs.rlhf import base


def get_config():
    config = base.sft()
    config.num_steps, config.batch_size, config.accumulate = 5000, 8, 2
    config.model.update(dict(kind='llama', size='7B', dtype='bfloat16', remat='full'))
    config.lora.update(dict(rank=16, alpha=32.0, dropout=0.05))
    config.weights = config.tokenizer = 'models/llama-7b'
    config.bos = True  # as the tokenizer of LLaMA does
    config.data.update(dict(task='stackexchange', path='data/stack_exchange_paired/data/finetune',
                            split='train[4000:]', heldout='train[:4000]'))
    config.max_length, config.packing = 1024, True
    config.optimizer.learning_rate.update(dict(peak=1e-5, warmup_steps=100, decay='cosine'))
    config.optimizer.weight_decay.peak = 0.05
    config.eval_every = 500
    return config
