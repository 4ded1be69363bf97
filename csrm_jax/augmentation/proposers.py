"""Who answers requests: the protocol, and the oracle of RuleWorld."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from csrm_jax.augmentation import requests
from csrm_jax.core.checks import show
from csrm_jax.ruleworld import (
  conversations as conversations_lib,
  examples,
  grammar,
  lexicon,
  oracle,
  rules as rules_lib,
)
from csrm_jax.safety.schema import Category, Message

Conversation = tuple[Message, ...]
# (conversations, a category for each) -> whether each last response violates
# its category.
Judge = Callable[[Sequence[Conversation], Sequence[Category]], list[bool]]


class NoReplyError(Exception):
  """No usable reply came, for a reason that is one word, to be counted."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(detail or reason)
    self.reason = reason


class Proposer(Protocol):
  """Answers requests.

  Attributes:
    name: of the model; stands in the data card.
    concurrency: how many requests it takes at once.
  """

  name: str
  concurrency: int

  def ask(self, request: requests.Request) -> Any:
    """Returns the typed reply.

    Raises:
      NoReplyError: none that can be used; the item is dropped and counted.
      ValueError: it cannot work at all (a wrong key, a server that is down).
    """

  def usage(self) -> dict[str, int]:
    """Returns counts since the start: requests, tokens, cache hits, ..."""


@dataclasses.dataclass
class RuleWorldOracle:
  """Answers for RuleWorld's conversations, exactly and at once.

  Replies follow from the request and the seed alone. What it writes is in a
  training wording.

  Attributes:
    seed: of all choices.
    disobey: the share of rewrites that do not heed their lists, as those of
      language models often do not: the guideline forbids other subcategories.
    slip: 'subset': any other set of them; 'one': one too many or too few, or
      another one.
  """

  seed: int = 0
  disobey: float = 0.0
  slip: str = 'subset'
  name: str = 'ruleworld-oracle'
  concurrency: int = 1

  def __post_init__(self):
    self._count = 0

  def ask(self, request: requests.Request) -> Any:
    """Returns the true answer; see `Proposer.ask`."""
    self._count += 1
    rng = random.Random(f'{self.seed}/{requests.digest(request)}')
    match request:
      case requests.ProposeCategories():
        return _propose(rng, request)
      case requests.ListSubcategories():
        topic = _topic(request.category)
        found = [_subcategory(topic, i) for i in rules_lib.SEVERITIES]
        return tuple(rng.sample(found, min(request.count, len(found))))
      case requests.AddSubcategory():
        return _add(request)
      case requests.PickMostSevere():
        names = _topic(request.category).subcategories
        ranks = [names.index(c.name.lower()) for c in request.subcategories]
        return ranks.index(min(ranks))
      case requests.WriteGuideline():
        return self._write(rng, request)

  def usage(self) -> dict[str, int]:
    """Returns how many requests were answered."""
    return {'requests': self._count}

  def _write(self, rng: random.Random, request: requests.WriteGuideline) -> Category:
    topic = _topic(request.category)
    names = topic.subcategories
    forbidden, allowed = (
      {names.index(c.name.lower()) for c in part} for part in (request.forbidden, request.allowed)
    )
    if rng.random() < self.disobey:
      listed = sorted(forbidden | allowed)
      sets = [
        set(s)
        for size in range(1, len(listed) + 1)
        for s in itertools.combinations(listed, size)
        if set(s) != forbidden and (self.slip == 'subset' or len(set(s) ^ forbidden) == 1)
      ]
      everything = forbidden | allowed
      forbidden = rng.choice(sets)
      allowed = everything - forbidden
    return rules_lib.Rule(
      topic.name,
      tuple(sorted(forbidden)),
      tuple(sorted(allowed)),
      rng.choice(rules_lib.SEEN_WORDINGS),
      request.category.name,
    ).category()


@functools.lru_cache(maxsize=1 << 12)
def read_rule(category: Category) -> rules_lib.Rule:
  """Returns what a category worded by RuleWorld means.

  The name of the rule is the category's.

  Raises:
    ValueError: RuleWorld does not word any rule so.
  """
  try:
    rule = _rule_table()[category.guideline]
  except KeyError:
    raise ValueError(
      f'category {show(category.name)}: RuleWorld words no guideline'
      f' {show(category.guideline)}; its oracle reads only its own: use'
      ' another proposer or judge'
    ) from None
  return dataclasses.replace(rule, name=category.name)


def ruleworld_judge(seed: int | None = None) -> Judge:
  """Returns RuleWorld's classifier of responses under categories.

  Args:
    seed: None: to the letter. Else as one annotator with that seed calls it,
      unsure near the rule's border; the same question gets the same answer.
  """

  def judge(conversations: Sequence[Conversation], categories: Sequence[Category]) -> list[bool]:
    verdicts = []
    for conversation, category in zip(conversations, categories, strict=True):
      rule = read_rule(category)
      text = conversation[-1].content
      statements = _read_reply(text)
      if seed is None:
        verdicts.append(oracle.violates(rule, statements))
      else:
        key = f'{seed}\n{category.guideline}\n{text}'.encode()
        rng = random.Random(hashlib.sha256(key).digest())
        verdicts.append(rng.random() < oracle.fire_probability(rule, statements))
    return verdicts

  return judge


def truly_stricter(strict: Category, lenient: Category) -> bool:
  """Returns whether one RuleWorld category forbids strictly more."""
  return rules_lib.stricter(read_rule(strict), read_rule(lenient))


@functools.cache
def _rule_table() -> dict[str, rules_lib.Rule]:
  """Returns {guideline: rule}, for every guideline that RuleWorld words."""
  table = {}
  severities = tuple(rules_lib.SEVERITIES)
  # Each subcategory is forbidden, allowed, or not spoken of.
  treatments = list(itertools.product('fa-', repeat=len(severities)))
  for topic, wording, treated in itertools.product(
    lexicon.TOPICS, range(len(grammar.ALL_WORDINGS)), treatments
  ):
    forbidden, allowed = (tuple(i for i in severities if treated[i] == how) for how in 'fa')
    if forbidden or allowed:
      rule = rules_lib.Rule(topic.name, forbidden, allowed, wording)
      table[rule.category().guideline] = rule
  return table


# One reply is judged under hundreds of guidelines.
_read_reply = functools.lru_cache(maxsize=1 << 16)(grammar.read_reply)


def _topic(category: Category) -> lexicon.Topic:
  return lexicon.topic_named(read_rule(category).topic)


def _subcategory(topic: lexicon.Topic, severity: int) -> Category:
  name = topic.subcategories[severity].capitalize()
  return rules_lib.Rule(topic.name, (severity,), (), 0, name).category()


def _propose(rng: random.Random, request: requests.ProposeCategories) -> requests.Categories:
  # Only the topics of the rules and the statements matter to a proposal.
  rules = tuple(read_rule(c) for c in request.safety.categories)
  statements = _read_reply(request.conversation[-1].content)
  if not statements:
    raise NoReplyError('not_ruleworld')
  scene = conversations_lib.Scene(statements[0], statements, request.conversation)
  return requests.Categories(*examples.propose(rng, rules, scene))


def _add(request: requests.AddSubcategory) -> Category:
  topic = _topic(request.category)
  known = {name.lower() for name in request.known}
  statements = _read_reply(request.conversation[-1].content)
  for s in sorted(statements, key=lambda s: s.severity):
    name = topic.subcategories[s.severity]
    if s.engaged and s.topic == topic.name and name not in known:
      return _subcategory(topic, s.severity)
  raise NoReplyError('no_subcategory')
