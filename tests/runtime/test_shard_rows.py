"""Parts of a set: which rows they have, who makes them, and what is refused."""
import argparse

import jax
import numpy as np
import pytest

from experiments.runtime import lines, modules, shards
from experiments.runtime.prefetch import ahead
from experiments.runtime.shards import Shard


@pytest.mark.parametrize('num, unit, count', [(20, 3, 4), (20, 20, 1), (7, 2, 4), (16, 4, 3), (5, 4, 2)])
def test_parts_are_whole_units_and_follow_each_other(num, unit, count):
    parts = [Shard(i, count).rows(num, unit) for i in range(count)]
    assert [row for part in parts for row in part] == list(range(num))
    assert all(part.start % unit == 0 for part in parts)
    units = [-(-len(part) // unit) for part in parts]
    assert max(units) - min(units) <= 1


def test_what_a_flag_says():
    flag = lambda shard, distributed=False: shards.parse(argparse.Namespace(shard=shard, distributed=distributed))
    assert flag(None) is None and flag('0/4') == Shard(0, 4) and flag('3/4') == Shard(3, 4)
    for wrong in ('3/2', '2/2', '-1/2', '1', '1/', 'a/b', '0/0', '0/100000'):
        with pytest.raises(ValueError, match='write I/N with I from 0 to N - 1'):
            flag(wrong)
    with pytest.raises(ValueError, match='share the work themselves'):
        flag('0/4', True)


def test_what_was_begun_is_finished_as_it_was_begun(tmp_path, monkeypatch):
    out = tmp_path / 'set'
    assert shards.of_this_process(None, out, 20, 4) == [shards.WHOLE] and shards.place(out, shards.WHOLE) == str(out)
    monkeypatch.setattr(shards, 'agreed', lambda value: value)
    as_job = lambda index, count: (monkeypatch.setattr(jax, 'process_count', lambda: count),
                                   monkeypatch.setattr(jax, 'process_index', lambda: index))
    as_job(1, 2)
    assert shards.of_this_process(None, out, 20, 4) == [Shard(1, 2)]
    as_job(3, 8)
    assert shards.of_this_process(None, out, 9, 4) == []  # three units have no work for a fourth process
    (tmp_path / 'set.shards' / '00002-of-00004.partial').mkdir(parents=True)
    as_job(1, 2)
    assert shards.begun(out) == 4 and shards.of_this_process(None, out, 20, 4) == [Shard(1, 4), Shard(3, 4)]
    as_job(0, 1)
    assert shards.of_this_process(None, out, 20, 4) == [Shard(i, 4) for i in range(4)]


def test_lines_survive_a_kill_before_the_first_block_of_a_start(tmp_path):
    """What is on the disk while a block is made is what a kill then leaves, and it is gone on from."""
    out, on_disk = tmp_path / 'out.jsonl', []
    growing = shards.partial(out)

    def write(last=0, settings='abc'):
        def make(items):
            on_disk.append(growing.read_bytes())
            if len(on_disk) == last:
                raise KeyboardInterrupt
            return [{'i': i} for i in items]
        return lines.write(str(out), 8, 2, None, settings, make)
    for last, kept in ((3, 2), (4, 2), (6, 3)):
        with pytest.raises(KeyboardInterrupt):
            write(last)
        assert on_disk[-1].startswith(b'#abc 0 8\n') and on_disk[-1].count(b'{"i"') == 2 * kept
        growing.write_bytes(on_disk[-1])
    with pytest.raises(ValueError, match='was begun with other flags'):
        write(settings='other')
    for head in (b'', b'#abc 0'):  # of a kill in the middle of one
        growing.write_bytes(head)
        with pytest.raises(KeyboardInterrupt):
            write(len(on_disk) + 1)
    assert write() and out.read_bytes() == b''.join(b'{"i": %d}\n' % i for i in range(8)) and not growing.exists()


def test_devices_get_whole_units():
    local = len(jax.local_devices())
    assert [modules.Unit.of(4, 100), modules.Unit.of(4, 9), modules.Unit.of(256, 9)] == [(4, local), (4, 3), (9, 1)]
    seen = []

    def one(params, rows):
        jax.debug.callback(lambda x: seen.append(x.shape), rows)
        return rows * params
    run = modules.Batched(one, np.float32(2), modules.Unit(2, 3))
    progress = []
    np.testing.assert_array_equal(run(np.arange(7, dtype=np.float32), 7, progress.append), 2.0 * np.arange(7))
    assert run.batch_size == 6 and progress == [6, 7]


def test_split_parameters_are_compiled_with_the_options_of_steps(monkeypatch):
    monkeypatch.setattr(modules.compiler, 'options', lambda mesh: {'no_such_option': dict(mesh.shape)['fsdp']})
    params, rows = {'w': np.ones((8, 8), np.float32)}, np.ones((2, 8), np.float32)

    def run(rules):
        return modules.Batched(lambda params, x: x @ params['w'], params, modules.Unit(2, 1), rules)(rows, 2)
    np.testing.assert_array_equal(run(None), rows * 8)
    with pytest.raises(jax.errors.JaxRuntimeError, match='no_such_option'):
        run((('w', jax.P('fsdp', None)),))


def test_what_comes_next_is_computed_while_the_last_is_used():
    events = []

    def compute(i):
        events.append(('computed', i))
        return i
    for i in ahead(compute, range(3)):
        while i < 2 and ('computed', i + 1) not in events:  # it need not be asked for
            pass
        events.append(('used', i))
    assert [i for what, i in events if what == 'used'] == [0, 1, 2]

    def fail(i):
        if i == 1:
            raise OSError('no more')
        return i
    results = ahead(fail, range(3))
    assert next(results) == 0
    with pytest.raises(OSError, match='no more'):
        next(results)
