"""Rewards of images, as `config.reward` names them: a function of the user's, a trained classifier, or an encoder.

    reward.kind=function  reward.function=package.module:function  (images, rows) -> one number an image
    reward.kind=model     reward.model=DIR of a judge              how sure it is of the row's label
    reward.kind=model     reward.model=DIR of an encoder           cosine of its soft code to that of the row's image

`reward.gold` names another of them, which is logged and never trained on. Images are float32 [N, H, W, C] in [0, 1].
What is late, missing or not finite is dealt with as for texts (`experiments.rlhf.policy.rewards.Scorer`).
"""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.dlc import encoder as encoder_lib
from experiments.dlc.encoder import Encoder
from experiments.dlc.judge import PictureJudge
from experiments.rlhf.policy import rewards
from experiments.runtime import config_files, storage
from experiments.runtime import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is to be scored, N of them.

    Attributes:
        images: float32 [N, H, W, C] in [0, 1].
        rows: of the data set, one an image.
        ended: bool [N], all True: a code has no end that could be missing.
    """
    images: np.ndarray
    rows: Sequence[Mapping[str, Any]]
    ended: np.ndarray


Reward = Callable[[Pictures], np.ndarray]


def open_scorer(config: ml_collections.ConfigDict, rows: Any, shape: tuple[int, int, int], mesh: Mesh
                ) -> rewards.Scorer:
    """The rewards that `config.reward` names, for captions with `rows` and images of `shape`.

    Args:
        rows: with `fields`, see `captions`.
        mesh: of the devices that generate; an encoder runs on those of this process.

    Raises:
        ValueError, FileNotFoundError: a reward that is not there or cannot score these images and rows.
    """
    section = config.reward
    if section.kind == 'task':
        raise ValueError("reward.kind='task': captions have no rule to reward an image by; give a judge or an encoder "
                         '(reward.kind=model) or a function (reward.kind=function)')
    reward = find('reward.kind', rewards.reward_name(section), rows, shape, mesh)
    gold = find('reward.gold', section.gold, rows, shape, mesh) if section.gold else None
    return rewards.Scorer(section, reward, gold)


def find(field: str, name: str, rows: Any, shape: tuple[int, int, int], mesh: Mesh) -> Reward:
    """The reward that `name` says: the work directory of a judge or of an encoder, or 'package.module:function'."""
    if not (storage.resolve(name) / 'config.json').exists():
        function = rewards.function_of(field, name)
        return lambda pictures: function(pictures.images, pictures.rows)
    kind = config_files.read(name).get('experiment')
    if kind == 'judge':
        return judge_reward(field, name, rows, shape)
    if kind == 'encoder':
        return encoder_reward(field, name, rows, shape, mesh)
    raise ValueError(f'{field}: {name} holds a run of experiment={kind!r}; give the folder of a judge or of an encoder')


def require(field: str, name: str, rows: Any, needed: str) -> None:
    """Raises a ValueError where the captions' rows have no `needed`."""
    if needed not in rows.fields:
        raise ValueError(f'{field}: {name} needs the {needed!r} of each caption, but the rows of data.path have only '
                         f'{tuple(rows.fields)}; give a code store, or a .jsonl, with it')


def judge_reward(field: str, name: str, rows: Any, shape: tuple[int, int, int]) -> Reward:
    """How probable the label of its row is, to a trained classifier, in each image."""
    judge = PictureJudge.load(name)
    require(field, name, rows, 'label')
    if judge.shape != tuple(shape):
        raise ValueError(f'{field}: {name} judges images of {judge.shape}, but the generator makes {shape}; use '
                         'a judge of the same size and channels')
    labels = np.array([int(row['label']) for row in rows])
    if labels.min() < 0 or labels.max() >= judge.num_labels:
        raise ValueError(f'{field}: {name} knows the labels 0..{judge.num_labels - 1}, but those of data.path are '
                         f'{labels.min()}..{labels.max()}; use a judge of the same classes')
    return lambda pictures: judge.agreement(pictures.images, np.array([int(row['label']) for row in pictures.rows]))


def encoder_reward(field: str, name: str, rows: Any, shape: tuple[int, int, int], mesh: Mesh) -> Reward:
    """Cosine between the soft code (SEM) of each image and that of the image in its row."""
    require(field, name, rows, 'image')
    encoder = Encoder.load(name)
    if encoder.config.data.channels != shape[-1]:
        raise ValueError(f'{field}: {name} reads images of {encoder.config.data.channels} channels, but the generator '
                         f'makes {shape}')
    # Each process embeds the images that it rewards, by itself: their number differs between processes, and may be 0.
    mesh = mesh_lib.make_mesh({'data': -1}, mesh.local_devices)
    transform, params = encoder.transform, jax.device_put(encoder.params, mesh_lib.replicated(mesh))
    run = jax.jit(lambda params, x: encoder_lib.encode(encoder.config, params, x, outputs=('sem',))['sem'])

    def embed(images: Sequence[np.ndarray]) -> np.ndarray:
        x = np.stack([transform(image) for image in images])
        with jax.set_mesh(mesh):  # in place of the one that sampling has set
            sem = np.asarray(run(params, jax.device_put(x, mesh_lib.replicated(mesh))))
        sem = sem.reshape(len(images), -1).astype(np.float64)
        return sem / np.linalg.norm(sem, axis=1, keepdims=True)

    def score(pictures: Pictures) -> np.ndarray:
        to_bytes = lambda images: np.rint(np.asarray(images) * 255).astype(np.uint8)
        drawn = embed(list(to_bytes(pictures.images)))
        return (drawn * embed([np.asarray(row['image']) for row in pictures.rows])).sum(1)
    return score
