"""Reading and writing of whole files.

A written file appears as a whole. A file that cannot be read raises a one-line error with the
file, the line where it is known, and the fix.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from csrm_jax.core.checks import show

# A packed file may grow by so much: text does so by 3 to 30 times, what is made to fill memory by
# 1000. Smaller ones may grow to the least in any case.
_UNPACKED_RATIO, _UNPACKED_LEAST = 100, 1 << 26
# The YAML parser reads about 100 KB a second; rules are far smaller.
_MAX_YAML = 1 << 20
# The names of what is being written.
_PARTIAL = re.compile(r'\..*\.[0-9a-f]{8}\.tmp')

# --- Files of the package --------------------------------------------------------------

_PACKAGE = pathlib.Path(__file__).parents[1]
_BUILTIN = 'builtin:'


def locate(name: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a file, or of what the package ships: builtin:ruleworld/base, for example.

  Such a name stands in configs, so that a run does not depend on where the package lies.
  builtin:configs is the folder of run configs.
  """
  text = os.fspath(name)
  if not text.startswith(_BUILTIN):
    return pathlib.Path(text).expanduser()
  path = _PACKAGE / text.removeprefix(_BUILTIN)
  if path.is_relative_to(_PACKAGE / 'configs') and not path.exists():
    # In a checkout it stands at the top.
    path = _PACKAGE.parent / path.relative_to(_PACKAGE)
  if not path.exists() or '..' in path.parts:
    raise ValueError(f'{text}: the package has no such file; give a path')
  return path


# --- Writing ---------------------------------------------------------------------------


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary file beside `path` that replaces `path` at the end.

  A reader finds the old file or the new one, never a part; after an error the old one stays.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, so that os.replace never crosses a file system.
  partial = _partial(path)
  try:
    partial.touch()
    mode = partial.stat().st_mode  # of new files here; some libraries write with a narrower one
    yield partial
    partial.chmod(mode)
    with partial.open('rb') as file:
      # Else a crash of the machine could leave the new name on an empty file.
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, last: str) -> Iterator[pathlib.Path]:
  """Yields a temporary folder whose files are moved into `path` at the end.

  Each file is moved in one step, and `last` after all others: where it exists, all exist. After
  an error nothing is moved. Other files in `path` stay.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = _partial(path)
  temporary.mkdir()
  try:
    yield temporary
    path.mkdir(exist_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
      os.replace(file, path / file.name)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _partial(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')


def write(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file as a whole; text is encoded as UTF-8."""
  with whole(path) as partial:
    partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2, **options: Any) -> None:
  """Writes a JSON file as a whole, with json.dumps's `options`."""
  write(path, json.dumps(value, indent=indent, **options) + '\n')


# --- Text, JSON and YAML ---------------------------------------------------------------


def read_bytes(path: str | os.PathLike) -> bytes:
  """Returns the content of a file (plain, .gz or .xz); only of a regular one."""
  path = pathlib.Path(path)
  try:
    status = path.stat()
    # Others have no end (/dev/zero), or none before somebody else writes (a pipe).
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
      raise ValueError(f'{path}: is no regular file; give one')
    unpack = {'.gz': gzip.open, '.xz': lzma.open}.get(path.suffix)
    if unpack is None:
      return path.read_bytes()
    limit = max(_UNPACKED_LEAST, _UNPACKED_RATIO * status.st_size)
    with unpack(path) as file:
      data = file.read(limit + 1)
    if len(data) > limit:
      raise ValueError(
        f'{path}: unpacks to more than {limit:,} bytes, {_UNPACKED_RATIO} times its size; if it is '
        'what it should be, unpack it first'
      )
    return data
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    kind = 'xz' if path.suffix == '.xz' else 'gzip'
    raise ValueError(
      f'{path}: not a complete {kind} file ({error}); fetch or write it again'
    ) from None
  except lzma.LZMAError as error:
    raise ValueError(f'{path}: not a complete xz file ({error}); fetch it again') from None
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror}); check the path') from None


def read_text(path: str | os.PathLike) -> str:
  """Returns the text of a UTF-8 file (plain, .gz or .xz), without a byte order mark."""
  data = read_bytes(path)
  try:
    return data.decode().removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise ValueError(
      f'{path}:{line}: byte 0x{data[error.start]:02x} is not valid UTF-8; save the file as UTF-8'
    ) from None


def digest(value: Any, **options: Any) -> str:
  """Returns the sha256 (hex) of a JSON value, as json.dumps writes it with the options."""
  return hashlib.sha256(json.dumps(value, **options).encode()).hexdigest()


def constant(name: str) -> float | None:
  """Returns what JSON rows mean by NaN, Infinity and -Infinity: pandas writes NaN for null."""
  return None if name == 'NaN' else float(name)


def parse_json(text: str, where: str, **options: Any) -> Any:
  """Returns the value in a JSON text, with json.loads's options; a repeated key is an error.

  What cannot be read is a json.JSONDecodeError, or a ValueError that names the place.
  """
  try:
    return json.loads(text, object_pairs_hook=unique_keys(where), **options)
  except RecursionError:
    raise ValueError(f'{where}: nested too deeply; flatten it') from None
  except json.JSONDecodeError:
    raise
  except ValueError as error:
    if str(error).startswith(f'{where}: '):
      raise
    # Python reads no number of more than 4300 digits.
    raise ValueError(f'{where}: a number has too many digits; correct it') from None


