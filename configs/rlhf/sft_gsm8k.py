"""Rho-1B fine-tuned on GSM8K's solutions.

    python -m experiments.train --config=configs/rlhf/sft_gsm8k.py --workdir=runs/gsm8k/sft \\
        --config.data.path=gsm8k --config.weights=rho-math-1b-v0.1 --config.tokenizer=rho-math-1b-v0.1

arXiv 2410.18252 starts from a released model, `realtreetune/rho-1b-sft-GSM8K` (40.3 % on the test set), and says
nothing of how it was made: this is the way there from data, and learning rate, batch and epochs are choices of this
repository that have not been tuned. The policy config takes either. Prompts are the paper's, calculator annotations are
removed, EOS is trained although the tokenizer pads with it; the texts of a batch are packed, each by itself. 16 bytes
for each of 1.1 billion parameters.
"""
from configs.rlhf import base

ROWS, EPOCHS = 7473, 3


def get_config():
    config = base.sft()
    config.batch_size, config.accumulate = 64, 8
    config.num_steps = EPOCHS * ROWS // config.batch_size
    config.model.update(dict(kind='llama', size='Rho-1B', dtype='bfloat16', remat='full'))
    config.weights = config.tokenizer = 'models/rho-math-1b-v0.1'
    config.bos = True  # as the tokenizer of LLaMA does
    config.data.update(dict(task='gsm8k', path='data/gsm8k', heldout='test'))
    config.max_length, config.train_on_prompt = 1024, False
    config.pack_batch = True
    config.optimizer.learning_rate.update(dict(peak=1e-5, warmup_steps=10, decay='cosine'))
    config.eval_every = 100
    return config
