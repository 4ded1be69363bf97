"""Tables of any format: JSONL, JSON, CSV, Parquet, Arrow, folders of shards, sets on the hub.

There is one reader for each format and one set of errors: a bad cell is one line with file, row
and fix. An absent value is None, whatever its format calls it (null, NaN).
"""

from __future__ import annotations

import collections
import csv
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from csrm_jax.core import checks, files
from csrm_jax.core.checks import note, show
from csrm_jax.data.sources import Rows

Path = str | os.PathLike
# A file, several files of one set, or {place in the set: file}.
Files = Path | Sequence[Path] | Mapping[int, Path]

_TEXT = ('.jsonl', '.ndjson', '.json', '.csv', '.tsv')
SUFFIXES = (*_TEXT, *(s + packed for s in _TEXT for packed in ('.gz', '.xz')), '.parquet', '.arrow')
# These describe data and hold none.
_ABOUT = ('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json')
_SPLITS = {
  'train': ('train', 'training'),
  'test': ('test', 'testing'),
  'validation': ('validation', 'valid', 'val', 'dev', 'eval'),
}
_SPLIT = re.compile(rf'(?<![a-z])({"|".join(w for s in _SPLITS.values() for w in s)})(?![a-z])')
_SHARD = re.compile(r'(.*)-(\d{5})-of-(\d{5})(\..*)')
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_BOOLS = {'true': True, 'false': False, '1': True, '0': False}

# Published tables may have fields beyond the csv module's limit of 128 KiB.
csv.field_size_limit(1 << 24)


class Row(dict):
  """One row of a table, with its cells as they came.

  Attributes:
    where: 'file:line', or 'file: row N'.
    path: Its file.
    number: Its place in the set, from 0; unique in the set.
    line: Its line, or its row from 1; unique in the set.
  """

  def __init__(self, fields: Mapping[str, Any], where: str, number: int, file: int, path: Path):
    super().__init__(fields)
    self.where, self.path = where, pathlib.Path(path)
    # Rows of further files are told apart by the number of the file.
    prefix = f'{file}.' if file else ''
    self.number, self.line = f'{prefix}{number}', prefix + re.search(r'\d+\Z', where)[0]

  def text(self, column: str) -> str:
    """Returns the text in a column."""
    value = self[column]
    if not isinstance(value, str):
      raise ValueError(f'column {column!r} is {show(value)}, not text; correct it')
    return value

  def text_or_none(self, column: str) -> str | None:
    """Returns the text in a column, or None."""
    return None if self[column] is None else self.text(column)

  def texts(self, column: str) -> list[str]:
    """Returns the list of texts in a column; one text is a list of one."""
    value = self[column]
    if isinstance(value, str):
      return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
      raise ValueError(f'column {column!r} is {show(value)}, not a list of texts; correct it')
    return value

  def object(self, column: str) -> Row:
    """Returns the object in a column."""
    value = self[column]
    if not isinstance(value, Mapping):
      raise ValueError(f'{column} is {show(value)}; it must be an object')
    return Row(value, self.where, 0, 0, self.path)

  def name(self, column: str) -> str:
    """Returns the text or the whole number in a column, as text."""
    return as_name(self[column], column)

  def one_of(self, column: str, known: Sequence[Any]) -> Any:
    """Returns the value in a column, one of those that are known."""
    value = self[column]
    # True equals 1, and would pass for an index.
    if not isinstance(value, bool):
      for item in known:
        # A CSV file has all values as text.
        if value == item or (isinstance(value, str) and value == str(item)):
          return item
    raise ValueError(
      f'unknown {column} {show(value)}; it must be one of {", ".join(map(str, known))}'
    )

  def flag(self, column: str) -> bool:
    """Returns the true or false in a column; 1 and 0, and the words as text, are read too."""
    return as_flag(self[column], column)

  def amount(self, column: str) -> float:
    """Returns the number in a column."""
    return as_amount(self[column], column)


def as_flag(value: Any, column: str) -> bool:
  """Returns true or false, which 1 and 0 and the words as text stand for too."""
  known = _BOOLS.get(str(value).strip().lower().removesuffix('.0'))
  if known is None or not isinstance(value, (bool, int, float, str)):
    raise ValueError(f'{column} is {show(value)}; it must be true or false')
  return known


