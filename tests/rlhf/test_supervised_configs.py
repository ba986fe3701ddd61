"""Every config of fine-tuning, reward models and DPO builds its experiment by shape and is laid out by its rules."""
import importlib
import json
import pathlib
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from experiments import train
from experiments.rlhf.data import tasks
from experiments.rlhf.models import tokenizer
from experiments.runtime import config_files, fitting, partition
from experiments.runtime import mesh as mesh_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARGUMENTS = {name: ('410m', '1b', '2.8b') for name in ('sft_tldr', 'reward_tldr', 'dpo_tldr')}
ARGUMENTS |= {'sft_imdb': ('', 'small'), 'reward_imdb': ('', 'small', 'small_gold')}
FILES = sorted(p.stem for p in (ROOT / 'configs' / 'rlhf').glob('*.py')
               if p.stem.startswith(('sft_', 'reward_', 'dpo_')))
# (updates, batch, learning rate) as published (arXiv 2410.18252 and its code; 2312.07551 and its code).
PUBLISHED = {
    ('sft_tldr', '410m'): (116_722 // 16, 16, 1e-5), ('sft_tldr', '1b'): (116_722 // 32, 32, 1e-5),
    ('reward_tldr', '410m'): (92_858 // 64, 64, 1e-5), ('reward_tldr', '2.8b'): (92_858 // 16, 16, 1e-5),
    ('sft_no_robots', ''): (2 * 9500 // 128, 128, 5e-6), ('sft_stackexchange', ''): (5000, 8, 1e-5),
    ('reward_stackexchange', ''): (100_000 // 4, 4, 2e-5), ('dpo_tldr', '410m'): (92_858 // 16, 16, 1e-6),
}


def load(name, argument):
    overrides = ['--config.num_steps=10'] if name == 'reward_no_robots' else []
    return config_files.load(f'configs/rlhf/{name}.py' + (f':{argument}' if argument else ''), overrides)


@pytest.mark.parametrize('name, argument', [(f, a) for f in FILES for a in ARGUMENTS.get(f, ('',))])
def test_config_builds_and_shards(name, argument):
    config = load(name, argument)
    config.accumulate = 1  # how a batch is cut does not show in shapes
    mesh = mesh_lib.make_mesh(dict(fsdp=4), jax.devices()[:4])
    experiment = train.build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    partition.state_shardings(state, experiment.rules, mesh)
    jax.eval_shape(experiment.step, state, dict(experiment.batch))
    task = tasks.get(config.data)
    tasks.require(task, 'demonstrations' if config.experiment == 'sft' else 'preferences', config.data)
    if (name, argument) in PUBLISHED:
        assert (config.num_steps, config.batch_size, config.optimizer.learning_rate.peak) == PUBLISHED[name, argument]


@pytest.mark.parametrize('name', FILES)
def test_docstring_command_names_its_own_file(name):
    text = importlib.import_module(f'configs.rlhf.{name}').__doc__
    assert re.findall(r'--config=(configs/[\w/]+)\.py', text) == [f'configs/rlhf/{name}']


@pytest.mark.parametrize('size', ['410m', '1b', '2.8b'])
@pytest.mark.parametrize('devices', [1, 4, 16])
def test_a_batch_of_pairs_divides_any_slice_up_to_its_size(size, devices):
    """16 pairs in eight microbatches went onto two devices at most."""
    config = load('reward_tldr', size)
    mesh = AbstractMesh((1, devices, 1), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3)
    config = fitting.accumulated(config, mesh, train.build, None)
    assert config.accumulate == 1 and train.build(config, mesh)


@pytest.mark.parametrize('file, field, value, says', [
    ('sft_arithmetic', 'model.activation', 'rellu', "model.activation='rellu' is not one of .*; did you mean 'relu'"),
    ('sft_arithmetic', 'model.depth', -1, 'model.depth=-1 must be at least 0; set --config.model.depth'),
    ('translation', 'model.width', 0, 'model.width=0 must be at least 1; set --config.model.width'),
])
def test_sizes_that_are_none_and_names_of_nothing_are_refused(file, field, value, says):
    config = config_files.load(f'configs/rlhf/{file}.py', [f'--config.{field}={value}'])
    with pytest.raises(ValueError, match=says):
        train.build(config, mesh_lib.make_mesh(dict(data=-1), jax.devices()[:1]))


def test_what_is_not_published_has_to_be_given():
    with pytest.raises(ValueError, match='num_steps=0 must be at least 1'):
        train.build(config_files.load('configs/rlhf/reward_no_robots.py'), mesh_lib.make_mesh({}, jax.devices()[:1]))
    for name in ('sft_tldr', 'sft_imdb', 'reward_imdb'):
        with pytest.raises(ValueError, match=f"{name}: '7b' is not one of"):
            config_files.load(f'configs/rlhf/{name}.py:7b')


def test_the_commands_that_learn_a_tokenizer_of_reviews(tmp_path, monkeypatch):
    """The lines in the docstring of sft_imdb, on a few reviews: a tokenizer that runs open, with an EOS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'imdb').mkdir(parents=True)
    rows = [{'text': f'A film of the year, {i} stars; the actors are good. <br />'} for i in range(5)]
    (tmp_path / 'data' / 'imdb' / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    lines = importlib.import_module('configs.rlhf.sft_imdb').__doc__.split('\n    from pathlib', 1)[1].splitlines()
    exec('from pathlib' + '\n'.join([lines[0], *(line.removeprefix('    ') for line in lines[1:])]), {})
    config = load('sft_imdb', 'small')
    encode = tokenizer.encoder_of(config)  # the vocabulary fits the model
    assert encode.tokenizer.eos == 0 and not encode.bos
    assert encode.tokenizer.decode(encode(rows[0]['text'])) == rows[0]['text']
    assert len(encode(' actors')) < 4
