"""Every config builds its experiment by shape, is laid out by its rules, and its docstring's commands name real
files."""
import importlib
import pathlib
import re

import jax
import pytest

from experiments import train
from experiments.runtime import config_files, partition
from experiments.runtime import mesh as mesh_lib

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


def test_unknown_argument_is_named():
    with pytest.raises(ValueError, match="'L64' is not one of"):
        config_files.load('configs/dlc/encoder_imagenet.py:L64')
