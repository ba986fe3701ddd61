"""The table of published configurations: it covers them, it is the rows', and a few rows are compiled again."""
import importlib
import json

import jax
import pytest

from experiments import compile as aot
from experiments import readiness
from experiments.runtime import slices

CHEAP = ('configs/rlhf/sft_imdb.py v5e-16', 'configs/rlhf/sft_imdb.py h100-8',
         'configs/rlhf/reward_tldr.py:410m h100-8')


def row(**changes):
    program = {'bytes': 100, 'total': 120, 'usable_bytes': 200, 'flops': 1e12, 'times': 2, 'fits': True,
               'seconds': dict(matmul=1.0, memory=2.5, network=0.1, cycles=9.0),
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


def test_a_sweep_compiles_the_rows_that_are_asked_for_and_missing(tmp_path):
    targets = dict.fromkeys(('v5e-8', 'h100-8'), None)
    compiled = lambda path, config, target: {}
    sweep = lambda only: [key for key, _ in readiness.sweep(targets, tmp_path / 'rows.json', compiled, [], only)]
    first = ['configs/rlhf/sft_tldr.py:2.8b v5e-8', 'configs/rlhf/sft_tldr.py:2.8b h100-8']
    assert sweep('sft_tldr.py:2') == first and sweep('sft_tldr.py:2') == []
    assert sweep('sft_tldr') == [f'configs/rlhf/sft_tldr.py:{size} {name}' for name in targets
                                 for size in ('410m', '1b')]


def test_the_table_is_that_of_the_rows():
    assert readiness.TABLE.read_text() == readiness.table(json.loads(readiness.ROWS.read_text()))


@pytest.mark.tpu_compile
@pytest.mark.parametrize('key', CHEAP)
def test_a_row_compiled_again_is_the_same(key):
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
