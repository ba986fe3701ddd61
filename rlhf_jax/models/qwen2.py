"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): LLaMA whose query, key and value projections have a bias.

    module = Llama(**SIZES['2.5-0.5B'])
"""
from rlhf_jax.models.llama import LORA_TARGETS, PARTITION_RULES, Llama

__all__ = ['LORA_TARGETS', 'Llama', 'PARTITION_RULES', 'SIZES']

_COMMON = dict(qkv_bias=True, rope_base=1e6, eps=1e-6, max_length=32768)

# `max_length` is that of the instruction-tuned models; some base models say 131072.
SIZES = {
    '2.5-0.5B': dict(vocab_size=151936, width=896, depth=24, num_heads=14, num_kv_heads=2, hidden=4864, tied=True,
                     **_COMMON),
    '2.5-1.5B': dict(vocab_size=151936, width=1536, depth=28, num_heads=12, num_kv_heads=2, hidden=8960, tied=True,
                     **_COMMON),
    '2.5-3B': dict(vocab_size=151936, width=2048, depth=36, num_heads=16, num_kv_heads=2, hidden=11008, tied=True,
                   **_COMMON),
    '2.5-7B': dict(vocab_size=152064, width=3584, depth=28, num_heads=28, num_kv_heads=4, hidden=18944, **_COMMON),
}
