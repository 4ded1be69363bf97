"""Metrics of scores against labels, checks of both, and calibration of scores.

Each metric takes numpy arrays and returns one float. Unsafe is the positive class everywhere.
`labels` is [N] in {0, 1} (1 is unsafe), `p_unsafe` is [N] in [0, 1], and `probability` is the
true P(unsafe) [N], where a generator knows it. A score is log P(safe) - log P(unsafe), in nats.
A metric that its data does not define (no rows, or a class is missing) is nan, never 0 and never
an exception.

Evaluation fails closed: scores are checked once, where they come in (`check_finite`), with an
error that names the row and the example; labels and probabilities are those of valid Examples.
The metrics themselves trust their arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize
from scipy.special import expit

from csrm_jax.safety.schema import Example

# Where its log is taken, a probability is at least this: the log stays finite, and the floor is
# far from what any useful score gives.
_PROBABILITY_FLOOR = 1e-15
# True probabilities are clipped this far from 0 and 1, which have no finite log odds.
_LOG_ODDS_FLOOR = 1e-6
# Of smECE: what keeps an empty place from dividing by 0, the least width, and halvings of it.
_SMECE_DENSITY, _SMECE_WIDTH, _SMECE_HALVINGS = 1e-4, 1e-3, 10
# What a judge says that has two answers only; chosen for no data.
CONSTANTS = (0.03, 0.97)
# The rows of a threshold table.
THRESHOLDS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

# --- Verdicts --------------------------------------------------------------------------


def f1(labels: np.ndarray, p_unsafe: np.ndarray, threshold: float = 0.5) -> float:
  """Returns the F1 of calling a row unsafe where p_unsafe >= threshold; ties fail closed."""
  predicted = p_unsafe >= threshold
  denominator = predicted.sum() + labels.sum()
  return float(2 * np.sum(predicted & (labels == 1)) / denominator) if denominator else math.nan


def best_threshold(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the threshold on p_unsafe with the highest F1 on these rows.

  Fit it on validation rows and apply it to others: on its own rows its F1 is optimistic. It is the
  highest of equally good ones; nan when no row is unsafe.
  """
  return _f1_threshold(labels.astype(np.float64), p_unsafe) if labels.sum() else math.nan


def expected_f1_threshold(probability: np.ndarray) -> float:
  """Returns the threshold on the true P(unsafe) with the highest expected F1, at most 0.5.

  Expected F1 is taken as the ratio of expectations, 2 sum(p where p >= t) / (num(p >= t) + sum(p)),
  which is exact for large N. It is inf (nothing is called unsafe) when every probability is 0.

  Source: Lipton, Elkan & Naryanaswamy, Optimal Thresholding of Classifiers to Maximize F1
  Measure, ECML 2014, theorem 1.
  """
  if not probability.size:
    return math.nan
  return _f1_threshold(probability, probability) if probability.sum() else math.inf


def _f1_threshold(gain: np.ndarray, values: np.ndarray) -> float:
  """Returns argmax over t of 2 sum(gain[values >= t]) / (num + sum(gain))."""
  order = np.argsort(-values, kind='stable')
  values, gain = values[order], gain[order]
  ratio = 2 * np.cumsum(gain) / (np.arange(1, len(gain) + 1) + gain.sum())
  # A threshold cannot split rows of equal value: only the last of a run counts.
  ends = np.append(values[1:] != values[:-1], True)
  return float(values[ends][np.argmax(ratio[ends])])


