"""The language quickstart, `python -m experiments.quickstart --which=rlhf`: each stage's config and what is drawn from
them.

`:tiny` takes the same path in a minute or two, to see that everything runs; its numbers mean nothing.
"""
from configs.rlhf import arithmetic, base, lewis, reward_arithmetic, sft_arithmetic

MODES = {'synchronous': 0, 'asynchronous': 1}  # name -> max_staleness


def get_config(size: str = 'full'):
    policy = arithmetic.get_config('online_dpo')
    policy.num_steps, policy.batch_size, policy.log_every, policy.eval_every = 60, 64, 2, 0
    proxy = policy.copy_and_resolve_references()
    proxy.num_steps, proxy.log_every, proxy.optimizer.learning_rate.peak = 100, 4, 1e-4
    proxy.reward.update(dict(kind='model', missing_eos=''))
    config = base.ConfigDict(dict(
        sft=sft_arithmetic.get_config(),
        reward_model=reward_arithmetic.get_config(),
        policy=policy,  # trained once a mode and seed
        seeds=(0, 1, 2),
        proxy=proxy,  # trained on the reward model
        evaluation=dict(num_samples=8, temperature=1.0, batch_size=100),
        lewis=lewis.get_config('tiny' if size == 'tiny' else 'quickstart'),
    ))
    if size == 'tiny':
        for stage in (config.sft, config.reward_model, config.policy, config.proxy):
            stage.num_steps, stage.batch_size, stage.log_every, stage.checkpoint_every = 6, 8, 2, 3
            stage.model.update(dict(width=32, depth=2))
            stage.data.num_rows, stage.data.options.num_heldout = 64, 8
        config.reward_model.eval_every = 6
        config.policy.sampling.max_new_tokens = config.proxy.sampling.max_new_tokens = 8
        config.evaluation.update(dict(num_samples=2, batch_size=8))
        config.seeds = (0, 1)
    elif size != 'full':
        raise ValueError(f"quickstart: size {size!r} is not 'full' or 'tiny'")
    return config.lock()
