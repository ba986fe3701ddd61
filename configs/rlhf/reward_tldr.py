"""A TL;DR reward model that starts from the fine-tuned model of its size (arXiv 2410.18252).

    python -m experiments.train --config=configs/rlhf/reward_tldr.py:410m --workdir=runs/tldr_410m/reward \\
        --config.data.path=tldr_preferences --config.weights=runs/tldr_410m/sft --config.tokenizer=pythia-410m-deduped

Data: a folder with splits train (92,858 pairs: prompt, chosen, rejected) and validation, labelled by the gold reward
model (`rlhf_jax.tasks.tldr.relabel`). One epoch; the head has no bias and is read at EOS. Batches are those of one GPU
of the published scripts, which do not say how many there were. Texts have at most 638 tokens, the longest of that data;
the scripts allow 640. 16 bytes a parameter, as in `sft_tldr.py`.
"""
from configs.parts import check_name
from configs.rlhf import base

PAIRS = 92_858
BATCH = {'410m': 64, '1b': 16, '2.8b': 16}  # pairs a step


def get_config(size: str = '410m'):
    check_name('reward_tldr:', size, BATCH)
    config = base.reward_model()
    config.batch_size, config.accumulate = BATCH[size], 0  # microbatches: the least that fit
    config.num_steps = PAIRS // config.batch_size
    config.model.update(dict(kind='gpt_neox', size=size, dtype='bfloat16', remat='full'))
    config.weights, config.tokenizer = f'runs/tldr_{size}/sft', f'models/pythia-{size}-deduped'
    config.data.update(dict(task='tldr', path='data/tldr_preferences', heldout='validation'))
    config.max_length = 638
    config.optimizer.learning_rate.update(dict(peak=1e-5, decay='cosine'))
    config.eval_every = 500
    return config
