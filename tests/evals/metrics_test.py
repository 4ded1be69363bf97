"""Metrics against brute force, their reference packages and invariances."""

import math
import subprocess
import sys

import numpy as np
import pytest
import relplot
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score

from csrm_jax.evals import metrics

_FAST = settings(max_examples=60, deadline=None)


def _rows(num_rows, seed=0):
  rng = np.random.default_rng(seed)
  p = rng.beta(0.6, 0.6, num_rows)
  return (rng.random(num_rows) < p).astype(int), p


# Few distinct values, so that ties are common.
_row = st.tuples(st.integers(0, 1), st.integers(0, 8).map(lambda i: i / 8))
_some_rows = st.lists(_row, min_size=1, max_size=30)


def _unzip(rows):
  labels, p = zip(*rows, strict=True)
  return np.array(labels), np.array(p)


def test_import_does_not_import_jax():
  code = (
    'import sys, csrm_jax.evals.metrics, csrm_jax.evals.bootstrap, '
    'csrm_jax.evals.compare, csrm_jax.evals.suites, csrm_jax.data.catalogue; '
    'assert not {"jax", "flax", "torch"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_smece_is_relplots():
  # A single row, ties, and verdicts of 0 and 1 are the edges of its grid.
  for num, digits in ((1, 9), (40, 1), (2000, 0), (300, 9)):
    labels, p = _rows(num)
    p = np.round(p, digits)
    expected = relplot.smECE(p, labels.astype(float))
    assert metrics.smece(labels, p) == pytest.approx(expected, abs=1e-12)
  assert metrics.smece(labels, p.astype(np.float32)) == pytest.approx(
    metrics.smece(labels, p), abs=1e-6
  )


@_FAST
@given(_some_rows)
def test_auprc_is_sklearns(rows):
  labels, p = _unzip(rows)
  if labels.min() == labels.max():
    assert math.isnan(metrics.auprc(labels, p))
  else:
    assert metrics.auprc(labels, p) == average_precision_score(labels, p)


@_FAST
@given(_some_rows, st.integers(0, 8).map(lambda i: i / 8))
def test_f1_counts(rows, threshold):
  labels, p = _unzip(rows)
  hit = sum(y == 1 and q >= threshold for y, q in rows)
  false = sum(y == 0 and q >= threshold for y, q in rows)
  missed = sum(y == 1 and q < threshold for y, q in rows)
  value = metrics.f1(labels, p, threshold)
  if hit + false + missed == 0:
    assert math.isnan(value)
  else:
    assert value == pytest.approx(2 * hit / (2 * hit + false + missed))


@_FAST
@given(_some_rows)
def test_best_threshold_beats_every_other(rows):
  labels, p = _unzip(rows)
  threshold = metrics.best_threshold(labels, p)
  if not labels.sum():
    assert math.isnan(threshold)
    return
  best = max(metrics.f1(labels, p, t) for t in set(p.tolist()))
  assert metrics.f1(labels, p, threshold) == pytest.approx(best)


@_FAST
@given(_some_rows, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(rows, random):
  shuffled = list(rows)
  random.shuffle(shuffled)
  a, b = _unzip(rows), _unzip(shuffled)
  for fn in (
    metrics.f1,
    metrics.auprc,
    metrics.ece,
    metrics.brier,
    metrics.nll,
    metrics.fpr_at_recall,
    metrics.f1_best,
    metrics.best_threshold,
  ):
    assert fn(*a) == pytest.approx(fn(*b), nan_ok=True)


@_FAST
@given(_some_rows)
def test_ranking_metrics_ignore_monotone_maps(rows):
  labels, p = _unzip(rows)
  squeezed = 0.25 + p**3 / 2
  for fn in (metrics.auprc, metrics.fpr_at_recall):
    assert fn(labels, p) == pytest.approx(fn(labels, squeezed), nan_ok=True)


@_FAST
@given(_some_rows)
def test_errors_of_swapped_classes_are_the_same(rows):
  labels, p = _unzip(rows)
  for fn in (metrics.brier, metrics.nll):
    assert fn(labels, p) == pytest.approx(fn(1 - labels, 1 - p))


@_FAST
@given(_some_rows, st.sampled_from([0.3, 0.5, 0.95, 1.0]))
def test_fpr_at_recall_counts(rows, recall):
  labels, p = _unzip(rows)
  if labels.min() == labels.max():
    assert math.isnan(metrics.fpr_at_recall(labels, p, recall))
    return
  rates = [np.mean(p[labels == 0] >= t) for t in p if np.mean(p[labels == 1] >= t) >= recall - 1e-9]
  assert metrics.fpr_at_recall(labels, p, recall) == min(rates)


def test_ece_by_hand():
  labels, p = np.array([0, 1, 1, 1]), np.array([0.31, 0.31, 0.99, 1.0])
  # Two in [4/15, 5/15), two in the last bin, which 1.0 belongs to.
  want = 0.5 * abs(0.31 - 0.5) + 0.5 * abs(0.995 - 1)
  assert metrics.ece(labels, p) == pytest.approx(want)
  assert [b['num'] for b in metrics.reliability_bins(labels, p)] == [2, 2]


def test_calibrated_rows_have_small_errors():
  labels, p = _rows(20_000)
  assert metrics.smece(labels, p) < 0.02
  assert metrics.ece(labels, p) < 0.02
  assert metrics.smece(labels, 1 - p) > 0.2


def test_nll_of_sure_and_wrong_is_finite():
  assert metrics.nll(np.array([1, 0]), np.array([0.0, 1.0])) == pytest.approx(-math.log(1e-15))
  assert metrics.nll(np.array([1, 0]), np.array([1.0, 0.0])) == pytest.approx(0, abs=1e-12)


def test_expected_f1_threshold_against_sampled_labels():
  _, p = _rows(4000, seed=1)
  rng = np.random.default_rng(2)
  draws = [(rng.random(len(p)) < p).astype(int) for _ in range(40)]
  threshold = metrics.expected_f1_threshold(p)
  best = np.mean([metrics.f1(y, p, threshold) for y in draws])
  for other in np.linspace(0.1, 0.9, 17):
    assert best >= np.mean([metrics.f1(y, p, other) for y in draws]) - 2e-4
  # Half of the F1 it reaches: the known optimum.
  assert threshold == pytest.approx(best / 2, abs=0.01)
  assert threshold < 0.5


def test_best_values_do_not_read_more_than_they_should():
  labels, p = _rows(2000)
  assert metrics.expected_f1_threshold(np.zeros(3)) == math.inf
  assert math.isnan(metrics.f1_best(np.array([0, 0]), np.zeros(2)))
  assert metrics.f1_best(labels, p) == metrics.f1(labels, p, metrics.expected_f1_threshold(p))
  assert metrics.prob_error(p, p) == 0
  assert metrics.prob_error(np.array([0.2, 0.6]), np.array([0.3, 0.3])) == pytest.approx(0.2)


@_FAST
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1))
def test_pair_counts(pairs):
  safer, other = map(np.array, zip(*pairs, strict=True))
  wins = metrics.pair_accuracy(safer, other)
  losses = metrics.pair_accuracy(other, safer)
  ties = metrics.tie_rate(safer, other)
  assert wins == sum(a > b for a, b in pairs) / len(pairs)
  assert wins + losses + ties == pytest.approx(1)
  assert metrics.score_gap(safer, other) == pytest.approx(sum(a - b for a, b in pairs) / len(pairs))


