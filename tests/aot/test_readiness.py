"""The table of published configurations: it covers them, it is the rows', and a few rows are compiled again."""
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest

from experiments import compile as aot
from experiments import readiness
from experiments.runtime import compiler, programs, report_cache, slices
from experiments.runtime import mesh as mesh_lib

CHEAP = ('configs/rlhf/sft_imdb.py v5e-16', 'configs/rlhf/sft_imdb.py h100-8',
         'configs/rlhf/reward_tldr.py:410m h100-8')
DEAR = ('configs/dlc/generator_imagenet.py:L512 v5p-8', 'configs/dlc/code_model_imagenet.py:L512 v5e-16',
        'configs/dlc/encoder_imagenet.py:L512 v5e-16', 'configs/dlc/text_to_code_llada.py:L512 v5p-8',
        'configs/rlhf/sft_tldr.py:2.8b v4-32', 'configs/rlhf/tldr.py:online_dpo_2.8b v5e-16',
        'configs/rlhf/tldr.py:ppo_410m v6e-8')


def row(**changes):
    program = {'bytes': 100, 'total': 120, 'usable_bytes': 200, 'flops': 1e12, 'times': 2, 'fits': True,
               'seconds': dict(matmul=1.0, memory=2.5, network=0.1, cycles=9.0),
               'mesh': dict(data=1, fsdp=8, tensor=1),
               'collectives': {'all-gather': {'runs': 7, 'bytes': 40}}}
    return {'programs': {'step': program | changes}}


@pytest.mark.parametrize('file, names', [('tldr', 'NAMES'), ('gsm8k', 'RUNS'), ('no_robots', 'NAMES'),
                                         ('stackexchange', 'ARMS'), ('sft_tldr', 'BATCH'), ('reward_tldr', 'BATCH')])
def test_every_published_name_is_there(file, names):
    published = getattr(importlib.import_module(f'configs.rlhf.{file}'), names)
    assert set(readiness.PUBLISHED[f'configs/rlhf/{file}.py']) == set(published)
    assert set(readiness.FIRST) <= set(readiness.paths()) and len(set(readiness.paths())) == len(readiness.paths())


def test_every_arm_on_imdb_is_there_but_the_one_that_differs_in_settings_alone():
    imdb = importlib.import_module('configs.rlhf.imdb')
    assert set(readiness.PUBLISHED['configs/rlhf/imdb.py']) == imdb.ARMS.keys() - {'ppo_matched'}


def test_every_model_of_images_is_there():
    files = {str(path.relative_to(readiness.CHECKOUT))
             for path in (readiness.CHECKOUT / 'configs' / 'dlc').glob('*_imagenet.py')}
    assert len(files) == 4 and files <= readiness.PUBLISHED.keys()


def test_what_moved_is_named():
    assert readiness.moved(row(), row(bytes=104)) == []
    assert readiness.moved(row(), row(bytes=106)) == ['step: bytes 100 -> 106']
    assert readiness.moved(row(), row(collectives={'all-reduce': {'runs': 7, 'bytes': 40}})) == [
        'step: all-gather bytes 40 -> 0', 'step: all-gather runs 7 -> 0', 'step: all-reduce bytes 0 -> 40',
        'step: all-reduce runs 0 -> 7']
    assert readiness.moved(row(), {'refused': 'batch'}) == ['whether it is refused']


def test_cells():
    config = readiness.config_files.load('configs/rlhf/sft_imdb.py')
    gib = lambda n: int(n * slices.GIB)
    found = readiness.cell(row(total=gib(3), usable_bytes=gib(16)), config)
    assert found == '3.0 of 16.0 (step); 5 s'  # twice the slowest of products, memory and network
    assert readiness.cell(row(total=gib(17), usable_bytes=gib(16), fits=False), config).startswith('**no**: 17.0 of')
    assert readiness.cell({'refused': 'batch_size=16 is not divisible by 64 batch shards'}, config) == 'no: batch'
    assert readiness.cell(None, config) == ''
    divided = readiness.cell(row(), readiness.config_files.load('configs/rlhf/sft_tldr.py:2.8b'))  # 32 rows in 8s
    assert divided.endswith('; 5 s; accumulate=4')
    config = readiness.config_files.load('configs/rlhf/tldr.py:online_dpo_410m_async')
    one = row()['programs']['step']
    programs = {'programs': {name: one for name in ('step', 'publish', 'sampler')}}
    assert '; 10 s, of it step 5' in readiness.cell(programs, config)  # learning, while the next batch is generated
    config.rollout.max_staleness = 0
    assert '; 15 s, of it step 5' in readiness.cell(programs, config)


