"""One loop for every trained model.

    state = run(state, step, batches, hooks, num_steps)

Encoder, generator and code model differ in their step and their stream, not in their loop. What happens beside the
step (logging, checkpoints, evaluation, resets, weight publishing) is a hook.
"""
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jax
from tqdm import tqdm

from experiments.runtime import processes
from experiments.runtime.hooks import Log, Metrics, Save
from experiments.runtime.signals import Interrupted, Stopped, signals
from experiments.runtime.state import TrainState

log = logging.getLogger(__name__)

GO_ON = 'run the same command to continue'  # the launchers look for it: see launch/README.md

Step = Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]]


class Hook(Protocol):
    """Called after every step. May return a state to put in place of the current one; None leaves it."""

    def __call__(self, step: int, state: TrainState, metrics: Metrics) -> TrainState | None: ...


def run(state: TrainState, step: Step, batches: Iterator[Any], hooks: Sequence[Hook], num_steps: int, *,
        save: Save | None = None, log_hook: Log | None = None, metrics: Metrics | None = None, name: str = 'train',
        stop_every: int = 1) -> TrainState:
    """Runs `step` until `num_steps` steps have been taken in all, from wherever `state` stands.

    Order, which resuming bit for bit depends on: a batch is drawn, the step runs on it, hooks see the new state, and
    only then may a checkpoint record that state together with the position after that batch.

    Args:
        state: donated; use only what is returned.
        step: `(state, batch) -> (state, metrics)`; jitted, `metrics` scalars including `loss`.
        batches: endless iterator; with `save`, also `get_state`.
        hooks: called in order after every step.
        num_steps: total, counted in `state.step`.
        save, log_hook: the two hooks that also act at the end and on a signal; they run after `hooks`.
        metrics: of a resumed run, those that had not been reported when it was saved.
        name: shown on the progress bar.
        stop_every: with several processes, how often they ask each other whether to stop.

    Raises:
        FloatingPointError: a loss was not finite; nothing after the last good checkpoint has been saved.
        Stopped: after SIGTERM or SIGINT, with the state saved.
        Exception: what `batches` raised where a batch was missed, with the state saved as it was before.
    """
    start = int(state.step)
    metrics = metrics or Metrics()
    bar = tqdm(total=num_steps, initial=start, desc=name, unit='step', disable=jax.process_index() != 0,
               mininterval=0.5, dynamic_ncols=True)

    def stop(taken: int) -> NoReturn:
        """Saves what `taken` steps have made of the state, and leaves."""
        metrics.check()
        outcome = 'state saved'
        if save and taken > start:
            try:
                save.finish(taken, state, metrics)
            except TimeoutError as error:  # a checkpoint that would not continue exactly is not written
                outcome = f'not saved ({error}), the last checkpoint stands'
        raise Stopped(f'{name}: stopped by signal at step {taken} of {num_steps}, {outcome}; {GO_ON}')

    with signals.remembering(), bar, _exits_are_errors(name):
        try:
            for n in range(start + 1, num_steps + 1):
                # The first step is compiled here, and what it starts from is on disk or made anew in seconds.
                with (signals.leaving(f'{name}: stopped by signal before step {n} of {num_steps}; {GO_ON}')
                      if n == start + 1 else contextlib.nullcontext()):
                    try:
                        with _exits_are_errors(name):
                            batch = log_hook.next(batches) if log_hook else next(batches)
                    except Interrupted:
                        stop(n - 1)
                    except Exception as error:
                        _rescue(n - 1, start, state, metrics, save, error)
                        raise
                    with jax.profiler.StepTraceAnnotation(name, step_num=n):
                        state, values = step(state, batch)
                metrics.push(n, values)
                # The last step is logged and saved after the loop: its report need not come a step late.
                own_hooks = [h for h in (log_hook, save) if h] if n < num_steps else []
                for hook in (*hooks, *own_hooks):
                    replaced = hook(n, state, metrics)
                    state = state if replaced is None else replaced
                bar.update()
                if log_hook and log_hook.last:
                    bar.set_postfix(loss=f"{log_hook.last['loss']:.4g}", refresh=False)
                if n < num_steps and n % stop_every == 0 and signals.agreed():
                    stop(n)
            metrics.check()
            if log_hook:
                log_hook.report(metrics.take())
            if save and start < num_steps:
                save.finish(num_steps, state, metrics)
        except Exception as error:
            if hasattr(batches, 'leave_open') and processes.is_loss(error):
                batches.leave_open()
            raise
        finally:
            if hasattr(batches, 'close'):
                batches.close()
    return state


def _rescue(taken: int, start: int, state: TrainState, metrics: Metrics, save: Save | None, error: Exception) -> None:
    """Saves the state after `taken` steps although there is no batch for the next: that a reward hangs or a disk goes
    away should not cost the steps since the last checkpoint. Only in a job of one process, for a save needs all."""
    if save is None or taken == start or jax.process_count() > 1:
        return
    try:
        save.finish(taken, state, metrics)
        log.warning('no batch for step %d (%s); the state after step %d is saved', taken + 1, type(error).__name__,
                    taken)
    except Exception as also:  # the first error is the one to report
        log.warning('step %d could not be saved: %s', taken, also)


@contextlib.contextmanager
def _exits_are_errors(name: str) -> Iterator[None]:
    """A reward function or data set that calls `sys.exit` must not pass for a finished run."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error, Stopped):
            raise
        raise RuntimeError(f'{name}: code that the run called asked to exit (sys.exit({error.code!r}))') from error
