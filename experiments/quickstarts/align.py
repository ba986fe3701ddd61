"""Text to image on pairs of handwritten digits, improved by a reward on the pictures
(`python -m experiments.quickstart --which=align`).

Trains what the text quickstart trains, and two judges on different handwritten digits. The small LLaDA then writes
codes, the frozen generator draws them, and the proxy judge says how sure it is of what the caption asks for; LLaDA
learns from that, on captions of pairs that were trained on. The gold judge, which nothing was trained on, reports on
all pairs. Interrupt it anywhere and run it again: it continues and ends with the same numbers.
"""
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from configs.dlc import align_digits
from configs.dlc.quickstart_align import METHODS
from dlc_jax.diffusion.gaussian import to_uint8
from experiments.align import evaluation
from experiments.dlc.data import codestore, digit_pairs
from experiments.dlc.generator import Generator
from experiments.dlc.judge import Judge, PictureJudge
from experiments.dlc.text_to_code import TextToCode
from experiments.quickstarts import text_to_image
from experiments.quickstarts.text_to_image import PROMPTS, UNSEEN
from experiments.runtime import checks, launch, report, stages, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import curve
from experiments.runtime.progress import bar
from experiments.runtime.statistics import mean_and_spread
from experiments.train import train
from rlhf_jax import elastic_reset

Model = Callable[[], TextToCode]
START = 'fine-tuned'
HEADINGS = {'seen': 'both right, seen pairs', 'unseen': 'both right, unseen pairs', 'proxy': 'proxy, seen',
            'proxy_unseen': 'proxy, unseen', 'kl': 'KL estimate, nats a code', 'code_distance': 'code distance',
            'vendi': 'Vendi score', 'frechet': 'Fréchet distance'}
