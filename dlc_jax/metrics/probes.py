"""Probes that read labels off frozen features: k nearest neighbours and a linear one (DINOv2, arXiv 2304.07193).

Features are float [N, F], or bare codes, integers [N, L]: those stand for their one-hot encoding [N, L * V], which is
never built. Two codes have as cosine the share of positions they agree in, and a linear map of a code sums one row a
position.
"""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlc_jax import codes as codes_lib

Array = jax.Array

METHODS = ('lbfgs', 'sgd')
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # `eval/linear.py`


class Linear(NamedTuple):
    """Linear classifier: `kernel` [F, C], or [L, V, C] for codes, and `bias` [C]."""
    kernel: Array
    bias: Array


# ---- Nearest neighbours --------------------------------------------------------------------------------------------

def knn_accuracy(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
                 test_labels: np.ndarray, *, num_classes: int, k: int | Sequence[int] = 20, temperature: float = 0.07,
                 block: int = 512) -> float | dict[int, float]:
    """Share of the test set that its `k` nearest training samples classify rightly.

    Neighbours vote with weight exp(cosine / temperature) (`eval/knn.py` of DINOv2, there for k of 10, 20, 100, 200).

    Args:
        k: one number, or several.
        block: test samples at a time; memory is `block` x N on the default device.

    Returns:
        The accuracy, or {k: accuracy} for several k.

    Raises:
        ValueError: fewer training samples than `k`, or features and labels that do not fit together.
    """
    _check(train_features, train_labels, test_features, test_labels, num_classes)
    ks = (k,) if isinstance(k, int) else tuple(k)
    if not 1 <= min(ks) <= max(ks) <= len(train_features):
        wrong = max(ks) if min(ks) > 0 else min(ks)
        raise ValueError(f'k={wrong}: choose from 1 to the {len(train_features)} training samples')
    prepare = _unit if _is_float(train_features) else jnp.asarray
    train, labels = prepare(train_features), jnp.asarray(train_labels, jnp.int32)
    rows = min(block, len(test_features))
    correct = dict.fromkeys(ks, 0)
    for start in range(0, len(test_features), rows):
        # The last block reaches back to have the shape of the others; only its new rows count.
        first = min(start, len(test_features) - rows)
        similarity, neighbours = _neighbours(prepare(test_features[first:first + rows]), train, labels, max(ks))
        similarity, neighbours = np.asarray(similarity)[start - first:], np.asarray(neighbours)[start - first:]
        weights = np.exp((similarity - similarity[:, :1]) / temperature)
        truth = np.asarray(test_labels[start:start + rows])
        for each in ks:
            votes = np.zeros((len(truth), num_classes))
            np.add.at(votes, (np.arange(len(truth))[:, None], neighbours[:, :each]), weights[:, :each])
            correct[each] += int((votes.argmax(1) == truth).sum())
    accuracy = {each: count / len(test_features) for each, count in correct.items()}
    return accuracy[k] if isinstance(k, int) else accuracy


@functools.partial(jax.jit, static_argnums=3)
def _neighbours(queries: Array, train: Array, labels: Array, k: int) -> tuple[Array, Array]:
    """Cosines and labels of the `k` most similar training samples, best first."""
    if _is_float(train):
        similarity = jnp.matmul(queries, train.T, precision='highest')
    else:
        similarity = 1 - codes_lib.pairwise_hamming(queries, train) / train.shape[1]
    similarity, index = jax.lax.top_k(similarity, k)
    return similarity, labels[index]


