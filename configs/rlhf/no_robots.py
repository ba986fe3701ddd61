"""LLaMA-3.1-8B trained with Online DPO to follow instructions (arXiv 2410.18252): online_dpo, online_dpo_async.

    python -m experiments.train --config=configs/rlhf/no_robots.py:online_dpo_async --workdir=runs/no_robots/async \\
        --config.data.path=no_robots --config.weights=runs/no_robots/sft --config.reward.model=runs/no_robots/reward \\
        --config.tokenizer=Llama-3.1-8B

100,000 episodes (prompts of two samples) in batches of 256 at a learning rate of 8e-7 that falls linearly to 0; beta
0.03, temperature 0.7, prompts up to 512 tokens and responses 1024; -10 for a response that does not end. AdamW's eps is
1e-5 and its weight decay 0.01, as in the published code. That code also made one update of every two batches and
repeated its first prompts; this does neither.

Hardware: eight GPUs of 80 GB, the parameters over all of them. Asynchronous: the published run trained on seven and
generated on one; seven split no width of the model, so here four train and four generate, each sharing one copy.
Eight TPU v6e are 0.3 GiB a chip short of it; by their compiler they hold online_dpo with --config.accumulate=64
--config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2, 28.1 of 31.2 GiB, at 42 s a batch.
"""
from configs.parts import check_name
from configs.rlhf import base

NAMES = ('online_dpo', 'online_dpo_async')
EPISODES = 100_000


def get_config(name: str = 'online_dpo'):
    check_name('no_robots:', name, NAMES)
    config = base.policy()
    config.seed = 3
    config.batch_size, config.accumulate = 256, 32
    config.num_steps = EPISODES // config.batch_size
    config.log_every, config.checkpoint_every = 10, 100
    config.eval_every, config.eval_prompts = 100, 256
    config.model.update(dict(kind='llama', size='3.1-8B', dtype='bfloat16', remat='full'))
    config.weights, config.tokenizer = 'runs/no_robots/sft', 'models/Llama-3.1-8B'
    config.data.update(dict(task='no_robots', path='data/no_robots', heldout='test'))
    config.algorithm.update(dict(name='online_dpo', num_samples=2, beta=0.03))
    config.sampling.update(dict(max_new_tokens=1024, temperature=0.7, max_prompt=512))
    config.reward.update(dict(kind='model', model='runs/no_robots/reward', missing_eos='-10', batch_size=16))
    config.reference.dtype = 'bfloat16'
    config.rollout.mesh.update(dict(data=-1, fsdp=1, tensor=4))  # four chips share a copy of the weights
    if name.endswith('_async'):
        config.rollout.update(dict(max_staleness=1, devices=4, mesh=dict(data=1, fsdp=1, tensor=-1)))
    config.optimizer.learning_rate.update(dict(peak=8e-7, decay='linear'))
    config.optimizer.weight_decay.peak = 0.01
    config.optimizer.eps = 1e-5
    return config
