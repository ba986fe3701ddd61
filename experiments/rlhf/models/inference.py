"""A trained language model as its user sees it: prompts in, responses out, and the log-probabilities of either.

    policy = Policy.load('runs/policy')                       # or a Hugging Face folder with its tokenizer
    responses = policy.sample(['3+4='], policy.sampling(temperature=0.7, max_new_tokens=16), jax.random.key(0))
    responses.texts[0][0], policy.logprobs(responses)
"""
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data import texts
from experiments.rlhf.models import architecture, loading
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, partition, shards
from experiments.runtime.blocks import Arrays, Blocks
from experiments.runtime.digest import digests
from experiments.runtime.evaluation import full_batches
from rlhf_jax import chat, elastic_reset, responses
from rlhf_jax import generate as generate_lib
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models import decoder

Progress = Callable[[int], None]
Prompt = chat.Text | Sequence[int]

_BUCKET = 64  # prompts are padded to a multiple of so many tokens, one length for all of a call


class Part(NamedTuple):
    """Some prompts of a longer list: the number of the first of them, and the tokens of the longest one of all."""
    first: int
    longest: int


@dataclasses.dataclass(frozen=True)
class Responses:
    """K responses to each of N prompts.

    Attributes:
        texts: [N][K], without their EOS.
        prompt_tokens, prompt_mask: int32 and bool [N, P], padded on the left.
        tokens, mask: int32 and bool [N, K, L], EOS included.
        ended: bool [N, K], whether there is an EOS.
        logprobs: float32 [N, K, L], in the distribution they were drawn from; None for given texts.
    """
    texts: list[list[str]]
    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    ended: np.ndarray
    logprobs: np.ndarray | None = None

    @property
    def num_samples(self) -> int:
        return self.tokens.shape[1]

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask [N K, P + L], prompt and response, prompt by prompt."""
        pairs = (self.prompt_tokens, self.tokens), (self.prompt_mask, self.mask)
        return tuple(np.concatenate([np.repeat(prompt, self.num_samples, 0), response.reshape(-1, response.shape[-1])],
                                    1) for prompt, response in pairs)


class Policy:
    """A decoder with its weights, laid out for sampling, and its tokenizer.

    Args:
        module, params: with stacked blocks.
        tokenizer: see `rlhf_jax.tokenizers`.
        bos: prompts begin with its BOS; None: as its files say.
        mesh: of devices of this process; batches are split over `data` and `fsdp`. Default: all, weights on each. The
            processes of a job share out the rows, and each gets the results of all.
        config: of the run.
        name: of the tokenizer, for messages.

    Raises:
        ValueError: tokenizer and model do not belong together.
    """

    def __init__(self, module: Any, params: Any, tokenizer: Any, *, bos: bool | None = None, mesh: Mesh | None = None,
                 config: ml_collections.ConfigDict | None = None, name: str = 'the tokenizer'):
        if tokenizer.vocab_size > module.vocab_size:
            raise ValueError(f'the tokenizer has {tokenizer.vocab_size} ids, the model {module.vocab_size}; they do '
                             'not belong together')
        self.tokenizer, self.config, self.mesh = tokenizer, config, mesh or mesh_lib.make_mesh(
            {'data': -1}, jax.local_devices())
        self.encode = texts.Encoder(tokenizer, tokenizer.adds_bos if bos is None else bos, name)
        self.module = module.clone(stacked=False)
        split = jax.jit(lambda p: decoder.split_blocks(module, p, dtype=module.dtype)[1])
        rules = decoder.split_rules(architecture.rules(dict(kind=architecture.family_name(module))))
        on_host = split(jax.device_put(params, modules.host()))  # no device has to hold the whole, or both forms of it
        self.params = jax.device_put(on_host, partition.param_shardings(on_host, rules, self.mesh))
        self._shards = mesh_lib.batch_shards(self.mesh)

    @classmethod
    def load(cls, path: str | os.PathLike, *, tokenizer: str = '', bos: bool | None = None, dtype: str = '',
             adapter: str = '', mesh: Mesh | None = None, step: int | None = None) -> 'Policy':
        """The policy in `path`: a work directory of sft, dpo or policy, or a Hugging Face folder with its tokenizer.

        Args:
            tokenizer: to use (for a folder without one); '': its own.
            bos: whether prompts begin with BOS; None: as in the run's training, else as the tokenizer's files say.
            dtype: to compute in; '': as its own config says, float32 for a folder.
            adapter: folder of a PEFT adapter, merged into the weights.
            step: which checkpoint of a work directory; None: the newest.

        Raises:
            FileNotFoundError, ValueError: nothing there, no language model, no tokenizer, one without an EOS, or one
                that gives ids other meanings than the run's own.
        """
        module, params, own = loading.load_policy(path, dtype, adapter, step)
        name = tokenizer or (os.fspath(path) if own is None else own.tokenizer)
        try:
            opened = tokenizer_lib.open_tokenizer(name)
        except FileNotFoundError as error:
            hint = '' if tokenizer else '; copy the one of the model beside its weights, or name one (--tokenizer)'
            raise FileNotFoundError(f'{path}: no tokenizer.json there{hint}' if own is None else f'{error}{hint}'
                                    ) from None
        stage = tokenizer_lib.stage_of(path)
        if bos is None and stage.is_run:
            bos = stage.bos if own.get('bos') is not None or stage.tokenizer is not None else None
        policy = cls(module, params, opened, bos=bos, mesh=mesh, config=own, name=name)
        if tokenizer:
            tokenizer_lib.check_stage('--policy', path, policy.encode)
        return policy

    def sampling(self, **fields: Any) -> generate_lib.Sampling:
        """How to sample, with the ends that this tokenizer names: `max_new_tokens`, `temperature` (0: greedy), `top_k`,
        `top_p`."""
        return generate_lib.Sampling(**fields, stop_tokens=self.tokenizer.stops, pad_token=self.tokenizer.pad)

    def interpolated(self, start: 'Policy', alpha: float) -> 'Policy':
        """The policy whose weights are a share `alpha` of the way from those of `start` to these.

        Raises:
            ValueError: the two are of different models.
        """
        if jax.tree.map(jnp.shape, start.params) != jax.tree.map(jnp.shape, self.params):
            raise ValueError('weights of different models cannot be interpolated; give the --reference that the policy '
                             'was trained from')
        between = copy.copy(self)
        between.params = elastic_reset.interpolate(start.params, self.params, alpha)
        return between

    # ---- Sampling ----------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Prompt], sampling: generate_lib.Sampling, key: jax.Array, *,
               batch_size: int = 64, num_samples: int = 1, progress: Progress | None = None,
               part: Part | None = None, place: str = '') -> Responses:
        """`num_samples` responses to each prompt. A response depends on `key`, its prompt's number and its own, not on
        `batch_size` or the devices.

        Args:
            prompts: texts, or ids as they stand.
            batch_size: prompts at once, rounded up to the devices; the last batch is filled up.
            progress: callback that takes how many prompts are done.
            part: which part of a longer list the prompts are; None: all of it, which the processes of a job share out.
            place: folder where batches are written as they are drawn, until somebody removes it (`runtime.blocks`):
                interrupted, a call for the same responses draws only the missing ones. '': they are not written.

        Raises:
            ValueError: no prompt, an empty one, or one that leaves no room for `max_new_tokens`.
            OSError: a batch cannot be written.
        """
        tokens, mask = self.pad([self.ids_of(p) for p in prompts], sampling.max_new_tokens,
                                part.longest if part else 0)

        def run(index, tokens, mask):
            keys = responses.sample_keys(key, index, num_samples)
            return vars(generate_lib.generate(self.module, self.params, tokens, mask, keys, sampling,
                                              num_samples=num_samples))

        numbers = np.arange(len(tokens)) + (part.first if part else 0)
        drawn = self._in_batches('responses', run, (numbers, tokens, mask), batch_size, progress,
                                 alone=part is not None, place=place,
                                 settings=(sampling, num_samples, np.asarray(jax.random.key_data(key))))
        shape = drawn['mask'].shape[:2]
        flat = [x.reshape(-1, x.shape[-1]) for x in (drawn['tokens'], drawn['mask'])]
        of_each = [np.repeat(x, num_samples, 0) for x in (tokens, mask)]
        completions, ended = texts.decoded(self.tokenizer, *flat, *of_each)
        decoded = [completions[i:i + num_samples] for i in range(0, len(completions), num_samples)]
        return Responses(decoded, tokens, mask, drawn['tokens'], drawn['mask'], ended.reshape(shape),
                         drawn['logprobs'])

    def ids_of(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, a BOS in front where texts begin with one; those of one that is given as ids."""
        return self.encode(prompt) if isinstance(prompt, str | chat.Chat) else [int(i) for i in prompt]

    def given(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Responses:
        """Texts as if they were responses, one a prompt, each with an EOS.

        Raises:
            ValueError: another number of answers than prompts.
            TooLong: one with its prompt exceeds the model's context.
        """
        if len(prompts) != len(answers):
            raise ValueError(f'answers: there are {len(answers)} for {len(prompts)} prompts')
        starts, replies = [], []
        for prompt, answer in zip(prompts, answers):
            if isinstance(prompt, str | chat.Chat):
                ids, (start, _) = texts.joined(self.encode, prompt, answer)
                starts.append(ids[:start])
                replies.append(ids[start:])
            else:
                starts.append(self.ids_of(prompt))
                replies.append([*self.encode.continuing(answer), self.tokenizer.eos])
        longest = max(map(len, replies))
        prompt_tokens, prompt_mask = self.pad(starts, longest)
        tokens, mask = generate_lib.pad_prompts(replies, buckets=(longest,), pad_token=self.tokenizer.pad, left=False)
        return Responses([[a] for a in answers], prompt_tokens, prompt_mask, tokens[:, None], mask[:, None],
                         np.ones((len(answers), 1), bool))

    def pad(self, prompts: Sequence[Sequence[int]], room: int, longest: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Prompts as arrays padded on the left, `room` tokens short of the context at most; `longest`: of prompts that
        are not among them."""
        limit = self.module.max_length - room
        longest = max([longest, *map(len, prompts)])
        if longest > limit:
            first = next(i for i, prompt in enumerate(prompts) if len(prompt) > limit)
            raise texts.TooLong(f'prompt {first} has too many tokens: {longest} and a response of {room} exceed the '
                                f'context of the model, {self.module.max_length}')
        bucket = min(-(-longest // _BUCKET) * _BUCKET, limit)
        return generate_lib.pad_prompts(prompts, buckets=(bucket,), pad_token=self.tokenizer.pad)

    # ---- Log-probabilities -------------------------------------------------------------------------------------------

    def logprobs(self, responses: Responses, *, temperature: float = 1.0, batch_size: int = 64,
                 progress: Progress | None = None, place: str = '') -> np.ndarray:
        """float32 [N, K, L] of the tokens of `responses`, which another policy with the same tokenizer may have drawn.

        0 past their end.

        Args:
            batch_size: rows at once.
            place: folder where batches are written as they are computed, as of `sample`.

        Raises:
            ValueError: token ids or lengths that this model does not have.
        """
        tokens, mask = responses.rows()
        length = responses.tokens.shape[-1]
        out = self.token_logprobs(tokens, mask, length, temperature=temperature, batch_size=batch_size,
                                  progress=progress, place=place).reshape(responses.mask.shape)
        return np.where(responses.mask, out, 0)

    def token_logprobs(self, tokens: np.ndarray, mask: np.ndarray, length: int, *, temperature: float = 1.0,
                       batch_size: int = 64, progress: Progress | None = None, place: str = '') -> np.ndarray:
        """float32 [N, length] of the last `length` tokens of rows [N, T], whatever is padding among them; arguments as
        of `logprobs`."""
        if tokens.max() >= self.module.vocab_size or tokens.shape[1] > self.module.max_length:
            raise ValueError(f'rows of {tokens.shape[1]} tokens with ids up to {tokens.max()} do not fit this model: '
                             f'it has {self.module.max_length} positions and {self.module.vocab_size} ids')

        def run(tokens, mask):
            return {'logprobs': _score(self.module, self.params, tokens, mask, length, temperature)}
        return self._in_batches('logprobs', run, (tokens, mask), batch_size, progress, place=place,
                                settings=(length, temperature))['logprobs']

    # ---- Batches -----------------------------------------------------------------------------------------------------

    def rows_at_once(self, batch_size: int, num: int) -> int:
        """Rows of a batch of `num` rows in all: `batch_size`, or so many as there are, rounded up to the devices."""
        return -(-min(batch_size, num) // self._shards) * self._shards

    def _in_batches(self, what: str, fn: Callable[..., Any], arrays: Sequence[np.ndarray], batch_size: int,
                    progress: Progress | None, *, alone: bool = False, place: str = '',
                    settings: Sequence[Any] = ()) -> Arrays:
        """`fn` of rows, a batch of them at a time, the last one filled up with its last row; on the host. Unless this
        process is `alone` with them, those of the job share them out.

        Args:
            what: names the batches that are written to the folder `place`; '': none is.
            fn: arrays of a batch -> arrays by name, by these weights.
            settings: what decides the outcome beside weights and rows.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size} must be at least 1')
        num = len(arrays[0])
        size = self.rows_at_once(batch_size, batch_size if alone else num)
        sharding, blocks = mesh_lib.batch_sharding(self.mesh), Blocks()
        if place:
            blocks = Blocks.of(place, what, digests(self.params), self.module, size, *settings, *arrays)

        def run(part: range) -> Any:
            out, done = [], 0
            for rows, count in full_batches(len(part), size):
                rows = part.start + rows

                def batch(rows: np.ndarray = rows) -> Any:
                    return jax.device_get(fn(*(jax.device_put(x[rows], sharding) for x in arrays)))
                out.append(blocks.get(str(rows[0]), batch))
                done += count
                if progress:
                    progress(min(done * jax.process_count(), num))
            return jax.tree.map(lambda *parts: np.concatenate(parts)[:len(part)], *out)
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            return run(range(num)) if alone else shards.gathered(run, num, size)


@functools.partial(jax.jit, static_argnames=('module', 'length', 'temperature'))
def _score(module: Any, params: Any, tokens: jax.Array, mask: jax.Array, length: int, temperature: float) -> jax.Array:
    logits = module.apply({'params': params}, tokens, mask=mask, at=slice(-length - 1, -1))
    return token_logprobs(logits, tokens[:, -length:], temperature)
