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
from rlhf_jax.weights.files import load_state_dict
from dlc_jax.models import sem, vit
from dlc_jax.preprocess import CenterCrop
from dlc_jax.ssl import augment, dino, ibot, koleo, masking
from experiments.dlc.data import batches as batches_lib
from experiments.dlc.data import sources
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, optim, partition, placement, storage
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState

OUTPUTS = ('codes', 'sem', 'embeddings')  # of `Encoder.encode`


def make_model(config: ml_collections.ConfigDict, groups: int = 1) -> sem.SEMEncoder:
    return modules.build(sem.SEMEncoder, vit.SIZES, dict(config.model) | {'drop_path_groups': groups})


def make_head(config: ml_collections.ConfigDict) -> dino.DINOHead:
    h = config.head
    return dino.DINOHead(hidden=h.hidden, bottleneck=h.bottleneck, prototypes=h.prototypes, init_std=h.init_std,
                         dtype=modules.dtype(config.model))


def make_masking(config: ml_collections.ConfigDict) -> masking.BlockMasking:
    d = config.data
    grid = d.global_size // config.model.patch_size
    return masking.BlockMasking(
        grid=grid, share=d.mask_share, ratio=tuple(d.mask_ratio), min_patches=d.mask_min_patches)


def make_multicrop(config: ml_collections.ConfigDict) -> augment.MultiCrop:
    d = config.data
    return augment.MultiCrop(
        global_size=d.global_size, global_scale=tuple(d.global_scale), local_size=d.local_size,
        local_scale=tuple(d.local_scale), num_local=d.num_local, flip=d.flip, jitter=d.jitter, grayscale=d.grayscale,
        solarize=d.solarize, blur=tuple(d.blur), mean=tuple(d.mean), std=tuple(d.std))


