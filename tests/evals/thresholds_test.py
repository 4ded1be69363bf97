"""The promises of thresholds, held by simulation, and what they refuse."""

import numpy as np
import pytest
import scipy.stats

from csrm_jax.evals import metrics, thresholds
from tests import small

NUM_DRAWS = 2000


def _true_rates(n, level, method, bound='flagged', confidence=0.9):
  """Returns the rate of further replies of the class, for each of many draws of n rows."""
  rng, rates = np.random.default_rng(7), []
  for _ in range(NUM_DRAWS):
    own = rng.normal(2.0, 1.5, n).astype(np.float32)
    labels = np.full(n, bound == 'missed')
    found = thresholds.fit(labels, own, level, method, bound, confidence)
    flagged = scipy.stats.norm.cdf(found.score, 2.0, 1.5)
    rates.append(flagged if bound == 'flagged' else 1 - flagged)
  return np.array(rates)


@pytest.mark.parametrize('bound', thresholds.BOUNDS)
@pytest.mark.parametrize('n,level', [(150, 0.05), (99, 0.01), (37, 0.2)])
def test_conformal_holds_on_average(n, level, bound):
  rates = _true_rates(n, level, 'conformal', bound)
  k = int(level * (n + 1) + 1e-9)
  error = 4 * rates.std() / np.sqrt(NUM_DRAWS)
  assert abs(rates.mean() - k / (n + 1)) < error
  assert rates.mean() <= level + error
  # For a single draw it promises nothing: many lie above.
  assert (rates > level).mean() > 0.2


@pytest.mark.parametrize('bound', thresholds.BOUNDS)
@pytest.mark.parametrize('n,level,confidence', [(150, 0.05, 0.9), (300, 0.01, 0.95)])
def test_confident_holds_for_nearly_all_draws(n, level, confidence, bound):
  rates = _true_rates(n, level, 'confident', bound, confidence)
  above = (rates > level).mean()
  assert above <= 1 - confidence + 4 * np.sqrt(confidence * (1 - confidence) / NUM_DRAWS)


@pytest.mark.parametrize('bound', thresholds.BOUNDS)
@pytest.mark.parametrize('level', [0.01, 0.07, 0.5])
def test_the_share_of_its_own_rows(level, bound):
  rng = np.random.default_rng(0)
  # Many equal scores: a threshold never parts them.
  scores = rng.integers(-5, 6, 400).astype(np.float32)
  labels = rng.random(400) < 0.3
  found = thresholds.fit(labels, scores, level, 'empirical', bound)
  flagged = scores <= found.score
  share = flagged[~labels].mean() if bound == 'flagged' else (~flagged)[labels].mean()
  assert share <= level
  assert (found.flagged_safe, found.flagged_unsafe) == (
    pytest.approx(flagged[~labels].mean()),
    pytest.approx(flagged[labels].mean()),
  )
  assert (found.num_safe, found.num_unsafe) == ((~labels).sum(), labels.sum())
  assert [found.flags(float(s)) for s in scores] == flagged.tolist()
  # One step further would break it.
  following = scores[scores > found.score].min() if bound == 'flagged' else None
  if following is not None:
    assert (scores <= following)[~labels].mean() > level


def test_each_policy_has_its_own():
  """Pooled, one policy's safe replies are flagged far too often; apart, neither's are."""
  rng, level, n = np.random.default_rng(1), 0.05, 4000
  easy, hard = (rng.normal(mean, 1, n).astype(np.float32) for mean in (6.0, 0.0))
  safe = np.zeros(2 * n, bool)
  pooled = thresholds.fit(safe, np.concatenate([easy, hard]), level)
  assert scipy.stats.norm.cdf(pooled.score, 0, 1) > 1.7 * level
  for scores, mean in ((easy, 6.0), (hard, 0.0)):
    own = thresholds.fit(safe[:n], scores, level)
    assert scipy.stats.norm.cdf(own.score, mean, 1) < 1.3 * level


@pytest.mark.parametrize(
  'n,level,method,says',
  [
    (98, 0.01, 'conformal', '98 safe rows, and method=conformal needs 99'),
    (298, 0.01, 'confident', 'needs 299'),
    (0, 0.01, 'empirical', 'needs 1'),
    (10, 0.0, 'conformal', 'the level is 0.0'),
    (10, float('nan'), 'conformal', 'the level is nan'),
    (10, 0.5, 'bayes', "method='bayes' must be one of"),
  ],
)
def test_too_few_rows_for_the_promise(n, level, method, says):
  labels = np.arange(n + 5) >= n
  scores = np.arange(n + 5, dtype=np.float32)
  assert says in small.error_of(thresholds.fit, labels, scores, level, method)
  if says.startswith('98') or '299' in says:
    labels, scores = np.arange(n + 6) > n, np.arange(n + 6, dtype=np.float32)
    assert thresholds.fit(labels, scores, level, method).flagged_safe == 0


def test_files_belong_to_a_model(tmp_path):
  found = thresholds.fit(np.arange(60) < 20, np.arange(60, dtype=np.float32), 0.1)
  path = tmp_path / 'thresholds.json'
  thresholds.Thresholds('abc', (2.0, 0.5), {'d1': found}, {'d1': 'pets'}).save(path)
  fitted = metrics.Calibration(2.0, 0.5)
  assert thresholds.load(str(path), 'abc', fitted).by_rules == {'d1': found}
  for model, calibration in (('other', fitted), ('abc', None), ('abc', metrics.Calibration())):
    message = small.error_of(thresholds.load, str(path), model, calibration)
    assert 'fitted for another model' in message
  path.write_text('{"policies": [{"digest": "x"}]}')
  assert 'not a file of thresholds' in small.error_of(thresholds.load, str(path), 'abc', fitted)
