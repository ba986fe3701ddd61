"""Text to code: a bidirectional LLaMA that fills in the code of a caption (arXiv 2507.12318 §5.3, arXiv 2502.09992).

No average of the weights is kept, as the original keeps none.
"""
import dataclasses
import functools
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dlc_jax import convert, text_to_code
from dlc_jax.diffusion.remasking import Sampling
from experiments.dlc.data import captions as captions_lib
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, optim, partition, placement, storage
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from rlhf_jax.weights import files
from rlhf_jax.models import llama

log = logging.getLogger(__name__)

Config = ml_collections.ConfigDict

# Of a LLaDA's config.json -> of the model. The rest of the architecture is one.
_SIZES = {'d_model': 'width', 'n_layers': 'depth', 'n_heads': 'num_heads', 'mlp_hidden_size': 'hidden',
          'rope_theta': 'rope_base'}


def make_words(config: Config) -> text_to_code.Words:
    return modules.build_dataclass(text_to_code.Words, 'words', dict(config.words) | {
        'num_codes': config.model.vocab_size})


def make_text_model(config: Config) -> llama.Llama:
    """Before its vocabulary is extended."""
    ours = ('num_codes', 'vocab_multiple', 'text_vocab_size')
    fields = {name: value for name, value in dict(config.model).items() if name not in ours}
    return modules.build(llama.Llama, llama.SIZES, fields | {
        'vocab_size': config.model.text_vocab_size, 'causal': False})


def make_model(config: Config) -> llama.Llama:
    text_model = make_text_model(config)
    return text_model.clone(vocab_size=text_to_code.extended_size(
        text_model.vocab_size, make_words(config), multiple=config.model.vocab_multiple))


def make_objective(config: Config) -> text_to_code.Objective:
    return modules.build_dataclass(text_to_code.Objective, 'objective', config.objective)


def make_sampling(config: Config) -> Sampling:
    return modules.build_dataclass(Sampling, 'sampler', dict(config.sampler) | {'length': config.model.num_codes})


