"""BM25, recall and any-turn verdicts against brute force."""

import math

import numpy as np
import pytest

from csrm_jax.evals import metrics, retrieval
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.evals.helpers import plain, run

pytest.importorskip('bm25s', reason='needs bm25s: pip install -e .[evals]')

WORDS = ('apple', 'bread', 'cider', 'dates', 'eggs', 'figs', 'grapes', 'honey')


def _talk(*turns):
  roles = 'user', 'agent'
  return tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))


def _case(name, rules, turns, label='safe', violated=()):
  safety = SafetyConfig(tuple(Category(f'Rule{i}', text) for i, text in enumerate(rules)))
  return Example(id=name, safety=safety, conversation=_talk(*turns), label=label, violated=violated)


def _random_cases(num=30, seed=0):
  rng = np.random.default_rng(seed)
  cases = []
  for i in range(num):
    rules = [' '.join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(rng.integers(3, 9))]
    turns = [' '.join(rng.choice(WORDS, 4)) for _ in range(4)]
    violated = tuple(f'Rule{j}' for j in rng.choice(len(rules), rng.integers(0, 3), replace=False))
    cases.append(_case(f'c{i}', rules, turns, 'unsafe' if violated else 'safe', violated))
  return cases


def _bm25(rules, query, k1=1.5, b=0.75):
  """Lucene's BM25, written out."""
  docs = [rule.split() for rule in rules]
  average = sum(map(len, docs)) / len(docs)
  scores = []
  for doc in docs:
    total = 0.0
    for word in query:
      num = sum(word in d for d in docs)
      if num:
        idf = math.log(1 + (len(docs) - num + 0.5) / (num + 0.5))
        tf = doc.count(word)
        total += idf * tf / (tf + k1 * (1 - b + b * len(doc) / average))
    scores.append(total)
  return scores


def test_relevance_is_bm25_of_the_whole_conversation():
  for case in _random_cases():
    query = ' '.join(m.content for m in case.conversation).split()
    rules = [f'rule{i} {c.guideline}' for i, c in enumerate(case.safety.categories)]
    found = retrieval.Ranker(case.safety).scores(case.conversation)
    np.testing.assert_allclose(found, _bm25(rules, query), rtol=1e-5)


def test_the_top_rules_keep_their_order():
  rules = ['figs', 'apple', 'bread', 'apple cider', 'dates']
  case = _case('a', rules, ['cider cider', 'apple'], 'unsafe', ('Rule3', 'Rule4'))
  few = retrieval.select_rules(case, 2)
  # Rule3 is the most relevant, and yet stands after Rule1.
  assert few.safety.names == ('Rule1', 'Rule3')
  assert few.violated == ('Rule3',) and few.label == 'unsafe'
  assert retrieval.select_rules(case, 5) is case
  # Nothing in common: the first ones, in order.
  strange = _case('b', rules, ['zzz', 'qqq'])
  assert retrieval.select_rules(strange, 2).safety.names == ('Rule0', 'Rule1')
  silent = _case('c', rules, ['', ''])
  assert retrieval.select_rules(silent, 1).safety.names == ('Rule0',)
  stop = _case('d', ['the', 'of', 'a'], ['the', 'of'])
  assert retrieval.Ranker(stop.safety).rank(stop.conversation).tolist() == [0, 1, 2]


def test_recall_curve_equals_brute_force():
  cases = _random_cases()
  curve, chance, num = retrieval.recall_curve(cases)
  known = [c for c in cases if c.violated]
  assert num == len(known) < len(cases)
  assert len(curve) == max(len(c.safety.names) for c in known)
  for k in range(1, len(curve) + 1):
    shares, random = [], []
    for case in known:
      kept = retrieval.select_rules(case, k).safety.names
      shares.append(np.mean([v in kept for v in case.violated]))
      random.append(min(k / len(case.safety.names), 1))
    assert curve[k - 1] == pytest.approx(np.mean(shares)), k
    assert chance[k - 1] == pytest.approx(np.mean(random)), k
  assert curve[-1] == chance[-1] == 1


def test_any_turn_is_the_worst_of_agent_turns_with_their_history():
  cases = _random_cases()
  asked = []

  def judge(examples):
    asked.extend(examples)
    return np.array([hash_unit(e.conversation[-1].content) * 4 - 2.5 for e in examples])

  def hash_unit(text):
    return sum(map(ord, text)) % 97 / 97

  result = plain(run('any_turn', retrieval.talks(cases, 2), judge, num_samples=5))
  assert result['num_turns'] == len(asked) == 2 * len(cases)
  for i, case in enumerate(cases):
    first, second = asked[2 * i : 2 * i + 2]
    assert first.conversation == case.conversation[:2]
    assert second.conversation == case.conversation
    assert len(first.safety.names) == 2
    assert first.safety == second.safety
  lowest = [
    min(
      judge([c.__class__(id='x', safety=c.safety, conversation=c.conversation[:n])])[0]
      for n in (2, 4)
    )
    for c in cases
  ]
  labels = np.array([c.label == 'unsafe' for c in cases])
  p = 1 / (1 + np.exp(np.array(lowest)))
  assert result['metrics']['f1']['value'] == metrics.f1(labels, p)
  kept = [
    np.mean([v in retrieval.select_rules(c, 2).safety.names for v in c.violated])
    for c in cases
    if c.violated
  ]
  assert result['metrics']['recall_at_k']['value'] == pytest.approx(np.mean(kept))
  assert result['recall'][1] == pytest.approx(np.mean(kept))


def test_one_bad_turn_names_itself():
  cases = _random_cases(2)
  with pytest.raises(ValueError, match="'c1/turn 4'"):
    run('any_turn', retrieval.talks(cases), [0, 0, 0, math.nan])
  empty = plain(run('any_turn', [], [], num_samples=2))
  assert empty['num_examples'] == 0 and empty['recall'] == []
