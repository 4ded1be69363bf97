"""Configurable safety reward models in JAX."""

from typing import Any

__all__ = ['load']


def __getattr__(name: str) -> Any:
  # Imported on first use: `import csrm_jax` alone does not start JAX.
  if name == 'load':
    from csrm_jax.reward.model import load

    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
