"""A tiny text-to-code model, generator and captions, and the config of a run that improves the model by a reward."""
import json

import jax
import jax.numpy as jnp
import numpy as np

from configs.dlc import base
from dlc_jax.models import dit
from experiments.dlc import encoder
from experiments.dlc.weights import kinds, writing
from experiments.runtime import config_files
from experiments.runtime import mesh as mesh_lib
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten

L, V, SIDE = 8, 4, 4
B, K = 4, 3
WORDS = ('blue', 'fox', 'in', 'red', 'snow')
CAPTIONS = ('red fox', 'blue fox in snow', 'snow', 'red snow', 'blue', 'fox in red snow')
DIT = dit.DiT(input_size=SIDE, channels=1, patch_size=2, width=16, depth=1, num_heads=2, num_codes=L, vocab_size=V)


def write_generator(folder, num_codes=L):
    """A generator's work directory; random weights, in which every code has a look of its own."""
    module = DIT.clone(num_codes=num_codes)
    shapes = param_shapes(module, jnp.zeros((1, SIDE, SIDE, 1)), jnp.zeros(1, jnp.int32),
                          jnp.zeros((1, num_codes), jnp.int32))
    rng = np.random.default_rng(0)
    spread = lambda name: 0.05 if name.startswith('final/linear') else 0.3  # so that pixels are neither black nor white
    params = unflatten({name: rng.normal(0, spread(name), x.shape).astype(np.float32)
                        for name, x in flatten(shapes).items()})
    config = config_files.load(kinds.published_config('dit')).unlock()
    config.model.update({name: getattr(module, name) for name in (
        'input_size', 'channels', 'patch_size', 'width', 'depth', 'num_heads', 'num_codes', 'vocab_size')})
    config.data.target, config.weights_only = 'images', True
    config.diffusion.beta_end = 0.002  # with more noise, two steps of a random network leave black and white alone
    writing.write_run('dit', config, params, folder)


def write_encoder(folder):
    """Work directory of an encoder of random weights."""
    config = config_files.load(kinds.published_config('sem')).unlock()
    config.model.update(dict(width=16, depth=1, num_heads=2, patch_size=2, pos_grid=2, num_codes=4, vocab_size=8))
    config.data.update(dict(global_size=SIDE, local_size=2, channels=1, mean=(0.5,), std=(0.5,)))
    config.weights_only = True
    rng = np.random.default_rng(0)
    shapes = param_shapes(encoder.make_model(config), jnp.zeros((1, SIDE, SIDE, 1)))
    params = unflatten({name: rng.normal(float(name.endswith(('scale', 'gamma'))), 0.5, x.shape).astype(np.float32)
                        for name, x in flatten(shapes).items()})
    writing.write_run('sem', config, params, folder)


def write_captions(path, **fields):
    """Captions, each with its number as `label` unless `fields` says otherwise."""
    rows = [{'caption': caption, 'label': i} | fields for i, caption in enumerate(CAPTIONS)]
    path.write_text('\n'.join(json.dumps({name: x for name, x in row.items() if x is not None}) for row in rows))


def write_inputs(root):
    write_generator(root / 'generator')
    write_captions(root / 'captions.jsonl')
    return root


def config_of(root, **fields):
    """`a__b=x` sets `config.a.b`."""
    config = base.align().copy_and_resolve_references().unlock()
    config.model.update(dict(width=16, depth=2, num_heads=2, hidden=32, max_length=16, text_vocab_size=2 + len(WORDS),
                             num_codes=L, vocab_size=V, init_std=0.3))
    config.words.update(dict(separator=2 + len(WORDS), mask_token=1, pad_token=0))
    config.tokenizer, config.vocabulary, config.caption_length = 'words', WORDS, 5
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 6, B, 1, 2
    config.sampler.update(dict(steps=4, temperature=1.0, remasking='random'))
    config.likelihood.num = 4
    config.generator.path = str(root / 'generator')
    config.generator.sampler.update(dict(name='ddim', num_steps=2, guidance=1.5))
    config.data.update(dict(path=str(root / 'captions.jsonl'), heldout=str(root / 'captions.jsonl')))
    config.reward.update(dict(kind='function', function='align_rewards:brightness'))
    config.algorithm.update(dict(num_samples=K, beta=0.05))
    config.optimizer.learning_rate.update(dict(peak=2e-2, decay='constant'))
    for name, value in fields.items():
        *path, last = name.split('__')
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def devices(count, **sizes):
    return mesh_lib.make_mesh(sizes, jax.devices()[:count])