def test_flip_consistency_by_hand():
  labels_a, labels_b = np.array([[0, 1, 1, 0], [1, 0, 0, 1]])
  p_a, p_b = np.array([[0.1, 0.9, 0.9, 0.6], [0.7, 0.2, 0.8, 0.9]])
  assert metrics.flip_consistency(labels_a, p_a, labels_b, p_b) == 0.5
  # Rules-blind: the same score on both sides is never right twice.
  assert metrics.flip_consistency(labels_a, p_a, labels_b, p_a) == 0


def test_nothing_is_nan():
  none = np.zeros(0)
  for fn in (
    metrics.f1,
    metrics.auprc,
    metrics.smece,
    metrics.ece,
    metrics.brier,
    metrics.nll,
    metrics.fpr_at_recall,
    metrics.prob_error,
    metrics.f1_best,
    metrics.best_threshold,
    metrics.pair_accuracy,
    metrics.tie_rate,
    metrics.score_gap,
  ):
    assert math.isnan(fn(none, none)), fn.__name__
  assert math.isnan(metrics.expected_f1_threshold(none))
  assert math.isnan(metrics.flip_consistency(none, none, none, none))
  assert math.isnan(metrics.flag_rate(none))


@pytest.mark.parametrize('label', [0, 1])
def test_one_class(label):
  labels, p = np.full(5, label), np.linspace(0.1, 0.9, 5)
  assert math.isnan(metrics.auprc(labels, p))
  assert math.isnan(metrics.fpr_at_recall(labels, p))
  for fn in (metrics.smece, metrics.ece, metrics.brier, metrics.nll):
    assert 0 <= fn(labels, p) < math.inf


