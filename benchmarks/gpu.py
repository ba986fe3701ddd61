"""Ours against PyTorch on one GPU: python -m benchmarks.gpu [--rows dit ...] [--json FILE].

Training steps at the published sizes, sampling, and a whole Online-DPO iteration, each against the same work in PyTorch
as one would write it for speed, and against what the card can do, measured in the same run: the rate of a large matrix
product and the bandwidth of its memory. Both sides hold random weights of their own; that they compute the same is
shown by the tests, at small size.

Every side runs in a process of its own, which has all of the GPU's memory and cannot take the others with it; results
are written after every side, so that a run that is cut off keeps what it has. With --sizes=tiny and without a GPU it
shows that everything runs.
"""
import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.93')

import jax
import torch

from benchmarks import gpu_rows, gpu_sizes
from benchmarks.measure import versions

SIDES = ('ours', 'torch')
TARGETS = {  # share of the matrix peak or of the bandwidth, PyTorch's time over ours; None: no target
    'dit': (0.60, 1.15), 'sedd': (0.60, 1.0), 'vit': (0.48, 1.0), 'learner': (None, 1.0), 'decode': (0.75, 1.0),
    'iteration': (None, 1.0),
}


def builder(row: str, side: str) -> Callable[..., gpu_rows.Side]:
    name = row.split('_')[0]
    return getattr(gpu_rows, name if side == 'ours' else f'{name}_torch')


# ---- One side, in its own process ------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], wait: Callable[[Any], None], *, first: bool = False) -> float:
    """Of one call; of one that returns a number, what it measured itself, but for the first."""
    started = time.perf_counter()
    out = work()
    if isinstance(out, float) and not first:
        return out
    wait(out)
    return time.perf_counter() - started


def profile(side: str, work: Callable[[], Any], wait: Callable[[Any], None], file: pathlib.Path) -> None:
    """Writes where the time of one call goes: a trace for Perfetto of ours, a table of kernels of PyTorch's."""
    if side == 'ours':
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                wait(work())
            for found in pathlib.Path(folder).rglob('*.trace.json.gz'):
                shutil.copy(found, file.with_suffix('.json.gz'))
    else:
        with torch.profiler.profile() as found:
            wait(work())
        file.with_suffix('.txt').write_text(found.key_averages().table(
            sort_by='self_cuda_time_total' if torch.cuda.is_available() else 'self_cpu_time_total', row_limit=60,
            max_name_column_width=110))


def run_side(row: str, side: str, size: Any, repeats: int, profiles: pathlib.Path | None = None) -> dict[str, Any]:
    """Seconds of building, of the first call, and of `repeats` calls of every work."""
    started = time.perf_counter()
    if side == 'ours':
        built, wait = builder(row, side)(size), jax.block_until_ready
    else:
        if torch.cuda.is_available():
            jax.config.update('jax_platforms', 'cpu')  # shapes are asked of JAX here too; it must not take GPU memory
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        built = builder(row, side)(size, device)
        wait = lambda _: torch.cuda.synchronize() if device.type == 'cuda' else None
    out: dict[str, Any] = {'build': time.perf_counter() - started, 'flops': built.flops, 'bytes': built.bytes,
                           'tokens': built.tokens, 'first': {}, 'seconds': {}}
    for name, work in built.works.items():
        out['first'][name] = seconds(work, wait, first=True)
    for name, work in built.works.items():
        seconds(work, wait)  # allocators grow, a second specialisation compiles
        out['seconds'][name] = [seconds(work, wait) for _ in range(repeats)]
    if profiles:
        profile(side, built.works['step'], wait, profiles / f'{row}-{side}')
    if side == 'ours':
        memory = jax.devices()[0].memory_stats() or {}
        out['peak_bytes'] = memory.get('peak_bytes_in_use', 0)
    elif torch.cuda.is_available():
        out['peak_bytes'] = torch.cuda.max_memory_allocated()
    return out


def peaks(side: str, gemm: int, mib: int, repeats: int) -> dict[str, float]:
    """FLOP/s of bfloat16 products of random squares, bytes a second of a copy (read and written) and of a sum (read):
    of the fastest of `repeats` runs of ten calls each."""
    if side == 'ours':
        key = jax.random.key(0)
        a, b = (jax.random.normal(k, (gemm, gemm)).astype('bfloat16') for k in jax.random.split(key))
        x = jax.random.normal(key, (mib * 2 ** 18,))
        product, copy, total = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1), jax.jit(lambda x: x.sum())
        calls, wait = (lambda: product(a, b), lambda: copy(x), lambda: total(x)), jax.block_until_ready
    else:
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        a, b = (torch.randn(gemm, gemm, device=device).bfloat16() for _ in range(2))
        x = torch.randn(mib * 2 ** 18, device=device)
        y, z = torch.empty_like(x), torch.empty_like(a)
        calls = (lambda: torch.mm(a, b, out=z), lambda: y.copy_(x), lambda: x.sum())
        wait = lambda _: torch.cuda.synchronize() if device.type == 'cuda' else None

    def ten(call):
        for _ in range(9):
            call()
        return call()
    least = []
    for call in calls:
        seconds(lambda: ten(call), wait)
        least.append(min(seconds(lambda: ten(call), wait) for _ in range(repeats)) / 10)
    moved = 4 * mib * 2 ** 18
    return {'flops': 2 * gemm ** 3 / least[0], 'copy': 2 * moved / least[1], 'read': moved / least[2]}


