"""GPT-NeoX in plain PyTorch: the other side of `benchmarks/rlhf.py`, as one would write it by hand.

Parameters have the names of `transformers.GPTNeoXForCausalLM`, so that `rlhf_jax.convert` moves weights both ways. Rows
are not padded; every product of attention is PyTorch's fused one.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, rotary, cache, slots, visible):
        batch, length, width = x.shape
        qkv = self.query_key_value(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, -1)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            keys, values = cache
            if isinstance(slots, slice):  # known to Python: read the slots written so far and no others
                keys[:, :, slots], values[:, :, slots] = k, v
                k, v = keys[:, :, :slots.stop], values[:, :, :slots.stop]
            else:  # one compiled step for all lengths reads the whole cache
                k, v = keys.index_copy_(2, slots, k), values.index_copy_(2, slots, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None and length > 1)
        return self.dense(out.transpose(1, 2).reshape(batch, length, width))


def rotate(x, cos, sin):
    """Halves of the first `2 cos.shape[-1]` channels against each other; [B, H, T, D]."""
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int, eps: float):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention, self.mlp = Attention(width, num_heads), Mlp(width, hidden)

    def forward(self, x, *context):
        return x + self.attention(self.input_layernorm(x), *context) + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, vocab_size: int, width: int, depth: int, num_heads: int, hidden: int, eps: float):
        super().__init__()
        self.embed_in = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, num_heads, hidden, eps) for _ in range(depth))
        self.final_layer_norm = nn.LayerNorm(width, eps)


class GPTNeoX(nn.Module):
    """Logits of tokens [B, T], [B, L, V]: those that predict the last L = `response` tokens, by default all but the
    first; with a `cache`, those of the last token alone, [B, V]."""

    def __init__(self, *, vocab_size: int, width: int, depth: int, num_heads: int, max_length: int,
                 rotary_fraction: float = 0.25, rope_base: float = 10000.0, eps: float = 1e-5):
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.gpt_neox = Trunk(vocab_size, width, depth, num_heads, 4 * width, eps)
        self.embed_out = nn.Linear(width, vocab_size, bias=False)
        dim = int(width // num_heads * rotary_fraction)
        angle = torch.arange(max_length)[:, None] * rope_base ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)

    def forward(self, tokens, cache=None, slots=None, visible=None, response=0):
        x = self.trunk(tokens, cache, slots, visible)
        x = x[:, -(response or tokens.shape[1] - 1) - 1:-1] if cache is None else x[:, -1]
        return self.embed_out(self.gpt_neox.final_layer_norm(x))

    def trunk(self, tokens, cache=None, slots=None, visible=None):
        """Output of the last block, [B, T, D], before the norm."""
        where = slice(0, tokens.shape[1]) if slots is None else slots
        x = self.gpt_neox.embed_in(tokens)
        if torch.is_autocast_enabled(x.device.type):  # what runs between blocks is in the compute dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotary = self.cos[where].to(x.dtype), self.sin[where].to(x.dtype)
        for i, block in enumerate(self.gpt_neox.layers):
            x = block(x, rotary, None if cache is None else cache[i], slots, visible)
        return x

    def new_cache(self, batch: int, length: int):
        """Keys and values of every layer, [B, H, S, D] each, allocated once."""
        shape = batch, self.num_heads, length, self.width // self.num_heads
        make = functools.partial(torch.zeros, shape, dtype=self.embed_out.weight.dtype,
                                 device=self.embed_out.weight.device)
        return [(make(), make()) for _ in self.gpt_neox.layers]


def sample(logits, temperature: float):
    """Tokens [B, 1] and their log-probabilities [B]; temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True), logits.new_zeros(len(logits))
    probs = torch.softmax(logits.float() / temperature, -1)
    token = torch.multinomial(probs, 1)
    return token, probs.gather(1, token)[:, 0].log()


