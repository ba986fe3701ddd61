"""What a user may get wrong, through the real commands: one line that names the thing and the fix, before anything is
computed.

Then what may go wrong around them: damaged images and checkpoints, a full disk, a signal.
"""
import errno
import os
import re
import resource
import signal
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from experiments import compile as compile_command
from experiments import encode, evaluate, quickstart, sample, train
from experiments.dlc.commands import sample_flags
from experiments.dlc.data import codestore, codestore_writer, samples
from experiments.quickstarts import dlc as dlc_quickstart
from experiments.runtime import config_files, hooks, launch, loop, modules
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.experiment import Experiment
from experiments.runtime.metrics import MetricsWriter
from experiments.runtime.state import TrainState

COMMANDS = {'train': train, 'encode': encode, 'sample': sample, 'evaluate': evaluate, 'quickstart': quickstart,
            'compile': compile_command}
L, V = 16, 16

CONFIG = """
from configs.dlc import quickstart

def get_config(kind):
    whole = quickstart.get_config('tiny').copy_and_resolve_references()
    config = (whole.generators[kind] if kind in whole.generators else whole[kind]).unlock()
    if kind != 'encoder':
        config.data.path = {store!r}
    return config
"""


def write_store(path, num=64, num_codes=L, meta=None, **arrays):
    rng = np.random.default_rng(0)
    meta = dict(num_codes=num_codes, vocab_size=V, class_names=['a', 'b'], encoder='a') | (meta or {})
    with codestore_writer.writer(path, num=num, meta=meta) as store:
        store.append({'codes': rng.integers(0, V, (num, num_codes)), 'labels': np.arange(num, dtype=np.int32) % 2,
                      'embeddings': rng.normal(size=(num, 32)).astype(np.float32),
                      'images': rng.integers(0, 256, (num, 8, 8, 1), np.uint8)} | arrays,
                     names=[str(i) for i in range(num)])


def write_run(config, workdir, checkpoint=True):
    """A work directory as training leaves it, with weights of 0: enough for whatever only looks at it."""
    config_files.save(config, workdir)
    if checkpoint:
        experiment = train.build(config, mesh_lib.make_mesh(config.mesh))
        key = jax.random.key(0)
        zeros = jax.tree.map(lambda x: key if x.dtype == key.dtype else np.zeros(x.shape, x.dtype),
                             jax.eval_shape(experiment.init, key))
        checkpointer = Checkpointer(workdir / 'checkpoints')
        checkpointer.save(4, zeros)
        checkpointer.close()


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """Names that stand in the arguments below -> what is there."""
    root = tmp_path_factory.mktemp('places')
    write_store(root / 'store')
    write_store(root / 'short_codes', num_codes=8)
    write_store(root / 'unlabelled', labels=np.full(64, -1, np.int32))
    write_store(root / 'odd_labels', labels=np.full(64, 10 ** 12), meta=dict(class_names=()))
    write_store(root / 'other_encoder', meta=dict(encoder='b'))
    write_store(root / 'large_images', images=np.zeros((64, 16, 16, 1), np.uint8))
    (root / 'tiny.py').write_text(CONFIG.format(store=str(root / 'store')))
    for kind in ('encoder', 'code', 'none', 'code_model'):
        write_run(config_files.load(f'{root}/tiny.py:{kind}'), root / kind)
    write_run(config_files.load(f'{root}/tiny.py:code'), root / 'no_checkpoint', checkpoint=False)
    short = config_files.load(f'{root}/tiny.py:code_model', ['--config.model.num_codes=8'])
    write_run(short, root / 'short_code_model')
    config_files.save(config_files.load('configs/dlc/quickstart.py'), root / 'quickstart')
    (root / 'damaged').mkdir()
    (root / 'damaged' / 'config.json').write_text('{"experiment": ')
    (root / 'empty').mkdir()
    (root / 'file').write_text('')
    (root / 'photos').mkdir()
    for name in ('a', 'b'):
        Image.fromarray(np.full((16, 16), 90, np.uint8)).save(root / 'photos' / f'{name}.png')
    (root / 'photos' / 'broken').mkdir()
    (root / 'photos' / 'broken' / 'c.png').write_bytes(b'\x89PNG but no more')
    (root / 'sizes').mkdir()
    for name, side in (('a', 16), ('b', 8)):
        Image.new('L', (side, side)).save(root / 'sizes' / f'{name}.png')
    (root / 'broken.py').write_text('def get_config(:\n')
    (root / 'raises.py').write_text('def get_config():\n    return {}["missing"]\n')
    (root / 'nothing.py').write_text('')
    write_store(root / 'cut')
    os.truncate(root / 'cut' / 'codes.npy', 200)
    np.savez(root / 'samples.npz', arr_0=np.zeros((8, 8, 8, 1), np.uint8))
    np.savez(root / 'floats.npz', arr_0=np.zeros((8, 8, 8, 1), np.float32))
    np.savez(root / 'other.npz', labels=np.zeros(8))
    np.savez(root / 'labels.npz', images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 10 ** 12]))
    for place in ('begun.shards/00000-of-00004', 'mixed.shards/00000-of-00002.partial', 'begun_whole.partial',
                  'mixed.shards/00001-of-00004.partial'):
        (root / place).mkdir(parents=True)
    write_store(root / 'begun.npz.partial' / 'images.shards' / '00000-of-00002', meta=dict(shard=[0, 2], first=0))
    (root / 'cut.npz').write_bytes((root / 'samples.npz').read_bytes()[:150])
    return root


