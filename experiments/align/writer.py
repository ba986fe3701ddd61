"""The second kind of policy: a masked-diffusion model that writes the code of a caption, in any order.

Its scores are of two sorts (`config.likelihood`, `dlc_jax.likelihood`):

    bound    a lower bound on log p(code | caption), estimated at `num` sets of masked positions that the policy, the
             reference and all codes of a caption share. Differences of sums mean something, ratios do not
    exact    log-probabilities of the tokens as they were drawn, of `num` of the sampler's steps (0: all). Their ratios
             between two policies are exact; sums over the steps that count are scaled to estimate those over all
"""
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from dlc_jax import likelihood, text_to_code
from experiments.dlc import text_to_code as text_to_code_lib
from experiments.dlc.text_to_code import make_model, make_sampling, make_words
from experiments.rlhf.policy.kind import RATIOS, SEQUENCE_RATIOS, VALUES, Networks, Params, Rows
from experiments.runtime import checks, partition
from rlhf_jax.models import llama, lora

Array = jax.Array
Config = ml_collections.ConfigDict

LIKELIHOODS = ('bound', 'exact')


def check(config: Config) -> None:
    """Raises a ValueError for settings of the model, its sampler and its scores that cannot work."""
    model, sampling, section = make_model(config), make_sampling(config), config.likelihood
    length = config.model.num_codes + 1 + config.caption_length
    if config.caption_length < 1 or length > model.max_length:
        raise ValueError(f'model.num_codes={config.model.num_codes}, a separator and caption_length='
                         f'{config.caption_length} must be at most model.max_length={model.max_length} tokens')
    if sampling.temperature <= 0:
        raise ValueError(f'sampler.temperature={sampling.temperature} must be positive: without chance the codes of a '
                         'caption would be alike')
    checks.choice('likelihood.kind', section.kind, LIKELIHOODS)
    most = sampling.num_steps if section.kind == 'exact' else config.model.num_codes
    if not int(section.kind == 'bound') <= section.num <= most:
        raise ValueError(f'likelihood.num={section.num} must be in {int(section.kind == "bound")}..{most}: ' + (
            'steps of the sampler, 0 for all' if section.kind == 'exact' else 'sets of masked positions'))
    if section.kind == 'exact' and sampling.remasking == 'low_confidence':
        raise ValueError("sampler.remasking='low_confidence' fills the positions in an order that depends on the "
                         "policy, so what it drew has no probability that can be scored; set sampler.remasking=random, "
                         'or likelihood.kind=bound')
    for name in ('chunk', 'slots'):
        if config.rollout[name]:
            raise ValueError(f'rollout.{name}={config.rollout[name]}: codes of one length are all sampled together, '
                             'under one version of the weights; set it to 0')
    if config.reward.missing_eos != '':
        raise ValueError(f"reward.missing_eos={config.reward.missing_eos!r}: a code has no end token; leave it ''")


