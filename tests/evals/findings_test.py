"""The first page in words: each sentence says what the figures say."""

import pytest

from csrm_jax.evals import findings
from csrm_jax.evals.metrics import Calibration
from csrm_jax.evals.results import Result


def _metric(value, low=None, high=None, best=None, note=None):
  return {'value': value, 'low': low, 'high': high, 'best': best, 'note': note}


def _results(**changes):
  """Returns results of a model that reads unseen rules well, and orders pairs badly."""
  values = {
    'seen/f1': _metric(0.91, 0.88, 0.93, 0.96),
    'unseen/f1': _metric(0.9, 0.85, 0.94, 0.96),
    'unseen/auprc': _metric(0.95, 0.9, 0.98, 0.98),
    'unseen/f1_tuned': _metric(0.93, note='threshold 0.41'),
    'unseen_without_rules/f1': _metric(0.4, best=0.96),
    'pairs/accuracy': _metric(0.6, 0.5, 0.7, 1.0),
    'own/f1': _metric(None),
  } | {key.replace('__', '/'): value for key, value in changes.items()}
  metrics = {}
  for key, value in values.items():
    name, _, metric = key.partition('/')
    metrics.setdefault(name, {})[metric] = value
  suites = {name: 'pairs' if name == 'pairs' else 'classification' for name in metrics}
  return {
    name: Result(suites[name], metrics=found, size='20 examples') for name, found in metrics.items()
  }


def test_five_sentences():
  said = findings.sentences(_results(), Calibration(1.2, -0.3, applied=True, reason='it helps'))
  assert said[0].startswith('On "unseen" (20 examples) its F1 is 0.900 [0.850, 0.940]')
  assert said[0].endswith('with the rules hidden F1 is 0.400, so that it does read them.')
  assert said[1] == (
    'Its weakest point is Pair accuracy on "pairs": 0.600 [0.500, 0.700], of 1.000 that can be'
    ' reached.'
  )
  assert 'Flag from P(unsafe) = 0.41 on' in said[2] and '0.900 at 0.5' in said[2]
  assert 'score / 1.2 -0.3' in said[3] and 'it helps' in said[3]
  assert 'loss.gamma' in said[4] and len(said) == 5


@pytest.mark.parametrize(
  ('changes', 'place', 'part'),
  [
    ({'unseen_without_rules__f1': _metric(0.88)}, 0, 'nothing shows that it reads them'),
    ({'unseen_without_rules__f1': _metric(0.88)}, 4, 'more varied rules'),
    ({'unseen__f1': _metric(0.5, 0.45, 0.55)}, 4, 'better under those that it has seen'),
    ({'unseen__f1_tuned': _metric(0.8, note='threshold 0.41')}, 2, 'Keep the threshold of 0.5'),
    ({'unseen__f1_tuned': _metric(None)}, 2, 'no rows were held out'),
    ({'pairs__accuracy': _metric(1.0)}, 4, 'eval.path'),
  ],
)
def test_each_case_is_told_apart(changes, place, part):
  assert part in findings.sentences(_results(**changes))[place]


def test_without_labels_nothing_is_said():
  assert findings.sentences({'pairs': _results()['pairs']}) == []
