"""Trains one model: `python -m experiments.train --config=configs/dlc/encoder_digits.py --workdir=runs/encoder`.

The same command continues an interrupted run, to the same parameters bit for bit. Resume order: the newest readable
checkpoint in the work directory; else released weights named by the config; else a fresh initialisation.
"""
import contextlib
import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from jax.sharding import Mesh

from experiments.runtime import (
    compiler,
    config_files,
    exchange,
    fitting,
    launch,
    lease,
    leftovers,
    loop,
    partition,
    placement,
    processes,
    slices,
    storage,
)
from experiments.runtime import experiment as experiment_lib
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.hooks import PENDING, Log, Metrics, Save
from experiments.runtime.metrics import MetricsWriter, check_wandb
from experiments.runtime.prefetch import Prefetch
from experiments.runtime.retention import Retention
from experiments.runtime.signals import signals
from experiments.runtime.state import TrainState

log = logging.getLogger(__name__)

EXPERIMENTS = {
    'encoder': 'experiments.dlc.encoder',
    'generator': 'experiments.dlc.generator',
    'code_model': 'experiments.dlc.code_model',
    'embedding_model': 'experiments.dlc.embedding_model',
    'text_to_code': 'experiments.dlc.text_to_code',
    'sft': 'experiments.rlhf.supervised.sft',
    'reward_model': 'experiments.rlhf.supervised.reward_model',
    'dpo': 'experiments.rlhf.supervised.dpo',
    'policy': 'experiments.rlhf.policy.experiment',
    'align': 'experiments.align.experiment',
    'translation_agent': 'experiments.rlhf.translation.agent',
    'translation_game': 'experiments.rlhf.translation.game',
    'translation_language_model': 'experiments.rlhf.translation.language_model',
    'translation_ranker': 'experiments.rlhf.translation.ranker',
}


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> experiment_lib.Experiment:
    """The experiment that `config.experiment` names, checked against `mesh`; reads no data."""
    if config.experiment not in EXPERIMENTS:
        raise ValueError(f'experiment={config.experiment!r} is not one of {sorted(EXPERIMENTS)}')
    experiment_lib.check_numbers(config)
    experiment_lib.check_batch(config, mesh)
    complete(config)
    return importlib.import_module(EXPERIMENTS[config.experiment]).build(config, mesh)


def complete(config: ml_collections.ConfigDict) -> None:
    """Reads what `config` leaves to a folder that it names, so that the config of a run says it itself."""
    if config.get('weights') and config.model.get('size') == 'weights':
        from experiments.rlhf.models.loading import complete as complete_model
        complete_model(config)


def mesh_of(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """`config.mesh` over `devices` (default: all) but those that `config.rollout` sets apart to generate."""
    if config.get('rollout'):
        from experiments.rlhf.policy.roles import learner_devices
        return mesh_lib.make_mesh(config.mesh, learner_devices(config, devices))
    return mesh_lib.make_mesh(config.mesh, devices)


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, mesh: Mesh | None = None,
          hooks: Sequence[loop.Hook] = (), name: str | None = None, wandb: str = '') -> TrainState | None:
    """Trains to `config.num_steps`, continuing what `workdir` holds.

    Args:
        mesh: default: `mesh_of`.
        hooks: called before the experiment's own.
        name: shown on the progress bar; default: `config.experiment`.
        wandb: project of Weights & Biases that metrics go to as well; '': none.

    Returns:
        The final state, laid out over `mesh`; None in a process that has none of its devices, which generates for those
        that have.

    Raises:
        ValueError, OSError: a config, data set, checkpoint or place that does not fit; before anything is compiled.
        signals.Stopped: a signal came and the state was saved.
    """
    workdir = storage.resolve(workdir)
    check_wandb(wandb)
    processes.begin_run()

    # ---- Mesh, model, data -------------------------------------------------------------------------------------------
    mesh, config = mesh or mesh_of(config), as_started(config, workdir)
    config = fitting.fitted(config, mesh, build, fitting.here(mesh))
    experiment = build(config, mesh)
    config = experiment.config or config
    config_files.check_workdir(config, workdir)
    storage.check_writable(workdir, '--workdir')
    learners = exchange.processes_of(mesh)
    if jax.process_index() not in learners:
        with lease.owned(workdir):
            experiment.generate(workdir)
        return None
    abstract = jax.eval_shape(experiment.init, jax.random.key(config.seed))
    shardings = partition.state_shardings(abstract, experiment.rules, mesh)
    with (lease.owned(workdir, restore=lambda: config_files.save(config, workdir)) as still_owned,
          processes.announcing_end(), jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES)):
        # ---- Resume, or start ----------------------------------------------------------------------------------------
        with signals.leaving(f'stopped by signal before the first step; {loop.GO_ON}'):
            if jax.process_index() == 0:
                leftovers.remove(workdir)
            checkpointer = Checkpointer(workdir / 'checkpoints', keep=Retention.of(config), clean=True,
                                        processes=None if len(learners) == jax.process_count() else learners)
            restored = checkpointer.restore(abstract, shardings)
            if restored and restored[0] >= config.num_steps:
                log.info('%s: at step %d of %d already; nothing to do', workdir, restored[0], config.num_steps)
                checkpointer.close()
                return restored[1]
            online = experiment.open_rollouts is not None
            batches = (experiment.open_rollouts(workdir) if online else
                       Prefetch(experiment.open_batches(), mesh_lib.batch_sharding(mesh)))
            if not restored and experiment.check:  # what it refuses has not started: the directory stays nobody's
                experiment.check()
                exchange.everywhere(mesh, True)
            if jax.process_index() == 0:
                config_files.save(config, workdir)
            metrics = Metrics()
            if restored:
                start, state, position = restored
                metrics = Metrics(position.pop(PENDING, []))
                checkpointer.delete_after(start)
                batches.set_state(position)
                log.info('%s: continuing from step %d of %d', workdir, start, config.num_steps)
            else:
                start, state = 0, jax.jit(experiment.init, out_shardings=shardings)(jax.random.key(config.seed))
                if experiment.warm_start:
                    state = placement.place_tree(experiment.warm_start(state), shardings)

            step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
                           out_shardings=(shardings, mesh_lib.replicated(mesh)),
                           compiler_options=compiler.options(mesh))
            if online:
                step = with_stream_metrics(step, batches)
                hooks = (*hooks, lambda n, state, _: batches.publish(n, state))
                batches.publish(start, state)
            writer = None
            if jax.process_index() == 0:
                writer = MetricsWriter(workdir, from_step=start, pending=metrics.names, wandb=wandb,
                                       config=config.to_dict())

        def before_saving() -> None:
            still_owned()
            if writer:  # a run that is resumed from there has the rows up to there
                writer.flush()

        # ---- Train ---------------------------------------------------------------------------------------------------
        try:
            # Weights are published as the hooks given here left them, and before anything is measured.
            state = loop.run(state, step, batches, (*hooks, *experiment.hooks(writer)), config.num_steps,
                             save=Save(checkpointer, batches, config.checkpoint_every, before=before_saving),
                             log_hook=Log(writer, config.log_every), metrics=metrics,
                             name=name or config.experiment,
                             stop_every=1 if jax.process_count() == 1 else config.log_every)
        finally:
            checkpointer.close()
            if writer:
                writer.close()
        if online:
            batches.finish()
    return state


