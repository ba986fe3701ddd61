"""What a frozen representation knows of the classes: k nearest neighbours and a linear probe (DINOv2, arXiv 2304.07193)."""
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax


def knn_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, num_classes: int,
                 k: int = 20, temperature: float = 0.07, block: int = 1024) -> float:
    """Share of test rows that their k nearest training rows vote into the right class.

    Features [N, F] are L2-normalised; a neighbour at cosine similarity s votes with weight exp(s / temperature).
    """
    if k > len(train):
        raise ValueError(f'k={k} neighbours asked for among {len(train)} training rows')
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    train, test, correct = unit(np.asarray(train, np.float32)), unit(np.asarray(test, np.float32)), 0
    for start in range(0, len(test), block):
        similarity = test[start:start + block] @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
        votes = np.zeros((len(nearest), num_classes))
        np.add.at(votes, (np.arange(len(nearest))[:, None], np.asarray(train_labels)[nearest]), weights)
        correct += int((votes.argmax(1) == np.asarray(test_labels)[start:start + block]).sum())
    return correct / len(test)


def linear_probe_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *,
                          num_classes: int, weight_decays: Sequence[float] = (1e-4, 1e-3, 1e-2), validation: float = 0.2,
                          max_steps: int = 200, seed: int = 0) -> float:
    """Test accuracy of multinomial logistic regression on standardised features [N, F].

    The weight decay is the one that does best on a held-back share of the training rows; the probe is then fitted on all of
    them. For sets that fit into memory.
    """
    train, test = np.asarray(train, np.float32), np.asarray(test, np.float32)
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    labels, test_labels = np.asarray(train_labels, np.int32), np.asarray(test_labels, np.int32)
    order = np.random.default_rng(seed).permutation(len(train))
    held, kept = order[:int(len(order) * validation)], order[int(len(order) * validation):]

    def accuracy(params, x, y):
        return float((np.argmax(x @ params['w'] + params['b'], 1) == y).mean())

    def fitted(rows, decay):
        return jax.device_get(_fit(train[rows], labels[rows], decay, num_classes, max_steps))
    best = max(weight_decays, key=lambda decay: accuracy(fitted(kept, decay), train[held], labels[held]))
    return accuracy(fitted(order, best), test, test_labels)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _fit(x, y, decay, num_classes, max_steps):
    """L-BFGS on the regularised cross entropy, from zero."""
    def loss(params):
        logits = x @ params['w'] + params['b']
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + 0.5 * decay * jnp.sum(params['w'] ** 2)

    tx = optax.lbfgs()
    params = {'w': jnp.zeros((x.shape[1], num_classes)), 'b': jnp.zeros(num_classes)}
    value_and_grad = optax.value_and_grad_from_state(loss)

    def body(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), None, length=max_steps)
    return params
