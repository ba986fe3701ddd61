"""Encoding, sampling and evaluating on one, two and four processes, and by tasks that know nothing of each other: the
same bytes in every file."""
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

import jobs
from configs.dlc import quickstart
from experiments.dlc import code_model, encoder, generator
from experiments.dlc.data import codestore
from experiments.dlc.weights import writing
from experiments.evaluate import load_images
from experiments.runtime import config_files
from experiments.runtime.checkpoint import Checkpointer
from rlhf_jax import convert
from rlhf_jax.models import gpt2, heads
from rlhf_jax.weights import files
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
POLICY = ('--policy={runs}/policy', '--tokenizer=bytes', '--batch_size=2')
RESPOND = ('experiments.sample', *POLICY, '--prompts={runs}/rows.jsonl', '--num_samples=2', '--temperature=1',
           '--max_new_tokens=5', '--out={at}/language/responses.jsonl')
MEASURE = ('experiments.evaluate', *POLICY, '--task=arithmetic', '--num=5', '--max_new_tokens=4',
           '--json={at}/language/metrics.json')
RELABEL = ('experiments.relabel', '--pairs={runs}/rows.jsonl', '--gold={runs}/reward', '--tokenizer=bytes',
           '--batch_size=2', '--out={at}/language/relabelled.jsonl')
COMMANDS = (ENCODE, DRAW, SAMPLE, GUIDED, EVALUATE, RESPOND, MEASURE, RELABEL)


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
    policy = gpt2.GPT2(width=16, depth=1, num_heads=2, vocab_size=259, max_length=128)
    for name, module in (('policy', policy), ('reward', heads.RewardModel(policy))):
        files.save(root / name, convert.to_torch('gpt2', module, random_params(module, jnp.zeros((1, 2), jnp.int32))),
                   convert.config_of('gpt2', module))
    rows = [{'prompt': f'{i}+{i}=', 'chosen': f' {i}', 'rejected': f' {i}{i}'} for i in range(5)]
    (root / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return root


def command_file(runs, at, commands=COMMANDS):
    at.mkdir(exist_ok=True)
    path = at.with_suffix('.json')
    path.write_text(json.dumps([[word.format(runs=runs, at=at) for word in command] for command in commands]))
    return str(path)


def contents(at):
    return {str(path.relative_to(at)): path.read_bytes() for path in sorted(at.rglob('*'))
            if path.is_file() and path.parent.name != 'language'}


def assert_same_files(at, expected):
    found = contents(at)
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
    assert sorted(path.name for path in alone.iterdir()) == [
        'codes', 'drawn', 'guided', 'language', 'samples.npz', 'scores.json']


def test_four_processes_make_the_same_bytes(alone, runs, tmp_path):
    jobs.succeed('tests.processes.commands', command_file(runs, tmp_path / 'out', (ENCODE, SAMPLE)), processes=4,
                 devices=1)
    expected = contents(alone)
    assert_same_files(tmp_path / 'out', {name: expected[name] for name in expected
                                         if name.startswith(('codes/', 'samples'))})


def test_two_processes_make_the_same_bytes(alone, runs, tmp_path):
    printed = jobs.succeed('tests.processes.commands', command_file(runs, tmp_path / 'out'), processes=2, devices=2)
    assert_same_files(tmp_path / 'out', contents(alone))
    assert 'code store -> ' in printed[0] and '22 samples -> ' in printed[0] and '10 responses -> ' in printed[0]
    assert '->' not in printed[1]
    cores = len(os.sched_getaffinity(0))
    assert {text.splitlines()[0] for text in printed} == {f'{max(cores // 2, 1)} cores'}
    assert {text.splitlines()[1] for text in printed} == {'made by {0}'}  # all are on this machine
    ours, theirs = (place / 'language' for place in (tmp_path / 'out', alone))
    assert json.loads((ours / 'metrics.json').read_text()) == pytest.approx(
        json.loads((theirs / 'metrics.json').read_text()), abs=1e-4)
    for name in ('responses.jsonl', 'relabelled.jsonl'):  # the same words; numbers are not the same to the bit
        for row, other in zip(*(map(json.loads, (place / name).read_text().splitlines()) for place in (ours, theirs)),
                              strict=True):
            assert row == pytest.approx(other, abs=1e-3)


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
    expected = contents(alone)
    assert_same_files(at, {name: expected[name] for name in expected if name.startswith(('codes/', 'samples'))})


@pytest.mark.slow_harness
def test_a_process_that_sees_the_newest_step_and_the_codes_late(runs, tmp_path):
    """It draws codes by the step that the first process finds, and waits for the codes of all."""
    both = tmp_path / 'runs'
    shutil.copytree(runs, both)
    config = config_files.read(both / 'code_model')
    m = config.model
    newer = random_params(code_model.make_model(config), jnp.zeros((1, m.num_codes), jnp.int32), jnp.ones(1))
    checkpointer = Checkpointer(both / 'code_model' / 'checkpoints', keep=3)
    checkpointer.save(1, {'ema': jax.tree.map(lambda x: 2 * x, newer)})
    checkpointer.close()
    at = {name: tmp_path / name / 'out' for name in ('older', 'newer', 'late')}
    for name, place in at.items():
        place.parent.mkdir()
        args = (command_file(runs if name == 'older' else both, place, (SAMPLE,)),)
        late = ('--late=3', '--late_files', f'{both}/code_model/checkpoints/1', r'.*/codes/meta\.json')
        ends = jobs.run('tests.processes.commands', *args, processes=2 if name == 'late' else 1, devices=1,
                        own={1: late})
        assert {status for status, _, _ in ends} == {0}, ends
    images = {name: (place / 'samples.npz').read_bytes() for name, place in at.items()}
    assert images['late'] == images['newer'] != images['older']
