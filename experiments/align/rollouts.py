"""Batches of codes: captions, the codes that the policy writes for them, their images, and what these are worth."""
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dlc_jax import text_to_code
from experiments.align import captions as captions_lib
from experiments.align import rewards
from experiments.align.painter import Painter, noise_keys
from experiments.align.writer import make_model, make_sampling, make_words
from experiments.dlc import text_to_code as text_to_code_lib
from experiments.dlc.data import captions as tokens_lib
from experiments.rlhf.policy import generator as generator_lib
from experiments.rlhf.policy import roles
from experiments.runtime import compiler, exchange, placement
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.programs import placed
from rlhf_jax.models import llama, lora

Config = ml_collections.ConfigDict


class Decoding(generator_lib.SamplerWeights):
    """The weights of a text-to-code model."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(make_model(config), functools.partial(text_to_code_lib.init_params, config),
                         (*lora.PARTITION_RULES, *llama.PARTITION_RULES), bool(config.lora.rank), mesh)


class CodeGenerator(generator_lib.Batches):
    """`Batches` of codes and their images.

    Raises:
        ValueError, OSError: captions, tokenizer, generator or rewards that do not fit, before anything is compiled.
    """

    def __init__(self, config: Config, mesh: Mesh):
        rows = captions_lib.open_rows(config.data.path, 'data.path')
        if jax.process_count() > 1:
            sample = [len(rows), rows[0]['caption'], rows[len(rows) - 1]['caption']]
            exchange.check_same(mesh, json.dumps(sample).encode(), 'data.path: the processes of this job read '
                                'different captions; give all of them the same file')
        super().__init__(config, mesh, rows)
        self._tokenizer, self._words = tokens_lib.open_tokenizer(config), make_words(config)
        self._painter = Painter.load(config)
        self._scorer = rewards.open_scorer(config, rows, self._painter.shape, mesh)
        self._module = make_model(config).clone(stacked=False)
        self._paint = self._painter.on(mesh)
        self._write = jax.jit(functools.partial(write, self._module, self._words, make_sampling(config)),
                              out_shardings=mesh_lib.batch_sharding(mesh), compiler_options=compiler.options(mesh))

    def complete(self, params, version, prompts, draws, keys):
        num_prompts, num_samples = keys.shape
        rows = [self._rows[int(i)] for i in prompts]
        encoded = [self._tokenizer.encode(row['caption']) for row in rows]
        tokens, mask = text_to_code.pad_captions(encoded, self._words, length=self._config.caption_length)
        of_each = lambda x: np.repeat(x, num_samples, 0)
        placed = placement.place_tree((of_each(tokens), of_each(mask), flat_data(keys)),
                                      mesh_lib.batch_sharding(self._mesh))
        drawn = exchange.fetch(self._write(params, *placed))
        noise = noise_keys(self._config.seed, draws, num_samples, share=self._config.generator.share_noise)
        images = self._paint(drawn.codes, noise.reshape(len(drawn.codes), -1))
        if not np.isfinite(images).all():
            raise ValueError(f'generator.path={self._config.generator.path}: drew images that are not finite')
        # Each process rewards the images of some captions, and all get the whole.
        dealt = exchange.portion(self._mesh, num_prompts)
        own = images[dealt.start * num_samples:dealt.stop * num_samples]
        scored = self._scorer(rewards.Pictures(own, [row for row in rows[dealt] for _ in range(num_samples)],
                                               np.ones(len(own), bool)))
        scored = exchange.gather_rows(self._mesh, scored)
        grouped = lambda x: x.reshape(num_prompts, num_samples, *x.shape[1:])
        code_tokens = drawn.codes + self._words.separator + 1
        return {'tokens': grouped(np.concatenate([of_each(tokens), code_tokens], 1)),
                'prompt_mask': grouped(of_each(mask)), 'mask': np.ones(grouped(drawn.codes).shape, bool),
                'logprobs': grouped(drawn.logprobs), 'filled_at': grouped(drawn.filled_at),
                'ended': np.ones((num_prompts, num_samples), bool)
                } | {name: grouped(x) for name, x in scored.items()}

    def measures(self, batches: Sequence[Mapping[str, np.ndarray]],
                 rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """`code_distance`: mean share of positions in which two codes of a caption differ."""
        return {'code_distance': code_distance(np.concatenate(
            [batch['tokens'][..., -batch['mask'].shape[-1]:] for batch in batches]))}


def flat_data(keys: jax.Array) -> np.ndarray:
    """Data of typed keys [B, K], one row each: uint32 [B K, ...]."""
    data = np.asarray(jax.random.key_data(keys))
    return data.reshape(keys.size, -1)


def code_distance(codes: np.ndarray) -> float:
    """Mean share of the positions in which two of the codes [B, K, L] of a caption differ; 0 of a single one."""
    num_samples = codes.shape[1]
    different = (codes[:, :, None] != codes[:, None]).mean(-1)
    return float(different.sum((1, 2)).mean() / max(num_samples * (num_samples - 1), 1))


def write(module: Any, words: text_to_code.Words, sampling: text_to_code.Sampling, params: Any, captions: jax.Array,
          mask: jax.Array, keys: jax.Array) -> text_to_code.Samples:
    """Codes of captions [N, ...], each drawn with the key of its row (data [N, ...]); pure."""
    return text_to_code.sample(module, params, jax.random.wrap_key_data(keys), captions, mask, words, sampling)


def sampler_program(config: Config, devices: Sequence[jax.Device]) -> tuple[Any, tuple, Mesh]:
    """(jitted program, its abstract arguments, mesh) that writes and draws a whole batch as `devices` would, some of
    which train; for compile checks. Of the images as many are drawn as `generator.batch_size` allows at once."""
    mesh = roles.generator_mesh(config, devices=devices)
    decoding, painter, rows = Decoding(config, mesh), Painter.shapes(config), mesh_lib.batch_sharding(mesh)
    words, sampling = make_words(config), make_sampling(config)
    num = config.batch_size * config.algorithm.num_samples
    at_once = min(painter.batch_size or num, num)

    def program(params, frozen, captions, mask, keys):
        drawn = write(decoding.module, words, sampling, params, captions, mask, keys)
        return drawn, painter.paint(frozen, drawn.codes[:at_once], jax.random.wrap_key_data(keys[:at_once]))

    shape = (num, config.caption_length)
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), num)))
    jitted = jax.jit(program, in_shardings=(decoding.shardings, mesh_lib.replicated(mesh), rows, rows, rows),
                     out_shardings=rows)
    return jitted, (decoding.shapes, painter.params, jax.ShapeDtypeStruct(shape, jnp.int32),
                    jax.ShapeDtypeStruct(shape, bool), keys), mesh


def models(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The frozen generator and its autoencoder, a copy on each of the devices of `mesh`; for compile checks."""
    return placed(Painter.shapes(config).params, mesh_lib.replicated(mesh))


def check_inputs(config: Config) -> None:
    """Raises a ValueError or OSError for a tokenizer, weights, captions or a generator that do not fit."""
    tokens_lib.open_tokenizer(config)
    text_to_code_lib.check_weights(config)
    for name in ('path', *(['heldout'] if config.eval_every else [])):
        captions_lib.open_rows(config.data[name], f'data.{name}')
    Painter.load(config)


def held_out(config: Config) -> Config:
    """`config` with the captions of `data.heldout`."""
    config = config.copy_and_resolve_references()
    config.data.path = config.data.heldout
    return config
