"""DynaBench: more rules than fit, BM25 to choose some, any turn to violate.

Each rule is a category. BM25 keeps those that are most relevant to the
conversation and puts them back in their order; the guard judges every agent
turn with the history up to it, and the conversation is unsafe if any turn is.

Source: CSRM (arXiv 2605.30487), DynaBench protocol and Figure 8; DynaBench:
Hoover et al., DynaGuard, arXiv 2509.02563.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from csrm_jax.evals import bootstrap, measure, metrics, suites
from csrm_jax.evals.measure import Draws, Result, ScoreFn
from csrm_jax.safety.schema import Example, Message, SafetyConfig

TOP_K = 20  # rules that are kept


class Ranker:
  """Ranks the rules of one configuration by their relevance to a text.

  BM25 as bm25s has it (Lucene's form, k1 1.5, b 0.75, English stop words left
  out); rules of equal relevance keep their order.

  Raises:
    ImportError: bm25s is not installed.
  """

  def __init__(self, safety: SafetyConfig):
    self._bm25s = _import_bm25s()
    words = self._tokenize([f'{c.name}. {c.guideline}' for c in safety.categories])
    self._num_rules = len(words)
    self._index = None
    if any(words):
      self._index = self._bm25s.BM25()
      self._index.index(words, show_progress=False)

  def scores(self, conversation: Sequence[Message]) -> np.ndarray:
    """Returns the relevance of each rule, float32 [rules], at least 0."""
    (words,) = self._tokenize([' '.join(m.content for m in conversation)])
    if self._index is None or not words:
      return np.zeros(self._num_rules, np.float32)
    return self._index.get_scores(words)

  def rank(self, conversation: Sequence[Message]) -> np.ndarray:
    """Returns the rules' numbers, most relevant first, int64 [rules]."""
    return np.argsort(-self.scores(conversation), kind='stable')

  def _tokenize(self, texts: list[str]) -> list[list[str]]:
    return self._bm25s.tokenize(texts, stopwords='en', return_ids=False, show_progress=False)


def select_rules(example: Example, top_k: int = TOP_K, ranker: Ranker | None = None) -> Example:
  """Returns the example with its `top_k` most relevant rules, in their order.

  `violated` keeps what is still there; the label stays, because it is the
  truth about the conversation, whatever the guard is shown.
  """
  old = example.safety
  if len(old.categories) <= top_k:
    return example
  order = (ranker or Ranker(old)).rank(example.conversation)
  kept = sorted(order[:top_k].tolist())
  safety = SafetyConfig(tuple(old.categories[i] for i in kept), old.name)
  return dataclasses.replace(
    example, safety=safety, violated=tuple(v for v in example.violated if v in safety.names)
  )


def turns(example: Example) -> list[Example]:
  """Returns one unlabelled example for each agent turn, history up to it."""
  return [
    dataclasses.replace(
      example,
      id=f'{example.id}/turn {i + 1}',
      conversation=example.conversation[: i + 1],
      label=None,
      violated=(),
      probability=None,
    )
    for i, message in enumerate(example.conversation)
    if message.role == 'agent'
  ]


def recall_curve(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns (recall@k for k = 1, 2, …, that of chance, num examples).

  Recall@k is the mean over examples of the share of their violated rules that
  are among the k most relevant. Examples of which no violated rule is known
  are left out. The curve ends at the longest rule list; where a list is
  shorter it counts as whole.
  """
  rankers: dict[SafetyConfig, Ranker] = {}
  found = []
  for example in examples:
    if not example.violated:
      continue
    ranker = rankers.get(example.safety)
    if ranker is None:
      ranker = rankers[example.safety] = Ranker(example.safety)
    place = np.empty(len(example.safety.categories), np.int64)
    place[ranker.rank(example.conversation)] = np.arange(len(place))
    wanted = [place[example.safety.names.index(v)] for v in example.violated]
    found.append((len(place), np.array(wanted)))
  longest = max((num for num, _ in found), default=0)
  curve, chance = np.zeros(longest), np.zeros(longest)
  for k in range(1, longest + 1):
    curve[k - 1] = np.mean([np.mean(wanted < k) for _, wanted in found])
    chance[k - 1] = np.mean([min(k / num, 1) for num, _ in found])
  return curve, chance, len(found)


def any_turn(
  examples: Sequence[Example],
  score_fn: ScoreFn,
  *,
  top_k: int = TOP_K,
  description: str = '',
  num_samples: int = 300,
  seed: int = 0,
  **options,
) -> Result:
  """Returns the classification of conversations under the top rules.

  A conversation's score is the lowest of its agent turns': it is unsafe if
  any turn is. Rules are chosen once, by the whole conversation. Added are
  `recall_at_k`, the share of violated rules that BM25 keeps, and the curve
  `recall` over k.

  Args:
    examples: whole conversations, labelled as such.
    score_fn: examples -> scores in nats.
    top_k: rules that are kept.
    options: see `suites.classification`.
  """
  rankers: dict[SafetyConfig, Ranker] = {}
  asked, of, kept = [], [], []
  for i, example in enumerate(examples):
    ranker = None
    if len(example.safety.categories) > top_k:
      ranker = rankers.get(example.safety)
      if ranker is None:
        ranker = rankers[example.safety] = Ranker(example.safety)
    chosen = select_rules(example, top_k, ranker)
    parts = turns(chosen)
    asked += parts
    of += [i] * len(parts)
    if example.violated:
      kept.append(len(chosen.violated) / len(example.violated))
  turn_scores = measure.score(score_fn, asked)
  scores = np.full(len(examples), np.inf)
  np.minimum.at(scores, np.array(of, np.int64), turn_scores)
  result = suites.classification(
    examples, scores, description=description, num_samples=num_samples, seed=seed, **options
  )
  curve, chance, num_known = recall_curve(examples)
  judged = [e for e in examples if e.violated]
  draws = Draws(bootstrap.units_of(judged), num_samples, seed)
  result['metrics']['recall_at_k'] = measure.metric(metrics.mean, (np.array(kept, float),), draws)
  return result | {
    'suite': 'any_turn',
    'top_k': top_k,
    'num_turns': len(asked),
    'recall': curve.tolist(),
    'recall_by_chance': chance.tolist(),
    'num_recall': num_known,
  }


def _import_bm25s():
  try:
    import bm25s
  except ImportError:
    raise ImportError('choosing rules needs bm25s; run "pip install csrm_jax[evals]"') from None
  # It tells of every index it builds.
  logging.getLogger('bm25s').setLevel(logging.WARNING)
  return bm25s