def read_json(path: str | os.PathLike, kind: type = object, **options: Any) -> Any:
  """Returns the value in a JSON file, which is of that kind; see `parse_json`."""
  where = os.fspath(path)
  try:
    value = parse_json(read_text(path), where, **options)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{where}:{error.lineno}: not valid JSON ({error.msg} at column'
      f' {error.colno}); correct or complete it'
    ) from None
  if not isinstance(value, kind):
    what = {dict: 'an object', list: 'a list'}[kind]
    raise ValueError(f'{where}: it holds {show(value)} and not {what}; correct it')
  return value


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Yields ('file:line', value) for every line that is not blank; NaN is read as null."""
  # Not splitlines(): it also splits at line breaks such as U+2028, which JSON strings may hold.
  lines = read_text(path).split('\n')
  is_empty = True
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    is_empty = False
    where = f'{path}:{number}'
    try:
      value = parse_json(line, where, parse_constant=constant)
    except json.JSONDecodeError as error:
      if number == len(lines):
        raise ValueError(
          f'{where}: the last line is cut short ({error.msg} at column {error.colno}, and no line '
          'end follows); write the file again or remove that line'
        ) from None
      raise ValueError(
        f'{where}: not valid JSON ({error.msg} at column {error.colno});'
        ' write one JSON object a line'
      ) from None
    yield where, value
  if is_empty:
    raise ValueError(f'{path}: no rows; give a file with one object a line')


def unique_keys(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
  """Returns an object_pairs_hook for json.loads that refuses repeated keys."""

  def make(items: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(items)
    if len(obj) < len(items):
      # json keeps the last of two equal keys: a rule or a label would vanish silently.
      keys = [key for key, _ in items]
      repeated = next(k for i, k in enumerate(keys) if k in keys[:i])
      raise ValueError(
        f'{where}: the key {show(repeated)} is given twice in one object; remove one'
      )
    return obj

  return make


def load_yaml(text: str, where: str, items: Sequence[str]) -> tuple[Any, list[int]]:
  """Returns the YAML value, and the line of each entry of the first of `items` that it has.

  Of a value that is a list, or a mapping with none of these keys, it is the lines of its entries.
  """
  if len(text) > _MAX_YAML:
    raise ValueError(
      f'{where}: {len(text):,} characters of YAML, of which at most {_MAX_YAML:,} are read; '
      'shorten it, or write it as JSON'
    )
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
  except ValueError as error:  # for example 2024-13-45, which YAML takes for a date
    raise ValueError(
      f'{where}: not valid YAML ({error}); quote text that looks like a date or a number'
    ) from None


def _check_unique_keys(node: yaml.Node, where: str) -> None:
  # PyYAML keeps the last of two equal keys: a rule would vanish silently.
  # An alias makes one node appear in several places, so visited nodes are remembered. A stack
  # rather than recursion: nesting may be deep.
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


def _item_lines(node: yaml.Node, items: Sequence[str]) -> list[int]:
  if isinstance(node, yaml.MappingNode):
    keys = {key.value: value for key, value in node.value if isinstance(key.value, str)}
    node = next((keys[name] for name in items if name in keys), node)
  if isinstance(node, yaml.SequenceNode):
    return [item.start_mark.line + 1 for item in node.value]
  if isinstance(node, yaml.MappingNode):
    return [key.start_mark.line + 1 for key, _ in node.value]
  return []


# --- Logs: JSON lines that grow, and that a kill may cut short -------------------------


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the objects in a log; [] if there is no file."""
  return [row for _, row in _log_lines(path)]


def append_log(path: str | os.PathLike, rows: Sequence[Any]) -> None:
  """Adds lines to a log; what a kill has left of its last line is dropped first."""
  with open(path, 'ab+') as file:
    end = file.seek(0, os.SEEK_END)
    if end and file.seek(end - 1) == end - 1 and file.read(1) != b'\n':
      file.seek(0)
      file.truncate(file.read().rfind(b'\n') + 1)
    file.write(b''.join(json.dumps(row).encode() + b'\n' for row in rows))


def remove_partial(folder: str | os.PathLike, deep: bool = True) -> None:
  """Removes what killed processes have left of the files and folders that they were writing.

  It looks into the folders of the folder too, if it is `deep`.
  """
  for path in list(pathlib.Path(folder).glob('**/.*.tmp' if deep else '.*.tmp')):
    if _PARTIAL.fullmatch(path.name):
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)


def cut_log(path: str | os.PathLike, step: int) -> None:
  """Drops the lines of steps after `step`, and a last line that was cut short.

  A log of which nothing would be left is kept aside, as NAME.1 or the next number.
  """
  path = pathlib.Path(path)
  if step < 0 and path.exists():
    number = 1
    while (aside := path.with_name(f'{path.name}.{number}')).exists():
      number += 1
    path.rename(aside)
  elif path.exists():
    # A resumed run writes the dropped steps again. The other lines stay, byte for byte.
    kept = [line for line, row in _log_lines(path) if line.endswith(b'\n') and _step(row) <= step]
    write(path, b''.join(kept))


def _step(row: dict[str, Any]) -> float:
  step = row.get('step')
  return step if isinstance(step, int) and not isinstance(step, bool) else float('inf')


def _log_lines(path: str | os.PathLike) -> Iterator[tuple[bytes, dict[str, Any]]]:
  path = pathlib.Path(path)
  for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
    # A kill may have cut a line short anywhere; such a line is skipped.
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
      if isinstance(row, dict):
        yield line, row
