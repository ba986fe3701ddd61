"""Shared fixtures. The whole suite runs on eight fake CPU devices, so that every sharded path is exercised."""
import importlib.metadata
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)  # see runtime/launch.py: not for several CPU devices
# XLA runs the devices' collectives on one pool of as many threads as devices, where their turns can lock each other out
# until its time-out of 40 s aborts the process; with more threads they do not.
os.environ.setdefault('PJRT_NPROC', '32')
# NumPy's and PyTorch's small products are quicker by one thread than by threads that wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Tracing and compiling for the CPU take most of the time. Unoptimized programs, with fusions made by the older of XLA's
# two ways (which jaxlib has until 0.10) and not split over threads that the two workers do not have, compile in a fifth
# of it and compute the same.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
                                   '--xla_cpu_parallel_codegen_split_count=1' +
                      ' --xla_cpu_use_fusion_emitters=false' * importlib.metadata.version('jaxlib').startswith('0.10.'))
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')  # the Python line of every operation, for profiles
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import gc
import pathlib

import jax
import numpy as np
import pytest

from tests import compiled_once

compiled_once.install()
jax.config.update('jax_num_cpu_devices', 8)

GOLDEN = pathlib.Path(__file__).parent / 'parity' / 'data' / 'dlc_golden.npz'
SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'
NIGHTLY = pathlib.Path(__file__).with_name('nightly.txt')
WHOLE_PROGRAMS = tuple(f'tests/{folder}/' for folder in ('align', 'aot', 'end_to_end', 'processes'))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks what `nightly.txt` lists; and as slow, which `-m "not slow"` leaves out, whole programs and whatever runs
    at night or on request alone."""
    lines = [line for line in NIGHTLY.read_text().splitlines() if line and not line.startswith('#')]
    used = set()
    for item in items:
        listed = [line for line in lines if is_of(item.nodeid, line)]
        used.update(listed)
        if listed:
            item.add_marker('nightly')
        if listed or item.get_closest_marker('slow_harness') or item.nodeid.startswith(WHOLE_PROGRAMS):
            item.add_marker('slow')
    files = {item.nodeid.split('::')[0] for item in items}
    if not any('::' in argument for argument in config.args):  # files are collected whole
        for line in lines:
            if line.split('::')[0] in files and line not in used:
                raise pytest.UsageError(f'tests/nightly.txt: no test is called {line}')


def is_of(nodeid, line):
    """Whether the test `nodeid` is what a line of nightly.txt names: a file, a test, or the beginning of a case."""
    return nodeid == line or nodeid.startswith(line if '[' in line else (line + '::', line + '['))


@pytest.fixture(scope='module', autouse=True)
def programs_go_with_their_module():
    """Every compiled program holds memory maps, of which a process may have 65530; past them the compiler crashes."""
    yield
    jax.clear_caches()
    compiled_once.clear()
    gc.collect()


@pytest.fixture(scope='session')
def golden():
    """Inputs, weights and outputs of the original DLC modules."""
    with np.load(GOLDEN) as z:
        return {k: z[k] for k in z.files}


@pytest.fixture(scope='session')
def shared_data():
    """Folder of real data sets; tests that ask for it skip where it is absent."""
    path = SHARED / 'data'
    if not path.is_dir():
        pytest.skip('real data sets are not present')
    return path
