"""The ruler: search, STARC, cues and grades against loops, and what must not change them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import metrics, ruler, suites
from csrm_jax.evals.bootstrap import Measure
from csrm_jax.ruleworld import examples
from csrm_jax.runners import search as search_runner
from tests import small

RNG = np.random.default_rng(0)
SCORES, TRUE = RNG.normal(size=(3, 6)) * 2, RNG.uniform(0.01, 0.99, (3, 6))


def test_best_of_n_is_the_mean_over_all_subsets():
  for budget in (1, 2, 4, 6):
    weights, calls = ruler.best_of(SCORES, budget)
    for row, own, truth in zip(SCORES, weights, TRUE, strict=True):
      subsets = list(itertools.combinations(range(6), budget))
      best = [truth[max(subset, key=lambda i: row[i])] for subset in subsets]
      assert own @ truth == pytest.approx(np.mean(best), rel=1e-12)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert set(calls) == {budget}


def test_rejection_takes_the_first_that_is_surely_safe():
  high = math.log(9) + 0.01
  scores = np.array([[0.0, high, 9.0], [1.0, 0.5, high], [0.0, 2.0, 1.0]])
  weights, calls = ruler.rejection(scores, 2)
  assert weights.argmax(1).tolist() == [1, 0, 1] and calls.tolist() == [2, 2, 2]
  weights, calls = ruler.rejection(scores, 3)
  assert weights.argmax(1).tolist() == [1, 2, 1] and calls.tolist() == [2, 3, 3]


def test_starc_is_the_correlation_within_prompts_and_knows_no_scale():
  centred = [x - x.mean(1, keepdims=True) for x in (SCORES, TRUE)]
  rho = np.corrcoef(*(x.ravel() for x in centred))[0, 1]
  found = ruler.starc(SCORES, TRUE)
  assert found == pytest.approx(math.sqrt((1 - rho) / 2), rel=1e-12)
  offsets = RNG.normal(size=(3, 1)) * 10
  assert ruler.starc(3 * SCORES + offsets, TRUE) == pytest.approx(found, rel=1e-9)
  assert ruler.starc(SCORES, SCORES) == 0
  assert ruler.starc(-SCORES, SCORES) == pytest.approx(1)
  assert math.isnan(ruler.starc(np.ones((2, 3)), np.ones((2, 3))))
  assert ruler.sizes(64) == [1, 2, 4, 8, 16, 32, 64] and ruler.sizes(6) == [1, 2, 4, 6]


def _item(prompt, num=6):
  example = examples.test_example(0, prompt, 'unseen')
  return tuple(
    dataclasses.replace(example, id=f'{prompt}#{i}', probability=1 - TRUE[prompt, i])
    for i in range(num)
  )


def _run(score_fn, *benchmarks):
  return suites.run(score_fn, benchmarks, num_samples=20)


def test_who_knows_the_truth_finds_it_and_who_is_fooled_loses_it():
  items = [_item(i) for i in range(3)]
  bench = Benchmark('found', 'search', items)
  truth = {e.id: metrics.log_odds_safe(np.array([e.probability]))[0] for of in items for e in of}

  def value(found, name):
    return found['found'].metrics[name]['value']

  knows = _run(lambda rows: np.array([truth[e.id] for e in rows]), bench)
  assert value(knows, 'truth_best') == pytest.approx(TRUE.max(1).mean())
  assert value(knows, 'truth_first') == pytest.approx(TRUE.mean())
  assert value(knows, 'hacking_loss') == 0 and value(knows, 'truth_rho') == pytest.approx(1)
  assert value(knows, 'starc') == pytest.approx(0, abs=1e-6)
  fooled = _run(lambda rows: -np.array([truth[e.id] for e in rows]), bench)
  assert value(fooled, 'truth_best') == pytest.approx(TRUE.min(1).mean())
  assert value(fooled, 'hacking_loss') == pytest.approx(TRUE.mean() - TRUE.min(1).mean())
  table = fooled['found'].tables[0]
  assert [row[:2] for row in table.rows[:4]] == [['best_of', n] for n in (1, 2, 4, 6)]
  assert {row[0] for row in table.rows} == set(ruler.SEARCH)
  unknown = [tuple(dataclasses.replace(e, probability=None) for e in items[0])]
  failed = _run(lambda rows: np.zeros(len(rows)), Benchmark('found', 'search', unknown))
  assert 'needs the true probability' in suites.failures(failed)[0]


def test_what_beams_found_is_a_row_beside_the_samples():
  items = [_item(i, 5) for i in range(3)]
  plain = Benchmark('found', 'search', [item[:3] for item in items])
  beams = dataclasses.replace(plain, items=items, options={'beams': (1, 4)})
  table = {e.id: s for of, row in zip(items, SCORES, strict=True) for e, s in zip(of, row[:5])}  # noqa: B905

  def score(rows):
    return np.array([table[e.id] for e in rows])

  without, found = (_run(score, one)['found'] for one in (plain, beams))
  assert found.metrics == without.metrics and found.counts == without.counts
  *rest, one, four = found.tables[0].rows
  assert list(map(repr, rest)) == list(map(repr, without.tables[0].rows))
  for row, column, num in ((one, 3, 1), (four, 4, 4)):
    assert row[:3] == ['multifurcation', num, num]
    assert row[3]['value'] == pytest.approx((1 / (1 + np.exp(-SCORES[:, column]))).mean())
    assert row[4]['value'] == pytest.approx(TRUE[:, column].mean())


def test_a_scorer_that_takes_the_cue_for_safety_has_a_gap():
  items = [examples.test_example(0, i, 'unseen') for i in range(60)]
  bench = Benchmark('cue', 'spurious', items)

  def score(bias):
    def fn(rows):
      sure = np.array([3.0 if e.label == 'safe' else -3.0 for e in rows])
      return sure + bias * np.array(
        ['I hope that helps.' in e.conversation[-1].content for e in rows]
      )

    return fn

  none, all_safe = (_run(score(bias), bench)['cue'].metrics for bias in (0, 9))
  assert none['spurious_gap']['value'] == 0 and none['f1_cue_safe']['value'] == 1
  # With it everywhere behind unsafe replies all are called safe: no F1 at all.
  assert all_safe['f1_cue_unsafe']['value'] == 0 < all_safe['spurious_gap']['value']


def test_grades_are_thirds_by_strength():
  strength = np.arange(9.0)
  gaps = np.array([1, -1, -1, 1, 1, 1, 2, 3, 4.0])
  found = ruler.graded(gaps, np.zeros(9), strength, Measure(num_samples=0))
  assert found['accuracy_weak']['value'] == pytest.approx(1 / 3)
  assert found['accuracy_strong']['value'] == 1
  assert found['strength_rho']['value'] == pytest.approx(metrics.spearman(gaps, strength))
  assert not ruler.graded(gaps, gaps, np.ones(9), Measure()) | ruler.graded(
    gaps, gaps, None, Measure()
  )


def test_pairs_have_grades_where_the_truth_is_known_or_told():
  pairs = [examples.strictness_pair(0, i, 'unseen') for i in range(12)]

  def accuracy(items):
    found = _run(lambda rows: np.arange(len(rows), 0, -1.0), Benchmark('p', 'pairs', items))
    return found['p'].metrics.get('accuracy_strong')

  assert accuracy(pairs) is not None
  plain = [
    dataclasses.replace(
      pair,
      safer=dataclasses.replace(pair.safer, probability=None),
      other=dataclasses.replace(pair.other, probability=None),
    )
    for pair in pairs
  ]
  assert accuracy(plain) is None
  told = [dataclasses.replace(pair, strength=1 + i % 3) for i, pair in enumerate(plain)]
  assert accuracy(told) is not None


def test_samples_of_the_policy_have_their_truth(tmp_path):
  config = config_lib.load_module('eval').get_config('search')
  assert (config.num_prompts, config.num_samples) == (256, 64) and config.combine == 'mean'
  config.num_prompts, config.num_samples = 3, 4
  items = search_runner._samples(config, 'film club')
  assert [len(item) for item in items] == [4, 4, 4]
  for item in items:
    assert len({e.conversation[:-1] for e in item}) == 1
    assert all(0 <= e.probability <= 1 for e in item)
    texts = {e.conversation[-1].content for e in item}
    assert len({e.id for e in item}) == len(texts)
  config.beams = (1, 0)
  assert 'beams=(1, 0) must be different numbers' in small.error_of(
    search_runner._check_beams, config
  )
  config.beams, config.checkpoint = (4,), 'x+y'
  assert 'of several models' in small.error_of(search_runner._check_beams, config)
  config.num_samples, config.beams = 1, ()
  config.checkpoint = 'x'
  assert 'at least 2' in small.error_of(search_runner.run, config, tmp_path)
