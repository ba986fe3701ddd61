"""Text to discrete latent code: a masked-diffusion language model that writes codes (arXiv 2507.12318).

LLaDA (arXiv 2502.09992) is LLaMA without the causal mask. Its vocabulary is extended by a separator and a token for
each code value, it is fine-tuned on captioned images, and it then fills a row of masks with the code of a caption:

    words = Words(separator=126349, num_codes=256)                             # of LLaDA's tokenizer
    module, params = extend_vocabulary(module, params, key, words)
    captions, caption_mask = pad_captions(token_lists, words, length=127)
    value, metrics = loss(module, params, key, codes, captions, caption_mask, words)
    codes = sample(module, params, key, captions, caption_mask, words, Sampling(length=512, steps=512)).codes

A sequence is the code, the separator, the caption and padding:

    c_0 ... c_{L-1} <|start_sem|> w_0 ... w_{n-1} <pad> ...

without BOS or EOS, the same code tokens at every position. Rows are independent of their padding: attention leaves it
out. The original attends it (`Objective.attend_padding`).

Follows `train_llada_sem_laion.py`, `sft_trainer_laion.py` and `generate_llada.py` of lavoiems/DiscreteLatentCode. It
differs where `Objective` and `Sampling` say so; `AUTHORS` and `AUTHORS_BEFORE_WEIGHTING` are the released objectives.
"""
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import remasking
from dlc_jax.diffusion.remasking import Samples, Sampling
from rlhf_jax.models.llama import Llama

