"""The SEM encoder, trained as DINOv2 trains: DINO + iBOT + KoLeo, multi-crop, EMA teacher (arXiv 2507.12318 §5,
arXiv 2304.07193). SEM is a bottleneck on the class token only."""
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dlc_jax import convert
from dlc_jax.models import sem, vit
from dlc_jax.preprocess import CenterCrop
from dlc_jax.ssl import augment, dino, masking
from experiments.dlc.data import batches as batches_lib
from experiments.dlc.data import sources
from experiments.dlc.self_distillation import SelfDistillation
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, optim, partition, placement, runs, storage
from experiments.runtime import training as training_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from experiments.runtime.stream import Stream
from rlhf_jax.weights.files import load_state_dict

OUTPUTS = ('codes', 'sem', 'embeddings')  # of `Encoder.encode`


def make_model(config: ml_collections.ConfigDict, groups: int = 1) -> sem.SEMEncoder:
    return modules.build(sem.SEMEncoder, vit.SIZES, dict(config.model) | {'drop_path_groups': groups})


def make_head(config: ml_collections.ConfigDict) -> dino.DINOHead:
    fields = ('hidden', 'bottleneck', 'prototypes', 'init_std')
    return dino.DINOHead(**{name: config.head[name] for name in fields}, dtype=modules.dtype(config.model))


def make_masking(config: ml_collections.ConfigDict) -> masking.BlockMasking:
    data = config.data
    grid = data.global_size // config.model.patch_size
    return masking.BlockMasking(
        grid=grid, share=data.mask_share, ratio=tuple(data.mask_ratio), min_patches=data.mask_min_patches)


def make_multicrop(config: ml_collections.ConfigDict) -> augment.MultiCrop:
    numbers = ('global_size', 'local_size', 'num_local', 'flip', 'jitter', 'grayscale', 'solarize')
    tuples = ('global_scale', 'local_scale', 'blur', 'mean', 'std')
    return augment.MultiCrop(**{name: config.data[name] for name in numbers},
                             **{name: tuple(config.data[name]) for name in tuples})


