"""The least number of microbatches that fits, and the best layout, for a compiler that is made up."""
import jax
import pytest

from configs.dlc import align_digits
from configs.rlhf import arithmetic, sft_arithmetic
from experiments import train
from experiments.runtime import config_files, fitting
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import divisible_advice
from experiments.runtime.programs import bytes_on_device
from experiments.runtime.slices import Slice


@pytest.fixture
def mesh():
    return mesh_lib.make_mesh({'data': 4}, jax.devices()[:4])


def config_of(accumulate=0, batch_size=48):
    config = sft_arithmetic.get_config()
    config.batch_size, config.accumulate = batch_size, accumulate
    return config


def compiler(activations, usable, tried):
    """Needs the arguments, and of `activations` bytes the share of a microbatch."""
    def compiled(program):
        fixed = bytes_on_device(program.args)
        total = fixed + activations / tried[-1]
        return {'total': total, 'usable_bytes': fixed + usable, 'fits': total <= fixed + usable, 'beside': {}}
    return compiled


def builder(tried):
    def build(config, mesh):
        tried.append(config.accumulate)
        return train.build(config, mesh)
    return build


@pytest.mark.parametrize('activations, expected', [(100, [1]), (350, [1, 4]), (1150, [1, 12])])
def test_the_least_that_fits_and_divides_is_found_in_few_compilations(activations, expected, mesh):
    """12 rows a device: 1, 2, 3, 4, 6 or 12 microbatches."""
    tried = []
    found = fitting.accumulated(config_of(), mesh, builder(tried), compiler(activations, 100, tried))
    assert tried == expected and found.accumulate == expected[-1]
    assert fitting.accumulated(config_of(3), mesh, builder(tried), None).accumulate == 3  # what is set stays


@pytest.mark.parametrize('recipe', [arithmetic, align_digits])
def test_microbatches_of_a_policy_divide_its_minibatches(recipe, mesh):
    """48 prompts over 4 shards in 2 minibatches: 6 at once, of texts or of codes."""
    config = recipe.get_config().copy_and_resolve_references()
    config.batch_size, config.algorithm.num_minibatches = 48, 2
    assert fitting.microbatches(config, mesh) == [1, 2, 3, 6]


@pytest.mark.parametrize('usable, expected', [(1000, 'none'), (500, 'dots_no_batch'), (100, 'full')])
def test_as_little_is_recomputed_as_fits_with_the_fewest_microbatches(usable, expected, mesh):
    """The step keeps 900, 400 or 90 bytes for its backward pass."""
    tried = []

    def build(config, mesh):
        tried.append(config.model.remat)
        return train.build(config, mesh)

    def compiled(program):
        kept = {'none': 900, 'dots_no_batch': 400, 'full': 90}[tried[-1]]
        return {'total': kept, 'usable_bytes': usable, 'fits': kept <= usable, 'beside': {}}
    config = config_of()
    config.model.remat = 'auto'
    found = fitting.fitted(config, mesh, build, compiled)
    assert (found.model.remat, found.accumulate) == (expected, 1) and tried[0] == 'full'
    assert fitting.fitted(config, mesh, train.build, None).model.remat == 'none'
    config.model.remat = 'dots'
    assert fitting.fitted(config, mesh, train.build, None).model.remat == 'dots'  # what is set stays


def test_a_resumed_run_recomputes_what_it_did(tmp_path):
    config = config_of(4)
    config.model.remat = 'full'
    config_files.save(config, tmp_path)
    config.model.remat = 'auto'
    assert train.as_started(config, tmp_path).model.remat == 'full'
    assert train.as_started(config, tmp_path / 'new').model.remat == 'auto'


def test_what_cannot_fit_is_one_line(mesh):
    tried = []
    with pytest.raises(ValueError, match='accumulate=0: with every prompt or row a microbatch of its own'):
        fitting.accumulated(config_of(), mesh, builder(tried), compiler(1300, 100, tried))
    with pytest.raises(ValueError, match='batch_size=46 is not divisible by 4 batch shards .*use a multiple of 4'):
        fitting.accumulated(config_of(batch_size=46), mesh, train.build, None)
    assert fitting.here(mesh) is None  # these devices have no limit


def test_fewer_microbatches_keep_the_recipe():
    assert divisible_advice(512, 16, 48).startswith('accumulate=32 divides it and keeps the recipe')
    assert divisible_advice(16, 16, 8).startswith('accumulate=1 divides it')
    assert divisible_advice(12, 8, 2) == 'use a multiple of 16, or a mesh of fewer shards (mesh.tensor)'


def test_the_quickest_layout_that_fits():
    report = lambda seconds: {'seconds': dict(matmul=seconds, memory=0.0, network=0.0, cycles=0.0)}
    found = [({'data': 1}, 2, report(3.0)), ({'data': 2}, 1, report(2.0)), ({'data': 4}, 0, 'does not divide')]
    assert fitting.best(found)[:2] == ({'data': 2}, 1)
    with pytest.raises(ValueError, match='fits in no layout'):
        fitting.best(found[2:])


def test_a_sweep_tries_every_split(monkeypatch):
    """Eight devices: tensor 1, 2, 4, 8, the rest along fsdp or data; what cannot be laid out so is said."""
    def compile_program(program, target):
        seconds = dict(matmul=float(program.mesh.shape['tensor']), memory=0.0, network=0.0, cycles=0.0)
        fits = program.mesh.shape['data'] == 1
        return {'total': 1, 'usable_bytes': 2, 'fits': fits, 'beside': {}, 'seconds': seconds}
    monkeypatch.setattr(fitting, 'compile_program', compile_program)
    target = Slice('eight', tuple(jax.devices()), 2, 2, 1.0, 1.0, 1.0)
    found = list(fitting.sweep(config_of(), target, train.build, train.mesh_of))
    assert len(found) == 2 * len(fitting.TENSOR)
    assert found[0][:2] == (dict(data=1, fsdp=8, tensor=1), 1)
    assert 'raise mesh.fsdp' in found[1][2]  # data=8 fits with no number of microbatches
    assert fitting.best(found)[0] == dict(data=1, fsdp=8, tensor=1)
