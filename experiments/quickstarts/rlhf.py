"""Asynchronous RLHF and Elastic Reset on a laptop (`python -m experiments.quickstart --which=rlhf`).

Fine-tunes a byte-level model on careless worked sums, improves it by Online DPO with a reward that can be checked,
synchronously and asynchronously from the same seeds and the same number of samples; trains a reward model on
preferences that a known gold reward labelled, and a policy on that; and compares Elastic Reset with what it has to beat
on the Lewis game. Interrupt it anywhere and run it again: it continues and ends with the same numbers.
"""
import contextlib
import os
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from configs.rlhf.quickstart import MODES
from experiments.rlhf.data import tasks
from experiments.rlhf.lewis import comparison as lewis
from experiments.rlhf.lewis import report as lewis_report
from experiments.rlhf.models.inference import Policy
from experiments.rlhf.policy import evaluation
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import report, stages, storage
from experiments.runtime.metrics import curve, read_metrics
from experiments.runtime.statistics import mean_and_spread
from experiments.train import train

HEADINGS = {'accuracy': 'right answers', 'kl': 'KL, nats a response', 'gold': 'gold reward', 'length': 'tokens'}
# Measured by the clock and therefore different in every run: not in metrics.json.
SECONDS = {'seconds_per_step': 'a step', 'rollout_generate_seconds': 'generating',
           'rollout_learner_wait_seconds': 'learner idle', 'rollout_generator_wait_seconds': 'generator idle',
           'rollout_load_seconds': 'loading weights', 'rollout_publish_seconds': 'publishing weights'}


def devices() -> tuple[jax.Device, int]:
    """The device that learns, and how many others generate: 1 if the machine has another.

    A CPU is made into two if jax has not looked at it yet: two programs at a time, on the same cores.
    """
    if jax.config.jax_num_cpu_devices < 2 and 'xla_force_host_platform_device_count' not in os.environ.get(
            'XLA_FLAGS', ''):
        with contextlib.suppress(RuntimeError):
            jax.config.update('jax_num_cpu_devices', 2)
    return jax.devices()[0], int(len(jax.devices()) > 1)


def policies(config: ml_collections.ConfigDict, generators: int) -> dict[str, ml_collections.ConfigDict]:
    """Name of the work directory -> config of the runs that learn from the reward that can be checked."""
    configs = {}
    for mode, staleness in MODES.items():
        for seed in config.seeds:
            one = config.policy.copy_and_resolve_references().unlock()
            one.seed, one.rollout.max_staleness = seed, staleness
            one.rollout.devices = generators  # the same split in both modes
            configs[f'{mode}_{seed}'] = one
    return configs


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs every stage that `workdir` does not hold yet and returns what `metrics.json` says."""
    learner, generators = devices()
    mesh = mesh_lib.make_mesh({}, [learner])
    workdir = stages.claim(config, workdir)
    clock = stages.Clock(workdir / 'seconds.json')
    config = config.copy_and_resolve_references().unlock()

    # ---- 1, 2: what RL starts from, and a reward model ---------------------------------------------------------------
    clock.stage('fine-tuning', lambda: train(config.sft, workdir / 'sft', mesh=mesh, name='1/6 fine-tuning'))
    config.reward_model.weights = str(workdir / 'sft')
    clock.stage('reward model', lambda: train(config.reward_model, workdir / 'reward_model', mesh=mesh,
                                              name='2/6 reward model'))

    # ---- 3, 4: policies ----------------------------------------------------------------------------------------------
    for name, policy in policies(config, generators).items():
        policy.weights = str(workdir / 'sft')
        clock.stage(name.rsplit('_', 1)[0], lambda: train(policy, workdir / name, mesh=mesh, name=f'3/6 {name}'))
    config.proxy.weights, config.proxy.reward.model = str(workdir / 'sft'), str(workdir / 'reward_model')
    config.proxy.rollout.devices = generators
    clock.stage('reward model as reward', lambda: train(config.proxy, workdir / 'proxy', mesh=mesh,
                                                        name='4/6 learned reward'))

    # ---- 5, 6: games, numbers, page ----------------------------------------------------------------------------------
    comparison = clock.stage('Lewis game', lambda: lewis.compare(config.lewis, workdir / 'lewis'))
    metrics = clock.stage('evaluation', lambda: measure(config, workdir)) | {'lewis': comparison.metrics}
    storage.write_json(workdir / 'metrics.json', metrics)
    clock.stage('report', lambda: write_report(config, workdir, metrics, comparison, clock.seconds))
    return metrics


# ---- Numbers ---------------------------------------------------------------------------------------------------------

def measure(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Everything of the policies in `metrics.json`: on held-out problems, at the temperature they were trained at."""
    task, settings = tasks.get(config.policy.data), config.evaluation
    held_out = task.prompts(config.policy.data, config.policy.data.heldout)
    start = Policy.load(workdir / 'sft')
    scores = {'reward': lambda c: task.reward(c.texts, c.rows), 'gold': lambda c: task.gold(c.texts, c.rows)}

    def one(name: str) -> dict[str, float]:
        policy = Policy.load(workdir / name)
        sampling = policy.sampling(temperature=settings.temperature,
                                   max_new_tokens=config.policy.sampling.max_new_tokens)
        measured = evaluation.evaluate_policy(
            policy, [p.text for p in held_out], [p.row for p in held_out], sampling, key=jax.random.key(0),
            num_samples=settings.num_samples, batch_size=settings.batch_size, task=task, reference=start, **scores)[0]
        return {key: measured[key] for key in ('accuracy', 'gold', 'kl', 'perplexity', 'length', 'ended')}

    methods = {'fine-tuned': one('sft')}
    for mode in MODES:
        methods[mode] = mean_and_spread([one(f'{mode}_{seed}') for seed in config.seeds])
    methods['learned reward'] = one('proxy')
    pairs = read_metrics(workdir / 'reward_model' / 'metrics.jsonl')
    return {'methods': methods, 'staleness': {mode: staleness(workdir / f'{mode}_{config.seeds[0]}') for mode in MODES},
            'reward_model_accuracy': last(pairs, 'heldout_accuracy'), 'num_heldout': len(held_out),
            'over_optimisation': over_optimisation(workdir / 'proxy')}


