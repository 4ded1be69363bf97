"""Several scorers on the same benchmarks: side by side, and their differences.

Differences are tested by a paired bootstrap over conversations: every draw
takes the same ones from both scorers, so that what makes a conversation hard
for both cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from csrm_jax.evals import bootstrap, metrics
from csrm_jax.evals.measure import Result

_VERDICTS = {
  name: (fn, ('labels', 'p_unsafe'))
  for name, fn in (
    ('f1', metrics.f1),
    ('auprc', metrics.auprc),
    ('smece', metrics.smece),
    ('nll', metrics.nll),
  )
}
# suite -> {metric: (function, names of its arrays in the result)}.
PAIRED = {
  'classification': _VERDICTS,
  'over_refusal': _VERDICTS,
  'configurability': _VERDICTS,
  'any_turn': _VERDICTS,
  'pairs': {
    'accuracy': (metrics.pair_accuracy, ('safer', 'other')),
    'score_gap': (metrics.score_gap, ('safer', 'other')),
  },
  'flips': {
    'consistency': (metrics.flip_consistency, ('labels_a', 'p_a', 'labels_b', 'p_b')),
    'direction': (metrics.pair_accuracy, ('safer', 'other')),
  },
  'policy': {
    'unsafe_rate': (metrics.mean, ('strict',)),
    'shift_leave_one_out': (lambda a, b: metrics.mean(a - b), ('leave_one_out', 'strict')),
    'shift_allow': (lambda a, b: metrics.mean(a - b), ('allow', 'strict')),
  },
  'best_of': {'credit': (metrics.mean, ('credit',))},
}


def differences(
  scorers: Mapping[str, Mapping[str, Result]],
  reference: str = '',
  *,
  num_samples: int = 1000,
  seed: int = 0,
) -> list[dict[str, Any]]:
  """Returns the difference of each scorer to the reference, metric by metric.

  Each is {benchmark, metric, scorer, reference, value, low, high, p_value},
  value being the scorer's minus the reference's. Benchmarks that one of the
  two lacks, skipped or failed are left out.

  Args:
    scorers: {scorer: {benchmark: result}}, with their `arrays`.
    reference: one of the scorers; empty: the first.
    num_samples, seed: of the bootstrap.

  Raises:
    ValueError: no such scorer, or the two were scored on different rows.
  """
  reference = reference or next(iter(scorers))
  if reference not in scorers:
    raise ValueError(f'no scorer is called {reference!r}; use one of {", ".join(scorers)}')
  rows = []
  for benchmark, base in scorers[reference].items():
    for scorer, results in scorers.items():
      result = results.get(benchmark)
      if scorer == reference or result is None:
        continue
      if result['suite'] != base['suite'] or base['suite'] not in PAIRED:
        continue
      rows += _differences(benchmark, scorer, result, reference, base, num_samples, seed)
  return rows


def _differences(
  benchmark, scorer, result, reference, base, num_samples, seed
) -> list[dict[str, Any]]:
  a, b = result['arrays'], base['arrays']
  if not np.array_equal(a['ids'], b['ids']):
    raise ValueError(
      f'{benchmark}: {scorer!r} and {reference!r} were scored on different '
      f'rows ({len(a["ids"])} and {len(b["ids"])}); evaluate both on the '
      'same test sets'
    )
  rows = []
  for metric, (fn, names) in PAIRED[base['suite']].items():
    # smECE is slow, and its interval is rough whatever the number of draws.
    draws = min(num_samples, 200) if metric == 'smece' else num_samples
    found = bootstrap.difference(
      fn, [a[n] for n in names], [b[n] for n in names], b['units'], num_samples=draws, seed=seed
    )
    rows.append(
      {'benchmark': benchmark, 'metric': metric, 'scorer': scorer, 'reference': reference, **found}
    )
  return rows
