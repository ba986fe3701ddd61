"""What Orbax (0.12) does that a checkpoint here must not, and how it is kept from it."""
import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp


def let_one_of_several_save() -> None:
    """In a job of several processes Orbax (0.12) refuses arrays that one of them has whole, as a learner has whose only
    host shares the job with those that generate. Not told how many processes there are, it writes them like others."""
    internals = 'orbax.checkpoint._src'
    handlers = importlib.import_module(f'{internals}.serialization.jax_array_handlers')
    metadata = importlib.import_module(f'{internals}.metadata.array_metadata_store')

    class Jax:
        process_count = staticmethod(lambda: 1)

        def __getattr__(self, name: str) -> Any:
            return getattr(jax, name)
    handlers.jax = Jax()
    metadata.Validator._validate_process_count = lambda self, *, ref_process_index: None


def barrier(processes: set[int] | None, failed: Callable[[BaseException], None]) -> Callable[..., None]:
    """The barrier at which the threads of a save that goes on in the background wait for those of other processes.

    Where such a thread fails, Orbax (0.12) has it wait for the others once more before anybody learns of it, and they
    wait for it elsewhere: all of them for 20 minutes. Here it leaves at once.

    Args:
        processes: that save together; None: all of the job.
        failed: is called, in that thread, with what it failed of.
    """
    wait = ocp.multihost.get_barrier_sync_fn(processes=processes)

    def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
        failure = sys.exception()  # while it passes through the `finally` in which the barrier is called
        # The main thread comes here to begin a save, perhaps from where it handles an exception of its own.
        if failure is not None and threading.current_thread() is not threading.main_thread():
            failed(failure)
            raise failure
        wait(key=key, timeout_ms=timeout_ms)
    return wait_unless_failed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps other libraries from logging every exception that is reported here in one line."""
    loggers = [logging.getLogger(name) for name in ('absl', 'orbax', 'asyncio')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def ignore_closed_loops() -> None:
    """One read or write that fails ends Orbax's event loop, and TensorStore's others then report to a loop that is
    closed: hundreds of lines that say nothing, at any later time. All else that cannot be raised is shown as before."""
    shown = sys.unraisablehook
    if getattr(shown, 'ignores_closed_loops', False):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and 'Event loop is closed' in str(error)):
            shown(unraisable)
    hook.ignores_closed_loops = True
    sys.unraisablehook = hook