def as_amount(value: Any, column: str) -> float:
  """Returns a number, or one in text, as a float."""
  try:
    if isinstance(value, (bool, type(None), list, Mapping)):
      raise ValueError
    return float(value)
  except (TypeError, ValueError):
    raise ValueError(f'{column} is {show(value)}; it must be a number') from None


def as_name(value: Any, column: str) -> str:
  """Returns a text or a whole number as text: what identifies a row."""
  # pandas makes floats of whole numbers where one of them is missing.
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'column {column!r} is {show(value)}; it must be a text or a whole number')
  return value


def numbered(paths: Files) -> dict[int, pathlib.Path]:
  """Returns {place in the set: file}."""
  if isinstance(paths, (str, os.PathLike)):
    paths = [paths]
  found = paths if isinstance(paths, Mapping) else dict(enumerate(paths))
  return {number: pathlib.Path(path) for number, path in found.items()}


def read_rows(paths: Files, columns: Sequence[str], parse: Callable[[Row], Iterable[Any]]) -> Rows:
  """Returns what `parse` makes of the rows of tables that have these columns.

  `parse` yields the items of a row. A text among them is the reason why the row gives none, and
  is counted. File and line are put before the message of a ValueError.
  """
  found = Rows()
  for row in iterate(paths, columns):
    try:
      for item in parse(row):
        if isinstance(item, str):
          found.drop(item)
        else:
          found.append(item)
    except ValueError as error:
      raise ValueError(f'{row.where}: {error}') from None
    except RecursionError:
      raise ValueError(f'{row.where}: nested too deeply; flatten it') from None
  return found


def iterate(paths: Files, columns: Sequence[str] = ()) -> Iterator[Row]:
  """Yields the rows of tables that have these columns, file by file."""
  for file, path in numbered(paths).items():
    for number, (where, fields) in enumerate(read_table(path, columns)):
      yield Row(fields, where, number, file, path)