def refusals(config: Config) -> dict[str, str]:
    """{use: why the scores of this policy may not be used so}; see `kind.Kind`."""
    out = {VALUES: 'it needs a critic, whose value at each token is that of a text read up to it; a code is written in '
                   'any order. Use rloo or grpo, which compare the codes of a caption'}
    if config.likelihood.kind == 'bound':
        reason = 'it needs the probabilities that tokens were drawn with, of which likelihood.kind=bound says nothing'
        if config.sampler.remasking == 'low_confidence':
            reason += ("; and sampler.remasking='low_confidence' fills positions in an order that depends on the "
                       'policy, which leaves samples, stale ones above all, without such a probability: set '
                       'sampler.remasking=random and likelihood.kind=exact, or use online_dpo or best_of_n')
        else:
            reason += ': set likelihood.kind=exact'
        out |= {RATIOS: reason, SEQUENCE_RATIOS: reason}
    elif 0 < config.likelihood.num < make_sampling(config).num_steps:
        out[SEQUENCE_RATIOS] = (
            f'it needs the ratio of whole codes, which likelihood.num={config.likelihood.num} of the '
            f'{make_sampling(config).num_steps} steps of the sampler do not give without bias: set likelihood.num=0, '
            'or use grpo, whose ratios are of tokens')
    return out


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a rollout batch, [B, K, ...]: the caption where a text has its prompt, the code as its response."""
    def shape(dtype, *more):
        return jax.ShapeDtypeStruct((config.batch_size, config.algorithm.num_samples, *more), dtype)
    length, prompt = config.model.num_codes, config.caption_length
    return {'tokens': shape(jnp.int32, prompt + length), 'prompt_mask': shape(bool, prompt),
            'mask': shape(bool, length), 'logprobs': shape(jnp.float32, length), 'filled_at': shape(jnp.int32, length),
            'policy_version': shape(jnp.int32, length)}


class CodeWriter(Networks):
    """The text-to-code model, with or without an adapter."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._model, self._words, self._sampling = make_model(config), make_words(config), make_sampling(config)
        self._num = config.likelihood.num
        self.as_drawn = config.likelihood.kind == 'exact'
        if self.as_drawn:
            self._num = self._num or self._sampling.num_steps
            self.scale = self._sampling.num_steps / self._num
        self.columns = ('tokens', 'prompt_mask', 'mask', *(('filled_at', 'steps') if self.as_drawn else ('masks',)))
        self.rules = (*lora.PARTITION_RULES, *partition.prefixed('policy', llama.PARTITION_RULES))

    def init(self, key: Array) -> Params:
        return {'policy': text_to_code_lib.init_params(self._config, key)}

    def load(self, params: Params) -> Params:
        """See `Networks.load`: a run of text_to_code or align in `weights`, or released weights in `pretrained`."""
        return dict(params, policy=text_to_code_lib.load_weights(self._config, params['policy']))

    def annotated(self, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        """The batch with `masks` bool [B, K, n, L], or with `steps` int32 [B, K, n] and only what they filled counted;
        those of a caption are the same for all of its codes."""
        num_prompts, num_samples, length = batch['mask'].shape
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_prompts))
        of_each = lambda x: jnp.broadcast_to(x[:, None], (num_prompts, num_samples, *x.shape[1:]))
        if not self.as_drawn:
            masks = jax.vmap(lambda key: likelihood.draw_masks(key, self._num, length))(keys)
            return batch | {'masks': of_each(masks)}
        steps = of_each(jax.vmap(lambda key: likelihood.draw_steps(key, self._num, self._sampling.num_steps))(keys))
        filled = (batch['filled_at'][..., None, :] == steps[..., None]).any(-2)
        return batch | {'steps': steps, 'mask': batch['mask'] & filled}

    def forward(self, params: Params, rows: Rows) -> tuple[Array, None]:
        """Terms of the bound, or log-probabilities as drawn where they count and 0 elsewhere: float32 [b, C, L]."""
        shape, v = rows['mask'].shape, self._words.num_codes
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
        codes = flat['tokens'][:, -shape[-1]:] - self._words.separator - 1
        logits_of = self._versions(params['policy'], flat['tokens'][:, :-shape[-1]], flat['prompt_mask'])
        if self.as_drawn:
            scores = likelihood.sampled_terms(logits_of, codes, flat['filled_at'], flat['steps'], v,
                                              self._sampling.temperature)[0]
        else:
            scores = likelihood.bound_terms(logits_of, codes, flat['masks'], v)
        return scores.reshape(shape), None

    def _versions(self, policy: Any, captions: Array, caption_mask: Array) -> likelihood.LogitsOf:
        """The network of these captions for several versions of the code of each, guided where the sampler is and the
        scores are of what it drew."""
        guidance = self._sampling.guidance if self.as_drawn else 0.0

        def logits_of(codes: Array) -> Array:
            count, num, length = codes.shape
            captions_of, masks_of = (jnp.repeat(x, num, 0) for x in (captions, caption_mask))
            run = text_to_code.network(self._model, policy, captions_of, masks_of, self._words, length,
                                       guidance=guidance)
            return run(codes.reshape(count * num, length)).reshape(count, num, length, -1)
        return logits_of
