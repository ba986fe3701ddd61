"""The networks whose weights were released, and the published settings of each."""
import pathlib
from typing import NamedTuple


class Kind(NamedTuple):
    """One network whose weights were released.

    Attributes:
        experiment: whose work directory these weights make; '' for networks that are used as they were released.
        file: what the originals call the file.
        sign: the end of a tensor's name that only this kind has.
        loader: the class, in the experiment's module, that loads a work directory.
    """
    experiment: str
    file: str
    sign: str
    loader: str = ''


KINDS = {  # the first whose sign is among a file's tensors is what it holds
    'sem': Kind('encoder', 'model.safetensors', 'sem_embed.weight', 'Encoder'),
    'dit': Kind('generator', 'model.safetensors', 'x_embedder.proj.weight', 'Generator'),
    'sedd': Kind('code_model', 'model.safetensors', 'sigma_map.mlp.0.weight', 'CodeModel'),
    'sd_vae': Kind('', 'diffusion_pytorch_model.safetensors', 'post_quant_conv.weight'),
    'inception': Kind('', 'model.safetensors', 'Mixed_7c.branch_pool.conv.weight'),
    'dinov2': Kind('', 'model.safetensors', 'cls_token'),
}
NOISE = ('eps', 'sigma_min', 'sigma_max')  # settings of the noise of a sedd, here and in its config.json
CONFIGURED = tuple(name for name, kind in KINDS.items() if kind.experiment)  # make work directories


def published_config(kind: str) -> str:
    """`--config` of the published settings of `kind`."""
    return f'{pathlib.Path(__file__).resolve().parents[3] / "configs" / "dlc" / "released.py"}:{kind}'
