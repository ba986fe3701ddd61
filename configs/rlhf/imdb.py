"""GPT-2 that continues film reviews so that they sound positive (arXiv 2312.07551): ppo, ppo_matched, nlpo,
reset_to_init, reset_to_ema, elastic_reset; and small_ARM, the same in minutes.

    python -m experiments.train --config=configs/rlhf/imdb.py:elastic_reset --workdir=runs/imdb/elastic_reset \\
        --config.data.path=imdb --config.weights=gpt2-imdb --config.tokenizer=gpt2-imdb \\
        --config.reward.model=distilbert-imdb

50 iterations of PPO in the released settings: five epochs, AdamW at 1e-6 with weight decay 1e-6 on all but biases, norm
clipped at 0.5, gamma 0.99, lambda 0.95, no clipping of values; 48 new tokens exactly after up to 64 of the review. The
KL controller aims at a KL a token: ppo 0.5 from a coefficient of 0.1, nlpo 1.0 from 1.0, all others 1.0 from 0.001
(ppo_matched is ppo with theirs, the arm to compare resets with). Resets follow iterations 1, 18 and 35; the average
(decay 0.995) ticks once an iteration, and where there is one KL is measured against it, as in the released code
(--config.elastic.kl_reference=init: against the initial policy, as in the text).

nlpo (arXiv 2210.01241) draws among the likeliest tokens of a mask policy, which has 0.9 of its probability on them, and
at least 100, and takes its ratios in that distribution. KL, as in the released code, is the mean log-ratio of the
policies without the mask on what was drawn under it: no divergence, and at times below 0. The mask policy is the
initial one throughout: it is renewed every 50 iterations, the whole run, and the released sampler keeps the first copy
in any case. That sampler draws among the 50 likeliest of what the mask leaves, and its ratios are of these too
(--config.sampling.top_k=50, which cuts the KL here as well). In training, held-out prompts are answered under the mask;
`experiments.evaluate` samples the policy without it.

What differs: a minibatch holds two whole responses (96 tokens, theirs 64), so that an iteration of 30 has 75 updates
and not 100; advantages are whitened over the iteration; tokens are drawn from the whole distribution but for EOS, and
scored in it, where the authors drew among the 50 likeliest and scored under all (--config.sampling.top_k=50
--config.sampling.scored=all; top_k alone draws and scores among the 50); the first 300 held-out prompts are evaluated
in training, where the released code reads 5,000 and all 25,000 at the end (--config.eval_prompts).

The reward is the published one, the probability of POSITIVE that a DistilBERT classifier (`lvwerra/distilbert-imdb`,
with its tokenizer.json) gives to the whole prompt and its continuation, which loses its beginning beyond 512 tokens. A
reward model trained on reviews of either sentiment (`reward_imdb.py`): --config.reward.model=runs/imdb/reward
--config.reward.label=''.

Hardware: one GPU. Drift, the policy's perplexity on human reviews: `experiments.evaluate --policy=RUN --drift=5000`.

small_ARM is the miniature: the GPT-2 of `sft_imdb.py:small` (0.9 million parameters), rewarded by
`reward_imdb.py:small`, with `:small_gold` logged beside it; docs/papers.md has the commands from nothing to a report.
Resets, KL, clipping, gamma and lambda are those above. What differs: 32 new tokens after up to 24, 32 prompts an
iteration of 2000 reviews that neither reward has seen, two epochs of four minibatches, 400 updates in all, at a
learning rate of 1e-4: the better of two (1e-4, 3e-4) by the gold reward at the end of small_ppo_matched, tried at seed
100 on an earlier fine-tuned model, whose stretches had an EOS. Measured there: the plain run takes the gold reward from
0.16 to 2.05 +- 0.26 at a drift perplexity of 307 +- 57 (107 at its start, five seeds); Elastic Reset has 0.145 +- 0.083
more than that run stopped at its drift perplexity, and 0.098 +- 0.061 less than the same on the way back to its start.
"""
from configs.parts import check_name
from configs.rlhf import base, sft_imdb

ARMS = {  # method of resets, coefficient and target of the KL
    'ppo': ('', 0.1, 0.5), 'ppo_matched': ('', 0.001, 1.0), 'nlpo': ('', 1.0, 1.0),
    'reset_to_init': ('reset_to_init', 0.001, 1.0), 'reset_to_ema': ('reset_to_ema', 0.001, 1.0),
    'elastic_reset': ('elastic_reset', 0.001, 1.0)}
NAMES = (*ARMS, *(f'small_{arm}' for arm in ARMS))


def get_config(name: str = 'elastic_reset'):
    check_name('imdb:', name, NAMES)
    arm = name.removeprefix('small_')
    method, coefficient, target = ARMS[arm]
    config = base.policy()
    config.num_steps, config.batch_size = 50, 30
    config.mesh.update(dict(data=1, fsdp=1))
    config.log_every, config.checkpoint_every = 1, 10
    config.eval_every, config.eval_prompts = 1, 300
    config.model.update(dict(kind='gpt2', size='124M', vocab_size=50257))
    config.weights = config.tokenizer = 'models/gpt2-imdb'
    config.data.update(dict(task='imdb', path='data/imdb', heldout='validation'))
    config.algorithm.update(dict(
        name='ppo', num_samples=1, num_minibatches=15, num_epochs=5, clip=0.2, gamma=0.99, lam=0.95,
        value_coefficient=0.5, value_clip=0.0, kl_coefficient=coefficient, kl_target=target, kl_rate=0.1,
        kl_unit='token', critic='separate'))
    config.sampling.update(dict(max_new_tokens=48, min_new_tokens=48, temperature=1.0, top_k=0, scored='drawn',
                                max_prompt=64))
    config.reward.update(dict(kind='model', model='models/distilbert-imdb', label='POSITIVE'))
    if arm == 'nlpo':
        config.algorithm.mask.update(dict(top_p=0.9, min_tokens=100, every=50))
    if method:
        config.elastic.update(dict(
            method=method, period=17, decay=0.995, tick_on='iteration', reset_on='iteration', reset_offset=0,
            kl_reference='init' if method == 'reset_to_init' else 'ema'))
    config.optimizer.learning_rate.update(dict(peak=1e-6, decay='constant'))
    config.optimizer.weight_decay.peak = 1e-6
    config.optimizer.update(dict(clip_norm=0.5, groups=((r'.*/bias', dict(weight_decay=0.0)), (r'.*', {}))))
    if name != arm:
        small(config)
    return config


def small(config) -> None:
    """Changes the lines in which a miniature differs."""
    config.batch_size = 32
    config.checkpoint_every, config.eval_every = 0, 0
    config.model.update(sft_imdb.SMALL)
    config.data.split, config.data.heldout = 'train[1000:3000]', 'validation[:512]'  # not the reward model's
    config.weights, config.tokenizer = 'runs/imdb_small/sft', 'runs/imdb_small/tokenizer'
    config.algorithm.num_minibatches, config.algorithm.num_epochs = 4, 2
    config.sampling.update(dict(max_new_tokens=32, min_new_tokens=32, max_prompt=24))
    config.reward.update(dict(model='runs/imdb_small/reward', label='', gold='runs/imdb_small/gold'))
    config.optimizer.learning_rate.peak = 1e-4
