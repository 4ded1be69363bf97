"""Reading rows of files, with errors that name file, line and fix."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from csrm_jax.core.checks import show
from csrm_jax.core.files import read_text


class Rows(list):
  """A list of examples or pairs, and the rows that gave none.

  Attributes:
    drops: how many rows were left out, by reason.
  """

  def __init__(self, items: Iterable = (), drops: Mapping[str, int] | None = None):
    super().__init__(items)
    self.drops = dict(drops or {})

  def drop(self, reason: str) -> None:
    """Counts one row that was left out."""
    self.drops[reason] = self.drops.get(reason, 0) + 1


def read_csv(
  path: str | os.PathLike, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
  """Yields ('file:line', row) of a CSV file that has these columns.

  Raises:
    ValueError: a column is missing, a row has too few or too many fields, or
      there is no row.
  """
  reader = csv.DictReader(io.StringIO(read_text(path), newline=''), strict=True)
  is_empty = True
  line = 1
  try:
    check_has(reader.fieldnames or (), columns, f'{path}:1')
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


def read_parquet(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Yields ('file: row number', row) of a Parquet file, rows from 1.

  Raises:
    ImportError: pyarrow is not installed.
    ValueError: the file cannot be read, or has no rows.
  """
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


def check_has(found: Iterable[str], required: Sequence[str], where: str) -> None:
  """Checks that all required columns are among those found.

  Raises:
    ValueError: names the missing ones and all that were found.
  """
  found = list(found)
  missing = [column for column in required if column not in found]
  if missing:
    raise ValueError(
      f'{where}: missing column {", ".join(map(repr, missing))}; found'
      f' {", ".join(map(repr, found)) or "none"}; rename or add it'
    )


def check_object(row: Any, required: Sequence[str], where: str) -> Mapping[str, Any]:
  """Returns the row if it is a JSON object with the required columns."""
  if not isinstance(row, Mapping):
    raise ValueError(
      f'{where}: the row is {show(row)}; write a JSON object with the columns {", ".join(required)}'
    )
  check_has(row, required, where)
  return row


def check_text(row: Mapping[str, Any], column: str, where: str) -> str:
  """Returns the text in a column of the row."""
  value = row[column]
  if not isinstance(value, str):
    raise ValueError(f'{where}: column {column!r} is {show(value)}, not text; correct it')
  return value
