"""Every published configuration on common slices: what `experiments.compile --all` compiles, and the table of it.

Rows are kept in a JSON file, one for each configuration and slice, and written one by one: a sweep that is stopped goes
on where it was, and commands that run side by side share it. Beside the file is a folder of what the compiler said of
each program (`experiments.runtime.report_cache`), for many rows have programs in common. `docs/readiness.md` is made of
the file.
"""
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections

from experiments.runtime import config_files, fitting, launch
from experiments.runtime.programs import Program, Report, bytes_on_device
from experiments.runtime.report_cache import ReportCache
from experiments.runtime.slices import GIB, Slice

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
TABLE, ROWS = CHECKOUT / 'docs' / 'readiness.md', CHECKOUT / 'docs' / 'readiness.json'

SLICES = ('v5e-8', 'v5e-16', 'v6e-8', 'v5p-8', 'v4-32', 'v5e-64', 'h100-4', 'h100-8')  # columns of the table
ORDER = ('v5e-16', 'v6e-8', 'v5p-8', 'v4-32', 'v5e-64', 'h100-8', 'h100-4', 'v5e-8')  # in which a sweep takes them
# Configurations, and those that differ from one only in settings that no program shows (rates, periods, seeds).
PUBLISHED = {
    'configs/rlhf/tldr.py': ('online_dpo_410m', 'online_dpo_410m_async', 'online_dpo_1b', 'online_dpo_1b_async',
                             'online_dpo_2.8b', 'online_dpo_2.8b_async', 'ppo_410m', 'ppo_410m_async', 'ppo_1b',
                             'ppo_1b_async', 'ppo_2.8b', 'ppo_2.8b_async', 'rloo_410m', 'rloo_410m_async', 'rloo_1b',
                             'rloo_1b_async', 'rloo_2.8b', 'rloo_2.8b_async', 'best_of_n_410m', 'best_of_n_410m_async',
                             'best_of_n_1b', 'best_of_n_1b_async', 'best_of_n_2.8b', 'best_of_n_2.8b_async',
                             'ppo_elastic_410m', 'ppo_elastic_410m_async'),
    'configs/rlhf/gsm8k.py': ('online_dpo', 'online_dpo_async', 'rloo', 'rloo_async', 'ppo', 'rloo_early', 'ppo_early'),
    'configs/rlhf/no_robots.py': ('online_dpo', 'online_dpo_async'),
    'configs/rlhf/imdb.py': ('ppo', 'nlpo', 'reset_to_init', 'reset_to_ema', 'elastic_reset'),
    'configs/rlhf/stackexchange.py': ('ppo', 'reset_to_init', 'reset_to_ema', 'elastic_reset'),
    'configs/rlhf/sft_tldr.py': ('410m', '1b', '2.8b'),
    'configs/rlhf/reward_tldr.py': ('410m', '1b', '2.8b'),
    'configs/rlhf/dpo_tldr.py': ('410m', '1b', '2.8b'),
    'configs/rlhf/sft_gsm8k.py': ('',), 'configs/rlhf/sft_imdb.py': ('',), 'configs/rlhf/sft_no_robots.py': ('',),
    'configs/rlhf/sft_stackexchange.py': ('',), 'configs/rlhf/reward_no_robots.py': ('',),
    'configs/rlhf/reward_stackexchange.py': ('',),
    'configs/dlc/encoder_imagenet.py': ('L512', 'L128', 'L32'),
    'configs/dlc/generator_imagenet.py': ('L512', 'L128', 'L32', 'class', 'embedding', 'none'),
    'configs/dlc/code_model_imagenet.py': ('L512', 'L128', 'L32', 'small_L512', 'small_L128', 'small_L32'),
    'configs/dlc/embedding_model_imagenet.py': ('',),
    'configs/dlc/text_to_code_llada.py': ('L512', 'L128'),
}
# In this order a sweep compiles first: one of each kind and size.
FIRST = ('configs/rlhf/sft_imdb.py', 'configs/rlhf/reward_tldr.py:410m', 'configs/rlhf/tldr.py:online_dpo_2.8b',
         'configs/rlhf/no_robots.py:online_dpo', 'configs/rlhf/tldr.py:online_dpo_2.8b_async',
         'configs/rlhf/tldr.py:online_dpo_1b_async', 'configs/dlc/generator_imagenet.py:L512',
         'configs/rlhf/tldr.py:online_dpo_410m', 'configs/rlhf/no_robots.py:online_dpo_async',
         'configs/dlc/code_model_imagenet.py:L512', 'configs/rlhf/tldr.py:online_dpo_1b',
         'configs/rlhf/reward_tldr.py:2.8b', 'configs/rlhf/sft_tldr.py:2.8b', 'configs/rlhf/gsm8k.py:online_dpo',
         'configs/dlc/encoder_imagenet.py:L512', 'configs/rlhf/tldr.py:online_dpo_410m_async',
         'configs/rlhf/stackexchange.py:elastic_reset', 'configs/rlhf/imdb.py:elastic_reset',
         'configs/rlhf/sft_no_robots.py', 'configs/dlc/text_to_code_llada.py:L512')
