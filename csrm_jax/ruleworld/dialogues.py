"""Dialogues of RuleWorld of many turns, each turn with its true label to the letter."""

from __future__ import annotations

import random
from collections.abc import Sequence

from csrm_jax.ruleworld import conversations, grammar, lexicon, oracle, rules as rules_lib
from csrm_jax.safety import schema

Rules = tuple[rules_lib.Rule, ...]
Talk = tuple[schema.Message, ...]

NUM_TURNS = (4, 12)  # of the agent
# The probability of a more severe turn, drawn for each dialogue; that of a milder one is _BACK.
_PACES = (0.1, 0.25, 0.5)
_BACK = 0.1
_ENGAGED = 0.85  # the share of turns that engage with what they are about


def drift(
  rng: random.Random, topics: Sequence[str], wordings: Sequence[int], name: str
) -> tuple[schema.Example, ...]:
  """Returns the agent turns of a dialogue of 4 to 12, with their histories.

  All turns are about one topic, whose severity walks by one step or none from the mildest on. The
  rule set is named by how much of the topic is forbidden, and one rule is about another topic.
  """
  topic, other = rng.sample(topics, 2)
  strictness = rng.randint(1, lexicon.NUM_SEVERITIES - 1)
  rules = [
    rules_lib.threshold_rule(topic, strictness, rng.choice(wordings)),
    rules_lib.threshold_rule(other, rng.randint(1, lexicon.NUM_SEVERITIES), rng.choice(wordings)),
  ]
  rng.shuffle(rules)
  pace, severity = rng.choice(_PACES), lexicon.NUM_SEVERITIES - 1
  messages: Talk = ()
  turns = []
  for turn in range(rng.randint(*NUM_TURNS)):
    if turn:
      step = rng.random()
      severity += -1 if step < pace else int(step > 1 - _BACK)
      severity = min(max(severity, 0), lexicon.NUM_SEVERITIES - 1)
    stances = grammar.ENGAGED if rng.random() < _ENGAGED else grammar.DISENGAGED
    said = conversations.sample_statement(rng, topic, rng.choice(stances), severity)
    messages += _exchange(rng, said)
    turns.append(
      _example(f'{name}/{turn}', messages, tuple(rules), said, f'strictness {strictness}')
    )
  return tuple(turns)


def _exchange(rng: random.Random, said: grammar.Statement) -> Talk:
  request = rng.choice(grammar.REQUESTS).format(x=said.phrase)
  reply = conversations.reply_text(rng, (said,))
  return (schema.Message('user', request), schema.Message('agent', reply))


def _example(
  name: str, messages: Talk, rules: Rules, said: grammar.Statement, rule_set: str
) -> schema.Example:
  """Returns a turn with its label to the letter, of which nothing is uncertain."""
  broken = [rule for rule in rules if oracle.violates(rule, (said,))]
  return schema.Example(
    name,
    rules_lib.make_safety(rules),
    messages,
    'unsafe' if broken else 'safe',
    tuple(rule.category().name for rule in broken),
    probability=float(bool(broken)),
    source='dialogues',
    rule_set=rule_set,
  )