def _unit(features: np.ndarray) -> Array:
    x = jnp.asarray(features, jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# ---- Linear probe --------------------------------------------------------------------------------------------------

def linear_probe_accuracy(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
                          test_labels: np.ndarray, *, num_classes: int, vocab_size: int | None = None,
                          method: str = 'lbfgs', selection: str = 'split', validation: float = 0.1, seed: int = 0,
                          num_steps: int = 12_500, batch_size: int = 128,
                          learning_rates: Sequence[float] = LEARNING_RATES,
                          penalties: Sequence[float] = PENALTIES, max_iterations: int = 200) -> float:
    """Test accuracy of a linear classifier on frozen features.

    'lbfgs': logistic regression to its optimum, for small sets; `penalties` (times |kernel|² / 2) are tried. 'sgd':
    DINOv2's recipe, momentum 0.9, no decay, cosine to 0 over `num_steps` of `batch_size`, for all `learning_rates` at
    once (each times batch_size / 256); the features are fixed, so training images are not augmented. Float features
    are standardised for 'lbfgs', as a penalty has no scale of its own.

    Args:
        vocab_size: V of codes; None reads it off the largest token.
        selection: how the penalty or rate is chosen: 'split' on a share `validation` of the training set, after which
            the probe is trained on all of it; 'test' on the test set, as DINOv2 reports it and a little too good.
        seed: of that split, and of initialisation and order in 'sgd'.

    Raises:
        ValueError: another method, or features and labels that do not fit together.
    """
    _check(train_features, train_labels, test_features, test_labels, num_classes)
    for name, value, choices in (('method', method, METHODS), ('selection', selection, ('split', 'test'))):
        if value not in choices:
            raise ValueError(f'{name}={value!r} is not one of {choices}')
    x, y = _device(train_features), jnp.asarray(train_labels, jnp.int32)
    shape: tuple[int, ...]
    offset, scale = (x.mean(0), x.std(0) + 1e-6) if method == 'lbfgs' and _is_float(x) else (0.0, 1.0)
    if _is_float(x):
        x, shape = (x - offset) / scale, (x.shape[1], num_classes)
        test = (_device(test_features) - offset) / scale
    else:
        test = _device(test_features)
        largest = int(max(np.max(train_features), np.max(test_features)))
        vocab_size = vocab_size or largest + 1
        if largest >= vocab_size:
            raise ValueError(f'codes: token {largest} is outside 0..{vocab_size - 1}; check vocab_size')
        shape = (x.shape[1], vocab_size, num_classes)

    def fit(rows: np.ndarray, which: Sequence[float]) -> Linear:
        """Fits one probe for each setting in `which`, stacked, on these rows of the training set."""
        if method == 'lbfgs':
            weights = jnp.zeros(len(x)).at[rows].set(1 / len(rows))
            fits = [_fit_lbfgs(x, y, weights, penalty, shape, max_iterations) for penalty in which]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)
        rng = np.random.default_rng(seed)
        epochs = -(-num_steps * batch_size // len(rows))
        order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])[:num_steps * batch_size]
        rates = jnp.asarray(which, jnp.float32) * batch_size / 256
        return _fit_sgd(x, y, jnp.asarray(order.reshape(num_steps, batch_size)), rates, jax.random.key(seed), shape)

    settings, everything = (penalties if method == 'lbfgs' else learning_rates), np.arange(len(x))
    if selection == 'test':
        return max(_scores(fit(everything, settings), test, test_labels))[0]
    shuffled = np.random.default_rng(seed).permutation(len(x))
    num_validation = max(int(validation * len(x)), 1)
    chosen = settings[0]
    if len(settings) > 1:
        if num_validation >= len(x):
            raise ValueError(f'validation={validation}: {len(x)} training samples leave nothing to train on')
        probes = fit(shuffled[num_validation:], settings)
        # The split is small, so several settings may tie in accuracy; the loss tells them apart.
        scores = _scores(probes, x[shuffled[:num_validation]], np.asarray(train_labels)[shuffled[:num_validation]])
        chosen = settings[max(range(len(settings)), key=lambda i: scores[i])]
    return _scores(fit(everything, (chosen,)), test, test_labels)[0][0]


def _logits(probe: Linear, x: Array) -> Array:
    """Logits [N, C] of features [N, F] or codes [N, L]."""
    if _is_float(x):
        return jnp.matmul(x, probe.kernel, precision='highest') + probe.bias
    start = jnp.broadcast_to(probe.bias, (len(x), len(probe.bias)))
    return jax.lax.scan(lambda total, now: (total + now[0][now[1]], None), start, (probe.kernel, x.T))[0]


