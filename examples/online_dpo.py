"""Online DPO from a Hugging Face folder with a reward of one's own: `python examples/online_dpo.py FOLDER`.

FOLDER holds config.json, weights and tokenizer.json of a GPT-2, GPT-NeoX (Pythia) or LLaMA model. Without one, a small
random model that speaks bytes is trained. The reward, put yours in its place, is the share of vowels in a response.
"""
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import convert, generate, tokenizers
from rlhf_jax.logprobs import response_logprobs
from rlhf_jax.losses import online_dpo
from rlhf_jax.models.decoder import split_blocks
from rlhf_jax.models.gpt_neox import GPTNeoX
from rlhf_jax.weights.files import load_state_dict, read_config

PROMPTS = ('The weather today is', 'My favourite food is', 'Once upon a time', 'In the morning I')
SAMPLES, TOKENS, TEMPERATURE = 4, 16, 1.0


def reward(text: str) -> float:
    return sum(c in 'aeiou' for c in text) / max(len(text), 1)


def open_model(folder: str | None):
    if folder:
        settings = read_config(folder)
        module, params = convert.from_torch(settings['model_type'], load_state_dict(folder), config=settings)
        return module, params, tokenizers.JsonTokenizer(folder)
    module = GPTNeoX(vocab_size=259, width=64, depth=2, num_heads=4, max_length=128)
    params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    return module, params, tokenizers.ByteTokenizer()


def main(folder: str | None = None, steps: int = 60) -> list[float]:
    module, params, tokenizer = open_model(folder)
    reference = params  # never donated, so it stays as it is
    optimizer = optax.adam(1e-3 if folder is None else 1e-6)
    opt_state = optimizer.init(params)
    prompts, prompt_mask = generate.pad_prompts([tokenizer.encode(p) for p in PROMPTS], buckets=(32,))
    sampling = generate.Sampling(max_new_tokens=TOKENS, temperature=TEMPERATURE, stop_tokens=(tokenizer.eos,))

    def logprobs(params, tokens, mask):
        """Log-probabilities [B, K, L] of responses in `tokens` [B, K, P + L], at the temperature they were drawn at."""
        flat = lambda x: x.reshape(-1, x.shape[-1])
        logits = module.apply({'params': params}, flat(tokens), mask=flat(mask))
        return response_logprobs(logits, flat(tokens), TOKENS, TEMPERATURE).reshape(*tokens.shape[:2], TOKENS)

    @jax.jit
    def step(params, opt_state, tokens, mask, rewards):
        response = mask[..., -TOKENS:]
        ref = logprobs(reference, tokens, mask)
        loss = lambda params: online_dpo(logprobs(params, tokens, mask), ref, response, rewards, beta=0.1)
        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    history = []
    repeat = lambda x: jnp.repeat(jnp.asarray(x)[:, None], SAMPLES, 1)  # [B, P] -> [B, K, P]
    for k in range(steps):
        drawn = generate.generate(*split_blocks(module, params), prompts, prompt_mask, jax.random.key(k), sampling,
                                  num_samples=SAMPLES)
        rewards = np.array([[reward(tokenizer.decode(ids[kept].tolist())) for ids, kept in zip(*row)]
                            for row in zip(np.asarray(drawn.tokens), np.asarray(drawn.mask))], np.float32)
        tokens = jnp.concatenate([repeat(prompts), drawn.tokens], -1)
        mask = jnp.concatenate([repeat(prompt_mask), drawn.mask], -1)
        params, opt_state, metrics = step(params, opt_state, tokens, mask, rewards)
        history.append(float(rewards.mean()))
        if k % 10 == 0 or k == steps - 1:
            print(f'step {k}: reward {history[-1]:.3f}', flush=True)
    return history


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?')
    parser.add_argument('--steps', type=int, default=60)
    main(**vars(parser.parse_args()))
