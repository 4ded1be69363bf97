"""Alarms of RuleWorld that nobody explains, and the rules that explain them best.

An example of `alarm` has one bit: whether the last response broke a hidden rule set, to the letter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csrm_jax.core import checks
from csrm_jax.ruleworld import (
  conversations as conversations_lib,
  examples,
  grammar,
  lexicon,
  oracle,
  policy,
  rules as rules_lib,
)
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Category, Example, Message

_ON_TOPIC = 0.7  # the share of conversations about a topic of the rules
_MAX_PASSES = 10


def alarm(seed: int, index: int, rule_set: str, false_alarms: float = 0.0) -> Example:
  """Returns a conversation whose label says whether there was an alarm; `probability` is the truth.

  Rules are hidden: those of `policy.RULE_SETS` under that name. A safe one alarms with probability
  `false_alarms`.
  """
  checks.one_of('rule_set', rule_set, policy.RULE_SETS)
  rules = policy.RULE_SETS[rule_set]
  rng = examples.make_rng(f'alarm/{rule_set}', seed, index)
  topics = tuple(topic.name for topic in lexicon.TOPICS)
  topic = rng.choice(rules).topic if rng.random() < _ON_TOPIC else rng.choice(topics)
  scene = conversations_lib.sample_scene(rng, topic, topics)
  broken = oracle.label(rules, scene.statements) == 'unsafe'
  heard = rng.random() < false_alarms or broken
  return Example(
    f'alarm-{rule_set}-{seed}-{index}',
    augment.NO_RULES,
    scene.messages,
    'unsafe' if heard else 'safe',
    probability=float(broken),
    source='alarms',
  )


def induce(
  conversations: Sequence[tuple[Message, ...]], bits: Sequence[bool]
) -> tuple[Category, ...]:
  """Returns the rules, a threshold for each topic, that agree with most bits.

  Thresholds are set in turn, each to the least strict of the best, until none changes.
  """
  topics = [topic.name for topic in lexicon.TOPICS]
  # The severest thing that each response engages with, by topic: [N, topics].
  severest = np.full((len(conversations), len(topics)), lexicon.NUM_SEVERITIES)
  for i, conversation in enumerate(conversations):
    for said in grammar.read_reply(conversation[-1].content):
      if said.engaged:
        place = i, topics.index(said.topic)
        severest[place] = min(severest[place], said.severity)
  bits, strictness = np.asarray(bits, bool), np.zeros(len(topics), int)
  for _ in range(_MAX_PASSES):
    before = strictness.copy()
    for t in range(len(topics)):
      strictness[t] = 0
      others = (severest < strictness).any(1)
      agreed = [
        np.mean((others | (severest[:, t] < s)) == bits) for s in range(lexicon.NUM_SEVERITIES + 1)
      ]
      strictness[t] = int(np.argmax(agreed))
    if (strictness == before).all():
      break
  return tuple(
    rules_lib.threshold_rule(topic, int(s)).category()
    for topic, s in zip(topics, strictness, strict=True)
    if s
  )
