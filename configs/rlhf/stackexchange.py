"""LLaMA-7B with LoRA that answers technical questions (arXiv 2312.07551, after StackLLaMA): ppo, reset_to_init,
reset_to_ema, elastic_reset.

    python -m experiments.train --config=configs/rlhf/stackexchange.py:elastic_reset --workdir=runs/stackexchange/er \\
        --config.data.path=stack_exchange_paired/data/rl --config.weights=runs/stackexchange/sft \\
        --config.reward.model=runs/stackexchange/reward --config.tokenizer=llama-7b

600 batches of 64 questions, whose results were read out there: PPO of four epochs with two updates each, Adam at
1.41e-5, gamma 1, lambda 0.95, clipping 0.2 of ratios and values, the value head on the policy's trunk. The coefficient
of the KL starts at 0.02 and aims at 6 nats a response. Rank 16, alpha 32 on queries and values. The average (decay
0.995) of A and B ticks after each epoch; policy and average are reset after batches 261 and 521, the value head never.

What differs: responses end at EOS, after 32 to 127 tokens (theirs ignored it and drew a length from that range);
advantages are whitened over the batch, not within one response; gradients of all microbatches count; no early stop of
epochs by KL (--config.algorithm.stop_kl=0.15: here measured by k3 before an update, there by k1 after it); no dropout
(theirs 0.05, 0.1 for the reward model), and the base in bfloat16 computation over float32 weights, not 8 bits.

Their script for plain PPO (`rlhf_llama_7b_sft_mine.yml`) starts from a coefficient of 0.2 and takes 8 questions a GPU,
and runs go on to 1250 steps: --config.algorithm.kl_coefficient=0.2 --config.num_steps=1250. Here ppo has what the
others have, so that they can be compared.

Hardware: four GPUs of 80 GB, the base over all of them. Drift: `experiments.evaluate --policy=RUN --drift=4000`.
"""
from configs.parts import check_name
from configs.rlhf import base

ARMS = ('ppo', 'reset_to_init', 'reset_to_ema', 'elastic_reset')


def get_config(name: str = 'elastic_reset'):
    check_name('stackexchange:', name, ARMS)
    config = base.policy()
    config.num_steps, config.batch_size, config.accumulate = 600, 64, 8
    config.log_every, config.checkpoint_every = 10, 100
    config.eval_every, config.eval_prompts = 20, 64
    config.model.update(dict(kind='llama', size='7B', dtype='bfloat16', remat='full'))
    config.lora.update(dict(rank=16, alpha=32.0))
    config.weights, config.tokenizer = 'runs/stackexchange/sft', 'models/llama-7b'
    config.bos = True  # as the tokenizer of LLaMA does
    config.data.update(dict(task='stackexchange', path='data/stack_exchange_paired/data/rl', split='train[4000:]',
                            heldout='train[:4000]', num_rows=100_000))
    config.algorithm.update(dict(
        name='ppo', num_samples=1, num_minibatches=2, num_epochs=4, clip=0.2, gamma=1.0, lam=0.95,
        value_coefficient=0.1, value_clip=0.2, critic='shared', kl_coefficient=0.02, kl_target=6.0,
        kl_rate=64 / 10_000, kl_unit='sequence'))
    config.sampling.update(dict(max_new_tokens=127, min_new_tokens=32, temperature=1.0, max_prompt=511))
    config.reward.update(dict(kind='model', model='runs/stackexchange/reward', batch_size=16))
    if name != 'ppo':
        config.elastic.update(dict(method=name, period=260, decay=0.995, tick_on='epoch', reset_on='iteration',
                                   reset_offset=0, reset_skip_first=True))
    config.optimizer.learning_rate.update(dict(peak=1.41e-5, decay='constant'))
    return config
