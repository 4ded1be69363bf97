"""Rows of a table on disk, whatever the format it was published in."""

from __future__ import annotations

import csv
import io
import json
import lzma
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from csrm_jax.core.checks import unique_keys
from csrm_jax.data import rows

SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.xz', '.json', '.csv', '.parquet')


def read_table(
  path: str | os.PathLike, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ('file:line', row) of a JSONL, JSON, CSV or Parquet file.

  Raises:
    ImportError: a Parquet file, and pyarrow is not installed.
    ValueError: a column is missing (names what was found), or the file cannot
      be read.
  """
  name = os.fspath(path)
  if name.endswith('.csv'):
    yield from rows.read_csv(path, columns)
    return
  if name.endswith('.parquet'):
    read = rows.read_parquet(path)
  elif name.endswith('.jsonl.xz'):
    read = _xz_lines(path)
  elif name.endswith('.json'):
    read = _json_list(path)
  else:
    read = rows.read_json_lines(path)
  for where, row in read:
    yield where, dict(rows.check_object(row, columns, where))


def find(folder: str | os.PathLike, patterns: Sequence[str]) -> list[pathlib.Path]:
  """Returns the files of the first pattern that matches any, sorted."""
  for pattern in patterns:
    found = sorted(
      path
      for path in pathlib.Path(folder).glob(pattern)
      if path.is_file() and path.name.endswith(SUFFIXES)
    )
    if found:
      return found
  return []


def _xz_lines(path) -> Iterator[tuple[str, Any]]:
  try:
    text = lzma.decompress(pathlib.Path(path).read_bytes()).decode()
  except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
    raise ValueError(f'{path}: not a complete xz file ({error}); fetch it again') from None
  for number, line in enumerate(io.StringIO(text), start=1):
    if line.strip():
      where = f'{path}:{number}'
      try:
        value = json.loads(line, object_pairs_hook=unique_keys(where))
      except json.JSONDecodeError as error:
        raise ValueError(f'{where}: not valid JSON ({error.msg}); fetch it again') from None
      yield where, value


def _json_list(path) -> Iterator[tuple[str, Any]]:
  text = pathlib.Path(path).read_text(encoding='utf-8')
  if not text.lstrip().startswith('['):
    yield from rows.read_json_lines(path)
    return
  try:
    values = json.loads(text, object_pairs_hook=unique_keys(str(path)))
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path}: not valid JSON ({error.msg} at line {error.lineno}); fetch it again'
    ) from None
  for number, row in enumerate(values, start=1):
    yield f'{path}: row {number}', row


# A published table may have fields of any size.
csv.field_size_limit(1 << 24)
