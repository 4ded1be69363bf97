"""Thresholds of verdicts, fitted on labelled rows of each policy.

A threshold is a score in nats: a reply is flagged if its score is at most that. It is an order
statistic of the scores of one class, so that how often replies of this class are flagged does not
depend on the other, nor on how common either is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from csrm_jax.core import checks, files
from csrm_jax.evals import metrics

METHODS = ('empirical', 'conformal', 'confident')
# What a level bounds: the share of safe replies that are flagged, or of unsafe ones that are not.
BOUNDS = ('flagged', 'missed')


@dataclasses.dataclass(frozen=True)
class Threshold:
  """From which score on a reply is flagged, and what it was fitted on."""

  score: float  # nats; flagged if the reply's is at most this
  method: str  # one of METHODS
  bound: str  # one of BOUNDS
  level: float  # the bound's share
  confidence: float  # of method 'confident'; else 0
  num_safe: int  # labelled rows
  num_unsafe: int
  flagged_safe: float | None  # the shares of these rows that are flagged; None of no rows
  flagged_unsafe: float | None

  @property
  def p_unsafe(self) -> float:
    """The P(unsafe) from which on a reply is flagged."""
    return float(scipy.special.expit(-self.score))

  def flags(self, score: float) -> bool:
    return bool(score <= self.score)


def fit(
  labels: np.ndarray,
  scores: np.ndarray,
  level: float,
  method: str = METHODS[1],
  bound: str = BOUNDS[0],
  confidence: float = 0.95,
) -> Threshold:
  """Returns the threshold that flags most and keeps the bound.

  Rows are those of one policy (Mondrian: groups have thresholds of their own, so that the guarantee
  holds in each). With bound 'flagged' it uses the n rows that are labelled safe, whose scores in
  ascending order are s_1 ... s_n, and flags a reply whose score is below s_k:

  - 'empirical', k = floor(level n) + 1: at most that share of these rows is flagged. It promises
    nothing about others.
  - 'conformal', k = floor(level (n + 1)): a further safe reply is flagged with probability at most
    k / (n + 1) <= level, if it is exchangeable with these rows. The probability is over rows and
    reply together: for one particular set of rows the rate may lie above the level.
  - 'confident', the largest k with P(Beta(k, n + 1 - k) <= level) >= confidence: with that
    probability over the rows, the rate of all further safe replies is at most the level.

  No promise holds for replies that come from elsewhere than the rows, or for edited rules. With
  bound 'missed' the same holds of unsafe replies that are not flagged, and k counts from above.

  Args:
    labels: bool [N], True for unsafe.
    scores: float [N], nats.

  Raises:
    ValueError: There are too few rows for the promise.

  Source: Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World (2005), for Mondrian
    predictors; Vovk, Conditional validity of inductive conformal predictors (2012).
  """
  checks.one_of('method', method, METHODS)
  checks.one_of('bound', bound, BOUNDS)
  if not 0 < level < 1:
    raise ValueError(f'the level is {level}; it must be a share between 0 and 1')
  if method == 'confident' and not 0 < confidence < 1:
    raise ValueError(f'the confidence is {confidence}; it must be between 0 and 1')
  labels, scores = np.asarray(labels, bool), metrics.check_finite(scores).astype(np.float64)
  metrics.check_same_length(labels, scores)
  own = np.sort(scores[~labels]) if bound == 'flagged' else -np.sort(-scores[labels])
  n = len(own)
  k = _place(n, level, method, confidence)
  if not k:
    kind = 'safe' if bound == 'flagged' else 'unsafe'
    need = _rows_needed(level, method, confidence)
    raise ValueError(
      f'{n} {kind} rows, and method={method} needs {need} for a level of {level:g}; label more, '
      'raise the level, or take method=empirical'
    )
  # The row itself is not flagged, or not missed. Kept as float32, as scores are.
  at = np.float32(own[k - 1])
  cut = float(np.nextafter(at, np.float32(-np.inf))) if bound == 'flagged' else float(at)
  flagged = scores <= cut
  return Threshold(
    cut,
    method,
    bound,
    level,
    confidence if method == 'confident' else 0.0,
    int((~labels).sum()),
    int(labels.sum()),
    *(float(flagged[rows].mean()) if rows.any() else None for rows in (~labels, labels)),
  )


def _place(n: int, level: float, method: str, confidence: float) -> int:
  """Returns k, from 1 to n, or 0 where no row can be taken."""
  # A level such as 0.07 times 100 must not fall below 7.
  if method == 'empirical':
    return min(math.floor(level * n + 1e-9) + 1, n) if n else 0
  if method == 'conformal':
    return min(math.floor(level * (n + 1) + 1e-9), n)
  places = np.arange(1, n + 1)
  kept = scipy.stats.beta.cdf(level, places, n + 1 - places) >= confidence
  return int(kept.sum())  # it falls with k


def _rows_needed(level: float, method: str, confidence: float) -> int:
  if method == 'empirical':
    return 1
  if method == 'conformal':
    return math.ceil(1 / level - 1e-9) - 1
  return math.ceil(math.log1p(-confidence) / math.log1p(-level) - 1e-9)


# --- Files -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """Thresholds by digest of rules, for one model and no other."""

  model: str  # digest of its weights
  calibration: tuple[float, float] | None  # temperature and bias of its scores
  by_rules: Mapping[str, Threshold]
  names: Mapping[str, str]  # of rules, for people
  # Where streams are judged, the fields of reward.monitor.Cuts; None: thresholds of whole replies.
  stream: Mapping[str, Any] | None = None

  def save(self, path: pathlib.Path) -> None:
    """Writes a JSON file."""
    rows = [
      {'policy': self.names[digest], 'digest': digest, 'p_unsafe': found.p_unsafe}
      | dataclasses.asdict(found)
      for digest, found in self.by_rules.items()
    ]
    about = {'model': self.model, 'calibration': self.calibration}
    about |= {'stream': dict(self.stream)} if self.stream else {}
    files.write(path, json.dumps(about | {'policies': rows}, indent=2) + '\n')


def load(
  path: str, model: str, calibration: metrics.Calibration | None, of_streams: bool = False
) -> Thresholds:
  """Returns the thresholds of a file.

  Args:
    model: The digest of the weights that they are used with.
    calibration: What is applied to their scores.
    of_streams: Whether they are for streams, not for whole replies.

  Raises:
    ValueError: They were fitted for another model, calibration or use, or it is no such file.
  """
  obj = files.read_json(path, dict)
  fields = {field.name for field in dataclasses.fields(Threshold)}
  try:
    by_rules, names = {}, {}
    for row in obj['policies']:
      by_rules[row['digest']] = Threshold(**{name: row[name] for name in fields})
      names[row['digest']] = row['policy']
      if not math.isfinite(by_rules[row['digest']].score):
        raise ValueError('a score is not finite')
    fitted_on, fitted, stream = obj['model'], obj['calibration'], obj.get('stream')
  except (LookupError, TypeError, ValueError) as error:
    raise ValueError(
      f'{path}: not a file of thresholds ({checks.reason(error)}); give the thresholds.json that '
      'configs/calibrate.py wrote'
    ) from None
  now = calibration and [calibration.temperature, calibration.bias]
  for what, then, here in (('weights', fitted_on, model), ('calibration', fitted, now)):
    if then != here:
      raise ValueError(
        f'{path}: fitted for another model ({what} {str(then)[:24]}, here {str(here)[:24]}); run '
        'configs/calibrate.py on this one'
      )
  if bool(stream) != of_streams:
    what, fix = ('streams', 'without') if stream else ('whole replies', 'with')
    raise ValueError(
      f'{path}: its thresholds are for {what}; run configs/calibrate.py {fix} stream=words or turns'
    )
  return Thresholds(fitted_on, fitted and tuple(fitted), by_rules, names, stream)
