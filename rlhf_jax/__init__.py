"""Reinforcement learning from human feedback in JAX/Flax: language models and their sampler, losses, asynchronous
rollouts, Elastic Reset, weight conversion.

    import rlhf_jax
    loss, metrics = rlhf_jax.losses.online_dpo(...)
    from rlhf_jax.losses import online_dpo  # the same

Models are Linen modules, everything else is pure functions and small classes. Importing the package costs nothing: a
public name is imported when it is first asked for.

Conventions shared by all of it:

    B, K      prompts of a batch, and completions of each: every array of completions is [B, K, ...], from the sampler
              to the loss
    L         response tokens; P, prompt tokens
    mask      [B, K, L], True where a token counts: up to and including EOS, nothing after it
    logprobs  [B, K, L] float32, of the tokens under the distribution that was sampled from (its temperature included)
    rewards   [B, K], one scalar a completion; NaN where it has none
"""
import importlib
from typing import Any

__version__ = '0.1.0'  # of both libraries; setup.py reads it here

# name -> module, or module:attribute
_PUBLIC = {
    # modules
    'advantages': 'advantages',
    'convert': 'convert',
    'elastic_reset': 'elastic_reset',
    'generate': 'generate',
    'kl': 'kl',
    'logprobs': 'logprobs',
    'lora': 'models.lora',
    'losses': 'losses',
    'masked': 'masked',
    'refill': 'refill',
    'responses': 'responses',
    'token_mask': 'token_mask',
    'tokenizers': 'tokenizers',
    'weights': 'weights',
    # models
    'GPT2': 'models.gpt2:GPT2',
    'GPTNeoX': 'models.gpt_neox:GPTNeoX',
    'Llama': 'models.llama:Llama',
    'PolicyAndValue': 'models.heads:PolicyAndValue',
    'RewardModel': 'models.heads:RewardModel',
    'Seq2Seq': 'models.seq2seq:Seq2Seq',
    'split_blocks': 'models.decoder:split_blocks',
    # methods
    'ElasticReset': 'elastic_reset:ElasticReset',
    'RolloutStream': 'rollout.stream:RolloutStream',
    'Sampling': 'generate:Sampling',
}
__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has {", ".join(__all__)}')
    module, _, attribute = _PUBLIC[name].partition(':')
    value = importlib.import_module(f'{__name__}.{module}')
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
