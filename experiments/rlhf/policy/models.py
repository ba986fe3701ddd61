"""The networks of a decoder that is trained as a policy, with its critic where the algorithm has one."""
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.rlhf.models import architecture, loading
from experiments.rlhf.policy.kind import Networks
from experiments.runtime import partition, placement
from rlhf_jax import generate, token_mask
from rlhf_jax.models import heads

Array = jax.Array
Params = dict[str, Any]
Rows = Mapping[str, Array]
Forward = Callable[[Params, Rows], tuple[Array, Array | None]]

TEXT = ('tokens', 'prompt_mask', 'mask', 'stop_tokens')  # the fields of a batch that `forward` reads


class PolicyModels(Networks):
    """The policy, a decoder with or without an adapter, and its critic: a network of its own or a head on the trunk.

    Args:
        config: of the run.
        has_critic: whether the algorithm needs values.

    Attributes:
        sampling: how the sampler draws, without its stop tokens, which come with every batch that needs them.
        rules, columns: see `Networks`.
    """
    columns = TEXT

    def __init__(self, config: ml_collections.ConfigDict, *, has_critic: bool):
        super().__init__(config)
        self._policy = architecture.decoder(config.model)
        self._critic = architecture.reward_model(config.model) if has_critic else None
        self._shared = has_critic and config.algorithm.critic == 'shared'
        self._head = heads.ScalarHead(True)
        self.sampling = sampling_of(config)
        self.rules: partition.Rules = (*architecture.rules(config.model, 'policy'),
                                       *architecture.rules(config.model, 'value/backbone'))

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        params = {'policy': architecture.init_decoder(self._config)(key)}
        if self._critic is not None:
            key = jax.random.fold_in(key, 7)
            if self._shared:
                params['value'] = {'value_head': self._head.init(key, jnp.zeros((1, self._policy.width)))['params']}
            else:
                params['value'] = self._critic.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        return params

    def load(self, params: Params) -> Params:
        """`params` with the weights that the config starts from: `weights`, and `algorithm.critic_weights` or a critic
        that begins as the policy with a fresh head.

        Raises:
            FileNotFoundError, ValueError: no such weights, or weights of another model.
        """
        config, params = self._config, dict(params)
        mesh = placement.mesh_of(params)
        if config.weights:
            loaded = loading.load_decoder(config.weights, config, mesh)
            params['policy'] = loading.filled(params['policy'], loaded)
        if self._critic is not None and not self._shared:
            critic_weights = config.algorithm.critic_weights
            if critic_weights:
                module, params['value'] = loading.load_reward_model(critic_weights, config.model, mesh=mesh)
                architecture.check_same(critic_weights, module.backbone, self._policy, 'algorithm.critic_weights')
            elif config.weights:
                params['value'] = loading.filled(params['value'], {'backbone': loaded})
        return params

    def forward(self, params: Params, rows: Rows) -> tuple[Array, Array | None]:
        """Log-probabilities of responses in the distribution that the sampler scores, and values if there is a critic.

        Args:
            rows: `TEXT` of b prompts with C completions each, [b, C, ...]; with `allowed`, see there, the distribution
                is that of these tokens alone.

        Returns:
            float32 [b, C, L], and the same or None.
        """
        shape = rows['mask'].shape
        text = _Text(rows)
        out = self._policy.apply({'params': params['policy']}, text.tokens, mask=text.mask, at=text.span,
                                 output='both' if self._shared else 'logits')
        logits, hidden = out if self._shared else (out, None)
        if 'allowed' in rows:
            logits = token_mask.masked(logits, rows['allowed'].reshape(*logits.shape[:2], -1), text.response)
        logprobs = generate.rescore(logits, text.response, self.sampling, stop_tokens=text.stop_tokens)
        if self._shared:
            values = self._head.apply({'params': params['value']['value_head']}, hidden)
        elif self._critic is not None:
            values = self._critic.apply({'params': params['value']}, text.tokens, mask=text.mask)[:, text.span]
        else:
            return logprobs.reshape(shape), None
        return logprobs.reshape(shape), values.reshape(shape)

    def allowed(self, mask_policy: Params, rows: Rows) -> Array:
        """The tokens that could be drawn at each place of the responses, under the mask policy's parameters.

        Args:
            rows: `TEXT`, [b, C, ...].

        Returns:
            uint8 [b, C, L, ceil(V / 8)], a bit a token (`token_mask.pack`).
        """
        text, mask = _Text(rows), self._config.algorithm.mask
        logits = self._policy.apply({'params': mask_policy}, text.tokens, mask=text.mask, at=text.span)
        packed = token_mask.pack(token_mask.allowed_tokens(logits, text.stop_tokens, top_p=mask.top_p,
                                                           min_tokens=mask.min_tokens))
        return packed.reshape(*rows['mask'].shape, -1)


class _Text:
    """Completions [b, C, ...] as a model reads them, one a row.

    Attributes:
        tokens, mask: int32 and bool [b C, P + L], prompt and response.
        response: int32 [b C, L].
        stop_tokens: int32 [b C, 1, S], or None where the batch carries none.
        span: of the positions that predict the response, each token one position before it.
    """

    def __init__(self, rows: Rows):
        flat = lambda x: x.reshape(-1, x.shape[-1])
        length = rows['mask'].shape[-1]
        self.tokens = flat(rows['tokens'])
        self.mask = flat(jnp.concatenate([rows['prompt_mask'], rows['mask']], -1))
        self.response, self.span = self.tokens[:, -length:], slice(-length - 1, -1)
        self.stop_tokens = flat(rows['stop_tokens'])[:, None] if 'stop_tokens' in rows else None


def sampler_module(config: ml_collections.ConfigDict, stop_tokens: tuple[int, ...] = ()) -> Any:
    """The decoder that a policy is sampled with, its blocks split, under the mask of `algorithm.mask` if it has one.

    Raises:
        ValueError: the mask may allow stop tokens alone where `sampling.min_new_tokens` forbids them.
    """
    module, mask = architecture.decoder(config.model).clone(stacked=False), config.algorithm.mask
    if mask.top_p and config.sampling.min_new_tokens and mask.min_tokens <= len(stop_tokens):
        raise ValueError(f'algorithm.mask.min_tokens={mask.min_tokens} with sampling.min_new_tokens='
                         f'{config.sampling.min_new_tokens}: all of them may be stop tokens, of which there are '
                         f'{len(stop_tokens)}; set it to {len(stop_tokens) + 1} or more')
    return token_mask.MaskedDecoder(module, mask.top_p, mask.min_tokens, stop_tokens) if mask.top_p else module


def sampling_of(config: ml_collections.ConfigDict, stop_tokens: tuple[int, ...] = (),
                pad_token: int = 0) -> generate.Sampling:
    """How `config.sampling` draws, with the tokenizer's stop tokens and padding."""
    section = config.sampling
    return generate.Sampling(
        max_new_tokens=section.max_new_tokens, temperature=section.temperature, top_k=section.top_k,
        top_p=section.top_p, min_new_tokens=section.min_new_tokens, scored=section.scored, stop_tokens=stop_tokens,
        pad_token=pad_token)


def carries_stop_tokens(config: ml_collections.ConfigDict) -> bool:
    """Whether a batch must name its stop tokens, which could not be drawn early, or could always be drawn under a mask:
    the learner scores what the sampler drew from."""
    sampling = config.sampling
    return sampling.scored == 'drawn' and (sampling.min_new_tokens > 0 or config.algorithm.mask.top_p > 0)
