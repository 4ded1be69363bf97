"""Judges that read no rules: what the suite `real` stands beside every model.

They are fitted on the training side of the same sets. `base_rate` says how often rules are broken;
`text_blind` how often this rule is; `rule_blind` reads the text and not which rule is asked; and
`tfidf` counts the words of the text, with a model for each rule, where rules are trained on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from csrm_jax.data.judged import Judged
from csrm_jax.evals.questions import OTHER, SAFER, UNION, Item, Question
from csrm_jax.safety.schema import Message, Pair

JUDGES = ('tfidf', 'rule_blind', 'text_blind', 'base_rate')
# Rules with fewer texts of one kind to be fitted on are judged by their rate.
_FEWEST = 3
_MAX_FEATURES = 30_000  # of words, and as many of characters


def judge(
  asked: Sequence[Question], train: Sequence[Item], seen: Collection[str], overall: float = math.nan
) -> dict[str, np.ndarray]:
  """Returns {judge: P(unsafe), float64 [N]} of the questions of one set; nan where it has none.

  Args:
    train: The texts of the set that may be fitted on.
    seen: The keys of the rules that may be fitted on.
    overall: The rate of other rules where the set has none that may be fitted on.
  """
  texts = [item for item in train if isinstance(item, Judged)]
  pairs = [item for item in train if isinstance(item, Pair)]
  broken = {
    key: [(i, t.verdicts[key]) for i, t in enumerate(texts) if key in t.verdicts]
    for key in sorted(seen)
  }
  shares = [share >= 0.5 for rows in broken.values() for _, share in rows]
  base = float(np.mean(shares)) if shares else overall
  rates = {key: float(np.mean([s >= 0.5 for _, s in rows])) for key, rows in broken.items() if rows}
  found = {name: np.full(len(asked), math.nan) for name in JUDGES}
  is_pair = np.array([q.part in (SAFER, OTHER) for q in asked], bool)
  for i, question in enumerate(asked):
    if not is_pair[i]:
      found['base_rate'][i] = base
      found['text_blind'][i] = _any_of([rates.get(key, base) for key in question.rules])
  if texts and shares:
    _read_texts(found, asked, texts, broken, rates)
  if pairs and is_pair.any():
    _read_pairs(found, asked, np.flatnonzero(is_pair), pairs)
  return found


def _any_of(p: Iterable[float]) -> float:
  return 1 - math.prod(1 - value for value in p)


def _read_texts(found, asked, texts, broken, rates) -> None:
  """Fills in `tfidf` and `rule_blind`."""
  vectorizer = _vectorizer()
  features = vectorizer.fit_transform(_documents(item.conversation for item in texts))
  # Each text that is asked about once, though under many rules.
  row_of = {q.text: q.example.conversation for q in asked if q.part not in (SAFER, OTHER)}
  if not row_of:
    return
  tested = vectorizer.transform(_documents(row_of.values()))
  row_of = {text: i for i, text in enumerate(row_of)}
  by_rule = {}
  asked_keys = {key for q in asked for key in q.rules}
  for key in asked_keys & set(rates):
    rows, labels = zip(*((i, share >= 0.5) for i, share in broken[key]), strict=True)
    by_rule[key] = _fit(features[list(rows)], np.array(labels), tested, rates[key])
  pooled = np.zeros((len(texts), 2))
  for rows in broken.values():
    for i, share in rows:
      pooled[i, int(share >= 0.5)] += 1
  blind = _fit_weighted(features, pooled, tested)
  for i, question in enumerate(asked):
    row = row_of.get(question.text)
    if row is None:
      continue
    found['rule_blind'][i] = blind[row]
    if all(key in by_rule for key in question.rules):
      parts = [by_rule[key][row] for key in question.rules]
      found['tfidf'][i] = _any_of(parts) if question.part == UNION else parts[0]


def _read_pairs(found, asked, rows, pairs) -> None:
  """Fills in `tfidf` for sides of pairs: which of two texts people find safer."""
  sides = [side for pair in pairs for side in (pair.safer, pair.other)]
  vectorizer = _vectorizer()
  features = vectorizer.fit_transform(_documents(side.conversation for side in sides))
  tested = vectorizer.transform(_documents(asked[i].example.conversation for i in rows))
  labels = np.arange(len(sides)) % 2 == 1
  found['tfidf'][rows] = _fit(features, labels, tested, 0.5)


def _documents(conversations: Iterable[Sequence[Message]]) -> list[str]:
  """Returns what is judged, without what stands before it."""
  return [conversation[-1].content for conversation in conversations]


def _vectorizer() -> Any:
  # Imported here, as in metrics: it takes half of the time that a run needs to start.
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.pipeline import FeatureUnion

  options = {'sublinear_tf': True, 'max_features': _MAX_FEATURES, 'dtype': np.float32}
  return FeatureUnion(
    [
      ('words', TfidfVectorizer(ngram_range=(1, 2), token_pattern=r'(?u)\b\w+\b', **options)),
      ('characters', TfidfVectorizer(analyzer='char_wb', ngram_range=(3, 5), **options)),
    ]
  )


def _regression() -> Any:
  from sklearn.linear_model import LogisticRegression

  return LogisticRegression(C=1.0, solver='liblinear')


def _fit(features, labels: np.ndarray, tested, rate: float) -> np.ndarray:
  if min(labels.sum(), (~labels).sum()) < _FEWEST:
    return np.full(tested.shape[0], rate)
  return _regression().fit(features, labels).predict_proba(tested)[:, 1]


def _fit_weighted(features, counts: np.ndarray, tested) -> np.ndarray:
  """Returns the judge of texts that kept and broke so many rules, [N, 2]."""
  from scipy import sparse

  kept, broken = (np.flatnonzero(counts[:, i]) for i in (0, 1))
  if not len(kept) or not len(broken):
    return np.full(tested.shape[0], float(len(broken) > 0))
  # A text of many rules weighs no more than one of few.
  weights = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  rows = sparse.vstack([features[kept], features[broken]]).tocsr()
  labels = np.repeat([0, 1], [len(kept), len(broken)])
  weights = np.concatenate([weights[kept, 0], weights[broken, 1]])
  return _regression().fit(rows, labels, sample_weight=weights).predict_proba(tested)[:, 1]
