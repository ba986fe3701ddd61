"""Reward models over the devices of a run: weights placed once, scores of the batches of all processes."""
import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data import lengths
from experiments.rlhf.data.texts import TooLong
from experiments.rlhf.models import architecture, loading
from experiments.rlhf.models.classifier import is_classifier
from experiments.rlhf.policy.completions import Completions
from experiments.runtime import compiler, exchange, placement, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.digest import digests
from experiments.runtime.programs import placed
from rlhf_jax.models import heads


def shared(path: str, mesh: Mesh, make: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """`make(path, mesh, ...)`, a `RewardModel` by default, or the same one where this process still uses it: a run that
    generates and evaluates on the same devices needs its weights but once."""
    make = make or RewardModel
    key = (make, str(path), mesh, *sorted(settings.items()))
    model = _MODELS.get(key)
    if model is None:
        model = _MODELS[key] = make(path, mesh, **settings)
    return model


_MODELS: 'weakref.WeakValueDictionary[Any, Any]' = weakref.WeakValueDictionary()


class RewardModel:
    """A reward model read at the last token of each row.

    Args:
        path: a work directory or a Hugging Face folder.
        mesh: of the devices it runs on.
        dtype: to compute in; '': as its own config says.
        num_ids: of the tokenizer that makes the rows.
        batch_size: rows it reads at once.
        length_buckets: lengths that a batch may be cut to, the least that holds its longest row; 1: none is cut.
        before_eos: of a row that ends, read at the token before EOS, as the published gold scores were.
        step: which checkpoint of a work directory; None: the newest.

    Raises:
        FileNotFoundError, ValueError: nothing there, no reward model, or one of another tokenizer.
    """

    def __init__(self, path: str, mesh: Mesh, *, dtype: str = '', num_ids: int = 0, batch_size: int = 64,
                 length_buckets: int = 4, before_eos: bool = False, step: int | None = None):
        module, self._params = loading.load_reward_model(path, dict(dtype=dtype) if dtype else None, step, mesh=mesh,
                                                         compact=True)
        size = module.backbone.vocab_size
        if num_ids > size:
            raise ValueError(f'{path}: the reward model has {size} tokens, the tokenizer {num_ids}; they do not belong '
                             'together')
        if batch_size < 1:
            raise ValueError(f'reward.batch_size={batch_size} must be at least 1')
        self.max_length, self._path, self._before_eos = module.backbone.max_length, path, before_eos
        self._module, self._length_buckets = module, length_buckets
        shards = mesh_lib.batch_shards(mesh)
        self._rows = -(-batch_size // shards) * shards
        self._mesh, self._sharding = mesh, mesh_lib.batch_sharding(mesh)
        self._run = jax.jit(functools.partial(last_scores, module), compiler_options=compiler.options(mesh))

    def identity(self) -> str:
        """What decides the score of a row: weights, architecture, and where it is read."""
        return repr((digests(self._params), self._module, self._before_eos))

    def __call__(self, completions: Completions) -> np.ndarray:
        """Scores float32 [N] of this process's completions; all processes of the mesh call it, each with its own.

        Every process has the rows of all before they are put into batches and these are cut, so that all take the same
        lengths.
        """
        process = np.full(len(completions.tokens), jax.process_index(), np.int32)
        tokens, mask, ended, owners = exchange.gather_rows(
            self._mesh, (completions.tokens, completions.mask, completions.ended, process))
        if tokens.shape[1] > self.max_length:
            raise TooLong(f'{self._path}: reads at most {self.max_length} tokens, rows have {tokens.shape[1]}')
        tokens, mask = lengths.left_aligned(tokens, mask)
        choices = lengths.lengths(tokens.shape[1], self._length_buckets)
        back, order, out = ended.astype(np.int32) * self._before_eos, [], []
        with jax.set_mesh(self._mesh):
            for rows, length in lengths.batches_by_length(mask.sum(1), self._rows, choices):
                part = tokens[rows, :length], mask[rows, :length], back[rows]
                out.append(self._run(self._params, *placement.place_tree(part, self._sharding)))
                order.append(rows)
        scores = np.zeros(len(tokens), np.float32)
        scores[np.concatenate(order)] = np.concatenate(exchange.fetch(out))
        return scores[owners == jax.process_index()]


def last_scores(module: heads.RewardModel, params: Any, tokens: jax.Array, mask: jax.Array,
                back: jax.Array) -> jax.Array:
    """Scores float32 [N] of rows [N, T], read `back` [N] tokens before the last."""
    values = module.apply({'params': params}, tokens, mask=mask)
    return jnp.take_along_axis(values, heads.last_token(mask)[:, None] - back[:, None], 1)[:, 0]


def abstract(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, tuple[heads.RewardModel, Any]]:
    """The reward models of a run that generates on `mesh`, by path: module, and parameters as `jax.ShapeDtypeStruct`
    with shardings. One whose folder is not there is taken to be of the policy's size; classifiers are left out."""
    section, over = config.reward, mesh_lib.reshaped(mesh, config.reward.mesh)
    paths = [section.model if section.kind == 'model' else '', section.gold]
    out = {}
    for path in (path for path in paths if path not in ('', 'task') and ':' not in path):
        if is_classifier(path):
            continue
        module = architecture.reward_model(config.model)
        if (storage.resolve(path) / 'config.json').exists():
            module = loading.reward_module(path, dict(dtype=config.model.dtype))
        shapes = jax.eval_shape(
            lambda key, module=module: loading.compacted(
                module, module.init(key, jnp.zeros((1, 2), jnp.int32))['params']),
            jax.random.key(0))
        family = architecture.family_name(module.backbone)
        out[path] = module, placed(shapes, loading.layout(family, over, 'backbone')(shapes))
    return out
