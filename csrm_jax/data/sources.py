"""Data sets as lists of examples or pairs, read from local files.

The project's own form is one JSON object a line, an `Example` or a `Pair` as
documented in `csrm_jax.safety.schema`; Parquet files have the same columns.
The readers of public data sets are in `csrm_jax.data.public`, and are named
here too. A reader refuses what it does not know (labels, columns) with file
and line; rows that are well-formed but of no use are left out and counted in
the result's `drops`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from csrm_jax.core import files
from csrm_jax.core.files import unique_keys
from csrm_jax.data import rows
from csrm_jax.data.public import read_hh_pairs, read_moderation, read_moderation_pairs, read_xstest
from csrm_jax.data.rows import Rows
from csrm_jax.safety.schema import Example, Message, Pair, SafetyConfig

__all__ = [
  'Rows',
  'read_hh_pairs',
  'read_jsonl',
  'read_moderation',
  'read_moderation_pairs',
  'read_parquet',
  'read_xstest',
  'split',
]

_NESTED = ('safety', 'conversation', 'plus', 'minus', 'safer', 'other')

Item = TypeVar('Item', Example, Pair)


def read_jsonl(
  path: str | os.PathLike, safety: SafetyConfig | None = None, require_label: bool = False
) -> Rows:
  """Returns the examples, or the pairs, of a JSONL file (plain or .gz).

  Args:
    path: the file. Rows with 'safer' and 'other' are pairs. A path given as
      a row's `safety` is relative to the file's folder.
    safety: the rules of rows that bring none.
    require_label: refuse examples that have no label; for training.

  Raises:
    ValueError: with file, line and fix.
  """
  return Rows(
    _parse_row(row, where, path, safety, require_label)
    for where, row in files.read_json_lines(path)
  )


def read_parquet(
  path: str | os.PathLike, safety: SafetyConfig | None = None, require_label: bool = False
) -> Rows:
  """Returns the examples, or the pairs, of a Parquet file.

  The columns are those of the JSONL form; nested ones ('safety',
  'conversation', ...) may be Parquet structs or JSON text. See `read_jsonl`.

  Raises:
    ImportError: pyarrow is not installed.
    ValueError: with file, row and fix.
  """
  result = Rows()
  for where, row in rows.read_parquet(path):
    parsed = {k: _parse_cell(k, v, where) for k, v in row.items()}
    result.append(_parse_row(parsed, where, path, safety, require_label))
  return result


def split(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
  """Returns (rest, held out), with about `fraction` of the items held out.

  The half follows from a hash of the seed and the conversation's text
  (letter case and white space do not count), not from the item's place: no
  text is in both halves, under whatever rules, and a data set that grows
  leaves older items where they were. For preference pairs, which have two
  responses, it is the text before the response, so that pairs of one prompt
  stay together.

  Raises:
    ValueError: the fraction is not in [0, 1].
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'fraction is {fraction}; it must be from 0 to 1')
  halves: tuple[list[Item], list[Item]] = ([], [])
  for item in items:
    halves[_hash_unit(seed, _split_text(item)) < fraction].append(item)
  return halves


def _parse_row(
  row: Any, where: str, path: str | os.PathLike, safety: SafetyConfig | None, require_label: bool
) -> Example | Pair:
  root = pathlib.Path(path).parent
  if isinstance(row, Mapping) and ('safer' in row or 'other' in row):
    return Pair.from_dict(row, where, safety=safety, root=root)
  example = Example.from_dict(row, where, safety=safety, root=root)
  if require_label and example.label is None:
    raise ValueError(f'{where}: no label; write "label": "safe" or "unsafe", or remove the row')
  return example


def _parse_cell(column: str, value: Any, where: str) -> Any:
  if column in _NESTED and isinstance(value, str) and value[:1] in ('{', '['):
    try:
      return json.loads(value, object_pairs_hook=unique_keys(f'{where}: column {column!r}'))
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{where}: column {column!r} is not valid JSON ({error.msg}); correct it'
      ) from None
  return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
  # A Parquet struct has all its fields; those a row does not have are null.
  if isinstance(value, Mapping):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(v) for v in value]
  return value


def _split_text(item: Example | Pair) -> str:
  if isinstance(item, Example):
    return _text(item.conversation)
  if item.safer.conversation == item.other.conversation:
    return _text(item.safer.conversation)
  return _text(item.safer.conversation[:-1])


def _text(conversation: Sequence[Message]) -> str:
  turns = [[m.role, *m.content.casefold().split()] for m in conversation]
  return json.dumps(turns)


def _hash_unit(seed: int, text: str) -> float:
  digest = hashlib.sha256(f'{seed}\n{text}'.encode()).digest()
  return int.from_bytes(digest[:7], 'big') / 2**56
