"""A small classifier of pixels that no compared model has seen the inside of: its features measure them all alike."""
import dataclasses
import warnings
from typing import Any

import numpy as np


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
