"""Tests, and the processes that they start, share the compiled programs that runs keep."""

import os
import pathlib

import pytest

# Before JAX is imported. A second run of the tests compiles nearly nothing; within the first, what
# many of them compile is compiled once.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path('~/.cache/csrm_jax').expanduser())
)
# Tests compile much and compute little: less than half the time goes to code that is not tuned.
# Whoever sets XLA_FLAGS, even to nothing, tests what runs run; .ci/run does so where versions and
# numbers are compared.
_UNTUNED = '--xla_backend_optimization_level=0'
os.environ.setdefault('XLA_FLAGS', _UNTUNED)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')


def pytest_runtest_setup(item):
  if item.get_closest_marker('tuned') and _UNTUNED in os.environ['XLA_FLAGS']:
    pytest.skip('compares roundings of what is compiled as runs are: XLA_FLAGS= pytest -m tuned')
