"""`pip install .` installs the two libraries, and each imports with its declared requirements alone."""
import ast
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlhf_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = ('dlc_jax', 'rlhf_jax')
# Imports every module named on the command line; prints one line for each that fails.
IMPORT_ALL = '''
import importlib, sys
sys.path.append(sys.argv[1])
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f'{name}: {error}')
'''


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel, built without network from a copy of the checkout, so that nothing is left in it."""
    folder = tmp_path_factory.mktemp('wheel')
    (folder / 'checkout').mkdir()
    for name in ('setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, folder / 'checkout')
    for name in (*LIBRARIES, 'experiments', 'configs', 'tests', 'benchmarks'):
        shutil.copytree(ROOT / name, folder / 'checkout' / name, ignore=shutil.ignore_patterns('__pycache__'))
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation',
                           '--no-index', '--wheel-dir', folder, folder / 'checkout'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    file, = folder.glob('*.whl')
    return file


def requirements(distribution, extras=()):
    """Names of the distributions that `distribution` requires here, with those `extras` of it: (name, its extras)."""
    for line in distribution.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({'extra': extra}) for extra in ('', *extras)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def closure(distribution):
    """The installed distributions that `distribution` requires, directly or not, without any of its extras."""
    todo, seen = list(requirements(distribution)), {}
    while todo:
        name, extras = todo.pop()
        if (name, extras) not in seen:
            seen[name, extras] = importlib.metadata.distribution(name)
            todo += requirements(seen[name, extras], extras)
    return {name: found for (name, _), found in seen.items()}


def link(distribution, folder):
    """Shows the files of an installed `distribution` in `folder`, as links."""
    roots = {pathlib.PurePath(file).parts[0] for file in distribution.files}
    for name in roots - {'..', '__pycache__'}:
        source, target = pathlib.Path(distribution.locate_file(name)), folder / name
        if not source.is_dir() or (source / '__init__.py').exists() or '.' in name:
            target.exists() or target.symlink_to(source)
            continue
        target.mkdir(exist_ok=True)  # a namespace, of which other distributions may own other parts
        for part in {pathlib.PurePath(file).parts[1] for file in distribution.files if file.parts[0] == name}:
            (target / part).exists() or (target / part).symlink_to(source / part)


@pytest.fixture(scope='module')
def environment(wheel, tmp_path_factory):
    """A folder that holds the wheel and links to what it requires: the site-packages of an install without extras."""
    folder = tmp_path_factory.mktemp('environment')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    installed = importlib.metadata.Distribution.at(next(folder.glob('dlc_jax-*.dist-info')))
    for distribution in closure(installed).values():
        link(distribution, folder)
    return folder


def import_all(environment, modules):
    """The lines of `IMPORT_ALL` in a Python that sees the standard library and `environment` only."""
    done = subprocess.run([sys.executable, '-I', '-S', '-c', IMPORT_ALL, environment, *modules], cwd=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_wheel_holds_the_two_libraries_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split('/')[0] for name in names}
    assert {name for name in top if not name.endswith('.dist-info')} == set(LIBRARIES)
    files = {str(path.relative_to(ROOT)) for library in LIBRARIES for path in (ROOT / library).rglob('*.py')}
    assert files == {name for name in names if name.endswith('.py')}


def test_every_module_imports_with_the_base_requirements_alone(environment):
    modules = ['.'.join(path.relative_to(environment).with_suffix('').parts).removesuffix('.__init__')
               for library in LIBRARIES for path in sorted((environment / library).rglob('*.py'))]
    assert len(modules) > 80
    assert import_all(environment, modules) == []
    # The environment is a bare one: what only the runner needs is not in it.
    assert [line.split(':')[0] for line in import_all(environment, ['experiments', 'tokenizers', 'clu'])] == [
        'experiments', 'tokenizers', 'clu']


def imported(library):
    """Top-level names of all that a library imports, wherever in its files."""
    for path in sorted((ROOT / library).rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split('.')[0]


def test_the_libraries_import_what_is_declared_and_what_is_declared_is_imported(environment):
    """Base requirements and the extras of the libraries together, which are imported where they are used."""
    installed = importlib.metadata.Distribution.at(next(environment.glob('dlc_jax-*.dist-info')))
    modules = {'pillow': 'PIL'}
    declared = {modules.get(name, name) for name, _ in requirements(installed, ('text', 'translation'))}
    used = {name for library in LIBRARIES for name in imported(library)}
    assert used - set(sys.stdlib_module_names) - set(LIBRARIES) == declared


@pytest.mark.parametrize('package, call', [
    ('tokenizers', "rlhf_jax.tokenizers.JsonTokenizer('tokenizer.json')"),
    ('pyarrow', "from rlhf_jax.tasks import rows; next(rows.read('rows.parquet'))"),
    ('sacrebleu', "from rlhf_jax.tasks import bleu; bleu.sacrebleu(['a'], ['a'])"),
])
def test_a_missing_extra_is_one_line_that_names_it(environment, tmp_path, package, call):
    for name in ('tokenizer.json', 'rows.parquet'):
        (tmp_path / name).write_text('{}')
    code = f'import sys; sys.path.append(sys.argv[1]); import rlhf_jax; {call}'
    done = subprocess.run([sys.executable, '-I', '-S', '-c', code, environment], cwd=tmp_path, capture_output=True,
                          text=True)
    extra = 'translation' if package == 'sacrebleu' else 'text'
    assert re.search(rf"^ImportError: .*{package}.*; `pip install 'dlc-jax\[{extra}\]'`$", done.stderr.splitlines()[-1])


def test_both_libraries_have_the_version_of_the_wheel(wheel):
    import dlc_jax
    assert wheel.name.startswith(f'dlc_jax-{rlhf_jax.__version__}-') and dlc_jax.__version__ == rlhf_jax.__version__
