"""Combiners: many scores as one. They are of members: models, or the heads of one.

Source of all but the last: Coste et al. 2023, Reward Model Ensembles (arXiv 2310.02743), §3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from csrm_jax import config as config_lib


def mean(scores: Any) -> Any:
  """Returns the mean of the members."""
  return scores.mean(0)


def worst(scores: Any) -> Any:
  """Returns the lowest of the members: what one of them rejects is not taken."""
  return scores.min(0)


def uwo(scores: Any, *, weight: float = 0.5) -> Any:
  """Returns mean − weight·variance of the members; the paper has 0.5 for best of n, 0.1 for PPO."""
  return scores.mean(0) - weight * scores.var(0)


def robust(scores: Any, *, nominal: float = 0.6) -> Any:
  """Returns nominal·(the first member) + (1 − nominal)·(the lowest).

  Source: Reward-robust RLHF (arXiv 2409.15360), eq. 4 by its abstract; that the first member is the
  nominal one is ours: there it is the head of the least spread.
  """
  return nominal * scores[0] + (1 - nominal) * scores.min(0)


# name -> (scores of M members in nats, [M,...]; knobs) -> one score each, [...]. NumPy or JAX.
COMBINERS: dict[str, Callable[..., Any]] = {
  'mean': mean,
  'worst': worst,
  'uwo': uwo,
  'robust': robust,
}


def choose(text: str, what: str = 'combine') -> Callable[[Any], Any]:
  """Returns the combiner that 'NAME' or 'NAME:KNOB=VALUE' names."""
  return config_lib.choose(what, COMBINERS, text)
