"""Text to code: a bidirectional LLaMA that fills in the code of a caption (arXiv 2507.12318 §5.3, arXiv 2502.09992).

No average of the weights is kept, as the original keeps none.
"""
import collections
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
from experiments.dlc.data import codestore
from experiments.runtime import compiler, evaluation, modules, partition, placement, runs, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.programs import Program
from experiments.runtime.state import TrainState
from experiments.runtime.training import training
from rlhf_jax.models import llama, lora
from rlhf_jax.weights import files

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
    model, words, objective = make_model(config), make_words(config), make_objective(config)
    check(config, model, objective)
    spec, share = batch_spec(config), placement.share_of(mesh)

    def init_params(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32))['params']

    def loss(params, state, batch, rng):
        return text_to_code.loss(model, params, rng, batch['codes'], batch['captions'], batch['caption_mask'], words,
                                 objective)

    def check_inputs():
        captions_lib.open_tokenizer(config)
        if config.pretrained:
            open_pretrained(config)

    def open_batches():
        if config.eval_every:
            codestore.check_one_encoder({
                f'data.{name}': codestore.open_code_store(config.data[name], field=f'data.{name}')
                for name in ('path', 'heldout')})
        return captions_lib.open_batches(config.data.path, config, words, share)

    def hooks(writer):
        if not config.eval_every:
            return ()
        rows = captions_lib.open_batches(config.data.heldout, config, words, share)
        return (HeldOutCaptions(config, mesh, rows, loss, writer),)

    def programs(devices, _):
        """As `modules.Batched` lays it out: a device holds a share of the parameters and samples some of the rows."""
        over = mesh_lib.make_mesh({'fsdp': -1}, devices)
        rows, shapes = mesh_lib.batch_sharding(over), jax.eval_shape(init_params, jax.random.key(0))
        layout = partition.param_shardings(shapes, llama.PARTITION_RULES, over)
        program = jax.jit(functools.partial(sample, config), out_shardings=rows,
                          in_shardings=(layout, mesh_lib.replicated(over), rows, rows))
        args = (shapes, jax.eval_shape(jax.random.key, 0), spec['captions'], spec['caption_mask'])
        return [Program('sampler', program, args, over, options=compiler.options(over),
                        knobs='lower batch_size, the captions sampled at a time')]

    trained = training(config, mesh, init_params, loss, averaged=False)
    return Experiment(trained.init, loss, trained.step, llama.PARTITION_RULES, spec, open_batches,
                      programs=programs, hooks=hooks, check=check_inputs,
                      warm_start=(lambda state: warm_start(config, state)) if config.pretrained else None)


def init_params(config: Config, key: jax.Array) -> Any:
    """Fresh parameters of the model that `config` describes, with an adapter where `config.lora.rank` is set."""
    module = make_model(config)
    params = module.init(key, jnp.zeros((1, 2), jnp.int32))['params']
    if not config.get('lora') or not config.lora.rank:
        return params
    targets = tuple(config.lora.targets) or llama.LORA_TARGETS
    return lora.init(jax.random.fold_in(key, 1), module, params, rank=config.lora.rank, alpha=config.lora.alpha,
                     targets=targets)


