"""What readers of data return: lists that know what was left out, and their parts."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from csrm_jax.safety.schema import Example, Message

Item = TypeVar('Item')  # an example, a pair, or a text judged under many rules
T = TypeVar('T')


class Rows(list):
  """A list of examples or pairs; `drops` counts the rows that gave none, by reason."""

  def __init__(self, items: Iterable = (), drops: Mapping[str, int] | None = None):
    super().__init__(items)
    self.drops = dict(drops or {})

  def drop(self, reason: str) -> None:
    """Counts one row that was left out."""
    self.drops[reason] = self.drops.get(reason, 0) + 1


TRAINING_LENGTH = 1_000_000  # examples of one epoch; far more than a run sees


@dataclasses.dataclass(frozen=True)
class Generated:
  """A sequence whose element i is make(seed, i); nothing is stored."""

  make: Callable[[int, int], Any]
  seed: int
  length: int = TRAINING_LENGTH

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Any:
    if not 0 <= index < self.length:
      raise IndexError(f'index {index} is not in [0, {self.length})')
    return self.make(self.seed, int(index))


def join(parts: Iterable[Rows]) -> Rows:
  """Returns the rows of all parts, one after the other, and all their drops."""
  joined, drops = Rows(), collections.Counter()
  for part in parts:
    joined += part
    drops.update(part.drops)
  joined.drops = dict(drops)
  return joined


def check_ids(items: Iterable[Any], where: Any) -> None:
  """Checks that no two items have one id: results are joined by it."""
  seen = set()
  for item in items:
    if item.id in seen:
      raise ValueError(f'{where}: two rows have the id {item.id!r}; give each its own')
    seen.add(item.id)


def digest(items: Iterable[Any]) -> str:
  """Returns the sha256 (hex) of all that items hold, in their order."""
  content = hashlib.sha256()
  for item in items:
    content.update(json.dumps(item.to_dict()).encode())
  return content.hexdigest()


# --- Parts of a data set -----------------------------------------------------------------


def split(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
  """Returns (rest, held out), with about `fraction` of the items held out.

  The side follows from a hash of the seed and the conversation's text (of a judged text: its
  group), in which letter case and white space do not count. It does not depend on the item's
  place: no text is on both sides, under whatever rules, and a data set that grows leaves older
  items where they were.
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'fraction is {fraction}; it must be from 0 to 1')
  halves: tuple[list[Item], list[Item]] = ([], [])
  for item in items:
    halves[hash_unit(f'{seed}\n{_split_text(item)}') < fraction].append(item)
  return halves


def hash_unit(text: str) -> float:
  """Returns a number in [0, 1) that follows from the text: on which side of a split it is."""
  digest = hashlib.sha256(text.encode('utf-8', 'backslashreplace')).digest()
  return int.from_bytes(digest[:7], 'big') / 2**56


def spread(items: Sequence[T], num: int) -> list[T]:
  """Returns at most `num` of the items, evenly spread."""
  num = min(num, len(items))
  return [items[i * len(items) // num] for i in range(num)]


def num_shared(items: Sequence[Item], others: Sequence[Item]) -> int:
  """Returns how many of the items have a text that is among the others, as `split` sees it."""
  texts = {_split_text(item) for item in others}
  return sum(_split_text(item) in texts for item in items)


def _split_text(item: Any) -> str:
  # What was judged under many rules says itself which rows belong together.
  if hasattr(item, 'group'):
    return ' '.join(item.group.casefold().split())
  if isinstance(item, Example):
    return _text(item.conversation)
  if item.safer.conversation == item.other.conversation:
    return _text(item.safer.conversation)
  # Two responses: without them, all pairs of one prompt are on one side.
  return _text(item.safer.conversation[:-1])


def _text(conversation: Sequence[Message]) -> str:
  return json.dumps([[m.role, *m.content.casefold().split()] for m in conversation])
