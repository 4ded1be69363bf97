"""Evaluation suites that only count: scored examples in, one plain dict out.

A score function is `score_fn(examples) -> float32 [N]`, scores in nats:
log P(safe) - log P(unsafe). Here the caller scores, so that any judge can be
compared on the same rows; suites that change examples (probes, attacks, rule
selection) have modules of their own and take the score function.

A metric in a result is {value, low, high, best}, see `measure`. Intervals
resample conversations. Under `arrays` a suite keeps what figures and paired
comparisons are made from; reports leave it out of their JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.evals import bootstrap, checks, measure, metrics
from csrm_jax.evals.calibration import Calibration
from csrm_jax.evals.measure import Draws, Result, ScoreFn
from csrm_jax.safety.schema import Example, Pair

__all__ = ['ScoreFn', 'classification', 'flips', 'pairs', 'rule_sets', 'worst']

_NUM_WORST = 20


def classification(
  examples: Sequence[Example],
  scores: np.ndarray,
  *,
  threshold: float | None = None,
  calibration: Calibration | None = None,
  groups: Sequence[str] = (),
  tags: Mapping[str, Sequence[str]] | None = None,
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
    calibration: fitted on *other* rows; its metrics stand apart, under
      `calibrated`.
    groups: one id a row, rows of one id are drawn together.
    tags: breakdown -> the group of each row in it, beside rule set, source
      and violated category.
    description: what these examples are, one line for the report.
    num_samples, seed: bootstrap draws for each interval.

  Raises:
    ValueError: a score is nan or infinite; names the example's id.
  """
  scores = checks.check_finite(scores, [example.id for example in examples])
  kept = [i for i, e in enumerate(examples) if e.label is not None]
  rows, scores = [examples[i] for i in kept], scores[kept]
  labels = checks.labels_of(rows)
  p_unsafe = checks.p_unsafe_from_scores(scores)
  probability = checks.probability_of(rows)
  units = bootstrap.units_of(rows, [groups[i] for i in kept] if groups else None)
  draws = Draws(units, num_samples, seed)
  keys = {'rule set': [e.rule_set for e in rows], 'source': [e.source for e in rows]}
  keys |= {k: [v[i] for i in kept] for k, v in (tags or {}).items()}
  rows_of = {what: measure.rows_by(names) for what, names in keys.items()}
  rows_of['category'] = measure.rows_by_category(rows)
  return {
    'suite': 'classification',
    'description': description,
    'num_examples': len(rows),
    'num_unsafe': int(labels.sum()),
    'num_unlabelled': len(examples) - len(rows),
    'num_units': int(units.max() + 1) if len(rows) else 0,
    'threshold': threshold,
    'metrics': measure.classification(labels, p_unsafe, probability, draws, threshold),
    'calibrated': calibration and _calibrated(labels, scores, probability, draws, calibration),
    'thresholds': metrics.threshold_table(labels, p_unsafe),
    'breakdowns': {
      what: measure.groups(labels, p_unsafe, probability, draws, part)
      for what, part in rows_of.items()
    },
    'reliability': metrics.reliability_bins(labels, p_unsafe),
    'worst': worst(rows, scores, _NUM_WORST),
    'arrays': {
      'ids': np.array([e.id for e in rows], np.str_),
      'scores': scores,
      'labels': labels,
      'p_unsafe': p_unsafe,
      'probability': probability,
      'units': units,
    },
  }


def _calibrated(labels, scores, probability, draws, calibration) -> Result:
  p_unsafe = checks.p_unsafe_from_scores(calibration.apply(scores))
  return {
    'calibration': calibration.to_dict(),
    'metrics': measure.classification(labels, p_unsafe, probability, draws),
    'thresholds': metrics.threshold_table(labels, p_unsafe),
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
    checks.probability_of([getattr(pair, side) for pair in pairs]) for side in ('safer', 'other')
  ]
  true = None if any(side is None for side in true) else true
  units = bootstrap.units_of([pair.safer for pair in pairs], [_prompt_of(pair) for pair in pairs])
  draws = Draws(units, num_samples, seed)

  def part(rows):
    return {'num_pairs': len(rows)} | _pair_metrics(
      safer[rows], other[rows], true and [t[rows] for t in true], draws.take(rows)
    )

  by_set = measure.rows_by(pair.safer.rule_set for pair in pairs)
  by_set.pop('', None)
  return {
    'suite': 'pairs',
    'description': description,
    'num_pairs': len(pairs),
    'metrics': _pair_metrics(safer, other, true, draws),
    'kinds': {
      kind: part(rows) for kind, rows in measure.rows_by(pair.kind for pair in pairs).items()
    },
    'rule_sets': {
      name: part(rows)
      for name, rows in sorted(by_set.items(), key=lambda item: -len(item[1]))[: measure.MAX_GROUPS]
    },
    'arrays': {
      'ids': np.array(ids, np.str_),
      'safer': safer,
      'other': other,
      'gap': safer - other,
      'kind': np.array([p.kind for p in pairs]),
      'units': units,
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
  units = bootstrap.units_of(first)
  draws = Draws(units, num_samples, seed)
  return {
    'suite': 'flips',
    'description': description,
    'num_flips': len(examples),
    'metrics': {
      'consistency': measure.metric(
        metrics.flip_consistency, (labels_a, p_a, labels_b, p_b), draws, best[0]
      ),
      'direction': measure.metric(metrics.pair_accuracy, (safer, other), draws, best[1]),
    },
    'arrays': {
      'ids': np.array([e.id for e in first], np.str_),
      'units': units,
      'labels_a': labels_a,
      'p_a': p_a,
      'labels_b': labels_b,
      'p_b': p_b,
      'safer': safer,
      'other': other,
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
    rows.append(
      {
        'rule_set': example.rule_set or example.safety.name or example.id,
        'rules': [c.to_dict() for c in example.safety.categories],
        'score': float(score),
        'p_unsafe': float(checks.p_unsafe_from_scores(score[None])[0]),
        'label': example.label,
        'probability': example.probability,
      }
    )
  talk = [message.to_dict() for message in conversation]
  return {'suite': 'rule_sets', 'conversation': talk, 'rows': rows}


def worst(examples: Sequence[Example], scores: np.ndarray, n: int) -> list[dict[str, Any]]:
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


def _pair_metrics(safer, other, true, draws):
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
    name: measure.metric(fn, (safer, other), draws, best[name])
    for name, fn in zip(best, fns, strict=True)
  }


def _prompt_of(pair: Pair) -> str:
  """Returns what pairs of one prompt share: the text before the response.

  Pairs of one conversation under two rule sets share the conversation, which
  `bootstrap.units_of` sees for itself.
  """
  if pair.kind != 'preference' or len(pair.safer.conversation) < 2:
    return ''
  return repr([(m.role, m.content) for m in pair.safer.conversation[:-1]])
