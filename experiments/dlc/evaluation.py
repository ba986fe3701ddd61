"""The tables: sample sets against held-out images, codes, probes, memorisation, compositions. Pure functions of
arrays."""
from collections.abc import Callable, Mapping

import numpy as np

from dlc_jax import codes as codes_lib
from dlc_jax.metrics import frechet, nearest, prdc, probes
from experiments.dlc.convolutional_judge import ConvolutionalJudge
from experiments.dlc.judge import Judge, PictureJudge
from experiments.dlc.nearest_judge import NearestJudge
from experiments.runtime.blocks import Arrays, Blocks

AnyJudge = Judge | ConvolutionalJudge | PictureJudge | NearestJudge


def compare(features: np.ndarray, reference: np.ndarray, *, k: int = 3) -> dict[str, float]:
    """Fréchet distance, precision, recall, density and coverage of `features` [N, F] against `reference` [M, F]."""
    scores = prdc.prdc(reference, features, k=k)
    return {'frechet': frechet.frechet_distance(frechet.statistics(features), frechet.statistics(reference)),
            **{name: float(scores[name]) for name in ('precision', 'recall', 'density', 'coverage')}}


def sample_set(judge: AnyJudge, images: np.ndarray, heldout: np.ndarray, train: np.ndarray) -> dict[str, float]:
    """One row of the table of methods. All images uint8 [N, H, W, C].

    `nearest_train` is the median distance (root mean square over pixels, grey levels) to the closest training image:
    far below that of held-out images means copies.
    """
    return compare(judge.features(images), judge.features(heldout)) | {'nearest_train': _nearest_train(images, train)}


def _nearest_train(images: np.ndarray, train: np.ndarray) -> float:
    return float(np.median(nearest.nearest_distances(_pixels(images), _pixels(train))))


def _pixels(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    return flat / np.sqrt(flat.shape[1])


REPRESENTATION = ('codes', 'embeddings', 'labels', 'sem')  # what `representation` reads


def representation(train: Mapping[str, np.ndarray], heldout: Mapping[str, np.ndarray], num_classes: int,
                   vocab_size: int, *, probe: str = 'lbfgs',
                   get: Callable[[str, Callable[[], Arrays]], Arrays] = Blocks().get) -> dict[str, dict[str, float]]:
    """k-NN and linear-probe accuracy of soft codes, bare codes and the continuous embedding, held out.

    Args:
        train, heldout: `codes` [N, L] and `labels` [N]; `embeddings` [N, D] and `sem` [N, L, V] where both stored them.
        probe: the method of `probes.linear_probe_accuracy`.
        get: of `runtime.blocks.Blocks` where the accuracies that are known already are to be read.
    """
    views = {}
    if 'sem' in train and 'sem' in heldout:
        views['sem'] = tuple(s['sem'].reshape(len(s['sem']), -1).astype(np.float32) for s in (train, heldout))
    views['codes'] = tuple(np.asarray(s['codes'], np.int32) for s in (train, heldout))
    if 'embeddings' in train and 'embeddings' in heldout:
        views['embedding'] = tuple(np.asarray(s['embeddings'], np.float32) for s in (train, heldout))

    def accuracy(view: str, method: str) -> float:
        a, b = views[view]
        if method == 'knn':
            return probes.knn_accuracy(a, train['labels'], b, heldout['labels'], num_classes=num_classes, k=20)
        return probes.linear_probe_accuracy(a, train['labels'], b, heldout['labels'], num_classes=num_classes,
                                            method=probe, vocab_size=vocab_size if view == 'codes' else None)

    def read(view: str, method: str) -> float:
        return float(get(f'{view}-{method}', lambda: {'accuracy': np.float64(accuracy(view, method))})['accuracy'])
    return {view: {method: read(view, method) for method in ('knn', 'linear')} for view in views}


def code_usage(codes: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Perplexity a position (mean, least), dead entries and the share of codes that are distinct."""
    stats = codes_lib.statistics(codes, vocab_size)
    return {'perplexity': float(np.mean(stats['perplexity'])), 'perplexity_min': float(np.min(stats['perplexity'])),
            'dead_entries': float(np.mean(stats['dead'])), 'distinct': float(stats['distinct'] / len(codes))}


def composition(judge: Judge | ConvolutionalJudge, images: np.ndarray, first: np.ndarray, second: np.ndarray,
                train: np.ndarray) -> dict[str, float]:
    """How often the judge sees each source in composed images [N, ...] whose sources have classes `first`, `second`
    [N], and how far they are from the training images `train`.

    `first`, `second`: share whose most likely class is that source; `either`: their sum; `both`: share whose two most
    likely classes are the two sources; `nearest_train`: as in `sample_set`, `nearest_features`: the same in the judge's
    features.
    """
    order = np.argsort(-judge.probabilities(images), axis=1)
    classes = judge.classes[order]
    top, runner_up = classes[:, 0], classes[:, 1]
    both = ((top == first) & (runner_up == second)) | ((top == second) & (runner_up == first))
    return _sources_seen(top, first, second) | {'both': float(both.mean())} | _novelty(judge, images, train)


def composition_of_attributes(judge: PictureJudge | NearestJudge, images: np.ndarray, first: np.ndarray,
                              second: np.ndarray, train: np.ndarray) -> dict[str, float]:
    """`composition` of pictures of two attributes, where both sources can be seen at once: an attribute of each.

    `first`, `second`: share that shows both attributes of that source; `either`: their sum; `of_first`: share that
    shows the first attribute of `first`; `of_second`: the second attribute of `second`; `crossed`: both of these;
    `both`: that, or the other way round; `nearest_train`, `nearest_features`: as in `composition`.
    """
    seen = judge.predict(images)
    of_seen, of_first, of_second = (judge.classes_of(labels) for labels in (seen, first, second))
    crossed, swapped = (of_seen == np.stack([a[:, 0], b[:, 1]], 1)
                        for a, b in ((of_first, of_second), (of_second, of_first)))
    return _sources_seen(seen, first, second) | {
        'of_first': float(crossed[:, 0].mean()), 'of_second': float(crossed[:, 1].mean()),
        'crossed': float(crossed.all(1).mean()),
        'both': float((crossed.all(1) | swapped.all(1)).mean())} | _novelty(judge, images, train)


def _sources_seen(seen: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    return {'first': float((seen == first).mean()), 'second': float((seen == second).mean()),
            'either': float(((seen == first) | (seen == second)).mean())}


def _novelty(judge: AnyJudge, images: np.ndarray, train: np.ndarray) -> dict[str, float]:
    distances = nearest.nearest_distances(judge.features(images), judge.features(train))
    return {'nearest_train': _nearest_train(images, train), 'nearest_features': float(np.median(distances))}
