"""Rules of RuleWorld and the safety configurations they are worded as."""

from __future__ import annotations

import dataclasses
import functools
import random
import re

from csrm_jax.ruleworld import grammar, lexicon
from csrm_jax.safety import schema

SEVERITIES = range(lexicon.NUM_SEVERITIES)
THRESHOLD_SHARE = 0.2  # of random rules
DEGREE_SHARE = 0.3  # of thresholds
CLAUSE_SHARE = 0.15  # of random rules
# How often a subcategory of a rule that is no threshold is forbidden, allowed, not spoken of.
FATES = (0.18, 0.52, 0.3)


@dataclasses.dataclass(frozen=True)
class Clause:
  """Who a rule is for: `wording` is an index into `grammar.CLAUSES`, which exempt or single out."""

  role: str
  wording: int = 0

  def holds_for(self, role: str) -> bool:
    """Returns whether the rule holds where a user is of that role; '' is nobody's."""
    exempts, _ = grammar.CLAUSES[self.wording]
    return (role == self.role) != exempts

  def text(self) -> str:
    return grammar.CLAUSES[self.wording][1].format(r=f'{self.role}s')


@dataclasses.dataclass(frozen=True)
class Rule:
  """What one category means: the forbidden and allowed severities of a topic.

  Severities listed in neither are not spoken of, hence allowed. `wording` is an index into
  `grammar.ALL_WORDINGS`; an empty `name` stands for the topic's own. A rule with a clause depends
  on who asks.
  """

  topic: str
  forbidden: tuple[int, ...]
  allowed: tuple[int, ...] = ()
  wording: int = 0
  name: str = ''
  clause: Clause | None = None

  def holds_for(self, role: str) -> bool:
    """Returns whether the rule is in force where a user is of that role."""
    return self.clause is None or self.clause.holds_for(role)

  def category(self) -> schema.Category:
    """Returns the rule in words."""
    names = lexicon.topic_named(self.topic).subcategories
    guideline = grammar.word_guideline(
      tuple(names[i] for i in self.forbidden),
      tuple(names[i] for i in self.allowed),
      grammar.ALL_WORDINGS[self.wording],
    )
    if self.clause:
      guideline = f'{guideline} {self.clause.text()}'
    return schema.Category(self.name or self.topic, guideline)


def threshold_rule(topic: str, strictness: int, wording: int = 0) -> Rule:
  """Returns the rule that forbids the `strictness` (0 to 4) most severe subcategories.

  A wording by degree can say neither "none" nor "all": another one of its side says these.
  """
  if strictness in (0, lexicon.NUM_SEVERITIES):
    wording = next(
      (grammar.WORDINGS_OF[side][0] for side, own in grammar.DEGREES_OF.items() if wording in own),
      wording,
    )
  return Rule(topic, tuple(SEVERITIES[:strictness]), tuple(SEVERITIES[strictness:]), wording)


def put(rules: tuple[Rule, ...], slot: int, rule: Rule) -> tuple[Rule, ...]:
  """Returns the rules with another one in that slot."""
  return rules[:slot] + (rule,) + rules[slot + 1 :]


def stricter(a: Rule, b: Rule) -> bool:
  """Returns whether a forbids strictly more than b (a ≻ b) of the same topic."""
  return a.topic == b.topic and set(a.forbidden) > set(b.forbidden)


# Text of a wording in lower case, with '{}' for lists -> (its index, the fields of these lists).
_WORDINGS = {
  re.sub(r'\{\w\}', '{}', text).lower(): (index, re.findall(r'\{(\w)\}', text))
  for index, wording in enumerate(grammar.ALL_WORDINGS)
  for text in ((wording,) if isinstance(wording, str) else wording)
}
_BY_DEGREE = {index for own in grammar.DEGREES_OF.values() for index in own}
_CLAUSES = {text: index for index, (_, text) in enumerate(grammar.CLAUSES)}
_WORD = rf'\b(?:{"|".join(lexicon.SUBCATEGORIES)})\b'
_LIST = re.compile(rf'{_WORD}(?:, {_WORD})*(?: and {_WORD})?')
_PLURAL = re.compile(rf'\b({"|".join(grammar.ROLES)})s\b')


