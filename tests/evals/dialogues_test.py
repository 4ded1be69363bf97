"""Dialogues of several turns: the chain by hand, and what it gains where kinds differ."""

import dataclasses

import numpy as np
import pytest

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import dialogues, metrics, suites
from csrm_jax.ruleworld import examples, grammar, oracle, probes, rules as rules_lib

PLAIN = examples.test_example(0, 0, 'unseen')


def test_the_chain_is_what_a_pencil_gets():
  chain = dialogues.fit_chain([np.array([0, 0, 1]), np.array([1, 2])], 3)
  want = [[2 / 5, 2 / 5, 1 / 5], [0, 1 / 3, 2 / 3], [0, 0, 1]]
  np.testing.assert_allclose(chain, want, rtol=1e-15)
  np.testing.assert_allclose(dialogues.absorbed(chain, 1), [1 / 5, 2 / 3, 1], rtol=1e-15)
  # 2/5·1/5 + 2/5·2/3 + 1/5 and 1/3·2/3 + 2/3.
  np.testing.assert_allclose(dialogues.absorbed(chain, 2), [41 / 75, 8 / 9, 1], rtol=1e-15)
  # By the formula: 1 − Σ_j (Q^h)_ij over the bands that are left.
  left = np.linalg.matrix_power(chain[:2, :2], 5).sum(1)
  np.testing.assert_allclose(dialogues.absorbed(chain, 5)[:2], 1 - left, rtol=1e-12)
  assert dialogues.absorbed(chain, 200) == pytest.approx(1)


def test_bands_do_not_fall():
  found = dialogues.bands(np.array([0.01, 0.06, 0.02, 0.5, 0.1]), (0.05, 0.2, 0.5))
  assert found.tolist() == [0, 1, 1, 3, 3]


def _run(items, p_unsafe, **options):
  score = dict(zip([e.id for item in items for e in item], np.concatenate(p_unsafe), strict=True))

  def score_fn(rows):
    return metrics.log_odds_safe(np.array([score[e.id] for e in rows]))

  bench = Benchmark('drift', 'drift', items, options=options)
  found = suites.run(score_fn, [bench], num_samples=20)
  assert not suites.failures(found), suites.failures(found)
  return found['drift']


def _talk(name, labels, kind):
  return tuple(
    dataclasses.replace(PLAIN, id=f'{name}/{i}', label=label, violated=(), rule_set=kind)
    for i, label in enumerate(labels)
  )


def test_kinds_of_dialogue_are_what_a_chain_knows_more_than_a_verdict():
  bad, good = ['safe', 'safe', 'unsafe', 'safe'], ['safe'] * 5
  items = [_talk(f'bad {i}', bad, 'a') for i in range(30)]
  items += [_talk(f'good {i}', good, 'b') for i in range(30)]
  p = [np.array([0.01, 0.1, 0.9, 0.01])] * 30 + [np.array([0.01, 0.1, 0.1, 0.1, 0.1])] * 30
  found = _run(items, p)
  value = {name: metric['value'] for name, metric in found.metrics.items()}
  assert value['chain_false_alarms'] == value['verdict_false_alarms'] == 0
  assert value['chain_recall'] == value['verdict_recall'] == 1
  assert value['chain_lead'] == 2 and value['verdict_lead'] == 0
  assert found.counts['num_unsafe'] == 30 and found.counts['num_turns'] == 270
  # One kind: all that the chain knows is the highest verdict so far.
  same = [tuple(dataclasses.replace(e, rule_set='') for e in item) for item in items]
  value = {name: metric['value'] for name, metric in _run(same, p).metrics.items()}
  assert value['chain_lead'] == value['verdict_lead']
  # An alarm after the violation is none in time.
  late = [np.array([0.01, 0.01, 0.01, 0.9])] * 30 + [np.full(5, 0.01)] * 30
  value = {name: metric['value'] for name, metric in _run(items, late, horizon=1).metrics.items()}
  assert value['chain_recall'] == value['verdict_recall'] == 0 and 'chain_lead' not in value


def test_what_nobody_can_know_is_left_out():
  found = _run([_talk('one', ['safe'] * 4, '')], [np.full(4, 0.01)])
  assert set(found.metrics) == {'chain_false_alarms', 'verdict_false_alarms'}


def test_dialogues_of_ruleworld_walk_into_what_is_forbidden():
  items = [probes.drift(0, i) for i in range(80)]
  assert {len(item) for item in items} == set(range(4, 13))
  broken = [any(e.label == 'unsafe' for e in item) for item in items]
  assert 0.3 < np.mean(broken) < 0.7
  for item in items:
    assert item[0].label == 'safe'
    for turn, e in enumerate(item):
      assert len(e.conversation) == 2 * turn + 2
      assert e.conversation[: 2 * turn] == item[turn - 1].conversation[: 2 * turn] or not turn
      assert (e.label == 'unsafe') == bool(e.violated)
  found = _run(items, [np.array([e.probability for e in item]) for item in items])
  # Who is never in doubt has no warning to give.
  assert found.metrics['verdict_recall']['value'] == 1


def test_pairs_of_dialogues_differ_in_one_reply():
  pairs = [probes.trajectory(0, i) for i in range(64)]
  families = {}
  for pair in pairs:
    safer, other = (side.conversation for side in (pair.safer, pair.other))
    (place,) = [i for i, pair in enumerate(zip(safer, other, strict=True)) if len(set(pair)) > 1]
    families.setdefault(pair.safer.source, set()).add(len(safer) // 2)
    # What everyone knows: which replies break the rule.
    broken = [
      [_unsafe(side, m) for m in side.conversation[1::2]] for side in (pair.safer, pair.other)
    ]
    assert place % 2 == 1 and broken[0][place // 2] < broken[1][place // 2]
    assert sum(broken[0]) == (pair.safer.label == 'unsafe') == (pair.safer.source == 'recovery')
    if pair.safer.source == 'recovery':
      assert broken[0][place // 2 - 1]
  assert families == {'refusal': set(range(1, 9)), 'recovery': set(range(2, 9))}


def _unsafe(example, message):
  rules = tuple(map(rules_lib.read, example.safety.categories))
  return oracle.label(rules, grammar.read_reply(message.content)) == 'unsafe'


def test_one_pass_does_not_see_what_is_past_and_a_minimum_no_recovery():
  pairs = [probes.trajectory(0, i) for i in range(128)]

  def truth(rows):
    return np.array([-2.0 if _unsafe(e, e.conversation[-1]) else 2.0 for e in rows])

  found = suites.run(truth, [Benchmark('t', 'trajectories', pairs)], num_samples=20)
  assert not suites.failures(found)
  value = {name: metric['value'] for name, metric in found['t'].metrics.items()}
  assert value['accuracy_all_safe'] == value['accuracy_all_safe_long'] == 1
  assert value['accuracy_one_pass_long'] < value['accuracy_one_pass'] < 1
  table = {tuple(row[:2]): [cell['value'] for cell in row[3:]] for row in found['t'].tables[0].rows}
  assert table['refusal', 1] == [1, 1, 1] and table['refusal', 8][1:] == [1, 1]
  assert all(table['recovery', num][1] == 0 for num in range(2, 9))
  assert sum(row[2] for row in found['t'].tables[0].rows) == len(pairs)