def optimizer_groups(config: ml_collections.ConfigDict) -> tuple:
    """DINOv2's groups: layer-wise decay in the backbone, no weight decay on biases, norms and LayerScale, a last layer
    that stays put at first. `config.optimizer.groups`, where given, come before these."""
    depth = vit.SIZES[config.model.size]['depth'] if not config.model.depth else config.model.depth
    first = config.layer_decay ** (depth + 1)  # learning rate of what lies before the blocks
    plain = dict(weight_decay=0.0)
    blocks = dict(layer_decay=config.layer_decay)
    return tuple(config.optimizer.groups) + (
        (r'encoder/.*blocks/.*(bias|scale|gamma)', blocks | plain),
        (r'encoder/.*blocks/.*', blocks),
        (r'encoder/.*patch_embed/bias', plain | dict(learning_rate=first * config.patch_embed_lr)),
        (r'encoder/.*patch_embed/.*', dict(learning_rate=first * config.patch_embed_lr)),
        (r'encoder/.*(pos_embed|cls_token|register_tokens|mask_token)', dict(learning_rate=first)),
        (r'.*last_layer/.*', dict(frozen_steps=config.freeze_last_layer)),
        (r'encoder/.*sem_bias', {}),
        (r'.*(bias|scale|gamma)', plain),
        (r'.*', {}),
    )


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    """
    Raises:
        ValueError: an unknown centering, crops that patches do not divide, or groups that the batch does not allow.
    """
    check(config)
    groups = num_groups(config, mesh_lib.batch_shards(mesh))
    objective = make_objective(config, groups // config.accumulate)

    def init_params(key):
        return objective.init_params(key, (config.data.global_size, config.data.global_size, config.data.channels))

    def loss(params, state, batch, rng):
        targets = objective.targets(state.ema, state.extra, batch, state.step)
        value, metrics = objective.loss(params, targets, batch, rng)
        return value, {'metrics': metrics, 'means': targets.means}

    training = training_lib.training(config, mesh, init_params, loss, groups=optimizer_groups(config))

    def init(key):
        return training.init(key).replace(extra=objective.init_centers())

    def step(state, batch):
        (value, aux), grads = training.gradient(state, batch)
        centers = objective.move_centers(state.extra, aux['means'])
        state, norm = training.update(state, grads)
        return state.replace(extra=centers), aux['metrics'] | {'loss': value, 'grad_norm': norm}

    spec = batch_spec(config, groups)

    def encode_once(params, key):
        images = jax.random.normal(key, spec['global_crops'].shape[:1] + spec['global_crops'].shape[2:])
        return encode(config, params['encoder'], images)

    def check_inputs():
        check_pretrained(config, jax.eval_shape(init_params, jax.random.key(0))['encoder'])

    rules = partition.prefixed('encoder', sem.PARTITION_RULES) + tuple(
        rule for name in dict.fromkeys(objective.heads) for rule in partition.prefixed(name, dino.PARTITION_RULES))
    return Experiment(init, loss, step, rules, spec,
                      lambda: open_batches(config, groups, placement.share_of(mesh)), sampler=encode_once,
                      check=check_inputs if config.pretrained else None,
                      warm_start=(lambda state: warm_start(config, state)) if config.pretrained else None)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for an unknown centering, images without pixels or channels, or crops that cannot be divided
    into patches."""
    centering, patch_size = config.loss.centering, config.model.patch_size
    if centering not in ('center', 'sinkhorn_knopp'):
        raise ValueError(f"loss.centering={centering!r} is not 'center' or 'sinkhorn_knopp'")
    for field in ('channels', 'global_size'):
        if config.data[field] < 1:
            raise ValueError(f'data.{field}={config.data[field]} must be at least 1')
    for field in ('global_size', 'local_size'):
        if config.data[field] % patch_size:
            raise ValueError(f'data.{field}={config.data[field]} is not divisible by model.patch_size={patch_size}')


def num_groups(config: ml_collections.ConfigDict, shards: int) -> int:
    """Parts of the batch within which images are masked, paths dropped and neighbours looked for, as the originals do
    within one GPU's batch: `config.groups`, or one for each of `shards` and microbatches.

    Raises:
        ValueError: shards and microbatches do not divide it, or it does not divide the batch.
    """
    groups = config.groups or shards * config.accumulate
    if groups % (shards * config.accumulate) or config.batch_size % groups:
        raise ValueError(f'groups={groups} must be a multiple of {shards} batch shards x '
                         f'accumulate={config.accumulate} and divide batch_size={config.batch_size}; 0 chooses')
    return groups


def make_objective(config: ml_collections.ConfigDict, groups: int) -> SelfDistillation:
    """The objective on microbatches of `groups` groups."""
    heads = ('dino_head', 'ibot_head') if config.head.separate_ibot else ('dino_head', 'dino_head')
    temperature = optim.schedule(config.loss.teacher_temperature, config.num_steps)
    return SelfDistillation(make_model(config, groups), make_head(config), heads, config.loss, groups, temperature)


def batch_spec(config: ml_collections.ConfigDict, groups: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the global batch; see `batches.ssl_batches`."""
    data, rows = config.data, config.batch_size
    block_masking = make_masking(config)
    num_masked = block_masking.max_masked(2 * rows // groups)
    return {
        'global_crops': jax.ShapeDtypeStruct((rows, 2, data.global_size, data.global_size, data.channels), jnp.float32),
        'local_crops': jax.ShapeDtypeStruct(
            (rows, data.num_local, data.local_size, data.local_size, data.channels), jnp.float32),
        'masks': jax.ShapeDtypeStruct((rows, 2, block_masking.num_patches), jnp.bool_),
        'mask_indices': jax.ShapeDtypeStruct((groups, num_masked), jnp.int32),
        'mask_weights': jax.ShapeDtypeStruct((groups, num_masked), jnp.float32),
    }


def open_batches(config: ml_collections.ConfigDict, groups: int, share: placement.Share = placement.WHOLE) -> Stream:
    """This process's crops and masks of `config.data`."""
    source = sources.image_source(config.data, config.data.split)
    return batches_lib.ssl_batches(
        source, make_multicrop(config), make_masking(config), config.batch_size, groups=groups, seed=config.seed,
        share=share, num_workers=config.data.num_workers)


def check_pretrained(config: ml_collections.ConfigDict, encoder: Any) -> None:
    """Raises unless the released weights `config.pretrained` have every parameter of the backbone of `encoder` (shapes,
    or arrays), of its shape, and no others. Reads names and shapes only.

    Raises:
        OSError: no such file, or a damaged one.
        ValueError: weights of another model.
    """
    modules.check_released(lambda shardings: read_pretrained(config, shardings),
                           lambda shapes: fits(config, shapes, encoder))


def read_pretrained(config: ml_collections.ConfigDict, shardings: Any) -> Any:
    """Module and parameters of `config.pretrained`; `shardings`: see `convert.from_torch`."""
    path = storage.resolve(config.pretrained)
    if not path.exists():
        raise FileNotFoundError(f'pretrained={config.pretrained}: nothing there; give released weights, or leave it '
                                'empty')
    try:
        return convert.from_torch('dinov2', load_state_dict(storage.local_copy(config.pretrained)),
                                  num_heads=make_model(config).num_heads, shardings=shardings)
    except ValueError as error:
        message = str(error).removeprefix('convert: ')
        raise ValueError(message if message.startswith('pretrained=') else
                         f'pretrained={config.pretrained}: {message}') from None


def fits(config: ml_collections.ConfigDict, released: Any, encoder: Any) -> None:
    """Raises a ValueError unless `released` are the backbone of `encoder`: all of it, and nothing else."""
    theirs, ours = partition.flatten(released), partition.flatten(encoder)
    for name, leaf in theirs.items():
        if name not in ours:
            raise ValueError(f'pretrained={config.pretrained}: {name} has no place in this config')
        if ours[name].shape != leaf.shape:
            raise ValueError(f'pretrained={config.pretrained}: {name} is {leaf.shape} there but {ours[name].shape} in '
                             'this config')
    if missing := [name for name in ours if name not in theirs and not name.startswith('sem_')]:
        raise ValueError(f'pretrained={config.pretrained}: has no {missing[0]}, which would start at random; set the '
                         'model to what was released (model.num_registers=0 for weights without registers)')


def warm_start(config: ml_collections.ConfigDict, state: TrainState) -> TrainState:
    """Student and teacher backbones from released DINOv2 weights, each tensor straight into the shards of `state`; the
    SEM and DINO heads keep their random start."""
    fresh = state.params['encoder']

    def shardings(shapes):
        fits(config, shapes, fresh)
        flat = partition.flatten(fresh)
        return jax.tree_util.tree_map_with_path(lambda path, _: flat[partition.path_name(path)].sharding, shapes)

    _, released = read_pretrained(config, shardings)
    flat = partition.flatten(released)
    encoder = jax.tree_util.tree_map_with_path(
        lambda path, leaf: flat.get(partition.path_name(path), leaf).astype(leaf.dtype), fresh)
    params = state.params | {'encoder': encoder}
    return state.replace(params=params, ema=jax.tree.map(jnp.copy, params))


def encode(config: ml_collections.ConfigDict, params: Any, images: jax.Array, temperature: float | None = None,
           outputs: Sequence[str] = OUTPUTS) -> dict[str, jax.Array]:
    """`codes` [N, L], `sem` [N, L, V] and `embeddings` [N, D], those that `outputs` names, of preprocessed images
    [N, H, W, C].

    Pure, so that it can be jitted whole. Whatever the config's dtype it computes in float32, products included where
    the hardware would round them (TF32, bf16 passes): near-tied logits must not flip with the compute dtype.
    """
    model = make_model(config).clone(dtype=jnp.float32, attention_impl='xla')  # cuDNN's attention has no float32
    with jax.default_matmul_precision('highest'):
        out = model.apply({'params': params}, images, temperature=temperature)
    return {name: x for name, x in zip(OUTPUTS, (out.dlc, out.sem, out.cls)) if name in outputs}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A trained encoder: the teacher's weights, as the paper uses."""
    config: ml_collections.ConfigDict
    params: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike, step: int | None = None) -> 'Encoder':
        """The run in `workdir`, as its newest checkpoint has it, or that of `step`."""
        return cls(*runs.load(workdir, 'encoder', build, part='encoder', step=step))

    @property
    def transform(self) -> CenterCrop:
        """uint8 [h, w, C] of any size -> float32 [H, W, C]: the ADM centre crop, then mean and std. Never flipped.

        Without the parameters, so that it can travel to worker processes.
        """
        data = self.config.data
        return CenterCrop(data.global_size, tuple(data.mean), tuple(data.std))

    def encode(self, images: np.ndarray, *, temperature: float | None = None, batch_size: int = 256,
               outputs: Sequence[str] = OUTPUTS) -> dict[str, np.ndarray]:
        """`codes` int32 [N, L], `sem` float32 [N, L, V], `embeddings` float32 [N, D] of preprocessed images.

        Computed in float32, as `encode` says.

        Args:
            images: float32 [N, H, W, C].
            temperature: of `sem`; None: the config's.
            batch_size: images at once on a device.
            outputs: which of the three to return. `sem` is V numbers a token: leave it out of large sets.
        """
        run = self._compiled(modules.Unit.of(batch_size, len(images)), temperature, tuple(outputs))
        return run(images, len(images))

    @functools.lru_cache(maxsize=4)
    def _compiled(self, unit: modules.Unit, temperature: float | None, outputs: tuple[str, ...]) -> modules.Batched:
        return modules.Batched(
            lambda params, images: encode(self.config, params, images, temperature, outputs), self.params, unit)

    def encode_images(self, images: list[np.ndarray], **kwargs: Any) -> dict[str, np.ndarray]:
        """`encode` of raw uint8 images."""
        transform = self.transform
        return self.encode(np.stack([transform(image) for image in images]), **kwargs)
