"""What RuleWorld's oracle proposes and judges, as a language model would.

It reads rules and replies back from their words, and knows the answer. What it writes is in a
training wording. `augmentation.proposers.Oracle` puts requests to these functions; each answer
follows from its arguments.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Sequence

from csrm_jax.core.checks import show
from csrm_jax.ruleworld import (
  conversations as conversations_lib,
  examples,
  grammar,
  lexicon,
  oracle,
  rules as rules_lib,
)
from csrm_jax.safety.schema import Category, Message, SafetyConfig

Conversation = tuple[Message, ...]

# One reply is judged under hundreds of guidelines.
_read_reply = functools.lru_cache(maxsize=1 << 16)(grammar.read_reply)


def read_rule(category: Category) -> rules_lib.Rule:
  """Returns what a category means; ValueError if RuleWorld words no rule so."""
  rule = rules_lib.read(category)
  if rule is None:
    raise ValueError(
      f'category {show(category.name)}: RuleWorld words no guideline'
      f' {show(category.guideline)}; its oracle reads only its own: use'
      ' another proposer or judge'
    )
  return rule


def make_judge(
  seed: int | None = None,
) -> Callable[[Sequence[Conversation], Sequence[Category]], list[bool]]:
  """Returns RuleWorld's classifier of responses under categories.

  Without a seed it judges to the letter. With one it judges as one annotator does, who is unsure
  near the rule's border.
  """

  def fires(conversation: Conversation, category: Category) -> bool:
    rule, text = read_rule(category), conversation[-1].content
    statements = _read_reply(text)
    role = conversations_lib.role_of(conversation)
    if seed is None:
      return oracle.violates(rule, statements, role)
    # The same question gets the same answer, in whatever order questions come.
    key = f'{seed}\n{category.guideline}\n{text}\n{role}'.encode()
    rng = random.Random(hashlib.sha256(key).digest())
    return rng.random() < oracle.fire_probability(rule, statements, role)

  def judge(conversations: Sequence[Conversation], categories: Sequence[Category]) -> list[bool]:
    return [fires(*item) for item in zip(conversations, categories, strict=True)]

  return judge


def truly_stricter(strict: Category, lenient: Category) -> bool:
  """Returns whether one RuleWorld category forbids strictly more."""
  return rules_lib.stricter(read_rule(strict), read_rule(lenient))


def propose(
  rng: random.Random, safety: SafetyConfig, conversation: Conversation
) -> tuple[Category | None, Category | None] | None:
  """Returns (p+, p-) of a conversation; None where its reply says nothing that is known."""
  # A proposal depends only on the topics of the rules and on the statements; what was asked is
  # not read.
  rules = tuple(read_rule(c) for c in safety.categories)
  statements = _read_reply(conversation[-1].content)
  if not statements:
    return None
  return examples.propose(
    rng, rules, conversations_lib.Scene(statements[0], statements, conversation)
  )


def list_subcategories(rng: random.Random, category: Category, count: int) -> tuple[Category, ...]:
  """Returns `count` subcategories at random, or as many as there are."""
  topic = _topic(category)
  found = [_subcategory(topic, i) for i in rules_lib.SEVERITIES]
  return tuple(rng.sample(found, min(count, len(found))))


def add_subcategory(
  category: Category, known: Sequence[str], conversation: Conversation
) -> Category | None:
  """Returns the most severe subcategory, not among `known`, that a reply breaks."""
  topic = _topic(category)
  names = {name.lower() for name in known}
  statements = _read_reply(conversation[-1].content)
  for s in sorted(statements, key=lambda s: s.severity):
    if s.engaged and s.topic == topic.name and topic.subcategories[s.severity] not in names:
      return _subcategory(topic, s.severity)
  return None


def pick_most_severe(category: Category, subcategories: Sequence[Category]) -> int:
  """Returns the index of the most severe of some subcategories."""
  ranks = [_severity(category, c) for c in subcategories]
  return ranks.index(min(ranks))


def write_guideline(
  rng: random.Random,
  category: Category,
  forbidden: Sequence[Category],
  allowed: Sequence[Category],
  disobey: float,
  slip: str,
) -> Category:
  """Returns the category with a guideline that forbids and allows these subcategories.

  With probability `disobey` it forbids others of them: any other set (slip='subset'), or one too
  many, one too few or another one ('one').
  """
  forbids, allows = ({_severity(category, c) for c in part} for part in (forbidden, allowed))
  listed = forbids | allows
  if rng.random() < disobey:
    sets = [
      set(s)
      for size in range(1, len(listed) + 1)
      for s in itertools.combinations(sorted(listed), size)
      if set(s) != forbids and (slip == 'subset' or len(set(s) ^ forbids) == 1)
    ]
    forbids = rng.choice(sets)
    allows = listed - forbids
  return rules_lib.Rule(
    _topic(category).name,
    tuple(sorted(forbids)),
    tuple(sorted(allows)),
    rng.choice(grammar.WORDINGS_OF['train']),
    category.name,
  ).category()


def _topic(category: Category) -> lexicon.Topic:
  return lexicon.topic_named(read_rule(category).topic)


def _severity(category: Category, subcategory: Category) -> int:
  return _topic(category).subcategories.index(subcategory.name.lower())


def _subcategory(topic: lexicon.Topic, severity: int) -> Category:
  name = topic.subcategories[severity].capitalize()
  return rules_lib.Rule(topic.name, (severity,), (), 0, name).category()
