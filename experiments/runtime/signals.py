"""SIGTERM and SIGINT: one place remembers them, and everything that waits asks it.

A command answers in one of three ways, each a context:

    raising(message, status)   `Stopped` is raised in the main thread, wherever it is. For commands that have nothing to
                               save. Code that swallows the exception (a bare `except` in a library) gets it again.
    remembering()              nothing happens but that `received` says so. The training loop saves between two steps
                               and leaves then; what may wait for long calls `check` while it does.
    leaving(message, status)   the process ends at once, from a thread of its own. For a training run that has nothing
                               to save yet: Python answers no signal while XLA compiles, and unwinding from there has
                               been seen to end in a crash.

A second signal is not caught: it does what it would have done without us.
"""
import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator

import jax

ANSWERED = (signal.SIGTERM, signal.SIGINT)
AGAIN_SECONDS = 0.05  # until a `Stopped` that somebody swallowed is raised anew
GRACE_SECONDS = 15.0  # that work under way gets to finish after a signal where stopping in it would cost exactness
LOOK_SECONDS = 0.05   # between two looks of the thread at whether the process may leave


class Stopped(SystemExit):
    """SIGTERM or SIGINT was answered. Exit status 0 where what was done is saved and the same command continues."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(status)
        self.message = message


class Interrupted(Exception):
    """A wait was given up because a signal came; raised by `check`."""


class _Raised(Stopped):
    """Raised by the handler. If it is dropped before `raising` has seen it, an alarm raises it again."""

    def __init__(self, message: str, status: int, dropped: Callable[[], None]):
        super().__init__(message, status)
        self._dropped, self.delivered = dropped, False

    def __del__(self):
        if not self.delivered:
            self._dropped()


class Signals:
    """What has been received, and what is to be done about the next signal. There is one: `signals`."""

    def __init__(self):
        self.received: int | None = None
        self._received_at = 0.0
        self._depth = 0                          # of contexts that answer
        self._previous: dict[int, object] = {}   # handlers from before the outermost of them, until a signal comes
        self._raise: tuple[str, int | None] | None = None
        self._leave: tuple[str, int] | None = None
        self._before_leaving: list[Callable[[], None]] = []
        self._alarmed, self._watched = False, False

    # ---- Contexts ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def raising(self, message: str, status: int | None) -> Iterator[None]:
        """SIGTERM and SIGINT raise `Stopped` inside the block.

        Args:
            message: for the user, after 'stopped by signal; '.
            status: exit status. None: 128 + the signal's number.
        """
        outer = self._raise
        try:
            with self._installed():
                self._raise = message, status
                yield
        except BaseException as error:
            stopped = _stopped_in(error)
            if stopped is None:
                raise
            stopped.delivered = True
            raise stopped from None
        finally:
            self._raise = outer
            if self._alarmed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                self._alarmed = False

    @contextlib.contextmanager
    def remembering(self) -> Iterator['Signals']:
        """SIGTERM and SIGINT are remembered inside the block, and nothing else. One that the block has not answered is
        answered after it, as around it."""
        outer, self._raise = self._raise, None
        try:
            with self._installed():
                yield self
        finally:
            self._raise = outer
        self._raise_stopped()

    @contextlib.contextmanager
    def leaving(self, message: str, status: int = 0) -> Iterator[None]:
        """Inside the block SIGTERM and SIGINT end the process at once, with `message` on standard error.

        Only where a thread watches (see `watched`), and for a job of one process: the processes of a larger one must
        leave together.
        """
        outer, self._leave = self._leave, (message, status) if jax.process_count() == 1 else None
        try:
            yield
        finally:
            self._leave = outer

    @contextlib.contextmanager
    def before_leaving(self, work: Callable[[], None]) -> Iterator[None]:
        """`work`, which must be quick, is done before `leaving` ends the process."""
        self._before_leaving.append(work)
        try:
            yield
        finally:
            self._before_leaving.remove(work)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Signals reach a thread of their own even while the main thread is in the compiler; `leaving` needs it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reads,), name='signals', daemon=True)
        watcher.start()
        self._watched = True
        try:
            yield
        finally:
            self._watched = False
            signal.set_wakeup_fd(before)
            os.close(writes)
            watcher.join()
            os.close(reads)

    # ---- Questions ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `Interrupted` if a signal has been received; for waits inside `remembering`."""
        if self.received is not None:
            raise Interrupted(f'signal {self.received} came')

    def check_late(self) -> None:
        """As `check`, but only `GRACE_SECONDS` after the signal: for what is usually quicker and better finished."""
        if time.monotonic() > self._received_at + GRACE_SECONDS:
            self.check()

    def agreed(self) -> bool:
        """Whether any process of the job got a signal: all must leave the loop at the same step."""
        if jax.process_count() == 1:
            return self.received is not None
        import numpy as np
        from jax.experimental import multihost_utils
        return bool(multihost_utils.process_allgather(np.asarray(self.received is not None)).any())

    # ---- Machinery ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """The outermost context puts the handlers in place, and takes them away again."""
        if self._depth or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._depth, self.received = 1, None
        self._previous = {number: signal.signal(number, self._handle) for number in ANSWERED}
        alarm = signal.signal(signal.SIGALRM, self._raise_again)
        try:
            yield
        finally:
            self._depth = 0
            self._restore()
            signal.signal(signal.SIGALRM, alarm or signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self.received, self._received_at = number, time.monotonic()
        self._restore()
        self._raise_stopped()

    def _raise_again(self, number: int, frame: types.FrameType | None) -> None:
        self._raise_stopped()

    def _raise_stopped(self) -> None:
        if self._watched and self._leave is not None:
            return  # the thread ends the process
        if self._raise is not None and self.received is not None:
            message, status = self._raise
            raise _Raised(f'stopped by signal; {message}', 128 + self.received if status is None else status,
                          self._dropped)

    def _dropped(self) -> None:
        if self._raise is not None:
            self._alarmed = True
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    def _watch(self, reads: int) -> None:
        came = False
        while True:
            # A signal that came a moment before `leaving` was entered is answered there too.
            if select.select([reads], [], [], LOOK_SECONDS if came else None)[0]:
                received = os.read(reads, 1)
                if not received:
                    return
                came = came or received[0] in ANSWERED
            leave = self._leave
            if came and leave is not None:
                for process in multiprocessing.active_children():  # readers of data, which would outlive this process
                    process.terminate()
                for work in reversed(self._before_leaving):
                    with contextlib.suppress(Exception):
                        work()
                os.write(2, f'\n{leave[0]}\n'.encode())
                os._exit(leave[1])


def _stopped_in(error: BaseException | None) -> Stopped | None:
    """The `Stopped` that `error` is, or that it was raised from or because of."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error


signals = Signals()