Array = jax.Array
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Words:
    """Names the tokens of the extended vocabulary. Code value v is the token `separator + 1 + v`.

    Attributes:
        separator: `<|start_sem|>`, the first token added: the length of the tokenizer before (LLaDA: 126349).
        num_codes: V.
        mask_token, pad_token: of LLaDA, whose padding is its end of text.
    """
    separator: int
    num_codes: int
    mask_token: int = 126336
    pad_token: int = 126081

    def __post_init__(self) -> None:
        for name in ('mask_token', 'pad_token'):
            if not 0 <= getattr(self, name) < self.separator:
                raise ValueError(f'words.{name}={getattr(self, name)} must lie between 0 and separator='
                                 f'{self.separator}')
        if self.num_codes < 1:
            raise ValueError(f'words.num_codes={self.num_codes} must be positive')

    @property
    def size(self) -> int:
        """Size of the vocabulary that these tokens need."""
        return self.separator + 1 + self.num_codes

    @property
    def code_tokens(self) -> slice:
        """Slice of the vocabulary that holds the code values."""
        return slice(self.separator + 1, self.size)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Training objective: what is masked, predicted and how it is weighted. The defaults are LLaDA's fine-tuning.

    Attributes:
        masked: 'code': only the code is masked, p(code | caption); 'all': separator and caption too, p(code, caption),
            as the original does.
        normalizer: 'tokens': each row's sum is divided by the number of tokens that could have been masked (LLaDA);
            'masked': the batch's sum by the number of masked ones (the original): beside the weight 1 / p, another of
            about 1 / p for the batch's mean p.
        groups: with 'masked', parts of the batch that are divided each by its own number: the original's are the rows
            of one device and microbatch.
        weighted: by 1 / p, which makes it a bound on the likelihood. The original did not before July 2025.
        min_masked: p = (1 - min_masked) t + min_masked for t uniform on [0, 1].
        softmax: over 'all' tokens (the original), or only over 'codes': no other can be drawn, and it saves logits of
            the whole vocabulary, hundreds of times as many.
        drop_caption: share of rows whose whole prompt is masks, the unconditional model of `Sampling.guidance`. With
            masked='all' rows with t near 1 do that already.
        attend_padding: tokens see the padding, as in the original, whose attention has no mask.
    """
    masked: str = 'code'
    normalizer: str = 'tokens'
    groups: int = 1
    weighted: bool = True
    min_masked: float = 1e-3
    softmax: str = 'codes'
    drop_caption: float = 0.0
    attend_padding: bool = False

    def __post_init__(self) -> None:
        for name, choices in (('masked', ('code', 'all')), ('normalizer', ('tokens', 'masked')),
                              ('softmax', ('all', 'codes'))):
            if getattr(self, name) not in choices:
                raise ValueError(f'objective.{name}={getattr(self, name)!r} is not one of {choices}')
        if self.masked == 'all' and self.softmax == 'codes':
            raise ValueError("objective: captions are predicted with masked='all', which softmax='codes' cannot")
        if self.groups < 1:
            raise ValueError(f'objective.groups={self.groups} must be at least 1')
        if not 0 < self.min_masked < 1:
            raise ValueError(f'objective.min_masked={self.min_masked} must lie between 0 and 1')
        if not 0 <= self.drop_caption < 1:
            raise ValueError(f'objective.drop_caption={self.drop_caption} must be at least 0 and below 1')


AUTHORS = Objective(masked='all', normalizer='masked', softmax='all', attend_padding=True)
AUTHORS_BEFORE_WEIGHTING = dataclasses.replace(AUTHORS, weighted=False)


# ---- Vocabulary and layout -------------------------------------------------------------------------------------------

def extend_vocabulary(module: Llama, params: Params, key: Array, words: Words, *, multiple: int = 1,
                      spread: float = 1e-9) -> tuple[Llama, dict[str, Any]]:
    """The model with rows for the separator and the codes, in embedding and output head.

    Rows the tables have already are left as they are: LLaDA's have 126464 for a tokenizer of 126349 tokens, so that 115
    of the added tokens take reserved ones. A new row is drawn from N(mean, spread cov) of the old rows, as
    `resize_token_embeddings` of transformers does since version 4.46.

    Args:
        module: not yet extended, with stacked or split blocks.
        multiple: the size is rounded up to a multiple of it, to be cut over devices. The original does not.

    Raises:
        ValueError: a separator beyond the end of the table, which would leave rows without a token.
    """
    size = extended_size(module.vocab_size, words, multiple=multiple)
    grow = functools.partial(_with_rows, size=size, spread=spread)
    embed_key, head_key = jax.random.split(key)
    out = dict(params, embed=grow(embed_key, params['embed']))
    if not module.tied:
        out['lm_head'] = dict(params['lm_head'], kernel=grow(head_key, params['lm_head']['kernel'].T).T)
    return module.clone(vocab_size=size), out


def extended_size(rows: int, words: Words, *, multiple: int = 1) -> int:
    """Rows of the tables of a model of `rows` once it is extended, see `extend_vocabulary`."""
    if words.separator > rows:
        raise ValueError(f'words.separator={words.separator} is beyond the vocabulary of {rows}')
    size = max(rows, words.size)
    return size + -size % multiple


def _with_rows(key: Array, table: Array, *, size: int, spread: float) -> Array:
    table = jnp.asarray(table)
    rows, extra = table.shape[0], size - table.shape[0]
    if not extra:
        return table
    old = table.astype(jnp.float32)
    mean = old.mean(0)
    # A random combination of the centred rows has their covariance, without a factorisation of it.
    mix = jax.random.normal(key, (extra, rows)) * (spread / rows) ** 0.5
    return jnp.concatenate([table, (mean + mix @ (old - mean)).astype(table.dtype)])


def pad_captions(captions: Sequence[Sequence[int]], words: Words, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions cut to `length` tokens, from the right, and padded to it: int32 tokens and bool mask, [B, length].

    Raises:
        ValueError: a token that is no word: the mask, or one at or beyond the separator.
    """
    tokens = np.full((len(captions), length), words.pad_token, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, caption in enumerate(captions):
        for token in caption:
            if not 0 <= token < words.separator or token == words.mask_token:
                raise ValueError(f'pad_captions: caption {row} holds token {token}, which is not a word')
        caption = list(caption)[:length]
        tokens[row, :len(caption)], mask[row, :len(caption)] = caption, True
    return tokens, mask


def lay_out(codes: Array, captions: Array, caption_mask: Array, words: Words) -> tuple[Array, Array]:
    """Puts code, separator and caption side by side.

    Args:
        codes: int [B, L] in 0..V-1, or V: a mask.
        captions, caption_mask: [B, N], padded right.

    Returns:
        int32 tokens and bool mask (False: padding), [B, L + 1 + N].
    """
    batch, length = codes.shape
    code = jnp.where(codes == words.num_codes, words.mask_token, words.separator + 1 + codes)
    separator = jnp.full((batch, 1), words.separator)
    captions = jnp.where(caption_mask, captions, words.pad_token)
    present = jnp.concatenate([jnp.ones((batch, length + 1), bool), caption_mask.astype(bool)], 1)
    return jnp.concatenate([code, separator, captions], 1).astype(jnp.int32), present


def code_logits(params: Params, hidden: Array, words: Words) -> Array:
    """Logits of the V code tokens alone, float32 [..., V], of `hidden` [..., D] (output='hidden' of the model)."""
    if 'lm_head' in params:
        kernel = params['lm_head']['kernel'][:, words.code_tokens]
    else:
        kernel = params['embed'][words.code_tokens].T
    contract = (((hidden.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(hidden, jnp.asarray(kernel, hidden.dtype), contract,
                               preferred_element_type=jnp.float32)


# ---- Training --------------------------------------------------------------------------------------------------------

def corrupt(key: Array, tokens: Array, maskable: Array, words: Words, *, min_masked: float = 1e-3
            ) -> tuple[Array, Array, Array]:
    """Masks each of the `maskable` tokens with probability p = (1 - min_masked) t + min_masked, t ~ U[0, 1] of a row.

    Args:
        tokens: int [B, T].
        maskable: bool [B, T].

    Returns:
        The tokens with masks in them, where they are (bool), and p float32 [B, 1].
    """
    time_key, mask_key = jax.random.split(key)
    p = (1 - min_masked) * jax.random.uniform(time_key, (tokens.shape[0], 1)) + min_masked
    masked = maskable & (jax.random.uniform(mask_key, tokens.shape) < p)
    return jnp.where(masked, words.mask_token, tokens), masked, p


def masked_cross_entropy(logits: Array, targets: Array, masked: Array, p: Array, maskable: Array,
                         objective: Objective = Objective()) -> Array:
    """Sums CE_bi / p_b (weighted) over the masked (b, i) and normalises it; a float32 scalar.

    'tokens': sum_b 1 / (B n_b) sum_i CE_bi / p_b, n_b the maskable tokens of the row.
    'masked': 1 / N sum_bi CE_bi / p_b, N the masked tokens of the batch; the mean of that over `groups` parts of it.

    Args:
        logits: [B, T, W].
        targets: int [B, T] in 0..W-1; where not `masked`, anything.
        masked, maskable: bool [B, T].
        p: float, broadcasts to [B, T].

    Raises:
        ValueError: rows that cannot be divided into groups.
    """
    chex.assert_equal_shape((targets, masked, maskable))
    chex.assert_equal_shape_prefix((logits, targets), targets.ndim)
    logits, targets = logits.astype(jnp.float32), jnp.where(masked, targets, 0)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    total = jnp.where(masked, nll / p if objective.weighted else nll, 0.0)
    if objective.normalizer == 'masked':
        if len(total) % objective.groups:
            raise ValueError(f'objective.groups={objective.groups} does not divide {len(total)} rows')
        grouped = lambda x: x.reshape(objective.groups, -1).sum(1)
        return (grouped(total) / jnp.maximum(grouped(masked), 1)).mean()
    return (total.sum(1) / jnp.maximum(maskable.sum(1), 1)).mean()


def loss(module: Llama, params: Params, key: Array, codes: Array, captions: Array, caption_mask: Array, words: Words,
         objective: Objective = Objective()) -> tuple[Array, dict[str, Array]]:
    """Masked-diffusion loss of captioned codes at random times, in nats a token.

    Args:
        module: `Llama(causal=False)` with rows for `words`.
        codes: int [B, L] in 0..V-1.
        captions, caption_mask: [B, N], of `pad_captions`.

    Returns:
        The scalar, and {'masked': share of the maskable tokens that were}.

    Raises:
        ValueError: a model that is causal or whose vocabulary was not extended.
    """
    _check(module, words)
    length = codes.shape[1]
    tokens, present = lay_out(codes, captions, caption_mask, words)
    is_code = jnp.arange(tokens.shape[1]) < length
    maskable = present if objective.masked == 'all' else present & is_code
    noise_key, drop_key = jax.random.split(key)
    noised, masked, p = corrupt(noise_key, tokens, maskable, words, min_masked=objective.min_masked)
    if objective.drop_caption:
        dropped = jax.random.bernoulli(drop_key, objective.drop_caption, (tokens.shape[0], 1))
        noised = jnp.where(dropped & present & ~is_code, words.mask_token, noised)
    seen: dict[str, Any] = dict(mask=None if objective.attend_padding else present)
    if objective.masked == 'code':
        # Nothing but the code is predicted, so the head need not see the rest.
        tokens, masked, maskable = (x[:, :length] for x in (tokens, masked, maskable))
        seen |= dict(at=slice(0, length))
    network: Any = functools.partial(module.apply, {'params': params})
    if objective.softmax == 'codes':
        logits = code_logits(params, network(noised, output='hidden', **seen), words)
        targets = codes
    else:
        logits, targets = network(noised, **seen), tokens
    value = masked_cross_entropy(logits, targets, masked, p, maskable, objective)
    return value, {'masked': masked.sum() / jnp.maximum(maskable.sum(), 1)}


# ---- Sampling --------------------------------------------------------------------------------------------------------

def sample(module: Llama, params: Params, key: Array, captions: Array, caption_mask: Array, words: Words,
           sampling: Sampling) -> Samples:
    """Codes of captions, by one loop on the device (`remasking.fill`); jit it with module, words and sampling static.

    There is no cache of the prompt, and there can be none: every token sees every other, the caption the code as well,
    so that what the network computes of the caption changes with each token filled, where a causal model's keys and
    values stay. Only the layout is made once, and the output head is applied to the V code tokens at the positions of
    the block being filled, not to the whole vocabulary at all of them. That also keeps every code valid; the original
    draws from all tokens, and takes the confidence among them.

    A row depends neither on the rows beside it nor on its padding, which attention leaves out: prompts of a batch may
    be of different lengths. (The original would attend the padding; its command takes prompts one at a time.)

    Args:
        module: `Llama(causal=False)` with rows for `words`; for decoding, with split or stacked blocks alike.
        key: row r draws with `fold_in(key, r)`; or keys [B], one a row.
        captions, caption_mask: [B, N], of `pad_captions`.

    Raises:
        ValueError: a model that is causal or whose vocabulary was not extended.
    """
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(captions.shape[0]))
    logits_of = network(module, params, captions, caption_mask, words, sampling.length, sampling.block,
                        guidance=sampling.guidance)
    return remasking.fill(logits_of, keys, sampling, words.num_codes)


def network(module: Llama, params: Params, captions: Array, caption_mask: Array, words: Words, length: int,
            block: int = 0, *, guidance: float = 0.0) -> Callable[[Array, Array | int], Array]:
    """The model of some captions as a function of their codes, which may hold masks.

    Args:
        captions, caption_mask: [B, N], of `pad_captions`.
        length: L.
        block: positions whose logits are asked for at a time; 0: all.
        guidance: see `Sampling`.

    Returns:
        (codes int32 [B, L] in 0..V with V a mask, first position) -> logits float32 [B, block, V] over the codes.

    Raises:
        ValueError: a model that is causal or whose vocabulary was not extended.
    """
    _check(module, words)
    batch, v = captions.shape[0], words.num_codes
    tokens, present = lay_out(jnp.full((batch, length), v, jnp.int32), captions, caption_mask, words)
    prompt = tokens[:, length:]
    if guidance:
        blank = jnp.where(present[:, length:], words.mask_token, prompt)
        prompt, present = jnp.concatenate([prompt, blank]), jnp.concatenate([present, present])

    def logits_of(codes: Array, start: Array | int = 0) -> Array:
        code = jnp.where(codes == v, words.mask_token, words.separator + 1 + codes)
        code = jnp.concatenate([code, code]) if guidance else code
        hidden: Any = module.apply({'params': params}, jnp.concatenate([code, prompt], 1), mask=present,
                                   output='hidden', at=slice(0, length))
        if block and block < length:
            hidden = jax.lax.dynamic_slice_in_dim(hidden, start, block, 1)
        logits = code_logits(params, hidden, words)
        if not guidance:
            return logits
        conditional, unconditional = jnp.split(logits, 2)
        return unconditional + (guidance + 1) * (conditional - unconditional)

    return logits_of


def _check(module: Llama, words: Words) -> None:
    if module.causal:
        raise ValueError('text_to_code: the model is causal; build it with causal=False')
    if module.vocab_size < words.size:
        raise ValueError(f'text_to_code: {words.size} words, but the model has vocab_size={module.vocab_size}; '
                         'see extend_vocabulary')
