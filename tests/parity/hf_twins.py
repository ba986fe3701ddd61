"""Tiny `transformers` models with every tensor random, the originals that the language models are held against."""
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64)
LLAMA3_ROPE = dict(rope_type='llama3', rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)

CONFIGS = {
    'gpt2': lambda: transformers.GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    'pythia': lambda: transformers.GPTNeoXConfig(**TINY, rotary_pct=0.25),
    'neox-serial': lambda: transformers.GPTNeoXConfig(**TINY, rotary_pct=0.5, use_parallel_residual=False,
                                                      rotary_emb_base=500, hidden_act='gelu_new'),
    'llama': lambda: transformers.LlamaConfig(**TINY, rms_norm_eps=1e-5),
    'llama3': lambda: transformers.LlamaConfig(**TINY, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE,
                                               tie_word_embeddings=True),
    'llama-biases': lambda: transformers.LlamaConfig(
        **TINY, num_key_value_heads=1, head_dim=6, attention_bias=True, mlp_bias=True,
        rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.0)),
    'mistral': lambda: transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=3, head_dim=10),
    'qwen2': lambda: transformers.Qwen2Config(
        **TINY, num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4,
        max_window_layers=0),
    'qwen3': lambda: transformers.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=12),
}
KINDS = {name: name for name in CONFIGS} | {
    'pythia': 'gpt_neox', 'neox-serial': 'gpt_neox', 'llama3': 'llama', 'llama-biases': 'llama'}


# What writes to the residual stream: 0.02 of the rest, so that its variance is near the norms' epsilon, without which
# another epsilon would pass for the right one. A head tied to such an embedding needs large features.
STREAM = ('wte.', 'wpe.', 'c_proj.', 'embed_in.', 'dense.', 'dense_4h_to_h.', 'embed_tokens.', 'o_proj.', 'down_proj.')
LAST_NORM = ('ln_f.weight', 'final_layer_norm.weight', 'model.norm.weight')


def twin(name, cls='ForCausalLM', *, seed=0, **fields):
    """A model of `transformers` whose tensors are all Normal, scales of norms about 1."""
    config = CONFIGS[name]()
    config.update(fields | dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0) if name == 'gpt2' else fields)
    family = {'gpt2': 'GPT2', 'gpt_neox': 'GPTNeoX', 'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2',
              'qwen3': 'Qwen3'}[KINDS[name]]
    cls = 'LMHeadModel' if family == 'GPT2' and cls == 'ForCausalLM' else cls
    config._attn_implementation = 'eager'
    model = getattr(transformers, family + cls)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = key.endswith('weight') and parameter.ndim == 1
            parameter.normal_(float(norm), 0.2, generator=generator)
            if any(part in key for part in STREAM):
                parameter *= 0.02
            if key.endswith(LAST_NORM) and hasattr(model, 'lm_head') and config.tie_word_embeddings:
                parameter *= 50
    return model


def file_name(model, name):
    """What released files call the tensor; transformers 5 renames one of GPT-NeoX as it reads them."""
    return name.replace('lm_head', 'embed_out') if model.config.model_type == 'gpt_neox' else name


def file_names(model, tensors):
    """{name in memory: tensor} -> {name in released files: tensor}."""
    return {file_name(model, name): tensor for name, tensor in tensors.items()}


def state_dict(model):
    """Its tensors as numpy arrays, under the names of released files."""
    return file_names(model, {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()})