DEPTHS = (2, 4)  # at which a decoder's sampler is compiled for GPUs in place of its own depth


def paths() -> list[str]:
    """All published configurations as `--config` takes them, those of `FIRST` before the others."""
    found = [f'{file}:{name}' if name else file for file, names in PUBLISHED.items() for name in names]
    return [*FIRST, *(path for path in found if path not in FIRST)]


def divided(config: ml_collections.ConfigDict, shards: int) -> ml_collections.ConfigDict:
    """`config` with the most microbatches up to its own that its batch can be dealt out in: the same recipe."""
    each, rest = divmod(config.batch_size, shards * fitting.minibatches(config))
    if rest or not config.accumulate:
        return config
    config = config.copy_and_resolve_references()
    config.accumulate = max(n for n in range(1, min(config.accumulate, each) + 1) if each % n == 0)
    return config


def extrapolated(program: Program, at: Callable[[int], Report], depth: int, target: Slice) -> Report:
    """The report of `program`, a decoder's sampler of `depth` blocks written one after another, from those of two with
    few: everything in it grows by the same amount with each block."""
    few, more = (at(blocks) for blocks in DEPTHS)

    def line(a: Any, b: Any) -> Any:
        if isinstance(a, Mapping):
            return {key: line(a.get(key, 0), b[key]) if not isinstance(b[key], Mapping) else
                    line(a.get(key, {k: 0 for k in b[key]}), b[key]) for key in b}
        if isinstance(a, bool) or not isinstance(a, (int, float)):
            return b
        return type(b)(a + (b - a) / (DEPTHS[1] - DEPTHS[0]) * (depth - DEPTHS[0]))
    out = {key: line(few[key], more[key]) for key in ('flops', 'arguments', 'temporaries', 'outputs', 'program',
                                                      'bytes', 'hbm_traffic', 'seconds', 'collectives')
           if key in few and key in more}
    beside = {name: bytes_on_device(tree) for name, tree in program.beside.items()}
    for entry in out.get('collectives', {}).values():
        entry['largest_bytes'] = max((few['collectives'] | more['collectives'])[k]['largest_bytes']
                                     for k in more['collectives'])
    report = more | out | {'beside': beside, 'times': program.times, 'blocks': list(DEPTHS)}
    report['total'] = report['bytes'] + sum(beside.values())
    report['fits'] = 'arguments' in report and report['total'] <= target.usable_bytes
    report['compile_seconds'] = few['compile_seconds'] + more['compile_seconds']
    return report


def read(file: os.PathLike) -> dict[str, Any]:
    """The rows of a sweep, {configuration and slice: row}; {} where there is no file yet."""
    path = pathlib.Path(file)
    return json.loads(path.read_text()) if path.exists() else {}


def write(file: os.PathLike, rows: Mapping[str, Any]) -> None:
    path = pathlib.Path(file)
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(rows, indent=1, sort_keys=True) + '\n')
    partial.replace(path)


