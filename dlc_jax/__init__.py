"""Discrete Latent Codes: models, losses, diffusion processes, metrics and weight conversion in JAX/Flax.

    import dlc_jax
    model = dlc_jax.DiT(...)
    from dlc_jax.models.dit import DiT  # the same

Models are Linen modules, everything else is pure functions and frozen dataclasses. Importing the package costs nothing:
a public name is imported when it is first asked for.
"""
import importlib
from typing import Any

from rlhf_jax import __version__ as __version__

# name -> module, or module:attribute
_PUBLIC = {
    # modules
    'codes': 'codes',
    'convert': 'convert',
    'likelihood': 'likelihood',
    'preprocess': 'preprocess',
    'text_to_code': 'text_to_code',
    # models
    'AutoencoderKL': 'models.vae:AutoencoderKL',
    'DINOHead': 'ssl.dino:DINOHead',
    'DiT': 'models.dit:DiT',
    'InceptionV3': 'models.inception:InceptionV3',
    'SEDD': 'models.sedd:SEDD',
    'SEMEncoder': 'models.sem:SEMEncoder',
    'VisionTransformer': 'models.vit:VisionTransformer',
    # diffusion processes
    'DiscreteDiffusion': 'diffusion.discrete:DiscreteDiffusion',
    'GaussianDiffusion': 'diffusion.gaussian:GaussianDiffusion',
    'guided': 'diffusion.gaussian:guided',
    # the encoder's input and losses
    'BlockMasking': 'ssl.masking:BlockMasking',
    'MultiCrop': 'ssl.augment:MultiCrop',
    'dino_loss': 'ssl.dino:dino_loss',
    'ibot_loss': 'ssl.ibot:ibot_loss',
    'koleo_loss': 'ssl.koleo:koleo_loss',
    # metrics
    'frechet_distance': 'metrics.frechet:frechet_distance',
    'inception_features': 'metrics.inception_features:inception_features',
    'inception_score': 'metrics.inception_score:inception_score',
    'knn_accuracy': 'metrics.probes:knn_accuracy',
    'linear_probe_accuracy': 'metrics.probes:linear_probe_accuracy',
    'prdc': 'metrics.prdc:prdc',
    'vendi_score': 'metrics.vendi:vendi_score',
}
__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has {", ".join(__all__)}')
    module, _, attribute = _PUBLIC[name].partition(':')
    value = importlib.import_module(f'{__name__}.{module}')
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