def optimizer_groups(config: ml_collections.ConfigDict) -> tuple:
    """DINOv2's groups: layer-wise decay in the backbone, no weight decay on biases, norms and LayerScale, a last layer
    that stays put at first. `config.optimizer.groups`, where given, come before these."""
    depth = vit.SIZES[config.model.size]['depth'] if not config.model.depth else config.model.depth
    rate, first = config.layer_decay, config.layer_decay ** (depth + 1)
    plain = dict(weight_decay=0.0)
    blocks = dict(layer_decay=rate)
    last = dict(frozen_steps=config.freeze_last_layer)
    return tuple(config.optimizer.groups) + (
        (r'encoder/.*blocks/.*(bias|scale|gamma)', blocks | plain),
        (r'encoder/.*blocks/.*', blocks),
        (r'encoder/.*patch_embed/bias', plain | dict(learning_rate=first * config.patch_embed_lr)),
        (r'encoder/.*patch_embed/.*', dict(learning_rate=first * config.patch_embed_lr)),
        (r'encoder/.*(pos_embed|cls_token|register_tokens|mask_token)', dict(learning_rate=first)),
        (r'.*last_layer/.*', last),
        (r'encoder/.*sem_bias', {}),
        (r'.*(bias|scale|gamma)', plain),
        (r'.*', {}),
    )


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    d, c = config.data, config.loss
    if c.centering not in ('center', 'sinkhorn_knopp'):
        raise ValueError(f"loss.centering={c.centering!r} is not 'center' or 'sinkhorn_knopp'")
    for field in ('global_size', 'local_size'):
        if d[field] % config.model.patch_size:
            raise ValueError(f'data.{field}={d[field]} is not divisible by model.patch_size={config.model.patch_size}')
    shards = mesh_lib.batch_shards(mesh)
    # The originals mask, drop paths and look for neighbours within one GPU's batch.
    groups = config.groups or shards * config.accumulate
    if groups % (shards * config.accumulate) or config.batch_size % groups:
        raise ValueError(f'groups={groups} must be a multiple of {shards} batch shards x '
                         f'accumulate={config.accumulate} and divide batch_size={config.batch_size}; 0 chooses')
    micro_groups = groups // config.accumulate
    block_masking = make_masking(config)
    model, head = make_model(config, micro_groups), make_head(config)
    heads = ('dino_head', 'ibot_head') if config.head.separate_ibot else ('dino_head', 'dino_head')
    grid = d.global_size // config.model.patch_size
    per_group = config.batch_size // groups
    masked = block_masking.max_masked(2 * per_group)
    b = config.batch_size
    batch_spec = {
        'global_crops': jax.ShapeDtypeStruct((b, 2, d.global_size, d.global_size, d.channels), jnp.float32),
        'local_crops': jax.ShapeDtypeStruct((b, d.num_local, d.local_size, d.local_size, d.channels), jnp.float32),
        'masks': jax.ShapeDtypeStruct((b, 2, grid * grid), jnp.bool_),
        'mask_indices': jax.ShapeDtypeStruct((groups, masked), jnp.int32),
        'mask_weights': jax.ShapeDtypeStruct((groups, masked), jnp.float32),
    }
    temperature = optim.schedule(c.teacher_temperature, config.num_steps)
    momentum = optim.ema_decay(config.ema, config.num_steps)

    def init_params(key):
        keys = jax.random.split(key, 3)
        images = jnp.zeros((1, d.global_size, d.global_size, d.channels))
        params = {'encoder': model.init(keys[0], images, jnp.zeros((1, grid * grid), bool))['params']}
        for name, k in zip(dict.fromkeys(heads), keys[1:]):
            params[name] = head.init(k, jnp.zeros((1, model.width)))['params']
        return params

    optimizer = config.optimizer.copy_and_resolve_references()
    optimizer.groups = optimizer_groups(config)
    tx = optim.adamw(optimizer, jax.eval_shape(init_params, jax.random.key(0)), config.num_steps)

    def init(key):
        key, carried = jax.random.split(key)
        params = init_params(key)
        centers = {name: jnp.zeros((1, config.head.prototypes)) for name in ('dino', 'ibot')}
        return TrainState(jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.copy, params), carried, centers)

    def gather_masked(patches, indices):
        """[2B, N, D] patches -> [G * M, D]: those that `indices` [G, M] name within each group."""
        width = patches.shape[-1]
        patches = jnp.take_along_axis(patches.reshape(indices.shape[0], -1, width), indices[..., None], axis=1)
        return patches.reshape(-1, width)

    def teacher_targets(state, batch):
        """Probabilities for both globals, for masked patches, and what the centers move towards. No gradient."""
        globals_ = batch['global_crops'].reshape(-1, *batch['global_crops'].shape[2:])
        out = model.apply({'params': state.ema['encoder']}, globals_)
        weights = batch['mask_weights'].reshape(-1)
        cls = head.apply({'params': state.ema[heads[0]]}, out.cls)
        patches = head.apply({'params': state.ema[heads[1]]}, gather_masked(out.patches, batch['mask_indices']))
        t = temperature(state.step)
        if c.centering == 'center':
            cls_probs = dino.softmax_center(cls, state.extra['dino'], t)
            patch_probs = dino.softmax_center(patches, state.extra['ibot'], t)
        else:
            cls_probs = dino.sinkhorn_knopp(cls, t)
            patch_probs = dino.sinkhorn_knopp(patches, t, weights=weights)
        means = {'dino': dino.batch_center(cls), 'ibot': dino.batch_center(patches, weights)}
        return jax.lax.stop_gradient((cls_probs, patch_probs, means))

    def loss(params, state, batch, rng):
        cls_probs, patch_probs, means = teacher_targets(state, batch)
        b, n = batch['global_crops'].shape[0], batch['local_crops'].shape[1]
        globals_ = batch['global_crops'].reshape(2 * b, *batch['global_crops'].shape[2:])
        locals_ = batch['local_crops'].reshape(n * b, *batch['local_crops'].shape[2:])
        keys = jax.random.split(rng, 2)
        apply = lambda x, masks, key: model.apply(
            {'params': params['encoder']}, x, masks, train=True, rngs={'dropout': key})
        seen = apply(globals_, batch['masks'].reshape(2 * b, -1), keys[0])
        glimpsed = apply(locals_, None, keys[1])

        masked_patches = gather_masked(seen.patches, batch['mask_indices'])
        run_head = lambda name, x: head.apply({'params': params[name]}, x)
        # [B, 2 + n, K]: views side by side, so that an image's rows stay on its device.
        logits = run_head(heads[0], jnp.concatenate([seen.cls.reshape(b, 2, -1), glimpsed.cls.reshape(b, n, -1)], 1))
        global_logits, local_logits = logits[:, :2], logits[:, 2:]
        targets = cls_probs.reshape(b, 2, -1)

        # Each of the 2 n + 2 (student view, teacher view) pairs counts the same; a view is never its own target.
        pairs = 2 * n + 2
        entropy = lambda logits, probs: dino.cross_entropy(logits, probs, c.student_temperature).mean()
        local_term = entropy(local_logits, targets.sum(1, keepdims=True)) * n / pairs  # linear in the targets
        global_term = entropy(global_logits, targets[:, ::-1]) * 2 / pairs
        koleo_term = sum(koleo.koleo_loss(seen.cls.reshape(b, 2, -1)[:, i], groups=micro_groups) for i in range(2))
        ibot_term = ibot.ibot_loss(run_head(heads[1], masked_patches), patch_probs, batch['mask_weights'].reshape(-1),
                                   num_crops=2 * b, temperature=c.student_temperature)
        total = c.dino * (local_term + global_term) + c.koleo * koleo_term + c.ibot * ibot_term
        # Collapse shows here first: codes that use one entry (usage -> 0) or teachers that agree on one prototype.
        mean_sem = seen.sem.mean(0)
        metrics = {'loss_local': local_term, 'loss_global': global_term, 'loss_koleo': koleo_term,
                   'loss_ibot': ibot_term,
                   'teacher_entropy': -(cls_probs * jnp.log(cls_probs + 1e-9)).sum(-1).mean(),
                   'sem_entropy': -(seen.sem * jnp.log(seen.sem + 1e-9)).sum(-1).mean(),
                   'sem_usage': jnp.exp(-(mean_sem * jnp.log(mean_sem + 1e-9)).sum(-1)).mean()}
        return total, {'metrics': metrics, 'means': means}

    def step(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        (value, aux), grads = optim.value_and_grad(
            lambda p, part, r: loss(p, state, part, r), state.params, batch, rng, config.accumulate, shards)
        params, opt_state, norm = optim.apply(tx, grads, state)
        ema = optim.ema_update(state.ema, params, momentum(state.step + 1))
        # The new center serves the next step, as in the original.
        centers = {name: dino.update_center(state.extra[name], mean, c.center_momentum)
                   for name, mean in aux['means'].items()}
        return (state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, extra=centers),
                aux['metrics'] | {'loss': value, 'grad_norm': norm})

    def open_batches():
        source = sources.image_source(d, d.split)
        return batches_lib.ssl_batches(
            source, make_multicrop(config), block_masking, config.batch_size, groups=groups, seed=config.seed,
            share=placement.share_of(mesh), num_workers=d.num_workers)

    rules = partition.prefixed('encoder', sem.PARTITION_RULES) + tuple(
        rule for name in dict.fromkeys(heads) for rule in partition.prefixed(name, dino.PARTITION_RULES))
    def encode_once(params, key):
        images = jax.random.normal(key, (b, d.global_size, d.global_size, d.channels))
        return encode(config, params['encoder'], images)

    return Experiment(init, loss, step, rules, batch_spec, open_batches, sampler=encode_once,
                      warm_start=(lambda state: warm_start(config, state)) if config.pretrained else None)


