"""Dialogues of RuleWorld of many turns, each turn with its true label to the letter."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from csrm_jax.core import checks
from csrm_jax.ruleworld import conversations, examples, grammar, lexicon, rules as rules_lib
from csrm_jax.safety import schema

Talk = tuple[schema.Message, ...]

FAMILIES = ('refusal', 'recovery')
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
    scene = conversations.Scene(said, (said,), messages)
    turns.append(
      examples.make_exact(
        scene,
        tuple(rules),
        f'{name}/{turn}',
        source='dialogues',
        rule_set=f'strictness {strictness}',
      )
    )
  return tuple(turns)


def trajectory(
  rng: random.Random,
  topics: Sequence[str],
  wordings: Sequence[int],
  name: str,
  num_turns: int,
  family: str,
) -> schema.Pair:
  """Returns two dialogues that differ in one reply, anywhere, the safer one first.

  What is asked there is forbidden: one side declines, the other does it. With 'recovery' both have
  done so in the turn before; with 'refusal' all other turns are safe. The family is the `source`.

  Raises:
    ValueError: There is no turn before the only one.

  Source: Plan-RewardBench (arXiv 2604.08178), by its abstract: minimal edits of trajectories, with
    families; ours are of replies, not of tool calls.
  """
  checks.one_of('family', family, FAMILIES)
  if num_turns < 1 + (family == 'recovery'):
    raise ValueError(f'{num_turns} turns are too few for the family {family!r}')
  topic = rng.choice(topics)
  strictness = rng.randint(1, lexicon.NUM_SEVERITIES - 1)
  rules = (rules_lib.threshold_rule(topic, strictness, rng.choice(wordings)),)
  edited = rng.randrange(int(family == 'recovery'), num_turns)
  slips = {edited, edited - 1} if family == 'recovery' else {edited}
  sides: dict[str, Talk] = {'safer': (), 'other': ()}
  for turn in range(num_turns):
    severity = rng.randrange(
      *((strictness,) if turn in slips else (strictness, lexicon.NUM_SEVERITIES))
    )
    done = conversations.sample_statement(rng, topic, rng.choice(grammar.ENGAGED), severity)
    declined = conversations.sample_statement(rng, topic, 'decline', severity)
    # The same phrase, and the same words around it.
    declined = dataclasses.replace(done, stance='decline', template=declined.template)
    around = rng.getrandbits(32)
    for side in sides:
      said = declined if turn == edited and side == 'safer' else done
      sides[side] += _exchange(random.Random(around), said)
  label = 'safe' if family == 'refusal' else 'unsafe'
  made = {
    side: schema.Example(
      f'{name}/{side}',
      rules_lib.make_safety(rules),
      talk,
      label if side == 'safer' else 'unsafe',
      source=family,
    )
    for side, talk in sides.items()
  }
  return schema.Pair(name, made['safer'], made['other'], 'preference')


def _exchange(rng: random.Random, said: grammar.Statement) -> Talk:
  request = conversations.request(rng, said.phrase)
  return (request, schema.Message('agent', conversations.reply_text(rng, (said,))))
