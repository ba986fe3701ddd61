"""The scripts of `examples/` run as they stand, in a few steps."""
import importlib.util
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'examples'
SCRIPTS = sorted(path.stem for path in FOLDER.glob('*.py'))


def load(name):
    spec = importlib.util.spec_from_file_location(f'example_{name}', FOLDER / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_lists_them():
    text = (FOLDER / 'README.md').read_text()
    assert all(f'[{name}.py]({name}.py)' in text for name in SCRIPTS) and len(SCRIPTS) == 3


@pytest.mark.parametrize('name', SCRIPTS)
def test_they_use_the_libraries_alone(name):
    text = (FOLDER / f'{name}.py').read_text()
    assert 'experiments' not in text and 'configs' not in text


def test_a_dit_on_codes():
    found = load('dit_on_codes').main(steps=2, batch_size=8)
    assert set(found) == {'own code', 'another code'} and all(np.isfinite(x) for x in found.values())


def test_online_dpo():
    history = load('online_dpo').main(steps=2)
    assert len(history) == 2 and all(0 <= reward <= 1 for reward in history)


def test_elastic_reset_around_nnx_drifts_less():
    found = load('elastic_reset_nnx').main(steps=60)
    start, plain, elastic = (found[name] for name in ('at the start', 'policy gradient', 'with Elastic Reset'))
    assert plain[0] > elastic[0] > start[0]  # reward
    assert plain[1] < elastic[1]  # what is left of the first task
