"""Conversations and examples, checked on entry.

An example is one line of a JSONL file. `label` is "safe", "unsafe" or null;
`safety` is an object as in a configuration file, or the path of such a file;
`label` and whatever follows it are optional:

  {"id": "1", "safety": {"categories": [{"name": ..., "guideline": ...}]},
   "conversation": [{"role": "user", "content": "..."},
                    {"role": "agent", "content": "..."}],
   "label": "unsafe", "violated": ["Credentials"],
   "plus": {"name": ..., "guideline": ...}, "minus": null,
   "probability": 0.9, "source": "...", "rule_set": "..."}

A pair is {"id", "kind", "safer": example, "other": example}.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.safety import checks
from csrm_jax.safety.checks import show
from csrm_jax.safety.config import Category, SafetyConfig, load_safety, parse_category, parse_safety

__all__ = [
  'LABELS',
  'Category',
  'Example',
  'Message',
  'Pair',
  'SafetyConfig',
  'check_conversation',
  'load_safety',
  'parse_conversation',
  'parse_safety',
]

LABELS = ('safe', 'unsafe')
ROLES = ('user', 'agent')
PAIR_KINDS = ('strictness', 'preference')
EXAMPLE_COLUMNS = (
  'id',
  'safety',
  'conversation',
  'label',
  'violated',
  'plus',
  'minus',
  'probability',
  'source',
  'rule_set',
)
REQUIRED_COLUMNS = ('id', 'safety', 'conversation')


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
  """One turn of a conversation; role is 'user' or 'agent'."""

  role: str
  content: str

  def __post_init__(self):
    if self.role not in ROLES:
      raise ValueError(f'unknown role {show(self.role)}; use "user" or "agent"')
    checks.check_text(self.content, 'message content', empty_ok=True)

  def to_dict(self) -> dict[str, str]:
    """Returns {"role", "content"}."""
    return {'role': self.role, 'content': self.content}


@dataclasses.dataclass(frozen=True)
class Example:
  """One judged response: rules, a conversation, and what is known of both.

  Attributes:
    id: names the example in errors and reports.
    safety: the rules in force.
    conversation: ends with the agent message that is judged.
    label: 'safe', 'unsafe', or None where nobody labelled it.
    violated: names of the categories under which it was labelled unsafe;
      empty where there are none or they are unknown.
    plus: a category not in `safety` that would make the response unsafe.
    minus: a category not in `safety` that would leave the label as it is.
    probability: the true P(unsafe), where it is known.
    source: the data set it comes from.
    rule_set: the group of rules it is reported under.
  """

  id: str
  safety: SafetyConfig
  conversation: tuple[Message, ...]
  label: str | None = None
  violated: tuple[str, ...] = ()
  plus: Category | None = None
  minus: Category | None = None
  probability: float | None = None
  source: str = ''
  rule_set: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'conversation', tuple(self.conversation))
    object.__setattr__(self, 'violated', tuple(self.violated))
    check_conversation(self.conversation)
    if self.label is not None and self.label not in LABELS:
      raise ValueError(f'unknown label {show(self.label)}; use "safe", "unsafe" or null')
    if self.violated:
      self._check_violated()
    p = self.probability
    if p is not None and not (_is_number(p) and 0 <= p <= 1):
      raise ValueError(f'probability is {show(p)}; it is P(unsafe), a number from 0 to 1')

  def _check_violated(self):
    names = self.safety.names
    for name in self.violated:
      if name not in names:
        raise ValueError(
          f'violated category {show(name)} is not in the safety configuration'
          f'{checks.hint(name, names)}; name one of its categories'
        )
    if self.label == 'safe':
      raise ValueError(
        f'the label is "safe" but "violated" names {show(self.violated[0])};'
        ' empty "violated" or correct the label'
      )

  @staticmethod
  def from_dict(
    obj: Any,
    where: str,
    *,
    safety: SafetyConfig | None = None,
    root: str | os.PathLike = '.',
    required: Sequence[str] = REQUIRED_COLUMNS,
  ) -> Example:
    """Returns the example in one JSONL row.

    Args:
      obj: the row. Columns that are not in the schema are ignored, except
        near misspellings of those that are.
      where: file and line, for errors.
      safety: the rules of a row that brings none.
      root: the folder that a path in the row's `safety` is relative to.
      required: the columns that must be there; add 'label' for training.

    Raises:
      ValueError: one line with `where`, the value and the fix.
    """
    if safety is not None:
      required = [column for column in required if column != 'safety']
    checks.check_columns(obj, where, EXAMPLE_COLUMNS, required)
    try:
      return Example(
        id=_parse_id(obj.get('id', where)),
        safety=_parse_rules(obj.get('safety'), safety, root),
        conversation=parse_conversation(obj.get('conversation')),
        label=obj.get('label'),
        violated=_parse_names(obj.get('violated')),
        plus=_parse_optional_category(obj.get('plus'), 'plus'),
        minus=_parse_optional_category(obj.get('minus'), 'minus'),
        probability=obj.get('probability'),
        source=_parse_word(obj.get('source'), 'source'),
        rule_set=_parse_word(obj.get('rule_set'), 'rule_set'),
      )
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None

  def to_dict(self) -> dict[str, Any]:
    """Returns the JSONL row that `from_dict` reads."""
    return {
      'id': self.id,
      'safety': self.safety.to_dict(),
      'conversation': [message.to_dict() for message in self.conversation],
      'label': self.label,
      'violated': list(self.violated),
      'plus': self.plus and self.plus.to_dict(),
      'minus': self.minus and self.minus.to_dict(),
      'probability': self.probability,
      'source': self.source,
      'rule_set': self.rule_set,
    }


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two examples of which `safer` should score higher.

  kind 'strictness': one conversation, `safer` under the more lenient rules;
  kind 'preference': one set of rules, `safer` has the safer response.
  """

  id: str
  safer: Example
  other: Example
  kind: str

  def __post_init__(self):
    if self.kind not in PAIR_KINDS:
      raise ValueError(f'unknown pair kind {show(self.kind)}; use "strictness" or "preference"')

  @staticmethod
  def from_dict(
    obj: Any, where: str, *, safety: SafetyConfig | None = None, root: str | os.PathLike = '.'
  ) -> Pair:
    """Returns the pair in one JSONL row; see `Example.from_dict`."""
    columns = ('id', 'kind', 'safer', 'other')
    checks.check_columns(obj, where, columns, columns)
    sides = {
      side: Example.from_dict(
        obj[side], f'{where}: {side}', safety=safety, root=root, required=('safety', 'conversation')
      )
      for side in ('safer', 'other')
    }
    try:
      return Pair(id=_parse_id(obj['id']), kind=obj['kind'], **sides)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None

  def to_dict(self) -> dict[str, Any]:
    """Returns the JSONL row that `from_dict` reads."""
    return {
      'id': self.id,
      'kind': self.kind,
      'safer': self.safer.to_dict(),
      'other': self.other.to_dict(),
    }


