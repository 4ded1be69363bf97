"""A journal of finished work, and a cache of replies; both are files.

Both survive a process that is killed anywhere: the journal loses at most the line that was being
written, and the cache loses no finished entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

from csrm_jax.core import checks, files

_RESUME = 'free some space and run the same command again; nothing is lost'


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns an OSError within into one that names the file and says what to do."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, f'{path}: cannot be written ({error.strerror}); {_RESUME}') from None


def key(content: Any) -> str:
  """Returns the sha256 (hex) of JSON values, or of dataclasses of them."""
  return files.digest(content, default=dataclasses.asdict, separators=(',', ':'))


_BEFORE_CHECKSUM = b', "sha256": "'


def _checksum(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


class Journal:
  """A file of {"key", "value", "sha256"} lines that only grows; threads of a process share it."""

  def __init__(self, path: str | os.PathLike):
    """Opens the file, reads its lines, and drops a last line that was cut short."""
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._lock = threading.Lock()
    # Unbuffered: a buffer would try again later to write what a full disk has refused.
    self._file = open(self._path, 'ab+', buffering=0)  # noqa: SIM115
    try:
      self._values = self._read()
    except BaseException:
      self._file.close()
      raise

  def _read(self) -> dict[str, Any]:
    try:
      # A lock and not a lock file: the system frees it when the process dies.
      fcntl = importlib.import_module('fcntl')
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
      checks.note(
        'this system has no locks of files: never run two processes in one work directory'
      )
    except OSError:
      raise ValueError(
        f'{self._path}: another process writes to it; wait for its end, or give another --workdir'
      ) from None
    self._file.seek(0)
    data = self._file.read()
    whole = data.rfind(b'\n') + 1
    if whole < len(data):
      self._file.truncate(whole)
    values = {}
    for number, line in enumerate(data[:whole].splitlines(), start=1):
      try:
        entry = json.loads(line)
        # Of what stands before it: a changed byte may leave another value that is as good JSON.
        if entry['sha256'] != _checksum(line[: line.rindex(_BEFORE_CHECKSUM)]):
          raise ValueError
        values[entry['key']] = entry['value']
      except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
          f'{self._path}:{number}: not a line of a journal; remove that line'
          ' and run the same command again: what it held is done anew'
        ) from None
    self._end = whole
    return values

  def __contains__(self, key: str) -> bool:
    return key in self._values

  def __getitem__(self, key: str) -> Any:
    return self._values[key]

  def __len__(self) -> int:
    return len(self._values)

  def put(self, key: str, value: Any) -> None:
    """Adds a JSON value. If this fails, with an OSError, the file is as before."""
    # The operating system has the line when this returns: a killed process does not lose it.
    content = json.dumps({'key': key, 'value': value}, ensure_ascii=False)[:-1].encode()
    data = content + _BEFORE_CHECKSUM + _checksum(content).encode() + b'"}\n'
    with self._lock, writing(self._path):
      try:
        self._write(data)
      except OSError:
        # A part of the line may be in the file; the next line must not follow it.
        self._file.truncate(self._end)
        raise
      self._end += len(data)
      self._values[key] = value

  def _write(self, data: bytes) -> None:
    while data:
      # An unbuffered write may take only a part.
      data = data[self._file.write(data) :]

  def close(self) -> None:
    """Closes and unlocks the file; removes it if it is empty."""
    if not self._end:
      self._path.unlink(missing_ok=True)
    self._file.close()

  def __enter__(self) -> Journal:
    return self

  def __exit__(self, *unused) -> None:
    self.close()


class Cache:
  """Texts by content hash, one file each, checked on reading."""

  def __init__(self, folder: str | os.PathLike):
    self._folder = pathlib.Path(folder)
    self.num_corrupt = 0

  def get(self, key: str) -> str | None:
    """Returns the text under a key (a file name), or None if it is missing or damaged."""
    try:
      data = self._path(key).read_bytes()
    except FileNotFoundError:
      return None
    try:
      entry = json.loads(data)
      text = entry['text']
      if entry['key'] == key and entry['sha256'] == _sha256(text):
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      pass
    # A damaged entry is counted and then treated as missing.
    self.num_corrupt += 1
    return None

  def put(self, key: str, text: str) -> None:
    """Stores the text, whole or not at all."""
    entry = {'key': key, 'sha256': _sha256(text), 'text': text}
    path = self._path(key)
    with writing(path):
      files.write(path, json.dumps(entry))

  def _path(self, key: str) -> pathlib.Path:
    # Two letters of the hash: no folder has to hold all entries.
    return self._folder / key[:2] / f'{key}.json'


def _sha256(text: str) -> str:
  # A model may write half of a surrogate pair.
  return hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()
