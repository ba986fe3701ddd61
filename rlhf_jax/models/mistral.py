"""Mistral 7B (arXiv 2310.06825): LLaMA, of which the first release attends within a window.

    module = Llama(**SIZES['7B-v0.1'])
"""
from rlhf_jax.models.llama import LORA_TARGETS, PARTITION_RULES, Llama

__all__ = ['LORA_TARGETS', 'Llama', 'PARTITION_RULES', 'SIZES']

_COMMON = dict(width=4096, depth=32, num_heads=32, num_kv_heads=8, hidden=14336, eps=1e-5, max_length=32768)

SIZES = {
    '7B-v0.1': dict(vocab_size=32000, window=4096, rope_base=1e4, **_COMMON),
    '7B-v0.2': dict(vocab_size=32000, rope_base=1e6, **_COMMON),
    '7B-v0.3': dict(vocab_size=32768, rope_base=1e6, **_COMMON),
}
