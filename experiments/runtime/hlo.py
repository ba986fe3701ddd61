"""Reads the text of a compiled XLA program: how often each instruction runs, what it costs, what it moves.

XLA's own totals take the body of a loop once. Here a `while` counts its body as often as its condition lets it: the
largest integer constant of the condition, which is the trip count of every `lax.scan` and `fori_loop` that begins at 0.
Of a condition's branches the dearest counts.
"""
import dataclasses
import math
import re
from collections.abc import Iterable

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's64': 8, 'u64': 8,
         'f64': 8}
# Instructions that move nothing themselves.
_FREE = ('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
         'partition-id', 'replica-id', 'opt-barrier')
_READS_PART = ('dynamic-slice', 'slice', 'gather')

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(r'(condition|body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?')


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
        bytes: that its instructions read from and write to memory; of an array of which a loop reads or writes a slice
            at a time, the slices.
        collectives: by kind.
    """
    cycles: int
    bytes: int
    collectives: dict[str, Collective]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    root: bool
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    line: str

    @property
    def called(self) -> dict[str, str]:
        return dict(_CALLED.findall(self.line))


_Computations = dict[str, list[_Instruction]]


def costs(text: str) -> Costs:
    """What the program `text` (`Compiled.as_text()`) costs.

    Raises:
        ValueError: it has no entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError('not the text of a compiled program: it has no ENTRY computation')
    runs: dict[str, int] = {}
    cycles, moved = _walk(entry, 1, computations, runs)
    found: dict[str, Collective] = {}
    seen: set[str] = set()
    for name, instructions in computations.items():
        for instruction in instructions:
            op = instruction.op
            kind = next((k for k in COLLECTIVES if op in (k, f'{k}-start')), None)
            channel = re.search(r'channel_id=(\d+)', instruction.line) if kind else None
            # An asynchronous collective stands in the computation of each of its stages, under one channel.
            if not kind or (channel and channel[1] in seen):
                continue
            if channel:
                seen.add(channel[1])
            sizes = [_size(dtype, dims) for dtype, dims, _ in _ARRAY.findall(instruction.shape)]
            # A collective of several arrays has several results; some -start give their operands beside them.
            size = max(sizes) if op in ('all-gather-start', 'collective-permute-start') else sum(sizes)
            entry_of = found.setdefault(kind, Collective())
            entry_of.count += 1
            entry_of.runs += runs.get(name, 0)
            entry_of.bytes += runs.get(name, 0) * size
            entry_of.largest_bytes = max(entry_of.largest_bytes, *sizes)
    return Costs(cycles, moved, found)


def _computations(text: str) -> tuple[_Computations, str | None]:
    """({name: instructions of the computation}, name of the entry)."""
    out: _Computations = {}
    entry, instructions = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            instructions = out[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith('}') and not line.startswith('}}'):  # that ends the attributes of a Pallas kernel
            instructions = None
        elif instructions is not None and (match := _INSTRUCTION.match(line)):
            root, name, shape, op, rest = match.groups()
            operands = tuple(re.findall(r'%([\w.\-]+)', rest.split('), ')[0]))
            instructions.append(_Instruction(bool(root), name, shape, op, operands, line))
    return out, entry


def _walk(name: str, times: int, computations: _Computations, runs: dict[str, int]) -> tuple[int, int]:
    """Cycles, and bytes moved, of `times` runs of a computation; counts in `runs` how often each is run."""
    runs[name] = runs.get(name, 0) + times
    cycles = moved = 0
    shapes = {i.name: i.shape for i in computations.get(name, ())}

    def add(parts: Iterable[tuple[int, int]]) -> None:
        nonlocal cycles, moved
        for more_cycles, more_bytes in parts:
            cycles, moved = cycles + more_cycles, moved + more_bytes

    for instruction in computations.get(name, ()):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
        cycles += times * int(estimate[1]) if estimate else 0
        moved += times * _moved(instruction, shapes, computations)
        called, op = instruction.called, instruction.op
        branches = _BRANCHES.search(instruction.line)
        if op == 'while':
            trips = _trips(called['condition'], computations)
            add([_walk(called['body'], times * trips, computations, runs)])
        elif op == 'conditional':
            names = re.findall(r'[\w.\-]+', branches[1]) if branches else [
                called[side] for side in ('true_computation', 'false_computation')]
            add([max(_walk(branch, times, computations, runs) for branch in names)])
        elif op == 'call':
            add([_walk(called['to_apply'], times, computations, runs)])
        elif 'calls' in called:  # a fusion's costs are its own; what it calls may hold a stage of a collective
            _walk(called['calls'], times, computations, runs)
    return cycles, moved


def _size(dtype: str, dims: str) -> int:
    return BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(','))))


