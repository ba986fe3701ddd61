"""Qwen3 (arXiv 2505.09388), its dense models: LLaMA whose queries and keys are normed head by head.

    module = Llama(**SIZES['0.6B'])
"""
from rlhf_jax.models.llama import LORA_TARGETS, PARTITION_RULES, Llama

__all__ = ['LORA_TARGETS', 'Llama', 'PARTITION_RULES', 'SIZES']

_COMMON = dict(vocab_size=151936, num_kv_heads=8, head_dim=128, qk_norm=True, rope_base=1e6, eps=1e-6, max_length=40960)

SIZES = {
    '0.6B': dict(width=1024, depth=28, num_heads=16, hidden=3072, tied=True, **_COMMON),
    '1.7B': dict(width=2048, depth=28, num_heads=16, hidden=6144, tied=True, **_COMMON),
    '4B': dict(width=2560, depth=36, num_heads=32, hidden=9728, tied=True, **_COMMON),
    '8B': dict(width=4096, depth=36, num_heads=32, hidden=12288, **_COMMON),
    '14B': dict(width=5120, depth=40, num_heads=40, hidden=17408, **_COMMON),
    '32B': dict(width=5120, depth=64, num_heads=64, hidden=25600, **_COMMON),
}