TEXTS = tuple(text for _, text in PROMPTS)
LABELS = np.array([label for label, _ in PROMPTS])
SEEN = ~UNSEEN[LABELS]
SPLITS = {'proxy': 'heldout', 'gold': 'train'}  # judge -> the handwritten digits it is fitted to


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for methods or shares of the way that mean nothing, or a `text` that is no text quickstart,
    finished or begun."""
    if config.text and not (storage.resolve(config.text) / 'config.json').exists():
        raise ValueError(f'text={config.text}: holds no text quickstart; give the --workdir of one, or leave it empty '
                         'to train what it trains')
    if not config.methods:
        raise ValueError(f'methods=(): name some of {tuple(METHODS)}')
    for method in config.methods:
        checks.choice('methods', method, METHODS)
    launch.shares('interpolate', ','.join(map(str, config.interpolate)))


def fit_judges(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, PictureJudge]:
    """The judges, each fitted to digits that the other has not seen and written to a work directory of its own."""
    data = config.text_to_image.encoder.data
    side = digit_pairs.SIDE
    for name, split in SPLITS.items():
        if not (workdir / name / 'config.json').exists():
            judge = Judge.fit(*digit_pairs.single_digits(split, heldout=data.heldout, seed=data.split_seed),
                              seed=config.judge_seed)
            PictureJudge(judge, (side, side, 1), digit_pairs.REGIONS).save(workdir / name)
    return {name: PictureJudge.load(workdir / name) for name in SPLITS}


def write_captions(workdir: pathlib.Path) -> None:
    """Captions of the seen and of the unseen pairs in all phrasings, with their labels."""
    workdir.mkdir(parents=True, exist_ok=True)
    for name, chosen in (('seen', SEEN), ('unseen', ~SEEN)):
        lines = (json.dumps({'caption': text, 'label': int(label)})
                 for (label, text), among in zip(PROMPTS, chosen) if among)
        with storage.write_whole(workdir / f'{name}.jsonl') as file:
            file.write(('\n'.join(lines) + '\n').encode())


def policies(config: ml_collections.ConfigDict, workdir: pathlib.Path,
             text: pathlib.Path) -> dict[str, dict[str, ml_collections.ConfigDict]]:
    """{method: {name of the work directory: config of the run}}, one run a seed."""
    runs: dict[str, dict[str, ml_collections.ConfigDict]] = {}
    for method in config.methods:
        of_method = align_digits.get_config(METHODS[method])
        for seed in config.seeds:
            one = config.policy.copy_and_resolve_references().unlock()
            one.seed, one.algorithm.name, one.elastic = seed, of_method.algorithm.name, of_method.elastic
            if one.elastic.method:  # two resets, the last of them a fifth of the run before its end
                one.elastic.period = max(one.num_steps * 2 // 5, 1)
            one.rollout.max_staleness = of_method.rollout.max_staleness
            one.weights, one.generator.path = str(text / 'text_to_code'), str(text / 'generator')
            one.data.update({name: str(workdir / 'captions' / f'{split}.jsonl')
                             for name, split in (('path', 'seen'), ('heldout', 'unseen'))})
            one.reward.update(dict(model=str(workdir / 'judges' / 'proxy'), gold=str(workdir / 'judges' / 'gold')))
            runs.setdefault(method, {})[f'{METHODS[method]}_{seed}'] = one
    return runs


def between(start: Model, end: Model, alpha: float) -> TextToCode:
    """The model whose weights are a share `alpha` of the way from those of `start` to those of `end`."""
    before, after = start(), end()
    return dataclasses.replace(after, params=elastic_reset.interpolate(before.params, after.params, alpha))


def controls(config: ml_collections.ConfigDict, models: Mapping[str, Model],
             runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Model]]:
    """{row of the table: {name: model}}: the runs of the first method, put back to the start by degrees."""
    method = config.methods[0]
    return {f'{method}, {alpha:g} of the way': {
        f'{name}_alpha_{alpha:g}': functools.partial(between, models[START], models[name], alpha)
        for name in runs[method]} for alpha in config.interpolate}


def draw(config: ml_collections.ConfigDict, model: TextToCode, generator: Generator, seed: int,
         name: str) -> dict[str, np.ndarray]:
    """Codes and pictures of all prompts, with the samplers of the text quickstart and the noise of `seed`."""
    code_key, image_key = jax.random.split(jax.random.key(seed))
    text = config.text_to_image
    codes = model.sample(code_key, TEXTS, batch_size=text.sample_batch, progress=bar(f'{name}, codes', len(TEXTS)),
                         **dict(text.text_to_code.sampler))
    x = generator.sample(image_key, codes, len(codes), batch_size=text.sample_batch,
                         progress=bar(f'{name}, images', len(codes)))
    return {'codes': codes, 'images': np.asarray(to_uint8(x))}


def sample_sets(config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Mapping[str, Model],
                text: pathlib.Path) -> dict[str, list[dict[str, np.ndarray]]]:
    """{model: one draw a sample seed}."""
    generator = functools.cache(lambda: Generator.load(text / 'generator'))  # one object: compiled once
    sets = {}
    for name, load in models.items():
        model = functools.cache(load)
        sets[name] = [stages.once(workdir / 'samples' / f'{name}_{seed}.npz',
                                  lambda seed=seed: draw(config, model(), generator(), seed, name))
                      for seed in config.sample_seeds]
    return sets


def measure_model(config: ml_collections.ConfigDict, judges: Mapping[str, PictureJudge], real: np.ndarray,
                  draws: list[dict[str, np.ndarray]], model: Model, start: Model) -> dict[str, float]:
    """One row of the table: means over the draws of a model.

    Args:
        real: held-out pictures of seen pairs, uint8 [N, H, W, C].
        start: the model that it began as.
    """
    both = np.mean([evaluation.right(judges['gold'], one['images'], LABELS) for one in draws], 0)
    proxy = np.mean([judges['proxy'].agreement(one['images'] / 255.0, LABELS) for one in draws], 0)
    kl = 0.0
    if model is not start:
        kl = float(evaluation.drift(model(), start(), TEXTS, draws[0]['codes'], num_masks=config.drift_masks).mean())
    stacked = {name: np.stack([one[name] for one in draws], 1)[SEEN] for name in ('codes', 'images')}
    seen_images = np.concatenate([one['images'][SEEN] for one in draws])
    return {'seen': float(both[SEEN].mean()), 'unseen': float(both[~SEEN].mean()),
            'proxy': float(proxy[SEEN].mean()), 'proxy_unseen': float(proxy[~SEEN].mean()), 'kl': kl,
            **evaluation.diversity(judges['gold'], stacked['codes'], stacked['images']),
            'frechet': evaluation.frechet_distance(judges['gold'], seen_images, real)}


def measure(config: ml_collections.ConfigDict, judges: Mapping[str, PictureJudge],
            stores: Mapping[str, codestore.CodeStore], sets: Mapping[str, list[dict[str, np.ndarray]]],
            models: Mapping[str, Model], rows_of: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything in `metrics.json`: a row a method, mean and standard deviation over its seeds.

    Args:
        rows_of: {row of the table: {name of a model: ...}}, but for the start.
    """
    real = {split: np.asarray(stores[split].array('images')) for split in ('heldout', 'unseen')}
    row = lambda name: measure_model(config, judges, real['heldout'], sets[name], models[name], models[START])
    methods = {START: row(START)}
    for method, of_method in rows_of.items():
        methods[method] = mean_and_spread([row(name) for name in of_method])
    judge = lambda name, split: float(evaluation.right(
        judges[name], real[split], np.asarray(stores[split].array('labels'))).mean())
    return {'methods': methods, 'judges': {name: {split: judge(name, split) for split in real} for name in judges}}


