"""What the suite `real` asks: texts that were judged under many rules, under one rule or a union.

A question is one prompt: a text, a rule in one of its wordings, and what people said. Which texts,
wordings and unions are asked follows from hashes and seeds, so that all models get the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from csrm_jax.data import judged, sources
from csrm_jax.data.judged import Judged, Rule, side
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

Rules = Mapping[str, Rule]
# The sets of which unions of rules are asked too, and how many unions of how many texts each.
UNIONS = ('rbr_gold', 'moderation_judged')
NUM_UNIONS, UNION_TEXTS, UNION_SIZES = 200, 3, (2, 3, 4)
# Rows of one rule that are asked; sets with fewer are asked in full.
MAX_ROWS = {'dev': 100, 'test': 150}
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
    is_seen: Whether runs of this fold train on all of its rules.
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


def group_of(item: Judged | Pair) -> str:
  """Returns the group of a text, or of a pair: its prompt."""
  if isinstance(item, Judged):
    return item.group
  talk = item.safer.conversation  # As in draws.split.
  return talk[-2].content if len(talk) > 1 else talk[-1].content


def is_never_trained(items: Iterable[Judged | Pair], known: Rules) -> bool:
  """Returns whether no run trains on the set: all of its rules are unseen."""
  used = {key for item in items for key in keys_of(item)} & set(known)
  return bool(used) and all(known[key].unseen == 'always' for key in used)


def keys_of(item: Judged | Pair) -> tuple[str, ...]:
  """Returns the keys of the rules that a text, or a pair, was judged under."""
  return tuple(item.verdicts) if isinstance(item, Judged) else (item.safer.rule_set,)


def rules_of(
  items: Iterable[Judged | Pair], known: Callable[[str], Rules] = judged.rules
) -> dict[str, Rule]:
  """Returns {key: rule} of the rules that the items were judged under.

  Args:
    known: Returns {key: rule} of a file of rules by its name, the first part of keys.
  """
  used = {key for item in items for key in keys_of(item) if key}
  files = sorted({key.partition('/')[0] for key in used})
  return {key: rule for name in files for key, rule in known(name).items() if key in used}


def on_side(items: Sequence[Judged | Pair], known: Rules, which: str) -> list[Judged | Pair]:
  """Returns the items of a side; those of a set that no run trains on are all 'dev' or 'test'."""
  sides = {which}
  if is_never_trained(items, known):
    sides = {'train': set(), 'dev': {'dev'}, 'test': {'train', 'test'}}[which]
  return [item for item in items if side(group_of(item)) in sides]


def ask(
  name: str,
  items: Sequence[Judged | Pair],
  known: Rules,
  *,
  fold: str = '',
  max_rows: int = 0,
  num_unions: int | None = None,
) -> list[Question]:
  """Returns the questions about items of one set, those about one text beside each other.

  Args:
    items: Those of one side; see `on_side`.
    known: {key: rule} of the set.
    fold: See `Rule`.
    max_rows: How many texts are asked of each rule; 0 for all. All rules take the texts in one
      order, which a hash gives, so that each keeps its natural rate and shares texts with others.
    num_unions: How many unions of rules; by default NUM_UNIONS for the sets of UNIONS.

  Raises:
    ValueError: A text was judged under a rule that is not known, or that has no wording.
  """
  items = sorted(items, key=lambda item: (sources.hash_unit(f'{name}\n{item.id}'), item.id))
  texts = [item for item in items if isinstance(item, Judged)]
  _check(name, texts, known)
  nested = {strict for rule in known.values() for strict in rule.stricter}
  asked, taken = [], dict.fromkeys(known, 0)
  for item in texts:
    for key in item.verdicts:
      if not max_rows or taken[key] < max_rows:
        taken[key] += 1
        asked.append(_single(name, item, known[key], fold, nested))
  pairs = [item for item in items if isinstance(item, Pair)]
  for pair in pairs[: max_rows or None]:
    asked += _sides(name, pair, known, fold)
  if num_unions is None:
    num_unions = NUM_UNIONS if name in UNIONS else 0
  return asked + _unions(name, texts, known, fold, num_unions)


def _check(name: str, texts: Sequence[Judged], known: Rules) -> None:
  for item in texts:
    for key in item.verdicts:
      if key not in known:
        raise ValueError(f'{name}: {item.id} was judged under {key!r}, which is no rule of the set')
      if not known[key].wordings and not known[key].held:
        raise ValueError(f'{name}: rule {key} has no wording; write one')


def _single(name: str, item: Judged, rule: Rule, fold: str, nested: set[str]) -> Question:
  # Rules that lie within each other are asked about a text in words of one kind.
  chain = rule.stricter[-1] if rule.stricter else rule.key
  place = sources.hash_unit(f'wording\n{name}\n{item.id}\n{chain}')
  category, is_held = word(rule, place)
  share = float(item.verdicts[rule.key])
  return Question(
    _example(
      f'{name}/{item.id}/{rule.key}', (category,), item.conversation, share >= 0.5, name, rule.key
    ),
    (rule.key,),
    f'{name}/{item.id}',
    f'{name}/{item.group}',
    share,
    SINGLE,
    is_held,
    rule.is_seen(fold),
    rule.stricter,
    len(rule.stricter) if rule.stricter or rule.key in nested else -1,
  )


def word(rule: Rule, place: float) -> tuple[Category, bool]:
  """Returns a wording, and whether it is a held one, by a place in [0, 1): half of them are."""
  kinds = [
    (texts, is_held) for texts, is_held in ((rule.wordings, False), (rule.held, True)) if texts
  ]
  kind, place = divmod(place * len(kinds), 1)
  texts, is_held = kinds[int(kind)]
  return texts[int(place * len(texts))], is_held


def _example(
  example_id: str,
  categories: tuple[Category, ...],
  conversation: tuple[Message, ...],
  is_unsafe: bool,
  name: str,
  rule_set: str,
) -> Example:
  return Example(
    example_id,
    SafetyConfig(categories),
    conversation,
    'unsafe' if is_unsafe else 'safe',
    source=name,
    rule_set=rule_set,
  )


def _sides(name: str, pair: Pair, known: Rules, fold: str) -> list[Question]:
  key = pair.safer.rule_set
  # Pairs bring their rules in words of their own.
  rules = [known[key]] if key in known else list(known.values())
  is_seen = not rules or any(rule.is_seen(fold) for rule in rules)
  group = f'{name}/{group_of(pair)}'
  return [
    Question(
      dataclasses.replace(example, id=f'{name}/{pair.id}/{part}', source=name),
      (key or name,),
      f'{name}/{pair.id}/{part}',
      group,
      math.nan,
      part,
      False,
      is_seen,
    )
    for part, example in ((SAFER, pair.safer), (OTHER, pair.other))
  ]


def _unions(
  name: str, texts: Sequence[Judged], known: Rules, fold: str, num: int
) -> list[Question]:
  asked = []
  keys = sorted({key for item in texts for key in item.verdicts})
  for i in range(num if len(keys) >= max(UNION_SIZES) else 0):
    rng = np.random.default_rng([i, 0])
    drawn = [keys[j] for j in rng.permutation(len(keys))[: rng.choice(UNION_SIZES)]]
    place = rng.random()
    worded = [word(known[key], place) for key in drawn]
    categories = tuple(category for category, _ in worded)
    names = {' '.join(category.name.split()).casefold() for category in categories}
    judged = [item for item in texts if all(key in item.verdicts for key in drawn)]
    # Two rules of one name make no rule set.
    if len(names) < len(drawn) or not judged:
      continue
    for j in rng.permutation(len(judged))[:UNION_TEXTS]:
      item = judged[j]
      is_unsafe = any(item.verdicts[key] >= 0.5 for key in drawn)
      asked.append(
        Question(
          _example(
            f'{name}/{item.id}/union{i}',
            categories,
            item.conversation,
            is_unsafe,
            name,
            f'{name}/union{i}',
          ),
          tuple(drawn),
          f'{name}/{item.id}',
          f'{name}/{item.group}',
          math.nan,
          UNION,
          any(is_held for _, is_held in worded),
          all(known[key].is_seen(fold) for key in drawn),
        )
      )
  return asked


def num_shared(asked: Sequence[Question], train: Iterable[Judged | Pair]) -> int:
  """Returns how many of the texts asked about have their text, or their prompt, in training."""
  known: set[tuple[str, ...]] = set()
  for item in train:
    sides = [item] if isinstance(item, Judged) else [item.safer, item.other]
    known.update(text for one in sides for text in _texts(one.conversation))
  found = {q.text: any(text in known for text in _texts(q.example.conversation)) for q in asked}
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