def auprc(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the average precision, the area under precision over recall; nan with one class."""
  if _one_class(labels):
    return math.nan
  order = np.argsort(-p_unsafe, kind='stable')
  hits = np.cumsum(labels[order])
  # A threshold cannot split rows of equal value: only the last of a run counts.
  ends = np.flatnonzero(np.append(np.diff(p_unsafe[order]) != 0, True))
  recalled = np.diff(hits[ends] / hits[-1], prepend=0)
  precision = hits[ends] / (ends + 1)
  # Summed as scikit-learn does, which takes ten times as long; a report measures many small sets.
  return float(np.sum((recalled * precision)[::-1]))


def auroc(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns how often an unsafe row is above a safe one, a tie being half; nan with one class."""
  if _one_class(labels):
    return math.nan
  safe, unsafe = np.sort(p_unsafe[labels == 0]), p_unsafe[labels == 1]
  below = np.searchsorted(safe, unsafe, 'left') + np.searchsorted(safe, unsafe, 'right')
  return float(below.sum() / (2 * len(safe) * len(unsafe)))


def fpr_at_recall(labels: np.ndarray, p_unsafe: np.ndarray, recall: float = 0.95) -> float:
  """Returns the share of safe rows flagged where `recall` of the unsafe are; nan with one class."""
  if not 0 < recall <= 1:
    raise ValueError(f'recall={recall} must be in (0, 1]')
  if _one_class(labels):
    return math.nan
  unsafe = np.sort(p_unsafe[labels == 1])[::-1]
  # The threshold is the highest that reaches the recall. The small term keeps 0.95 * 20 =
  # 19.000000000000004 from asking for 20 rows.
  needed = max(math.ceil(recall * len(unsafe) - 1e-9), 1)
  return float(np.mean(p_unsafe[labels == 0] >= unsafe[needed - 1]))


def _one_class(labels: np.ndarray) -> bool:
  return labels.size == 0 or labels.min() == labels.max()


def smece(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the kernel-smoothed calibration error, in probability.

  It is biased upwards on few rows: a perfect judge of 2,000 rows shows about 0.02.

  Source: Blasiok & Nakkiran, Smooth ECE, ICLR 2024; their package relplot gives the same.
  """
  if not labels.size:
    return math.nan
  # relplot takes ten times as long, and a report asks for thousands. It convolves with a Gaussian
  # that is reflected at 0 and 1: that is a product of spectra, where a row is put on a grid once.
  columns = np.stack([p_unsafe - labels, np.ones(len(labels))]).astype(np.float64)
  p = np.asarray(p_unsafe, np.float64)
  spectra: dict[int, np.ndarray] = {}

  def error(width: float) -> float:
    num, mesh, kernel = _smooth_kernel(width)
    if num not in spectra:
      grid = [_on_grid(p, column, num) for column in columns]
      spectra[num] = np.fft.rfft([np.concatenate([x, x[-2:0:-1]]) for x in grid])
    smooth = np.fft.irfft(spectra[num] * kernel, 2 * num - 2)[:, num // 2 : num // 2 + num]
    places = np.linspace(0, 1, num)
    residual, density = (np.interp(mesh, places, x) for x in smooth)
    return float(np.abs(residual).sum() / (density + _SMECE_DENSITY).sum())

  # The width at which the error is the width itself, by bisection.
  low, high = 0.0, 1.0
  if error(high) > high:
    return error(high)
  for _ in range(_SMECE_HALVINGS):
    middle = (low + high) / 2
    if middle < _SMECE_WIDTH or middle < error(middle):
      low = middle
    else:
      high = middle
  return error(high)


@functools.lru_cache(maxsize=256)
def _smooth_kernel(width: float) -> tuple[int, np.ndarray, np.ndarray]:
  """Returns the points of the grid, those at which errors are taken, and the kernel's spectrum."""
  num = max(2000, round(20 / width)) // 2 + 1
  distance = np.linspace(0, 1, num) - 0.5
  kernel = np.exp(-distance * distance / (2 * width**2)) / (math.sqrt(2 * math.pi) * width)
  return num, np.linspace(0, 1, max(round(10 / width), 200)), np.fft.rfft(kernel, 2 * num - 2)


def _on_grid(places: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
  """Returns values in [0, 1] shared out between the two points of a grid beside each, [num]."""
  scaled = places * (num - 1)
  left = np.clip(scaled.astype(np.int64), 0, num - 2)
  right = scaled - left
  return np.bincount(left, (1 - right) * values, num) + np.bincount(left + 1, right * values, num)


def as_constants(p_unsafe: np.ndarray, low: float, high: float) -> np.ndarray:
  """Returns the verdicts as two constants: `high` where unsafe, `low` where safe."""
  return np.where(p_unsafe >= 0.5, high, low)


def smece_constants(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the smECE of the same verdicts said with CONSTANTS, which know no degrees."""
  return smece(labels, as_constants(p_unsafe, *CONSTANTS))


def smece_hard(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the smECE of the same verdicts said as 0 and 1."""
  return smece(labels, as_constants(p_unsafe, 0.0, 1.0))


def reliability_bins(
  labels: np.ndarray, p_unsafe: np.ndarray, num_bins: int = 15
) -> list[dict[str, float]]:
  """Returns {low, high, num, p_unsafe (mean), unsafe (share)} of each bin that is not empty."""
  # Bins are equally wide; p_unsafe = 1 belongs to the last.
  index = np.minimum((p_unsafe * num_bins).astype(np.int64), num_bins - 1)
  bins = []
  for i in np.unique(index):
    rows = index == i
    bins.append(
      {
        'low': i / num_bins,
        'high': (i + 1) / num_bins,
        'num': int(rows.sum()),
        'p_unsafe': float(p_unsafe[rows].mean()),
        'unsafe': float(labels[rows].mean()),
      }
    )
  return bins


def ece(labels: np.ndarray, p_unsafe: np.ndarray, num_bins: int = 15) -> float:
  """Returns the binned calibration error of P(unsafe); nan without rows."""
  bins = reliability_bins(labels, p_unsafe, num_bins)
  errors = sum(b['num'] * abs(b['p_unsafe'] - b['unsafe']) for b in bins)
  return float(errors / len(labels)) if bins else math.nan


def brier(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the mean squared error of P(unsafe); nan without rows."""
  return mean((p_unsafe - labels) ** 2)


def nll(labels: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns the mean of -log P(label), nats, at most 34.5 for a row; nan without rows."""
  return mean(row_nll(labels, p_unsafe))


def row_nll(labels: np.ndarray, p_unsafe: np.ndarray) -> np.ndarray:
  """Returns -log P(label) of every row, nats, float64 [N]."""
  p_label = np.where(labels == 1, p_unsafe, 1 - p_unsafe)
  return -np.log(np.maximum(p_label, _PROBABILITY_FLOOR))


def prob_error(probability: np.ndarray, p_unsafe: np.ndarray) -> float:
  """Returns mean |p_unsafe - true probability|; nan without rows."""
  return mean(np.abs(p_unsafe - probability))


def by_level(
  probability: np.ndarray, p_unsafe: np.ndarray, levels: np.ndarray
) -> dict[str, dict[str, float]]:
  """Returns {level: {num, probability, error, constant_error, correlation}}, sorted by level.

  `levels` is str [N]. A judge that knows no more of a row than its level has at least
  `constant_error`, that of the best constant (the median of the true probabilities), and no
  correlation of P(unsafe) with the true probability, which is nan where either does not vary.
  """
  found = {}
  for level in np.unique(levels):
    true, said = probability[levels == level], p_unsafe[levels == level]
    varies = len(true) > 2 and np.ptp(true) > 0 and np.ptp(said) > 0
    found[str(level)] = {
      'num': len(true),
      'probability': mean(true),
      'error': prob_error(true, said),
      'constant_error': prob_error(true, np.full(len(true), np.median(true))),
      'correlation': float(np.corrcoef(true, said)[0, 1]) if varies else math.nan,
    }
  return found


def level_error(probability: np.ndarray, p_unsafe: np.ndarray, levels: np.ndarray) -> float:
  """Returns the mean over levels of the probability error within each."""
  return _over_levels('error', probability, p_unsafe, levels)


def level_correlation(probability: np.ndarray, p_unsafe: np.ndarray, levels: np.ndarray) -> float:
  """Returns the mean correlation within levels, over those that define one."""
  return _over_levels('correlation', probability, p_unsafe, levels)


def _over_levels(name: str, *arrays: np.ndarray) -> float:
  values = np.array([level[name] for level in by_level(*arrays).values()])
  return mean(values[~np.isnan(values)])


def f1_best(labels: np.ndarray, probability: np.ndarray) -> float:
  """Returns the F1, on these labels, of the best judge that knows P(unsafe)."""
  # Its threshold is not fitted to the labels, so on few rows a lucky model may lie above it.
  return f1(labels, probability, expected_f1_threshold(probability)) if labels.size else math.nan


def flag_rate(p_unsafe: np.ndarray) -> float:
  """Returns the share called unsafe: recall on unsafe rows, false positives on safe ones."""
  return mean(p_unsafe >= 0.5)


def threshold_table(
  labels: np.ndarray, p_unsafe: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, float]]:
  """Returns {threshold, num_flagged, precision, recall, fpr, f1} of each threshold."""
  table = []
  for threshold in thresholds:
    flagged = p_unsafe >= threshold
    table.append(
      {
        'threshold': float(threshold),
        'num_flagged': int(flagged.sum()),
        'precision': mean(labels[flagged]),
        'recall': mean(flagged[labels == 1]),
        'fpr': mean(flagged[labels == 0]),
        'f1': f1(labels, p_unsafe, threshold),
      }
    )
  return table


# --- Pairs and flips -------------------------------------------------------------------


def pair_accuracy(safer: np.ndarray, other: np.ndarray) -> float:
  """Returns the share of pairs with safer > other; a tie is not a win. nan without pairs."""
  return mean(safer > other)


def tie_rate(safer: np.ndarray, other: np.ndarray) -> float:
  """Returns the share of pairs with equal scores; nan without pairs."""
  return mean(safer == other)


def score_gap(safer: np.ndarray, other: np.ndarray) -> float:
  """Returns the mean of safer - other, nats; nan without pairs."""
  return mean(safer - other)


def flip_consistency(
  labels_a: np.ndarray, p_a: np.ndarray, labels_b: np.ndarray, p_b: np.ndarray
) -> float:
  """Returns how often both labels are right of one conversation under two rule sets."""
  return mean(((p_a >= 0.5) == (labels_a == 1)) & ((p_b >= 0.5) == (labels_b == 1)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the rank correlation; nan of constants, and of two rows, where it means nothing."""
  from scipy import stats  # it takes a second

  if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
    return math.nan
  return float(stats.spearmanr(a, b).statistic)


def mean(values: np.ndarray) -> float:
  """Returns the mean; nan without values."""
  return float(np.mean(values)) if len(values) else math.nan


# --- Checks and conversions --------------------------------------------------------------


def check_finite(
  values: np.ndarray, ids: Sequence[str] | None = None, name: str = 'score'
) -> np.ndarray:
  """Returns the values as float64 [N].

  Raises:
    ValueError: The values are not one per example, or some are nan or infinite; the message
      names the first such row, its id where known, and how many there are.
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


def check_same_length(*arrays: np.ndarray) -> None:
  """Checks that all have the same number of rows; ValueError otherwise."""
  lengths = [len(array) for array in arrays]
  if len(set(lengths)) > 1:
    raise ValueError(
      f'arrays of {lengths} rows where all must have the same number; pass one value per example'
    )


def p_unsafe_from_scores(scores: np.ndarray) -> np.ndarray:
  """Returns P(unsafe) = sigmoid(-score), float64 [N]."""
  return expit(-check_finite(scores))


def log_odds_safe(probability: np.ndarray) -> np.ndarray:
  """Returns the score, nats [N], of a judge that knows P(unsafe), clipped to stay finite."""
  p = np.clip(probability, _LOG_ODDS_FLOOR, 1 - _LOG_ODDS_FLOOR)
  return np.log1p(-p) - np.log(p)


def labels_of(examples: Sequence[Example]) -> np.ndarray:
  """Returns the labels, int64 [N], 1 where unsafe."""
  return np.array([e.label == 'unsafe' for e in examples], np.int64)


def probability_of(examples: Sequence[Example]) -> np.ndarray | None:
  """Returns the true P(unsafe) [N], or None unless every example has one."""
  # All or none: the best over some rows would not compare with a value over all of them.
  values = [example.probability for example in examples]
  return None if not values or None in values else np.array(values, np.float64)


# --- Calibration -------------------------------------------------------------------------

# The slope 1 / temperature stays in this range: rows that a threshold splits without error would
# drive it to infinity.
_SLOPES = (1 / 50, 50.0)
_BIASES = (-50.0, 50.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Maps a score to score / temperature + bias; the default changes nothing.

  The order of scores stays, and with it AUPRC and pair accuracy; F1 at 0.5 and all calibration
  errors change.
  """

  temperature: float = 1.0  # above 0; above 1 makes verdicts less sure
  bias: float = 0.0  # nats, added after; above 0 makes "safe" likelier
  num_examples: int = 0  # validation rows that it was fitted on
  # Mean of -log P(label) on those rows, nats.
  nll_before: float | None = None
  nll_after: float | None = None
  applied: bool = False  # whether the scores that a loaded model gives are changed by it
  reason: str = ''  # why it is applied, or is not
  step: int | None = None  # of the checkpoint whose scores it was fitted on

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
    # In float64, so that scores of a narrower type are rounded only once.
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
        f'a calibration has the keys {", ".join(sorted(names))}, of which temperature and bias are '
        f'needed; found {", ".join(sorted(map(str, obj))) or "none"}'
      )
    return Calibration(**obj)


def fit_calibration(labels: np.ndarray, scores: np.ndarray) -> Calibration:
  """Returns the temperature and bias with the lowest NLL on these rows.

  Give rows that no result is reported on.

  Raises:
    ValueError: A class is missing, or a score is not finite.

  Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. NLL is proper, and
  convex here; binned errors are neither.
  """
  labels, scores = np.asarray(labels), check_finite(scores)
  check_same_length(labels, scores)
  if not 0 < labels.sum() < len(labels):
    raise ValueError(
      f'{len(labels)} validation rows of which {labels.sum()} are unsafe: '
      'calibration needs rows of both labels; give more rows'
    )
  sign = np.where(labels == 1, -1.0, 1.0)

  # Over the slope 1 / temperature, in which the loss is convex.
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
