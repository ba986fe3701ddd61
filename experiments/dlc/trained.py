"""A trained model that draws rows from noise alone, such as codes or embeddings, by the sampler of its config."""
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import ml_collections
import numpy as np

from experiments.runtime import modules, runs


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A trained model on its EMA weights. A subclass names its `experiment` and says how it is built and drawn from.

    Attributes:
        build: of the experiment.
        draw: `(config, params, keys, num)` -> `num` rows by `config.sampler`; pure, so that it can be jitted whole.
    """
    config: ml_collections.ConfigDict
    params: Any
    experiment: ClassVar[str]
    build: ClassVar[runs.Build]
    draw: ClassVar[Callable[..., jax.Array]]

    @classmethod
    def load(cls, workdir: str | os.PathLike, step: int | None = None) -> Self:
        """The run in `workdir`, as its newest checkpoint has it, or that of `step`."""
        return cls(*runs.load(workdir, cls.experiment, cls.build, step=step))

    def sample(self, key: jax.Array, num: int, *, part: range | None = None, batch_size: int = 256,
               progress: Any = None, **sampler: Any) -> np.ndarray:
        """`num` rows, or those that `part` says. `sampler` overrides fields of `config.sampler`.

        Row i is a function of `fold_in(key, i)`, whatever the batches; `batch_size` of them at once on a device.
        """
        part = range(num) if part is None else part
        run = self._compiled(modules.Unit.of(batch_size, num), tuple(sorted(sampler.items())))
        return run(modules.row_keys(key, part), len(part), progress)

    @functools.lru_cache(maxsize=4)
    def _compiled(self, unit: modules.Unit, sampler: tuple) -> modules.Batched:
        config = modules.with_sampler(self.config, dict(sampler))

        def one(params, keys):
            return self.draw(config, params, jax.random.wrap_key_data(keys), len(keys))
        return modules.Batched(one, self.params, unit)
