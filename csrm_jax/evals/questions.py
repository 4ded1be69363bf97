"""What the suite `real` asks: texts that were judged under many rules, under one rule or a union.

A question is one prompt: a text, a rule in one of its wordings, and what people said. Which texts,
wordings and unions are asked follows from hashes and seeds, so that all models get the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.data import judged, sources
from csrm_jax.data.judged import Judged, Rule, side
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

Rules = Mapping[str, Rule]
# A text or pair under rules that have keys, or an example under rules of its own.
Item = Judged | Pair | Example
# The sets of which unions of rules are asked too: how many, of how many rules.
UNIONS = ('rbr_gold', 'moderation_judged')
NUM_UNIONS, UNION_SIZES = 200, (2, 3, 4)
# Sets of fewer rules are asked more of each.
_FEW_RULES = 6
# A prompt before texts of more groups is a form that says nothing of them.
_FORM = 5
SINGLE, UNION, SAFER, OTHER = 'single', 'union', 'safer', 'other'


@dataclasses.dataclass(frozen=True)
class Question:
  """One prompt and what is known of it.

  Attributes:
    example: The text under the rule or the union, labelled but for sides of pairs.
    rules: The keys of its rules.
    text: What all questions about one text share.
    group: See `Judged`.
    share: The share of people who say that the rule is broken; nan for a union or a pair.
    part: SINGLE, UNION, or the side of a pair, whose other side is the question beside it.
    is_held: Whether it is in words that no run trains on.
    is_seen: Whether the model was trained on all of its rules, in whatever words.
    stricter: The keys of the rules that forbid all that this one forbids.
    level: How many they are; -1 where neither it has such rules nor another has it as such.
  """

  example: Example
  rules: tuple[str, ...]
  text: str
  group: str
  share: float
  part: str
  is_held: bool
  is_seen: bool
  stricter: tuple[str, ...] = ()
  level: int = -1


def keys_of(item: Item) -> tuple[str, ...]:
  """Returns the keys of the rules that an item was judged under; those of its own have none."""
  if isinstance(item, Judged):
    return tuple(item.verdicts)
  return (item.safer.rule_set,) if isinstance(item, Pair) else ()


def is_never_trained(known: Rules) -> bool:
  """Returns whether no run trains on the set: all of its rules are unseen, or each row's own."""
  return all(rule.unseen == 'always' for rule in known.values())


def _texts_in(item: Item) -> list[tuple[Message, ...]]:
  sides = (item.safer, item.other) if isinstance(item, Pair) else (item,)
  return [side.conversation for side in sides]


def rules_of(
  items: Iterable[Item], known: Callable[[str], Rules] = judged.rules
) -> dict[str, Rule]:
  """Returns {key: rule} of the rules that the items were judged under.

  Args:
    known: Returns {key: rule} of a file of rules by its name, the first part of keys.
  """
  used = {key for item in items for key in keys_of(item)}
  files = sorted({key.partition('/')[0] for key in used})
  return {key: rule for name in files for key, rule in known(name).items() if key in used}


def on_side(items: Sequence[Item], known: Rules, which: str) -> list[Item]:
  """Returns the items of a side; those of a set that no run trains on are all 'dev' or 'test'."""
  sides = {which}
  if is_never_trained(known):
    sides = {'train': set(), 'dev': {'dev'}, 'test': {'train', 'test'}}[which]
  return [item for item in items if side(judged.group_of(item)) in sides]