def compacted(report: Report) -> dict[str, Any]:
    """What a row keeps of a program's report."""
    keep = ('mesh', 'bytes', 'total', 'usable_bytes', 'flops', 'hbm_traffic', 'seconds', 'times', 'fits', 'beside',
            'blocks', 'effort', 'compile_seconds')
    out = {name: report[name] for name in keep if name in report}
    if 'seconds' in out:
        out['seconds'] = {name: float(f'{value:.5g}') for name, value in out['seconds'].items()}
    out['compile_seconds'] = round(out['compile_seconds'])
    out['collectives'] = {kind: {'runs': e['runs'], 'bytes': e['bytes']}
                          for kind, e in report.get('collectives', {}).items()}
    return out


def cache_of(file: str | os.PathLike) -> ReportCache:
    """The programs of the rows in `file`."""
    return ReportCache(pathlib.Path(file).with_suffix('.programs'))


def sweep(targets: Mapping[str, Slice], file: os.PathLike,
          compile_row: Callable[[str, ml_collections.ConfigDict, Slice], Mapping[str, Report]],
          overrides: list[str], only: str = '') -> Iterator[tuple[str, dict[str, Any]]]:
    """Compiles the rows that `file` does not have yet, those of `FIRST` on all slices before others, and keeps each.

    A row that another command is at, in this moment, is that one's. One whose compilation fails, with anything but the
    ValueError of a refusal, is yielded as {'failed': error} and not kept.

    Args:
        only: configurations in whose path it is found, a regex; '': all.
    """
    shared = cache_of(file)
    groups = FIRST, paths()[len(FIRST):]
    for name, path in ((name, path) for group in groups for name in targets for path in group):
        key = f'{path} {name}'
        if key in read(file) or not re.search(only, path):
            continue
        with shared.claimed(key, wait=False) as alone:
            if not alone or key in read(file):  # it may have been written since
                continue
            row = _row(lambda: compile_row(path, config_files.load(path, overrides), targets[name]))
            if 'failed' not in row:
                with shared.claimed('rows', wait=True):
                    write(file, read(file) | {key: row})
        yield key, row