def test_a_sweep_compiles_the_rows_that_are_asked_for_and_missing(tmp_path):
    targets = dict.fromkeys(('v5e-8', 'h100-8'), None)
    compiled = lambda path, config, target: {}
    sweep = lambda only: [key for key, _ in readiness.sweep(targets, tmp_path / 'rows.json', compiled, [], only)]
    first = ['configs/rlhf/sft_tldr.py:2.8b v5e-8', 'configs/rlhf/sft_tldr.py:2.8b h100-8']
    assert sweep('sft_tldr.py:2') == first and sweep('sft_tldr.py:2') == []
    assert sweep('sft_tldr') == [f'configs/rlhf/sft_tldr.py:{size} {name}' for name in targets
                                 for size in ('410m', '1b')]


@pytest.mark.parametrize('platform, expected', [
    ('tpu', [('step', 'full'), ('sampler', 'less'), ('reward', 'full'), ('publish', 'less')]),
    ('gpu', [('step', 'full'), ('2 blocks', 'full'), ('4 blocks', 'full'), ('reward', 'full'), ('publish', 'full')])])
def test_what_a_row_compiles_of_a_policy(platform, expected, monkeypatch):
    """On TPUs its sampler whole and with less effort, for GPUs at few blocks; rewards with full effort on both."""
    mesh, compiled = mesh_lib.make_mesh({}, jax.devices()[:1]), []
    program = lambda name: programs.Program(name, None, (), mesh)
    for name, function in {
            'mesh_of': lambda *unused: mesh, 'describe': lambda *unused: '',
            'shallow': lambda config, target, blocks, like: program(f'{blocks} blocks'),
            'programs_of': lambda *unused, **fast: [program(n) for n in ('step', 'sampler', 'reward', 'publish')],
            'compile_program': lambda program, target, cache: compiled.append(
                (program.name, 'less' if program.options == compiler.FAST else 'full'))}.items():
        monkeypatch.setattr(aot, name, function)
    monkeypatch.setattr(aot.fitting, 'fitted', lambda config, *unused, **present: config)
    monkeypatch.setattr(readiness, 'extrapolated', lambda program, at, depth, target: [at(2), at(4)])
    target = types.SimpleNamespace(devices=[types.SimpleNamespace(platform=platform)])
    reports = aot.compile_row('tldr', readiness.config_files.load('configs/rlhf/tldr.py:online_dpo_410m'), target)
    assert compiled == expected and list(reports) == ['step', 'sampler', 'reward', 'publish']


def test_an_equal_program_is_compiled_once(tmp_path, monkeypatch):
    compile_anew, compiled = programs._compiled, []
    monkeypatch.setattr(programs, '_compiled', lambda *args: compiled.append(args) or compile_anew(*args))
    target = slices.Slice('cpu', tuple(jax.devices()), 2 ** 30, 2 ** 30, 1.0, 1.0, 1.0)

    def report(*, size=8, devices=2, axis='data', options=None, **jit):
        mesh = mesh_lib.make_mesh({axis: -1}, jax.devices()[:devices])
        x = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=mesh_lib.batch_sharding(mesh))
        program = programs.Program('step', jax.jit(lambda x: x @ x, **jit), (x,), mesh, {'state': x}, times=3,
                                   options=options)
        return programs.compile_program(program, target, report_cache.ReportCache(tmp_path))

    first = report()
    assert first['flops'] == 2 * 8 ** 3 / 2 and first['beside'] == {'state': 8 * 8 * 4 / 2} and first['times'] == 3
    assert report() == first and len(compiled) == 1
    others = (dict(size=16), dict(devices=4), dict(donate_argnums=0), dict(axis='tensor'),
              dict(options=compiler.FAST))
    for number, other in enumerate(others, 2):
        assert report(**other) == report(**other) and len(compiled) == number
    quick = report(options=compiler.FAST)
    assert len(compiled) == number and (first['effort'], quick['effort']) == (0, -1)
    line = '\n  time '
    assert line in aot.describe('step', first, target) and line not in aot.describe('step', quick, target)


def test_what_a_killed_command_left_half_written_is_made_anew(tmp_path):
    cache = report_cache.ReportCache(tmp_path)
    assert cache.get('program', lambda: {'bytes': 100}) == {'bytes': 100}
    (tmp_path / 'program.json').write_text('{"bytes": 1')
    assert cache.get('program', lambda: {'bytes': 7}) == cache.get('program', lambda: None) == {'bytes': 7}


def test_two_commands_share_a_sweep(tmp_path, monkeypatch):
    """Each row is compiled by one of them, and none is lost where both write at once. (Locks belong to open files, so
    that threads keep each other out as processes do.)"""
    targets, both, compiled, failures = dict.fromkeys(readiness.SLICES, None), threading.Barrier(2), [], []
    write = readiness.write

    def compile_row(path, config, target):
        both.wait(60)  # both are at a row, in every turn
        compiled.append(path)
        return {}

    def slow_write(file, rows):
        later.wait(0.05)
        write(file, rows)

    def command():
        try:
            list(readiness.sweep(targets, tmp_path / 'rows.json', compile_row, [], 'sft_tldr.py:2'))
        except Exception as error:
            failures.append(error)
    later = threading.Event()
    monkeypatch.setattr(readiness, 'write', slow_write)
    commands = [threading.Thread(target=command) for _ in range(2)]
    for thread in commands:
        thread.start()
    for thread in commands:
        thread.join()
    assert not failures and len(compiled) == len(targets)
    assert set(readiness.read(tmp_path / 'rows.json')) == {f'configs/rlhf/sft_tldr.py:2.8b {name}' for name in targets}


