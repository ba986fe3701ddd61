"""The encoder's objective: DINO on class tokens, iBOT on masked patches and KoLeo, of a student against a teacher that
is its average (arXiv 2304.07193 §4, as the original computes them)."""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from dlc_jax.models import sem
from dlc_jax.ssl import dino, ibot, koleo
from experiments.runtime.optim import Schedule

Array = jax.Array
Params = dict[str, Any]
Batch = dict[str, Array]


class Targets(NamedTuple):
    """What the teacher sees in a batch; none of it is differentiated.

    Attributes:
        cls: probabilities of every global crop, float32 [B, 2, K].
        patches: probabilities of the masked patches, float32 [G M, K].
        means: what the centers move towards, {'dino', 'ibot'} of [1, K].
    """
    cls: Array
    patches: Array
    means: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class SelfDistillation:
    """Student against teacher on the crops of a batch (`experiments.dlc.data.batches.ssl_batches`).

    Attributes:
        model: gives `cls` [N, D], `patches` [N, P, D] and `sem` [N, L, V] of crops.
        head: scores tokens against K prototypes.
        heads: names, in the parameters, of the heads of class tokens and of patches; may be one.
        settings: `config.loss`.
        groups: parts of a microbatch within which KoLeo looks for neighbours.
        temperature: of the teacher, at a step.
    """
    model: sem.SEMEncoder
    head: dino.DINOHead
    heads: tuple[str, str]
    settings: ml_collections.ConfigDict
    groups: int
    temperature: Schedule

    def init_params(self, key: Array, crop: tuple[int, int, int]) -> Params:
        """Fresh parameters {'encoder': ..., head: ...}; `crop`: height, width and channels of a global one."""
        keys = jax.random.split(key, 3)
        side = self.model.patch_size
        masks = jnp.zeros((1, (crop[0] // side) * (crop[1] // side)), bool)
        params = {'encoder': self.model.init(keys[0], jnp.zeros((1, *crop)), masks)['params']}
        for name, k in zip(dict.fromkeys(self.heads), keys[1:]):
            params[name] = self.head.init(k, jnp.zeros((1, self.model.width)))['params']
        return params

    def init_centers(self) -> dict[str, Array]:
        """Centers of the teacher's scores, {'dino', 'ibot'} of zeros [1, K]."""
        return {name: jnp.zeros((1, self.head.prototypes)) for name in ('dino', 'ibot')}

    def score(self, params: Params, head: int, tokens: Array) -> Array:
        """Scores [..., K] of tokens [..., D] by the head of class tokens (0) or of patches (1)."""
        return self.head.apply({'params': params[self.heads[head]]}, tokens)

    def targets(self, teacher: Params, centers: dict[str, Array], batch: Batch, step: Array) -> Targets:
        """What `teacher` sees in the global crops, unmasked."""
        out = self.model.apply({'params': teacher['encoder']}, _flat(batch['global_crops']))
        weights = batch['mask_weights'].reshape(-1)
        cls = self.score(teacher, 0, out.cls)
        patches = self.score(teacher, 1, gather_masked(out.patches, batch['mask_indices']))
        temperature = self.temperature(step)
        if self.settings.centering == 'center':
            probs = dino.softmax_center(cls, centers['dino'], temperature)
            patch_probs = dino.softmax_center(patches, centers['ibot'], temperature)
        else:
            probs = dino.sinkhorn_knopp(cls, temperature)
            patch_probs = dino.sinkhorn_knopp(patches, temperature, weights=weights)
        means = {'dino': dino.batch_center(cls), 'ibot': dino.batch_center(patches, weights)}
        probs = probs.reshape(*batch['global_crops'].shape[:2], -1)
        return jax.lax.stop_gradient(Targets(probs, patch_probs, means))

    def loss(self, params: Params, targets: Targets, batch: Batch, rng: Array) -> tuple[Array, dict[str, Array]]:
        """Weighted sum of the four terms, and metrics.

        Each of the 2 n + 2 (student view, teacher view) pairs of the DINO terms counts the same; a view is never its
        own target. Without local crops (n = 0) their term is 0.
        """
        weights, (images, num_local) = self.settings, batch['local_crops'].shape[:2]
        global_key, local_key = jax.random.split(rng, 2)
        whole = self.see(params, batch['global_crops'], batch['masks'], global_key)
        views = cls = whole.cls.reshape(images, 2, -1)
        if num_local:
            small = self.see(params, batch['local_crops'], None, local_key)
            views = jnp.concatenate([cls, small.cls.reshape(images, num_local, -1)], 1)
        # [B, 2 + n, K]: views side by side, so that an image's rows stay on its device.
        scores = self.score(params, 0, views)
        pairs = 2 * num_local + 2
        entropy = lambda scores, probs: dino.cross_entropy(scores, probs, weights.student_temperature).mean()
        # Linear in the targets: a local view has both globals for one.
        local_term = jnp.zeros(())
        if num_local:
            local_term = entropy(scores[:, 2:], targets.cls.sum(1, keepdims=True)) * num_local / pairs
        global_term = entropy(scores[:, :2], targets.cls[:, ::-1]) * 2 / pairs
        koleo_term = sum(koleo.koleo_loss(cls[:, view], groups=self.groups) for view in range(2))
        masked = gather_masked(whole.patches, batch['mask_indices'])
        ibot_term = ibot.ibot_loss(self.score(params, 1, masked), targets.patches, batch['mask_weights'].reshape(-1),
                                   num_crops=2 * images, temperature=weights.student_temperature)
        total = (weights.dino * (local_term + global_term) + weights.koleo * koleo_term + weights.ibot * ibot_term)
        return total, {'loss_local': local_term, 'loss_global': global_term, 'loss_koleo': koleo_term,
                       'loss_ibot': ibot_term} | collapse(targets.cls, whole.sem)

    def see(self, params: Params, crops: Array, masks: Array | None, key: Array) -> Any:
        """The student's output on crops [B, n, H, W, C], flattened to [B n, ...], with `masks` [B, n, P] over their
        patches."""
        masks = None if masks is None else _flat(masks)
        return self.model.apply({'params': params['encoder']}, _flat(crops), masks, train=True, rngs={'dropout': key})

    def move_centers(self, centers: dict[str, Array], means: dict[str, Array]) -> dict[str, Array]:
        """The centers for the next step, as in the original: those of this step have served it."""
        return {name: dino.update_center(centers[name], mean, self.settings.center_momentum)
                for name, mean in means.items()}


def gather_masked(patches: Array, indices: Array) -> Array:
    """[N, P, D] patches -> [G M, D]: those that `indices` [G, M] name within each group of crops."""
    width = patches.shape[-1]
    grouped = patches.reshape(indices.shape[0], -1, width)
    return jnp.take_along_axis(grouped, indices[..., None], axis=1).reshape(-1, width)


def collapse(probs: Array, soft_codes: Array) -> dict[str, Array]:
    """Metrics in which a collapse shows first, of the teacher's probabilities [..., K] and soft codes [N, L, V].

    Teachers that agree on one prototype: `teacher_entropy` -> 0, nats. Codes that use one entry: `sem_usage`, the
    perplexity of the mean soft code, -> 1; beside it `sem_entropy`, the mean entropy of a position, nats.
    """
    entropy = lambda p: -(p * jnp.log(p + 1e-9)).sum(-1)
    return {'teacher_entropy': entropy(probs).mean(), 'sem_entropy': entropy(soft_codes).mean(),
            'sem_usage': jnp.exp(entropy(soft_codes.mean(0))).mean()}


def _flat(crops: Array) -> Array:
    """[B, n, ...] -> [B n, ...]."""
    return crops.reshape(-1, *crops.shape[2:])