@pytest.fixture
def call(places, monkeypatch, capfd):
    """Runs a command in this process: exit status and what it said on stderr."""
    def run(command, arguments):
        monkeypatch.setattr(sys, 'argv', [command, *arguments.format(at=places).split()])
        capfd.readouterr()
        try:
            launch.main(COMMANDS[command].main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        run.printed, said = capfd.readouterr()
        return status, said
    return run


@pytest.fixture
def nothing_computed(monkeypatch):
    """Compiling or running anything of size is a defect of the test's subject, and keeps its traceback."""
    def refuse(*unused, **also):
        raise AssertionError('computed something before the error')
    for target, name in ((jax, 'jit'), (loop, 'run'), (modules.Batched, '__call__')):
        monkeypatch.setattr(target, name, refuse)


TRAIN = '--config={at}/tiny.py:code --workdir={at}/new'
CLASSES = TRAIN + ' --config.model.condition=class'
GENERATOR = '--config=configs/dlc/generator_digits.py --workdir={at}/new'
ENCODER = '--config=configs/dlc/encoder_digits.py --workdir={at}/new'
SAMPLE = '--unconditional --code_model={at}/code_model --generator={at}/code --out={at}/new.png'
COMPOSE = '--compose {at}/photos/a.png {at}/photos/b.png --encoder={at}/encoder --out={at}/new.png'
ENCODE = '--encoder={at}/encoder --out={at}/new_codes'

BAD = {
    # ---- Flags and configs -------------------------------------------------------------------------------------------
    'no config': ('train', '--workdir={at}/new', '--config is missing'),
    'no workdir': ('train', '--config={at}/tiny.py:code', '--workdir is missing'),
    'flag misspelt': ('train', TRAIN + ' --work_dir=x', '--work_dir is not a flag; did you mean --workdir'),
    'flag value': ('sample', SAMPLE + ' --num=many', 'argument --num.*many'),
    'flag absent': ('sample', '--unconditional --out=x.png', '--generator'),
    'what to sample absent': ('sample', '--generator=x --out=x.png', 'one of the arguments --unconditional'),
    'config absent': ('train', '--config={at}/tinny.py --workdir=x', 'no file .*tinny.py; did you mean .*tiny.py'),
    'config does not parse': ('train', '--config={at}/broken.py --workdir=x', r'broken.py: SyntaxError'),
    'config raises': ('train', '--config={at}/raises.py --workdir=x', r"raises.py: KeyError: 'missing'"),
    'config without get_config': ('train', '--config={at}/nothing.py --workdir=x',
                                  'nothing.py: the file has no get_config'),
    'config without argument': ('train', ENCODER.replace('.py', '.py:big'),
                                'encoder_digits.py:big: this config has no sizes .*; leave out :big'),
    'config without name': ('train', '--config=configs/dlc/released.py --workdir=x',
                            'released.py: give one of its names, as in configs/dlc/released.py:NAME'),
    'config given to encode': ('encode', ENCODE + ' --config.seed=1', '--config.seed=1: this command has no --config'),
    'key': ('train', TRAIN + ' --config.batch_sise=3',
            'config.batch_sise is not a field; did you mean config.batch_size'),
    'type': ('train', TRAIN + ' --config.batch_size abc', 'config.batch_size=abc'),
    'zero steps': ('train', TRAIN + ' --config.num_steps=0', 'num_steps=0 must be at least 1; set --config.num_steps'),
    'negative steps': ('train', TRAIN + ' --config.num_steps=-5', 'num_steps=-5 must be at least 1'),
    'zero log_every': ('train', TRAIN + ' --config.log_every=0', 'log_every=0 must be at least 1'),
    'experiment': ('train', TRAIN + ' --config.experiment=generater', "experiment='generater' is not one of"),
    'dry run too': ('train', TRAIN + ' --dry_run --config.num_steps=0', 'num_steps=0'),
    # ---- Sizes that do not fit ---------------------------------------------------------------------------------------
    'generator patch': ('train', TRAIN + ' --config.model.patch_size=3',
                        'input_size=8 is not divisible by patch_size=3'),
    'encoder patch': ('train', ENCODER + ' --config.model.patch_size=5',
                      'data.global_size=8 is not divisible by model.patch_size=5'),
    'batch and mesh': ('train', TRAIN + ' --config.batch_size=12',
                       r'batch_size=12 is not divisible by 8 batch shards.*multiple of 8'),
    'mesh': ('train', TRAIN + ' --config.mesh.tensor=3', 'mesh: 8 devices cannot be divided by 3'),
    'mesh and model': ('train', TRAIN + ' --config.mesh.tensor=8', 'mesh.tensor'),
    # ---- Data --------------------------------------------------------------------------------------------------------
    'no store': ('train', TRAIN + ' --config.data.path={at}/nowhere',
                 'nowhere: no code store there; write one with python -m'),
    'truncated store': ('train', TRAIN + ' --config.data.path={at}/cut',
                        'codes.npy: truncated.*encode the data set again'),
    'L x V of the store': ('train', TRAIN + ' --config.data.path={at}/short_codes',
                           'L x V = 8 x 16 but model.num_codes=16'),
    'L x V of the code model': ('train',
                                '--config={at}/tiny.py:code_model --workdir={at}/new --config.model.vocab_size=32',
                                'L x V = 16 x 16 but model.vocab_size=32'),
    'images of another size': ('train', TRAIN + ' --config.data.path={at}/large_images',
                               r'images are \(16, 16, 1\).*input_size'),
    'class labels': ('train', CLASSES + ' --config.model.num_classes=1',
                     'labels are outside 0..0, the first is 1 in row 1'),
    'negative labels': ('train', CLASSES + ' --config.data.path={at}/unlabelled',
                        'labels are outside 0..999, the first is -1|labels are outside 0..9, the first is -1'),
    'latents absent': ('train', TRAIN + ' --config.data.target=latents', "no 'latents'; encode"),
    'data set': ('train', ENCODER + ' --config.data.name=digit', "did you mean 'digits'"),
    'split': ('train', ENCODER + ' --config.data.split=dev', "data.split='dev'"),
    'empty folder': ('train', ENCODER + ' --config.data.name=folder --config.data.path={at}/empty', 'empty: no .png'),
    'npz cut': ('train', ENCODER + ' --config.data.name=npz --config.data.path={at}/cut.npz', 'cut.npz: truncated'),
    'released weights absent': ('train', ENCODER + ' --config.pretrained={at}/dino.pth',
                                'pretrained=.*dino.pth: nothing there'),
    # ---- Work directories --------------------------------------------------------------------------------------------
    'workdir of another kind': ('train', '--config={at}/tiny.py:code --workdir={at}/encoder',
                                "encoder: holds a run of experiment='encoder', not 'generator'; "
                                'choose another --workdir'),
    'workdir of another shape': ('train', '--config={at}/tiny.py:code --workdir={at}/none',
                                 r'none/checkpoints/4: .* is absent in the checkpoint but .* in this config; '
                                 'use the config'),
    'workdir is a file': ('train', '--config={at}/tiny.py:code --workdir={at}/file',
                          '--workdir: .*file cannot be written'),
    'workdir cannot be made': ('train', '--config={at}/tiny.py:code --workdir={at}/file/run',
                               '--workdir: .*file/run cannot be written'),
    'quickstart of another config': ('quickstart', '--config=configs/dlc/quickstart.py:tiny --workdir={at}/quickstart',
                                     'holds a run with another config'),
    'quickstart at a URL': ('quickstart', '--workdir=gs://bucket/run',
                            'gs://bucket/run: needs a local folder'),
    'quickstart size': ('quickstart', '--config=configs/dlc/quickstart.py:huge --workdir={at}/new', "size 'huge'"),
    # ---- Sampling ----------------------------------------------------------------------------------------------------
    'generator absent': ('sample', SAMPLE.replace('{at}/code ', '{at}/nowhere '),
                         'nowhere: no config.json there; give the --workdir'),
    'generator without checkpoint': ('sample', SAMPLE.replace('{at}/code ', '{at}/no_checkpoint '),
                                     'no checkpoint there yet'),
    'generator damaged': ('sample', SAMPLE.replace('{at}/code ', '{at}/damaged '), 'damaged/config.json: damaged'),
    'encoder for a generator': ('sample', SAMPLE.replace('{at}/code ', '{at}/encoder '),
                                "holds a run of experiment='encoder'; give the --workdir of one of 'generator'"),
    'generator for an encoder': ('sample', COMPOSE.replace('{at}/encoder', '{at}/code') + ' --generator={at}/code',
                                 "experiment='generator'; give the --workdir of one of 'encoder'"),
    'code model absent': ('sample', '--unconditional --generator={at}/code --out={at}/new.png',
                          '--unconditional needs --code_model'),
    'code model of another L x V': ('sample', SAMPLE.replace('{at}/code_model', '{at}/short_code_model'),
                                    'codes of 8 x 16 but the generator takes 16 x 16'),
    'compose without codes': ('sample', COMPOSE + ' --generator={at}/none', "conditioned on 'none', not on codes"),
    'compose one': ('sample', '--compose {at}/photos/a.png --encoder={at}/encoder --generator={at}/code --out=x.png',
                    '--compose needs two images'),
    'compose without encoder': ('sample', '--compose a.png b.png --generator={at}/code --out=x.png', '--encoder=RUN'),
    'image absent': ('sample', COMPOSE.replace('a.png', 'z.png') + ' --generator={at}/code', 'z.png: no such file'),
    'image broken': ('sample', COMPOSE.replace('photos/a', 'photos/broken/c') + ' --generator={at}/code',
                     'c.png: not a readable image'),
    'classes of a code generator': ('sample', '--classes 1 --generator={at}/code --out={at}/new.png',
                                    "conditioned on 'code'"),
    'guidance of nothing': ('sample', '--unconditional --guidance=2 --generator={at}/none --out={at}/new.png',
                            '--guidance: this generator is unconditional'),
    'no samples': ('sample', SAMPLE + ' --num=0', '--num=0 must be at least 1'),
    'guidance that is no number': ('sample', SAMPLE + ' --guidance=nan', '--guidance=nan: must be a number'),
    'endless window': ('sample', SAMPLE + ' --window 0 inf', r'--window=.*inf.*: must be a number'),
    'sample seed': ('sample', SAMPLE + ' --seed=-1', '--seed=-1 must lie in 0..4294967295'),
    'sample seed too large': ('sample', SAMPLE + f' --seed={2 ** 32}', '--seed=4294967296 must lie in'),
    'more samples than there is memory': ('sample', SAMPLE + ' --num=1000000000000',
                                          '1000000000000 samples would take .*; make fewer at once'),
    'samples among other pictures': ('sample', SAMPLE.replace('{at}/new.png', '{at}/photos'),
                                     'photos holds other pictures or texts, such as a.png; give a directory'),
    'shard': ('sample', SAMPLE + ' --shard=3/2', '--shard=3/2: write I/N with I from 0 to N - 1'),
    'shard of a job': ('sample', SAMPLE + ' --shard=0/2 --distributed', 'share the work themselves'),
    'more shards than batches': ('sample', SAMPLE.replace('png', 'npz') + ' --num=4 --batch_size=2 --shard=0/3',
                                 '4 rows are 2 batches of 2; use at most 2 shards'),
    'shards of another number': ('encode', '--encoder={at}/encoder --out={at}/begun --batch_size=8 --shard=0/2',
                                 '--shard=0/2: 4 shards were begun at'),
    'a shard of what was begun whole': ('encode', '--encoder={at}/encoder --out={at}/begun_whole --batch_size=8 '
                                        '--shard=0/2', '--shard=0/2: the whole was begun at'),
    'shards of two numbers': ('encode', '--encoder={at}/encoder --out={at}/mixed', 'shards of 2 and of 4; delete'),
    'step': ('sample', SAMPLE + ' --step=first', "--step=first: give a checkpoint's step, 'all' or 'last'"),
    'step that was not kept': ('sample', SAMPLE + ' --step=9', '--step=9: .*code/checkpoints holds steps 4'),
    'steps that replace each other': ('sample', SAMPLE + ' --step=all', 'new.png would be written once for each'),
    'step of released weights': ('encode', '--encoder={at}/photos --out={at}/new_codes --step=4', 'no checkpoint'),
    'codes of another L x V': ('sample', '--codes={at}/short_codes --generator={at}/code --out={at}/new.npz',
                               'short_codes makes codes of 8 x 16 but the generator takes 16 x 16'),
    'codes for nothing': ('sample', '--codes={at}/store --save_codes={at}/new_codes', 'these are saved already'),
    'more samples than codes': ('sample', '--codes={at}/store --generator={at}/code --out={at}/new.npz --num=65',
                                '--num=65: --codes=.*store holds 64'),
    'codes of a generator of nothing': ('sample', '--codes={at}/store --generator={at}/none --out={at}/new.npz',
                                        'this generator is unconditional; use --unconditional'),
    'codes to keep of none': ('sample', '--unconditional --generator={at}/none --out={at}/new.npz '
                              '--save_codes={at}/new_codes', '--save_codes: the samples are not made of codes'),
    'nothing to make': ('sample', '--unconditional --code_model={at}/code_model', '--out is missing'),
    'a generator and no place': ('sample', '--unconditional --code_model={at}/code_model --generator={at}/code '
                                 '--save_codes={at}/new_codes', 'say with --out where they go'),
    'no batch': ('sample', SAMPLE + ' --batch_size=0', '--batch_size=0 must be at least 1'),
    'steps': ('sample', SAMPLE + ' --steps=0', r'--steps=0 must lie in 2..1000'),
    'code steps': ('sample', SAMPLE + ' --code_steps=-3', '--code_steps=-3 must be at least 1'),
    'eta': ('sample', SAMPLE + ' --eta=3', '--eta=3.0 is a probability'),
    'interval': ('sample', SAMPLE + ' --guidance_interval 0.8 0.2', '--guidance_interval=0.8 0.2: need 0 <= LOW'),
    'out of no kind': ('sample', SAMPLE + '.gif', r'new.png.gif: end it in .png'),
    'out cannot be written': ('sample', SAMPLE.replace('{at}/new.png', '{at}/file/x.png'),
                              '--out: .*file cannot be written'),
    'out is a directory': ('sample', SAMPLE.replace('{at}/new.png', '{at}/folder.png'), 'folder.png is a directory'),
    'autoencoder absent': ('sample', SAMPLE + ' --vae={at}/vae.safetensors', 'vae.safetensors'),
    # ---- Encoding ----------------------------------------------------------------------------------------------------
    'encoder is a generator': ('encode', '--encoder={at}/code --out={at}/new_codes',
                               "give the --workdir of one of 'encoder'"),
    'encode into a file': ('encode', '--encoder={at}/encoder --out={at}/file/codes', '--out: .*file cannot be written'),
    'encode into a folder of something else': ('encode', '--encoder={at}/encoder --out={at}/photos',
                                               'photos: is there already but is no'),
    'encode over another store': ('encode', '--encoder={at}/encoder --split=heldout --out={at}/store',
                                  'store: holds a store with'),
    'encode split': ('encode', ENCODE + ' --split=dev', "data.split='dev'"),
    'encode data': ('encode', ENCODE + ' --data=folder --path={at}/empty', 'empty: no .png'),
    'encode batch': ('encode', ENCODE + ' --batch_size=0', '--batch_size'),
    'encode a path that is not read': ('encode', ENCODE + ' --path={at}/photos',
                                       "--path=.*photos: the encoder was trained on 'digits', which reads no files; .*"
                                       '--data=folder'),
    'encode a path of digits': ('encode', ENCODE + ' --data=digits --path={at}/photos',
                                "data.path=.*photos: data.name='digits' reads no files"),
    'encode seed': ('encode', ENCODE + ' --seed=-1', '--seed=-1 must lie in 0..4294967295'),
    'encode workers': ('encode', ENCODE + ' --num_workers=-1', '--num_workers=-1 must not be negative'),
    'encode labels of a trillion': ('encode', ENCODE + ' --data=npz --path={at}/labels.npz',
                                    'labels lie in 0..1000000000000'),
    'encode flip': ('encode', ENCODE + ' --flip=1.5', '--flip=1.5 is a probability'),
    # ---- Evaluating --------------------------------------------------------------------------------------------------
    'nothing to measure': ('evaluate', '', 'nothing to measure'),
    'samples alone': ('evaluate', '--samples={at}/samples.npz', '--samples needs --reference'),
    'no feature space': ('evaluate', '--samples={at}/samples.npz --reference={at}/store',
                         '--samples needs a feature space'),
    'unfinished samples': ('evaluate', '--samples={at}/begun.npz --reference={at}/store --train={at}/store',
                           'begun.npz: unfinished, 1 of 2 shards; missing are 1/2; run the same'),
    'a curve without a place': ('evaluate', '--samples={at}/{{step}}.npz --reference={at}/store --train={at}/store '
                                '--step=all', 'say with --json=FILE where its rows go'),
    'a step without a place': ('evaluate', '--samples={at}/samples.npz --reference={at}/store --train={at}/store '
                               '--step=4', '--step=4: none of --samples'),
    'a step that is not there': ('evaluate', '--samples={at}/set{{step}}.npz --reference={at}/store '
                                 '--train={at}/store --step=4', '--step=4: no such .*set{step}.npz there'),
    'a set named twice': ('evaluate', '--samples {at}/samples.npz {at}/samples.npz --reference={at}/store '
                          '--train={at}/store', 'a set is named twice'),
    'heldout alone': ('evaluate', '--heldout={at}/store', '--heldout needs --train'),
    'samples absent': ('evaluate', '--samples=none.npz --reference={at}/store --train={at}/store',
                       'none.npz: nothing there'),
    'samples cut': ('evaluate', '--samples={at}/cut.npz --reference={at}/store --train={at}/store',
                    'cut.npz: truncated or no .npz'),
    'samples are text': ('evaluate', '--samples={at}/file --reference={at}/store --train={at}/store',
                         'file: truncated or no .npz'),
    'samples not uint8': ('evaluate', '--samples={at}/floats.npz --reference={at}/store --train={at}/store',
                          'float32 .*expected uint8'),
    'no images': ('evaluate', '--samples={at}/other.npz --reference={at}/store --train={at}/store',
                  r"holds \['labels'\], but no images"),
    'sizes differ': ('evaluate', '--samples={at}/samples.npz --reference={at}/large_images --train={at}/store',
                     r'--samples are \(8, 8, 1\) but --reference'),
    'stores differ': ('evaluate', '--train={at}/store --heldout={at}/short_codes',
                      r'L x V = \(16, 16\) but --heldout \(8, 16\)'),
    'stores of two encoders': ('evaluate', '--train={at}/store --heldout={at}/other_encoder',
                               r'--train .* and --heldout .* were written by different encoders'),
    'labels of a trillion': ('evaluate', '--train={at}/odd_labels --heldout={at}/odd_labels', 'go up to 1000000000000'),
    'pictures of two sizes': ('evaluate', '--samples={at}/sizes --reference={at}/store --train={at}/store',
                              r'sizes: b.png is \(8, 8, 1\) but a.png \(16, 16, 1\)'),
    'a broken picture': ('evaluate', '--samples={at}/photos/broken --reference={at}/store --train={at}/store',
                         'c.png: not a readable image'),
    'neither store nor pictures': ('evaluate', '--samples={at}/empty --reference={at}/store --train={at}/store',
                                   'empty: holds neither a code store nor images'),
    'json': ('evaluate', '--train={at}/store --heldout={at}/store --json={at}/file/x.json',
             '--json: .*file cannot be written'),
    # ---- Compiling ---------------------------------------------------------------------------------------------------
    'topology': ('compile', '--config={at}/tiny.py:code --topology=v9-4', "--topology='v9-4'"),
}


@pytest.mark.parametrize('command, arguments, says', BAD.values(), ids=BAD)
def test_one_line_that_names_the_thing(command, arguments, says, call, places, nothing_computed):
    if 'folder.png' in arguments:
        (places / 'folder.png').mkdir()
    status, said = call(command, arguments)
    assert status == 2
    lines = [line for line in said.strip().splitlines() if not line.startswith(('I ', 'W '))]
    assert len(lines) == 1 and lines[0].startswith('error: '), said
    assert re.search(says, lines[0]), said
    assert not list(places.glob('new*/checkpoints/*')) and not list(places.glob('new*.partial'))
    assert not list(places.glob('new*/config.json')), 'a run that did not start has claimed the work directory'


# ---- Around a run: stand-ins for the networks, everything else is real ---------------------------------------------

def hit_at(number):
    """A function that sends this process SIGTERM the `number`-th time it is called."""
    calls = []

    def hit():
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
    return hit


@pytest.fixture
def encoder(monkeypatch):
    """Takes the place of trained encoders; `encoder.each_batch` is called with every batch."""
    model = ml_collections.ConfigDict(dict(num_codes=L, vocab_size=V))
    data = dict(name='digits', path='', image_size=16, channels=1, global_size=16, heldout=0.25, num_workers=0)
    config = ml_collections.ConfigDict(dict(model=model, data=data))
    stub = types.SimpleNamespace(config=config, params={'w': np.ones(3)},
                                 transform=lambda image: image.astype(np.float32), each_batch=lambda: None)

    def codes(x, batch_size, outputs):
        stub.each_batch()
        value = x.reshape(len(x), -1).mean(1).astype(int) % V
        return {'codes': np.repeat(value[:, None], L, 1), 'embeddings': np.zeros((len(x), 4), np.float32)}
    stub.encode = codes
    monkeypatch.setattr(encode.Encoder, 'load', lambda path: stub)
    return stub


def test_a_corrupt_image_is_skipped_counted_and_named(call, encoder, tmp_path):
    for i in range(6):
        Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(tmp_path / f'{i}.png')
    (tmp_path / '4.png').write_bytes(b'\x89PNG but no more')
    status, _ = call('encode', f'--encoder=x --data=folder --path={tmp_path} --split=all --out={tmp_path}/codes')
    assert status == 0
    assert '1 unreadable image(s) have no row in the store: 4.png' in call.printed
    store = codestore.open_code_store(tmp_path / 'codes')
    assert store.names == ['0.png', '1.png', '2.png', '3.png', '5.png']


def test_encode_says_what_it_holds_back(call, encoder, tmp_path, caplog):
    np.savez(tmp_path / 'set.npz', images=np.zeros((8, 16, 16), np.uint8), labels=np.zeros(8, int))
    arguments = f'--encoder=x --data=npz --path={tmp_path}/set.npz --out={tmp_path}'
    assert call('encode', arguments + '/train')[0] == 0
    assert '--split=train: 6 images; 2 more are held back (data.heldout=0.25)' in caplog.text
    caplog.clear()
    for split in ('all', 'heldout'):
        assert call('encode', f'{arguments}/{split} --split={split}')[0] == 0
    assert 'held back' not in caplog.text
    assert [len(codestore.open_code_store(tmp_path / split)) for split in ('train', 'all', 'heldout')] == [6, 8, 2]


def folder_of_pictures(path, value, names=('a', 'b', 'c', 'd')):
    path.mkdir(parents=True)
    for name in names:
        Image.new('L', (16, 16), value).save(path / f'{name}.png')
    return path


@pytest.mark.parametrize('stopped', [False, True])
def test_the_store_of_another_data_set_is_not_taken_for_this_one(call, encoder, tmp_path, stopped, monkeypatch):
    """Of as many images, encoded by the same encoder: told apart by path, split, names, sizes and how they are read."""
    monkeypatch.setattr(codestore_writer, 'SYNC_SECONDS', 0)
    first = folder_of_pictures(tmp_path / 'first' / 'set', 10)
    arguments = f'encode --encoder=x --data=folder --split=all --batch_size=2 --out={tmp_path}/codes --path='
    if stopped:
        encoder.each_batch = hit_at(2)
    run = lambda path, more='': call('encode', f'{arguments}{path} {more}'.removeprefix('encode '))
    assert run(first)[0] == 0
    for change, field in (('', 'path'), ('--transparency=white', 'transparency'), ('--exif_orientation=apply', 'exif')):
        other = first if change else folder_of_pictures(tmp_path / 'second' / 'set', 200)
        status, said = run(other, change)
        assert status == 2 and f'holds a store with {field}' in said
    (first / 'd.png').rename(first / 'e.png')
    status, said = run(first)
    assert status == 2 and 'holds a store with source=' in said
    (first / 'e.png').rename(first / 'd.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)).save(first / 'd.png')
    status, said = run(first)
    assert status == 2 and 'holds a store with source=' in said


def test_encode_stopped_by_a_signal_continues(call, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'local_devices', lambda *unused, **also: jax.devices()[:1])
    arguments = f'--encoder=x --split=heldout --batch_size=100 --out={tmp_path}'
    assert call('encode', arguments + '/whole')[0] == 0
    encoder.each_batch = hit_at(3)
    status, said = call('encode', arguments + '/cut')
    assert status == 0 and said.strip().endswith('stopped by signal; run the same command to continue')
    with pytest.raises(OSError, match='unfinished, [12]00 of 450'):  # the third batch is computed beside writing
        codestore.open_code_store(tmp_path / 'cut')
    assert call('encode', arguments + '/cut')[0] == 0
    whole, cut = (codestore.open_code_store(tmp_path / name) for name in ('whole', 'cut'))
    for name in whole.arrays:
        np.testing.assert_array_equal(whole.array(name), cut.array(name))
    encoder.params = {'w': np.zeros(3)}
    status, said = call('encode', arguments + '/cut')
    assert status == 2 and 'holds a store with encoder=' in said


@pytest.fixture
def generator(monkeypatch, places):
    """Takes the place of trained generators; `generator.while_sampling` is called by `sample`."""
    stub = types.SimpleNamespace(config=config_files.read(places / 'none'), params={'w': np.ones(3)},
                                 while_sampling=lambda: None)

    def draw(key, cond, num, part, **unused):
        stub.while_sampling()
        return np.broadcast_to(np.float32(part)[:, None, None, None] / 127.5 - 1, (len(part), 8, 8, 1))
    stub.sample = draw
    monkeypatch.setattr(sample.Generator, 'load', lambda path: stub)
    return stub


def test_sample_stopped_by_a_signal_continues(call, generator, tmp_path):
    arguments = '--unconditional --generator=x --num=10 --batch_size=2 --out='
    assert call('sample', f'{arguments}{tmp_path}/whole.npz')[0] == 0
    calls, draw = [], generator.sample
    generator.sample = lambda key, cond, num, part, **also: calls.append(part) or draw(key, cond, num, part, **also)
    generator.while_sampling = hit_at(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'local_devices', lambda *unused, **also: jax.devices()[:1])
        status, said = call('sample', f'{arguments}{tmp_path}/cut.npz')
        assert status == 0 and said.strip().endswith('stopped by signal; run the same command to continue')
        assert not (tmp_path / 'cut.npz').exists()
        status, said = call('evaluate', f'--samples={tmp_path}/cut.npz --reference={tmp_path}/whole.npz --inception=x')
        assert status == 2 and re.search('cut.npz: unfinished, [246] of 10 images; run the same', said)
        status, said = call('sample', f'{arguments}{tmp_path}/cut.npz --seed=1')
        assert status == 2 and 'holds a store with seed=0, not 1' in said
        before = len(calls)
        assert call('sample', f'{arguments}{tmp_path}/cut.npz')[0] == 0
    # The signal is heeded between two batches, of which one more may have begun; what was written is not made again.
    assert before in (3, 4) and calls[before].start in (2, 4, 6)
    assert (tmp_path / 'cut.npz').read_bytes() == (tmp_path / 'whole.npz').read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ['cut.npz', 'whole.npz']
    with np.load(tmp_path / 'cut.npz') as arrays:
        np.testing.assert_array_equal(arrays['arr_0'][:, 0, 0, 0], np.arange(10))


def test_a_directory_holds_the_samples_of_one_run(call, generator, tmp_path, caplog):
    out = tmp_path / 'x'
    arguments = f'sample --unconditional --generator=x --out={out}/'.removeprefix('sample ')
    assert call('sample', arguments + ' --num=5')[0] == 0
    (out / '000001.txt').write_text('of an earlier run')
    (out / 'notes.md').write_text('stay')
    assert call('sample', arguments + ' --num=3')[0] == 0
    assert sorted(file.name for file in out.iterdir()) == ['000000.png', '000001.png', '000002.png', 'notes.md']
    assert 'replaced 6 files of an earlier run' in caplog.text


def test_evaluate_reads_what_sample_writes(call, generator, places, tmp_path):
    assert call('sample', f'--unconditional --generator=x --num=3 --out={tmp_path}/x/')[0] == 0
    images = evaluate.load_images(f'{tmp_path}/x')
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(places / 'new_rgb.png')
    (tmp_path / 'rgb').mkdir()
    (places / 'new_rgb.png').rename(tmp_path / 'rgb' / '0.png')
    np.testing.assert_array_equal(evaluate.load_images(f'{tmp_path}/rgb'), np.full((1, 4, 6, 3), 7))


@pytest.mark.parametrize('grey, colour', [('0.png', '1.png'), ('1.png', '0.png')])
def test_one_image_in_colour_makes_a_folder_one_of_colour(tmp_path, grey, colour):
    """Data sets of photographs have grey ones among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(tmp_path / grey)
    Image.fromarray(pixels).save(tmp_path / colour)
    want = {grey: np.repeat(pixels[..., :1], 3, -1), colour: pixels}
    np.testing.assert_array_equal(evaluate.load_images(str(tmp_path)), [want['0.png'], want['1.png']])
    (tmp_path / '1.png').write_bytes(b'no image')
    Image.fromarray(pixels[..., 0]).save(tmp_path / '0.png')
    with pytest.raises(OSError, match='1.png: not a readable image'):
        evaluate.load_images(str(tmp_path))


def test_texts_in_a_file(tmp_path):
    (tmp_path / 'x.txt').write_bytes('\ufeffa fox\u2028 in snow\r\n\n a hare \n'.encode())
    args = sample_flags.parser('').parse_args(['--text_file', str(tmp_path / 'x.txt'), '--generator=x', '--out=x'])
    assert sample_flags.read_texts(args) == ['a fox\u2028 in snow', 'a hare']
    (tmp_path / 'x.txt').write_bytes(b'\xff\xfea\x00')
    with pytest.raises(ValueError, match='x.txt: not UTF-8 text .byte 0'):
        sample_flags.read_texts(args)


def test_a_full_disk_does_not_cost_the_samples(call, generator, tmp_path, monkeypatch):
    def full(*unused):
        raise OSError(errno.ENOSPC, 'No space left on device')
    arguments = f'--unconditional --generator=x --num=3 --out={tmp_path}/x.npz'
    with monkeypatch.context() as patch:
        patch.setattr(samples, 'write', full)
        status, said = call('sample', arguments)
    assert status == 2 and f'No space left on device; the samples are in {tmp_path}/x.npz.partial, make room' in said
    generator.while_sampling = lambda: pytest.fail('they were made already')
    assert call('sample', arguments)[0] == 0
    with np.load(tmp_path / 'x.npz') as arrays:
        assert arrays['arr_0'].shape == (3, 8, 8, 1)


def test_quickstart_stopped_by_a_signal_says_how_to_continue(call, tmp_path, monkeypatch):
    hit = hit_at(1)
    monkeypatch.setattr(dlc_quickstart, 'train', lambda *unused, **also: hit())
    status, said = call('quickstart', f'--config=configs/dlc/quickstart.py:tiny --workdir={tmp_path}')
    assert status == 0 and 'run the same command to continue' in said


WIDTH = 65536  # of the linear model: 1 MiB, so that compressed and split over files each is over the limit below


@pytest.fixture
def linear(monkeypatch):
    """A linear model in place of the networks, so that `train` runs in no time."""
    class Stream:
        def __init__(self):
            self.position = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.position += 1
            return {'x': np.random.default_rng(self.position).normal(size=(8, 4)).astype(np.float32)}

        def get_state(self):
            return {'position': self.position}

        def set_state(self, state):
            self.position = state['position']

    def loss(params, state, batch, rng):
        return jnp.mean((batch['x'] @ params['w']) ** 2), {}

    def step(state, batch):
        value, grads = jax.value_and_grad(lambda p: loss(p, state, batch, None)[0])(state.params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
        return state.replace(step=state.step + 1, params=params), {'loss': value}

    def init(key):
        return TrainState(jnp.int32(0), {'w': jax.random.normal(key, (4, WIDTH))}, (), None, key)

    experiment = Experiment(init, loss, step, ((r'w', PartitionSpec()),),
                            {'x': jax.ShapeDtypeStruct((8, 4), jnp.float32)}, Stream)
    monkeypatch.setattr(train, 'build', lambda config, mesh: experiment)


def weights(workdir):
    like = {'w': jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)}
    checkpointer = Checkpointer(workdir / 'checkpoints', read_only=True)
    step, state, _ = checkpointer.restore(TrainState(jax.ShapeDtypeStruct((), jnp.int32), like, (), None,
                                                     jax.eval_shape(jax.random.key, 0)))
    checkpointer.close()
    return step, np.asarray(state.params['w'])


def test_a_truncated_newest_checkpoint_falls_back_and_says_so(call, linear, places, tmp_path, caplog):
    arguments = '--config={at}/tiny.py:none --workdir=' + str(tmp_path)
    assert call('train', arguments)[0] == 0
    step, whole = weights(tmp_path)
    for path in (tmp_path / 'checkpoints' / '8' / 'state').rglob('*'):
        if path.is_file() and path.stat().st_size > 64:
            os.truncate(path, path.stat().st_size // 2)
    assert call('train', arguments)[0] == 0
    assert 'unreadable checkpoint 8' in caplog.text and 'continuing from 4' in caplog.text
    again, resumed = weights(tmp_path)
    assert step == again == 8
    np.testing.assert_array_equal(whole, resumed)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # as in test_loop_checkpoint.py
def test_a_full_disk_costs_no_step_that_was_saved(call, linear, places, tmp_path, monkeypatch):
    arguments = '--config={at}/tiny.py:none --workdir=' + str(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = hooks.Save.save

    def save_on_a_full_disk(self, step, state, metrics):
        if step > 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, limits[1]))
        save(self, step, state, metrics)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(hooks.Save, 'save', save_on_a_full_disk)
            status, said = call('train', arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert re.search('error: could not write checkpoint 8 .*checkpoint 4 is intact.*run the same command again', said)
    assert call('train', arguments)[0] == 0 and weights(tmp_path)[0] == 8


def test_train_stopped_by_a_signal_continues(call, linear, places, tmp_path, monkeypatch):
    arguments = '--config={at}/tiny.py:none --workdir=' + str(tmp_path)
    hit, write = hit_at(2), MetricsWriter.write

    def write_and_hit(self, step, values):
        write(self, step, values)
        hit()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', write_and_hit)
        status, said = call('train', arguments)
    assert status == 0
    assert re.search(r'stopped by signal at step \d of 8, state saved; run the same command to continue', said)
    assert weights(tmp_path)[0] < 8
    assert call('train', arguments)[0] == 0 and weights(tmp_path)[0] == 8
    status, said = call('train', arguments + ' --config.num_steps=6')
    assert status == 0 and weights(tmp_path)[0] == 8
