"""Temperature and bias of scores, fitted on validation rows.

score' = score / temperature + bias, nats. The order of scores never changes,
so AUPRC and pair accuracy do not either; F1 at 0.5 and all calibration errors
do. Fitted by NLL, which is proper and convex here; binned errors are neither.

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize
from scipy.special import expit

from csrm_jax.evals.checks import check_finite, check_labels, check_same_length

# The slope 1 / temperature stays in this range: rows that a threshold splits
# without error would drive it to infinity.
_SLOPES = (1 / 50, 50.0)
_BIASES = (-50.0, 50.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """score / temperature + bias; as made, it changes nothing.

  Attributes:
    temperature: above 0; above 1 makes verdicts less sure.
    bias: nats, added after; above 0 makes "safe" likelier.
    num_examples: validation rows it was fitted on.
    nll_before, nll_after: mean -log P(label) of those rows, nats.
  """

  temperature: float = 1.0
  bias: float = 0.0
  num_examples: int = 0
  nll_before: float | None = None
  nll_after: float | None = None

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature > 0):
      raise ValueError(f'temperature={self.temperature} must be a number above 0')
    if not math.isfinite(self.bias):
      raise ValueError(f'bias={self.bias} must be a finite number of nats')

  def apply(self, scores: np.ndarray) -> np.ndarray:
    """Returns the calibrated scores, nats, of the same shape and type."""
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
      scores = scores.astype(np.float64)
    values = scores.astype(np.float64) / self.temperature + self.bias
    return values.astype(scores.dtype)

  def to_dict(self) -> dict[str, Any]:
    """Returns the plain form that `from_dict` reads."""
    return dataclasses.asdict(self)

  @staticmethod
  def from_dict(obj: Mapping[str, Any]) -> Calibration:
    """Returns the calibration; ValueError names what is missing or unknown."""
    names = {field.name for field in dataclasses.fields(Calibration)}
    if not {'temperature', 'bias'} <= set(obj) <= names:
      raise ValueError(
        f'a calibration has the keys {", ".join(sorted(names))}, of which '
        'temperature and bias are needed; found '
        f'{", ".join(sorted(map(str, obj))) or "none"}'
      )
    return Calibration(**obj)


def fit(labels: np.ndarray, scores: np.ndarray) -> Calibration:
  """Returns the temperature and bias of the lowest NLL on these rows.

  Args:
    labels: [N], 1 is unsafe; of rows that no result is reported on.
    scores: [N] nats.

  Raises:
    ValueError: a class is missing, or a score is not finite.
  """
  labels, scores = check_labels(labels), check_finite(scores)
  check_same_length(labels, scores)
  if not 0 < labels.sum() < len(labels):
    raise ValueError(
      f'{len(labels)} validation rows of which {labels.sum()} are unsafe: '
      'calibration needs rows of both labels; give more rows'
    )
  sign = np.where(labels == 1, -1.0, 1.0)

  def loss(weights):
    margin = sign * (weights[0] * scores + weights[1])
    missing = -sign * expit(-margin)
    gradient = np.array([np.mean(missing * scores), np.mean(missing)])
    return np.mean(np.logaddexp(0, -margin)), gradient

  found = optimize.minimize(
    loss,
    np.array([1.0, 0.0]),
    jac=True,
    method='L-BFGS-B',
    bounds=(_SLOPES, _BIASES),
    options={'ftol': 1e-14, 'gtol': 1e-9},
  )
  slope, bias = map(float, found.x)
  return Calibration(
    temperature=1 / slope,
    bias=bias,
    num_examples=len(labels),
    nll_before=float(loss(np.array([1.0, 0.0]))[0]),
    nll_after=float(found.fun),
  )


def calibrated(
  score_fn: Callable[..., np.ndarray], calibration: Calibration
) -> Callable[..., np.ndarray]:
  """Returns the score function with its scores calibrated."""

  def score(*args, **kwargs):
    return calibration.apply(score_fn(*args, **kwargs))

  return score
