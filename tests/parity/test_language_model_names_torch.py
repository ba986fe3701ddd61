"""At full size, by shape alone: the tensors, by name and shape, that `transformers` builds from published settings."""
import pytest

from hf_twins import file_name, torch, transformers
from rlhf_jax import convert
from rlhf_jax.models import gpt2, gpt_neox, llama, mistral, qwen2, qwen3

PYTHIA = dict(max_position_embeddings=2048, rotary_pct=0.25)
CASES = {
    'gpt2': ('gpt2', gpt2.GPT2(vocab_size=50257, **gpt2.SIZES['124M']), lambda: transformers.GPT2Config()),
    'pythia-410m': ('gpt_neox', gpt_neox.GPTNeoX(**gpt_neox.SIZES['410m']), lambda: transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        **PYTHIA)),
    'pythia-1b': ('gpt_neox', gpt_neox.GPTNeoX(**gpt_neox.SIZES['1b']), lambda: transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192,
        **PYTHIA)),
    'pythia-2.8b': ('gpt_neox', gpt_neox.GPTNeoX(**gpt_neox.SIZES['2.8b']), lambda: transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10240,
        **PYTHIA)),
    'pythia-6.9b': ('gpt_neox', gpt_neox.GPTNeoX(**gpt_neox.SIZES['6.9b']), lambda: transformers.GPTNeoXConfig(
        vocab_size=50432, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=16384,
        **PYTHIA)),
    'llama-7b': ('llama', llama.Llama(**llama.SIZES['7B']), lambda: transformers.LlamaConfig()),
    'llama-3.1-8b': ('llama', llama.Llama(**llama.SIZES['3.1-8B']), lambda: transformers.LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, rms_norm_eps=1e-5,
        max_position_embeddings=131072, rope_parameters=dict(
            rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192))),
    'mistral-7b-v0.1': ('mistral', llama.Llama(**mistral.SIZES['7B-v0.1']), lambda: transformers.MistralConfig(
        rms_norm_eps=1e-5, max_position_embeddings=32768)),
    'qwen2.5-0.5b': ('qwen2', llama.Llama(**qwen2.SIZES['2.5-0.5B']), lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=1e6))),
    'qwen3-0.6b': ('qwen3', llama.Llama(**qwen3.SIZES['0.6B']), lambda: transformers.Qwen3Config(
        vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=3072, tie_word_embeddings=True, max_position_embeddings=40960,
        rope_parameters=dict(rope_type='default', rope_theta=1e6))),
}


@pytest.mark.parametrize('name', CASES)
def test_names_and_shapes(name):
    kind, module, config = CASES[name]
    with torch.device('meta'):
        model = transformers.AutoModelForCausalLM.from_config(config())
    want = {file_name(model, key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert convert.tensor_shapes(kind, module) == want
    # And the settings themselves: a module made from them is the named size.
    made = convert.module_of(kind, model.config.to_dict())
    assert convert.config_of(kind, made) == convert.config_of(kind, module)
