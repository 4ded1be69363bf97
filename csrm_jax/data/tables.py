"""Rows of a table on disk, whatever the format it was published in."""

from __future__ import annotations

import csv
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from csrm_jax.core import files
from csrm_jax.core.files import unique_keys
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
  elif name.endswith('.json'):
    read = _json_list(path)
  else:
    read = files.read_json_lines(path)
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


def _json_list(path) -> Iterator[tuple[str, Any]]:
  text = pathlib.Path(path).read_text(encoding='utf-8')
  if not text.lstrip().startswith('['):
    yield from files.read_json_lines(path)
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
