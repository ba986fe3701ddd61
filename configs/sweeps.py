"""Named sweeps: `python -m experiments.sweep --name=NAME --workdir=… [--config.FIELD=… --seeds=…]`.

A sweep is the flags of that command, so that what a name means can be read here and changed there: a flag that is given
replaces the one of its name. docs/papers.md says which table or figure each of them makes, and which have been run.
"""

TLDR = '--config=configs/rlhf/tldr.py'
ARITHMETIC = '--config=configs/rlhf/arithmetic.py'
IMDB = '--config=configs/rlhf/imdb.py'
MINIBATCHES = (1, 2, 4, 8, 16, 32, 64)  # N of arXiv 2410.18252, figures 3 and 4
# Reward, gold reward, KL and drift: the policy's perplexity on the first 100 held-out reviews.
MEASURE_IMDB = '--evaluate=--temperature=1 --batch_size=128 --drift=100'
IMDB_SMALL = (IMDB, '--seeds=5', MEASURE_IMDB, '--trade_off=evaluate.gold,evaluate.drift_perplexity')

# Reward, both languages' BLEU and the negative log-likelihood of people's English, held out, of every checkpoint.
TRANSLATION_SMALL = ('--config=configs/rlhf/translation.py:small_game', '--config.speaker=runs/small/speaker',
                     '--config.listener=runs/small/listener', '--seeds=5', '--config.evaluation.every=0',
                     '--config.evaluation.language_model=runs/small/captions', '--evaluate=--step=all',
                     '--trade_off=evaluate.reward_de,evaluate.nll_en')
# Of a period of 250, or of half as long: the last checkpoints are of steps 249, 498, 747, 996 and 1000.
BEFORE_RESETS = ('--config.checkpoint_every=249', '--config.keep_checkpoints=5')


def _list(values) -> str:
    return ','.join(str(value) for value in values)


def tldr_minibatches(algorithm: str, prompts: int = 512) -> tuple[str, ...]:
    """N updates from one batch: minibatches and their number stay what they are, the batch they come from grows.

    The learning rate moves once a batch, as published, so that it is lower on the average for larger N (0.498 of its
    peak at N = 1, 0.375 at N = 64); --config.lr_per=step keeps it equal.
    """
    return (TLDR, f'--variants={algorithm}_410m', f'--zip.algorithm.num_minibatches={_list(MINIBATCHES)}',
            f'--zip.batch_size={_list(prompts * n for n in MINIBATCHES)}',
            f'--zip.num_steps={_list(256 // n for n in MINIBATCHES)}',
            f'--zip.eval_every={_list(max(1, 64 // n) for n in MINIBATCHES)}', '--config.checkpoint_every=0')


def arithmetic_minibatches(algorithm: str, samples: int = 4) -> tuple[str, ...]:
    """The same on sums: minibatches of 256 completions for every algorithm, `samples` a prompt, and 96 updates; the
    learning rate moves with each update."""
    prompts = 256 // samples
    return (ARITHMETIC, f'--variants={algorithm}', f'--config.algorithm.num_samples={samples}',
            '--zip.algorithm.num_minibatches=1,4,16', f'--zip.batch_size={_list(prompts * n for n in (1, 4, 16))}',
            '--zip.num_steps=96,24,6', '--config.log_every=1', '--config.eval_every=0',
            '--evaluate=--num_samples=8 --temperature=1 --batch_size=100', '--seeds=3')


