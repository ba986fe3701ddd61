"""Package metadata. Everything `pip install -e .` needs; extras: test, parity, tpu, cuda, gcs, translation, prepare."""
from setuptools import find_packages, setup

# One flax release does not serve both Pythons: flax 0.12.12 needs jax >= 0.11.1, which needs Python >= 3.12.
JAX_STACK = [
    "jax>=0.10.2,<0.11; python_version<'3.12'",
    "flax>=0.12.8,<0.12.12; python_version<'3.12'",
    "jax>=0.11.1,<0.13; python_version>='3.12'",
    "flax>=0.12.12; python_version>='3.12'",
]

setup(
    name='dlc-jax',
    version='0.1.0',
    description='Discrete Latent Codes, asynchronous RLHF and Elastic Reset in JAX/Flax, for TPU and GPU',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['dlc_jax*', 'rlhf_jax*', 'experiments*', 'configs*']),
    install_requires=JAX_STACK + [
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        'chex>=0.1.92',
        'clu>=0.0.12',
        'ml-collections>=1.1.0',
        'tensorflow-datasets>=4.9.10',
        'array-record>=0.8',
        'grain>=0.2.18',
        'etils[epath]>=1.13',
        'numpy>=2.0',
        'scipy>=1.13',
        'pillow>=11',
        'scikit-learn>=1.5',
        'matplotlib>=3.9',
        'safetensors>=0.5',
        'tokenizers>=0.21',
        'tensorboardX>=2.6.2',
        'tqdm>=4.66',
    ],
    extras_require={
        'test': ['pytest>=8', 'pytest-xdist>=3.6', 'pytest-timeout>=2.3', 'hypothesis>=6.100', 'sacrebleu>=2.4'],
        # Oracles of tests/parity and reference of benchmarks/.
        'parity': ['torch>=2.4', 'transformers>=4.56', 'diffusers>=0.35', 'peft>=0.17'],
        'tpu': ["jax[tpu]>=0.10.2,<0.11; python_version<'3.12'", "jax[tpu]>=0.11.1,<0.13; python_version>='3.12'"],
        'cuda': ["jax[cuda13]>=0.10.2,<0.11; python_version<'3.12'",
                 "jax[cuda13]>=0.11.1,<0.13; python_version>='3.12'"],
        'gcs': ['etils[epath-gcs]>=1.13'],  # work directories and code stores at gs://
        'translation': ['sacrebleu>=2.4'],  # BLEU of the translation game as others report it
        'prepare': ['tensorflow-cpu>=2.20'],  # only to download and prepare TFDS data sets
    },
)
