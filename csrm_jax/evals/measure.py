"""Metrics with their intervals, as suites put them into results.

A metric in a result is {value, low, high, best}: `low` and `high` are the 95%
bootstrap interval (None where none is computed), `best` is what a judge that
knows the true P(unsafe) reaches on the same rows (None where some example does
not come with it).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.evals import bootstrap, checks, metrics
from csrm_jax.safety.schema import Example

ScoreFn = Callable[[Sequence[Example]], np.ndarray]
Result = dict[str, Any]
Metric = dict[str, float | None]

# A breakdown lists this many of its largest groups.
MAX_GROUPS = 40
# There may be many groups: fewer draws for each.
_GROUP_SAMPLES = 100

# name -> (metric(labels, p_unsafe), best reachable(labels, probability),
# is its interval centred). Only metrics with an entry here get an interval.
CLASSIFICATION = {
  'f1': (metrics.f1, metrics.f1_best, False),
  'auprc': (metrics.auprc, metrics.auprc_best, False),
  'smece': (metrics.smece, metrics.smece, True),
  'ece': (metrics.ece, metrics.ece, True),
  'brier': (metrics.brier, metrics.brier, False),
  'nll': (metrics.nll, metrics.nll, False),
  'fpr_at_recall': (metrics.fpr_at_recall, metrics.fpr_at_recall, False),
}


@dataclasses.dataclass(frozen=True)
class Draws:
  """How intervals are drawn.

  Attributes:
    units: [N] rows of one number are drawn together; None: each row alone.
    num_samples: draws for an interval; 0 for no intervals.
    seed: of the draws.
  """

  units: np.ndarray | None = None
  num_samples: int = 300
  seed: int = 0

  def take(self, rows: Sequence[int]) -> Draws:
    """Returns the same for some of the rows."""
    if self.units is None:
      return self
    return dataclasses.replace(self, units=self.units[rows])


def score(score_fn: ScoreFn, examples: Sequence[Example]) -> np.ndarray:
  """Returns the scores, float64 [N] nats; not finite: ValueError with the id."""
  return checks.check_finite(score_fn(examples), [e.id for e in examples])


def metric(
  fn: Callable[..., float],
  arrays: Sequence[np.ndarray],
  draws: Draws | None = None,
  best: float | None = None,
  centred: bool = False,
) -> Metric:
  """Returns fn(*arrays) as {value, low, high, best}."""
  low = high = None
  if draws is not None and draws.num_samples:
    low, high = bootstrap.interval(
      fn, arrays, draws.units, num_samples=draws.num_samples, seed=draws.seed, centred=centred
    )
  return {'value': fn(*arrays), 'low': low, 'high': high, 'best': best}


def classification(
  labels: np.ndarray,
  p_unsafe: np.ndarray,
  probability: np.ndarray | None,
  draws: Draws | None,
  threshold: float | None = None,
) -> dict[str, Metric]:
  """Returns every metric of CLASSIFICATION, and those that need more.

  `prob_error` where the true probability is known; `f1_tuned` where a
  threshold, fitted on other rows, is given.
  """
  measured = {}
  for name, (fn, best_fn, centred) in CLASSIFICATION.items():
    best = None if probability is None else best_fn(labels, probability)
    measured[name] = metric(fn, (labels, p_unsafe), draws, best, centred)
  if probability is not None:
    measured['prob_error'] = metric(metrics.prob_error, (probability, p_unsafe), draws, 0.0)
  if threshold is not None:
    f1 = functools.partial(metrics.f1, threshold=threshold)
    best = measured['f1']['best']
    measured['f1_tuned'] = metric(f1, (labels, p_unsafe), draws, best)
  return measured


def groups(
  labels: np.ndarray,
  p_unsafe: np.ndarray,
  probability: np.ndarray | None,
  draws: Draws,
  rows_of: Mapping[str, Sequence[int]],
) -> dict[str, Result]:
  """Returns {group: {num_examples, num_unsafe, mean_p_unsafe, metrics}}.

  Sorted by name, the largest MAX_GROUPS of `rows_of`, {group: its rows}; a
  group without a name is left out. Only F1 has an interval.
  """
  rows_of = {name: rows for name, rows in rows_of.items() if name}
  largest = sorted(rows_of, key=lambda name: (-len(rows_of[name]), name))
  out = {}
  for name in sorted(largest[:MAX_GROUPS]):
    rows = rows_of[name]
    part = labels[rows], p_unsafe[rows]
    true = None if probability is None else probability[rows]
    measured = classification(*part, true, None)
    few = dataclasses.replace(draws.take(rows), num_samples=min(draws.num_samples, _GROUP_SAMPLES))
    measured['f1'] = metric(metrics.f1, part, few, measured['f1']['best'])
    measured['recall'] = metric(metrics.flag_rate, (part[1][part[0] == 1],))
    measured['fpr'] = metric(metrics.flag_rate, (part[1][part[0] == 0],))
    out[name] = {
      'num_examples': len(rows),
      'num_unsafe': int(part[0].sum()),
      'mean_p_unsafe': metrics.mean(part[1]),
      'metrics': measured,
    }
  return out


def rows_by(keys: Iterable[str]) -> dict[str, list[int]]:
  """Returns {key: the rows that have it}, in order of first occurrence."""
  rows: dict[str, list[int]] = {}
  for i, key in enumerate(keys):
    rows.setdefault(key, []).append(i)
  return rows


def rows_by_category(examples: Sequence[Example]) -> dict[str, list[int]]:
  """Returns {category: rows that violate it, and safe rows it judged}.

  A row may stand under several categories. Unsafe rows that violate only
  others say nothing about a category and are left out of it, and so is a
  category that no row is known to violate.
  """
  known = {name for e in examples for name in e.violated}
  rows: dict[str, list[int]] = {name: [] for name in sorted(known)}
  for i, example in enumerate(examples):
    safe = example.label == 'safe'
    for name in example.safety.names if safe else example.violated:
      if name in known:
        rows[name].append(i)
  return rows


def score_variants(
  score_fn: ScoreFn, items: Sequence[Mapping[str, Example]]
) -> dict[str, np.ndarray]:
  """Returns {variant: scores [N]}, all scored in one call.

  Raises:
    ValueError: a score is not finite (names the id), or the items do not have
      the same variants.
  """
  names = list(items[0]) if items else []
  for item in items:
    if list(item) != names:
      raise ValueError(
        f'an item has the variants {", ".join(item)} where the first has '
        f'{", ".join(names)}; give all items the same'
      )
  scores = score(score_fn, [item[name] for item in items for name in names])
  return {name: scores[i :: len(names)] for i, name in enumerate(names)}