def _row(compiled: Callable[[], Mapping[str, Report]]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        row: dict[str, Any] = {'programs': {program: compacted(report) for program, report in compiled().items()}}
    except ValueError as error:
        row = {'refused': str(error)}
    except Exception as error:  # of the compiler, or a defect of ours: hundreds of other rows do not have it
        row = {'failed': ' '.join(f'{type(error).__name__}: {error}'.split())}
    return row | {'jax': jax.__version__, 'seconds': round(time.monotonic() - started)}


def moved(row: Mapping[str, Any], again: Mapping[str, Any], tolerance: float = 0.05) -> list[str]:
    """What is not the same, within a share, in two rows of one configuration and slice, by name."""
    if 'refused' in row or 'refused' in again:
        return [] if row.get('refused') == again.get('refused') else ['whether it is refused']
    out = [f'{name}: only in one of them' for name in row['programs'].keys() ^ again['programs'].keys()]
    for name in row['programs'].keys() & again['programs'].keys():
        before, after = (flat(rows['programs'][name]) for rows in (row, again))
        for what in sorted(before.keys() | after.keys()):
            a, b = before.get(what, 0), after.get(what, 0)
            if abs(a - b) > tolerance * max(a, b):
                out.append(f'{name}: {what} {a:.4g} -> {b:.4g}')
    return sorted(out)


def flat(program: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a program's report that are compared: bytes, FLOPs, collectives."""
    out = {what: program[what] for what in ('bytes', 'total', 'flops', 'times')}
    for kind, entry in program['collectives'].items():
        out |= {f'{kind} {what}': entry[what] for what in ('runs', 'bytes')}
    return out


# ---- The table -------------------------------------------------------------------------------------------------------

def least(program: Mapping[str, Any]) -> float:
    """Seconds of one run at the peaks of what bounds it."""
    return max(program['seconds'][name] for name in ('matmul', 'memory', 'network'))


def cell(row: Mapping[str, Any] | None, config: ml_collections.ConfigDict) -> str:
    """A row of the sweep as a cell of the table."""
    if row is None:
        return ''
    if 'refused' in row:
        return 'no: ' + ('batch' if 'divisible' in row['refused'] else 'layout')
    programs = row['programs']
    worst = max(programs, key=lambda name: programs[name]['total'] / programs[name]['usable_bytes'])
    gib, usable = programs[worst]['total'] / GIB, programs[worst]['usable_bytes'] / GIB
    text = f'{gib:.1f} of {usable:.1f} ({worst})'
    mesh = programs['step']['mesh']
    dealt = divided(config, mesh['data'] * mesh['fsdp']).accumulate
    note = f'; accumulate={dealt}' if dealt != config.accumulate else ''
    if not all(program['fits'] for program in programs.values()):
        return f'**no**: {text}{note}'
    seconds = {name: program['times'] * least(program) for name, program in programs.items()
               if 'seconds' in program}
    step = f'{seconds["step"]:.3g} s'
    if 'publish' in programs:
        learning = seconds['step'] + seconds['publish']
        generating = sum(s for name, s in seconds.items() if name not in ('step', 'publish'))
        overlaps = config.rollout.devices and config.rollout.max_staleness
        whole = max(learning, generating) if overlaps else learning + generating
        step = f'{whole:.3g} s, of it step {seconds["step"]:.3g}'
    return f'{text}; {step}{note}'


def table(rows: Mapping[str, Any]) -> str:
    """`docs/readiness.md`: of each configuration and slice, memory at the worst moment and the expected time."""
    lines = ['| configuration | ' + ' | '.join(SLICES) + ' |', '|---' * (len(SLICES) + 1) + '|']
    for path in sorted({key.rpartition(' ')[0] for key in rows}, key=paths().index):
        config = config_files.load(path)
        cells = [cell(rows.get(f'{path} {name}'), config) for name in SLICES]
        lines.append(f'| `{path.removeprefix("configs/")}` | ' + ' | '.join(cells) + ' |')
    done = sum(len([key for key in rows if key.rpartition(' ')[0] == path]) for path in paths())
    hours = sum(row['seconds'] for row in rows.values()) / 3600
    return HEAD.format(done=done, all=len(paths()) * len(SLICES), hours=hours) + '\n'.join(lines) + '\n'


HEAD = '''# Readiness

What the published configurations need on TPU slices and GPUs that are not here, by the real compilers. Made by

```bash
python -m experiments.compile --all                # goes on where it was stopped; --topology=A,B for some slices
```

from [readiness.json](readiness.json), which has every program's bytes, FLOPs, traffic and collectives. {done} of {all}
rows are compiled; an empty cell is one that is not. All of them took {hours:.0f} hours of processes that shared two
cores with others. The same command may run several times side by side: they share the rows that are left, and a program
that rows have in common is compiled once.

A cell has the memory a chip at the worst moment of the whole run, of what the chip offers (in brackets, the program
that runs then), and the least time of a step, or of an iteration of a policy: the slowest of matrix products, memory
traffic and network at their peaks, programs added up or overlapping as they do in the run. For TPUs the step, a
decoder's sampler and the publishing of weights are compiled with less effort, as `--fast` does (`effort` in the rows),
so a TPU's own estimate of time, which is longer, is not in the table (`experiments.compile` without it prints that).
Where both were compared, samplers of Pythia-410m on v5e-8 and 2.8b on v5e-16, less effort took 2 and 4 % less memory;
its traffic is 9 and 56 % less, at 2.8b within 5 % of what weights and cache of each token add up to. Other programs,
where it changes the memory by more, are compiled with full effort. For GPUs a decoder's sampler
is extrapolated from two and four blocks, which gave 11 % too much at 2.8b on v5e-16 (`blocks` in the rows).

"accumulate": the config's own does not divide the batch over so many chips, and the most below it that does was taken:
the same recipe, which a run takes with `--config.accumulate` of that number. "batch": the batch cannot be dealt out to
so many chips; take a mesh with `tensor`. "layout": the mesh of the config is for fewer or more chips, or it divides a
slice that cannot be divided (v5e of more than 16). H100: 75 % of the memory is JAX's pool, unless
XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.

'''


def main() -> None:
    raise ValueError('experiments.readiness is no command; python -m experiments.compile --all makes the table, and '
                     '--help there lists the flags')


if __name__ == '__main__':
    launch.main(main)
