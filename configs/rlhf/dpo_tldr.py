"""Offline DPO on the TL;DR preferences that the reward model is trained on, for comparison with Online DPO.

    python -m experiments.train --config=configs/rlhf/dpo_tldr.py:410m --workdir=runs/tldr_410m/dpo \\
        --config.data.path=tldr_preferences --config.weights=runs/tldr_410m/sft --config.tokenizer=pythia-410m-deduped

beta 0.05, a learning rate of 1e-6 on a cosine, batches of 16 pairs of up to 640 tokens and one epoch are those of the
authors' development branch (`dpo_pythia410m_tldr.yml`, written for 410m; the paper does not run the offline method). It
computes in float16, here it is bfloat16. 20 bytes a parameter: weight, two moments, gradient, reference.
"""
from configs.rlhf import base, reward_tldr


def get_config(size: str = '410m'):
    reward, config = reward_tldr.get_config(size), base.dpo()
    config.batch_size, config.accumulate, config.max_length = 16, 4, 640
    config.num_steps = reward_tldr.PAIRS // config.batch_size
    for field in ('weights', 'tokenizer', 'eval_every'):
        config[field] = reward[field]
    config.model.update(reward.model)
    config.data.update(reward.data)
    config.loss.update(dict(beta=0.05, loss_type='sigmoid'))
    config.optimizer.learning_rate.update(dict(peak=1e-6, decay='cosine'))
    return config