def warm_start(config: ml_collections.ConfigDict, state: TrainState) -> TrainState:
    """Student and teacher backbones from released DINOv2 weights, each tensor straight into the shards of `state`; the
    SEM and DINO heads keep their random start."""
    fresh = partition.flatten(state.params['encoder'])

    def sharding(path, leaf):
        name = partition.path_name(path)
        if name not in fresh:
            raise ValueError(f'pretrained={config.pretrained}: {name} has no place in this config')
        if fresh[name].shape != leaf.shape:
            raise ValueError(f'pretrained={config.pretrained}: {name} is {leaf.shape} there but {fresh[name].shape} in '
                             'this config')
        return fresh[name].sharding

    _, released = convert.from_torch(
        'dinov2', load_state_dict(storage.local_copy(config.pretrained)), num_heads=make_model(config).num_heads,
        shardings=lambda shapes: jax.tree_util.tree_map_with_path(sharding, shapes))
    flat = partition.flatten(released)
    encoder = jax.tree_util.tree_map_with_path(
        lambda path, leaf: flat.get(partition.path_name(path), leaf).astype(leaf.dtype), state.params['encoder'])
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
    def load(cls, workdir: str | os.PathLike) -> 'Encoder':
        return cls(*modules.load(workdir, 'encoder', build, part='encoder'))

    @property
    def transform(self) -> CenterCrop:
        """uint8 [h, w, C] of any size -> float32 [H, W, C]: the ADM centre crop, then mean and std. Never flipped.

        Without the parameters, so that it can travel to worker processes.
        """
        d = self.config.data
        return CenterCrop(d.global_size, tuple(d.mean), tuple(d.std))

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """`transform` of one image."""
        return self.transform(image)

    def encode(self, images: np.ndarray, *, temperature: float | None = None, batch_size: int = 256,
               outputs: Sequence[str] = OUTPUTS) -> dict[str, np.ndarray]:
        """`codes` int32 [N, L], `sem` float32 [N, L, V], `embeddings` float32 [N, D] of preprocessed images.

        Computed in float32, as `encode` says.

        Args:
            images: float32 [N, H, W, C].
            temperature: of `sem`; None: the config's.
            batch_size: images at once.
            outputs: which of the three to return. `sem` is V numbers a token: leave it out of large sets.
        """
        run = self._compiled(min(batch_size, len(images)), temperature, tuple(outputs))
        return run(jax.random.key(0), images, len(images))

    @functools.lru_cache(maxsize=4)
    def _compiled(self, batch_size: int, temperature: float | None, outputs: tuple[str, ...]) -> modules.Batched:
        return modules.Batched(
            lambda p, _, images: encode(self.config, p, images, temperature, outputs), self.params, batch_size)

    def encode_images(self, images: list[np.ndarray], **kwargs: Any) -> dict[str, np.ndarray]:
        """`encode` of raw uint8 images."""
        return self.encode(np.stack([self.preprocess(image) for image in images]), **kwargs)
