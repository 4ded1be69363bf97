"""Rules of RuleWorld and the safety configurations they are worded as."""

from __future__ import annotations

import dataclasses
import random

from csrm_jax.ruleworld import grammar, lexicon
from csrm_jax.safety import schema

SEVERITIES = range(lexicon.NUM_SEVERITIES)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What one category means: forbidden and allowed severities of a topic.

  Severities listed in neither are not spoken of, hence allowed.
  `wording` is an index into `grammar.ALL_WORDINGS`, `name` the name of the
  category (the topic's own when empty).
  """
  topic: str
  forbidden: tuple[int, ...]
  allowed: tuple[int, ...] = ()
  wording: int = 0
  name: str = ''

  def category(self) -> schema.Category:
    """Returns the rule in words."""
    names = lexicon.topic_named(self.topic).subcategories
    return schema.Category(
        self.name or self.topic,
        grammar.word_guideline(
            tuple(names[i] for i in self.forbidden),
            tuple(names[i] for i in self.allowed),
            grammar.ALL_WORDINGS[self.wording]))


def threshold_rule(topic: str, strictness: int, wording: int = 0) -> Rule:
  """Returns the rule that forbids the `strictness` most severe, 0 to 4."""
  return Rule(topic, tuple(SEVERITIES[:strictness]),
              tuple(SEVERITIES[strictness:]), wording)


def stricter(a: Rule, b: Rule) -> bool:
  """Returns whether a forbids strictly more than b (a ≻ b), same topic."""
  return a.topic == b.topic and set(a.forbidden) > set(b.forbidden)


def make_safety(rules: tuple[Rule, ...], name: str = '') -> schema.SafetyConfig:
  """Returns the safety configuration made of these rules, in this order."""
  return schema.SafetyConfig(tuple(rule.category() for rule in rules), name)


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A taxonomy that training data is annotated under, as public sets have.

  Attributes:
    rules: of the topics that its conversations are about, one fixed guideline
      each. All but the last forbid the whole topic.
    unused: guidelines with lists of what is allowed, on topics that none of
      its conversations touches. Without them a list of what is allowed would
      only ever stand where an answer depends on it.
  """
  rules: tuple[Rule, ...]
  unused: tuple[Rule, ...]

  @property
  def all_rules(self) -> tuple[Rule, ...]:
    """The whole taxonomy."""
    return self.rules + self.unused

  @property
  def topics(self) -> tuple[str, ...]:
    """The topics that its conversations may touch."""
    unused = {rule.topic for rule in self.unused}
    return tuple(t for t in lexicon.SEEN if t not in unused)


def _data_set(index: int) -> DataSet:
  def fixed_rules(topics, strictnesses):
    return tuple(threshold_rule(topic, strictness, index)
                 for topic, strictness in zip(topics, strictnesses,
                                              strict=True))

  own, others = lexicon.SEEN[index::4], lexicon.SEEN[(index + 1) % 4::4]
  return DataSet(fixed_rules(own, (4, 4, 4, 3)),
                 fixed_rules(others[:2], (3, 2)))


# Four data sets of four seen topics each.
DATA_SETS = {name: _data_set(index) for index, name in enumerate(
    ('harbour', 'meadow', 'library', 'station'))}


def sample_rules(rng: random.Random, topics: tuple[str, ...],
                 wordings: range, num_rules: int) -> tuple[Rule, ...]:
  """Returns rules over distinct topics, strictness 1 to 4 at random."""
  return tuple(
      threshold_rule(topic, rng.randint(1, lexicon.NUM_SEVERITIES),
                     rng.choice(wordings))
      for topic in rng.sample(topics, num_rules))


SEEN_WORDINGS = range(len(grammar.WORDINGS))
UNSEEN_WORDINGS = range(len(grammar.WORDINGS), len(grammar.ALL_WORDINGS))