def ask(
  name: str,
  items: Sequence[Item],
  known: Rules,
  *,
  seen: Collection[str] | None = None,
  max_rows: int = 0,
  union_texts: int = 1,
  num_unions: int | None = None,
) -> list[Question]:
  """Returns the questions about items of one set, those about one text beside each other.

  Args:
    items: Those of one side; see `on_side`.
    known: {key: rule} of the set.
    seen: The keys of the rules that the model was trained on; None for all.
    max_rows: How many texts are asked of each rule, or more in sets of few rules, up to six times
      as many; 0 for all. All rules take the texts in one order, which a hash gives, so that each
      keeps its natural rate and shares texts with others.
    union_texts: How many texts are asked of each union.
    num_unions: How many unions of rules; by default NUM_UNIONS for the sets of UNIONS.

  Raises:
    ValueError: A text was judged under a rule that is not known, or that has no wording.
  """
  items = sorted(items, key=lambda item: (sources.hash_unit(f'{name}\n{item.id}'), item.id))
  seen = set(known) if seen is None else seen
  texts = [item for item in items if isinstance(item, Judged)]
  _check(name, texts, known)
  max_rows = max(max_rows, _FEW_RULES * max_rows // max(len(known), 1))
  nested = {strict for rule in known.values() for strict in rule.stricter}
  asked, taken = [], dict.fromkeys(known, 0)
  for item in texts:
    for key in item.verdicts:
      if not max_rows or taken[key] < max_rows:
        taken[key] += 1
        asked.append(_single(name, item, known[key], key in seen, nested))
  pairs = [item for item in items if isinstance(item, Pair)]
  for pair in pairs[: max_rows or None]:
    asked += _sides(name, pair, any(key in seen for key in known))
  asked += _own(name, [item for item in items if isinstance(item, Example)], max_rows)
  if num_unions is None:
    num_unions = NUM_UNIONS if name in UNIONS else 0
  return asked + _unions(name, texts, known, seen, num_unions, union_texts)


def _check(name: str, texts: Sequence[Judged], known: Rules) -> None:
  for item in texts:
    for key in item.verdicts:
      if key not in known:
        raise ValueError(f'{name}: {item.id} was judged under {key!r}, which is no rule of the set')
      if not known[key].wordings and not known[key].held:
        raise ValueError(f'{name}: rule {key} has no wording; write one')


def negated(keys: Iterable[str]) -> dict[str, str]:
  """Returns {SET/must_X: SET/X} of rules that demand what another one forbids."""
  known = set(keys)
  plain = {key: key.replace('/must_', '/', 1) for key in known}
  return {key: other for key, other in plain.items() if other != key and other in known}


def _single(name: str, item: Judged, rule: Rule, is_seen: bool, nested: set[str]) -> Question:
  # Rules that lie within each other are asked about a text in words of one kind.
  chain = rule.stricter[-1] if rule.stricter else rule.key
  place = sources.hash_unit(f'wording\n{name}\n{item.id}\n{chain}')
  share = float(item.verdicts[rule.key])
  return _about(
    *(name, item, rule.key, {rule.key: word(rule, place)}, share >= 0.5),
    rule_set=rule.key,
    share=share,
    part=SINGLE,
    is_seen=is_seen,
    stricter=rule.stricter,
    level=len(rule.stricter) if rule.stricter or rule.key in nested else -1,
  )


def _about(
  name: str,
  item: Judged,
  what: str,
  worded: Mapping[str, tuple[Category, bool]],
  is_unsafe: bool,
  rule_set: str,
  **known: Any,
) -> Question:
  """Returns the question about a text; `worded` is {key: what `word` gives} of its rules."""
  example = Example(
    f'{name}/{item.id}/{what}',
    SafetyConfig(tuple(category for category, _ in worded.values())),
    item.conversation,
    'unsafe' if is_unsafe else 'safe',
    source=name,
    rule_set=rule_set,
  )
  return Question(
    example,
    tuple(worded),
    text=f'{name}/{item.id}',
    group=f'{name}/{item.group}',
    is_held=any(is_held for _, is_held in worded.values()),
    **known,
  )


def word(rule: Rule, place: float) -> tuple[Category, bool]:
  """Returns a wording, and whether it is a held one, by a place in [0, 1): half of them are."""
  kinds = [
    (texts, is_held) for texts, is_held in ((rule.wordings, False), (rule.held, True)) if texts
  ]
  kind, place = divmod(place * len(kinds), 1)
  texts, is_held = kinds[int(kind)]
  return texts[int(place * len(texts))], is_held


def _sides(name: str, pair: Pair, is_seen: bool) -> list[Question]:
  # Pairs bring their rules in words of their own.
  return [
    Question(
      dataclasses.replace(example, id=f'{name}/{pair.id}/{part}', source=name),
      (example.rule_set or name,),
      f'{name}/{pair.id}/{part}',
      f'{name}/{judged.group_of(pair)}',
      math.nan,
      part,
      False,
      is_seen,
    )
    for part, example in ((SAFER, pair.safer), (OTHER, pair.other))
  ]


def _own(name: str, items: Sequence[Example], max_rows: int) -> list[Question]:
  """Returns the questions of examples that bring their own rules, which no run trains on."""
  taken: dict[str, int] = {}
  asked = []
  for item in items:
    taken[item.rule_set] = taken.get(item.rule_set, 0) + 1
    if not max_rows or taken[item.rule_set] <= max_rows:
      example = dataclasses.replace(item, id=f'{name}/{item.id}', source=name)
      group = f'{name}/{judged.group_of(item)}'
      share = float(item.label == 'unsafe')
      keys = (f'{name}/{item.rule_set}',)
      asked.append(Question(example, keys, example.id, group, share, SINGLE, False, False))
  return asked


def _unions(
  name: str, texts: Sequence[Judged], known: Rules, seen: Collection[str], num: int, num_texts: int
) -> list[Question]:
  asked = []
  # What must be done is what else must not, and mostly broken.
  keys = {key for item in texts for key in item.verdicts}
  keys = sorted(keys - set(negated(keys)))
  for i in range(num if len(keys) >= max(UNION_SIZES) else 0):
    rng = np.random.default_rng([i, 0])
    drawn = [keys[j] for j in rng.permutation(len(keys))[: rng.choice(UNION_SIZES)]]
    place = rng.random()
    worded = {key: word(known[key], place) for key in drawn}
    names = {' '.join(category.name.split()).casefold() for category, _ in worded.values()}
    judged = [item for item in texts if all(key in item.verdicts for key in drawn)]
    # Two rules of one name make no rule set.
    if len(names) < len(drawn) or not judged:
      continue
    for j in rng.permutation(len(judged))[:num_texts]:
      is_unsafe = any(judged[j].verdicts[key] >= 0.5 for key in drawn)
      asked.append(
        _about(
          *(name, judged[j], f'union{i}', worded, is_unsafe),
          rule_set=f'{name}/union{i}',
          share=math.nan,
          part=UNION,
          is_seen=all(key in seen for key in drawn),
        )
      )
  return asked


def num_shared(asked: Sequence[Question], train: Iterable[Item]) -> int:
  """Returns how many of the texts asked about have their text, or their prompt, in training.

  A prompt that stands before texts of many groups, such as "Write a comment.", is none.
  """
  known: dict[tuple[str, ...], set[str]] = {}
  for item in train:
    for talk in _texts_in(item):
      for text in _texts(talk):
        known.setdefault(text, set()).add(judged.group_of(item))
  shared = {text for text, groups in known.items() if len(groups) <= _FORM}
  found = {q.text: not shared.isdisjoint(_texts(q.example.conversation)) for q in asked}
  return sum(found.values())


def _texts(conversation: Sequence[Message]) -> list[tuple[str, ...]]:
  said = tuple(' '.join(message.content.casefold().split()) for message in conversation)
  # A prompt is what stands before what is judged.
  return [('text', *said), *([('prompt', *said[:-1])] if any(said[:-1]) else [])]


def in_order(asked: Sequence[Question], score: Callable[..., np.ndarray], order: str) -> np.ndarray:
  """Returns the scores of one call, which gets what begins alike beside each other.

  Args:
    score: Examples -> scores, [N] nats.
    order: What prompts begin with: 'rules_first' or 'conversation_first'.
  """
  rows = list(range(len(asked)))
  if order == 'rules_first':
    rows.sort(key=lambda i: asked[i].example.safety.digest())
  scores = np.empty(len(rows))
  scores[rows] = score([asked[i].example for i in rows])
  return scores