def _cross_entropy(probe: Linear, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(_logits(probe, x), y)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _fit_lbfgs(x: Array, y: Array, weights: Array, penalty: Array, shape: tuple[int, ...],
               max_iterations: int) -> Linear:
    """Minimises the cross entropy, averaged with `weights` [N], plus the penalty; one program for all splits."""
    def objective(probe: Linear) -> Array:
        return jnp.sum(weights * _cross_entropy(probe, x, y)) + penalty / 2 * jnp.sum(probe.kernel ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def body(carry):
        probe, state, count, _ = carry
        value, grad = value_and_grad(probe, state=state)
        updates, state = solver.update(grad, state, probe, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(probe, updates), state, count + 1, optax.tree.norm(grad)

    start = Linear(jnp.zeros(shape), jnp.zeros(shape[-1]))
    carry = (start, solver.init(start), 0, jnp.inf)
    return jax.lax.while_loop(lambda c: (c[2] < max_iterations) & (c[3] > 1e-5), body, carry)[0]


@functools.partial(jax.jit, static_argnums=5)
def _fit_sgd(x: Array, y: Array, order: Array, rates: Array, key: Array, shape: tuple[int, ...]) -> Linear:
    """One probe a rate, side by side, over the batches of indices `order` [steps, batch]."""
    def step(carry, now):
        probe, velocity = carry
        rows, progress = now
        grad = jax.grad(lambda p: _cross_entropy(p, x[rows], y[rows]).mean())
        grads = jax.vmap(grad)(probe)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        rate = rates * (1 + jnp.cos(jnp.pi * progress)) / 2
        probe = jax.tree.map(lambda p, v: p - rate.reshape(-1, *(1,) * (p.ndim - 1)) * v, probe, velocity)
        return (probe, velocity), None

    kernel = jnp.broadcast_to(0.01 * jax.random.normal(key, shape), (len(rates), *shape))
    probe = Linear(kernel, jnp.zeros((len(rates), shape[-1])))
    progress = jnp.arange(len(order)) / len(order)
    return jax.lax.scan(step, (probe, jax.tree.map(jnp.zeros_like, probe)), (order, progress))[0][0]


def _scores(probes: Linear, x: Array, labels: np.ndarray, *, block: int = 4096) -> list[tuple[float, float]]:
    """Accuracy and minus the cross entropy of each of the stacked `probes`."""
    labels = np.asarray(labels)
    sums = functools.reduce(np.add, (np.asarray(_score_sums(probes, x[i:i + block], labels[i:i + block]), np.float64)
                                     for i in range(0, len(labels), block)))
    return [(float(right) / len(labels), float(-loss) / len(labels)) for right, loss in sums.T]


@jax.jit
def _score_sums(probes: Linear, x: Array, labels: Array) -> Array:
    """Sums of right answers and of cross entropies, [2, probes]."""
    def one(probe: Linear) -> tuple[Array, Array]:
        logits = _logits(probe, x)
        right = jnp.sum(logits.argmax(1) == labels).astype(jnp.float32)
        return right, optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    return jnp.stack(jax.vmap(one)(probes))


# ---- Both ----------------------------------------------------------------------------------------------------------

def _is_float(features: np.ndarray | Array) -> bool:
    return jnp.issubdtype(features.dtype, jnp.floating)


def _device(features: np.ndarray) -> Array:
    return jnp.asarray(features, jnp.float32 if _is_float(features) else None)


def _check(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray,
           num_classes: int) -> None:
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(f'features of shapes {train_features.shape} and {test_features.shape}; '
                         'expected [N, F] and [M, F]')
    if _is_float(train_features) != _is_float(test_features):
        raise ValueError(f'features are {train_features.dtype} for training but {test_features.dtype} for testing; '
                         'integers are codes, floats are features')
    for name, features, labels in (('training', train_features, train_labels), ('test', test_features, test_labels)):
        if len(labels) != len(features) or not len(labels):
            raise ValueError(f'{name} set: {len(features)} features but {len(labels)} labels')
        if np.min(labels) < 0 or np.max(labels) >= num_classes:
            raise ValueError(f'{name} set: labels go from {np.min(labels)} to {np.max(labels)} '
                             f'but num_classes={num_classes}')
        if not np.isfinite(features).all():
            raise ValueError(f'{name} set: features hold values that are not finite')
