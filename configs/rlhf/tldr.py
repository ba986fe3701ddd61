"""Pythia trained with RL to summarise Reddit posts (arXiv 2410.18252): `NAME_SIZE`, or `NAME_SIZE_async`; and PPO under
Elastic Reset at 410m, `ppo_elastic_410m`.

    python -m experiments.train --config=configs/rlhf/tldr.py:online_dpo_410m --workdir=runs/tldr_410m/online_dpo \\
        --config.data.path=tldr --config.weights=runs/tldr_410m/sft --config.reward.model=runs/tldr_410m/reward \\
        --config.tokenizer=pythia-410m-deduped --config.reward.gold=GOLD

NAME: online_dpo, ppo, rloo (the paper's Proximal RLOO), best_of_n. SIZE: 410m, 1b, 2.8b; policy and reward model have
one size. GOLD labels the preferences and judges (a 6.9b reward model); it is logged and never trained on.

131,072 episodes, 512 a step, at a learning rate of 3e-6 that falls linearly to 0 and moves once a batch, as published.
An episode is a prompt of two samples for online_dpo and best_of_n and one completion for ppo and rloo, so that the
former see twice as many completions. Responses have 53 tokens, as in every published training configuration (the
paper's table says 128, which is the evaluation's length: `experiments.evaluate --max_new_tokens=128`).

Hardware: four GPUs of 80 GB, or a TPU slice (`experiments.compile`). Asynchronous: three train on 504 episodes while
one generates, 129,024 in all; three devices split no width of these models, so each trainer holds all weights (on other
machines set rollout.devices and mesh), at 2.8b 64 GiB of them: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, since JAX takes
three quarters of a GPU by itself. ppo_2.8b_async, which has a critic of that size, needs about 110 GiB, more than such
a GPU has: on eight, --config.rollout.devices=4 --config.mesh.data=1 --config.mesh.fsdp=4 --config.accumulate=21 takes
32 GiB of each trainer. The published scripts have ppo and rloo at 410m and online_dpo at every size; at other sizes
ppo, rloo and best_of_n take the microbatches of online_dpo. They compute in float16 or bfloat16; here it is bfloat16
over float32 weights.

Batch and number of updates are the paper's (512 and 256); the configuration files of the authors' repository, as
shipped, take 128 a step and 1024 updates on one GPU, in float32 or float16 and without clipping:
--config.batch_size=128 --config.accumulate=8 --config.num_steps=1024 --config.optimizer.clip_norm=0. Pairs whose two
rewards are equal are left out of Online DPO here; of their trainers one takes the first sample as the better
(--config.algorithm.ties=order), the other the same sample as both (=same).

ppo_elastic joins this paper and arXiv 2312.07551 as the authors' development branch does
(`ppo_elastic_pythia410m_tldr.yml`): the average (decay 0.995) ticks at every update, the policy is reset to it, and it
to the initial policy, after each 34 % of the updates, and KL costs 0.001 instead of 0.05.
"""
import math

from configs.parts import check_name
from configs.rlhf import base

EPISODES, BATCH, BATCH_ASYNC = 131_072, 512, 504
# Microbatches of a step on four devices, and on three.
ACCUMULATE, ACCUMULATE_ASYNC = {'410m': 4, '1b': 8, '2.8b': 32}, {'410m': 8, '1b': 21, '2.8b': 28}
ALGORITHMS = {  # name, completions a prompt
    'online_dpo': ('online_dpo', 2), 'ppo': ('ppo', 1), 'rloo': ('proximal_rloo', 2), 'best_of_n': ('best_of_n', 2),
    'ppo_elastic': ('ppo', 1)}
NAMES = (*(f'{name}_{size}{end}' for name in ALGORITHMS if name != 'ppo_elastic' for size in ACCUMULATE
           for end in ('', '_async')), 'ppo_elastic_410m', 'ppo_elastic_410m_async')


def get_config(name: str = 'online_dpo_410m'):
    check_name('tldr:', name, NAMES)
    asynchronous = name.endswith('_async')
    kind, _, size = name.removesuffix('_async').rpartition('_')
    algorithm, num_samples = ALGORITHMS[kind]
    config = base.policy()
    config.batch_size = BATCH_ASYNC if asynchronous else BATCH
    config.accumulate = (ACCUMULATE_ASYNC if asynchronous else ACCUMULATE)[size]
    if kind == 'rloo':  # counts completions
        config.batch_size //= 2
        if name == 'rloo_410m_async':
            config.accumulate = 7  # 8 do not divide the 84 prompts of a device
    config.num_steps = EPISODES // BATCH
    config.log_every, config.checkpoint_every = 10, config.num_steps // 4
    config.eval_every, config.eval_prompts = config.num_steps // 4, 512
    config.model.update(dict(kind='gpt_neox', size=size, dtype='bfloat16', remat='full'))
    config.weights, config.tokenizer = f'runs/tldr_{size}/sft', f'models/pythia-{size}-deduped'
    config.data.update(dict(task='tldr', path='data/tldr', heldout='validation'))
    config.algorithm.update(dict(name=algorithm, num_samples=num_samples, beta=0.1, kl_coefficient=0.05, clip=0.2,
                                 gamma=1.0, lam=0.95, value_coefficient=0.1, value_clip=0.2, after_eos=True))
    config.sampling.update(dict(max_new_tokens=53, temperature=0.7, max_prompt=512))
    config.reward.update(dict(kind='model', model=f'runs/tldr_{size}/reward', missing_eos='-1',
                              batch_size={'410m': 64, '1b': 64, '2.8b': 32}[size]))
    if algorithm == 'ppo':
        config.algorithm.critic_weights = config.reward.model
    if kind == 'ppo_elastic':
        config.algorithm.kl_coefficient = 0.001
        config.elastic.update(dict(method='elastic_reset', period=math.ceil(0.34 * config.num_steps), decay=0.995,
                                   tick_on='step', reset_on='step'))
    config.reference.dtype = 'bfloat16'
    if asynchronous:
        config.rollout.update(dict(max_staleness=1, devices=1))
        config.mesh.update(dict(data=-1, fsdp=1))
    config.lr_per = 'batch'
    config.optimizer.learning_rate.update(dict(peak=3e-6, decay='linear'))
    config.optimizer.clip_norm = 1.0  # what the four-GPU runs had by default; those of one GPU did not clip
    return config