def isolated(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """What `work` returns, run in a process forked from this one, which has imported everything but touched no GPU.

    Where it fails or takes more than `limit` seconds: {'error': why}.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)

    def child():
        os.setpgid(0, 0)  # compilers' worker processes go with it
        try:
            sender.send(work())
        except BaseException as error:
            traceback.print_exc()
            sender.send({'error': f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'[:300]})
        finally:
            sender.close()
            sys.stderr.flush()
            os._exit(0)  # without the teardown of two frameworks

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of forking: no threads run yet
        process = context.Process(target=child)
        process.start()
    sender.close()
    try:
        out = receiver.recv() if receiver.poll(limit) else {'error': f'took more than {limit:.0f} s'}
    except EOFError:
        out = {'error': 'the process died'}
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.join()
    return out


# ---- The table -------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest, ms."""
    return f'{1e3 * statistics.median(values):.4g} ({1e3 * min(values):.4g}..{1e3 * max(values):.4g})'


def share(out: dict[str, Any], peak: dict[str, float]) -> float | None:
    """Of the matrix peak, or of the bandwidth; None where neither bounds the row."""
    times = {name: statistics.median(values) for name, values in out['seconds'].items()}
    if out['flops']:
        return out['flops'] / times['step'] / peak['flops']
    if out['bytes']:
        return out['bytes'] / (times['step'] - times['prefill']) / max(peak['copy'], peak['read'])
    return None


def lines(row: str, found: dict[str, dict[str, Any]], peak: dict[str, float]) -> Iterator[str]:
    """What is printed of a row."""
    aims = TARGETS[row.split('_')[0]]
    for side, out in found.items():
        if 'error' in out:
            yield f'{row:18s} {side:6s} FAILED: {out["error"]}'
            continue
        parts = [f'{name} {spread(values)} ms' for name, values in out['seconds'].items()]
        part = share(out, peak)
        if part is not None:
            parts.append(f'{part:.1%} of {"matmul peak" if out["flops"] else "bandwidth"}')
        if out['tokens']:
            parts.append(f'{out["tokens"] / statistics.median(out["seconds"]["step"]):.0f} tokens/s')
        parts.append(f'first call {sum(out["first"].values()):.1f} s, {out.get("peak_bytes", 0) / 2 ** 30:.1f} GiB')
        yield f'{row:18s} {side:6s} ' + '   '.join(parts)
    good = {side: out for side, out in found.items() if 'error' not in out}
    if len(good) == 2:
        own, other = (min(statistics.median(values) for name, values in good[side]['seconds'].items()
                          if name in ('step', 'asynchronous')) for side in SIDES)
        reached = [aims[0] is None or share(good['ours'], peak) >= aims[0], other / own >= aims[1]]
        yield (f'{row:18s} PyTorch over ours {other / own:.2f} (target {aims[1]:g}); '
               + (f'share {share(good["ours"], peak):.1%} (target {aims[0]:.0%}); ' if aims[0] else '')
               + ('reached' if all(reached) else 'NOT reached'))


def gpu_memory() -> int:
    """Bytes of the first GPU, asked without touching it; 0 without one."""
    try:
        out = subprocess.run(['nvidia-smi', '--query-gpu=memory.total', '--format=csv,noheader,nounits'],
                             capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(out.split()[0]) * 2 ** 20


def main(argv: Sequence[str] | None = None, *, run: Callable[..., dict[str, Any]] = isolated) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', nargs='+', help='default: all, in the order of what they tell')
    p.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
    p.add_argument('--sizes', choices=('published', 'tiny'), default='published')
    p.add_argument('--repeats', type=int, default=10, help='calls of every work')
    p.add_argument('--limit', type=float, default=110, help='seconds for one side of one row, compilation included')
    p.add_argument('--budget', type=float, default=460, help='seconds for everything; later rows are left out')
    p.add_argument('--json', metavar='FILE', help='write every time there, after every side')
    p.add_argument('--profile', metavar='DIR', type=pathlib.Path, help='also write a profile of one step of every side')
    args = p.parse_args(argv)
    started, memory = time.monotonic(), gpu_memory()
    if not memory and args.sizes != 'tiny':
        raise SystemExit('error: nvidia-smi shows no GPU; --sizes tiny runs anywhere')
    rows = gpu_sizes.sizes(args.sizes, memory)
    unknown = set(args.rows or ()) - set(rows)
    if unknown:
        raise SystemExit(f'error: --rows {sorted(unknown)[0]}: the rows are {", ".join(rows)}')
    left = lambda: args.budget - (time.monotonic() - started)
    report: dict[str, Any] = {'rows': {}}

    def keep():
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(report, indent=1))

    about, product = (1024, 256) if args.sizes == 'tiny' else (8192, 2048)
    for side in SIDES:
        found = run(lambda: peaks(side, about, product // (8 if args.sizes == 'tiny' else 1), 5), 60)
        report[f'peaks {side}'] = found
    report['versions'] = run(lambda: versions('gpu'), 60)
    good = [report[f'peaks {side}'] for side in SIDES if 'error' not in report[f'peaks {side}']]
    peak = {name: max(found[name] for found in good) for name in ('flops', 'copy', 'read')}
    print('  '.join(f'{name} {value}' for name, value in report['versions'].items() if value))
    print(f'matmul peak {peak["flops"] / 1e12:.3g} TFLOP/s in bfloat16, memory {peak["copy"] / 1e12:.3g} TB/s copied, '
          f'{peak["read"] / 1e12:.3g} TB/s read; times in ms: median (least..greatest) of {args.repeats}', flush=True)
    keep()
    for row in args.rows or rows:
        found = report['rows'][row] = {}
        for side in args.sides:
            if left() < 15:
                found[side] = {'error': 'left out: no time left'}
            else:
                found[side] = run(lambda: run_side(row, side, rows[row], args.repeats, args.profile),
                                  min(args.limit, left()))
            keep()
        print('\n'.join(lines(row, found, peak)), flush=True)
    print(f'{time.monotonic() - started:.0f} s in all')
    return report


if __name__ == '__main__':
    main()
