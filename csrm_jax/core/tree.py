"""Named leaves of a pytree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns {'a/b/c': leaf} in the tree's own order.

  Dict keys, fields and indices each become one part of the name: a train state gives
  'params/embed/embedding', 'opt_state/0/mu/embed/embedding', 'step'.
  """
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name in named:
      raise ValueError(f'two leaves are named {name!r}; use keys without a slash')
    named[name] = leaf
  return named


def merge(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Returns one nested dict with the leaves of both, which must not overlap."""
  merged = dict(tree)
  for key, value in other.items():
    if key not in merged:
      merged[key] = value
    elif isinstance(value, Mapping) and isinstance(merged[key], Mapping):
      merged[key] = merge(merged[key], value)
    else:
      raise ValueError(f'both trees have a leaf at {key!r}')
  return merged


@jax.jit
def _are_finite(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: jnp.isfinite(x).all() for name, x in named.items()}


def check_finite(tree: Any, where: str) -> None:
  """Raises ValueError, one line with a leaf's name, unless all numbers of all leaves are finite."""
  found = jax.device_get(_are_finite(named_leaves(tree)))
  for name in (name for name, finite in found.items() if not finite):
    raise ValueError(
      f'{where}: {name} holds values that are NaN or infinite; take another checkpoint, or weights '
      'of a training that did not diverge'
    )


def num_params(tree: Any) -> int:
  """Returns the number of elements over all leaves (arrays or their shapes)."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