class Decoder:
    """Prefill, then one token after another into a static cache.

    Args:
        model: a `GPTNeoX`.
        compiled: one compiled step for all lengths, masked over the whole cache; else eager steps that read the slots
            written so far.
    """

    def __init__(self, model: GPTNeoX, batch: int, prompt: int, new: int, *, temperature: float,
                 compiled: bool = False):
        self.model, self.prompt, self.new, self.temperature, self.compiled = model, prompt, new, temperature, compiled
        device = model.embed_out.weight.device
        self.cache = model.new_cache(batch, prompt + new - 1)
        self.tokens = torch.zeros((batch, new), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((batch, new), device=device)
        self.slots = torch.arange(prompt + new, device=device)
        self.step = torch.compile(self._step, dynamic=False) if compiled else self._step

    def _step(self, token, slots):
        visible = (self.slots[:-1] <= slots)[None] if self.compiled else None
        return sample(self.model(token, self.cache, slots, visible), self.temperature)

    @torch.inference_mode()
    def __call__(self, prompts):
        """Tokens [B, N] and log-probabilities [B, N]; the same buffers at every call."""
        logits = self.model(prompts, self.cache, slice(0, self.prompt))
        token, logprob = sample(logits, self.temperature)
        self.tokens[:, 0], self.logprobs[:, 0] = token[:, 0], logprob
        for t in range(1, self.new):
            slot = self.prompt + t - 1
            token, logprob = self.step(token, self.slots[slot:slot + 1] if self.compiled else slice(slot, slot + 1))
            self.tokens[:, t], self.logprobs[:, t] = token[:, 0], logprob
        return self.tokens, self.logprobs


class GraphDecoder:
    """Prefill once a prompt, then `num_samples` responses to each from a static cache: a CUDA graph a token.

    What surrounds attention is compiled, attention reads only the slots written so far (so that PyTorch takes its flash
    kernel, which wants no mask), and the graph of every step is captured once and replayed. On a CPU the same steps run
    without graphs.

    Args:
        model: a `GPTNeoX` in the dtype to compute in.
        batch: prompts.
    """

    def __init__(self, model: GPTNeoX, batch: int, prompt: int, new: int, *, num_samples: int = 1,
                 temperature: float = 1.0):
        self.model, self.prompt, self.new = model, prompt, new
        self.num_samples, self.temperature = num_samples, temperature
        device, rows = model.embed_out.weight.device, batch * num_samples
        self.cache = model.new_cache(rows, prompt + new - 1)
        self.prefilled = self.cache if num_samples == 1 else model.new_cache(batch, prompt)
        self.token = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.tokens = torch.zeros((rows, new), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((rows, new), device=device)
        self.graphs: list = []
        on_gpu = device.type == 'cuda'
        wrap = functools.partial(torch.compile, dynamic=False) if on_gpu else lambda f: f
        self._before, self._after, self._last = wrap(_before), wrap(_after), wrap(self._logits_and_draw)
        if on_gpu:
            self._capture()

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets the libraries choose and allocate
                self._step(1)
        torch.cuda.current_stream().wait_stream(stream)
        pool = None
        for t in range(1, self.new):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(t)
            pool = pool or graph.pool()
            self.graphs.append(graph)

    def _logits_and_draw(self, x):
        logits = self.model.embed_out(self.model.gpt_neox.final_layer_norm(x[:, -1])).float()
        logprobs = torch.log_softmax(logits / self.temperature, -1)
        token = (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(-1, keepdim=True)
        return token, logprobs.gather(1, token)[:, 0]

    def _write(self, x, t: int) -> None:
        token, logprob = self._last(x)
        self.token.copy_(token)
        self.tokens[:, t], self.logprobs[:, t] = token[:, 0], logprob

    def _step(self, t: int) -> None:
        model, slot = self.model, self.prompt + t - 1
        x = model.gpt_neox.embed_in(self.token)
        cos, sin = model.cos[slot:slot + 1].to(x.dtype), model.sin[slot:slot + 1].to(x.dtype)
        for block, (keys, values) in zip(model.gpt_neox.layers, self.cache):
            q, k, v, rest = self._before(block, x, cos, sin)
            keys[:, :, slot:slot + 1], values[:, :, slot:slot + 1] = k, v
            x = self._after(block, F.scaled_dot_product_attention(q, keys[:, :, :slot + 1], values[:, :, :slot + 1]),
                            rest)
        self._write(x, t)

    @torch.inference_mode()
    def prefill(self, prompts) -> None:
        """Fills the cache and draws the first token."""
        x = self.model.trunk(prompts, self.prefilled, slice(0, self.prompt))[:, -1:]
        if self.num_samples > 1:
            for (keys, values), (k, v) in zip(self.cache, self.prefilled):
                keys[:, :, :self.prompt] = k.repeat(self.num_samples, 1, 1, 1)
                values[:, :, :self.prompt] = v.repeat(self.num_samples, 1, 1, 1)
        self._write(x.repeat(self.num_samples, 1, 1), 0)

    @torch.inference_mode()
    def __call__(self, prompts):
        """Tokens [K B, N] and log-probabilities [K B, N]; the same buffers at every call."""
        self.prefill(prompts)
        for t in range(1, self.new):
            if self.graphs:
                self.graphs[t - 1].replay()
            else:
                self._step(t)
        return self.tokens, self.logprobs


def _before(block, x, cos, sin):
    """Queries, keys and values of a parallel block, and all of its output that does not wait for them."""
    attention, length = block.attention, x.shape[1]
    qkv = attention.query_key_value(block.input_layernorm(x)).view(len(x), length, attention.num_heads, -1)
    q, k, v = qkv.transpose(1, 2).chunk(3, -1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v, x + block.mlp(block.post_attention_layernorm(x))


def _after(block, out, rest):
    return rest + block.attention.dense(out.transpose(1, 2).reshape(rest.shape))


def response_logprobs(model, tokens, length: int):
    """Log-probabilities [B, L] of the last `length` of `tokens` [B, T]."""
    logits = model(tokens, response=length).float()
    chosen = logits.gather(-1, tokens[:, -length:, None])[..., 0]
    return chosen - torch.logsumexp(logits, -1)


def dpo_loss(policy, reference, tokens, length: int, beta: float):
    """Mean DPO loss of `tokens` [B, 2, T], the chosen response of each pair first."""
    rows = tokens.flatten(0, 1)
    with torch.no_grad():
        ref = response_logprobs(reference, rows, length).sum(-1)
    h = (response_logprobs(policy, rows, length).sum(-1) - ref).view(-1, 2)
    return -F.logsigmoid(beta * (h[:, 0] - h[:, 1])).mean()
