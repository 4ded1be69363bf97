"""Rows of files: tables in any format, examples and pairs in the project's own.

The project's own form is one JSON object a line, an `Example` or a `Pair` as documented in
`csrm_jax.safety.schema`; Parquet files have the same columns. A reader refuses labels and
columns that it does not know, with file and line. Rows that are well-formed but of no use are
left out and counted in the result's `drops`.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from csrm_jax.core import files
from csrm_jax.core.checks import hint, show
from csrm_jax.safety.schema import Example, Message, Pair, SafetyConfig

SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.xz', '.json', '.csv', '.parquet')
_NESTED = ('safety', 'conversation', 'plus', 'minus', 'safer', 'other')

Item = TypeVar('Item', Example, Pair)
T = TypeVar('T')

# Published tables may have fields beyond the csv module's limit of 128 KiB.
csv.field_size_limit(1 << 24)


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


# --- Tables, whatever the format they were published in ---------------------------------


class Row(dict):
  """One row of a table at `where` ('file:line', or 'file: row N'), the `number`th from 0."""

  def __init__(self, fields: Mapping[str, Any], where: str, number: int):
    super().__init__(fields)
    self.where = where
    self.number = number

  @property
  def line(self) -> str:
    return self.where.rpartition(':')[2]

  def text(self, column: str) -> str:
    """Returns the text in a column."""
    value = self[column]
    if not isinstance(value, str):
      raise ValueError(f'column {column!r} is {show(value)}, not text; correct it')
    return value

  def one_of(self, column: str, known: Sequence[Any]) -> Any:
    """Returns the value in a column, one of those that are known."""
    value = self[column]
    # True equals 1, and would pass for an index.
    if isinstance(value, bool) or value not in known:
      raise ValueError(
        f'unknown {column} {show(value)}; it must be one of {", ".join(map(str, known))}'
      )
    return value

  def flag(self, column: str) -> bool:
    """Returns the true or false in a column."""
    value = self[column]
    if not isinstance(value, bool):
      raise ValueError(f'{column} is {show(value)}; it must be true or false')
    return value


def lookup(name: Any, table: Mapping[str, T], what: str) -> T:
  """Returns the entry of that name; an unknown name is refused with a hint at the nearest one."""
  if name not in table:
    raise ValueError(
      f'unknown {what} {show(name)}{hint(name, list(table))}; this version knows {", ".join(table)}'
    )
  return table[name]


def read_rows(
  path: str | os.PathLike, columns: Sequence[str], parse: Callable[[Row], Iterable[Any]]
) -> Rows:
  """Returns what `parse` makes of the rows of a table that has these columns.

  `parse` yields the items of a row. A text among them is the reason why the row gives none, and
  is counted. File and line are put before the message of a ValueError.
  """
  found = Rows()
  for number, (where, fields) in enumerate(read_table(path, columns)):
    try:
      for item in parse(Row(fields, where, number)):
        if isinstance(item, str):
          found.drop(item)
        else:
          found.append(item)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
  return found


def read_table(
  path: str | os.PathLike, columns: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields ('file:line', row) of a JSONL, JSON, CSV or Parquet file that has these columns."""
  name = os.fspath(path)
  if name.endswith('.csv'):
    yield from _read_csv(path, columns)
    return
  if name.endswith('.parquet'):
    read = _parquet_rows(path)
  elif name.endswith('.json'):
    read = _json_list(path)
  else:
    read = files.read_json_lines(path)
  for where, row in read:
    if not isinstance(row, Mapping):
      raise ValueError(
        f'{where}: the row is {show(row)}; write a JSON object with the columns'
        f' {", ".join(columns)}'
      )
    _check_has(row, columns, where)
    yield where, row


def find(folder: str | os.PathLike, patterns: Sequence[str]) -> list[pathlib.Path]:
  """Returns the tables that the first pattern with any match finds, sorted."""
  for pattern in patterns:
    found = sorted(
      path
      for path in pathlib.Path(folder).glob(pattern)
      if path.is_file() and path.name.endswith(SUFFIXES)
    )
    if found:
      return found
  return []


