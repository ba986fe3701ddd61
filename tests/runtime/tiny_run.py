"""A training run small enough to be killed hundreds of times: `experiments.train` on a chain of linear layers.

    python tests/runtime/tiny_run.py WORKDIR [--layers=N] [--width=N] [--hang_at=STEP] [--slow=SECONDS] [--at=MARKS]

It is the real command in everything but the model: configs, lease, checkpoints, metrics, signals. Files appear in MARKS
when something begins, so that whoever watches knows when to strike: `tracing` (JAX runs the step's Python), `compiling`
(XLA has it), `step-N`.
"""
import argparse
import hashlib
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # as `python -m` from the checkout

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec

from configs.parts import runner
from experiments import train
from experiments.runtime import launch, partition
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from experiments.runtime.stream import Stream

STEPS, EVERY, LOG_EVERY = 12, 4, 5


def config() -> ml_collections.ConfigDict:
    made = ml_collections.ConfigDict(dict(experiment='linear', **runner()))
    made.update(dict(num_steps=STEPS, batch_size=4, checkpoint_every=EVERY, log_every=LOG_EVERY))
    return made


class Rows(Stream):
    def __init__(self, width: int, hang_at: int):
        super().__init__(4)
        self._width, self._hang_at = width, hang_at

    def _draw(self):
        if self._hang_at and self._position >= 4 * self._hang_at:
            time.sleep(3600)
        return {'x': np.random.default_rng(self._position).normal(size=(4, self._width)).astype(np.float32)}


def experiment(options: argparse.Namespace) -> Experiment:
    def mark(name: str) -> None:
        if options.at:
            pathlib.Path(options.at, name).touch()

    def loss(params, state, batch, rng):
        x = batch['x']
        for layer in range(options.layers):  # unrolled: each makes the compiler work
            x = jnp.tanh(x @ params['w'] + layer)
        return jnp.mean((x - 1) ** 2), {}

    def step(state, batch):
        mark('tracing')
        if options.at and options.trace_signal:
            os.kill(os.getpid(), options.trace_signal)
        value, grads = jax.value_and_grad(lambda p: loss(p, state, batch, None)[0])(state.params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
        mark('compiling')
        return state.replace(step=state.step + 1, params=params, ema=jax.tree.map(jnp.add, state.ema, params)), {
            'loss': value}

    def init(key):
        params = {'w': jax.random.normal(key, (options.width, options.width))}
        return TrainState(jnp.int32(0), params, (), params, key)

    def hooks(writer):
        def after(n, state, metrics):
            mark(f'step-{n}')
            time.sleep(options.slow)
        return [after]
    return Experiment(init, loss, step, ((r'w', PartitionSpec()),),
                      {'x': jax.ShapeDtypeStruct((4, options.width), jnp.float32)},
                      lambda: Rows(options.width, options.hang_at), hooks=hooks)


def digest(workdir: pathlib.Path) -> tuple[int, str]:
    """(step, digest of the arrays) of the newest checkpoint."""
    shapes = Checkpointer(workdir / 'checkpoints', read_only=True).shapes()
    width = shapes['params/w'][0][0]
    like = jax.eval_shape(experiment(parser().parse_args([str(workdir), f'--width={width}'])).init, jax.random.key(0))
    step, state, _ = Checkpointer(workdir / 'checkpoints', read_only=True).restore(like)
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
              for x in partition.flatten(state).values()]
    return step, hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in arrays)).hexdigest()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    p.add_argument('workdir')
    p.add_argument('--layers', type=int, default=2)
    p.add_argument('--width', type=int, default=16)
    p.add_argument('--hang_at', type=int, default=0)
    p.add_argument('--slow', type=float, default=0.0)
    p.add_argument('--at', default='')
    p.add_argument('--trace_signal', type=int, default=0)
    return p


def main(argv: list[str]) -> None:
    options = parser().parse_args(argv)
    train.build = lambda config, mesh: experiment(options)
    file = pathlib.Path(options.workdir).parent / 'linear.py'
    if not file.exists():
        partial = file.with_name(f'linear.{os.getpid()}')
        partial.write_text('import json\nimport ml_collections\n\n\ndef get_config():\n    return '
                           f'ml_collections.ConfigDict(json.loads({json.dumps(json.dumps(config().to_dict()))}))\n')
        partial.replace(file)
    sys.argv = ['train', f'--config={file}', f'--workdir={options.workdir}']
    launch.main(train.main)


if __name__ == '__main__':
    main(sys.argv[1:])
