"""Runs a grid of settings and seeds, and compares what they measured.

    python -m experiments.sweep --config=configs/rlhf/arithmetic.py:online_dpo --sweep.rollout.max_staleness=0,1,2,4 \\
        --seeds=3 --workdir=runs/staleness --parallel=2
    python -m experiments.sweep --config=configs/rlhf/arithmetic.py --variants=online_dpo,ppo,rloo \\
        --zip.algorithm.num_minibatches=1,4,16 --zip.batch_size=16,64,256 --zip.num_steps=96,24,6 \\
        --workdir=runs/minibatches
    python -m experiments.sweep --name=tldr_minibatches_ppo --workdir=/shared/tldr --script=slurm > sweep.sbatch
    python -m experiments.sweep --report runs/staleness runs/more --workdir=runs/both

Every run is an ordinary `experiments.train` with a work directory of its own, SETTING/seed=S. Interrupt it anywhere and
run it again: runs that were finished stay, others continue, and the report is the same. A sweep that is asked for more
values or seeds adds them, and the report counts everything that was ever tried. Named sweeps are in configs/sweeps.py.

Writes report.html, report.json and report.md to --workdir; prints the tables.
"""
import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from configs import sweeps as named
from experiments.runtime import checks, launch, storage
from experiments.runtime.metrics import check_wandb
from experiments.sweeps import here, plan, results, scripts
from experiments.sweeps import report as reports


class Flags(NamedTuple):
    """A command line: fields by kind, and what argparse takes."""
    fixed: dict[str, str]
    sweeps: dict[str, str]
    zipped: dict[str, str]
    rest: list[str]


def split_flags(arguments: Sequence[str]) -> Flags:
    """`arguments`, of which a later one replaces an earlier one of its name.

    Raises:
        ValueError: a field without a value.
    """
    flags = Flags({}, {}, {}, [])
    for argument in arguments:
        for prefix, fields in (('--config.', flags.fixed), ('--sweep.', flags.sweeps), ('--zip.', flags.zipped)):
            if argument.startswith(prefix):
                field, equals, value = argument.removeprefix(prefix).partition('=')
                if not equals:
                    raise ValueError(f'{argument}: has no value; write {prefix}{field}=VALUE')
                fields[field] = value
                break
        else:
            flags.rest.append(argument)
    return flags


def expand_name(arguments: Sequence[str]) -> list[str]:
    """`arguments` after the flags of the named sweep among them.

    Raises:
        ValueError: there is no sweep of that name.
    """
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument('--name', action='append')
    names = p.parse_known_args(list(arguments))[0].name
    if not names:
        return list(arguments)
    checks.choice('--name', names[-1], named.SWEEPS)
    return [*named.SWEEPS[names[-1]], *arguments]


def parser() -> argparse.ArgumentParser:
    p = launch.parser(__doc__, config='what all runs train')
    p.add_argument('--name', metavar='NAME', help='a sweep of configs/sweeps.py; other flags add to its own')
    p.add_argument('--variants', metavar='A,B', default='', help='an axis: --config=FILE:A, FILE:B, …')
    p.add_argument('--seeds', type=int, default=1, help='runs of each setting (default: 1)')
    p.add_argument('--first_seed', type=int, default=0, help='choose settings on other seeds than those you report')
    p.add_argument('--workdir', help='a folder a run, and the report')
    p.add_argument('--parallel', type=int, default=1, help='runs at a time on this machine')
    p.add_argument('--gpus', metavar='0,1,2,3', default='', help='dealt out to the runs of a time')
    p.add_argument('--evaluate', metavar='FLAGS', help='measure what each run trained with FLAGS: a policy by '
                   'experiments.evaluate, a translation game by experiments.evaluate_translation')
    p.add_argument('--interpolate', metavar='0,0.5,1', default='',
                   help='also measure the weights of the baseline on the way from their start')
    p.add_argument('--wandb', metavar='PROJECT', default='', help='runs report to Weights & Biases too')
    p.add_argument('--script', choices=tuple(scripts.SCRIPTS), help='print the sweep for a cluster, run nothing')
    p.add_argument('--report', metavar='DIR', nargs='*', help='only read these folders (default: --workdir)')
    p.add_argument('--baseline', metavar='SETTING', default='', help='what differences are from (default: the first)')
    p.add_argument('--metrics', metavar='A,B', default='', help='what the tables show')
    p.add_argument('--at', type=int, metavar='STEP', help='what tables show was measured at that step, or last before '
                   "it, as --evaluate='--step=all' does (default: at the end)")
    p.add_argument('--trade_off', metavar='TASK,DRIFT', default='', help='what is drawn against what')
    return p


