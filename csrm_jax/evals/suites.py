"""Evaluation suites: scored examples in, one plain dict of results out.

A score function is `score_fn(examples) -> float32 [N]`, scores in nats:
log P(safe) - log P(unsafe). The caller scores, the suites only count, so any
judge can be compared on the same rows.

Every metric in a result is {value, low, high, best}: `low` and `high` are the
95% bootstrap interval (None where none is computed), `best` is what a judge
that knows the true P(unsafe) reaches on the same rows (None where some example
does not come with it). Under `arrays` a suite keeps what figures are drawn
from; reports leave it out of their JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from csrm_jax.evals import checks, metrics
from csrm_jax.safety.schema import Example, Pair

ScoreFn = Callable[[Sequence[Example]], np.ndarray]
Result = dict[str, Any]

# A breakdown lists this many of its largest groups.
MAX_GROUPS = 40

# name -> (metric(labels, p_unsafe), best reachable(labels, probability),
# is its interval centred). Only metrics with an entry here get an interval.
_METRICS = {
    'f1': (metrics.f1, metrics.f1_best, False),
    'auprc': (metrics.auprc, metrics.auprc_best, False),
    'smece': (metrics.smece, metrics.smece, True),
    'ece': (metrics.ece, metrics.ece, True),
    'brier': (metrics.brier, metrics.brier, False),
    'nll': (metrics.nll, metrics.nll, False),
    'fpr_at_recall': (metrics.fpr_at_recall, metrics.fpr_at_recall, False),
}


def classification(
    examples: Sequence[Example],
    scores: np.ndarray,
    *,
    threshold: float | None = None,
    description: str = '',
    num_samples: int = 300,
    seed: int = 0,
) -> Result:
  """Returns metrics of the labelled examples, as a whole and by group.

  Args:
    examples: those without a label are counted and left out.
    scores: [N] nats.
    threshold: on p_unsafe, fitted on *other* rows with
      `metrics.best_threshold`; adds `f1_tuned` beside F1 at 0.5.
    description: what these examples are, one line for the report.
    num_samples, seed: bootstrap draws for each interval.

  Raises:
    ValueError: a score is nan or infinite; names the example's id.
  """
  ids = [example.id for example in examples]
  scores = checks.check_finite(scores, ids)
  kept = [i for i, e in enumerate(examples) if e.label is not None]
  rows = [examples[i] for i in kept]
  scores = scores[kept]
  labels = checks.labels_of(rows)
  p_unsafe = checks.p_unsafe_from_scores(scores)
  probability = checks.probability_of(rows)
  measured = _classification_metrics(
      labels, p_unsafe, probability, _interval(num_samples, seed), threshold
  )
  # There may be many groups: fewer draws, and an interval for F1 alone.
  group_by = functools.partial(
      _groups, labels, p_unsafe, probability,
      _interval(min(num_samples, 100), seed),
  )
  return {
      'suite': 'classification',
      'description': description,
      'num_examples': len(rows),
      'num_unsafe': int(labels.sum()),
      'num_unlabelled': len(examples) - len(rows),
      'threshold': threshold,
      'metrics': measured,
      'rule_sets': group_by([example.rule_set for example in rows]),
      'sources': group_by([example.source for example in rows]),
      'reliability': metrics.reliability_bins(labels, p_unsafe),
      'worst': worst(rows, scores, 10),
      'arrays': {'scores': scores, 'labels': labels, 'p_unsafe': p_unsafe,
                 'probability': probability},
  }


def pairs(
    pairs: Sequence[Pair],
    safer_scores: np.ndarray,
    other_scores: np.ndarray,
    *,
    description: str = '',
    num_samples: int = 300,
    seed: int = 0,
) -> Result:
  """Returns accuracy, ties and score gap of all pairs and of each kind.

  The best accuracy is the share of pairs that their true probabilities order
  as labelled, strictly. Where they are equal (the best `tie_rate`) the label is
  a coin's, so a judge that never ties may lie above it by half of that rate.
  The best gap is that of the true log odds.

  Raises:
    ValueError: a score is nan or infinite; names the pair's id.
  """
  ids = [pair.id for pair in pairs]
  safer = checks.check_finite(safer_scores, ids, 'score of the safer side')
  other = checks.check_finite(other_scores, ids, 'score of the other side')
  true = [
      checks.probability_of([getattr(pair, side) for pair in pairs])
      for side in ('safer', 'other')
  ]
  true = None if any(side is None for side in true) else true
  interval = _interval(num_samples, seed)
  kinds = {}
  for kind, rows in _rows_by(pair.kind for pair in pairs).items():
    kinds[kind] = {'num_pairs': len(rows)} | _pair_metrics(
        safer[rows], other[rows], true and [t[rows] for t in true], interval
    )
  return {
      'suite': 'pairs',
      'description': description,
      'num_pairs': len(pairs),
      'metrics': _pair_metrics(safer, other, true, interval),
      'kinds': kinds,
      'arrays': {
          'gap': safer - other, 'kind': np.array([p.kind for p in pairs]),
      },
  }


def flips(
    examples: Sequence[tuple[Example, Example]],
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    *,
    description: str = '',
    num_samples: int = 300,
    seed: int = 0,
) -> Result:
  """Returns how well verdicts follow a change of the rules alone.

  Each row is one conversation under two rule sets that give it different
  labels. `consistency`: both predicted labels are right (p_unsafe >= 0.5 is
  unsafe). `direction`: the score is higher, strictly, under the rules that
  make it safe.

  Raises:
    ValueError: a score is not finite, the two examples of a row differ in
      their conversation, or their labels do not differ; names the ids.
  """
  for a, b in examples:
    checks.check_flip(a, b)
  first, second = [a for a, _ in examples], [b for _, b in examples]
  scores_a = checks.check_finite(scores_a, [e.id for e in first])
  scores_b = checks.check_finite(scores_b, [e.id for e in second])
  labels_a, labels_b = checks.labels_of(first), checks.labels_of(second)
  p_a, p_b = map(checks.p_unsafe_from_scores, (scores_a, scores_b))
  safer = np.where(labels_a == 0, scores_a, scores_b)
  other = np.where(labels_a == 0, scores_b, scores_a)
  true_a, true_b = checks.probability_of(first), checks.probability_of(second)
  best = [None, None]
  if true_a is not None and true_b is not None:
    gap = np.where(labels_a == 0, true_b - true_a, true_a - true_b)
    best = [
        metrics.flip_consistency(labels_a, true_a, labels_b, true_b),
        metrics.pair_accuracy(gap, np.zeros_like(gap)),
    ]
  interval = _interval(num_samples, seed)
  return {
      'suite': 'flips',
      'description': description,
      'num_flips': len(examples),
      'metrics': {
          'consistency': _metric(
              metrics.flip_consistency, (labels_a, p_a, labels_b, p_b),
              interval, best[0],
          ),
          'direction': _metric(
              metrics.pair_accuracy, (safer, other), interval, best[1]
          ),
      },
  }


def rule_sets(examples: Sequence[Example], scores: np.ndarray) -> Result:
  """Returns one conversation under several rule sets, with text and scores.

  Source: the paper's Figure 6.

  Raises:
    ValueError: no example, not the same conversation, or a score not finite.
  """
  scores = checks.check_finite(scores, [example.id for example in examples])
  if not examples:
    raise ValueError('no example: give one conversation under each rule set')
  conversation = examples[0].conversation
  for example in examples:
    if example.conversation != conversation:
      raise ValueError(
          f'examples {examples[0].id!r} and {example.id!r} differ in their '
          'conversation; only the rules may differ'
      )
  rows = []
  for example, score in zip(examples, scores, strict=True):
    rows.append({
        'rule_set': example.rule_set or example.safety.name or example.id,
        'rules': [c.to_dict() for c in example.safety.categories],
        'score': float(score),
        'p_unsafe': float(checks.p_unsafe_from_scores(score[None])[0]),
        'label': example.label,
        'probability': example.probability,
    })
  talk = [message.to_dict() for message in conversation]
  return {'suite': 'rule_sets', 'conversation': talk, 'rows': rows}


def worst(
    examples: Sequence[Example], scores: np.ndarray, n: int
) -> list[dict[str, Any]]:
  """Returns the n labelled examples of highest -log P(label), worst first.

  By id, never by text: a report may travel further than its data.
  """
  scores = checks.check_finite(scores, [example.id for example in examples])
  kept = [i for i, e in enumerate(examples) if e.label is not None]
  rows = [examples[i] for i in kept]
  p_unsafe = checks.p_unsafe_from_scores(scores[kept])
  loss = metrics.row_nll(checks.labels_of(rows), p_unsafe)
  order = sorted(range(len(rows)), key=lambda i: (-loss[i], rows[i].id))[:n]
  return [
      {
          'id': rows[i].id,
          'label': rows[i].label,
          'p_unsafe': float(p_unsafe[i]),
          'nll': float(loss[i]),
          'probability': rows[i].probability,
      }
      for i in order
  ]


def _interval(num_samples: int, seed: int):
  return functools.partial(
      metrics.bootstrap_interval, num_samples=num_samples, seed=seed
  )


def _metric(fn, arrays, interval, best=None) -> dict[str, float | None]:
  low, high = interval(fn, arrays) if interval else (None, None)
  return {'value': fn(*arrays), 'low': low, 'high': high, 'best': best}


def _classification_metrics(
    labels, p_unsafe, probability, interval, threshold=None
):
  measured = {}
  for name, (fn, best_fn, centred) in _METRICS.items():
    best = None if probability is None else best_fn(labels, probability)
    within = interval and functools.partial(interval, centred=centred)
    measured[name] = _metric(fn, (labels, p_unsafe), within, best)
  if probability is not None:
    measured['prob_error'] = _metric(
        metrics.prob_error, (probability, p_unsafe), interval, 0.0
    )
  if threshold is not None:
    f1 = functools.partial(metrics.f1, threshold=threshold)
    best = measured['f1']['best']
    measured['f1_tuned'] = _metric(f1, (labels, p_unsafe), interval, best)
  return measured


def _groups(labels, p_unsafe, probability, interval, names):
  """Returns {name: {num_examples, num_unsafe, metrics}}, sorted by name."""
  groups = _rows_by(names)
  groups.pop('', None)
  largest = sorted(groups, key=lambda name: (-len(groups[name]), name))
  out = {}
  for name in sorted(largest[:MAX_GROUPS]):
    rows = groups[name]
    part = labels[rows], p_unsafe[rows]
    true = None if probability is None else probability[rows]
    measured = _classification_metrics(*part, true, None)
    best = measured['f1']['best']
    measured['f1'] = _metric(metrics.f1, part, interval, best)
    out[name] = {
        'num_examples': len(rows),
        'num_unsafe': int(part[0].sum()),
        'metrics': measured,
    }
  return out


def _pair_metrics(safer, other, true, interval):
  best = dict.fromkeys(('accuracy', 'tie_rate', 'score_gap'))
  if true is not None:
    # Order and ties come from the probabilities themselves: their log odds
    # are clipped, which would tie the surest ones.
    safe, other_safe = (-probability for probability in true)
    best = {
        'accuracy': metrics.pair_accuracy(safe, other_safe),
        'tie_rate': metrics.tie_rate(safe, other_safe),
        'score_gap': metrics.score_gap(*map(checks.log_odds_safe, true)),
    }
  fns = metrics.pair_accuracy, metrics.tie_rate, metrics.score_gap
  return {
      name: _metric(fn, (safer, other), interval, best[name])
      for name, fn in zip(best, fns, strict=True)
  }


def _rows_by(keys: Iterable[str]) -> dict[str, list[int]]:
  rows: dict[str, list[int]] = {}
  for i, key in enumerate(keys):
    rows.setdefault(key, []).append(i)
  return rows
