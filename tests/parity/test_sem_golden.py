"""Encoder, heads and losses against outputs of the original modules (float32, CPU), and torch's own operators."""
import chex
import jax
import numpy as np
import pytest

from dlc_jax import convert
from dlc_jax.models import vit
from dlc_jax.ssl import dino, ibot, koleo, masking
from rlhf_jax.weights.files import load_state_dict

close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def section(golden, prefix):
    return {name.removeprefix(prefix): x for name, x in golden.items() if name.startswith(prefix)}


@pytest.fixture(scope='module')
def encoder(golden):
    return convert.from_torch('sem', section(golden, 'sem/param/'), num_codes=6, num_heads=2)


@pytest.fixture(scope='module')
def images(golden):
    return golden['sem/in/x'].transpose(0, 2, 3, 1)


@pytest.mark.parametrize('case', ['nomask', 'mask'])
def test_tokens(golden, encoder, images, case):
    module, params = encoder
    masks = golden['sem/in/masks'] if case == 'mask' else None
    out = jax.jit(lambda p: module.apply({'params': p}, images, masks))(params)
    for ours, name in ((out.cls, 'clstoken'), (out.registers, 'regtokens'), (out.patches, 'patchtokens')):
        close(ours, golden[f'sem/out/{case}/x_norm_{name}'])
    close(out.prenorm, golden[f'sem/out/{case}/x_prenorm'])
    if case == 'nomask':
        close(out.cls, golden['sem/out/head_forward'])
        close(out.logits, golden['sem/out/sem_logits'])
        close(out.sem, golden['sem/out/sem_softmax_t1'])
        np.testing.assert_array_equal(out.dlc, golden['sem/out/dlc'])


def test_shared_form(golden, images):
    module, params = convert.from_torch('sem', section(golden, 'sem_shared/param/'), num_heads=2)
    assert module.form == 'shared' and module.num_codes == 6
    close(jax.jit(lambda p: module.apply({'params': p}, images))(params).cls, golden['sem_shared/out/cls'])


def test_position_embeddings(golden):
    close(vit.interpolate_pos_embed(golden['sem/param/pos_embed'], (3, 3)), golden['sem/out/pos_interp'])


@pytest.mark.parametrize('grid', [(16, 16), (7, 7), (5, 9), (41, 37)])
@pytest.mark.parametrize('antialias', [True, False])
def test_position_embeddings_as_torch_interpolates(grid, antialias):
    torch = pytest.importorskip('torch')
    pos = np.random.default_rng(0).normal(size=(1, 1 + 37 * 37, 3)).astype(np.float32)
    size = dict(size=grid, antialias=True) if antialias else dict(scale_factor=tuple((n + 0.1) / 37 for n in grid))
    patches = torch.from_numpy(pos[:, 1:]).reshape(1, 37, 37, 3).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(patches, mode='bicubic', **size).permute(0, 2, 3, 1).reshape(1, -1, 3)
    ours = jax.jit(lambda x: vit.interpolate_pos_embed(x, grid, antialias=antialias))(pos)
    close(ours[:, 1:], theirs.numpy())


def test_dino_head(golden):
    head, params = convert.from_torch('dino_head', section(golden, 'dinohead/param/'))
    close(jax.jit(head.apply)({'params': params}, golden['dinohead/in/x']), golden['dinohead/out'])


def test_dino_targets_loss_and_center(golden):
    logits, center = golden['dino/in/teacher_logits'], golden['dino/in/center']
    teacher = dino.softmax_center(logits, center, 0.04)
    close(teacher, golden['dino/out/teacher_probs_T0.04'])
    student = np.stack([golden['dino/in/s1'], golden['dino/in/s2']])
    close(jax.jit(dino.dino_loss)(student, teacher[None]), golden['dino/out/loss'])
    close(dino.update_center(center, dino.batch_center(logits)), golden['dino/out/center_after'])


def test_ibot_loss_on_padded_patches(golden):
    _, weights = masking.pack_masks(golden['ibot/in/mask'], 12)
    pad = lambda x: np.concatenate([x, np.full((2, x.shape[1]), 0.5, np.float32)])
    loss = jax.jit(ibot.ibot_loss, static_argnames='num_crops')(
        pad(golden['ibot/in/student']), pad(golden['ibot/in/teacher_probs']), weights, num_crops=4)
    close(loss, golden['ibot/out/loss'])


def test_koleo_loss(golden):
    close(jax.jit(koleo.koleo_loss)(golden['koleo/in/x']), golden['koleo/out/loss'])


def test_what_torch_saves_loads_without_torch_types(tmp_path, golden):
    """Strided views, parameters, half precision, and a state dict beside other entries, as training scripts do."""
    torch = pytest.importorskip('torch')
    rows = torch.arange(12.0).reshape(3, 4)
    tensors = {'view': rows.T[1:], 'part': rows[1:, 2:], 'half': torch.ones(2, dtype=torch.bfloat16) / 3,
               'count': torch.tensor(3), 'param': torch.nn.Parameter(torch.ones(2)), 'empty': torch.zeros(0, 2)}
    torch.save({'teacher': tensors, 'iteration': 7, 'rates': [0.1]}, tmp_path / 'checkpoint.pth')
    for key in (None, 'teacher'):
        loaded = load_state_dict(tmp_path / 'checkpoint.pth', key=key)
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(np.asarray(loaded[name], np.float32), tensor.detach().float().numpy())
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'module.pth')
    with pytest.raises(ValueError, match='would run torch.nn.modules.linear.Linear'):
        load_state_dict(tmp_path / 'module.pth')


def test_torch_tensors_convert_as_they_are(golden, encoder):
    torch = pytest.importorskip('torch')
    state = {'module.backbone.' + name: torch.nn.Parameter(torch.from_numpy(x))
             for name, x in section(golden, 'sem/param/').items()}
    _, params = convert.from_torch('sem', state, num_codes=6, num_heads=2)
    chex.assert_trees_all_equal(params, encoder[1])