def main() -> None:
    flags = split_flags(expand_name(sys.argv[1:]))
    p = parser()
    p.epilog = 'fields: --config.FIELD=VALUE for all runs, --sweep.FIELD=A,B an axis, --zip.FIELD=A,B those that ' \
               'move together'
    args = p.parse_args(flags.rest)
    check(args)
    if args.report is not None:
        folders = args.report or [args.workdir]
        return write_report(args, folders, args.workdir or folders[0])
    if not args.config:
        raise ValueError('--config is missing: what should the runs train? (or --name, or --report)')
    axes = plan.axes_of(args.variants, flags.sweeps, flags.zipped)
    fixed = [f'--config.{field}={value}' for field, value in flags.fixed.items()]
    runs = plan.runs_of(args.config, fixed, axes, range(args.first_seed, args.first_seed + args.seeds))
    if args.script:
        print(scripts.SCRIPTS[args.script](runs, args.workdir), end='')
        return
    baseline = args.baseline or runs[0].setting
    if baseline not in {run.setting for run in runs}:
        raise ValueError(f'--baseline={baseline!r} is not one of {list(dict.fromkeys(run.setting for run in runs))}')
    evaluation = None if args.evaluate is None else args.evaluate.split()
    alphas = launch.shares('--interpolate', args.interpolate)
    check_wandb(args.wandb)
    plan.record(runs, args.workdir, [] if evaluation is None else evaluation)
    workdir = pathlib.Path(storage.resolve(args.workdir))
    common = [f'--compilation_cache={args.compilation_cache}'] if args.compilation_cache else []
    training = [f'--wandb={args.wandb}'] if args.wandb else []
    jobs = [here.job_of(run, workdir, common=common, training=training, evaluation=evaluation,
                        alphas=alphas if run.setting == baseline else ()) for run in runs]
    failed = here.run_all(jobs, parallel=args.parallel, gpus=args.gpus.split(',') if args.gpus else ())
    write_report(args, [args.workdir], args.workdir)
    if failed:
        name, reason = next(iter(failed.items()))
        raise ValueError(f'{len(failed)} of {len(runs)} runs did not finish: {name}: {reason} (see its {here.LOG}); '
                         'the same command tries them again')


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError for flags that mean nothing together."""
    if not args.workdir and not args.report:
        raise ValueError('--workdir is missing: where should the runs and their report go?')
    for name, least in (('seeds', 1), ('first_seed', 0), ('parallel', 1), ('at', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f'--{name}={value} must be at least {least}')
    if args.gpus and len(args.gpus.split(',')) % args.parallel:
        raise ValueError(f'--gpus={args.gpus}: {len(args.gpus.split(","))} do not divide among --parallel='
                         f'{args.parallel} runs')
    if args.interpolate and args.evaluate is None:
        raise ValueError("--interpolate needs --evaluate, with the flags of the measurement (--evaluate='' for none)")
    if args.trade_off and args.trade_off.count(',') != 1:
        raise ValueError(f'--trade_off={args.trade_off}: give two metrics, TASK,DRIFT')
    launch.shares('--interpolate', args.interpolate)


def write_report(args: argparse.Namespace, folders: Sequence[str], workdir: str) -> None:
    """Compares the runs in `folders`; report.html, report.json and report.md in `workdir`."""
    found = results.collect(folders, args.at)
    names = lambda text: tuple(text.split(',')) if text else ()
    summary = reports.summarize(found, baseline=args.baseline, metrics=names(args.metrics),
                                trade_off=names(args.trade_off), at=args.at)
    place = storage.resolve(workdir)
    storage.check_writable(place, '--workdir')
    text = reports.markdown(summary)
    storage.write_json(place / 'report.json', summary)
    with storage.write_whole(place / 'report.md') as file:
        file.write((text + '\n').encode())
    reports.page_of(found, summary, f'Sweep: {pathlib.Path(folders[0]).name}').save(place / 'report.html')
    print(text)
    print(f'report -> {place / "report.html"}')


if __name__ == '__main__':
    launch.main(main)