def as_started(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """`config` with what it leaves open (None, `accumulate=0`, `model.remat='auto'`) as the run in `workdir` was
    started with."""
    left_open = [name for name, value in config.items() if value is None or name == 'accumulate' and value == 0]
    remat_open = fitting.remat_is_open(config)
    if not (left_open or remat_open):
        return config

    def started() -> dict[str, Any]:
        if not (storage.resolve(workdir) / 'config.json').exists():
            return {}
        try:
            before = config_files.read(workdir)
        except config_files.DamagedConfig:  # `check_workdir` says so
            return {}
        remat = {'remat': before.model.get('remat', fitting.AUTO)} if remat_open else {}
        return {'fields': {name: before[name] for name in left_open if name in before}, 'model': remat}
    # A shared disk may show the file to some processes alone, which would then train something else.
    values = processes.agreed(started() if jax.process_index() == 0 else None)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update(values.get('fields', {}))
        config.model.update(values.get('model', {}))
    return config


def with_stream_metrics(step: loop.Step, batches: Any) -> loop.Step:
    """Wraps `step` so that its metrics include what the stream measured of the batch: staleness, waiting times."""
    def run(state, batch):
        measured = dict(batches.metrics)
        state, metrics = step(state, batch)
        return state, {**metrics, **measured}
    return run


def main() -> None:
    p = launch.parser(__doc__, config='what to train, a file such as configs/dlc/encoder_digits.py')
    p.add_argument('--workdir', help='checkpoints, metrics.jsonl and tensorboard/ go here; the same one resumes')
    p.add_argument('--dry_run', action='store_true', help='print mesh, parameters, memory and batch split, '
                   'look at released weights and tokenizer, then exit')
    p.add_argument('--topology', metavar='NAME', help='of --dry_run: the devices of this TPU slice, such as v5e-16, '
                   'rather than those that are here (extra tpu)')
    p.add_argument('--profile', metavar='DIR', help='write a profiler trace of the whole (short) run to DIR')
    p.add_argument('--wandb', metavar='PROJECT', default='', help='report to Weights & Biases as well')
    args, config = launch.parse(p)
    if not (args.workdir or args.dry_run):
        raise ValueError('--workdir is missing: where should checkpoints and metrics go?')
    if args.topology and not args.dry_run:
        raise ValueError('--topology: only with --dry_run; a run takes the devices that are there')
    launch.initialize(args)
    if args.dry_run:
        mesh = mesh_of(config, slices.named(args.topology).devices if args.topology else None)
        config = fitting.fitted(config, mesh, build, None)  # nothing is compiled: as if everything fitted
        # Devices of a slice that is elsewhere compute nothing, not even a constant.
        with contextlib.nullcontext() if args.topology else jax.set_mesh(mesh):
            experiment = build(config, mesh)
            print(experiment_lib.describe(experiment, config, mesh), flush=True)
            if experiment.check:  # after the report, which needs neither weights nor tokenizer
                experiment.check()
        return
    if args.profile:
        with jax.profiler.trace(args.profile):
            train(config, args.workdir, wandb=args.wandb)
    else:
        train(config, args.workdir, wandb=args.wandb)


if __name__ == '__main__':
    launch.main(main)
