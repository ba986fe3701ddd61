"""A DiT conditioned on codes, in a plain optax loop: `python examples/dit_on_codes.py`.

The images are scikit-learn's handwritten digits, 8 x 8 pixels. The code of one is the brightness of its sixteen blocks
of 2 x 2 pixels in eight grades, 16 tokens of 8 values; put the codes of your own encoder in its place. Prints how far
the blocks of generated images are from the code they were made from, and from the code of another image.
"""
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from dlc_jax.diffusion.gaussian import GaussianDiffusion, guided
from dlc_jax.models.dit import DiT

GRADES = 8


def blocks(images):
    """Mean brightness in [-1, 1] of the blocks of images [N, 8, 8, 1]: [N, 16]."""
    return images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)


def encode(images):
    return np.clip((blocks(images) + 1) / 2 * GRADES, 0, GRADES - 1).astype(np.int32)


def main(steps: int = 1500, batch_size: int = 64) -> dict[str, float]:
    images = (load_digits().images[..., None] / 8 - 1).astype(np.float32)
    codes = encode(images)
    model = DiT(input_size=8, channels=1, patch_size=2, width=96, depth=3, num_heads=3, condition='code', num_codes=16,
                vocab_size=GRADES, time_init_std=0.1, code_init_std=1.0)
    diffusion = GaussianDiffusion(beta_end=0.01)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(steps // 20, 1), max(steps, 2)))
    params = jax.jit(model.init)(jax.random.key(0), images[:1], jnp.zeros(1, jnp.int32), codes[:1])['params']
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x, code, key):
        noise_key, drop_key = jax.random.split(key)

        def loss(params):
            network = lambda x_t, t: model.apply({'params': params}, x_t, t, code, train=True,
                                                 rngs={'dropout': drop_key})
            return diffusion.loss(network, noise_key, x)[0]
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    rng = np.random.default_rng(0)
    for k in range(steps):
        rows = rng.integers(len(images), size=batch_size)
        params, opt_state, value = step(params, opt_state, images[rows], codes[rows], jax.random.key(k + 1))
        if k % 250 == 0 or k == steps - 1:
            print(f'step {k}: loss {float(value):.3f}', flush=True)

    @jax.jit
    def sample(params, code, key):
        predict = lambda x, t, code, drop: model.apply({'params': params}, x, t, code, drop=drop)
        return diffusion.respaced(50).sample(guided(predict, code, scale=1.5), key, (len(code), 8, 8, 1))
    wanted = codes[:64]
    made = np.asarray(sample(params, wanted, jax.random.key(0)))
    middle = (wanted + 0.5) / GRADES * 2 - 1
    found = {'own code': float(np.abs(blocks(made) - middle).mean()),
             'another code': float(np.abs(blocks(made) - np.roll(middle, 1, 0)).mean())}
    print('mean distance of blocks from', ', '.join(f'{name} {value:.3f}' for name, value in found.items()))
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=1500)
    main(parser.parse_args().steps)
