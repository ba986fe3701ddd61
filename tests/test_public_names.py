"""What the libraries say is public: it is there, costs nothing until it is asked for, and is what the docs use."""
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import dlc_jax
import rlhf_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = {'dlc_jax': dlc_jax, 'rlhf_jax': rlhf_jax}
TEXTS = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')), *sorted(ROOT.glob('examples/*'))]


@pytest.mark.parametrize('library', LIBRARIES)
def test_public_names_are_imported_when_asked_for(library):
    code = (f'import sys, {library}; print("jax" in sys.modules, {library}.__version__)\n'
            f'for name in {library}.__all__: assert getattr({library}, name) is not None and name in dir({library})')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f'False {rlhf_jax.__version__}\n', '')


def test_an_unknown_public_name_is_an_error_that_lists_them():
    with pytest.raises(AttributeError, match="'rlhf_jax' has no attribute 'online_dpo'; it has .*losses"):
        _ = rlhf_jax.online_dpo


@pytest.mark.parametrize('path', [p for p in TEXTS if p.suffix in ('.md', '.py')], ids=lambda p: p.name)
def test_docs_and_examples_import_from_public_modules(path):
    """From the module of a public name, or from one inside a public package; and what they import is there."""
    for module, names in re.findall(r'^ *from ((?:dlc|rlhf)_jax[\w.]*) import (\w+(?:, \w+)*)', path.read_text(), re.M):
        library, _, inner = module.partition('.')
        public = {place.partition(':')[0] for place in LIBRARIES[library]._PUBLIC.values()}
        assert not inner or inner in public or inner.split('.')[0] in public, f'{path.name}: {module} is not public'
        for name in names.split(', '):
            if inner:
                assert hasattr(importlib.import_module(module), name), f'{path.name}: {module} has no {name}'
            else:
                assert name in LIBRARIES[library].__all__, f'{path.name}: {name} is not public'
