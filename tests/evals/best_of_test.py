"""Best of four and ties, by the rules that RewardBench 2 publishes."""

import math

import numpy as np
import pytest

from csrm_jax.data.benchmark import Choice
from csrm_jax.evals import probes
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.evals.helpers import plain, run

SAFETY = SafetyConfig((Category('Pets', 'No dogs.'),))


def _choice(name, num, num_correct=1, subset='Safety'):
  responses = tuple(
    Example(
      id=f'{name}/{i}',
      safety=SAFETY,
      conversation=(Message('user', name), Message('agent', f'{i}')),
    )
    for i in range(num)
  )
  return Choice(name, responses, num_correct, subset)


def _run(rows):
  """rows: [(choice, scores of its responses)]"""
  table = {r.id: s for c, scores in rows for r, s in zip(c.responses, scores, strict=True)}
  choices = [c for c, _ in rows]
  return plain(
    run('best_of', choices, lambda es: np.array([table[e.id] for e in es]), num_samples=5)
  )


def test_the_chosen_one_must_have_the_highest_score():
  result = _run(
    [
      (_choice('a', 4), [3, 1, 2, 0]),
      (_choice('b', 4), [1, 3, 2, 0]),
      (_choice('c', 4), [3, 3, 2, 3]),  # one of three at the top
      (_choice('d', 4, subset='Math'), [1, 2, 2, 0]),
    ]
  )
  values = {k: m['value'] for k, m in result['metrics'].items()}
  safety = (1 + 0 + 1 / 3) / 3
  assert result['subsets']['Safety']['value'] == pytest.approx(safety)
  assert result['subsets']['Math']['value'] == 0
  # Subsets weigh the same, whatever their size.
  assert values['best_of'] == pytest.approx(safety / 2)
  assert values['strict'] == 0.25 and values['top_ties'] == 0.5
  assert values['chance'] == 0.25


def test_ties_follow_the_published_formula():
  items = [
    (_choice('ref:1', 3, 1, 'Ties'), np.array([2.0, 1.0, 0.0])),
    (_choice('tied:1', 4, 2, 'Ties'), np.array([3.0, 2.5, 1.0, 0.5])),
    (_choice('ref:2', 3, 1, 'Ties'), np.array([0.0, 1.0, 0.0])),
    (_choice('tied:2', 4, 2, 'Ties'), np.array([4.0, 1.0, 0.0, 0.0])),
  ]
  found = probes.ties_score([c for c, _ in items], [s for _, s in items])
  # Item 1: margin 1.5, spread 0.5, ref margin 1. Item 2: margin 1, spread 3,
  # ref margin -1.
  assert found['ref_accuracy'] == 0.5 and found['tied_accuracy'] == 1
  assert found['preferred'] == 0.5 and found['preferred_hard'] == 0.5
  margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 3 - 1)) / 2
  assert found['margin'] == pytest.approx(margin)
  assert found['score'] == pytest.approx(
    0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
  )
  result = _run(items)
  assert result['metrics']['best_of']['value'] == pytest.approx(found['score'])
  assert math.isnan(result['metrics']['strict']['value'])
  # No spread at all: a margin above it is as good as can be.
  flat = probes.ties_score(
    [c for c, _ in items[:2]], [np.array([2.0, 1, 0]), np.array([3.0, 3, 1, 1])]
  )
  assert flat['margin'] == 1 and flat['score'] == pytest.approx(1.01)


def test_order_of_responses_and_bad_items():
  with pytest.raises(ValueError, match='4 correct of 4'):
    _choice('a', 4, 4)
  with pytest.raises(ValueError, match='ref:<n> or tied:<n>'):
    _choice('a', 4, 1, 'Ties')
  with pytest.raises(ValueError, match="'b/2'"):
    _run([(_choice('a', 4), [0, 0, 0, 0]), (_choice('b', 4), [0, 0, math.nan, 0])])
  empty = plain(run('best_of', [], [], num_samples=2))
  assert math.isnan(empty['metrics']['best_of']['value'])


def test_the_reciprocal_rank_is_that_of_the_best_correct_response():
  rows = [(_choice('a', 10), [5, *range(9)]), (_choice('b', 3, 2), [0, 1, 1])]
  # Four of the nine wrong ones are above the right one of a, or beside it: 5, 6, 7 and 8.
  assert _run(rows)['metrics']['mrr']['value'] == pytest.approx((1 / 5 + 1 / 2) / 2)
  assert probes.reciprocal_rank(np.array([2.0, 1, 0]), 1) == 1
