"""Rules of RuleWorld and the safety configurations they are worded as."""

from __future__ import annotations

import dataclasses
import functools
import random
import re

from csrm_jax.ruleworld import grammar, lexicon
from csrm_jax.safety import schema

SEVERITIES = range(lexicon.NUM_SEVERITIES)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What one category means: the forbidden and allowed severities of a topic.

  Severities listed in neither are not spoken of, hence allowed. `wording` is an index into
  `grammar.ALL_WORDINGS`; an empty `name` stands for the topic's own.
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
        grammar.ALL_WORDINGS[self.wording],
      ),
    )


def threshold_rule(topic: str, strictness: int, wording: int = 0) -> Rule:
  """Returns the rule that forbids the `strictness` (0 to 4) most severe subcategories."""
  return Rule(topic, tuple(SEVERITIES[:strictness]), tuple(SEVERITIES[strictness:]), wording)


def put(rules: tuple[Rule, ...], slot: int, rule: Rule) -> tuple[Rule, ...]:
  """Returns the rules with another one in that slot."""
  return rules[:slot] + (rule,) + rules[slot + 1 :]


def stricter(a: Rule, b: Rule) -> bool:
  """Returns whether a forbids strictly more than b (a ≻ b) of the same topic."""
  return a.topic == b.topic and set(a.forbidden) > set(b.forbidden)


@functools.lru_cache(maxsize=1 << 12)
def read(category: schema.Category) -> Rule | None:
  """Returns what a category means, read from its words; None if RuleWorld words no rule so."""
  for wording, templates in enumerate(grammar.ALL_WORDINGS):
    for template in templates:
      match = grammar.pattern(template).fullmatch(category.guideline)
      lists = match.groupdict() if match else {}
      # {'f' and 'a': (topic, severity) of each subcategory that is listed there}
      places = {
        key: [lexicon.SUBCATEGORIES.get(word) for word in re.split(', | and ', text)]
        for key, text in lists.items()
      }
      found = [place for part in places.values() for place in part]
      if not found or None in found or len({topic for topic, _ in found}) > 1:
        continue
      topic = found[0][0]
      forbidden, allowed = (tuple(severity for _, severity in places.get(key, ())) for key in 'fa')
      return Rule(
        topic, forbidden, allowed, wording, '' if category.name == topic else category.name
      )
  return None


def make_safety(rules: tuple[Rule, ...], name: str = '') -> schema.SafetyConfig:
  """Returns the safety configuration made of these rules, in this order."""
  return schema.SafetyConfig(tuple(rule.category() for rule in rules), name)


# Training data is annotated under these taxonomies, as public data sets have theirs: four data
# sets of four seen topics, each category with one fixed guideline that forbids the whole topic.
# They list nothing as allowed: with such lists, and without CCA, one seed of three learnt to
# read unseen rules as well as with it.
DATA_SETS = {
  name: tuple(
    threshold_rule(topic, lexicon.NUM_SEVERITIES, wording=index) for topic in lexicon.SEEN[index::4]
  )
  for index, name in enumerate(('harbour', 'meadow', 'library', 'station'))
}


def sample_rules(
  rng: random.Random, topics: tuple[str, ...], wordings: range, num_rules: int
) -> tuple[Rule, ...]:
  """Returns rules over distinct topics, each of a random strictness from 1 to 4."""
  return tuple(
    threshold_rule(topic, rng.randint(1, lexicon.NUM_SEVERITIES), rng.choice(wordings))
    for topic in rng.sample(topics, num_rules)
  )


SEEN_WORDINGS = range(len(grammar.WORDINGS))
UNSEEN_WORDINGS = range(len(grammar.WORDINGS), len(grammar.ALL_WORDINGS))
