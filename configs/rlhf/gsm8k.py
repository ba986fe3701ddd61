"""Rho-1B trained with RL on grade-school problems (arXiv 2410.18252): online_dpo, rloo, ppo, the first two
asynchronously (online_dpo_async, rloo_async), and the settings of the authors' earlier scripts (rloo_early, ppo_early).

    python -m experiments.train --config=configs/rlhf/gsm8k.py:online_dpo --workdir=runs/gsm8k/online_dpo \\
        --config.data.path=gsm8k --config.weights=rho-1b-sft-GSM8K --config.tokenizer=rho-1b-sft-GSM8K

The reward is 1 for the right number and 0 for any other answer; prompts have up to 512 tokens and responses 512. The
policy starts from a fine-tuned Rho-1B: the released `realtreetune/rho-1b-sft-GSM8K` or `sft_gsm8k.py`.

online_dpo: 256 prompts of 4 samples, 128 steps (131,072 completions). online_dpo_async: 144 prompts of 8 samples, 512
steps at 5e-6. rloo: 64 prompts of 4, 512 steps. rloo_async: 63 prompts of 4, 2048 steps (516,096 completions). ppo: 32
prompts of 8, two epochs, 512 steps; its critic is the policy with a fresh head. Learning rate 3e-6 where nothing else
is said, falling linearly to 0, once a batch, as published. EOS is trained although the tokenizer pads with it, which
the published runs did not.

rloo_early and ppo_early are `rloo_rho1b_gsm8k.yml` and `ppo_rho1b_gsm8k.yml` of the authors' development branch: 64
prompts of 8 samples and 64 of one, two epochs, temperature 0.6, KL at 1e-4, 400 new tokens, learning rate 1e-6, -1 for
a response that does not end.

Hardware: one GPU of 80 GB or more devices; asynchronously four, three of which train with all weights on each. The
accuracy on the test set: `experiments.evaluate --policy=RUN --split=test`.
"""
from configs.parts import check_name
from configs.rlhf import base

# algorithm, prompts a step, completions of each, microbatches, steps, learning rate
RUNS = {
    'online_dpo': ('online_dpo', 256, 4, 32, 131_072 // (256 * 4), 3e-6),
    'online_dpo_async': ('online_dpo', 144, 8, 6, 73_728 // 144, 5e-6),
    'rloo': ('proximal_rloo', 64, 4, 8, 131_072 // 256, 3e-6),
    'rloo_async': ('proximal_rloo', 63, 4, 7, 516_096 // 252, 3e-6),
    'ppo': ('ppo', 32, 8, 8, 512, 3e-6),
    'rloo_early': ('proximal_rloo', 64, 8, 16, 131_072 // 512, 1e-6),
    'ppo_early': ('ppo', 64, 1, 16, 131_072 // 64, 1e-6),
}


def get_config(name: str = 'online_dpo'):
    check_name('gsm8k:', name, RUNS)
    algorithm, config = RUNS[name][0], base.policy()
    _, config.batch_size, num_samples, config.accumulate, config.num_steps, rate = RUNS[name]
    config.log_every, config.checkpoint_every = 10, config.num_steps // 4
    config.eval_every, config.eval_prompts = config.num_steps // 8, 256
    config.model.update(dict(kind='llama', size='Rho-1B', dtype='bfloat16', remat='full'))
    config.weights = config.tokenizer = 'models/rho-1b-sft-GSM8K'
    config.bos = True  # as the tokenizer of LLaMA does
    config.data.update(dict(task='gsm8k', path='data/gsm8k', heldout='test'))
    config.algorithm.update(dict(name=algorithm, num_samples=num_samples, beta=0.1, kl_coefficient=0.05, clip=0.2,
                                 num_epochs=2 if algorithm == 'ppo' else 1, after_eos=True))
    config.sampling.update(dict(max_new_tokens=512, temperature=0.7, max_prompt=512))
    if name.endswith('_early'):
        config.algorithm.update(dict(num_epochs=2, kl_coefficient=1e-4))
        config.sampling.update(dict(max_new_tokens=400, temperature=0.6))
        config.reward.missing_eos = '-1'
    config.reference.dtype = 'bfloat16'
    if name.endswith('_async'):
        config.rollout.update(dict(max_staleness=1, devices=1))
        config.mesh.update(dict(data=-1, fsdp=1))
    config.lr_per = 'batch'
    config.optimizer.learning_rate.update(dict(peak=rate, decay='linear'))
    config.optimizer.clip_norm = 1.0
    return config
