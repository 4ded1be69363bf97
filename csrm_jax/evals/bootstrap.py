"""Bootstrap intervals and paired differences, over conversations.

Rows are not independent where one conversation stands in several of them (under several rule
sets, with several responses, as both sides of a pair). Such a set of rows is a *unit*: it is drawn,
or not drawn, as a whole. What one conversation is, `data.sources.conversation_keys` says: the same
rows stay together here and in a split.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from csrm_jax.data import sources
from csrm_jax.evals.metrics import check_same_length
from csrm_jax.evals.results import Metric
from csrm_jax.safety.schema import Example

# Said of intervals without width.
NO_SPREAD, ONE_UNIT = 'no draw differs', 'one conversation only'


@dataclasses.dataclass(frozen=True)
class Measure:
  """Measures metrics with their intervals: what a suite calls `m`."""

  units: np.ndarray | None = None  # [N] rows of one number are drawn together; None: each alone
  num_samples: int = 300  # draws for an interval; 0 for no intervals

  def __call__(
    self,
    fn: Callable[..., float],
    *arrays: np.ndarray,
    rows: Sequence[int] | None = None,
    best: float | None = None,
    centred: bool = False,
    num_samples: int | None = None,
  ) -> Metric:
    """Returns fn(*arrays), over some of the rows or all, with its interval; see `interval`."""
    units, low, high = self.units, None, None
    if rows is not None:
      arrays = tuple(array[rows] for array in arrays)
      units = None if units is None else units[rows]
    if num := self.num_samples if num_samples is None else num_samples:
      low, high = interval(fn, arrays, units, num_samples=num, centred=centred)
    # An interval without width looks like certainty, and is none.
    note = {}
    if low is not None and low == high:
      is_one = len(arrays[0]) == 1 or (units is not None and len(np.unique(units)) == 1)
      note = {'note': ONE_UNIT if is_one else NO_SPREAD}
    return {'value': fn(*arrays), 'low': low, 'high': high, 'best': best, **note}

  def over(self, units: np.ndarray) -> Measure:
    """Returns the same measure over other units."""
    return dataclasses.replace(self, units=units)


def rows_by(keys: Iterable[str]) -> dict[str, list[int]]:
  """Returns {key: the rows that have it}, in order of first occurrence."""
  rows: dict[str, list[int]] = {}
  for i, key in enumerate(keys):
    rows.setdefault(key, []).append(i)
  return rows


def units_of(examples: Sequence[Example], groups: Sequence[str] | None = None) -> np.ndarray:
  """Returns the unit of each row, int64 [N], numbered as they first occur.

  Rows belong to one unit if they have the same conversation, or the same group id that is not
  empty, or if a chain of such rows links them. Groups link rows that depend on each other although
  their text differs, such as requests in two wordings.
  """
  if groups is not None:
    check_same_length(examples, groups)
  # A row is linked with its text and its group: what hangs together, over a chain of such links or
  # at once, is a unit.
  nodes: dict[object, int] = {}
  links = []
  for row, conversation in enumerate(sources.conversation_keys(examples)):
    keys = [('conversation', conversation)]
    if groups is not None and groups[row]:
      keys.append(('group', groups[row]))
    links += [(row, len(examples) + nodes.setdefault(key, len(nodes))) for key in keys]
  size = len(examples) + len(nodes)
  rows, others = zip(*links, strict=True) if links else ((), ())
  graph = sparse.coo_array((np.ones(len(links)), (rows, others)), (size, size))
  # Components are numbered by their first node.
  return csgraph.connected_components(graph, directed=False)[1][: len(examples)].astype(np.int64)


def interval(
  fn: Callable[..., float],
  arrays: Sequence[np.ndarray],
  units: np.ndarray | None = None,
  *,
  num_samples: int = 300,
  seed: int = 0,
  centred: bool = False,
) -> tuple[float, float]:
  """Returns the 95% bootstrap interval (low, high) of fn(*arrays).

  Units are drawn with replacement, the same rows from every array; the interval lies between the
  2.5% and 97.5% percentiles. Draws where `fn` is nan are left out. It is (nan, nan) when there
  are no rows or no draw is left.

  Args:
    units: [N] integers, see `units_of`; None where each row is its own unit.
    centred: Shifts the interval so that the draws' mean falls on the value, and cuts it at 0.
      This is for errors such as smECE, which resampling inflates so much that a plain percentile
      interval can miss the value itself. The interval then shows the spread, not the bias.
  """
  values = _draws(fn, arrays, units, num_samples, seed)
  if not values.size:
    return math.nan, math.nan
  low, high = np.percentile(values, [2.5, 97.5])
  if centred:
    # An error cannot be below 0, but a shifted bound can.
    shift = fn(*arrays) - values.mean()
    low, high = max(low + shift, 0.0), max(high + shift, 0.0)
  return float(low), float(high)


def difference(
  fn: Callable[..., float],
  arrays_a: Sequence[np.ndarray],
  arrays_b: Sequence[np.ndarray],
  units: np.ndarray | None = None,
  *,
  num_samples: int = 1000,
  seed: int = 0,
) -> dict[str, float]:
  """Returns fn(*arrays_a) - fn(*arrays_b) on the same rows: {value, low, high, p_value}.

  Every draw takes the same units from both, so that what makes a row hard for both cancels.
  `p_value` is two-sided: twice the smaller share of draws on one side of 0. All are nan where no
  draw defines the metric. `units` are those of `interval`.
  """
  arrays_a, arrays_b = tuple(arrays_a), tuple(arrays_b)

  def gap(*arrays):
    return fn(*arrays[: len(arrays_a)]) - fn(*arrays[len(arrays_a) :])

  values = _draws(gap, arrays_a + arrays_b, units, num_samples, seed)
  if not values.size:
    return dict.fromkeys(('value', 'low', 'high', 'p_value'), math.nan)
  low, high = map(float, np.percentile(values, [2.5, 97.5]))
  # Draws at 0 count on both sides, and below one is added to each so that p is never 0.
  tail = min(np.sum(values <= 0), np.sum(values >= 0))
  p_value = float(min(2 * (tail + 1) / (len(values) + 1), 1.0))
  return {'value': float(gap(*arrays_a, *arrays_b)), 'low': low, 'high': high, 'p_value': p_value}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and the half width of its 95% t-interval (nan below two values).

  Source: Student's t-interval, for few numbers such as one a seed.
  """
  from scipy import stats  # it takes a second, and few runs need it

  mean = math.fsum(values) / len(values)
  if len(values) < 2:
    return mean, math.nan
  return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, ddof=1))


