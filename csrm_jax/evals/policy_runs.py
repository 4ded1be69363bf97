"""Several alignments side by side: by reward, rule set and seed.

Runs that differ in the seed alone are one row of the tables; intervals are over
their seeds. What two rewards differ by is measured where both were used: under
the same rules and with the same seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from csrm_jax.evals import bootstrap, policy, policy_sweeps
from csrm_jax.evals.definitions import METRICS
from csrm_jax.evals.measure import Metric, Result

# The policy that each run has started from, in its report.
_START = 'unaligned'
_END = 'aligned'


@dataclasses.dataclass(frozen=True)
class Run:
  """One alignment.

  Attributes:
    algorithm: a row of rl.algorithms.
    reward: what it was trained with; without a and b.
    rules: name of the rule set.
    seed: of the run.
    a, b: of its safety reward sigmoid(a * score + b).
    policies: {policy: {metric: value and interval}}, over its prompts.
  """

  algorithm: str
  reward: str
  rules: str
  seed: int
  a: float
  b: float
  policies: Mapping[str, Mapping[str, Metric]]

  @property
  def method(self) -> str:
    """Algorithm and reward."""
    return f'{self.algorithm}, {self.reward}'


def compare(runs: Sequence[Run], reference: str = '') -> dict[str, Result]:
  """Returns {'alignment': …} of all runs, and 'pareto' where a or b differ.

  The first has the runs with a = 1 and b = 0, if there are any (or all, where
  all have the same): a row for the
  policy they started from, for the best of its samples by each reward, and for
  each method; a column a rule set, as the paper's Table 5; and paired
  differences to the reference. The other is its Figure 4.

  Args:
    runs: all judged by the same metrics.
    reference: a method; '' for the first.

  Raises:
    ValueError: no such method, or two runs that are the same but for their
      numbers.

  Source: CSRM (arXiv 2605.30487), Table 5 and Figure 4.
  """
  _check_distinct(runs)
  settings = {(run.a, run.b) for run in runs}
  plain = [run for run in runs if len(settings) == 1 or (run.a, run.b) == (1.0, 0.0)]
  found = {'alignment': _alignment(plain, reference)} if plain else {}
  if len(settings) > 1:
    found['pareto'] = policy_sweeps.pareto(
      _points(runs),
      f'{len(runs)} runs under {", ".join(dict.fromkeys(run.rules for run in runs))}.',
    )
  return found


def _check_distinct(runs: Sequence[Run]) -> None:
  seen = set()
  for run in runs:
    key = run.method, run.rules, run.seed, run.a, run.b
    if key in seen:
      raise ValueError(
        f'two runs have the method {run.method!r}, the rules {run.rules!r}, '
        f'the seed {run.seed}, a={run.a:g} and b={run.b:g}; leave one out'
      )
    seen.add(key)


def _alignment(runs: Sequence[Run], reference: str) -> Result:
  sets = list(dict.fromkeys(run.rules for run in runs))
  methods = list(dict.fromkeys(run.method for run in runs))
  reference = reference or methods[0]
  if reference not in methods:
    raise ValueError(f'no run has the method {reference!r}; use one of {", ".join(methods)}')
  rows: dict[str, list[tuple[Run, Mapping[str, Metric]]]] = {_START: []}
  for run in runs:
    for name, measured in run.policies.items():
      name = {_START: name, _END: run.method}.get(name, f'{name}, {run.reward}')
      rows.setdefault(name, []).append((run, measured))
  rows = dict(sorted(rows.items(), key=lambda row: row[0] in methods))
  policies = {name: _by_rules(some, sets) for name, some in rows.items()}
  return {
    'suite': 'alignment',
    'description': f'{len(runs)} runs; intervals are over seeds.',
    'num_examples': len(runs),
    'metrics': {},
    'policies': policies,
    'tables': [*policy.tables(policies), *_differences(runs, reference)],
  }


def _by_rules(
  rows: Sequence[tuple[Run, Mapping[str, Metric]]], sets: Sequence[str]
) -> dict[str, dict[str, Metric]]:
  """Returns {rule set: {metric: mean over seeds}}, and ALL over all of them.

  ALL is over the seeds that have all rule sets, and {} without any: means over
  other rules are no comparison.
  """
  of = {
    rules: {run.seed: measured for run, measured in rows if run.rules == rules} for rules in sets
  }
  names = sorted(set.intersection(*(set(measured) for _, measured in rows)))

  def over_seeds(seeds, rule_sets):
    return {
      n: _over_seeds(
        [
          float(np.mean([of[rules][seed][n]['value'] for rules in rule_sets]))
          for seed in sorted(seeds)
        ]
      )
      for n in names
      if seeds
    }

  found = {rules: over_seeds(of[rules], [rules]) for rules in sets}
  shared = set.intersection(*map(set, of.values()))
  return found | {policy.ALL: over_seeds(shared, sets)}


def _over_seeds(values: Sequence[float]) -> Metric:
  mean, half = bootstrap.mean_and_interval(values)
  known = np.isfinite(half)
  return {
    'value': mean,
    'low': mean - half if known else None,
    'high': mean + half if known else None,
    'best': None,
  }


def _differences(runs: Sequence[Run], reference: str) -> list[dict[str, Any]]:
  """Returns the table of the reference's differences to all else."""
  truth = all('true_cosa' in run.policies[_END] for run in runs)
  metric = 'true_cosa' if truth else 'cosa'

  def values(of: Callable[[Run], bool], which: str) -> dict[Any, float]:
    return {(run.rules, run.seed): run.policies[which][metric]['value'] for run in runs if of(run)}

  ours = values(lambda run: run.method == reference, _END)
  others = {_START: values(lambda run: run.method == reference, _START)}
  for method in dict.fromkeys(run.method for run in runs):
    if method != reference:
      others[method] = values(lambda run, m=method: run.method == m, _END)
  rows = []
  for name, theirs in others.items():
    gaps = [ours[cell] - theirs[cell] for cell in ours if cell in theirs]
    if not gaps:
      continue
    mean, half = bootstrap.mean_and_interval(gaps)
    p = stats.ttest_1samp(gaps, 0.0).pvalue if len(gaps) > 1 else float('nan')
    rows.append(
      [
        name,
        len(gaps),
        sum(gap > 0 for gap in gaps),
        {'value': mean, 'low': mean - half, 'high': mean + half},
        float(p),
      ]
    )
  return (
    [
      {
        'title': f'{METRICS[metric][0]}: {reference} minus …',
        'header': ['policy', 'pairs of runs', 'of them higher', 'difference', 'p'],
        'rows': rows,
        'note': 'A pair of runs has the same rules and seed; intervals and p are '
        'of the paired t-test over these pairs.',
      }
    ]
    if rows
    else []
  )


def _points(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns the points of `policy_sweeps.pareto`: means over rules and seeds."""
  groups: dict[Any, list[Mapping[str, Metric]]] = {}
  for run in runs:
    groups.setdefault((_START, None, None), []).append(run.policies[_START])
    groups.setdefault((run.method, run.a, run.b), []).append(run.policies[_END])
  points = []
  for (method, a, b), some in groups.items():
    if len(some) == 1:  # its interval is over prompts
      measured = some[0]
    else:
      names = set.intersection(*map(set, some))
      measured = {n: _over_seeds([m[n]['value'] for m in some]) for n in sorted(names)}
    points.append({'method': method, 'a': a, 'b': b, 'measured': measured})
  return points