def build(config: Config, mesh: Mesh) -> Experiment:
    """
    Raises:
        ValueError: codes and captions longer than the model's context, or a batch that has no such groups.
    """
    model, words, objective, m = make_model(config), make_words(config), make_objective(config), config.model
    make_sampling(config)
    length, shards = m.num_codes + 1 + config.caption_length, mesh_lib.batch_shards(mesh)
    if config.caption_length < 1:
        raise ValueError(f'caption_length={config.caption_length} must be at least 1')
    if length > model.max_length:
        raise ValueError(f'model.num_codes={m.num_codes}, a separator and caption_length={config.caption_length} make '
                         f'{length} tokens; model.max_length={model.max_length}')
    if config.batch_size // config.accumulate % objective.groups:
        raise ValueError(f'objective.groups={objective.groups} does not divide the microbatch of '
                         f'{config.batch_size // config.accumulate}')
    if config.eval_every < 0:
        raise ValueError(f'eval_every={config.eval_every} must be at least 0; 0 turns it off')

    def init_params(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32))['params']

    tx = optim.adamw(config.optimizer, jax.eval_shape(init_params, jax.random.key(0)), config.num_steps)

    def init(key):
        key, carried = jax.random.split(key)
        params = init_params(key)
        return TrainState(jnp.int32(0), params, tx.init(params), None, carried)

    def loss(params, state, batch, rng):
        return text_to_code.loss(model, params, rng, batch['codes'], batch['captions'], batch['caption_mask'], words,
                                 objective)

    def step(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        (value, metrics), grads = optim.value_and_grad(
            lambda p, b, r: loss(p, state, b, r), state.params, dict(batch), rng, config.accumulate, shards)
        params, opt_state, norm = optim.apply(tx, grads, state)
        return (state.replace(step=state.step + 1, params=params, opt_state=opt_state),
                metrics | {'loss': value, 'grad_norm': norm})

    share = placement.share_of(mesh)

    def open_batches():
        if config.pretrained:
            open_pretrained(config)
        return captions_lib.open_batches(config.data.path, config, words, share)

    def hooks(writer):
        if not config.eval_every:
            return ()
        heldout = captions_lib.open_batches(config.data.heldout, config, words, share)
        return (HeldOut(config, mesh, heldout, loss, writer),)

    def sampler_program(devices):
        """As `modules.Batched` lays it out: a device holds a share of the parameters and samples some of the rows."""
        over = mesh_lib.make_mesh({'fsdp': -1}, devices)
        batch, shapes = mesh_lib.batch_sharding(over), jax.eval_shape(init_params, jax.random.key(0))
        layout = partition.param_shardings(shapes, llama.PARTITION_RULES, over)
        program = jax.jit(functools.partial(sample, config), out_shardings=batch,
                          in_shardings=(layout, mesh_lib.replicated(over), batch, batch))
        return program, (shapes, jax.eval_shape(jax.random.key, 0), batch_of['captions'],
                         batch_of['caption_mask']), over

    rows = (config.batch_size, config.caption_length)
    batch_of = {'codes': jax.ShapeDtypeStruct((config.batch_size, m.num_codes), jnp.int32),
                'captions': jax.ShapeDtypeStruct(rows, jnp.int32),
                'caption_mask': jax.ShapeDtypeStruct(rows, jnp.bool_)}
    return Experiment(init, loss, step, llama.PARTITION_RULES, batch_of, open_batches,
                      sampler_program=sampler_program, hooks=hooks,
                      warm_start=(lambda state: warm_start(config, state)) if config.pretrained else None)


def sample(config: Config, params: Any, key: jax.Array, captions: jax.Array, mask: jax.Array) -> jax.Array:
    """Codes int32 [B, L] of captions [B, N], by `config.sampler`; pure, so that it can be jitted whole. `key`: one, or
    one a row."""
    return text_to_code.sample(make_model(config), params, key, captions, mask, make_words(config),
                               make_sampling(config)).codes


# ---- Released weights ------------------------------------------------------------------------------------------------

def open_pretrained(config: Config) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Tensors (read when asked for) and config.json of the folder `config.pretrained`.

    Raises:
        FileNotFoundError, OSError, ValueError: no such folder, damaged, or weights of another model.
    """
    folder = storage.local_copy(config.pretrained)
    if not (folder / 'config.json').exists():
        raise FileNotFoundError(f'pretrained={config.pretrained}: no config.json there; give the folder of a LLaDA')
    saved, tensors = files.read_config(folder), files.load_state_dict(folder)
    module = make_text_model(config)
    for theirs, ours in _SIZES.items():
        if theirs not in saved:
            raise ValueError(f'pretrained={config.pretrained}: its config.json has no {theirs}; give the folder of a '
                             'LLaDA')
        if saved[theirs] != getattr(module, ours):
            raise ValueError(f'model.{ours}={getattr(module, ours)}, but pretrained={config.pretrained} has '
                             f'{saved[theirs]}')
    rows = next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith('wte.weight')), None)
    words, allowed = make_words(config), (module.vocab_size, make_model(config).vocab_size, make_words(config).size)
    if rows is not None and (rows not in allowed or rows < words.separator):
        raise ValueError(f'pretrained={config.pretrained}: {rows} rows of words; model.text_vocab_size='
                         f'{module.vocab_size} or, with {words.num_codes} codes, {words.size} were expected')
    return tensors, saved


def warm_start(config: Config, state: TrainState) -> TrainState:
    """Released weights with rows for separator and codes, laid out as `state` is. A model that has these rows already
    keeps them."""
    tensors, saved = open_pretrained(config)
    shardings = jax.tree.map(lambda x: x.sharding, state.params)
    module, params = convert.from_torch('llada', tensors, config=saved, shardings=lambda _: shardings)

    def extend(params):
        return text_to_code.extend_vocabulary(module, params, jax.random.key(config.seed), make_words(config),
                                              multiple=config.model.vocab_multiple)[1]
    params = jax.jit(extend, out_shardings=shardings)(params)
    log.info('starting from %s, %d rows of words extended to %d', config.pretrained, module.vocab_size,
             make_model(config).vocab_size)
    return state.replace(params=params)


# ---- Held out --------------------------------------------------------------------------------------------------------

class HeldOut:
    """Every `eval_every` steps and at the end: the loss on a store that is not trained on, as `heldout_loss`, at noise
    that is the same each time. The last rows, where they are fewer than a microbatch, are left out."""

    def __init__(self, config: Config, mesh: Mesh, rows: captions_lib.CaptionedCodes, loss: Any, writer: Any):
        self._every, self._last, self._mesh, self._rows = config.eval_every, config.num_steps, mesh, rows
        self._size, self._writer = config.batch_size // config.accumulate, writer
        if len(rows) < self._size:
            raise ValueError(f'data.heldout={config.data.heldout}: {len(rows)} rows, fewer than the {self._size} of a '
                             'microbatch')
        self._loss = jax.jit(lambda state, batch, key: loss(state.params, state, batch, key)[0],
                             out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, step: int, state: TrainState, metrics: Any) -> None:
        if step % self._every and step != self._last:
            return
        sharding, values = mesh_lib.batch_sharding(self._mesh), []
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            for i in range(len(self._rows) // self._size):
                rows = self._rows.rows(i * self._size, (i + 1) * self._size)
                batch = {name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
                         for name, x in rows.items()}
                values.append(float(self._loss(state, batch, jax.random.fold_in(jax.random.key(0), i))))
        log.info('step %d: heldout_loss %.4g', step, np.mean(values))
        if self._writer:
            self._writer.write(step, {'heldout_loss': float(np.mean(values))})


# ---- Use -------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, eq=False)
class TextToCode:
    """A trained text-to-code model and its tokenizer."""
    config: Config
    params: Any
    tokenizer: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike) -> 'TextToCode':
        config, params = modules.load(workdir, 'text_to_code', build)
        return cls(config, params, captions_lib.open_tokenizer(config))

    def sample(self, key: jax.Array, prompts: Sequence[str], *, num_per_prompt: int = 1, batch_size: int = 256,
               progress: Any = None, **sampler: Any) -> np.ndarray:
        """int32 [prompts x num_per_prompt, L], prompt by prompt. `sampler` overrides fields of `config.sampler`.

        A code is a function of its prompt, its number among those of that prompt and `key`, whatever else is asked for
        beside it and in whatever batches.

        Raises:
            ValueError: a prompt of no words, or longer than the model has room for; or a sampler that makes no sense.
        """
        tokens, mask = self.checked(prompts, **sampler)
        keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(key, np.uint32(zlib.crc32(prompt.encode()))), k)
                          for prompt in prompts for k in range(num_per_prompt)])
        rows = {'captions': tokens.repeat(num_per_prompt, 0), 'mask': mask.repeat(num_per_prompt, 0),
                'keys': np.asarray(jax.random.key_data(keys))}
        run = self._compiled(min(batch_size, len(keys)), tuple(sorted(sampler.items())))
        return run(key, rows, len(keys), progress)

    def checked(self, prompts: Sequence[str], **sampler: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of prompts, padded to a common length; raises what `sample` raises. Compiles nothing."""
        make_sampling(modules.with_sampler(self.config, sampler))
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        room = make_model(self.config).max_length - self.config.model.num_codes - 1
        for prompt, ids in zip(prompts, encoded):
            if not ids:
                raise ValueError(f'prompt {prompt!r}: no words in it')
            if len(ids) > room:
                raise ValueError(f'prompt {prompt[:40]!r}…: {len(ids)} tokens, the model has room for {room}')
        longest = max(map(len, encoded))
        return text_to_code.pad_captions(encoded, make_words(self.config), length=min(-(-longest // 16) * 16, room))

    @functools.lru_cache(maxsize=4)
    def _compiled(self, batch_size: int, sampler: tuple) -> modules.Batched:
        config = modules.with_sampler(self.config, dict(sampler))
        one = lambda p, _, rows: sample(config, p, jax.random.wrap_key_data(rows['keys']), rows['captions'],
                                        rows['mask'])
        return modules.Batched(one, self.params, batch_size, rules=llama.PARTITION_RULES)
