"""Every config builds its experiment by shape, is laid out by its rules, and its docstring's commands name real
files."""
import importlib
import pathlib
import re
import shlex

import jax
import pytest

from experiments import train
from experiments.align import rollouts
from experiments.runtime import config_files, partition
from experiments.runtime import mesh as mesh_lib
from rlhf_jax import tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARGUMENTS = {
    'encoder_imagenet': ('L512', 'L128', 'L32'),
    'generator_imagenet': ('L512', 'L128', 'L32', 'class', 'embedding', 'none'),
    'code_model_imagenet': ('L512', 'L128', 'L32', 'small_L512'),
    'encoder_small': ('fashion_mnist', 'cifar10', 'imagenette'),
    'generator_small': ('fashion_mnist', 'cifar10', 'imagenette'),
    'generator_digits': ('code', 'class', 'embedding', 'none'),
    'released': ('sem', 'dit', 'sedd', 'llada'),
    'text_to_code_llada': ('L512', 'L128'),
    'align_digits': ('online_dpo', 'rloo_async', 'elastic_reset'),
    'align_llada': ('full', 'lora_async'),
}
# Of several stages, with commands of their own.
PROGRAMS = ('quickstart', 'quickstart_text', 'quickstart_align', 'mixture')
FILES = sorted(p.stem for p in (ROOT / 'configs' / 'dlc').glob('*.py')
               if p.stem not in ('__init__', 'base', *PROGRAMS))
# Published counts, where the paper's size is a config (arXiv 2507.12318; without fixed position embeddings).
PARAMETERS = {
    ('generator_imagenet', 'L512'): 825_266_336, ('code_model_imagenet', 'L512'): 322_549_249,
    ('code_model_imagenet', 'small_L512'): 93_168_897, ('code_model_imagenet', 'L32'): 329_925_889,
    ('text_to_code_llada', 'L512'): 8_015_581_184 + 142 * 2 * 4096,  # rows of words, in and out, that LLaDA lacks
}


@pytest.mark.parametrize('name, argument', [(f, a) for f in FILES for a in ARGUMENTS.get(f, ('',))])
def test_config_builds_and_shards(name, argument):
    config = config_files.load(f'configs/dlc/{name}.py' + (f':{argument}' if argument else ''))
    mesh = mesh_lib.make_mesh(dict(data=2, fsdp=4) if 'imagenet' in name or 'llada' in name else dict(data=-1))
    experiment = train.build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    partition.state_shardings(state, experiment.rules, mesh)
    jax.eval_shape(experiment.step, state, dict(experiment.batch))
    if (name, argument) in PARAMETERS:
        assert sum(x.size for x in jax.tree.leaves(state.params)) == PARAMETERS[name, argument]


@pytest.mark.parametrize('name', FILES + list(PROGRAMS))
def test_docstring_commands_name_real_files(name):
    text = importlib.import_module(f'configs.dlc.{name}').__doc__
    assert 'python -m experiments.' in text
    for module in re.findall(r'python -m (experiments\.\w+)', text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r'--config=(configs/[\w/]+\.py)', text):
        assert (ROOT / path).is_file(), path


class LladaTokenizer(tokenizers.JsonTokenizer):
    """As large as LLaDA's, without its file."""

    def __init__(self, path):
        self.path, self.vocab_size, self.tokens = path, 126349, {}

    def id_of(self, token):
        return None


def train_commands(text):
    """{work directory: config} of the commands of `experiments.train` in `text`."""
    found = {}
    for command in re.findall(r'^ *python -m experiments\.train (.+)$', text.replace('\\\n', ' '), re.MULTILINE):
        flags = dict(flag.removeprefix('--').split('=', 1) for flag in shlex.split(command))
        found[flags['workdir']] = config_files.load(
            flags['config'], [f'--{name}={value}' for name, value in flags.items() if name.startswith('config.')])
    return found


@pytest.mark.parametrize('page', ['docs/align.md', 'configs/dlc/align_llada.py'])
def test_a_writer_is_improved_by_the_commands_that_the_page_gives(page, tmp_path, monkeypatch):
    """Everything that they start from is looked at but the released weights."""
    commands = train_commands((ROOT / 'docs/align.md').read_text())
    first, aligned = commands['runs/text_to_code'], commands['runs/aligned']
    if page != 'docs/align.md':
        text = importlib.import_module('configs.dlc.align_llada').__doc__
        aligned = train_commands(text.replace('weights=RUN', 'weights=runs/text_to_code'))['runs/align_llada']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizers, 'JsonTokenizer', LladaTokenizer)
    monkeypatch.setattr(rollouts.Painter, 'load', lambda config: None)
    config_files.save(first, aligned.weights)
    for file in re.findall(r'=(\w+\.jsonl)', (ROOT / page).read_text()):
        (tmp_path / file).write_text('{"caption": "a red fox in the snow"}')
    rollouts.check_inputs(aligned)
    aligned.tokenizer = 'another'
    with pytest.raises(ValueError, match='tokenizer=another, but weights=.* has LLaDA-8B-Base;'):
        rollouts.check_inputs(aligned)


def test_unknown_argument_is_named():
    with pytest.raises(ValueError, match="'L64' is not one of"):
        config_files.load('configs/dlc/encoder_imagenet.py:L64')


@pytest.mark.parametrize('file, field, value, says', [
    ('encoder_digits', 'model.patch_size', 0, 'model.patch_size=0 must be at least 1; set --config.model.patch_size'),
    ('encoder_digits', 'model.num_codes', 0, 'model.num_codes=0 must be at least 1'),
    ('encoder_digits', 'model.pos_grid', 0, 'model.pos_grid=0 must be at least 1'),
    ('encoder_digits', 'model.num_registers', -1, 'model.num_registers=-1 must be at least 0'),
    ('encoder_digits', 'head.prototypes', 0, 'head.prototypes=0 must be at least 1'),
    ('encoder_digits', 'data.channels', 0, 'data.channels=0 must be at least 1'),
    ('generator_digits', 'model.width', -1, 'model.width=-1 must be at least 0'),
    ('generator_digits', 'model.condition', 'codes', "model.condition='codes' is not one of .*; did you mean 'code'"),
    ('code_model_digits', 'model.cond_dim', 0, 'model.cond_dim=0 must be at least 1'),
    ('code_model_digits', 'model.vocab_size', 0, "model.vocab_size=0 must be at least 1: model.size='small' does not"),
    ('embedding_model_digits', 'model.time_dim', 0, 'model.time_dim=0 must be at least 1'),
    ('text_to_code_digits', 'model.vocab_multiple', 0, 'model.vocab_multiple=0 must be at least 1'),
    ('generator_digits', 'seed', -1, 'seed=-1 must be at least 0; set --config.seed'),
])
def test_numbers_that_are_none_and_names_of_nothing_are_refused(file, field, value, says):
    config = config_files.load(f'configs/dlc/{file}.py', [f'--config.{field}={value}'])
    with pytest.raises(ValueError, match=says) as raised:
        train.build(config, mesh_lib.make_mesh(dict(data=-1), jax.devices()[:1]))
    assert '\n' not in str(raised.value)


def test_what_a_condition_does_without_may_be_0():
    config = config_files.load('configs/dlc/generator_digits.py:class', ['--config.model.num_codes=0'])
    train.build(config, mesh_lib.make_mesh(dict(data=-1), jax.devices()[:1]))
