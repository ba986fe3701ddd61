"""Who may import whom. The libraries know nothing of the runner, and nothing heavy hides at module scope."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAVY = {'tensorflow', 'torch', 'wandb', 'transformers', 'diffusers'}
LIBRARY = {'jax', 'flax', 'optax', 'chex', 'numpy'}
EXTRA = {'dlc_jax/preprocess.py': {'PIL'}, 'dlc_jax/ssl/augment.py': {'PIL'},
         'rlhf_jax/rollout/publish.py': {'safetensors'}, 'rlhf_jax/weights/files.py': {'safetensors'},
         'rlhf_jax/tokenizers.py': {'tokenizers'}, 'rlhf_jax/chat.py': {'jinja2'},
         'rlhf_jax/tasks/rows.py': {'pyarrow'}, 'rlhf_jax/tasks/bleu.py': {'sacrebleu'}}
# The two libraries share LLaDA, which is LLaMA without the causal mask, the machinery that converts weights, and what
# transformers and samplers of either kind consist of: scanned blocks, rotary positions, draws by inversion.
BETWEEN_LIBRARIES = {'dlc_jax/__init__.py': ('rlhf_jax.__version__',),
                     'dlc_jax/text_to_code.py': ('rlhf_jax.models.llama',),
                     'dlc_jax/diffusion/discrete.py': ('rlhf_jax.inversion',),
                     **{f'dlc_jax/models/{name}.py': ('rlhf_jax.models.layers', 'rlhf_jax.models.attention',
                                                   'rlhf_jax.models.functions')
                        for name in ('layers', 'dit', 'rdm', 'sedd', 'vit')},
                     'dlc_jax/ssl/dino.py': ('rlhf_jax.models.functions',),
                     'dlc_jax/convert/llada.py': ('rlhf_jax.models.llama', 'rlhf_jax.weights')}


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob('*.py'))


def imported(path, *, module_scope):
    """Dotted names that `path` imports, at module scope or anywhere: of a module, or of what is taken from one."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_scope else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return names


@pytest.mark.parametrize('path', files('dlc_jax', 'rlhf_jax'), ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_import_no_runner_and_nothing_heavy(path):
    package = path.relative_to(ROOT).parts[0]
    name = str(path.relative_to(ROOT))
    allowed = LIBRARY | EXTRA.get(name, set()) | {package} | set(sys.stdlib_module_names)
    if name.startswith('dlc_jax/metrics/'):
        allowed |= {'scipy'}
    between = BETWEEN_LIBRARIES.get(name, ())
    if name.startswith('dlc_jax/convert/'):
        between += ('rlhf_jax.weights',)
    for module in imported(path, module_scope=False):
        if module.startswith(between):
            continue
        assert module.split('.')[0] in allowed, f'{name} imports {module}'


@pytest.mark.parametrize('path', files('experiments', 'configs'), ids=lambda p: str(p.relative_to(ROOT)))
def test_runner_has_nothing_heavy_at_module_scope(path):
    assert not {m.split('.')[0] for m in imported(path, module_scope=True)} & HEAVY


# Folders of the runner -> what of this project they may import beside themselves. Commands (experiments/*.py) may
# import everything, and are imported by quickstarts and by each other only.
COMMON = ('experiments.runtime', 'rlhf_jax')
MODELS = (*COMMON, 'experiments.rlhf.data', 'experiments.rlhf.models')
# LLaDA is a LLaMA; weight files and tokenizers know neither images nor language.
IMAGES = ('experiments.runtime', 'dlc_jax', 'rlhf_jax.models.llama', 'rlhf_jax.models.lora', 'rlhf_jax.weights',
          'rlhf_jax.tokenizers')
ROOMS = {
    'experiments/runtime': (),
    'experiments/dlc': (*IMAGES, 'experiments.dlc.data'),
    'experiments/dlc/data': IMAGES,
    'experiments/dlc/weights': (*IMAGES, 'experiments.dlc'),
    'experiments/dlc/commands': (*IMAGES, 'experiments.dlc'),
    'experiments/rlhf': (),
    'experiments/rlhf/data': COMMON,
    'experiments/rlhf/data/tasks': COMMON,
    'experiments/rlhf/models': (*COMMON, 'experiments.rlhf.data'),
    'experiments/rlhf/supervised': MODELS,
    'experiments/rlhf/policy': MODELS,
    'experiments/rlhf/translation': COMMON,
    'experiments/rlhf/lewis': COMMON,
    'experiments/sweeps': ('experiments.runtime',),
    'experiments/align': ('experiments.runtime', 'experiments.dlc', 'experiments.rlhf', 'dlc_jax', 'rlhf_jax'),
    'experiments/quickstarts': ('experiments', 'configs', 'dlc_jax', 'rlhf_jax'),
    'configs': ('dlc_jax', 'rlhf_jax'),
    'configs/dlc': ('configs.parts', 'dlc_jax'),
    'configs/rlhf': ('configs.parts', 'rlhf_jax'),
}


def inside(module, packages):
    return any(module == package or module.startswith(f'{package}.') for package in packages)


def room_of(module):
    """The innermost folder of `ROOMS` that holds `module`."""
    return max((folder for folder in ROOMS if inside(module, (folder.replace('/', '.'),))), key=len, default=None)


@pytest.mark.parametrize('path', [path for path in files('experiments', 'configs')
                                  if path.parent.name != 'experiments'], ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_of_the_runner_import_what_they_may(path):
    folder = str(path.parent.relative_to(ROOT))
    assert folder in ROOMS, f'{folder} is new: say in ROOMS what it may import'
    for module in imported(path, module_scope=False):
        if inside(module, ('experiments', 'configs', 'dlc_jax', 'rlhf_jax')):
            assert room_of(module) == folder or inside(module, ROOMS[folder]), f'{folder} may not import {module}'


def test_importing_the_library_brings_neither_tensorflow_nor_torch():
    code = ('import sys, dlc_jax, rlhf_jax.refill, rlhf_jax.tokenizers, rlhf_jax.convert.peft, rlhf_jax.models.seq2seq;'
            'import experiments.train, experiments.dlc.encoder, experiments.dlc.generator, experiments.dlc.code_model;'
            'import experiments.rlhf.policy.experiment, experiments.rlhf.supervised.sft, experiments.generate;'
            'import experiments.rlhf.translation.game;'
            'heavy = {"tensorflow", "torch", "sklearn.neural_network", "transformers", "tokenizers"};'
            'sys.exit(bool(heavy & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_importing_all_of_rlhf_jax_brings_neither_the_runner_nor_anything_heavy():
    names = ('.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in files('rlhf_jax'))
    modules = [name.removesuffix('.__init__') for name in names]
    unwanted = HEAVY | {'dlc_jax', 'experiments', 'configs', 'safetensors', 'tokenizers', 'orbax', 'pyarrow',
                        'sacrebleu'}
    code = (f'import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n'
            f'found = {unwanted} & set(sys.modules)\nprint(found)\nsys.exit(bool(found))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