def write_report(config: ml_collections.ConfigDict, workdir: pathlib.Path, metrics: dict[str, Any],
                 seconds: dict[str, float], sets: Mapping[str, list[dict[str, np.ndarray]]],
                 runs: Mapping[str, Mapping[str, Any]]) -> None:
    page = report.Report('Text to image improved by reward, on pairs of handwritten digits',
                         'Every number on this page was measured in this run.' + (
                             f' ± is the standard deviation over {len(config.seeds)} seeds.'
                             if len(config.seeds) > 1 else f' One run a method, seed {config.seeds[0]}.'))
    policy = config.policy
    page.heading('Methods')
    page.table(report.rows_with_spread(metrics['methods'], HEADINGS))
    page.text(f'Trained on {policy.num_steps} batches of {policy.batch_size} captions of seen pairs, '
              f'{policy.algorithm.num_samples} codes each, by the proxy judge. Both right: to the gold judge, fitted '
              f'to other digits, over all phrasings and {len(config.sample_seeds)} draws of each. Unseen pairs were in '
              'no training set, of the models or of the reward. KL: the difference of two bounds on the likelihood of '
              'codes, an estimate. Code distance: share of positions in which two codes of a caption differ. Fréchet '
              'distance to held-out pictures in the features of the gold judge.')
    page.table([{'judge': name, 'held-out pictures, seen pairs': f'{row["heldout"]:.3f}',
                 'unseen pairs': f'{row["unseen"]:.3f}'} for name, row in metrics['judges'].items()])

    first = {method: next(iter(of_method)) for method, of_method in runs.items()}
    page.heading('Reward against drift')
    points = lambda names, what: tuple([metrics['methods'][name][field] for name in names] for field in ('kl', what))
    way = [START, *(name for name in metrics['methods'] if name not in (START, *runs)), config.methods[0]]
    for what in ('seen', 'unseen'):
        page.lines({f'on the way to {config.methods[0]}': points(way, what),
                    **{method: points([method], what) for method in runs}}, HEADINGS[what], x=HEADINGS['kl'],
                   styles={method: 'o' for method in runs})
    page.heading('Training')
    for name, caption in (('reward', 'proxy reward'), ('gold', 'gold reward'), ('kl', 'KL estimate, nats a code'),
                          ('token_staleness', 'staleness, versions')):
        page.lines({method: curve(workdir / run, name) for method, run in first.items()}, caption)
    for name in ('reward', 'gold'):
        page.lines({method: (curve(workdir / run, 'kl')[1], curve(workdir / run, name)[1])
                    for method, run in first.items()}, f'{name} against drift', x='KL estimate')
    page.table([{'stage': name, 'seconds': value} for name, value in seconds.items()])

    page.heading('Before and after, from the same noise')
    for kind, asked in (('seen', np.flatnonzero(SEEN)[::40]), ('unseen', np.flatnonzero(~SEEN)[::16])):
        for row in asked:
            label = LABELS[row]
            rows = np.flatnonzero(LABELS == label)
            for name, run in ((START, START), *first.items()):
                page.images(np.concatenate([one['images'][rows] for one in sets[run]]), 12,
                            f'{TEXTS[row]} ({kind} pair), {name}', scale=3)
    page.save(workdir / 'report.html')


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs every stage that `workdir` does not hold yet and returns what `metrics.json` says.

    Raises:
        ValueError: unknown methods, shares of the way that are none, a `text` that is no text quickstart, or a
            `workdir` of another config.
    """
    check(config)
    mesh = mesh_lib.make_mesh({}, jax.devices()[:1])
    text = pathlib.Path(config.text or pathlib.Path(workdir) / 'text')
    if config.text:  # refused before `workdir` is claimed
        stages.claim(config.text_to_image, text)
    workdir = stages.claim(config, workdir)
    clock = stages.Clock(workdir / 'seconds.json')

    # ---- What RL starts from -----------------------------------------------------------------------------------------
    stages.claim(config.text_to_image, text)
    stores = clock.stage('text to image', lambda: text_to_image.train_models(
        config.text_to_image, text, stages.Clock(text / 'seconds.json')))
    judges = clock.stage('judges', lambda: fit_judges(config, workdir / 'judges'))
    write_captions(workdir / 'captions')

    # ---- Learning from pictures --------------------------------------------------------------------------------------
    runs = policies(config, workdir, text)
    for method, of_method in runs.items():
        for name, one in of_method.items():
            clock.stage(method, lambda one=one, name=name: train(one, workdir / name, mesh=mesh, name=name))

    # ---- Samples, numbers, page --------------------------------------------------------------------------------------
    models: dict[str, Model] = {START: functools.partial(TextToCode.load, text / 'text_to_code')}
    models |= {name: functools.partial(TextToCode.load, workdir / name)
               for of_method in runs.values() for name in of_method}
    between_rows = controls(config, models, runs)
    models |= {name: model for of_row in between_rows.values() for name, model in of_row.items()}
    sets = clock.stage('samples', lambda: sample_sets(config, workdir, models, text))
    metrics = clock.stage('evaluation', lambda: measure(config, judges, stores, sets, models, {**runs, **between_rows}))
    storage.write_json(workdir / 'metrics.json', metrics)
    clock.stage('report', lambda: write_report(config, workdir, metrics, clock.seconds, sets, runs))
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The table as text."""
    return '\n'.join(f'{name:28s} both digits right: seen {row["seen"]:.3f}   unseen {row["unseen"]:.3f}   proxy '
                     f'{row["proxy"]:.3f}   KL {row["kl"]:.2f}' for name, row in metrics['methods'].items())
