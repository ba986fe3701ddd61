"""Reads the text of a compiled XLA program: how often each instruction runs, what it costs, what crosses the network.

XLA's own totals take the body of a loop once. Here a `while` counts its body as often as its condition lets it: the
largest integer constant of the condition, which is the trip count of every `lax.scan` and `fori_loop` that begins at 0.
Of a condition's branches the dearest counts.
"""
import dataclasses
import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's64': 8, 'u64': 8,
         'f64': 8}

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\(')
_CALLED = re.compile(r'(condition|body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass
class Collective:
    """All collectives of one kind.

    Attributes:
        count: that the program's text has.
        runs: that one execution does.
        bytes: that their results have over all runs, on one device.
        largest_bytes: of one result.
    """
    count: int = 0
    runs: int = 0
    bytes: int = 0
    largest_bytes: int = 0


@dataclasses.dataclass
class Costs:
    """One execution of a program on one device.

    Attributes:
        cycles: the compiler's own estimates of its fusions and convolutions, summed (TPU; 0 where it gives none).
        collectives: by kind.
    """
    cycles: int
    collectives: dict[str, Collective]


def costs(text: str) -> Costs:
    """What the program `text` (`Compiled.as_text()`) costs.

    Raises:
        ValueError: it has no entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError('not the text of a compiled program: it has no ENTRY computation')
    runs: dict[str, int] = {}
    cycles = _walk(entry, 1, computations, runs)
    found: dict[str, Collective] = {}
    seen: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            kind = match and next((k for k in COLLECTIVES if match[2] in (k, f'{k}-start')), None)
            channel = re.search(r'channel_id=(\d+)', line)
            # An asynchronous collective stands in the computation of each of its stages, under one channel.
            if not kind or (channel and channel[1] in seen):
                continue
            if channel:
                seen.add(channel[1])
            sizes = [BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(','))))
                     for dtype, dims in re.findall(r'([a-z]+\d*)\[([\d,]*)\]', match[1])]
            entry_of = found.setdefault(kind, Collective())
            entry_of.count += 1
            entry_of.runs += runs.get(name, 0)
            entry_of.bytes += runs.get(name, 0) * max(sizes)
            entry_of.largest_bytes = max(entry_of.largest_bytes, *sizes)
    return Costs(cycles, found)


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """({name: lines of the computation}, name of the entry)."""
    out: dict[str, list[str]] = {}
    entry, lines = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = out[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith('}'):
            lines = None
        elif lines is not None:
            lines.append(line)
    return out, entry


def _walk(name: str, times: int, computations: dict[str, list[str]], runs: dict[str, int]) -> int:
    """Cycles of `times` runs of a computation; counts in `runs` how often each is run."""
    runs[name] = runs.get(name, 0) + times
    total = 0
    for line in computations.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        total += times * int(cycles[1]) if cycles else 0
        called = dict(_CALLED.findall(line))
        branches = _BRANCHES.search(line)
        if match[2] == 'while':
            total += _walk(called['body'], times * _trips(called['condition'], computations), computations, runs)
        elif match[2] == 'conditional':
            names = re.findall(r'[\w.\-]+', branches[1]) if branches else [
                called[side] for side in ('true_computation', 'false_computation')]
            total += max(_walk(branch, times, computations, runs) for branch in names)
        elif match[2] == 'call':
            total += _walk(called['to_apply'], times, computations, runs)
        elif 'calls' in called:  # a fusion's cycles are its own; what it calls may hold a stage of a collective
            _walk(called['calls'], times, computations, runs)
    return total


def _trips(condition: str, computations: dict[str, list[str]]) -> int:
    """How often a loop with that condition runs, from the largest integer it compares with; 1 if it has none."""
    lines, numbers = list(computations.get(condition, ())), [1]
    while lines:
        line = lines.pop()
        numbers += map(int, re.findall(r'\b[su]\d+\[\](?:\{[^}]*\})? constant\((\d+)\)', line))
        for kind, called in _CALLED.findall(line):
            if kind in ('calls', 'to_apply'):
                lines += computations.get(called, ())
    return max(numbers)
