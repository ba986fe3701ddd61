"""Ours against plain PyTorch, side by side: python -m benchmarks.dlc [--rows dit_forward ...] [--device gpu].

Both sides of a row hold the same weights (moved by `dlc_jax.convert`) and are first shown to compute the same; then
they take turns, ours, eager, compiled, ours, ..., and the table gives medians. PyTorch is needed here only. Sizes:
DiT-S/2 in float32 on a CPU; with --device gpu, DiT-XL/2, SEDD-medium and ViT-L/14 in bfloat16, the two sides sharing
the GPU. What the tables of GPUs in docs/performance.md say is measured by benchmarks/gpu.sh, where each has all of it.
"""
import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch wants room on the same GPU

import jax

from benchmarks import loader
from benchmarks.dlc_sizes import SIZES, Sizes
from benchmarks.measure import (
    Disagreement,
    Row,
    Times,
    check_device,
    in_turns,
    matmul_peak,
    ratio,
    sides,
    spread,
    versions,
)

TARGETS = {  # PyTorch's time over ours, at least
    'dit_forward': 1.5, 'dit_sampling': 1.5, 'dit_training': 1.0, 'sedd_sampling': 1.5, 'encoder_training': 1.0,
    'loader': 20.0,
}
FIRST_STEP_SECONDS = 10.0  # to compile and take a training step, at most


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(row: Row, repeats: int, progress: Callable[[str], None]) -> Times:
    """Seconds of each call of both sides, see `in_turns`."""
    return in_turns({'ours': row.ours, **row.rivals}, repeats, progress)


def verdict(name: str, times: Times) -> dict[str, Any]:
    """Ratio of medians against the fastest rival, and whether the target is reached."""
    out = ratio(times, sides(times)[1:])
    out |= {'target': TARGETS[name], 'reached': out['ratio'] >= TARGETS[name]}
    if 'cpu/ours' in times:
        cpu = [statistics.median(times[f'cpu/{side}']) for side in sides(times)]
        out['cpu_ratio'] = min(cpu[1:]) / cpu[0]
    return out


# ---- The table -------------------------------------------------------------------------------------------------------


def reached(result: dict[str, Any]) -> str:
    return f'target {result["target"]:g}   {"reached" if result["reached"] else "NOT reached"}'


def line(name: str, times: Times, result: dict[str, Any]) -> str:
    low, high = result['ratio_turns']
    parts = [f'{name:17s} ours {spread(times["ours"])}',
             'torch ' + '   '.join(f'{side} {spread(times[side])}' for side in sides(times)[1:]),
             f'ratio {result["ratio"]:.2f} ({low:.2f}..{high:.2f})']
    if 'cpu_ratio' in result and jax.default_backend() == 'cpu':
        parts.append(f'by processor time {result["cpu_ratio"]:.2f}')
    parts.append(reached(result))
    if 'share_of_peak' in result:
        parts.append(f'{result["share_of_peak"]:.0%} of matmul peak')
    return '   '.join(parts)


def first_step(times: Times) -> dict[str, Any]:
    """Seconds that each side took to compile and take its first step."""
    cold = {side: times[f'first/{side}'][0] for side in sides(times)}
    return {'seconds': cold, 'target': FIRST_STEP_SECONDS, 'reached': cold['ours'] <= FIRST_STEP_SECONDS}


def run_row(name: str, sizes: Sizes, *, bf16: bool, compiled: bool, repeats: int, peak: float,
            progress: Callable[[str], None]) -> tuple[Times, dict[str, Any]]:
    """Times and verdict of one row.

    Raises:
        Disagreement: the two sides do not compute the same.
    """
    if name == 'loader':
        progress('measuring')
        times = loader.compare(repeats)
        return times, verdict(name, times)
    from benchmarks import dlc_rows
    progress('building')
    row = getattr(dlc_rows, name)(sizes, bf16=bf16, compiled=compiled)
    progress('checking that both sides agree')
    row.check()
    jax.clear_caches()  # so that the first call is a cold one
    times = measure(row, repeats, progress)
    return times, verdict(name, times) | {'share_of_peak': row.flops / statistics.median(times['ours']) / peak}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', nargs='+', choices=tuple(TARGETS), help='default: all; on a CPU without encoder_training')
    p.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
    p.add_argument('--sizes', choices=tuple(SIZES), help="default: the device's; tiny only shows that everything runs")
    p.add_argument('--repeats', type=int, default=10, help='turns of every row')
    p.add_argument('--eager', action='store_true', help='leave torch.compile out')
    p.add_argument('--json', metavar='FILE', help='also write every time there')
    args = p.parse_args(argv)
    check_device(args.device, args.sizes)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit("error: PyTorch, the other side, is missing: pip install -e '.[parity]'") from None
    names = args.rows or [name for name in TARGETS if args.device == 'gpu' or name != 'encoder_training']
    sizes, dtype = SIZES[args.sizes or args.device], 'bfloat16' if args.device == 'gpu' else 'float32'
    about, peak = versions(args.device), matmul_peak(sizes.gemm, dtype)
    print('  '.join(f'{k} {v}' for k, v in about.items() if v))
    print(f'matmul peak {peak / 1e12:.3g} TFLOP/s in {dtype}; times in ms: median (least..greatest)', flush=True)
    report: dict[str, Any] = {'versions': about, 'peak_flops': peak, 'rows': {}}
    for name in names:
        progress = lambda what: print(f'\r\033[K{name}: {what}', end='', file=sys.stderr, flush=True)
        times, result = run_row(name, sizes, bf16=dtype == 'bfloat16', compiled=not args.eager, repeats=args.repeats,
                                peak=peak, progress=progress)
        print('\r\033[K', end='', file=sys.stderr)
        print(line(name, times, result), flush=True)
        report['rows'][name] = {'seconds': times, **result}
        if name == 'dit_training':
            report['first_step'] = cold = first_step(times)
            print('   '.join([f'{"first_step":17s} in s:', *(f'{side} {v:.1f}' for side, v in cold['seconds'].items()),
                              reached(cold)]), flush=True)
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(report, file, indent=1)
    return report


def command() -> None:
    jax.config.update('jax_enable_compilation_cache', False)  # first steps are cold
    try:
        main()
    except Disagreement as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    command()
