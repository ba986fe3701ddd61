"""What a run has trained, read from its work directory."""
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import SingleDeviceSharding

from experiments.runtime import config_files, exchange, modules, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.experiment import Experiment
from experiments.runtime.steps import no_checkpoint

Config = ml_collections.ConfigDict
Build = Callable[..., Experiment]


def read_config(workdir: str | os.PathLike, *experiments: str, field: str = '') -> Config:
    """The config of the run in `workdir`, which must be of one of `experiments`.

    Args:
        field: stands before the path in errors, as in 'weights='.

    Raises:
        ValueError: no run there, or one of another experiment.
    """
    config = config_files.read(workdir)
    if config.get('experiment') not in experiments:
        raise ValueError(f'{field}{workdir}: holds a run of experiment={config.get("experiment")!r}; give the '
                         f'--workdir of one of {", ".join(map(repr, experiments))}')
    return config


def on_one_device(config: Config, build: Build) -> Experiment:
    """The experiment of `config` on the first device, for the shapes of its state, whatever mesh it ran on."""
    config = config.copy_and_resolve_references()
    config.accumulate = 1
    return build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))


def load(workdir: str | os.PathLike, experiment: str, build: Build, part: str | None = None, *,
         step: int | None = None) -> tuple[Config, Any]:
    """Config and weights of the run in `workdir`, in host memory: the newest, or those of `step`; of `part` of the
    model, if given.

    Weights are the averaged ones, of a model that keeps an average.

    Raises:
        ValueError: `workdir` holds no run, one of another `experiment`, no checkpoint yet, or not that step.
    """
    config = read_config(workdir, experiment)
    state = jax.eval_shape(on_one_device(config, build).init, jax.random.key(0))
    if config.get('weights_only'):
        return config, load_converted(workdir, state, part, step)
    if state.ema is None:
        return config, restore_part(workdir, 'params', state.params, step)
    return config, load_averaged(workdir, state, part, step)


def load_averaged(workdir: str | os.PathLike, state: Any, part: str | None, step: int | None = None) -> Any:
    """The averaged weights in a checkpoint of `state`, a tree of shapes; of `part` of the model, if given."""
    restored = restore(workdir, state, on_host(state), step)
    return restored.ema[part] if part else restored.ema


def load_converted(workdir: str | os.PathLike, state: Any, part: str | None, step: int | None = None) -> Any:
    """The weights of a converted run, whose checkpoint has nothing but those of `part`, as `ema`."""
    like = {'ema': {part: state.ema[part]} if part else state.ema}
    ema = restore(workdir, like, on_host(like), step)['ema']
    return ema[part] if part else ema


def restore(workdir: str | os.PathLike, like: Any, shardings: Any = None, step: int | None = None) -> Any:
    """The newest readable checkpoint of the run in `workdir`, or that of `step`; arguments and errors as of
    `Checkpointer.restore`.

    Raises:
        ValueError: there is none yet.
    """
    with _checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(like, shardings, step=step)
    if restored is None:
        raise no_checkpoint(workdir)
    return restored[1]


def restore_part(workdir: str | os.PathLike, name: str, like: Any, step: int | None = None,
                 shardings: Any = None) -> Any:
    """The subtree `name` ('params', 'params/policy', ...) of the newest checkpoint, or that of `step`.

    Args:
        shardings: a tree of them, over one mesh: each process of the mesh reads the parts of its own devices, and all
            take the step that the first of them finds. None: as numpy arrays, tied to no device, so that a program over
            any mesh takes them.

    Raises:
        ValueError: there is no checkpoint yet, or it is of another model.
    """
    together = None if shardings is None else exchange.processes_of(jax.tree.leaves(shardings)[0].mesh)
    with _checkpoints(workdir, together) as checkpoints:
        params = checkpoints.restore_part(name, like, on_host(like) if shardings is None else shardings, step=step)
    if params is None:
        raise no_checkpoint(workdir)
    return jax.device_get(params) if shardings is None else params


def saved_shapes(workdir: str | os.PathLike, step: int | None = None) -> dict[str, list]:
    """{path: [shape, name of the dtype]} of what the newest checkpoint, or that of `step`, holds; {} if there is
    none."""
    with _checkpoints(workdir) as checkpoints:
        return checkpoints.shapes(step)


def on_host(like: Any) -> Any:
    """Shardings of a tree that put every leaf on the host."""
    return jax.tree.map(lambda _: SingleDeviceSharding(modules.host()), like)


@contextlib.contextmanager
def _checkpoints(workdir: str | os.PathLike, together: Sequence[int] | None = None) -> Iterator[Checkpointer]:
    checkpointer = Checkpointer(storage.resolve(workdir) / 'checkpoints', read_only=True, processes=together)
    try:
        yield checkpointer
    finally:
        checkpointer.close()