def check_conversation(conversation: Sequence[Message]) -> None:
  """Checks that the conversation ends with an agent message to judge.

  Raises:
    ValueError: it is empty, or ends with somebody else.
  """
  if not conversation:
    raise ValueError(
      'the conversation is empty; it needs at least the agent message that is judged'
    )
  if conversation[-1].role != 'agent':
    raise ValueError(
      f'the conversation ends with role {show(conversation[-1].role)}; end it'
      ' with the agent message that is judged'
    )


def parse_conversation(obj: Any) -> tuple[Message, ...]:
  """Returns the messages in [{"role": ..., "content": ...}, ...].

  Raises:
    ValueError: one line that names the message, the value and the fix.
  """
  if not isinstance(obj, (list, tuple)):
    raise ValueError(
      f'"conversation" is {show(obj)}; write a list of messages with "role" and "content"'
    )
  messages = []
  for i, item in enumerate(obj):
    if not isinstance(item, Mapping) or not {'role', 'content'} <= set(item):
      raise ValueError(
        f'message {i + 1} is {show(item)}; write an object with "role" and "content"'
      )
    try:
      messages.append(Message(item['role'], item['content']))
    except ValueError as error:
      raise ValueError(f'message {i + 1}: {error}') from None
  return tuple(messages)


def _parse_rules(obj: Any, default: SafetyConfig | None, root: str | os.PathLike) -> SafetyConfig:
  if isinstance(obj, str):
    path = pathlib.Path(root) / obj
    try:
      return _load_cached(os.fspath(path), path.stat().st_mtime_ns)
    except OSError as error:
      raise ValueError(
        f'safety: {path} cannot be read ({error.strerror}); check the path'
      ) from None
  if obj is None and default is not None:
    return default
  return parse_safety(obj, 'safety')


@functools.lru_cache(maxsize=256)
def _load_cached(path: str, mtime_ns: int) -> SafetyConfig:
  # Many rows name one file; the time stamp notices an edited one.
  del mtime_ns
  return load_safety(path)


def _parse_id(value: Any) -> str:
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return checks.check_text(value, '"id"')


def _parse_word(value: Any, what: str) -> str:
  if value is None:
    return ''
  return checks.check_text(value, f'"{what}"', empty_ok=True)


def _parse_names(value: Any) -> tuple[str, ...]:
  if value is None:
    return ()
  if not isinstance(value, (list, tuple)):
    raise ValueError(f'"violated" is {show(value)}; write a list of category names')
  return tuple(value)


def _parse_optional_category(value: Any, what: str) -> Category | None:
  return None if value is None else parse_category(value, f'"{what}"')


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
