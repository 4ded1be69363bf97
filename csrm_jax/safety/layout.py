"""What a prompt of a judgement is made of, and which layout it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal['control', 'rules', 'history', 'response']
FORMATS = ('csrm', 'llama_guard_3', 'llama_guard_3_user', 'shield_gemma', 'shield_gemma_user')
ORDERS = ('rules_first', 'conversation_first')
WORDS = ('safe', 'unsafe')


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
  """A piece of the prompt, and who wrote it.

  Attributes:
    text: the piece.
    kind: 'control' for the template, 'rules', 'history', or 'response' for
      the message that is judged.
  """

  text: str
  kind: Kind


@dataclasses.dataclass(frozen=True)
class Layout:
  """All that the text of a prompt depends on besides its content.

  Attributes:
    format: one of FORMATS: 'csrm' is ours, the others are those of published
      guard models and fix everything below.
    order: 'rules_first' or 'conversation_first'; what comes first is a prefix
      that judgements share.
    words: the word for "safe" and the word for "unsafe" that the closing
      question names.
    chat_prefix: what opens the user's turn in the backbone's own chat
      template, without a begin-of-text token.
    chat_suffix: what closes that turn and opens the assistant's, whose first
      token is the verdict; '' for backbones without a chat template.
  """

  format: str = 'csrm'
  order: str = ORDERS[0]
  words: tuple[str, str] = WORDS
  chat_prefix: str = ''
  chat_suffix: str = ''

  def __post_init__(self):
    if self.format not in FORMATS:
      raise ValueError(f'unknown format {self.format!r}; use one of {", ".join(FORMATS)}')
    if self.order not in ORDERS:
      raise ValueError(f'unknown order {self.order!r}; use "rules_first" or "conversation_first"')
    _check_words(self.words)
    if self.chat_prefix and not self.chat_suffix:
      raise ValueError(
        f'the chat prefix {self.chat_prefix!r} has no suffix to open the'
        " assistant's turn; give both or none"
      )
    changed = [
      field.name
      for field in dataclasses.fields(self)[1:]
      if getattr(self, field.name) != field.default
    ]
    if self.format != 'csrm' and changed:
      raise ValueError(
        f'the format {self.format!r} has its own {changed[0]}; leave that setting as it is'
      )

  @classmethod
  def from_dict(cls, obj: Mapping[str, Any]) -> Layout:
    """Returns the layout that dataclasses.asdict made a dict, or JSON, of.

    Raises:
      ValueError: a field is missing, unknown, or has no possible value.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for name in sorted(known ^ set(obj)):
      raise ValueError(f'layout: the field {name!r} is {"missing" if name in known else "unknown"}')
    return cls(**{**obj, 'words': tuple(obj['words'])})


def _check_words(words: tuple[str, str]) -> None:
  if len(words) != 2 or len(set(words)) != 2:
    raise ValueError(
      f'the verdict words are {words!r}; give two different ones, for "safe" and for "unsafe"'
    )
  for word in words:
    if not word.isalnum():
      raise ValueError(
        f'the verdict word {word!r} is not one word of letters; the question'
        ' names it, as in "Answer safe or unsafe."'
      )


DEFAULT = Layout()
