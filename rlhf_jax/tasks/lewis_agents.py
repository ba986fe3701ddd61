"""The Lewis game itself: objects, the given language, and two linear agents (`lewis.py` has what they learn by)."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Game:
    """Attributes: `properties` p and `types` t of each; there are t ** p objects and p t symbols."""
    properties: int = 5
    types: int = 5

    @property
    def num_symbols(self) -> int:
        return self.properties * self.types

    def objects(self) -> np.ndarray:
        """Every object, int32 [t ** p, p], the last property changing fastest."""
        grid = np.indices((self.types,) * self.properties)
        return grid.reshape(self.properties, -1).T.astype(np.int32)

    def split(self, rng: np.random.Generator, *, supervised: float = 0.0064,
              self_play: float = 0.0097) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Disjoint objects to learn the language from, to play with, and held out: shares of all, the rest last.

        Raises:
            ValueError: a part would be empty.
        """
        objects = rng.permutation(self.objects())
        first, second = round(supervised * len(objects)), round(self_play * len(objects))
        parts = objects[:first], objects[first:first + second], objects[first + second:]
        for name, part in zip(('supervised', 'self_play', 'held out'), parts):
            if not len(part):
                raise ValueError(f'{name}: no object of {len(objects)} is left for it; change supervised={supervised} '
                                 f'or self_play={self_play}')
        return parts

    def messages(self, objects: Array) -> Array:
        """Messages of the given language about objects: int [..., p] -> symbols [..., p], i t + type for property i."""
        return objects + self.types * jnp.arange(self.properties)

    def encode(self, objects: Array) -> Array:
        """One-hot properties, side by side: int [..., p] -> float32 [..., p t]."""
        return jax.nn.one_hot(objects, self.types).reshape(*objects.shape[:-1], self.num_symbols)


# ---- Agents --------------------------------------------------------------------------------------------------------

def init(key: Array, game: Game, hidden: int = 200, scale: float = 0.1) -> Params:
    """Fresh agents; weights and biases from N(0, scale^2). The speaker holds its value head (for A2C)."""
    shapes = {
        'speaker': {'hidden': {'kernel': (game.num_symbols, hidden), 'bias': (hidden,)},
                    'symbols': {'kernel': (hidden, game.properties * game.num_symbols),
                                'bias': (game.properties * game.num_symbols,)},
                    'value': {'kernel': (hidden, 1), 'bias': (1,)}},
        'listener': {'hidden': {'kernel': (game.num_symbols, hidden)}, 'types': {'kernel': (hidden, game.types)}},
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [scale * jax.random.normal(k, s) for k, s in zip(keys, leaves)])


def speak(speaker: Params, game: Game, objects: Array) -> tuple[Array, Array]:
    """Logits of the symbol at each position and the value: int [N, p] -> [N, p, p t], [N].

    Two layers without a non-linearity between them, multiplied with each other first: that is less work for as few as
    25 objects.
    """
    x, hidden = game.encode(objects), speaker['hidden']
    through = lambda last: x @ (hidden['kernel'] @ last['kernel']) + (hidden['bias'] @ last['kernel'] + last['bias'])
    logits, value = through(speaker['symbols']), through(speaker['value'])[..., 0]
    return logits.reshape(*objects.shape[:-1], game.properties, game.num_symbols), value


def listen(listener: Params, symbols: Array) -> Array:
    """Logits of each property's type from the symbol at its position, one-hot [..., p, p t] -> [..., p, t]."""
    return symbols @ (listener['hidden']['kernel'] @ listener['types']['kernel'])


def pick(logits: Array, index: Array) -> Array:
    """Log-probabilities of `index` [...] under `logits` [..., V]: [...]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), index[..., None], -1)[..., 0]
