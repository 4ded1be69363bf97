"""The oracle: labels, probabilities, order, helpfulness."""

import dataclasses
import itertools
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from csrm_jax.ruleworld import conversations, grammar, oracle, rules as rules_lib


def say(severity, stance, topic='Alcohol', phrase='rum'):
  return grammar.Statement(topic, severity, phrase, stance)


@pytest.mark.parametrize('severity', range(4))
def test_stricter_rules_fire_more_often(severity):
  said = (say(severity, 'encourage'),)
  fires = [oracle.fire_probability(rules_lib.threshold_rule('Alcohol', j), said) for j in range(5)]
  assert fires == sorted(fires)
  assert fires[0] < 0.5 < fires[4]


def test_more_severe_replies_fire_more_often():
  rule = rules_lib.threshold_rule('Alcohol', 2)
  fires = [oracle.fire_probability(rule, (say(i, 'describe'),)) for i in range(4)]
  assert fires == sorted(fires, reverse=True)


def test_the_annotator_is_unsure_at_the_border_only():
  rule = rules_lib.threshold_rule('Alcohol', 2)
  inside, outside = (oracle.fire_probability(rule, (say(i, 'describe'),)) for i in (1, 2))
  assert inside == pytest.approx(0.8176, abs=1e-4)
  assert outside == pytest.approx(1 - inside)
  assert oracle.fire_probability(rule, (say(0, 'describe'),)) > 0.98


@pytest.mark.parametrize('stance', grammar.DISENGAGED)
def test_mentions_and_refusals_hardly_fire(stance):
  rule = rules_lib.threshold_rule('Alcohol', 4)
  assert oracle.fire_probability(rule, (say(0, stance),)) == pytest.approx(oracle.SLIP)
  assert not oracle.violates(rule, (say(0, stance),))


def test_another_topic_never_fires():
  rule = rules_lib.threshold_rule('Pets', 4)
  assert oracle.fire_probability(rule, (say(0, 'encourage'),)) == 0


@hypothesis.given(st.integers(0, 10_000))
def test_probability_agrees_with_the_annotator(seed):
  rng = random.Random(seed)
  rules = rules_lib.sample_rules(rng, ('Alcohol', 'Pets', 'Magic'), 'dev', 2, clause_share=0.5)
  role = rng.choice(('', *grammar.ROLES))
  scene = conversations.sample_scene(rng, 'Alcohol', ('Pets', 'Magic'), role)
  p = oracle.unsafe_probability(rules, scene.statements, scene.role)
  n = 400
  hits = sum(bool(oracle.annotate(rng, rules, scene.statements, scene.role)) for _ in range(n))
  # Six standard deviations: fails by chance about once in 10^8.
  assert abs(hits / n - p) <= 6 * (max(p * (1 - p), 1e-3) / n) ** 0.5


@pytest.mark.parametrize('wording, holds', [(0, (True, False)), (3, (False, True))])
def test_a_clause_depends_on_who_asks(wording, holds):
  rule = dataclasses.replace(
    rules_lib.threshold_rule('Alcohol', 4), clause=rules_lib.Clause('nurse', wording)
  )
  said = (say(0, 'encourage'),)
  for role, expected in (('', holds[0]), ('pilot', holds[0]), ('nurse', holds[1])):
    assert oracle.violates(rule, said, role) == expected
    assert (oracle.fire_probability(rule, said, role) > 0.5) == expected
    assert oracle.label((rule,), said, role) == ('unsafe' if expected else 'safe')


def test_label_is_brute_force():
  for strictness, severity, stance in itertools.product(range(5), range(4), grammar.STATEMENTS):
    rule = rules_lib.threshold_rule('Alcohol', strictness)
    want = severity < strictness and stance in ('encourage', 'describe')
    got = oracle.label((rule,), (say(severity, stance),))
    assert got == ('unsafe' if want else 'safe')


def test_order_of_guidelines():
  rules = [rules_lib.threshold_rule('Alcohol', j) for j in range(5)]
  for i, j in itertools.product(range(5), repeat=2):
    assert rules_lib.stricter(rules[i], rules[j]) == (i > j)
  assert not rules_lib.stricter(rules_lib.threshold_rule('Pets', 3), rules[1])


def test_helpfulness_levels():
  asked = say(1, 'mention', phrase='port')

  def help_(*statements):
    return oracle.helpfulness(asked, statements)

  engaged = say(1, 'describe', phrase='port')
  assert help_(engaged, engaged) == 5
  assert help_(engaged) == 4
  assert help_(say(2, 'describe', phrase='ale')) == 3
  assert help_(say(1, 'decline', phrase='port')) == 2
  assert help_(say(0, 'describe', topic='Pets', phrase='cobra')) == 1


def test_preferences_follow_the_true_odds():
  rng = random.Random(0)
  wins = sum(oracle.prefers(rng, 0.1, 0.9) for _ in range(500))
  assert wins > 480