def last(rows: list[Mapping[str, float]], name: str) -> float:
    return [row[name] for row in rows if row.get(name) is not None][-1]


def staleness(workdir: pathlib.Path) -> dict[str, float]:
    values = curve(workdir, 'token_staleness')[1]
    return {'mean': statistics.fmean(values), 'greatest': max(values)}


def over_optimisation(workdir: pathlib.Path) -> dict[str, float]:
    """Learned and gold reward at the start, where gold was highest, and at the end."""
    steps, gold = curve(workdir, 'gold')
    reward = curve(workdir, 'reward')[1]
    best = int(np.argmax(gold))
    return {'best_step': steps[best]} | {f'{name}_{where}': values[i] for where, i in
                                         (('first', 0), ('best', best), ('last', -1))
                                         for name, values in (('gold', gold), ('reward', reward))}


# ---- Page ------------------------------------------------------------------------------------------------------------

def write_report(config: ml_collections.ConfigDict, workdir: pathlib.Path, metrics: dict[str, Any],
                 comparison: lewis.Comparison, seconds: Mapping[str, float]) -> None:
    first, num_seeds = config.seeds[0], len(config.seeds)
    page = report.Report('Asynchronous RLHF and Elastic Reset',
                         'Every number on this page was measured in this run. ± is the standard deviation over '
                         f'{num_seeds} seeds; rows without it are single runs.')
    page.heading('Methods')
    page.table(report.rows_with_spread(metrics['methods'], HEADINGS))
    page.text(f'On {metrics["num_heldout"]} held-out sums, {config.evaluation.num_samples} samples each at temperature '
              f'{config.evaluation.temperature:g}. KL of the responses and their perplexity are against the fine-tuned '
              'model. Synchronous and asynchronous Online DPO draw the same number of samples and take the same number '
              f'of steps ({config.policy.num_steps} of {config.policy.batch_size} prompts, '
              f'{config.policy.algorithm.num_samples} responses each); the reward is 1 for the right answer.')

    page.heading('A reward that can be checked')
    runs = {mode: workdir / f'{mode}_{first}' for mode in MODES}
    for name, caption in (('reward', 'share of right answers while training'), ('kl', 'drift: KL to the fine-tuned '
                          'model, nats a response'), ('token_staleness', 'realised staleness, versions'),
                          ('logprob_gap', 'mean distance of the learner from the sampler, nats a token')):
        page.lines({mode: curve(run, name) for mode, run in runs.items()}, caption)
    page.lines({mode: (curve(run, 'kl')[1], curve(run, 'reward')[1]) for mode, run in runs.items()},
               'reward against drift', x='KL')

    page.heading('Who waits for whom')
    page.table([{'': mode} | {label: median(run, name) for name, label in SECONDS.items()}
                for mode, run in runs.items()])
    page.text('Medians over the steps of one run, in seconds. Learner and generator have a device each, but on a CPU '
              'share its cores: where the learner keeps all of them busy, generating at the same time gains nothing.')

    page.heading('A reward that is learned')
    kl = curve(workdir / 'proxy', 'kl')[1]
    for name, label in (('reward', 'learned reward: what is trained on'), ('gold', 'gold reward: what is wanted')):
        steps, values = curve(workdir / 'proxy', name)
        page.lines({label: (steps, values)}, label)
        page.lines({label: (kl, values)}, f'{label}, against drift', x='KL')
    page.text(f'The reward model orders {metrics["reward_model_accuracy"]:.1%} of held-out pairs as the gold reward '
              'does.')

    page.heading('Elastic Reset on the Lewis game')
    lewis_report.write_section(page, config.lewis, comparison)

    page.heading('Training')
    page.lines({'fine-tuning': curve(workdir / 'sft', 'loss')}, 'cross entropy')
    page.lines({'reward model': curve(workdir / 'reward_model', 'loss')}, 'loss of the reward model')
    page.table([{'stage': name, 'seconds': value} for name, value in seconds.items()])
    page.save(workdir / 'report.html')


def median(workdir: pathlib.Path, name: str) -> float:
    """Median of a metric over its rows after the first, which holds the compilation."""
    values = curve(workdir, name)[1]
    return statistics.median(values[1:] or values)


def summary(metrics: dict[str, Any]) -> str:
    """The table of methods as text."""
    return '\n'.join(f'{name:16s} right answers {row["accuracy"]:.3f}   gold reward {row["gold"]:.3f}   '
                     f'KL {row["kl"]:.3f}' for name, row in metrics['methods'].items())