def _read_csv(
  path: str | os.PathLike, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
  reader = csv.DictReader(io.StringIO(files.read_text(path), newline=''), strict=True)
  is_empty = True
  line = 1
  try:
    _check_has(reader.fieldnames or (), columns, f'{path}:1')
    line = reader.line_num + 1
    for row in reader:
      # A quoted field may span lines: a row is named by its first one.
      where, line = f'{path}:{line}', reader.line_num + 1
      if None in row or None in row.values():
        raise ValueError(
          f'{where}: the row has not {len(reader.fieldnames)} fields as the'
          ' header; complete it, or quote fields that hold commas'
        )
      is_empty = False
      yield where, row
  except csv.Error as error:
    raise ValueError(f'{path}:{line}: not valid CSV ({error}); correct the quotes') from None
  if is_empty:
    raise ValueError(f'{path}: no rows below the header; give some')


def _parquet_rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ImportError(f'{path}: reading Parquet needs pyarrow; run "pip install pyarrow"') from None
  try:
    table = pyarrow.parquet.read_table(os.fspath(path))
  except (pyarrow.ArrowInvalid, OSError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f'{path}: cannot be read as Parquet ({reason}); check the file') from None
  if not table.num_rows:
    raise ValueError(f'{path}: no rows; give a file that has some')
  for number, row in enumerate(table.to_pylist(), start=1):
    yield f'{path}: row {number}', row


def _json_list(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  # A file of this name may hold one object a line all the same.
  if not files.read_text(path).lstrip().startswith('['):
    yield from files.read_json_lines(path)
    return
  for number, row in enumerate(files.read_json(path), start=1):
    yield f'{path}: row {number}', row


def _check_has(found: Iterable[str], required: Sequence[str], where: str) -> None:
  found = list(found)
  missing = [column for column in required if column not in found]
  if missing:
    raise ValueError(
      f'{where}: missing column {", ".join(map(repr, missing))}; found'
      f' {", ".join(map(repr, found)) or "none"}; rename or add it'
    )


# --- The project's own form --------------------------------------------------------------


def read_jsonl(
  path: str | os.PathLike, safety: SafetyConfig | None = None, require_label: bool = False
) -> Rows:
  """Returns the examples, or the pairs, of a JSONL file (plain or .gz).

  Rows with 'safer' and 'other' are pairs. A path given as a row's `safety` is relative to the
  file's folder.

  Args:
    safety: The rules of rows that bring none.
    require_label: Refuse examples that have no label, as training does.

  Raises:
    ValueError: A row is bad; the message names file, line and fix.
  """
  return Rows(
    _parse_own(row, where, path, safety, require_label)
    for where, row in files.read_json_lines(path)
  )


def read_parquet(
  path: str | os.PathLike, safety: SafetyConfig | None = None, require_label: bool = False
) -> Rows:
  """Returns the examples, or the pairs, of a Parquet file; see `read_jsonl`.

  The columns are those of the JSONL form; nested ones ('safety', 'conversation', ...) may be
  Parquet structs or JSON text.
  """
  return Rows(
    _parse_own(
      {k: _parse_cell(k, v, where) for k, v in row.items()}, where, path, safety, require_label
    )
    for where, row in _parquet_rows(path)
  )


def _parse_own(
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
      return json.loads(value, object_pairs_hook=files.unique_keys(f'{where}: column {column!r}'))
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


# --- Parts of a data set -----------------------------------------------------------------


def split(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
  """Returns (rest, held out), with about `fraction` of the items held out.

  The side follows from a hash of the seed and the conversation's text, in which letter case and
  white space do not count. It does not depend on the item's place: no text is on both sides,
  under whatever rules, and a data set that grows leaves older items where they were.
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


def _split_text(item: Example | Pair) -> str:
  if isinstance(item, Example):
    return _text(item.conversation)
  if item.safer.conversation == item.other.conversation:
    return _text(item.safer.conversation)
  # Two responses: without them, all pairs of one prompt are on one side.
  return _text(item.safer.conversation[:-1])


def _text(conversation: Sequence[Message]) -> str:
  return json.dumps([[m.role, *m.content.casefold().split()] for m in conversation])