def mean_difference(gaps: Sequence[float]) -> dict[str, float]:
  """Returns {value, low, high, p_value} of paired differences, one for each unit, such as a seed.

  Source: the paired t-test; interval and p-value are nan below two units.
  """
  from scipy import stats  # see mean_and_interval

  mean, half = mean_and_interval(gaps)
  # Equal gaps leave no variance to test with: p is then 0, or nan where they are all 0.
  with np.errstate(all='ignore'), warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)
    p_value = stats.ttest_1samp(gaps, 0.0).pvalue if len(gaps) > 1 else math.nan
  return {'value': mean, 'low': mean - half, 'high': mean + half, 'p_value': float(p_value)}


def _draws(fn, arrays, units, num_samples: int, seed: int) -> np.ndarray:
  """Returns fn of the rows of each draw of units; draws that give nan are left out."""
  arrays = [np.asarray(array) for array in arrays]
  units = np.arange(len(arrays[0])) if units is None else np.asarray(units)
  check_same_length(*arrays, units)
  if not units.size:
    return np.zeros(0)
  # Sorted by unit, the rows of a unit are a slice, and a draw needs no loop over units.
  order = np.argsort(units, kind='stable')
  _, starts, sizes = np.unique(units[order], return_index=True, return_counts=True)
  rng = np.random.default_rng(seed)
  values = np.empty(num_samples)
  for i in range(num_samples):
    drawn = rng.integers(0, len(starts), len(starts))
    size = sizes[drawn]
    # Where the rows of each drawn unit begin in the draw.
    begin = np.cumsum(size) - size
    within = np.arange(size.sum()) - np.repeat(begin, size)
    rows = order[np.repeat(starts[drawn], size) + within]
    values[i] = fn(*(array[rows] for array in arrays))
  # A draw may hold one class only, for which some metrics are nan.
  return values[~np.isnan(values)]
