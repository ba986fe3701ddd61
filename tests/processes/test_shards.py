"""Encoding, sampling and evaluating on one, two and four processes, and by tasks that know nothing of each other: the
same bytes in every file."""
import json
import signal

import jax.numpy as jnp
import pytest

import jobs
from configs.dlc import quickstart
from experiments.dlc import code_model, encoder, generator
from experiments.dlc.data import codestore
from experiments.dlc.weights import writing
from experiments.evaluate import load_images
from tests.dlc.random_params import random_params

ENCODE = ('experiments.encode', '--encoder={runs}/encoder', '--split=heldout', '--batch_size=32', '--out={at}/codes')
DRAW = ('experiments.sample', '--unconditional', '--code_model={runs}/code_model', '--num=22', '--batch_size=4',
        '--save_codes={at}/drawn')
SAMPLE = ('experiments.sample', '--unconditional', '--code_model={runs}/code_model', '--generator={runs}/generator',
          '--num=22', '--batch_size=4', '--out={at}/samples.npz')
GUIDED = ('experiments.sample', '--codes={at}/drawn', '--generator={runs}/generator', '--guidance=3', '--batch_size=4',
          '--out={at}/guided/')
EVALUATE = ('experiments.evaluate', '--samples', '{at}/samples.npz', '{at}/guided', '--reference={at}/codes',
            '--train={at}/codes', '--json={at}/scores.json')
COMMANDS = (ENCODE, DRAW, SAMPLE, GUIDED, EVALUATE)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Work directories of untrained models, weights drawn at random."""
    root, config = tmp_path_factory.mktemp('runs'), quickstart.get_config('tiny')
    m = config.code_model.model
    made = {'encoder': ('sem', config.encoder, encoder, (jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 16), bool))),
            'code_model': ('sedd', config.code_model, code_model, (
                jnp.zeros((1, m.num_codes), jnp.int32), jnp.ones(1))),
            'generator': ('dit', config.generators.code, generator, (
                jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32), jnp.zeros((1, m.num_codes), jnp.int32)))}
    for name, (kind, stage, module, args) in made.items():
        stage = stage.copy_and_resolve_references().unlock()
        stage.weights_only = True
        writing.write_run(kind, stage, random_params(module.make_model(stage), *args), root / name)
    return root


def command_file(runs, at, commands=COMMANDS):
    at.mkdir(exist_ok=True)
    path = at.with_suffix('.json')
    path.write_text(json.dumps([[word.format(runs=runs, at=at) for word in command] for command in commands]))
    return str(path)


def files(at):
    return {str(path.relative_to(at)): path.read_bytes() for path in sorted(at.rglob('*')) if path.is_file()}


def assert_same_files(at, expected):
    found = files(at)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


@pytest.fixture(scope='module')
def alone(runs, tmp_path_factory):
    """What one process with four devices makes."""
    at = tmp_path_factory.mktemp('alone') / 'out'
    jobs.succeed('tests.processes.commands', command_file(runs, at), processes=1, devices=4)
    return at


def test_what_one_process_makes(alone):
    assert len(codestore.open_code_store(alone / 'codes')) == 450
    assert load_images(alone / 'samples.npz').std() > 10 and len(load_images(alone / 'guided')) == 22
    assert json.loads((alone / 'scores.json').read_text())['samples']['frechet'] > 0
    assert sorted(path.name for path in alone.iterdir()) == ['codes', 'drawn', 'guided', 'samples.npz', 'scores.json']


@pytest.mark.parametrize('processes, devices', [(2, 2), (4, 1)])
def test_processes_make_the_same_bytes(alone, runs, tmp_path, processes, devices):
    printed = jobs.succeed('tests.processes.commands', command_file(runs, tmp_path / 'out'), processes=processes,
                           devices=devices)
    assert_same_files(tmp_path / 'out', files(alone))
    assert 'code store -> ' in printed[0] and '22 samples -> ' in printed[0]
    assert '->' not in printed[1]


def test_tasks_make_the_same_bytes_and_one_that_was_killed_goes_on(alone, runs, tmp_path):
    at, tasks = tmp_path / 'out', (ENCODE, SAMPLE)
    first = command_file(runs, at, [(*task, '--shard=0/3') for task in tasks])
    (status, _, stderr), = jobs.run('tests.processes.commands', first, '--killed_at=9', processes=1, devices=1)
    assert status == -signal.SIGKILL, stderr
    progress = at / 'samples.npz.partial' / 'images.shards' / '00000-of-00003.partial' / 'progress.json'
    assert json.loads(progress.read_text())['done'] == 4  # of 8; the second batch was about to be written
    with pytest.raises(FileNotFoundError, match='samples.npz: unfinished, 0 of 3 shards; missing are 0/3, 1/3, 2/3'):
        load_images(at / 'samples.npz')
    rest = command_file(runs, at, [(*task, f'--shard={i}/3') for i in (2, 1, 0) for task in tasks])
    jobs.succeed('tests.processes.commands', rest, processes=1, devices=1)
    expected = files(alone)
    assert_same_files(at, {name: expected[name] for name in expected if name.startswith(('codes/', 'samples'))})
