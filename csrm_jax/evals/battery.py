"""Runs benchmarks through their suites: one score function in, results out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import (
  best_of,
  calibration,
  checks,
  configurability,
  measure,
  metrics,
  over_refusal,
  probes,
  retrieval,
  robustness,
  suites,
)
from csrm_jax.evals.calibration import Calibration
from csrm_jax.evals.measure import Result, ScoreFn
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Example

# Suites of rows with labels: they take a threshold and a calibration, and
# groups and tags of the rows.
_JUDGED = {
  'classification': suites.classification,
  'over_refusal': over_refusal.over_refusal,
  'configurability': configurability.configurability,
}
# Suites of {variant: example}, and what makes such items of plain examples.
_VARIED: dict[str, tuple[Callable, Callable]] = {
  'policy': (probes.policy, probes.policy_items),
  'contradiction': (probes.contradiction, probes.contradiction_items),
  'attacks': (robustness.attacks, robustness.attack_items),
  'sensitivity': (robustness.sensitivity, list),
  'order': (robustness.sensitivity, robustness.order_items),
  'wordings': (robustness.sensitivity, robustness.paraphrase_items),
  'padding': (robustness.sensitivity, robustness.length_items),
}
SUITES = (*_JUDGED, *_VARIED, 'any_turn', 'best_of', 'flips', 'length', 'pairs', 'rule_sets')


def prepare(benchmarks: Iterable[Benchmark]) -> list[Benchmark]:
  """Returns the benchmarks with plain examples made into what suites take.

  After this `num_scores` is exact. Rows of which a probe can make nothing are
  counted in `drops`.

  Raises:
    ValueError: an unknown suite, or two benchmarks of one name.
  """
  prepared, names = [], set()
  for benchmark in benchmarks:
    if benchmark.suite not in SUITES:
      raise ValueError(
        f'benchmark {benchmark.name}: unknown suite {benchmark.suite!r}; use '
        f'one of {", ".join(SUITES)}'
      )
    if benchmark.name in names:
      raise ValueError(f'two benchmarks are called {benchmark.name!r}; rename one')
    names.add(benchmark.name)
    items = benchmark.items
    if benchmark.suite in _VARIED and len(items) and isinstance(items[0], Example):
      benchmark = _vary(benchmark)
    prepared.append(benchmark)
  return prepared


def _vary(benchmark: Benchmark) -> Benchmark:
  make, options = _VARIED[benchmark.suite][1], dict(benchmark.options)
  made = make(benchmark.items, **options)
  drops = dict(benchmark.drops)
  if isinstance(made, tuple):
    made, num_dropped = made
    if num_dropped:
      drops['not one category of several'] = num_dropped
  elif len(made) < len(benchmark.items):
    drops['not applicable'] = len(benchmark.items) - len(made)
  # The items of a probe are not those that groups and tags were given for.
  return dataclasses.replace(benchmark, items=made, groups=(), tags={}, options={}, drops=drops)


def num_scores(benchmarks: Iterable[Benchmark]) -> int:
  """Returns how many examples prepared benchmarks will score."""
  total = 0
  for b in benchmarks:
    if b.suite in _VARIED:
      total += sum(len(item) for item in b.items)
    elif b.suite in ('pairs', 'flips'):
      total += 2 * len(b.items)
    elif b.suite == 'best_of':
      total += sum(len(item.responses) for item in b.items)
    elif b.suite == 'any_turn':
      total += sum(len(retrieval.turns(item)) for item in b.items)
    else:
      total += len(b.items) * (1 + b.without_rules)
    if b.suite in _JUDGED and len(b.items):
      total += len(b.validation)
  return total


def run(
  score_fn: ScoreFn,
  benchmarks: Sequence[Benchmark],
  *,
  fitted: Calibration | None = None,
  num_samples: int = 300,
  seed: int = 0,
  on_start: Callable[[str], Any] = lambda name: None,
) -> dict[str, Result]:
  """Returns {benchmark: result}, in their order.

  A benchmark that is not on disk gives a result of suite 'skipped' with the
  command that would fetch it. A suite whose scores are not finite, or whose
  examples cannot be scored, gives one of suite 'failed' with the error, which
  names the example (or the package that is missing); the others go on. See
  `failures`.

  Args:
    score_fn: examples -> scores in nats.
    benchmarks: as from `prepare`, or not.
    fitted: the scorer's own calibration; where a benchmark has validation
      rows and none is given, one is fitted on those.
    num_samples, seed: bootstrap draws for each interval.
    on_start: called with the name of each benchmark that is run.
  """
  results: dict[str, Result] = {}
  for benchmark in prepare(benchmarks):
    name = benchmark.name
    if benchmark.is_skipped:
      results[name] = {
        'suite': 'skipped',
        'description': benchmark.description,
        'command': benchmark.command,
        'intended': benchmark.suite,
        'metrics': {},
      }
      continue
    on_start(name)
    options = {'num_samples': num_samples, 'seed': seed}
    try:
      results[name] = _run(score_fn, benchmark, fitted, options)
      if benchmark.without_rules:
        results[f'{name}_without_rules'] = _run_blind(score_fn, benchmark, options)
    except (ValueError, ImportError) as error:
      results[name] = {
        'suite': 'failed',
        'description': benchmark.description,
        'error': str(error),
        'metrics': {},
      }
      continue
    results[name]['drops'] = dict(benchmark.drops)
  return results


def failures(results: Mapping[str, Result]) -> list[str]:
  """Returns 'benchmark: error' of each suite that failed."""
  return [
    f'{name}: {result["error"]}' for name, result in results.items() if result['suite'] == 'failed'
  ]


def blind(score_fn: ScoreFn) -> ScoreFn:
  """Returns the score function that is shown no rules."""

  def score(examples, *args):
    return score_fn([augment.hide_rules(e) for e in examples], *args)

  return score


def fit_calibration(score_fn: ScoreFn, examples: Sequence[Example]) -> Calibration:
  """Returns the calibration fitted on labelled validation examples.

  Raises:
    ValueError: a score is not finite (names the id), or a class is missing.
  """
  rows = [e for e in examples if e.label is not None]
  return calibration.fit(checks.labels_of(rows), measure.score(score_fn, rows))


def _run(score_fn, benchmark: Benchmark, fitted, options) -> Result:
  suite, items = benchmark.suite, benchmark.items
  options = {**options, 'description': benchmark.description}
  score = functools.partial(measure.score, score_fn)
  if suite in _JUDGED:
    return _JUDGED[suite](
      items,
      score(items),
      groups=benchmark.groups,
      tags=benchmark.tags,
      **_fit(score_fn, benchmark, fitted),
      **options,
    )
  options |= benchmark.options
  if suite in _VARIED:
    return _VARIED[suite][0](items, score_fn, **options)
  if suite == 'pairs':
    return suites.pairs(
      items, score([p.safer for p in items]), score([p.other for p in items]), **options
    )
  if suite == 'flips':
    first, second = zip(*items, strict=True) if items else ((), ())
    return suites.flips(items, score(first), score(second), **options)
  if suite == 'rule_sets':
    return suites.rule_sets(items, score(items))
  if suite == 'length':
    return robustness.length(items, score(items), **options)
  if suite == 'any_turn':
    return retrieval.any_turn(items, score_fn, calibration=fitted, **options)
  return best_of.best_of(items, score_fn, **options)


def _run_blind(score_fn, benchmark: Benchmark, options) -> Result:
  scores = measure.score(blind(score_fn), benchmark.items)
  return suites.classification(
    benchmark.items,
    scores,
    groups=benchmark.groups,
    description='The same examples with their rules hidden.',
    **options,
  )


def _fit(score_fn, benchmark: Benchmark, fitted) -> dict[str, Any]:
  """Returns the threshold and the calibration of a benchmark, if any."""
  rows = [e for e in benchmark.validation if e.label is not None]
  labels = checks.labels_of(rows)
  if not 0 < labels.sum() < len(labels):
    return {'threshold': None, 'calibration': fitted}
  scores = measure.score(score_fn, rows)
  return {
    'threshold': metrics.best_threshold(labels, checks.p_unsafe_from_scores(scores)),
    'calibration': fitted or calibration.fit(labels, scores),
  }
