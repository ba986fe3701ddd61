"""What a policy has to offer to be trained on its own samples: it samples, it scores, and it says what its scores mean.

    sample   `Kind.generator` completes prompts under weights that `Kind.decoding` converted. Each token carries its
             log-probability as it was drawn, and the version of the weights that drew it (`rlhf_jax.rollout.batch`)
    score    `Networks.forward`: log-probabilities of given completions under given weights, differentiable
    use      `Networks.as_drawn` and `Networks.scale`: what sums and ratios of these scores are; `Kind.refusals`: which
             algorithms would misuse them, and why

Steps, streams, transports, resets, adapters, evaluation and compile checks know a policy by these alone. The kinds are
the autoregressive decoder (`autoregressive.py`) and the masked-diffusion writer of image codes (`experiments/align`).
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
from jax.sharding import Mesh

from experiments.runtime import partition
from experiments.runtime.programs import Program
from rlhf_jax.models import lora

Array = jax.Array
Params = dict[str, Any]
Rows = Mapping[str, Array]
Config = ml_collections.ConfigDict

# What an algorithm may do with the scores of completions (`algorithms.Algorithm.use`).
SUMS = 'sums'  # compares the sums over completions under one set of weights with those under another
RATIOS = 'ratios'  # trains on log-probabilities of tokens as they were drawn, and on their ratios between weights
SEQUENCE_RATIOS = 'sequence ratios'  # and on the product of these ratios over a whole completion
VALUES = 'values'  # asks for a critic's value at each token


class Networks:
    """The networks of a run as functions of its parameters, `{'policy': ...}` and, with a critic, `'value'`.

    Attributes:
        rules: partition rules over the parameters.
        columns: the fields of a batch that `forward` reads.
        as_drawn: whether `forward` gives log-probabilities of the tokens as the sampler drew them, which can be
            compared with the batch's `logprobs`; else they are a bound's terms, comparable among themselves alone.
        scale: by which a sum over the counted tokens is to be multiplied to estimate the sum over all of them.
    """
    rules: partition.Rules
    columns: tuple[str, ...]
    as_drawn: bool = True
    scale: float = 1.0

    def __init__(self, config: Config):
        self._config = config

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        raise NotImplementedError

    def load(self, params: Params) -> Params:
        """`params` with the weights that the config starts from.

        Raises:
            FileNotFoundError, ValueError: no such weights, or weights of another model.
        """
        raise NotImplementedError

    def annotated(self, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        """The batch with what scoring it needs to draw, so that all weights and all updates score it alike."""
        return batch

    def forward(self, params: Params, rows: Rows) -> tuple[Array, Array | None]:
        """Scores of the tokens of b prompts with C completions each, float32 [b, C, L], and values or None.

        Args:
            rows: `columns` of an annotated batch, or of a part of it, [b, C, ...].
        """
        raise NotImplementedError

    def allowed(self, mask_policy: Params, rows: Rows) -> Array:
        """The tokens that could be drawn at each place of b prompts' completions under the parameters of a mask policy
        (`algorithm.mask`): uint8 [b, C, L, ceil(V / 8)], a bit a token. `forward` of rows that have it as `allowed`
        scores among these tokens alone."""
        raise NotImplementedError

    def divide(self, params: Params) -> tuple[Params, Params]:
        """`(frozen, trained)`: with an adapter, the policy's own weights are frozen; else all are trained."""
        if not self._config.lora.rank:
            return {}, params
        frozen, adapter = lora.split(params['policy'])
        return {'policy': frozen}, params | {'policy': adapter}

    def join(self, frozen: Params, trained: Params) -> Params:
        """The inverse of `divide`."""
        return lora.join(frozen, trained) if frozen else trained


class Decoding(Protocol):
    """A policy's weights as its sampler wants them.

    Attributes:
        convert: the policy's parameters -> such weights; jitted.
        shapes, shardings: of such weights, on the generators' mesh.
    """
    convert: Callable[[Any], Any]
    shapes: Any
    shardings: Any


class Generator(Protocol):
    """`Generate` of a `RolloutStream` over a data set of prompts: see `generator.Batches`."""

    @property
    def num_prompts(self) -> int: ...

    def rows(self, index: int) -> list[Mapping[str, Any]]:
        """Of the data set, one for each of the B prompts of batch `index`."""

    def prepare(self, num: int) -> None:
        """Before training: whatever `measures` of the first `num` prompts of the run compares completions with."""

    def measures(self, batches: list[Mapping[str, Any]], rows: list[Mapping[str, Any]]) -> dict[str, float]:
        """The task's metrics of completions, and how often they win against the data's own: of batches [B, K, ...] in
        turn, and the row of each of their prompts."""

    def __call__(self, params: Any, *, index: int, version: int) -> dict[str, Any]: ...


class Kind(NamedTuple):
    """One kind of policy, as functions of a run's config.

    Attributes:
        settled: config -> config, with what files decide that it leaves open.
        check: raises a ValueError for settings of this kind that cannot work together, before any file is read.
        check_inputs: the same for the files that the config names, before anything is compiled.
        refusals: config -> {use: why its scores may not be used so}, of `SUMS`, `RATIOS`, `SEQUENCE_RATIOS`, `VALUES`.
        networks: (config, whether there is a critic) -> `Networks`.
        decoding: (config, the generators' mesh) -> `Decoding`.
        generator: (config, the generators' mesh, weights or None) -> `Generator`.
        sampler_program: (config, devices) -> (jitted sampler, its abstract arguments, their mesh), where `programs` is
            None.
        batch_shapes: config -> fields of a rollout batch that are of this kind alone, [B, K, ...].
        num_tokens: config -> ids of the model; a batch with others is refused.
        held_out: config -> the same with the prompts that it evaluates on.
        models: (config, the generators' mesh) -> parameters of the frozen models that a batch needs beside the policy,
            `jax.ShapeDtypeStruct` with shardings: reward models by path, or what draws.
        models_are: what to call them in compile checks.
        programs: (config, `footprint.Footprint`) -> the programs that sample and reward, for compile checks.
        shortened: (config, batch) -> the rollout batch as the learner trains on it, without padding that no row needs;
            a function of the batch alone, for all processes must find the same shapes.
    """
    settled: Callable[[Config], Config]
    check: Callable[[Config], None]
    check_inputs: Callable[[Config], None]
    refusals: Callable[[Config], Mapping[str, str]]
    networks: Callable[[Config, bool], Networks]
    decoding: Callable[[Config, Mesh], Decoding]
    generator: Callable[[Config, Mesh, Any], Generator]
    sampler_program: Callable[[Config, Any], tuple[Any, tuple, Mesh]] | None
    batch_shapes: Callable[[Config], dict[str, jax.ShapeDtypeStruct]]
    num_tokens: Callable[[Config], int]
    held_out: Callable[[Config], Config]
    models: Callable[[Config, Mesh], dict[str, Any]] = lambda config, mesh: {}
    models_are: str = 'reward models'
    programs: Callable[[Config, Any], list[Program]] | None = None
    shortened: Callable[[Config, Mapping[str, Any]], Mapping[str, Any]] = lambda config, batch: batch

    @property
    def has_waves(self) -> bool:
        """Whether its samples are decoded in waves that `rollout.memory` bounds."""
        return self.programs is not None