def test_a_row_that_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def compile_row(path, config, target, file):
        if path.endswith(':1b'):
            raise jax.errors.JaxRuntimeError('INTERNAL: a defect\nof the compiler')
        if path.endswith(':2.8b'):
            raise ValueError('batch_size=512 is not divisible by 7')
        return {}
    monkeypatch.setattr(aot, 'compile_row_apart', compile_row)
    monkeypatch.setattr(aot.slices, 'named', lambda name: None)
    with pytest.raises(SystemExit) as ended:
        aot.compile_all('v5e-8', tmp_path / 'rows.json', 'sft_tldr')
    assert ended.value.code == aot.FAILED not in (0, 1, 2)
    rows = readiness.read(tmp_path / 'rows.json')
    assert sorted(rows) == [f'configs/rlhf/sft_tldr.py:{size} v5e-8' for size in ('2.8b', '410m')]
    said = capsys.readouterr()
    assert 'sft_tldr.py:1b v5e-8: JaxRuntimeError: INTERNAL: a defect of the compiler (' in said.out
    assert '1 rows failed' in said.err


ABORTING = """
import os, sys, types
from experiments import compile as aot
aot.compile_row = lambda path, config, target, cache: os.abort() if path.endswith(':1b') else {}
aot.slices.named = lambda name: types.SimpleNamespace(name=name)
if __name__ == '__main__':
    aot.compile_all('v5e-8', sys.argv[1], 'sft_tldr')
"""


def test_a_compiler_that_ends_its_process_takes_no_other_row_with_it(tmp_path):
    (tmp_path / 'aborting.py').write_text(ABORTING)
    ended = subprocess.run([sys.executable, tmp_path / 'aborting.py', tmp_path / 'rows.json'], capture_output=True,
                           text=True, env=os.environ | {'PYTHONPATH': str(readiness.CHECKOUT)})
    assert ended.returncode == aot.FAILED, ended.stderr
    assert sorted(readiness.read(tmp_path / 'rows.json')) == [
        f'configs/rlhf/sft_tldr.py:{size} v5e-8' for size in ('2.8b', '410m')]
    assert 'sft_tldr.py:1b v5e-8: RuntimeError: the compiler ended its process with status -6' in ended.stdout


def test_the_table_is_that_of_the_rows():
    assert readiness.TABLE.read_text() == readiness.table(json.loads(readiness.ROWS.read_text()))


def test_waves_are_small_enough_wherever_a_prompt_at_a_time_is():
    for key, row in readiness.read(readiness.ROWS).items():
        sampler = row.get('programs', {}).get('sampler')
        if sampler and sampler['times'] and not sampler['fits'] and '/rlhf/' in key:
            config = readiness.config_files.load(key.rpartition(' ')[0])
            shards = sampler['mesh']['data'] * sampler['mesh']['fsdp']
            assert config.batch_size // sampler['times'] // shards == 1, key


@pytest.mark.tpu_compile
def test_the_flags_that_the_page_has_for_asynchronous_runs_on_v5e_16_are_accepted():
    page = ' '.join((readiness.CHECKOUT / 'docs' / 'accelerators.md').read_text().split())
    flags = re.search(r'on v5e-16, of whose hosts [^`]*`([^`]+)`', page)[1].split()
    target = slices.named('v5e-16')
    for name in ('online_dpo_410m', 'online_dpo_2.8b', 'ppo_410m', 'rloo_1b'):
        config = readiness.config_files.load(f'configs/rlhf/tldr.py:{name}_async', flags)
        mesh = aot.mesh_of(config, target.devices)
        assert mesh.devices.size == 12
        aot.build(aot.fitting.fitted(config, mesh, aot.build, None), mesh)  # which compiles nothing


def assert_row_is_what_it_was(key):
    path, _, name = key.rpartition(' ')
    before = readiness.read(readiness.ROWS)[key]
    if before['jax'] != jax.__version__:
        pytest.skip(f'the table was made with JAX {before["jax"]}')
    try:
        target = slices.named(name)
    except ValueError as error:
        pytest.skip(str(error))
    reports = aot.compile_row(path, readiness.config_files.load(path), target)
    again = {'programs': {program: readiness.compacted(report) for program, report in reports.items()}}
    assert readiness.moved(before, again) == []


@pytest.mark.tpu_compile
@pytest.mark.parametrize('key', CHEAP)
def test_a_row_compiled_again_is_the_same(key):
    assert_row_is_what_it_was(key)


@pytest.mark.tpu_compile
@pytest.mark.parametrize('key', DEAR)
def test_a_dear_row_compiled_again_is_the_same(key):
    assert_row_is_what_it_was(key)