@functools.lru_cache(maxsize=1 << 12)
def read(category: schema.Category) -> Rule | None:
  """Returns what a category means, read from its words; None if RuleWorld words no rule so."""
  guideline, clause = _split_clause(category.guideline)
  text = guideline.lower()
  index, fields = _WORDINGS.get(_LIST.sub('{}', text), (0, ()))
  # [(topic, severity) of each subcategory] of each list.
  lists = [
    [lexicon.SUBCATEGORIES[word] for word in re.split(', | and ', found)]
    for found in _LIST.findall(text)
  ]
  topics = {topic for places in lists for topic, _ in places}
  if not fields or len(topics) != 1:
    return None
  severities = {
    field: tuple(severity for _, severity in places)
    for field, places in zip(fields, lists, strict=True)
  }
  (topic,) = topics
  forbidden, allowed = severities.get('f', ()), severities.get('a', ())
  if index in _BY_DEGREE:
    ((field, (severity,)),) = severities.items()
    border = severity + (field == 'w')
    forbidden, allowed = tuple(SEVERITIES[:border]), tuple(SEVERITIES[border:])
  name = '' if category.name == topic else category.name
  return Rule(topic, forbidden, allowed, index, name, clause)


def _split_clause(guideline: str) -> tuple[str, Clause | None]:
  """Returns the guideline without its clause, and the clause."""
  rest, _, last = guideline.rpartition('. ')
  role = _PLURAL.search(last)
  index = role and _CLAUSES.get(last.replace(role[0], '{r}'))
  return (guideline, None) if index is None else (f'{rest}.', Clause(role[1], index))


def make_safety(rules: tuple[Rule, ...], name: str = '') -> schema.SafetyConfig:
  """Returns the safety configuration made of these rules, in this order."""
  return schema.SafetyConfig(tuple(rule.category() for rule in rules), name)


# Training data is annotated under these taxonomies, as public data sets have theirs: four data
# sets of six seen topics, each category with one fixed guideline of its own strictness. The other
# seen topics occur in what is proposed and in what conversations stray to.
_NUM_CATEGORIES = 6


def _data_set(name: str, index: int) -> tuple[Rule, ...]:
  rng = random.Random(f'data set {name}')
  topics = lexicon.SEEN[index::4][:_NUM_CATEGORIES]
  return tuple(sample_rule(rng, topic, 'train') for topic in topics)


def sample_rule(
  rng: random.Random, topic: str, side: str, clause_share: float = CLAUSE_SHARE
) -> Rule:
  """Returns a random rule on a topic, in the words of a side ('train', 'dev' or 'test').

  THRESHOLD_SHARE are thresholds of strictness 1 to 4; of these DEGREE_SHARE are worded by degree
  where they can be. In the others each subcategory is forbidden, allowed or not spoken of, whatever
  its severity, and at least one is forbidden. A `clause_share` of all depends on who asks.
  """
  clause = sample_clause(rng, side) if rng.random() < clause_share else None
  if rng.random() < THRESHOLD_SHARE:
    strictness = rng.randint(1, lexicon.NUM_SEVERITIES)
    by_degree = rng.random() < DEGREE_SHARE and strictness < lexicon.NUM_SEVERITIES
    wordings = (grammar.DEGREES_OF if by_degree else grammar.WORDINGS_OF)[side]
    return dataclasses.replace(
      threshold_rule(topic, strictness, rng.choice(wordings)), clause=clause
    )
  fates = rng.choices(('forbidden', 'allowed', 'unsaid'), FATES, k=lexicon.NUM_SEVERITIES)
  if 'forbidden' not in fates:
    fates[rng.choice(SEVERITIES)] = 'forbidden'
  forbidden, allowed = (
    tuple(i for i in SEVERITIES if fates[i] == fate) for fate in ('forbidden', 'allowed')
  )
  return Rule(topic, forbidden, allowed, rng.choice(grammar.WORDINGS_OF[side]), clause=clause)


def sample_clause(rng: random.Random, side: str) -> Clause:
  """Returns a random clause about who asks, in the words of a side."""
  return Clause(rng.choice(grammar.ROLES), rng.choice(grammar.CLAUSES_OF[side]))


def sample_rules(
  rng: random.Random,
  topics: tuple[str, ...],
  side: str,
  num_rules: int,
  clause_share: float = CLAUSE_SHARE,
) -> tuple[Rule, ...]:
  """Returns random rules over distinct topics; see `sample_rule`."""
  return tuple(
    sample_rule(rng, topic, side, clause_share) for topic in rng.sample(topics, num_rules)
  )


DATA_SETS = {
  name: _data_set(name, index)
  for index, name in enumerate(('harbour', 'meadow', 'library', 'station'))
}
