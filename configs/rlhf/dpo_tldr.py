"""Offline DPO on the TL;DR preferences that the reward model is trained on, for comparison with Online DPO.

    python -m experiments.train --config=configs/rlhf/dpo_tldr.py:410m --workdir=runs/tldr_410m/dpo \\
        --config.data.path=tldr_preferences --config.weights=runs/tldr_410m/sft --config.tokenizer=pythia-410m-deduped

beta and learning rate are those of Online DPO (arXiv 2410.18252), which does not run the offline method; batch and
microbatches those of `reward_tldr.py`. 20 bytes a parameter: weight, two moments, gradient, reference.
"""
from configs.rlhf import base, reward_tldr


def get_config(size: str = '410m'):
    reward, config = reward_tldr.get_config(size), base.dpo()
    for field in ('batch_size', 'accumulate', 'num_steps', 'weights', 'tokenizer', 'max_length', 'eval_every'):
        config[field] = reward[field]
    config.model.update(reward.model)
    config.data.update(reward.data)
    config.loss.update(dict(beta=0.1, loss_type='sigmoid'))
    config.optimizer.learning_rate.update(dict(peak=3e-6, decay='linear'))
    return config
