"""At full size, by shape alone: the tensors, by name and shape, of the published image models.

The lists come from the PyTorch twins of the parity tests and from diffusers, built without memory at the published
sizes, not from the converters' own tables.
"""
import math

import numpy as np
import pytest

import test_dinov2_torch
import test_dit_torch
import test_llada_torch
import test_sedd_torch
from dlc_jax import convert
from dlc_jax.models import dit, sedd, sem, vae, vit
from rlhf_jax.models import llama
from torch_twins import torch

LARGE = dict(WIDTH=1024, DEPTH=24, HEADS=16, PATCH=14, GRID=37, REGISTERS=4, CODES=512, VOCAB=256)
XL = dict(SIDE=32, WIDTH=1152, DEPTH=28, HEADS=16, CODES=512, VOCAB=256, CLASSES=1000, DIM=1024)
MEDIUM = dict(LENGTH=512, VOCAB=256, WIDTH=1024, DEPTH=24, HEADS=16, COND=128)
SMALL = MEDIUM | dict(WIDTH=768, DEPTH=12, HEADS=12)
BACKBONE = dict(vit.SIZES['L'], patch_size=14, num_registers=4, pos_grid=37)
IMAGE = dict(input_size=32, channels=4, patch_size=2, **dit.SIZES['XL'])


def diffusers_vae():
    diffusers = pytest.importorskip('diffusers')
    return diffusers.AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)


CASES = {  # kind, module, where the twin is, its size, how it is made, number of parameters where it was published
    'ViT-L/14 reg4': ('dinov2', vit.VisionTransformer(**BACKBONE), test_dinov2_torch, LARGE,
                      lambda: test_dinov2_torch.ViT(4), None),
    'SEM 512x256': ('sem', sem.SEMEncoder(**BACKBONE, num_codes=512, vocab_size=256), test_dinov2_torch, LARGE,
                    lambda: test_dinov2_torch.SEM('plain'), 1_109_943_296),
    **{f'SEM 512x256 {form}': (
        'sem', sem.SEMEncoder(**BACKBONE, num_codes=512, vocab_size=256, form=form), test_dinov2_torch, LARGE,
        lambda form=form: test_dinov2_torch.SEM(form), count) for form, count in {
            'shared': 975_987_712, 'pos_shared': 976_512_000}.items()},
    'DiT-XL/2 512x256': ('dit', dit.DiT(condition='code', num_codes=512, vocab_size=256, **IMAGE), test_dit_torch, XL,
                         lambda: test_dit_torch.Twin('code'), 825_561_248),
    'DiT-XL/2 classes': ('dit', dit.DiT(condition='class', num_classes=1000, **IMAGE), test_dit_torch, XL,
                         lambda: test_dit_torch.Twin('class'), 675_129_632),
    'DiT-XL/2 embedding': ('dit', dit.DiT(condition='embedding', embedding_dim=1024, **IMAGE), test_dit_torch, XL,
                           lambda: test_dit_torch.Twin('embedding'), 675_157_152),
    'SEDD-medium 512x256': ('sedd', sedd.SEDD(vocab_size=256, length=512, **sedd.SIZES['medium']), test_sedd_torch,
                            MEDIUM, test_sedd_torch.Twin, 322_549_249),
    'SEDD-small 512x256': ('sedd', sedd.SEDD(vocab_size=256, length=512, **sedd.SIZES['small']), test_sedd_torch, SMALL,
                           test_sedd_torch.Twin, 93_168_897),
    'LLaDA-8B': ('llada', llama.Llama(**llama.SIZES['LLaDA-8B']), test_llada_torch, {},
                 lambda: test_llada_torch.TorchLLaDA(test_llada_torch.RELEASED), 8_015_581_184),
    'SD-VAE': ('sd_vae', vae.AutoencoderKL(), None, {}, diffusers_vae, None),
}


@pytest.mark.parametrize('name', CASES)
def test_names_and_shapes(name, monkeypatch):
    kind, module, file, size, make, published = CASES[name]
    for constant, value in size.items():
        monkeypatch.setattr(file, constant, value, raising=False)
    with torch.device('meta'):
        twin = make()
    assert convert.tensor_shapes(kind, module) == {key: tuple(x.shape) for key, x in twin.state_dict().items()}
    if published:
        buffers = {key for key, _ in twin.named_buffers()}
        counted = {key: x for key, x in convert.tensor_shapes(kind, module).items() if key not in buffers}
        assert sum(map(math.prod, counted.values())) == published


TABLE = {  # as the authors' repository has them, a few of each
    'SEM 512x256': {
        'register_tokens': (1, 4, 1024), 'pos_embed': (1, 1370, 1024), 'patch_embed.proj.weight': (1024, 3, 14, 14),
        'blocks.23.attn.qkv.weight': (3072, 1024), 'blocks.0.ls2.gamma': (1024,),
        'blocks.0.mlp.fc1.weight': (4096, 1024), 'sem_embed.weight': (131072, 5120), 'sem_norm.bias': (131072,),
        'sem_out.weight': (1024, 131072), 'sem_cls_norm.weight': (1024,)},
    'DiT-XL/2 512x256': {
        'pos_embed': (1, 256, 1152), 'x_embedder.proj.weight': (1152, 4, 2, 2), 't_embedder.mlp.0.weight': (1152, 256),
        'sem_embedder.embedding_table': (512, 257, 1152), 'blocks.27.attn.qkv.weight': (3456, 1152),
        'blocks.0.adaLN_modulation.1.weight': (6912, 1152), 'final_layer.linear.weight': (32, 1152),
        'final_layer.adaLN_modulation.1.bias': (2304,)},
    'SEDD-medium 512x256': {
        'pos_embed': (512, 1024), 'vocab_embed.embedding': (257, 1024), 'sigma_map.mlp.0.weight': (128, 256),
        'rotary_emb.inv_freq': (32,), 'blocks.23.norm2.weight': (1024,), 'blocks.0.attn_qkv.weight': (3072, 1024),
        'blocks.0.adaLN_modulation.bias': (6144,), 'output_layer.norm_final.weight': (1024,),
        'output_layer.linear.weight': (257, 1024), 'output_layer.adaLN_modulation.weight': (2048, 128)},
}


@pytest.mark.parametrize('name', TABLE)
def test_the_authors_shapes(name):
    kind, module, *_ = CASES[name]
    shapes = convert.tensor_shapes(kind, module)
    assert {key: shapes[key] for key in TABLE[name]} == TABLE[name]


def test_other_forms_of_a_dinov2():
    module = vit.VisionTransformer(**BACKBONE)
    theirs = convert.tensor_shapes('dinov2', module, hf=True)
    ours = convert.tensor_shapes('dinov2', module)
    assert len(theirs) == len(ours) + 2 * 2 * 24  # q, k, v apart
    assert sum(map(np.prod, theirs.values())) == sum(map(np.prod, ours.values()))
    assert theirs['encoder.layer.23.attention.attention.key.weight'] == (1024, 1024)
