"""Scores of a translation game, or of two agents that have not played: BLEU and drift on a held-out split.

    python -m experiments.evaluate_translation --game=runs/game --split=val
    python -m experiments.evaluate_translation --speaker=runs/speaker --listener=runs/listener
    python -m experiments.evaluate_translation --game=runs/game --language_model=runs/captions --ranker=runs/ranker
    # the control of every claim of less drift: the game's speaker pulled back towards the one it started as
    python -m experiments.evaluate_translation --game=runs/game --interpolate=0,0.25,0.5,0.75,1

`experiments/rlhf/translation/evaluation.py` says what the numbers are.
"""
import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections

from experiments.rlhf.translation import agent as translation_agent
from experiments.rlhf.translation import evaluation as translation_evaluation
from experiments.rlhf.translation import game as translation_game
from experiments.runtime import config_files, launch, storage
from experiments.runtime import steps as steps_lib
from experiments.runtime.curve import Curve, settings_of
from rlhf_jax import elastic_reset
from rlhf_jax.tasks import translation


def load_game(workdir: str | os.PathLike, step: int | None = None) -> tuple[ml_collections.ConfigDict, Any]:
    """Config and {'speaker': ..., 'listener': ...} of a game, the newest or those of `step`.

    Raises:
        ValueError: no game there, not that step, or its text has changed since.
    """
    config = config_files.read(workdir)
    if config.get('experiment') != 'translation_game':
        raise ValueError(f'--game={workdir}: holds a run of experiment={config.get("experiment")!r}')
    state = translation_agent.load_state(workdir, config, translation_game.build, step)
    translation_agent.check_vocabulary(f'--game={workdir}', state.extra['vocabulary'], config, translation.FIELDS)
    return config, state.params


def load_agents(speaker: str, listener: str) -> tuple[ml_collections.ConfigDict, Any]:
    """The speaker's config and {'speaker': ..., 'listener': ...} of two pretrained agents."""
    config = config_files.read(speaker)
    return config, {'speaker': translation_agent.load(speaker, 'speaker', config),
                    'listener': translation_agent.load(listener, 'listener', config)}


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--game', metavar='WORKDIR', help='a run of translation_game')
    p.add_argument('--speaker', metavar='WORKDIR', help='a pretrained French to English agent')
    p.add_argument('--listener', metavar='WORKDIR', help='a pretrained English to German agent')
    p.add_argument('--split', help='default: data.valid of the run')
    p.add_argument('--path', metavar='DIR', help='another folder with that split')
    p.add_argument('--interpolate', metavar='A,B,...', default='',
                   help="scores with the game's speaker at these fractions of its way from the one it started as")
    p.add_argument('--language_model', metavar='WORKDIR', help='also the fluency of the English under this run of '
                   "`translation.py:language_model` (default: evaluation.language_model of the run)")
    p.add_argument('--ranker', metavar='WORKDIR', help='also how well the English finds the images of the text, under '
                   'this run of `translation.py:ranker` (default: evaluation.ranker of the run)')
    p.add_argument('--images', metavar='DIR', help="folder of the images' features, {split}.npy (default: "
                   "evaluation.images of the run, else the ranker's own)")
    p.add_argument('--json', metavar='FILE', help='also write the numbers there; --step=all: a line a checkpoint')
    steps_lib.add_flag(p, '--game')
    args, _ = launch.parse(p)
    steps_lib.check(args.step)
    if bool(args.game) == bool(args.speaker and args.listener):
        raise ValueError('give --game, or both --speaker and --listener')
    alphas = launch.shares('--interpolate', args.interpolate)
    if alphas and not args.game:
        raise ValueError('--interpolate needs --game: two agents that have not played have no way between them')
    if args.step != 'last' and not args.game:
        raise ValueError(f'--step={args.step} needs --game: it is a checkpoint of the game')
    if args.step == 'all' and not args.json:
        raise ValueError('--step=all measures one checkpoint after another; say with --json=FILE where its rows go')
    if args.json:
        storage.check_writable(storage.resolve(args.json).parent, '--json')
    launch.initialize(args)
    launch.check_alone('experiments.evaluate_translation')
    logging.getLogger('sacrebleu').setLevel(logging.ERROR)  # it would take words joined by spaces for a mistake
    wanted = steps_lib.wanted(args.step, args.game) if args.game else [None]
    if args.step == 'all':
        curve = Curve(args.json, settings_of(args), run=args.game)
        for step, scores in measured(args, alphas, curve.missing(wanted)):
            scores = scores if isinstance(scores, dict) else {f'alpha_{row["alpha"]:g}': row for row in scores}
            if jax.process_index() == 0:
                curve.add(step, scores)
        print(f'{len(wanted)} checkpoints -> {args.json}')
        return
    (_, scores), = measured(args, alphas, wanted[:1])
    if args.json and jax.process_index() == 0:
        storage.write_json(args.json, scores)


def measured(args: argparse.Namespace, alphas: Sequence[float],
             steps: Sequence[int | None]) -> Iterator[tuple[int | None, dict[str, Any] | list[dict[str, Any]]]]:
    """Scores of the agents that the flags name, of the game's at each of `steps` (None: its newest checkpoint); or a
    row for each of `alphas`, at which the game's speaker is interpolated with the one it started as."""
    measure = None
    for step in steps:
        config, params = load_game(args.game, step) if args.game else load_agents(args.speaker, args.listener)
        if alphas and not config.speaker:
            raise ValueError(f'--game={args.game}: its speaker started from scratch; there is nothing to pull it back '
                             'to')
        measure = measure or open_measure(args, config)
        if alphas:
            start = translation_agent.load(config.speaker, 'speaker', config)
            between = lambda alpha: dict(params, speaker=elastic_reset.interpolate(start, params['speaker'], alpha))
            rows = [{'alpha': alpha} | measure(between(alpha), sacrebleu=True) for alpha in alphas]
        else:
            rows = [measure(params, sacrebleu=True)]
        for row in rows:
            words = [] if step is None else [f'step {step}']
            print('  '.join([*words, *(f'{name} {value:.2f}' for name, value in row.items())]))
        if measure.signature:
            print('sacrebleu', measure.signature)
        yield step, rows if alphas else rows[0]


def open_measure(args: argparse.Namespace, config: ml_collections.ConfigDict) -> translation_evaluation.GameEvaluation:
    """What measures the agents of `config` on the whole split, with whatever else the flags name."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluation.sentences = 0
        if args.language_model:
            config.evaluation.language_model = args.language_model
        for name in ('ranker', 'images'):
            if getattr(args, name):
                config.evaluation[name] = getattr(args, name)
        if args.path:  # the vocabulary stays that of the run's own text
            config.vocabulary.paths = tuple(config.vocabulary.paths) or (config.data.path,)
            config.data.path = args.path
    return translation_evaluation.GameEvaluation(config, translation_agent.make_agent(config), args.split)


if __name__ == '__main__':
    launch.main(main)