def read_table(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields ('file:line', row) of a file in any of SUFFIXES that has these columns."""
  name = os.fspath(path)
  if not name.endswith(SUFFIXES):
    raise ValueError(
      f'{path}: rows are read from files that end in {", ".join((*_TEXT, ".parquet", ".arrow"))};'
      ' save it as one of these, or rename it'
    )
  kind = pathlib.Path(name.removesuffix('.gz').removesuffix('.xz')).suffix
  for where, row in _FORMATS[kind](path):
    if not isinstance(row, Mapping):
      raise ValueError(
        f'{where}: the row is {show(row)}; write a JSON object with the columns'
        f' {", ".join(columns) or "of one example"}'
      )
    missing = [column for column in columns if column not in row]
    if missing:
      raise ValueError(
        f'{where}: missing column {", ".join(map(repr, missing))}; found'
        f' {", ".join(map(repr, row)) or "none"}; rename or add it'
      )
    yield where, row


# --- Formats -----------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
  text = files.read_text(path).lstrip()
  if text.startswith('{'):
    # A file of this name may hold one object a line all the same.
    yield from files.read_json_lines(path)
    return
  rows = files.read_json(path, parse_constant=files.constant)
  if not isinstance(rows, list) or not rows:
    raise ValueError(f'{path}: it holds {show(rows)}; write a list of objects')
  for number, row in enumerate(rows, start=1):
    yield f'{path}: row {number}', row


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
  text = files.read_text(path)
  head = text.partition('\n')[0]
  delimiter = max(',;\t', key=head.count)
  reader = csv.DictReader(io.StringIO(text, newline=''), strict=True, delimiter=delimiter)
  is_empty, line = True, 1
  try:
    names = reader.fieldnames or ()
    for name, num in collections.Counter(names).items():
      if num > 1:
        raise ValueError(f'{path}:1: the column {show(name)} is given twice; rename one')
    line = reader.line_num + 1
    for row in reader:
      # A quoted field may span lines: a row is named by its first one.
      where, line = f'{path}:{line}', reader.line_num + 1
      if None in row or None in row.values():
        raise ValueError(
          f'{where}: the row has not {len(names)} fields as the'
          ' header; complete it, or quote fields that hold commas'
        )
      is_empty = False
      yield where, row
  except csv.Error as error:
    raise ValueError(f'{path}:{line}: not valid CSV ({error}); correct the quotes') from None
  if is_empty:
    raise ValueError(f'{path}: no rows below the header; give some')


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
  pyarrow = _pyarrow(path, 'Parquet')
  from pyarrow import parquet

  yield from _arrow_rows(path, 'Parquet', pyarrow, lambda: parquet.read_table(os.fspath(path)))


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
  pyarrow = _pyarrow(path, 'Arrow')
  from pyarrow import ipc

  def read():
    with pyarrow.OSFile(os.fspath(path)) as file:
      try:
        return ipc.open_stream(file).read_all()  # as `datasets` writes it
      except pyarrow.ArrowInvalid:
        file.seek(0)
        return ipc.open_file(file).read_all()

  yield from _arrow_rows(path, 'Arrow', pyarrow, read)


def _pyarrow(path: Path, what: str) -> Any:
  try:
    import pyarrow
  except ImportError:
    raise ImportError(
      f'{path}: reading {what} needs pyarrow; {checks.install("parquet")}'
    ) from None
  return pyarrow


def _arrow_rows(
  path: Path, what: str, pyarrow: Any, read: Callable[[], Any]
) -> Iterator[tuple[str, Any]]:
  try:
    table = read()
  except (pyarrow.ArrowException, OSError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f'{path}: cannot be read as {what} ({reason}); check the file') from None
  if not table.num_rows:
    raise ValueError(f'{path}: no rows; give a file that has some')
  if len(set(table.column_names)) < table.num_columns:
    raise ValueError(f'{path}: a column name is given twice; rename one')
  number = 0
  # Part by part: as Python objects a table takes many times its bytes.
  for batch in table.to_batches(max_chunksize=4096):
    for row in batch.to_pylist():
      number += 1
      yield f'{path}: row {number}', _without_nan(row)


def _without_nan(value: Any) -> Any:
  if isinstance(value, float):
    return None if math.isnan(value) else value
  if isinstance(value, list):
    return [_without_nan(item) for item in value]
  if isinstance(value, dict):
    return {key: _without_nan(item) for key, item in value.items()}
  return value


_FORMATS = {
  '.jsonl': files.read_json_lines,
  '.ndjson': files.read_json_lines,
  '.json': _read_json,
  '.csv': _read_csv,
  '.tsv': _read_csv,
  '.parquet': _read_parquet,
  '.arrow': _read_arrow,
}


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows with the same columns as .jsonl, .csv or .parquet, as a whole.

  Lists and objects are text of JSON in CSV.
  """
  suffix = pathlib.Path(path).suffix
  if suffix == '.parquet':
    pyarrow = _pyarrow(path, 'Parquet')
    from pyarrow import parquet

    with files.whole(path) as partial:
      parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
    return
  if suffix == '.csv':
    out = io.StringIO(newline='')
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    for row in rows:
      nested = {k: json.dumps(v) for k, v in row.items() if isinstance(v, (list, dict))}
      writer.writerow(row | nested)
    text = out.getvalue()
  else:
    text = ''.join(json.dumps(row) + '\n' for row in rows)
  files.write(path, text)


# --- The files of a set --------------------------------------------------------------------


def find(folder: Path, patterns: Sequence[str]) -> list[pathlib.Path]:
  """Returns the tables that the first pattern with any match finds, sorted.

  Raises:
    ValueError: Some of a table's shards are missing.
  """
  for pattern in patterns:
    found = sorted(
      path
      for path in pathlib.Path(folder).glob(pattern)
      if path.is_file() and path.name.endswith(SUFFIXES) and path.name not in _ABOUT
    )
    if found:
      _check_shards(found)
      return found
  return []


def locate(path: Path, split: str = 'train') -> list[pathlib.Path]:
  """Returns the files of a split: of a folder, a `datasets` folder, or a set on the hub.

  A file stands for itself. A folder without names of splits is one split, and so is a folder with
  only one. For 'test' the split 'validation' will do.
  """
  path = pathlib.Path(path)
  if not path.exists() and _HUB_ID.fullmatch(str(path)) and not path.name.endswith(SUFFIXES):
    path = fetch(str(path), [f'*{suffix}' for suffix in SUFFIXES])
  if not path.is_dir():
    return [path]
  if (path / 'dataset_dict.json').is_file():  # what DatasetDict.save_to_disk writes
    about = files.read_json(path / 'dataset_dict.json')
    names = about.get('splits') if isinstance(about, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise ValueError(f'{path}/dataset_dict.json: it names no splits; save the data set again')
    return locate(path / _choose_split(path, dict.fromkeys(names), split))
  if (path / 'state.json').is_file():  # what Dataset.save_to_disk writes
    return _saved_files(path)
  found = [
    file
    for file in sorted(path.rglob('*'))
    if file.is_file()
    and file.name.endswith(SUFFIXES)
    and file.name not in _ABOUT
    and not any(part.startswith('.') for part in file.relative_to(path).parts)
  ]
  if not found:
    raise ValueError(f'{path}: no table there; give a file that ends in {", ".join(SUFFIXES)}')
  by_split = collections.defaultdict(list)
  for file in found:
    words = _SPLIT.findall(str(file.relative_to(path)).lower())
    names = [name for name, known in _SPLITS.items() if words and words[-1] in known]
    by_split[names[0] if names else ''].append(file)
  named = {name: files_ for name, files_ in by_split.items() if name}
  if named:
    name, total = _choose_split(path, named, split), len(found)
    found = named[name]
    if len(found) < total:
      note(f'{path}: read are its files of {name!r}, {len(found)} of {total}')
  kinds = {next(s for s in reversed(SUFFIXES) if file.name.endswith(s)) for file in found}
  if len(kinds) > 1:
    raise ValueError(
      f'{path}: files that end in {" and in ".join(sorted(kinds))}, perhaps the same rows twice;'
      ' give path= of one file, or of a folder with one format'
    )
  _check_shards(found)
  return found


def _choose_split(path: Path, names: Mapping[str, Any], split: str) -> str:
  for name in (split, *(['validation'] if split == 'test' else [])):
    if name in names:
      return name
  if len(names) == 1:
    return next(iter(names))
  raise ValueError(
    f'{path}: it has the splits {", ".join(names)} and none is {split!r}; give path= of one'
  )


def _saved_files(folder: pathlib.Path) -> list[pathlib.Path]:
  state = files.read_json(folder / 'state.json')
  state = state if isinstance(state, Mapping) else {}
  if state.get('_indices_files'):
    raise ValueError(
      f'{folder}: the data set was saved with a selection of rows beside it; call flatten_indices()'
      ' and save it again'
    )
  parts = state.get('_data_files')
  names = [part.get('filename') for part in parts or () if isinstance(part, Mapping)]
  if not names or not all(isinstance(n, str) and pathlib.Path(n).name == n for n in names):
    raise ValueError(f'{folder}/state.json: it names no data files; save the data set again')
  for name in names:
    if not (folder / name).is_file():
      raise ValueError(f'{folder}: {name} is missing, which state.json names; copy it too')
  return [folder / name for name in names]


def _check_shards(found: Sequence[pathlib.Path]) -> None:
  """Checks that of a table whose files are named NAME-00000-of-00002 all are there."""
  shards = collections.defaultdict(set)
  for path in found:
    if match := _SHARD.fullmatch(str(path)):
      stem, number, total, suffix = match.groups()
      shards[stem, int(total), suffix].add(int(number))
  for (stem, total, suffix), there in shards.items():
    for number in range(total):
      if number not in there:
        raise ValueError(
          f'{stem}-{number:05d}-of-{total:05d}{suffix} is missing, and {len(there)} of {total}'
          ' files are there; fetch it too: a part is not the set'
        )


def fetch(repo: str, patterns: Sequence[str], name: str = '', terms: str = '') -> pathlib.Path:
  """Returns the folder of a data set after fetching files from the Hugging Face hub.

  Args:
    name: What errors call the set; '' for the id.
    terms: What an error adds about a set whose terms must be accepted.
  """
  what, url = name or repo, f'https://huggingface.co/datasets/{repo}'
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError:
    raise ImportError(
      f"fetching {what} needs the hub's client; {checks.install('hf')}; or give path= of files that"
      ' you have'
    ) from None
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(repo, repo_type='dataset', allow_patterns=list(patterns))
    )
  except errors.GatedRepoError:
    raise ValueError(
      f'{what} is gated: accept its terms at {url}, run "hf auth'
      ' login" with an account that did, and try again; or give path= of files'
      ' that you have'
    ) from None
  except (OSError, ValueError, errors.HfHubHTTPError) as error:
    raise ValueError(
      f'{what} cannot be fetched from {url}{terms}:'
      f' {" ".join(str(error).split())[:200]}; give path= of files that you'
      ' have'
    ) from None
