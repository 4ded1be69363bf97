"""Checks and conversions of scores, labels and probabilities.

Evaluation fails closed: a value that is missing, nan or out of range is one
line of ValueError that names its row and, where known, its example's id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from csrm_jax.safety.schema import Example

# True probabilities of exactly 0 or 1 have no finite log odds.
_LOG_ODDS_FLOOR = 1e-6


def check_finite(
  values: np.ndarray, ids: Sequence[str] | None = None, name: str = 'score'
) -> np.ndarray:
  """Returns the values as float64 [N].

  Raises:
    ValueError: not one-dimensional, not one value per id, or a value is nan or
      infinite; names the row, its id where known, and how many there are.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1:
    raise ValueError(
      f'{name}: shape {values.shape} where one value per example, [N], is needed; flatten it'
    )
  if ids is not None and len(ids) != len(values):
    raise ValueError(
      f'{name}: {len(values)} values for {len(ids)} examples; give exactly one value per example'
    )
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    row = int(bad[0])
    who = f'row {row}' if ids is None else f'row {row} (id {ids[row]!r})'
    raise ValueError(
      f'{name}: {values[row]} at {who}, {bad.size} of {len(values)} values '
      'are not finite; look at that example and at the model that scored it'
    )
  return values


def check_probabilities(
  values: np.ndarray, ids: Sequence[str] | None = None, name: str = 'p_unsafe'
) -> np.ndarray:
  """Returns the values as float64 [N] in [0, 1]; ValueError otherwise."""
  values = check_finite(values, ids, name)
  bad = np.flatnonzero((values < 0) | (values > 1))
  if bad.size:
    row = int(bad[0])
    raise ValueError(
      f'{name}: {values[row]} at row {row} is outside [0, 1]; convert scores '
      'with p_unsafe_from_scores first'
    )
  return values


def check_labels(labels: np.ndarray) -> np.ndarray:
  """Returns the labels as int64 [N] in {0, 1}; ValueError otherwise."""
  values = np.asarray(labels)
  if values.ndim != 1:
    raise ValueError(
      f'labels: shape {values.shape} where one label per example, [N], is needed; flatten them'
    )
  bad = np.flatnonzero((values != 0) & (values != 1))
  if bad.size:
    row = int(bad[0])
    raise ValueError(
      f'labels: {values[row]!r} at row {row} is neither 0 (safe) nor 1 '
      '(unsafe); drop unlabelled examples first'
    )
  return values.astype(np.int64)


def check_rows(labels: np.ndarray, p_unsafe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns both, checked and of the same length."""
  labels, p_unsafe = check_labels(labels), check_probabilities(p_unsafe)
  check_same_length(labels, p_unsafe)
  return labels, p_unsafe


def check_same_length(*arrays: np.ndarray) -> None:
  """Checks that all have the same number of rows; ValueError otherwise."""
  lengths = [len(array) for array in arrays]
  if len(set(lengths)) > 1:
    raise ValueError(
      f'arrays of {lengths} rows where all must have the same number; pass one value per example'
    )


def p_unsafe_from_scores(scores: np.ndarray, ids: Sequence[str] | None = None) -> np.ndarray:
  """Returns P(unsafe), float64 [N], of scores in nats.

  A score is log P(safe) - log P(unsafe), so P(unsafe) = sigmoid(-score).
  """
  return expit(-check_finite(scores, ids))


def log_odds_safe(probability: np.ndarray) -> np.ndarray:
  """Returns the score, nats [N], of a judge that knows P(unsafe).

  Probabilities are clipped to [1e-6, 1 - 1e-6]: 0 and 1 have no finite score.
  """
  p = check_probabilities(probability, name='probability')
  p = np.clip(p, _LOG_ODDS_FLOOR, 1 - _LOG_ODDS_FLOOR)
  return np.log1p(-p) - np.log(p)


def labels_of(examples: Sequence[Example]) -> np.ndarray:
  """Returns the labels, int64 [N], 1 where unsafe."""
  return np.array([e.label == 'unsafe' for e in examples], np.int64)


def probability_of(examples: Sequence[Example]) -> np.ndarray | None:
  """Returns the true P(unsafe) [N], or None unless every example has one."""
  values = [example.probability for example in examples]
  if not values or any(value is None for value in values):
    return None
  return check_probabilities(values, [example.id for example in examples], 'probability')


def check_flip(a: Example, b: Example) -> None:
  """Checks that only the rules and the labels differ; ValueError otherwise."""
  if a.conversation != b.conversation:
    raise ValueError(
      f'flip of {a.id!r} and {b.id!r}: their conversations differ; only the rules may differ'
    )
  if {a.label, b.label} != {'safe', 'unsafe'}:
    raise ValueError(
      f'flip of {a.id!r} and {b.id!r}: labels {a.label} and {b.label}; give '
      'rule sets under which one is safe and the other unsafe'
    )
