"""Programs that are compiled once for each text, however often they are wrapped in `jax.jit`.

A run that is killed and resumed, or the same model in two tests, is compiled anew by JAX, whose own cache for such
cases lies on disk and is left off for several CPU devices (`runtime/launch.py`). This one keeps the programs in memory.
"""
import gc
import time

from jax._src import cache_key, compiler

QUICK, MOST = 0.1, 2000  # seconds of compiling, and how many programs that take no longer outlive their module

_programs, _quick = {}, {}


def install() -> None:
    """From now on, in this process, for programs on the CPU; garbage, of which tracing makes little, is sought less."""
    gc.set_threshold(50_000, 50, 100)
    compile_anew = compiler.compile_or_get_cached

    def compile_once(backend, computation, devices, options, host_callbacks, *args, **kwargs):
        make = lambda: compile_anew(backend, computation, devices, options, host_callbacks, *args, **kwargs)
        if host_callbacks or backend.platform != 'cpu':
            return make()
        key = cache_key.get(computation, devices, options, backend), tuple(device.id for device in devices.flat)
        if key not in _programs:
            start = time.monotonic()
            _programs[key] = make()
            if time.monotonic() - start < QUICK and len(_quick) < MOST:
                _quick[key] = _programs[key]
        return _programs[key]

    compiler.compile_or_get_cached = compile_once


def clear() -> None:
    """Forgets all but the operations that every module uses."""
    _programs.clear()
    _programs.update(_quick)
