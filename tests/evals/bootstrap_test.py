"""Intervals and differences resample conversations, not rows."""

import dataclasses
import math

import numpy as np
import pytest

from csrm_jax.evals import bootstrap, metrics
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig


def _rows(num_rows, seed=0):
  rng = np.random.default_rng(seed)
  p = rng.beta(0.6, 0.6, num_rows)
  return (rng.random(num_rows) < p).astype(int), p


def _example(text, rule='No dogs.'):
  return Example(
    id=f'{text}/{rule}',
    safety=SafetyConfig((Category('Pets', rule),)),
    conversation=(Message('agent', text),),
  )


def test_nothing_has_no_interval():
  assert all(map(math.isnan, bootstrap.interval(np.mean, [np.zeros(0)])))


def test_bootstrap_is_deterministic_and_paired():
  labels, p = _rows(200)

  def within(seed):
    return bootstrap.interval(metrics.f1, (labels, p), num_samples=100, seed=seed)

  first = within(7)
  assert first == within(7)
  assert first != within(8)
  assert first[0] < metrics.f1(labels, p) < first[1]
  # Rows stay together: the difference of an array to itself is always 0.
  none = bootstrap.interval(metrics.prob_error, (p, p), num_samples=20)
  assert none == (0, 0)


def test_bootstrap_covers_a_mean():
  rng = np.random.default_rng(0)
  hits = 0
  for seed in range(100):
    low, high = bootstrap.interval(np.mean, [rng.normal(size=100)], num_samples=200, seed=seed)
    hits += low <= 0 <= high
  assert 87 <= hits <= 100


def test_centred_interval_holds_the_value():
  labels, p = _rows(1000)
  value = metrics.smece(labels, p)
  low, high = bootstrap.interval(metrics.smece, (labels, p), num_samples=50, centred=True)
  assert 0 <= low < value < high


def test_bootstrap_leaves_undefined_draws_out():
  labels, p = np.array([1, 0, 0, 0, 0]), np.linspace(0.9, 0.1, 5)
  low, high = bootstrap.interval(metrics.auprc, (labels, p), num_samples=100)
  assert low <= high <= 1


def test_units_are_conversations_groups_and_chains_of_both():
  rows = [_example('a'), _example('b'), _example('a', 'No cats.'), _example('c'), _example('d')]
  assert bootstrap.units_of(rows).tolist() == [0, 1, 0, 2, 3]
  # b and d share a group; an empty id is none.
  assert bootstrap.units_of(rows, ['', 'x', '', '', 'x']).tolist() == [0, 1, 0, 2, 1]
  # a's second row ties c to a's first one.
  assert bootstrap.units_of(rows, ['', '', 'y', 'y', '']).tolist() == [0, 1, 0, 0, 2]


def test_answers_to_one_prompt_are_one_unit():
  rows = [
    dataclasses.replace(_example('x'), conversation=(Message('user', ask), Message('agent', text)))
    for ask, text in [('A?', 'a'), ('B?', 'b'), ('a?', 'c'), ('B?', 'd'), ('C?', 'a')]
  ]
  assert bootstrap.units_of(rows).tolist() == [0, 1, 0, 1, 2]


def test_a_unit_is_drawn_as_a_whole():
  units = np.array([0, 1, 0, 1, 2])
  sizes = []

  def whole(unit, value):
    counts = np.bincount(unit, minlength=3)
    # Both rows of a unit, the same number of times; never one alone.
    assert counts[0] % 2 == 0 and counts[1] % 2 == 0
    for u, v in ((0, 10), (0, 12), (1, 11), (1, 13), (2, 14)):
      size = 2 if u < 2 else 1
      assert np.sum((unit == u) & (value == v)) == counts[u] // size
    sizes.append(len(unit))
    return 0.0

  bootstrap.interval(whole, (units, np.array([10, 11, 12, 13, 14])), units, num_samples=50)
  assert len(set(sizes)) > 1


def test_copies_of_rows_do_not_narrow_an_interval_over_units():
  labels, p = _rows(40)
  copied = np.repeat(labels, 9), np.repeat(p, 9)
  units = np.repeat(np.arange(40), 9)
  plain = bootstrap.interval(metrics.brier, (labels, p))
  whole = bootstrap.interval(metrics.brier, copied, units)
  assert whole == pytest.approx(plain)
  low, high = bootstrap.interval(metrics.brier, copied)
  assert high - low < 0.5 * (plain[1] - plain[0])


def test_a_difference_is_signed_and_paired():
  labels, p = _rows(300)
  worse = np.clip(p + np.random.default_rng(1).normal(0, 0.3, 300), 0, 1)
  found = bootstrap.difference(metrics.auprc, (labels, p), (labels, worse), num_samples=200)
  assert found['value'] == (metrics.auprc(labels, p) - metrics.auprc(labels, worse))
  assert 0 < found['low'] < found['value'] < found['high']
  assert found['p_value'] < 0.05
  back = bootstrap.difference(metrics.auprc, (labels, worse), (labels, p), num_samples=200)
  assert back['high'] == pytest.approx(-found['low'])
  # The same rows of both: a constant shift has no spread at all.
  shifted = bootstrap.difference(lambda x: x.mean(), (p + 1,), (p,), num_samples=50)
  assert shifted['low'] == pytest.approx(1) == pytest.approx(shifted['high'])
  same = bootstrap.difference(metrics.f1, (labels, p), (labels, p), num_samples=50)
  assert (same['low'], same['high'], same['p_value']) == (0, 0, 1)


def test_chance_differences_are_rarely_significant():
  rng = np.random.default_rng(0)
  found = [
    bootstrap.difference(
      np.mean, (rng.normal(size=60),), (rng.normal(size=60),), num_samples=200, seed=i
    )['p_value']
    < 0.05
    for i in range(100)
  ]
  assert sum(found) <= 12


def test_rows_of_different_examples_cannot_be_compared():
  with pytest.raises(ValueError, match='same number'):
    bootstrap.difference(np.mean, (np.zeros(3),), (np.zeros(4),))


def test_interval_of_few_runs_matches_a_known_case():
  mean, half = bootstrap.mean_and_interval([1.0, 2.0, 3.0])
  assert mean == 2.0
  # t(0.975, 2) = 4.30265, standard error 1 / sqrt(3).
  np.testing.assert_allclose(half, 4.302653 / np.sqrt(3), rtol=1e-6)
  mean, half = bootstrap.mean_and_interval([5.0])
  assert mean == 5.0 and np.isnan(half)
