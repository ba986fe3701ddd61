"""A byte-level model that does small sums, trained with RL on two CPU cores: ALGORITHM or ALGORITHM_async, and the
Elastic Reset family on PPO.

    python -m experiments.train --config=configs/rlhf/arithmetic.py:online_dpo --workdir=runs/arithmetic/online_dpo

ALGORITHM: online_dpo, ppo, rloo, proximal_rloo, grpo, best_of_n. Family: reset_to_init, reset_to_ema, elastic_reset.
Starts from `sft_arithmetic.py`; the reward is 1 for the right answer, the gold reward is logged beside it. With
--config.reward.kind=model --config.reward.model=runs/arithmetic/reward it is the learned one of `reward_arithmetic.py`.
Nothing here has been tuned. The gold reward of held-out sums goes from 0.86 to about 1.2 in 96 updates; docs/papers.md
has it for each algorithm, for N updates from a batch and for two more sizes (--config.model.width).
"""
from configs.parts import check_name
from configs.rlhf import base, sft_arithmetic

ALGORITHMS = ('online_dpo', 'ppo', 'rloo', 'proximal_rloo', 'grpo', 'best_of_n')
FAMILY = ('reset_to_init', 'reset_to_ema', 'elastic_reset')
NAMES = (*ALGORITHMS, *(f'{name}_async' for name in ALGORITHMS), *FAMILY)


def get_config(name: str = 'online_dpo'):
    check_name('arithmetic:', name, NAMES)
    algorithm = 'ppo' if name in FAMILY else name.removesuffix('_async')
    config = base.policy()
    config.num_steps, config.batch_size = 100, 64
    config.log_every, config.checkpoint_every, config.eval_every = 10, 0, 50
    config.model.update(sft_arithmetic.MODEL)
    config.weights = 'runs/arithmetic/sft'
    config.data.update(dict(task='arithmetic', num_rows=sft_arithmetic.ROWS))
    config.data.options = sft_arithmetic.PROBLEMS
    config.algorithm.update(dict(name=algorithm, num_samples=1 if algorithm == 'ppo' else 4))
    config.sampling.update(dict(max_new_tokens=40, temperature=1.0, max_prompt=14))
    config.reward.update(dict(gold='task', missing_eos='0'))
    if name.endswith('_async'):
        config.rollout.max_staleness = 1
    if name in FAMILY:
        config.elastic.update(dict(method=name, period=40, decay=0.98))
    config.optimizer.learning_rate.update(dict(peak=3e-4, decay='linear'))
    config.optimizer.clip_norm = 1.0
    return config
