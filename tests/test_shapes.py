"""Wrong shapes are refused where broadcasting would compute something else in silence. Nothing is computed here."""
import jax
import jax.numpy as jnp
import pytest

from dlc_jax import text_to_code
from dlc_jax.diffusion import remasking
from dlc_jax.diffusion.discrete import DiscreteDiffusion
from dlc_jax.diffusion.gaussian import GaussianDiffusion
from dlc_jax.ssl.dino import dino_loss
from dlc_jax.ssl.ibot import ibot_loss
from rlhf_jax.inversion import invert
from rlhf_jax.models.heads import at_last_token
from rlhf_jax.tasks import translation

CODES = jax.ShapeDtypeStruct((4, 6), jnp.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# function, arguments that fit, and which of them does not fit once it has another shape
CALLS = {
    'noise of one image': (GaussianDiffusion().corrupt, [floats(4, 8, 8, 1), CODES.update(shape=(4,)),
                                                         floats(4, 8, 8, 1)], 2, floats(8, 8, 1)),
    'one time for all codes': (DiscreteDiffusion(5).corrupt, [KEY, CODES, floats(4)], 2, floats(1)),
    'noise levels in a column': (DiscreteDiffusion(5).score_entropy, [floats(4, 6, 6), CODES, CODES, floats(4)], 3,
                                 floats(4, 1)),
    'gumbel noise of one row': (lambda x, y: remasking.propose(x, y, None, 1.0), [floats(4, 6, 5)] * 2, 1,
                                floats(6, 5)),
    'weights in a column': (lambda *args: ibot_loss(*args, num_crops=2), [floats(7, 3), floats(7, 3), floats(7)], 2,
                            floats(7, 1)),
    'one teacher for all rows': (dino_loss, [floats(3, 4, 7), floats(2, 4, 7)], 1, floats(2, 1, 7)),
    'a mask of one row': (at_last_token, [floats(4, 6), CODES], 1, CODES.update(shape=(1, 6))),
    'draws in a column': (invert, [floats(4, 9), floats(4)], 1, floats(4, 1)),
    'a baseline a message': (translation.speaker_loss, [floats(4, 6), floats(4, 6), floats(4, 6), floats(4), CODES], 2,
                             floats(4, 1)),
    'maskable tokens of one row': (text_to_code.masked_cross_entropy, [
        floats(4, 6, 9), CODES, CODES.update(dtype=bool), floats(4, 1), CODES.update(dtype=bool)], 4,
        jax.ShapeDtypeStruct((1, 6), bool)),
}


@pytest.mark.parametrize('name', CALLS)
def test_a_shape_that_would_broadcast_is_refused(name):
    function, arguments, index, wrong = CALLS[name]
    jax.eval_shape(function, *arguments)
    with pytest.raises(AssertionError, match=r'\[Chex\]'):
        jax.eval_shape(function, *arguments[:index], wrong, *arguments[index + 1:])
