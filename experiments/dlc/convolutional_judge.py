"""A convolutional classifier with the methods of `judge.Judge`, for pictures that a perceptron reads badly."""
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime import evaluation

WIDTHS = (48, 96, 192)  # of the three layers, each at half the side of the one before it
BATCH, BLOCK = 128, 512  # images a step of training at most, and images judged at once
SHIFT = 2  # pixels that a batch is moved by at most while training


class Network(nn.Module):
    """Three convolutions, a mean over the places that are left, two dense layers: [N, H, W, C] -> [N, F], [N, C]."""
    features: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for stage, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), strides=2 if stage else 1)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        features = nn.relu(nn.Dense(self.features)(x.mean((1, 2))))
        return features, nn.Dense(self.num_classes)(features)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionalJudge:
    """A trained classifier. Its last hidden layer is the feature space, its output the opinion.

    Attributes:
        network: its module.
        params: its parameters.
        classes: int [C], ascending: what the columns of `probabilities` stand for.
    """
    network: Network
    params: Any
    classes: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray, labels: np.ndarray, *, flip: bool, features: int = 64, epochs: int = 15,
            seed: int = 0) -> 'ConvolutionalJudge':
        """Trains on `images` uint8 [N, H, W, C] of classes `labels` int [N].

        Args:
            flip: whether a mirrored picture is of the same class; half of those it sees then are.
            epochs: passes over the images.
        """
        classes, targets = np.unique(labels, return_inverse=True)
        network, rng = Network(features, len(classes)), np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
        batch = min(BATCH, len(images))
        order = order[:len(order) // batch * batch].reshape(-1, batch)
        params = _train(network, flip, jnp.asarray(images), jnp.asarray(targets), order,
                        jax.random.key(seed))
        return cls(network, params, classes)

    def _see(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features float64 [N, F] and probabilities float64 [N, C]."""
        seen = [jax.tree.map(np.asarray, _forward(self.network, self.params, images[chosen]))
                for chosen, _ in evaluation.full_batches(len(images), BLOCK)]
        features, logits = (np.concatenate(parts)[:len(images)].astype(np.float64) for parts in zip(*seen))
        return features, np.asarray(nn.softmax(logits))

    def features(self, images: np.ndarray) -> np.ndarray:
        """float64 [N, F]: activations of the last hidden layer."""
        return self._see(images)[0]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """[N, C]."""
        return self._see(images)[1]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """int [N]."""
        return self.classes[self.probabilities(images).argmax(1)]


def _scaled(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnums=0)
def _forward(network: Network, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return network.apply({'params': params}, _scaled(images))


def _train(network: Network, flip: bool, images: jax.Array, targets: jax.Array, order: np.ndarray,
           key: jax.Array) -> Any:
    """Parameters after one step of AdamW a row of `order` [steps, batch], the learning rate falling to 0."""
    init_key, key = jax.random.split(key)
    params = jax.jit(network.init)(init_key, _scaled(images[:1]))['params']
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, len(order)), weight_decay=0.01)

    def distorted(key: jax.Array, x: jax.Array) -> jax.Array:
        move_key, flip_key = jax.random.split(key)
        x = jnp.roll(x, jax.random.randint(move_key, (2,), -SHIFT, SHIFT + 1), (1, 2))
        mirrored = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (len(x), 1, 1, 1))
        return jnp.where(mirrored, x[:, :, ::-1], x)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, images: jax.Array, targets: jax.Array, rows: jax.Array,
             number: jax.Array) -> tuple[Any, Any]:
        x = distorted(jax.random.fold_in(key, number), _scaled(images[rows]))

        def loss(params):
            _, logits = network.apply({'params': params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows]).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number, rows in enumerate(order):  # not a scan: convolutions in a loop of XLA's are slow on the CPU
        params, state = step(params, state, images, targets, rows, np.int32(number))
    return params