def _in_memory(shape: str) -> int:
    """Bytes of a result in the device's main memory: what a TPU keeps in its vector memory, S(1), is not there."""
    return sum(_size(dtype, dims) for dtype, dims, layout in _ARRAY.findall(shape) if not re.search(r'S\(\d', layout))


def _moved(instruction: _Instruction, shapes: dict[str, str], computations: _Computations) -> int:
    """Bytes that one run of an instruction reads and writes."""
    op, sizes = instruction.op, [_in_memory(shapes.get(name, '')) for name in instruction.operands]
    if op in _FREE or op.endswith(('-done', '-update')):
        return 0
    if op in _READS_PART:
        return 2 * _in_memory(instruction.shape)
    if op == 'dynamic-update-slice':
        return 2 * sizes[1]
    if op.endswith('-start'):  # gives its operands beside its results
        return _in_memory(instruction.shape)
    if op != 'fusion':
        return _in_memory(instruction.shape) + sum(sizes)
    inner = computations.get(instruction.called.get('calls', ''), [])
    return _written(instruction, inner) + _read(sizes, inner)


def _read(sizes: list[int], inner: list[_Instruction]) -> int:
    """Bytes that a fusion reads of operands of those `sizes`; of one that is only sliced, or only written into, what
    is taken."""
    total = 0
    for parameter in inner:
        number = re.search(r'parameter\((\d+)\)', parameter.line) if parameter.op == 'parameter' else None
        if not number or int(number[1]) >= len(sizes):
            continue
        users = [i for i in inner if parameter.name in i.operands]
        whole, part = sizes[int(number[1])], 0
        for user in users:
            if user.op in _READS_PART and user.operands[0] == parameter.name:
                part += _in_memory(user.shape)
            elif not (user.op == 'dynamic-update-slice' and user.operands[0] == parameter.name):
                part = whole
                break
        total += min(whole, part)
    return total


def _written(fusion: _Instruction, inner: list[_Instruction]) -> int:
    """Bytes that a fusion writes: of a result that is an operand with a slice replaced, the slice."""
    by_name = {i.name: i for i in inner}
    root = next((i for i in inner if i.root), None)
    results = [by_name.get(name) for name in root.operands] if root and root.op == 'tuple' else [root]
    arrays = [m[0] for m in _ARRAY.finditer(fusion.shape)]
    if len(results) != len(arrays):
        return _in_memory(fusion.shape)
    total = 0
    for result, array in zip(results, arrays):
        while result is not None and result.op in ('bitcast', 'copy') and result.operands:
            result = by_name.get(result.operands[0])
        update = by_name.get(result.operands[1]) if result is not None and result.op == 'dynamic-update-slice' else None
        size = _in_memory(array)
        total += min(size, _in_memory(update.shape)) if update is not None and size else size
    return total


def _trips(condition: str, computations: _Computations) -> int:
    """How often a loop with that condition runs, from the largest integer it compares with; 1 if it has none."""
    waiting, numbers = list(computations.get(condition, ())), [1]
    while waiting:
        instruction = waiting.pop()
        numbers += map(int, re.findall(r'\b[su]\d+\[\](?:\{[^}]*\})? constant\((\d+)\)', instruction.line))
        for kind, called in instruction.called.items():
            if kind in ('calls', 'to_apply'):
                waiting += computations.get(called, ())
    return max(numbers)
