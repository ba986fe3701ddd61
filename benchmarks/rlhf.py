"""The language half, measured: python -m benchmarks.rlhf [--rows decode ...] [--device gpu].

Rows:
    decode      sampling from a Pythia-70m, against a static-cache loop written by hand in PyTorch and against
                `transformers.generate`, and as a share of the memory's bandwidth
    dpo_step    reference, policy forward and backward, AdamW, against eager and compiled PyTorch
    overhead    a rollout stream over a plain loop `generate; train`
    overlap     a step of the asynchronous stream over the longer of generation and training
    publish     what handing over a policy costs
    processes   learner and generator on a core each, synchronous against asynchronous: what two cores show of it. It
                has no target
    roofline, learner, iteration    (GPU) sampling, DPO step and a whole Online-DPO iteration at real sizes

Both sides of a row hold the same weights (moved by `rlhf_jax.convert`) and are first shown to compute the same. All
works of a row take turns; figures are of medians, in brackets the least and the greatest of a turn. The GPU rows are
ours alone, against the card's peaks; what the tables of GPUs in docs/performance.md say is measured by
benchmarks/gpu.sh, which has PyTorch beside them.
"""
import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch wants room on the same GPU

from benchmarks.measure import Disagreement, Figure, Times, check_device, versions

FILES = {'decode': 'rlhf_rows', 'dpo_step': 'rlhf_rows', 'overhead': 'rlhf_rollout', 'overlap': 'rlhf_rollout',
         'publish': 'rlhf_rollout', 'processes': 'rlhf_rollout', 'roofline': 'rlhf_large', 'learner': 'rlhf_large',
         'iteration': 'rlhf_large'}
DEFAULT = {'cpu': ('decode', 'dpo_step', 'overhead', 'overlap', 'publish', 'processes'),
           'gpu': ('roofline', 'learner', 'iteration')}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. `policy`, `small['shape']`, `large['decode' | 'learner']`: names or fields of GPT-NeoX."""
    policy: Any  # of decode and dpo_step
    decode: dict
    dpo: dict
    stream: dict  # `sleep`: seconds of a stub's work
    small: dict  # policy of real work in the rows of the stream
    large: dict = dataclasses.field(default_factory=lambda: dict(
        decode=('410m', '1b', '2.8b'), batches=(64, 256), learner=('410m', '1b'), context=450, new=53, rows=128,
        gemm=8192, read_mib=1024))


_TINY = dict(vocab_size=97, width=32, depth=2, num_heads=2)
SIZES = {
    'tiny': Sizes(
        policy=_TINY, decode=dict(batch=2, prompt=4, new=5, read_mib=1), dpo=dict(rows=4, length=8, response=4),
        stream=dict(sleep=0.001, steps=3, publish_mib=1),
        small=dict(shape=_TINY, prompts=2, prompt=4, new=4, steps=2),
        large=dict(decode=(_TINY | {'depth': 1},), batches=(2,), learner=(_TINY | {'depth': 1},), context=12, new=4,
                   rows=4, gemm=64, read_mib=1)),
    'real': Sizes(
        policy='70m', decode=dict(batch=8, prompt=64, new=128, read_mib=512),
        dpo=dict(rows=4, length=128, response=64), stream=dict(sleep=0.1, steps=10, publish_mib=64),
        small=dict(shape=dict(vocab_size=2048, width=128, depth=4, num_heads=4), prompts=8, prompt=16, new=48,
                   steps=20)),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """How: turns of every row, whether PyTorch is compiled too, and where to say what is being done."""
    repeats: int
    compiled: bool
    progress: Callable[[str], None]


def run_row(name: str, sizes: Sizes, run: Run) -> tuple[Times, list[Figure]]:
    """Seconds and figures of one row.

    Raises:
        Disagreement: two sides do not compute the same.
    """
    return getattr(importlib.import_module(f'benchmarks.{FILES[name]}'), name)(sizes, run)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', nargs='+', choices=tuple(FILES), help="default: the device's")
    p.add_argument('--device', choices=tuple(DEFAULT), default='cpu')
    p.add_argument('--sizes', choices=tuple(SIZES), default='real', help='tiny only shows that everything runs')
    p.add_argument('--repeats', type=int, default=5, help='turns of every row')
    p.add_argument('--eager', action='store_true', help='leave torch.compile out')
    p.add_argument('--json', metavar='FILE', help='also write every time there')
    args = p.parse_args(argv)
    check_device(args.device, args.sizes)
    names = args.rows or DEFAULT[args.device]
    if any(FILES[name] == 'rlhf_rows' for name in names):
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise SystemExit(f"error: {error.name}, the other side, is missing: pip install -e '.[parity]'") from None
    about = versions(args.device)
    print('  '.join(f'{k} {v}' for k, v in about.items() if v), flush=True)
    report: dict[str, Any] = {'versions': about, 'rows': {}}
    for name in names:
        progress = lambda what: print(f'\r\033[K{name}: {what}', end='', file=sys.stderr, flush=True)
        times, figures = run_row(name, SIZES[args.sizes], Run(args.repeats, not args.eager, progress))
        print('\r\033[K', end='', file=sys.stderr)
        print('\n'.join(map(str, figures)), flush=True)
        report['rows'][name] = {'seconds': times, 'figures': [
            dataclasses.asdict(figure) | {'reached': figure.reached} for figure in figures]}
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(report, file, indent=1)
    return report


def command() -> None:
    try:
        main()
    except Disagreement as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    command()
