"""Timing works that take turns, agreement of two sides, and what the machine can do."""
import dataclasses
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Work = Callable[[], Any]
Times = dict[str, list[float]]


class Disagreement(Exception):
    """The two sides of a row do not compute the same; their times would mean nothing."""


def agree(what: str, ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Raises `Disagreement` where arrays differ by more than `tolerance` of the largest entry of `theirs`."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    error = np.abs(ours - theirs).max() / (np.abs(theirs).max() + 1e-12)
    if not error <= tolerance:
        raise Disagreement(f'{what}: ours and PyTorch differ by {error:.2g} of the largest entry; different maths '
                           'is not timed')


def random_params(shapes: Any, std: float = 0.03) -> Any:
    """Normal(0, std), norms' scales about 1: initial weights have zeros, behind which a difference would hide."""
    rng = np.random.default_rng(0)
    one = lambda path, s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * std
                                      + float(str(path[-1].key) in ('scale', 'gain', 'gamma')), s.dtype)
    return jax.tree_util.tree_map_with_path(one, shapes)


@dataclasses.dataclass
class Row:
    """One comparison.

    Attributes:
        ours: one blocking call.
        rivals: the same work in PyTorch, by name.
        check: raises `Disagreement` unless both sides compute the same.
        flops: of the matrix products in a call.
    """
    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any]]
    check: Callable[[], None]
    flops: float


def seconds(work: Work) -> float:
    return wall_and_cpu(work)[0]


def wall_and_cpu(work: Work) -> tuple[float, float]:
    """Seconds by the clock, and of this process's threads together, which move less where others load the machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: Sequence[float], scale: float = 1e3) -> str:
    """Median, least and greatest, in ms."""
    scaled = [scale * v for v in values]
    return f'{statistics.median(scaled):.4g} ({min(scaled):.4g}..{max(scaled):.4g})'


def in_turns(works: Mapping[str, Work], repeats: int, progress: Callable[[str], None]) -> Times:
    """{name: seconds of each call, the first (which compiles) left out}; works take turns.

    `first/name` holds that first call, `cpu/name` the processor time of the others.
    """
    times: Times = {}
    for name, work in works.items():
        progress(f'first call of {name}')
        times[f'first/{name}'] = [seconds(work)]
        work()  # a second call may still compile: torch.compile specialises, allocators grow
    for turn in range(repeats):
        progress(f'turn {turn + 1} of {repeats}')
        for name, work in works.items():
            wall, cpu = wall_and_cpu(work)
            times.setdefault(name, []).append(wall)
            times.setdefault(f'cpu/{name}', []).append(cpu)
    return times


def sides(times: Times) -> list[str]:
    """Names of what was timed, ours first."""
    return [side for side in times if '/' not in side]


def ratio(times: Times, rivals: Sequence[str], ours: str = 'ours') -> dict[str, Any]:
    """Time of the fastest of `rivals` over ours: of medians, and least and greatest of a turn."""
    medians = {side: statistics.median(times[side]) for side in rivals}
    best = min(medians, key=medians.get)
    turns = sorted(theirs / mine for theirs, mine in zip(times[best], times[ours]))
    return {'ratio': medians[best] / statistics.median(times[ours]), 'ratio_turns': (turns[0], turns[-1]),
            'best_rival': best}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of the table.

    Attributes:
        name: what it is.
        value: of medians.
        turns: least and greatest of a turn.
        target: to be reached; None: there is none.
        at_most: the target is an upper bound.
        form: how a number is printed, a format specification.
        note: printed behind it.
    """
    name: str
    value: float
    turns: tuple[float, float]
    target: float | None = None
    at_most: bool = False
    form: str = '.2f'
    note: str = ''

    @property
    def reached(self) -> bool | None:
        """Whether the target is; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        value, low, high = (format(x, self.form) for x in (self.value, *self.turns))
        parts = [f'{self.name:34s} {value} ({low}..{high})']
        if self.target is not None:
            sign, verdict = '<=' if self.at_most else '>=', 'reached' if self.reached else 'NOT reached'
            parts.append(f'target {sign} {format(self.target, self.form)}   {verdict}')
        return '   '.join([*parts, self.note] if self.note else parts)


def figure(name: str, of_turn: Callable[..., float], *columns: Sequence[float], **settings: Any) -> Figure:
    """The figure `of_turn(*one number of each column)`: of the columns' medians, and of every turn."""
    turns = [of_turn(*turn) for turn in zip(*columns, strict=True)]
    return Figure(name, of_turn(*map(statistics.median, columns)), (min(turns), max(turns)), **settings)


def matmul_peak(side: int, dtype: str) -> float:
    """FLOP/s of the fastest of ten products of two square matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side)).astype(dtype) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    run = lambda: jax.block_until_ready(product(a, b))
    run()
    return 2 * side ** 3 / min(seconds(run) for _ in range(10))


def transformer_flops(depth: int, tokens: int, width: int) -> float:
    """Of one sequence's forward pass through the blocks, 2 a multiply-add."""
    return depth * (24 * tokens * width ** 2 + 4 * tokens ** 2 * width)


def check_device(device: str, sizes: str | None) -> None:
    """Ends the command where rows of a GPU, at its sizes, are asked for and there is none."""
    if device == 'gpu' and sizes != 'tiny' and jax.default_backend() != 'gpu':
        raise SystemExit(f'error: JAX runs on {jax.default_backend()}, not on a GPU; --sizes tiny runs anywhere')


def versions(device: str) -> dict[str, str]:
    try:
        import torch
        on_gpu = device == 'gpu' and torch.cuda.is_available()
        theirs, torch_version = torch.cuda.get_device_name() if on_gpu else platform.machine(), torch.__version__
    except ImportError:
        theirs, torch_version = platform.machine(), ''
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    return {'jax': jax.__version__, 'torch': torch_version, 'device': f'{jax.devices()[0].device_kind} ({theirs})',
            'cores': str(os.cpu_count()), 'python': platform.python_version(),
            'git': git.stdout.strip() or 'unknown', 'XLA_FLAGS': os.environ.get('XLA_FLAGS', '')}
