"""A small classifier of pixels that no compared model has seen the inside of: its features measure them all alike."""
import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.runtime import config_files, storage


@dataclasses.dataclass(frozen=True)
class Judge:
    """scikit-learn's MLP on training pixels. Its last hidden layer is the feature space, its output the opinion."""
    model: Any

    @classmethod
    def fit(cls, images: np.ndarray, labels: np.ndarray, *, features: int = 64, seed: int = 0) -> 'Judge':
        """`images` uint8 [N, H, W, C], `labels` int [N]. Deterministic in `seed`."""
        # Deferred: seconds of imports that --help need not wait for.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier
        model = MLPClassifier((256, features), alpha=0.01, learning_rate_init=2e-3, batch_size=128, max_iter=60,
                              tol=0.0, n_iter_no_change=60, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)  # the number of epochs is fixed, on purpose
            return cls(model.fit(_rows(images), labels))

    @property
    def classes(self) -> np.ndarray:
        """int [C], ascending: what the columns of `probabilities` stand for."""
        return self.model.classes_

    def features(self, images: np.ndarray) -> np.ndarray:
        """float64 [N, F]: activations of the last hidden layer."""
        x = _rows(images)
        for weight, bias in list(zip(self.model.coefs_, self.model.intercepts_))[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        return x.astype(np.float64)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """[N, classes]."""
        return self.model.predict_proba(_rows(images))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """int [N]."""
        return self.model.predict(_rows(images))


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255


@dataclasses.dataclass(frozen=True)
class Perceptron:
    """What a fitted MLP computes, from its arrays alone: no object of scikit-learn has to be stored or trusted.

    Attributes:
        coefs_, intercepts_: float64 weights [in, out] and biases [out] of each layer, rectified but for the last.
        classes_: int [C], ascending.
    """
    coefs_: Sequence[np.ndarray]
    intercepts_: Sequence[np.ndarray]
    classes_: np.ndarray

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        """[N, C]."""
        *hidden, last = zip(self.coefs_, self.intercepts_)
        for weight, bias in hidden:
            rows = np.maximum(rows @ weight + bias, 0)
        logits = rows @ last[0] + last[1]
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """[N]."""
        return self.classes_[self.predict_proba(rows).argmax(1)]


@dataclasses.dataclass(frozen=True)
class PictureJudge:
    """A judge of one or more regions of a picture, in a work directory of its own.

    A label says the class of every region, most significant first: with ten classes and two regions 72 is 7, then 2.

    Attributes:
        judge: of a region. Its classes are 0..C-1.
        shape: (H, W, C) of pictures.
        regions: (top, bottom, left, right) of each, in pixels; all of one size.
    """
    judge: Judge
    shape: tuple[int, int, int]
    regions: tuple[tuple[int, int, int, int], ...]

    @property
    def num_classes(self) -> int:
        return len(self.judge.classes)

    @property
    def num_labels(self) -> int:
        return self.num_classes ** len(self.regions)

    def parts(self, images: np.ndarray) -> list[np.ndarray]:
        """The regions of pictures [N, H, W, C], [N, h, w, C] each."""
        return [images[:, top:bottom, left:right] for top, bottom, left, right in self.regions]

    def classes_of(self, labels: np.ndarray) -> np.ndarray:
        """Classes int [N, regions] that labels [N] say."""
        powers = self.num_classes ** np.arange(len(self.regions))[::-1]
        return np.asarray(labels)[:, None] // powers % self.num_classes

    @property
    def classes(self) -> np.ndarray:
        """int [num_labels]: every label, what the columns of `probabilities` stand for."""
        return np.arange(self.num_labels)

    def features(self, images: np.ndarray) -> np.ndarray:
        """float64 [N, F]: those of the regions of uint8 pictures [N, H, W, C], one after the other."""
        return np.concatenate([self.judge.features(part) for part in self.parts(images)], 1)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """[N, num_labels] of uint8 pictures [N, H, W, C]: the product of what each region is said to be."""
        out = np.ones((len(images), 1))
        for part in self.parts(images):
            out = (out[:, :, None] * self.judge.probabilities(part)[:, None]).reshape(len(images), -1)
        return out

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Labels int [N] of uint8 pictures [N, H, W, C]."""
        return self.probabilities(images).argmax(1)

    def agreement(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Probability float32 [N] that every region of pictures float [N, H, W, C] in [0, 1] is what its label says."""
        out = np.ones(len(images))
        for part, wanted in zip(self.parts(images), self.classes_of(labels).T):
            out *= self.judge.probabilities(np.asarray(part) * 255.0)[np.arange(len(part)), wanted]
        return out.astype(np.float32)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes arrays and a config.json that `load` reads."""
        model = self.judge.model
        arrays = {f'{name}_{i}': x for name, layers in (('weight', model.coefs_), ('bias', model.intercepts_))
                  for i, x in enumerate(layers)}
        place = storage.resolve(folder)
        place.mkdir(parents=True, exist_ok=True)
        with storage.write_whole(place / 'judge.npz') as file:
            np.savez(file, **arrays)
        storage.write_json(place / 'config.json', dict(
            experiment='judge', shape=self.shape, regions=self.regions, num_classes=self.num_classes,
            num_layers=len(model.coefs_)))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> 'PictureJudge':
        """
        Raises:
            ValueError: no judge there, or a damaged one.
        """
        config = config_files.read(folder)
        if config.get('experiment') != 'judge':
            raise ValueError(f'{folder}: holds a run of experiment={config.get("experiment")!r}, not a judge')
        try:
            with np.load(storage.local_copy(folder) / 'judge.npz', allow_pickle=False) as arrays:
                weights, biases = ([arrays[f'{name}_{i}'] for i in range(config.num_layers)]
                                   for name in ('weight', 'bias'))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f'{folder}: its judge.npz is damaged or not there ({error})') from None
        model = Perceptron(weights, biases, np.arange(config.num_classes))
        return cls(Judge(model), tuple(config.shape), tuple(map(tuple, config.regions)))