def check(config: Config, model: llama.Llama, objective: text_to_code.Objective) -> None:
    """Raises a ValueError for codes and captions longer than the model's context, a batch that has no such groups, or
    a sampler that makes no sense."""
    make_sampling(config)
    evaluation.check_every(config)
    num_codes, microbatch = config.model.num_codes, config.batch_size // config.accumulate
    length = num_codes + 1 + config.caption_length
    if config.caption_length < 1:
        raise ValueError(f'caption_length={config.caption_length} must be at least 1')
    if length > model.max_length:
        raise ValueError(f'model.num_codes={num_codes}, a separator and caption_length={config.caption_length} make '
                         f'{length} tokens; model.max_length={model.max_length}')
    if microbatch % objective.groups:
        raise ValueError(f'objective.groups={objective.groups} does not divide the microbatch of {microbatch}')


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the global batch."""
    shape = (config.batch_size, config.caption_length)
    return {'codes': jax.ShapeDtypeStruct((config.batch_size, config.model.num_codes), jnp.int32),
            'captions': jax.ShapeDtypeStruct(shape, jnp.int32),
            'caption_mask': jax.ShapeDtypeStruct(shape, jnp.bool_)}


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


# ---- Weights of runs -------------------------------------------------------------------------------------------------

RUNS = ('text_to_code', 'align')  # experiments that train this model: on captioned codes, and by a reward on images


def load_run(workdir: str | os.PathLike, *, step: int | None = None, field: str = '',
             mesh: Mesh | None = None) -> tuple[Config, Any]:
    """Config and weights of a run of `RUNS`; an adapter is merged into them.

    Args:
        step: of the checkpoint; None: the newest.
        field: stands before the path in errors, as in 'weights='.
        mesh: the weights are laid out over it, and each of its processes reads its own parts; None: in host memory.

    Raises:
        ValueError: no such run, or no checkpoint in it yet.
    """
    config = runs.read_config(workdir, *RUNS, field=field)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    part = 'params' if config.experiment == 'text_to_code' else 'params/policy'
    rules = (*lora.PARTITION_RULES, *llama.PARTITION_RULES)
    shardings = None if mesh is None else partition.param_shardings(shapes, rules, mesh)
    params = runs.restore_part(workdir, part, shapes, step, shardings)
    return config, jax.jit(lora.merge)(params) if config.get('lora') and config.lora.rank else params


# Fields of `model` that say how it computes or was begun, not what it is.
_MANNER = ('dtype', 'remat', 'unroll', 'attention_impl', 'init_std', 'size')


def check_weights(config: Config) -> None:
    """Raises a ValueError or OSError where the weights that `config` starts from are not there or of another model."""
    if config.weights and config.pretrained:
        raise ValueError(f'weights={config.weights} and pretrained={config.pretrained}: a run starts from one of them')
    if config.pretrained:
        open_pretrained(config)
    if not config.weights:
        return
    theirs, field = runs.read_config(config.weights, *RUNS, field='weights='), f'weights={config.weights}'
    a, b = make_model(config), make_model(theirs)
    for name in type(a).__dataclass_fields__:
        if name not in (*_MANNER, 'param_dtype', 'parent', 'name') and getattr(a, name) != getattr(b, name):
            raise ValueError(f'model.{name}={getattr(a, name)!r}, but {field} has {getattr(b, name)!r}')
    for name in ('num_codes', 'vocab_size'):
        if config.model[name] != theirs.model[name]:
            raise ValueError(f'model.{name}={config.model[name]}, but {field} has {theirs.model[name]}')
    spelled = lambda c: {  # an empty tokenizer is the one beside the released weights
        'words': dict(c.words), 'tokenizer': (c.tokenizer or c.pretrained).rstrip('/'),
        'vocabulary': tuple(c.vocabulary)}
    for name, ours in spelled(config).items():
        if ours != spelled(theirs)[name]:
            raise ValueError(f'{name}={ours}, but {field} has {spelled(theirs)[name]}; its captions were read so')


def load_weights(config: Config, params: Any) -> Any:
    """`params`, an adapter kept, with the weights of the run `config.weights` or the released ones of
    `config.pretrained`, laid out as they are; as they are where neither is given."""
    plain = lora.without(params)
    if config.weights:
        check_weights(config)
        loaded = load_run(config.weights, field='weights=', mesh=placement.mesh_of(plain))[1]
        loaded = placement.place_tree(loaded, jax.tree.map(lambda x: x.sharding, plain))
    elif config.pretrained:
        state = TrainState(jnp.int32(0), plain, None, None, jax.random.key(0))
        loaded = warm_start(config, state).params
    else:
        return params
    return lora.join(params, loaded)


# ---- Held out --------------------------------------------------------------------------------------------------------

class HeldOutCaptions(evaluation.Evaluation):
    """The loss on a store that is not trained on, as `heldout_loss`, at noise that is the same each time.

    The last rows, where they are fewer than a microbatch, are left out.
    """

    def __init__(self, config: Config, mesh: Mesh, rows: captions_lib.CaptionedCodes, loss: Any, writer: Any):
        super().__init__(config.eval_every, config.num_steps, writer)
        self._mesh, self._rows, self._size = mesh, rows, config.batch_size // config.accumulate
        if len(rows) < self._size:
            raise ValueError(f'data.heldout={config.data.heldout}: {len(rows)} rows, fewer than the {self._size} of a '
                             'microbatch')
        self._loss = jax.jit(lambda state, batch, key: loss(state.params, state, batch, key)[0],
                             out_shardings=mesh_lib.replicated(mesh))

    def measure(self, state: TrainState) -> dict[str, float]:
        values, sharding = [], mesh_lib.batch_sharding(self._mesh)
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            for i in range(len(self._rows) // self._size):
                batch = placement.place_tree(self._rows.rows(i * self._size, (i + 1) * self._size), sharding)
                values.append(float(self._loss(state, batch, jax.random.fold_in(jax.random.key(0), i))))
        return {'heldout_loss': float(np.mean(values))}


# ---- Use -------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, eq=False)
class TextToCode:
    """A trained text-to-code model and its tokenizer."""
    config: Config
    params: Any
    tokenizer: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike, step: int | None = None) -> 'TextToCode':
        """The run of text_to_code or align in `workdir`, as its newest checkpoint has it, or that of `step`."""
        config, params = load_run(workdir, step=step)
        return cls(config, params, captions_lib.open_tokenizer(config))

    def sample(self, key: jax.Array, prompts: Sequence[str], *, num_per_prompt: int = 1, part: range | None = None,
               batch_size: int = 256, progress: Any = None, **sampler: Any) -> np.ndarray:
        """int32 [prompts x num_per_prompt, L], prompt by prompt, or those rows that `part` says. `sampler` overrides
        fields of `config.sampler`; `batch_size` rows are sampled at once on a device.

        A code is a function of its prompt, its number among those of that prompt and `key`, whatever else is asked for
        beside it and in whatever batches. A prompt that stands in `prompts` again has further ones.

        Raises:
            ValueError: a prompt of no words, or longer than the model has room for; or a sampler that makes no sense.
        """
        tokens, mask = self.checked(prompts, **sampler)
        num = len(prompts) * num_per_prompt
        part = range(num) if part is None else part
        which, copies = np.divmod(np.asarray(part), num_per_prompt)
        words = np.array([zlib.crc32(prompts[i].encode()) for i in which], np.uint32)
        met: collections.Counter[str] = collections.Counter()
        times = np.zeros(len(prompts), copies.dtype)  # that each prompt stands before, in the whole list
        for i, prompt in enumerate(prompts):
            times[i] = met[prompt]
            met[prompt] += 1
        copies = times[which] * num_per_prompt + copies
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, words), copies)
        rows = {'captions': tokens[which], 'mask': mask[which], 'keys': np.asarray(jax.random.key_data(keys))}
        run = self._compiled(modules.Unit.of(batch_size, num), tuple(sorted(sampler.items())))
        return run(rows, len(part), progress)

    def checked(self, prompts: Sequence[str], **sampler: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of prompts, padded to a common length; raises what `sample` raises. Compiles nothing."""
        make_sampling(modules.with_sampler(self.config, sampler))
        encoded = self._encoded(tuple(prompts))
        room = make_model(self.config).max_length - self.config.model.num_codes - 1
        for prompt, ids in zip(prompts, encoded):
            if not ids:
                raise ValueError(f'prompt {prompt!r}: no words in it')
            if len(ids) > room:
                raise ValueError(f'prompt {prompt[:40]!r}…: {len(ids)} tokens, the model has room for {room}')
        longest = max(map(len, encoded))
        return text_to_code.pad_captions(encoded, make_words(self.config), length=min(-(-longest // 16) * 16, room))

    @functools.lru_cache(maxsize=2)
    def _encoded(self, prompts: tuple[str, ...]) -> list[list[int]]:
        """Tokens of each prompt; kept, for the parts of a set are sampled one after the other."""
        return [self.tokenizer.encode(prompt) for prompt in prompts]

    @functools.lru_cache(maxsize=4)
    def _compiled(self, unit: modules.Unit, sampler: tuple) -> modules.Batched:
        config = modules.with_sampler(self.config, dict(sampler))
        one = lambda p, rows: sample(config, p, jax.random.wrap_key_data(rows['keys']), rows['captions'],
                                     rows['mask'])
        return modules.Batched(one, self.params, unit, rules=llama.PARTITION_RULES)
