"""Parts of a report in Markdown.

Text from data, configs or users is escaped, so that it can neither make markup nor break a
table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

NONE = '–'  # not known, or not defined


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
  """Returns a Markdown table; the cells must be escaped already, or numbers."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def escape(text: Any) -> str:
  """Returns the text on one line, with nothing left that Markdown acts on."""
  return re.sub(r'([\\`*_\[\]<>|#~&$!])', r'\\\1', ' '.join(str(text).split()))


def short(text: str, length: int) -> str:
  """Returns the text on one line, cut to a length."""
  text = ' '.join(text.split())
  return text if len(text) <= length else text[: length - 1] + '…'


class Markdown(str):
  """Text of ours that is Markdown already, so that a table shows it as it is."""


def code(text: Any) -> str:
  """Returns the text on one line, as code."""
  # Within code a backslash escapes nothing, so back-ticks become quotes; tables still need it
  # before '|'.
  return '`' + ' '.join(str(text).split()).replace('`', "'").replace('|', '\\|') + '`'


def number(value: Any) -> str:
  """Returns the value with three decimals, or a dash if it is missing or not finite."""
  return f'{value:.3f}' if is_number(value) else NONE


def is_number(value: Any) -> bool:
  """Returns whether the value is a finite number."""
  is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_real and math.isfinite(value)