@_FAST
@given(_some_rows)
def test_threshold_table_counts(rows):
  labels, p = _unzip(rows)
  for row in metrics.threshold_table(labels, p, (0.0, 0.25, 0.5, 1.0)):
    flagged = [y for y, q in rows if q >= row['threshold']]
    assert row['num_flagged'] == len(flagged)
    for name, hits, num in (
      ('precision', sum(flagged), len(flagged)),
      ('recall', sum(flagged), sum(labels)),
      ('fpr', len(flagged) - sum(flagged), len(rows) - sum(labels)),
    ):
      if num:
        assert row[name] == pytest.approx(hits / num), name
      else:
        assert math.isnan(row[name]), name


def test_conversions():
  scores = np.array([-800.0, -1.0, 0.0, 1.0, 800.0])
  p = metrics.p_unsafe_from_scores(scores)
  np.testing.assert_allclose(p[1:4], 1 / (1 + np.exp(scores[1:4])))
  assert p[0] == 1 and p[4] == 0
  np.testing.assert_allclose(metrics.log_odds_safe(p[1:4]), scores[1:4])
  assert np.isfinite(metrics.log_odds_safe(p)).all()


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_their_row(bad):
  scores = np.array([0.0, 1.0, bad])
  with pytest.raises(ValueError, match=r"row 2 \(id 'third'\)"):
    metrics.check_finite(scores, ['first', 'second', 'third'])
  with pytest.raises(ValueError, match='at row 2, 1 of 3'):
    metrics.p_unsafe_from_scores(scores)
  with pytest.raises(ValueError, match='row 2'):
    metrics.fit_calibration([0, 1, 1], scores)


@pytest.mark.parametrize(
  'labels, scores, message', [([0, 1], [0.1], r'\[2, 1\] rows'), ([0, 1], [[0.1, 0.2]], 'shape')]
)
def test_bad_rows_are_one_line_errors(labels, scores, message):
  with pytest.raises(ValueError, match=message) as error:
    metrics.fit_calibration(labels, scores)
  assert '\n' not in str(error.value)


def test_recall_out_of_range():
  with pytest.raises(ValueError, match='recall=0 '):
    metrics.fpr_at_recall([0, 1], [0.1, 0.2], 0)


def test_within_levels_a_judge_of_levels_has_the_error_of_constants_and_no_correlation():
  rng = np.random.default_rng(0)
  levels = np.repeat(['severity 0', 'severity 1', 'none'], 200)
  true = np.clip(np.repeat([0.8, 0.4, 0.1], 200) + rng.uniform(-0.1, 0.1, 600), 0, 1)
  medians = np.repeat([np.median(true[levels == name]) for name in levels[::200]], 200)
  found = metrics.by_level(true, medians, levels)
  assert list(found) == ['none', 'severity 0', 'severity 1']
  assert all(level['error'] == level['constant_error'] for level in found.values())
  assert math.isnan(metrics.level_correlation(true, medians, levels))
  noise = medians + rng.uniform(-0.1, 0.1, 600)
  assert abs(metrics.level_correlation(true, noise, levels)) < 0.1
  # Over all rows the same judge looks good.
  assert np.corrcoef(true, noise)[0, 1] > 0.9
  assert metrics.level_error(true, true, levels) == 0
  assert metrics.level_correlation(true, true, levels) == pytest.approx(1)
