"""What readers of data return: lists that know what was left out, and their parts."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from csrm_jax.safety.schema import Example, Message, Pair

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

  The side follows from a hash of the seed and of what `conversation_keys` says, and not from the
  item's place: no conversation is on both sides, whatever its responses and rules, and a data set
  that grows leaves older items where they were.
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'fraction is {fraction}; it must be from 0 to 1')
  halves: tuple[list[Item], list[Item]] = ([], [])
  for item, key in zip(items, conversation_keys(items), strict=True):
    halves[hash_unit(f'{seed}\n{key}') < fraction].append(item)
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
  """Returns how many of the items have a conversation that is among the others."""
  keys = conversation_keys([*items, *others])
  known = set(keys[len(items) :])
  return sum(key in known for key in keys[: len(items)])


def conversation_keys(items: Sequence[Any]) -> list[str]:
  """Returns the name of each item's conversation; rows of one are split, and drawn, together.

  Items are examples, pairs and texts judged under many rules, which name their own `group`. A
  conversation is what stands before the judged response, in which letter case and white space do
  not count: answers to one prompt depend on each other. It is the whole text where nothing stands
  before it, or the same before every item, as a form does.
  """
  keys = [_before(item) for item in items]
  if len(set(keys)) > 1:
    return [key or _whole(item) for key, item in zip(keys, items, strict=True)]
  return [_whole(item) for item in items]


def _before(item: Any) -> str:
  if hasattr(item, 'group'):
    return ' '.join(item.group.casefold().split())
  messages = _conversation(item)[:-1]
  return _text(messages) if any(message.content.strip() for message in messages) else ''


def _whole(item: Any) -> str:
  return _before(item) if hasattr(item, 'group') else _text(_conversation(item))


def _conversation(item: Example | Pair) -> Sequence[Message]:
  return item.conversation if isinstance(item, Example) else item.safer.conversation


def _text(conversation: Sequence[Message]) -> str:
  return json.dumps([[m.role, *m.content.casefold().split()] for m in conversation])