SWEEPS: dict[str, tuple[str, ...]] = {
    # ---- Asynchronous RLHF, TL;DR ------------------------------------------------------------------------------------
    **{f'tldr_minibatches_{name}': tldr_minibatches(name, 256 if name == 'rloo' else 512)
       for name in ('online_dpo', 'ppo', 'rloo', 'best_of_n')},
    # Figure 5, left: size of the policy; right: size of the reward model that a policy of 410m learns from.
    'tldr_policy_sizes': (TLDR, '--variants=online_dpo_410m,online_dpo_1b,online_dpo_2.8b',
                          *tldr_minibatches('online_dpo')[2:]),
    'tldr_reward_sizes': (*tldr_minibatches('online_dpo'),
                          '--sweep.reward.model=runs/tldr_410m/reward,runs/tldr_1b/reward,runs/tldr_2.8b/reward'),
    # Figure 7: more passes over a batch, where generating takes the longer. That there are three is ours.
    'tldr_epochs': (TLDR, '--variants=online_dpo_410m,online_dpo_1b,online_dpo_2.8b',
                    '--sweep.algorithm.num_epochs=1,2,3'),
    # Figure 8: best and worst of K = 4 in half the steps, where training takes the longer.
    'tldr_samples': (TLDR, '--variants=online_dpo_410m,online_dpo_1b,online_dpo_2.8b',
                     '--zip.algorithm.num_samples=2,4', '--zip.num_steps=256,128', '--zip.eval_every=64,32'),
    'tldr_asynchronous': (TLDR, '--variants=' + _list(f'online_dpo_{size}{end}' for size in ('410m', '1b', '2.8b')
                                                      for end in ('', '_async'))),
    # Elastic Reset on TL;DR, against PPO at the same price of KL and at the published one: of the authors' branch.
    'tldr_elastic': (TLDR, '--variants=ppo_410m,ppo_elastic_410m', '--sweep.algorithm.kl_coefficient=0.001,0.05',
                     '--seeds=3', '--baseline=variant=ppo_410m, kl_coefficient=0.05'),
    # ---- Asynchronous RLHF, chat and mathematics ---------------------------------------------------------------------
    'no_robots_asynchronous': ('--config=configs/rlhf/no_robots.py', '--variants=online_dpo,online_dpo_async'),
    'gsm8k': ('--config=configs/rlhf/gsm8k.py', '--variants=online_dpo,online_dpo_async,rloo,rloo_async,ppo'),
    # ---- Elastic Reset -----------------------------------------------------------------------------------------------
    'imdb': (IMDB, '--seeds=5', '--baseline=variant=ppo_matched',
             '--variants=ppo,ppo_matched,nlpo,reset_to_init,reset_to_ema,elastic_reset'),
    'imdb_kl': (f'{IMDB}:ppo_matched', '--sweep.algorithm.kl_coefficient=0.001,0.01,0.1,0.3,1',
                '--config.algorithm.kl_target=0', '--seeds=5'),
    'stackexchange': ('--config=configs/rlhf/stackexchange.py',
                      '--variants=ppo,reset_to_init,reset_to_ema,elastic_reset'),
    # ---- On two CPU cores --------------------------------------------------------------------------------------------
    'arithmetic_staleness': (f'{ARITHMETIC}:online_dpo', '--sweep.rollout.max_staleness=0,1,2,4', '--seeds=3',
                             '--config.num_steps=96', '--config.log_every=4', '--config.eval_every=0',
                             '--evaluate=--num_samples=8 --temperature=1 --batch_size=100'),
    **{f'arithmetic_minibatches_{name}': arithmetic_minibatches(name)
       for name in ('online_dpo', 'rloo', 'proximal_rloo', 'grpo')},
    'arithmetic_minibatches_ppo': arithmetic_minibatches('ppo', samples=1),
    'arithmetic_minibatches_best_of_2': arithmetic_minibatches('best_of_n', samples=2),
    # `imdb.py:small_ARM`. Arms, and plain PPO on the way back to its start, in small steps, for the way is curved and
    # the lines of a coarse one lie below it; prices of KL that stay what they are; decay and period of Elastic Reset,
    # measured nine or 15 iterations after a reset and, at the end, right after one; PPO that leaves out the updates for
    # which a batch has moved too far.
    'imdb_small': (*IMDB_SMALL, '--baseline=variant=small_ppo_matched',
                   '--interpolate=' + _list(i / 20 for i in range(21)),
                   '--variants=' + _list(f'small_{arm}' for arm in (
                       'ppo_matched', 'elastic_reset', 'reset_to_init', 'reset_to_ema', 'ppo', 'nlpo'))),
    'imdb_small_kl': (*IMDB_SMALL, '--variants=small_ppo_matched', '--config.algorithm.kl_target=0',
                      '--sweep.algorithm.kl_coefficient=0.01,0.03,0.1,0.3'),
    'imdb_small_elastic': (*IMDB_SMALL, f'{MEASURE_IMDB} --step=all', '--variants=small_elastic_reset',
                           '--sweep.elastic.decay=0.8,0.9,0.98', '--zip.elastic.period=10,17', '--zip.num_steps=51,52',
                           '--config.checkpoint_every=50'),
    'imdb_small_stop_kl': (*IMDB_SMALL, '--variants=small_ppo_matched', '--sweep.algorithm.stop_kl=0.005,0.01,0.02'),
    # `translation.py:small_game` on Multi30k; its docstring makes what it starts from, and has the flags of the text.
    # The plain game, on the way back to its start and at six checkpoints, and prices of KL; resets, each measured a few
    # steps before a reset (--report --at=996) and right after the last; decays and periods of Elastic Reset.
    'translation_small': (*TRANSLATION_SMALL, '--sweep.kl.coefficient=0,0.01,0.03,0.1,0.3', '--baseline=coefficient=0',
                          '--interpolate=' + _list(i / 10 for i in range(11)), '--config.checkpoint_every=166',
                          '--config.keep_checkpoints=7'),
    'translation_small_resets': (*TRANSLATION_SMALL, *BEFORE_RESETS,
                                 '--sweep.elastic.method=elastic_reset,reset_to_init,reset_to_ema'),
    'translation_small_elastic': (*TRANSLATION_SMALL, *BEFORE_RESETS, '--config.elastic.method=elastic_reset',
                                  '--sweep.elastic.decay=0.98,0.995', '--sweep.elastic.period=125,250'),
    # A writer of codes from earlier weights; `quickstart --which=align` makes what it starts from.
    'align_staleness': ('--config=configs/dlc/align_digits.py', '--variants=online_dpo,rloo',
                        '--sweep.rollout.max_staleness=0,1,4,16', '--seeds=3', '--first_seed=1',
                        '--config.num_steps=30', '--config.eval_every=30', '--config.eval_prompts=80'),
}
