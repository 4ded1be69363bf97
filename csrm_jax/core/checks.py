"""Reading files and checking values, with errors of one line.

Each error names the place, the value, the constraint and the fix.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml


def show(value: Any) -> str:
  """Returns `value` on one line, shortened, for an error message."""
  if isinstance(value, (Mapping, list, tuple)):
    return f'a {type(value).__name__} of {len(value)}'
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:40]}... ({len(text)} long)'


def hint(word: Any, known: Sequence[str], cutoff: float = 0.75) -> str:
  """Returns '; did you mean "x"?' for a near miss of a known word, or ''."""
  if not isinstance(word, str):
    return ''
  near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
  return f'; did you mean {show(near[0])}?' if near else ''


def check_text(value: Any, what: str, *, empty_ok: bool = False) -> str:
  """Returns `value` if it is text that can be written as UTF-8.

  Raises:
    ValueError: it is not a string, it is blank, or it holds half of a
      surrogate pair (as the JSON escape "\\ud800" gives).
  """
  if not isinstance(value, str):
    raise ValueError(f'{what} is {show(value)}, not text; put it in quotes')
  if not empty_ok and not value.strip():
    raise ValueError(f'{what} is empty; write it or remove the entry')
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f'{what} holds the lone surrogate {value[error.start]!r} at character'
        f' {error.start}; replace it with a whole character'
      ) from None
  return value


def check_columns(obj: Any, where: str, known: Sequence[str], required: Sequence[str]) -> None:
  """Checks the columns of one row.

  Raises:
    ValueError: the row is no object, a required column is missing, or a
      column looks like a misspelling of a known one that is not there.
  """
  if not isinstance(obj, Mapping):
    raise ValueError(
      f'{where}: the row is {show(obj)}; write an object with the columns {", ".join(required)}'
    )
  for column in required:
    if column not in obj:
      found = ', '.join(map(str, obj)) or 'none'
      raise ValueError(f'{where}: column "{column}" is missing (found: {found[:200]}); add it')
  absent = [column for column in known if column not in obj]
  for column in obj:
    if column not in known and (meant := hint(column, absent)):
      raise ValueError(f'{where}: unknown column {show(column)}{meant} rename or remove it')


def read_text(path: str | os.PathLike) -> str:
  """Returns the text of a UTF-8 file (plain or .gz), without a byte order mark.

  Raises:
    ValueError: the file cannot be read, is cut short, or is not UTF-8.
  """
  try:
    data = pathlib.Path(path).read_bytes()
    if pathlib.Path(path).suffix == '.gz':
      data = gzip.decompress(data)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f'{path}: not a complete gzip file ({error}); fetch or write it again'
    ) from None
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror}); check the path') from None
  try:
    return data.decode().removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise ValueError(
      f'{path}:{line}: byte 0x{data[error.start]:02x} is not valid UTF-8; save the file as UTF-8'
    ) from None


def load_json(text: str, where: str) -> Any:
  """Returns the JSON value; a repeated key is an error, not an override."""
  try:
    return json.loads(text, object_pairs_hook=unique_keys(where))
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{where}:{error.lineno}: not valid JSON ({error.msg} at column'
      f' {error.colno}); correct or complete it'
    ) from None
  except RecursionError:
    raise ValueError(f'{where}: nested too deeply; flatten it') from None


def unique_keys(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
  """Returns an object_pairs_hook of json.loads that refuses repeated keys.

  json keeps the last of two equal keys: a rule or a label would vanish in
  silence.
  """

  def make(items: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(items)
    if len(obj) < len(items):
      keys = [key for key, _ in items]
      repeated = next(k for i, k in enumerate(keys) if k in keys[:i])
      raise ValueError(
        f'{where}: the key {show(repeated)} is given twice in one object; remove one'
      )
    return obj

  return make


def load_yaml(text: str, where: str, items: str) -> tuple[Any, list[int]]:
  """Returns the YAML value, and the line of each entry of its list `items`.

  Raises:
    ValueError: not YAML, or one mapping gives a key twice.
  """
  try:
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
      return None, []
    _check_unique_keys(node, where)
    return _construct(loader, node, where), _item_lines(node, items)
  except yaml.MarkedYAMLError as error:
    mark = error.problem_mark or error.context_mark
    at = f'{where}:{mark.line + 1}' if mark else where
    raise ValueError(
      f'{at}: not valid YAML ({error.problem}); correct the indentation, or'
      ' quote text that holds ": " or starts with a special character'
    ) from None
  except yaml.YAMLError as error:
    reason = getattr(error, 'reason', None) or 'unreadable'
    raise ValueError(f'{where}: not valid YAML ({reason}); remove control characters') from None
  except RecursionError:
    raise ValueError(f'{where}: nested too deeply; flatten it') from None


def _construct(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
  try:
    return loader.construct_document(node)
  except ValueError as error:  # a date that is none, for example
    raise ValueError(
      f'{where}: not valid YAML ({error}); quote text that looks like a date or a number'
    ) from None


def _check_unique_keys(node: yaml.Node, where: str) -> None:
  # PyYAML keeps the last of two equal keys: a rule would vanish in silence.
  todo, done = [node], set()
  while todo:
    node = todo.pop()
    if id(node) in done:
      continue
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
      todo.extend(node.value)
    elif isinstance(node, yaml.MappingNode):
      keys = set()
      for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
          if key.value in keys:
            raise ValueError(
              f'{where}:{key.start_mark.line + 1}: the key {show(key.value)}'
              ' is given twice in one mapping; remove one'
            )
          keys.add(key.value)
        todo.append(value)


def _item_lines(node: yaml.Node, items: str) -> list[int]:
  if isinstance(node, yaml.MappingNode):
    for key, value in node.value:
      if key.value == items and isinstance(value, yaml.SequenceNode):
        return [item.start_mark.line + 1 for item in value.value]
  return []
