"""The suites, and what runs benchmarks through them: one score function in, results out.

A suite is a row of SUITES and a function that measures: to add one, write both. New metrics get
their title and text in metrics.yaml.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import alarms, dialogues, metrics, probes, retrieval, ruler, verdicts
from csrm_jax.evals.bootstrap import Measure
from csrm_jax.evals.metrics import Calibration
from csrm_jax.evals.results import FAILED, SKIPPED, Result
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Example

# Examples -> scores, float32 [N] nats.
ScoreFn = Callable[[Sequence[Example]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Suite:
  """What is asked of a judge, and what is made of its answers."""

  # (benchmark, scores, m) -> Result. `scores` has an array of finite nats, float64, for each item;
  # `m` measures metrics with their intervals, see `bootstrap.Measure`.
  measure: Callable[..., Result]
  # item -> the examples to be scored
  ask: Callable[[Any], Sequence[Example]] = lambda example: (example,)
  # Makes labelled examples, with the benchmark's options, into items, or into (items, how many gave
  # none). None where examples are the items, or where items must be given.
  make: Callable[..., Any] | None = None
  # Items are examples, and `measure` also takes a threshold and a calibration, which are fitted on
  # the benchmark's validation rows.
  is_judged: bool = False
  by_side: bool = False  # the first examples of all items are scored in one call, then the second
  # {metric: (function, names of its arrays)}, which a comparison of two scorers tests.
  paired: Mapping[str, tuple[Callable[..., float], Sequence[str]]] = dataclasses.field(
    default_factory=dict
  )


def _variants(item: Mapping[str, Example]) -> Sequence[Example]:
  return tuple(item.values())


def _mean_gap(a: np.ndarray, b: np.ndarray) -> float:
  return metrics.mean(a - b)


_JUDGED = {
  'is_judged': True,
  'paired': {
    name: (getattr(metrics, name), ('labels', 'p_unsafe'))
    for name in ('f1', 'auprc', 'smece', 'nll')
  },
}
# In the order of a report's chapters.
SUITES = {
  'classification': Suite(verdicts.classification, **_JUDGED),
  'over_refusal': Suite(verdicts.over_refusal, **_JUDGED),
  'configurability': Suite(verdicts.configurability, **_JUDGED),
  'any_turn': Suite(retrieval.any_turn, retrieval.asked, retrieval.talks, **_JUDGED),
  'pairs': Suite(
    verdicts.pairs,
    lambda pair: (pair.safer, pair.other),
    by_side=True,
    paired={
      'accuracy': (metrics.pair_accuracy, ('safer', 'other')),
      'score_gap': (metrics.score_gap, ('safer', 'other')),
    },
  ),
  'flips': Suite(
    verdicts.flips,
    tuple,
    by_side=True,
    paired={
      'consistency': (metrics.flip_consistency, ('labels_a', 'p_a', 'labels_b', 'p_b')),
      'direction': (metrics.pair_accuracy, ('safer', 'other')),
    },
  ),
  'rule_sets': Suite(verdicts.rule_sets),
  'policy': Suite(
    probes.policy,
    _variants,
    probes.policy_items,
    paired={
      'unsafe_rate': (metrics.mean, ('strict',)),
      'shift_leave_one_out': (_mean_gap, ('leave_one_out', 'strict')),
      'shift_allow': (_mean_gap, ('allow', 'strict')),
    },
  ),
  'contradiction': Suite(probes.contradiction, _variants, probes.contradiction_items),
  'attacks': Suite(probes.attacks, _variants, probes.attack_items),
  'sensitivity': Suite(probes.sensitivity, _variants),
  'order': Suite(probes.sensitivity, _variants, probes.order_items),
  'wordings': Suite(probes.sensitivity, _variants, probes.paraphrase_items),
  'padding': Suite(probes.sensitivity, _variants, probes.length_items),
  'length': Suite(probes.length),
  'best_of': Suite(
    probes.best_of, lambda choice: choice.responses, paired={'credit': (metrics.mean, ('credit',))}
  ),
  'spurious': Suite(ruler.spurious, tuple, ruler.spurious_items),
  'search': Suite(
    ruler.search,
    ruler.asked,
    paired={name: (metrics.mean, (name,)) for name in ('truth_first', 'truth_best')},
  ),
  'alarms': Suite(alarms.alarms, tuple),
  'drift': Suite(dialogues.drift, tuple),
  'trajectories': Suite(dialogues.trajectories, dialogues.asked_turns),
}


def prepare(benchmarks: Iterable[Benchmark]) -> list[Benchmark]:
  """Returns the benchmarks with plain examples made into what their suites take.

  After this `num_scores` is exact. `drops` counts the rows of which a suite can make nothing.

  Raises:
    ValueError: A suite is unknown, or two benchmarks have one name.
  """
  prepared: dict[str, Benchmark] = {}
  for benchmark in benchmarks:
    if benchmark.suite not in SUITES:
      raise ValueError(
        f'benchmark {benchmark.name}: unknown suite {benchmark.suite!r}; use '
        f'one of {", ".join(SUITES)}'
      )
    if benchmark.name in prepared:
      raise ValueError(f'two benchmarks are called {benchmark.name!r}; rename one')
    # Items that are made already, such as RuleWorld's probes, stay as they are.
    items = benchmark.items
    if SUITES[benchmark.suite].make and len(items) and isinstance(items[0], Example):
      benchmark = _make(benchmark)
    prepared[benchmark.name] = benchmark
  return list(prepared.values())


def _make(benchmark: Benchmark) -> Benchmark:
  try:
    made = SUITES[benchmark.suite].make(benchmark.items, **benchmark.options)
  except ImportError as error:  # An extra is not installed: this suite fails, the others go on.
    return dataclasses.replace(benchmark, items=(), error=str(error), groups=(), tags={})
  drops = dict(benchmark.drops)
  if isinstance(made, tuple):
    made, num_dropped = made
    if num_dropped:
      drops['not one category of several'] = num_dropped
  elif len(made) < len(benchmark.items):
    drops['not applicable'] = len(benchmark.items) - len(made)
  # The items are not those that groups, tags and validation rows were given for.
  return dataclasses.replace(
    benchmark, items=made, groups=(), tags={}, validation=(), options={}, drops=drops
  )


def num_scores(benchmarks: Iterable[Benchmark]) -> int:
  """Returns how many examples prepared benchmarks will score."""
  total = 0
  for b in benchmarks:
    suite = SUITES[b.suite]
    # With hidden rules, every example is scored once more.
    total += sum(len(suite.ask(item)) for item in b.items) * (1 + b.without_rules)
    total += len(b.validation) if suite.is_judged and len(b.items) else 0
  return total


def run(
  score_fn: ScoreFn,
  benchmarks: Sequence[Benchmark],
  *,
  fitted: Calibration | None = None,
  num_samples: int = 300,
  on_start: Callable[[str], Any] = lambda name: None,
) -> dict[str, Result]:
  """Returns {benchmark: result}, in the order of the benchmarks.

  A benchmark that is not on disk gives a SKIPPED result with the command that would fetch it. A
  suite whose scores are not finite, whose examples cannot be scored, or whose package is missing
  gives a FAILED one with the error; the others go on. See `failures`.

  Args:
    fitted: The scorer's own calibration. Without it, one is fitted where a benchmark has
      validation rows.
    num_samples: How many bootstrap draws make an interval.
    on_start: Is called with the name of each benchmark that is run.
  """
  results: dict[str, Result] = {}
  m = Measure(num_samples=num_samples)
  for b in prepare(benchmarks):
    about = {'description': b.description}
    if b.is_skipped:
      counts = {'command': b.command, 'intended': b.suite}
      results[b.name] = Result(SKIPPED, counts=counts, **about)
      continue
    on_start(b.name)
    try:
      result = evaluate(score_fn, b, m, fitted)
      results[b.name] = dataclasses.replace(result, drops=dict(b.drops))
      if b.without_rules:
        hidden = 'The same examples with their rules hidden.'
        scores = [np.array([s]) for s in score(blind(score_fn), b.items)]
        result = verdicts.classification(dataclasses.replace(b, tags={}), scores, m, blind=True)
        results[f'{b.name}_without_rules'] = dataclasses.replace(result, description=hidden)
    # One suite that fails must not cost the results of the others.
    except (ValueError, ImportError) as error:
      results[b.name] = Result(FAILED, counts={'error': str(error)}, **about)
  return results


def evaluate(
  score_fn: ScoreFn, b: Benchmark, m: Measure, fitted: Calibration | None = None
) -> Result:
  """Returns the result of one prepared benchmark.

  A ValueError names the id of a score that is not finite, or an item that does not fit the
  suite.
  """
  if b.error:
    raise ImportError(b.error)
  suite = SUITES[b.suite]
  asked = [suite.ask(item) for item in b.items]
  if suite.by_side:
    scores = list(zip(*(score(score_fn, side) for side in zip(*asked, strict=True)), strict=True))
  else:
    flat = score(score_fn, [example for examples in asked for example in examples])
    scores = np.split(flat, np.cumsum([len(examples) for examples in asked])[:-1]) if asked else []
  options = dict(b.options)
  if suite.is_judged:
    rows = [e for e in b.validation if e.label is not None]
    labels, options = metrics.labels_of(rows), {'calibration': fitted}
    # Rows of one class fit neither a threshold nor a calibration.
    if 0 < labels.sum() < len(labels):
      held_out = score(score_fn, rows)
      p_unsafe = metrics.p_unsafe_from_scores(held_out)
      options = {
        'threshold': metrics.best_threshold(labels, p_unsafe),
        'calibration': fitted or metrics.fit_calibration(labels, held_out),
      }
  return dataclasses.replace(suite.measure(b, scores, m, **options), description=b.description)


def score(score_fn: ScoreFn, examples: Sequence[Example]) -> np.ndarray:
  """Returns the scores, float64 [N] nats; a ValueError names the id of one that is not finite."""
  return metrics.check_finite(score_fn(examples), [e.id for e in examples])


def failures(results: Mapping[str, Result]) -> list[str]:
  """Returns 'benchmark: error' of each suite that failed."""
  return [
    f'{name}: {result.counts["error"]}'
    for name, result in results.items()
    if result.suite == FAILED
  ]


def blind(score_fn: ScoreFn) -> ScoreFn:
  """Returns a score function that hides the rules from the given one."""

  def score(examples, *args):
    return score_fn([augment.hide_rules(e) for e in examples], *args)

  return score
