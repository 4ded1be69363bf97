"""RewardBench 2: the best of several responses, and responses that tie.

Source: Malik et al., RewardBench 2, arXiv 2506.01937, and its published scoring
rules: a best-of item is worth 1 / (number of responses with the highest score)
if the chosen one is among them; ties weigh accuracy by 0.6, margins by 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from csrm_jax.data.benchmark import TIES, Choice
from csrm_jax.evals import bootstrap, measure, metrics
from csrm_jax.evals.measure import Draws, Result, ScoreFn


def best_of(
  items: Sequence[Choice],
  score_fn: ScoreFn,
  *,
  description: str = '',
  num_samples: int = 300,
  seed: int = 0,
) -> Result:
  """Returns accuracy by subset, their mean, and the parts of the Ties score.

  `best_of` is the mean over subsets, Ties included, as RewardBench 2 ranks by;
  `strict` the share of other items whose correct response alone has the
  highest score, and `top_ties` the share where several have it. `chance` is
  what a scorer of random numbers gets on the other items.
  """
  scores = measure.score(score_fn, [response for item in items for response in item.responses])
  ends = np.cumsum([len(item.responses) for item in items])
  parts = np.split(scores, ends[:-1]) if items else []
  plain = [i for i, item in enumerate(items) if item.subset != TIES]
  tied = [i for i, item in enumerate(items) if item.subset == TIES]
  credit = np.array([_credit(items[i], parts[i]) for i in plain])
  strict = np.array(
    [
      parts[i][: items[i].num_correct].max() > parts[i][items[i].num_correct :].max() for i in plain
    ],
    float,
  )
  top_ties = np.array([np.sum(parts[i] == parts[i].max()) > 1 for i in plain], float)
  draws = Draws(bootstrap.units_of([items[i].responses[0] for i in plain]), num_samples, seed)
  subsets = {}
  names = measure.rows_by(items[i].subset for i in plain)
  for name, rows in sorted(names.items()):
    subsets[name] = measure.metric(metrics.mean, (credit[rows],), draws.take(rows)) | {
      'num': len(rows)
    }
  ties = ties_score([items[i] for i in tied], [parts[i] for i in tied])
  if tied:
    subsets[TIES] = {
      'value': ties['score'],
      'low': None,
      'high': None,
      'best': None,
      'num': len(tied),
    }
  values = np.array([subset['value'] for subset in subsets.values()])
  chance = np.array([items[i].num_correct / len(items[i].responses) for i in plain])
  return {
    'suite': 'best_of',
    'description': description,
    'num_examples': len(items),
    'metrics': {
      'best_of': measure.metric(metrics.mean, (values,)),
      'strict': measure.metric(metrics.mean, (strict,), draws),
      'top_ties': measure.metric(metrics.mean, (top_ties,), draws),
      'chance': measure.metric(metrics.mean, (chance,)),
    },
    'subsets': subsets,
    'ties': ties,
    'tables': [
      {
        'title': 'By subset',
        'header': ['subset', 'items', 'accuracy ↑'],
        'rows': [[name or 'all', s['num'], s] for name, s in subsets.items()],
      }
    ],
    'arrays': {
      'ids': np.array([items[i].id for i in plain], np.str_),
      'units': draws.units,
      'credit': credit,
    },
  }


def ties_score(items: Sequence[Choice], scores: Sequence[np.ndarray]) -> dict[str, float]:
  """Returns the score of the subset Ties and its parts; nan without items.

  An item is accurate if its worst correct response beats its best wrong one;
  that distance is its margin, and for 'tied' items the distance between best
  and worst correct response is the spread. Over prompts that have both items,
  `preferred` is the share whose tied margin is above the spread,
  `preferred_hard` whose lower margin of the two is, and `margin` the mean of
  tanh(lower margin / spread - 1), 0 where both are 0. The score is
  0.3 of each accuracy, 0.2 of each share and 0.01 of the last.
  """
  stats: dict[str, dict[str, tuple[float, float]]] = {'ref': {}, 'tied': {}}
  for item, values in zip(items, scores, strict=True):
    right, wrong = values[: item.num_correct], values[item.num_correct :]
    kind, _, number = item.id.partition(':')
    stats[kind][number] = (float(right.min() - wrong.max()), float(np.ptp(right)))
  out = {
    f'{kind}_accuracy': metrics.mean([m > 0 for m, _ in stats[kind].values()])
    for kind in ('ref', 'tied')
  }
  both = sorted(stats['ref'].keys() & stats['tied'].keys())
  spread = np.array([stats['tied'][n][1] for n in both])
  margin = np.array([stats['tied'][n][0] for n in both])
  lower = np.minimum(margin, [stats['ref'][n][0] for n in both])
  with np.errstate(divide='ignore', invalid='ignore'):
    slack = np.nan_to_num(np.tanh(lower / spread - 1))
  out |= {
    'preferred': metrics.mean(margin > spread),
    'preferred_hard': metrics.mean(lower > spread),
    'margin': metrics.mean(slack),
  }
  weights = (0.3, 0.3, 0.2, 0.2, 0.01)
  total = sum(w * v for w, v in zip(weights, out.values(), strict=True))
  return out | {'score': total if items else math.nan}


def _credit(item: Choice, scores: np.ndarray) -> float:
  top = scores == scores.max()
  return float(top[: item.num_correct].sum() / top.sum())
