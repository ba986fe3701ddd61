"""Weights of the image models, written: as the work directory of a run, and from one under their released names."""
import importlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dlc_jax import convert
from dlc_jax.models import vit
from dlc_jax.models.vae import SCALING_FACTOR
from experiments.dlc.weights.kinds import KINDS, NOISE
from experiments.runtime import config_files, runs, storage
from experiments.runtime.checkpoint import Checkpointer
from rlhf_jax.weights.files import save_state_dict


def write_run(kind: str, config: ml_collections.ConfigDict, params: Mapping[str, Any],
              workdir: str | os.PathLike) -> None:
    """A work directory from which sampling, encoding and evaluation load `params`; config.json last.

    Raises:
        ValueError: the config does not fit the weights.
    """
    experiment = runs.on_one_device(config, _experiment(kind).build)
    wanted = jax.eval_shape(experiment.init, jax.random.key(0)).ema
    if kind == 'sem':
        wanted, params = wanted['encoder'], {'encoder': params}
    if jax.tree.map(np.shape, wanted) != jax.tree.map(np.shape, params['encoder'] if kind == 'sem' else params):
        raise ValueError(f'--config: not the model that these weights of a {kind} are of; leave config.model out')
    checkpointer = Checkpointer(storage.resolve(workdir) / 'checkpoints')
    checkpointer.save(0, {'ema': params})
    checkpointer.wait()
    checkpointer.close()
    config_files.save(config, workdir)


def read_run(kind: str, workdir: str | os.PathLike,
             step: int | None = None) -> tuple[Any, Mapping[str, Any], ml_collections.ConfigDict]:
    """Module, averaged weights (the teacher's, of an encoder) and config of the run in `workdir`, as its newest
    checkpoint has them, or that of `step`. Kind dinov2 is the backbone of an encoder.

    Raises:
        ValueError: no run there, or one of another kind.
    """
    if kind not in ('sem', 'dinov2', 'dit', 'sedd'):
        raise ValueError(f'{workdir}: no {kind} is trained here; give a folder of released weights')
    experiment = _experiment('sem' if kind == 'dinov2' else kind)
    loader = KINDS['sem' if kind == 'dinov2' else kind].loader
    run = getattr(experiment, loader).load(workdir, step)
    module, params = experiment.make_model(run.config), run.params
    if kind == 'dinov2':
        names = set(vit.VisionTransformer.__dataclass_fields__) - {'parent', 'name'}
        module = vit.VisionTransformer(**{name: getattr(module, name) for name in names})
        params = {name: x for name, x in params.items() if not name.startswith('sem_')}
    return module, jax.tree.map(np.asarray, params), run.config


def write_released(kind: str, module: Any, params: Mapping[str, Any], folder: str | os.PathLike, *,
                   diffusion: Mapping[str, Any] | None = None) -> None:
    """`folder` with the tensors under their released names, and a config.json of what they do not tell.

    Args:
        diffusion: of the config of a sedd, for its noise; None: as published.
    """
    config = _released_config(kind, module, diffusion)
    with storage.local_folder(folder, last='config.json') as local:
        save_state_dict(local / KINDS[kind].file, convert.tensors(kind, module, params))
        storage.write_json(local / 'config.json', config)


def _released_config(kind: str, m: Any, diffusion: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of the originals' config.json, as far as it says what the tensors are; and `eps`, which the originals
    do not set, in the noise of a sedd."""
    if kind == 'sedd':
        noise = {'type': 'loglinear'} if diffusion is None else {'type': diffusion['noise']} | {
            name: diffusion[name] for name in NOISE}
        graph = 'absorb' if m.process == 'absorbing' else m.process
        return dict(tokens=m.vocab_size, graph=dict(type=graph), noise=noise, model=dict(
            hidden_size=m.width, cond_dim=m.cond_dim, length=m.length, n_blocks=m.depth, n_heads=m.num_heads,
            scale_by_sigma=m.scale_by_sigma, dropout=m.dropout, shared_embedding=m.shared_embedding))
    if kind == 'sd_vae':
        levels = len(m.widths)
        return dict(_class_name='AutoencoderKL', act_fn='silu', block_out_channels=list(m.widths),
                    down_block_types=['DownEncoderBlock2D'] * levels, up_block_types=['UpDecoderBlock2D'] * levels,
                    in_channels=m.image_channels, out_channels=m.image_channels, latent_channels=m.latent_channels,
                    layers_per_block=m.depth, norm_num_groups=m.num_groups, scaling_factor=SCALING_FACTOR)
    if kind == 'inception':
        return dict(num_classes=m.num_classes)
    common = dict(num_heads=m.num_heads, hidden_size=m.width, depth=m.depth, patch_size=m.patch_size)
    if kind == 'dit':
        codes = dict(L=m.num_codes, V=m.vocab_size) if m.condition == 'code' else {}
        return common | dict(input_size=m.input_size, in_channels=m.channels) | codes
    common['num_register_tokens'] = m.num_registers
    return common | (dict(L=m.num_codes, V=m.vocab_size, temp=m.temperature) if kind == 'sem' else {})


def _experiment(kind: str) -> Any:
    return importlib.import_module(f'experiments.dlc.{KINDS[kind].experiment}')
