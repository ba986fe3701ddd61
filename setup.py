"""Package metadata: `pip install .` installs the libraries dlc_jax and rlhf_jax and what they import.

Extras: runner (experiments/ and configs/, used from a checkout), test, text, translation,
parity, tpu, cuda, gcs, prepare.
"""
import pathlib
import re

from setuptools import find_packages, setup

# One flax release does not serve both Pythons: flax 0.12.12 needs jax >= 0.11.1, which needs Python >= 3.12.
JAX_STACK = [
    "jax>=0.10.2,<0.11; python_version<'3.12'",
    "flax>=0.12.8,<0.12.12; python_version<'3.12'",
    "jax>=0.11.1,<0.13; python_version>='3.12'",
    "flax>=0.12.12; python_version>='3.12'",
]
TEXT = [
    'tokenizers>=0.21',  # rlhf_jax.tokenizers.JsonTokenizer: tokenizer.json
    'jinja2>=3.1.6',  # rlhf_jax.chat: chat templates; older sandboxes have holes
    'pyarrow>=17',  # rlhf_jax.tasks.rows: parquet and arrow files
]
TRANSLATION = ['sacrebleu>=2.4']  # rlhf_jax.tasks.bleu.sacrebleu: BLEU as others report it
RUNNER = TEXT + [
    'orbax-checkpoint>=0.12.8',
    'clu>=0.0.12',
    'ml-collections>=1.1.0',
    'tensorflow-datasets>=4.9.10',
    'array-record>=0.8',
    'grain>=0.2.18',
    'etils[epath]>=1.13',
    'psutil>=5.9',  # how much memory is free
    'scikit-learn>=1.5',
    'matplotlib>=3.9',
    'tensorboardX>=2.6.2',
    'tqdm>=4.66',
]
# One source of the version: the libraries say it.
VERSION = re.search(r"^__version__ = '([^']+)'", pathlib.Path(__file__).with_name('rlhf_jax').joinpath(
    '__init__.py').read_text(), re.MULTILINE).group(1)

setup(
    name='dlc-jax',
    version=VERSION,
    description='Discrete Latent Codes, asynchronous RLHF and Elastic Reset in JAX/Flax, for TPU and GPU',
    license='Apache-2.0',
    python_requires='>=3.11',
    # Not `experiments` and `configs`: in site-packages those names would hide a researcher's own folders.
    packages=find_packages(include=['dlc_jax', 'dlc_jax.*', 'rlhf_jax', 'rlhf_jax.*']),
    install_requires=JAX_STACK + [
        'optax>=0.2.8',
        'chex>=0.1.92',
        'numpy>=2.0',
        'scipy>=1.14',  # jax needs it too
        'pillow>=11',  # dlc_jax.ssl.augment: crops of photographs
        'safetensors>=0.5',  # files of weights
    ],
    extras_require={
        'text': TEXT,
        'translation': TRANSLATION,
        'runner': RUNNER,
        'test': RUNNER + TRANSLATION + [
            'packaging>=24',
            'ruff==0.17.6', 'mypy==2.4.1',  # pinned: findings differ between versions
            'pytest>=8', 'pytest-xdist>=3.6', 'pytest-timeout>=2.3', 'hypothesis>=6.100',
            'setuptools>=70.1',  # a test builds the wheel without network
        ],
        # Oracles of tests/parity and reference of benchmarks/.
        'parity': ['torch>=2.4', 'transformers>=4.56', 'diffusers>=0.35', 'peft>=0.17'],
        'tpu': ["jax[tpu]>=0.10.2,<0.11; python_version<'3.12'", "jax[tpu]>=0.11.1,<0.13; python_version>='3.12'"],
        'cuda': ["jax[cuda13]>=0.10.2,<0.11; python_version<'3.12'",
                 "jax[cuda13]>=0.11.1,<0.13; python_version>='3.12'"],
        'gcs': ['etils[epath-gcs]>=1.13'],  # work directories and code stores at gs://
        'prepare': ['tensorflow-cpu>=2.20'],  # only to download and prepare TFDS data sets
    },
)
