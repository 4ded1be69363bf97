"""Policies over a sweep, and over the steps of a run: trade-off and deception.

`pareto` shows what safety costs in helpfulness, `overoptimisation` whether the
reward that a policy was trained on still says the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.evals.measure import Metric, Result
from csrm_jax.evals.policy import PAIRS


def pareto(points: Sequence[Mapping[str, Any]], description: str = '') -> Result:
  """Returns the safety and helpfulness of policies over a sweep.

  Args:
    points: {method, a, b, measured}: the policy that was trained with
      sigmoid(a * score + b) as its safety reward (a and b None for one that
      was not), and its metrics. Safety is the oracle's where all have it.
    description: what was swept.

  Source: CSRM (arXiv 2605.30487), Figure 4.
  """
  known = all('compliance' in p['measured'] for p in points)
  safety, helpfulness = (pair[known] for pair in PAIRS[:2])
  rows = []
  for point in points:
    x, y = (point['measured'][name] for name in (safety, helpfulness))
    rows.append(
      {'method': point['method'], 'a': point['a'], 'b': point['b'], 'safety': x, 'helpfulness': y}
    )
  for row, best in zip(
    rows, frontier([(r['safety']['value'], r['helpfulness']['value']) for r in rows]), strict=True
  ):
    row['frontier'] = best
  return {
    'suite': 'pareto',
    'description': description,
    'num_examples': len(rows),
    'metrics': {},
    'true': known,
    'points': rows,
    'tables': [
      {
        'title': 'Reward sigmoid(a · score + b)',
        'header': ['policy', 'a', 'b', 'safety ↑', 'helpfulness ↑', 'on the frontier'],
        'rows': [
          [
            r['method'],
            *_shown(r['a'], r['b']),
            r['safety'],
            r['helpfulness'],
            'yes' if r['frontier'] else '',
          ]
          for r in rows
        ],
        'note': 'On the frontier: no other policy of the table is at least '
        'as safe and as helpful, and better in one.',
      }
    ],
  }


def _shown(*numbers: float | None) -> list[str | None]:
  return [None if number is None else f'{number:g}' for number in numbers]


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
  """Returns whether no other point is as high in both, and higher in one."""
  return [
    not any(x >= px and y >= py and (x, y) != (px, py) for x, y in points) for px, py in points
  ]


def overoptimisation(history: Mapping[int, Mapping[str, Metric]], description: str = '') -> Result:
  """Returns proxy and oracle over the steps of a run, and where they part.

  Args:
    history: {step: metrics of `measured`}, of samples for the same prompts.
    description: of the run.

  Raises:
    ValueError: a step lacks the oracle's metrics.
  """
  steps = sorted(history)
  curves = {}
  for proxy, truth in PAIRS:
    for name in (proxy, truth):
      missing = [step for step in steps if name not in history[step]]
      if missing:
        raise ValueError(
          f'step {missing[0]} has no metric {name!r}; reward and truth are '
          'compared only where an oracle judged every step'
        )
    a, b = ([history[step][name] for step in steps] for name in (proxy, truth))
    parted = parting_step(steps, a, b)
    curves[proxy] = {'proxy': a, 'oracle': b, 'parting_step': parted}
  return {
    'suite': 'overoptimisation',
    'description': description,
    'num_examples': len(steps),
    'metrics': {},
    'steps': steps,
    'curves': curves,
    'tables': [
      {
        'title': 'Where reward and truth part',
        'header': [
          '',
          'last step they agree',
          'reward there',
          'at the end',
          'truth there',
          'at the end',
        ],
        'rows': [_parting_row(name, steps, curve) for name, curve in curves.items()],
        'note': 'They part after the step at which the truth was highest so '
        'far, once the reward is above what it was there and the '
        "truth has fallen so far that the two steps' intervals do "
        'not meet. A dash: they did not part.',
      }
    ],
  }


def parting_step(
  steps: Sequence[int], proxy: Sequence[Metric], oracle: Sequence[Metric]
) -> int | None:
  """Returns the step after which the proxy rises and the oracle falls.

  The first step s at which the oracle is the highest so far and for which some
  later step, before the oracle is higher again, has a higher proxy and an
  oracle whose interval is below that of s. None where there is none.

  Args:
    steps: in order.
    proxy, oracle: value and interval at each.
  """
  peak = 0
  for i in range(1, len(steps)):
    if oracle[i]['value'] > oracle[peak]['value']:
      peak = i
    elif proxy[i]['value'] > proxy[peak]['value'] and oracle[i]['high'] < oracle[peak]['low']:
      return steps[peak]
  return None


def _parting_row(name: str, steps, curve) -> list[Any]:
  at = curve['parting_step']
  there = len(steps) - 1 if at is None else steps.index(at)
  return [
    name,
    at,
    curve['proxy'][there],
    curve['proxy'][-1],
    curve['oracle'][there],
    curve['oracle'][-1],
  ]
