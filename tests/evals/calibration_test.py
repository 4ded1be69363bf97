"""Temperature and bias are found, kept in order, and travel as a dict."""

import math

import numpy as np
import pytest
from scipy.special import expit

from csrm_jax.core import files
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import metrics
from csrm_jax.reward import scoring
from csrm_jax.ruleworld import probes
from csrm_jax.runners import evaluate
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests import small


def _rows(num_rows=4000, temperature=1.0, bias=0.0, seed=0):
  """Returns labels and scores of which score / temperature + bias is true."""
  rng = np.random.default_rng(seed)
  true = rng.normal(0, 2, num_rows)
  labels = (rng.random(num_rows) < expit(-true)).astype(int)
  return labels, (true - bias) * temperature


@pytest.mark.parametrize(
  ('temperature', 'bias'), [(1.0, 0.0), (3.0, 0.0), (0.4, 0.0), (1.0, 1.5), (2.5, -1.0)]
)
def test_fit_finds_what_was_done(temperature, bias):
  labels, scores = _rows(temperature=temperature, bias=bias)
  found = metrics.fit_calibration(labels, scores)
  assert found.temperature == pytest.approx(temperature, rel=0.1)
  assert found.bias == pytest.approx(bias, abs=0.12)
  assert found.num_examples == 4000


def test_fit_lowers_the_nll_it_reports_and_no_grid_point_is_lower():
  labels, scores = _rows(300, temperature=2.0, bias=0.7)
  found = metrics.fit_calibration(labels, scores)

  def nll(c):
    return metrics.nll(labels, metrics.p_unsafe_from_scores(c.apply(scores)))

  assert found.nll_before == pytest.approx(nll(metrics.Calibration()))
  assert found.nll_after == pytest.approx(nll(found))
  assert found.nll_after < found.nll_before
  for temperature in np.geomspace(0.2, 20, 25):
    for bias in np.linspace(-3, 3, 25):
      other = metrics.Calibration(float(temperature), float(bias))
      assert nll(found) <= nll(other) + 1e-9


def test_calibration_helps_rows_it_was_not_fitted_on():
  found = metrics.fit_calibration(*_rows(temperature=4.0, bias=1.0, seed=1))
  labels, scores = _rows(temperature=4.0, bias=1.0, seed=2)
  raw = metrics.smece(labels, metrics.p_unsafe_from_scores(scores))
  better = metrics.smece(labels, metrics.p_unsafe_from_scores(found.apply(scores)))
  assert better < 0.03 < raw


def test_order_and_type_stay():
  c = metrics.Calibration(2.0, -1.0)
  scores = np.array([-3.0, 0.0, 0.5, 8.0], np.float32)
  out = c.apply(scores)
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, [-2.5, -1.0, -0.75, 3.0])
  assert c.apply(np.array([2, 4])).tolist() == [0.0, 1.0]


def test_rows_without_an_error_do_not_go_to_infinity():
  found = metrics.fit_calibration([0, 0, 1, 1], [2.0, 1.0, -1.0, -2.0])
  assert found.temperature > 0 and math.isfinite(found.temperature)
  # An order that is upside down is no matter of temperature.
  found = metrics.fit_calibration([1, 1, 0, 0], [2.0, 1.0, -1.0, -2.0])
  assert found.temperature > 0


def test_dict_round_trip_and_bad_input():
  c = metrics.fit_calibration(*_rows(50))
  assert metrics.Calibration.from_dict(c.to_dict()) == c
  with pytest.raises(ValueError, match='temperature and bias are needed'):
    metrics.Calibration.from_dict({'temperature': 1.0})
  with pytest.raises(ValueError, match='scale'):
    metrics.Calibration.from_dict({'temperature': 1.0, 'bias': 0.0, 'scale': 2})
  with pytest.raises(ValueError, match='temperature=0'):
    metrics.Calibration(0.0)
  with pytest.raises(ValueError, match='both labels'):
    metrics.fit_calibration([0, 0], [1.0, 2.0])
  with pytest.raises(ValueError, match='row 1'):
    metrics.fit_calibration([0, 1], [1.0, math.nan])


def _examples(labels, rules='No dogs.'):
  safety = SafetyConfig((Category('Pets', rules),))
  return [
    Example(f'r{i}', safety, (Message('agent', f'Text {i}'),), ('safe', 'unsafe')[label])
    for i, label in enumerate(labels)
  ]


def test_it_is_applied_only_where_it_helps_on_other_rows():
  labels, scores = _rows(400, temperature=5.0)
  helps, reason = evaluate.calibration_helps(_examples(labels), scores)
  assert helps and 'half of the 400 development rows' in reason
  # Nothing is to be gained here; on the rows of a fit it always looks as if there were.
  labels, scores = _rows(400)
  assert not evaluate.calibration_helps(_examples(labels), scores)[0]
  labels, scores = _rows(3, temperature=5.0)
  helps, reason = evaluate.calibration_helps(_examples(labels), scores)
  assert not helps and 'too few' in reason


def test_what_is_fitted_is_written_beside_the_run(tmp_path):
  labels, scores = _rows(200, temperature=5.0)
  rows = _examples(labels)
  score_of = dict(zip(rows, scores, strict=True))

  def judge(examples, progress):
    found = np.float32([score_of[e] for e in examples])
    return scoring.Judged(found, found, 0 * found, found < -99, small.unmarked(found))

  todo = [Benchmark('own', 'classification', rows[:2], validation=rows)]
  found = evaluate.fit_calibration(scoring.ScoreFn(judge), todo, tmp_path, 30)
  assert found.applied and found.step == 30
  assert metrics.Calibration.from_dict(files.read_json(tmp_path / 'calibration.json')) == found


@pytest.mark.parametrize('side', ['dev', 'test'])
def test_calibration_is_fitted_on_development_rules_whatever_is_tested(side):
  fitted_on = probes.validation(0, 4)
  for b in probes.basic_benchmarks(0, 4, side):
    assert list(b.validation) == (fitted_on if b.suite == 'classification' else [])
  assert [e.source for e in fitted_on] == ['seen', 'unseen', 'seen', 'unseen']
