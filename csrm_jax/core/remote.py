"""Work directories in a bucket (gs://…), through copies on this machine.

Libraries write weights, journals and event files, and need real files for it; a bucket cannot
append. So a run works in a folder of its host. Changes are copied to the bucket before each
checkpoint, once a minute, and at the end. Only checkpoints are written and read in the bucket
itself, by Orbax.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from csrm_jax.core import checks, distributed

_PREFIX = 'gs://'
_EVERY_S = 60.0
# These are read and written in the bucket itself.
_IN_BUCKET = ('checkpoints',)
# They decide whether a run is new: asked for by name, whatever a listing says.
_ASKED_FOR = ('config.json', 'manifest.json', 'metrics.jsonl')
# A trace is large, and never read again.
_NOT_FETCHED = (*_IN_BUCKET, 'profile')


@dataclasses.dataclass
class _Mirror:
  """A folder of a bucket, and which versions of local files it holds."""

  home: epath.Path
  # Relative name -> (modified, bytes) of the local file.
  held: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


# The copies of this process: folder of the host -> what it is a copy of.
_MIRRORS: dict[pathlib.Path, _Mirror] = {}
# The places of all copies so far: an error message may outlive its copy.
_NAMES: dict[str, str] = {}


@contextlib.contextmanager
def local(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields the folder to work in: `workdir`, or a copy of it if it is gs://…."""
  if '://' not in str(workdir):
    yield pathlib.Path(workdir)
    return
  if not str(workdir).startswith(_PREFIX):
    raise ValueError(f'--workdir={workdir}: give a path of this machine or gs://BUCKET/FOLDER')
  home = epath.Path(workdir)
  try:  # If nothing can be kept, the user should know now and not after hours.
    probe = home / f'.writable-{jax.process_index()}'
    home.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except Exception as error:
    raise ValueError(_cannot('write to', f'--workdir={workdir}', error)) from error
  with mirror(home) as path:
    yield path
  print(f'{workdir} holds what was in {path}', file=sys.stderr)


@contextlib.contextmanager
def mirror(home: epath.Path) -> Iterator[pathlib.Path]:
  """Yields a local copy of a folder, and copies changes in it back."""
  with tempfile.TemporaryDirectory(prefix='csrm_jax-') as folder:
    path = _copy(home, pathlib.Path(folder))
    distributed.sync(f'copied {home}')  # All must have read before the first one writes.
    done = threading.Event()
    # A machine may vanish between checkpoints; its logs should not be lost with it.
    thread = threading.Thread(target=_keep_pushing, args=(path, done), name='push')
    thread.start()
    try:
      yield path
    finally:
      done.set()
      thread.join()
      try:
        push(path)
      finally:
        del _MIRRORS[path]


def push(path: pathlib.Path) -> None:
  """Copies changes in `path` to its bucket; does nothing if `path` is not a copy of one."""
  found = _MIRRORS.get(path)
  if found is None or jax.process_index() != 0:
    return
  with found.lock:
    try:
      names = _files(path, _IN_BUCKET)
      for name in names:
        with contextlib.suppress(FileNotFoundError):  # Replaced or gone meanwhile.
          stamp = _stamp(path / name)
          if found.held.get(name) == stamp:
            continue
          data = (path / name).read_bytes()
          target = found.home / name
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(data)
          if (num := target.stat().length) != len(data):
            raise OSError(f'{target} holds {num:,} bytes of the {len(data):,} written')
          found.held[name] = stamp
      for name in set(found.held) - set(names):
        (found.home / name).unlink(missing_ok=True)
        del found.held[name]
    except Exception as error:  # Each bucket library has its own errors.
      raise OSError(
        f'cannot write to {found.home} ({checks.reason(error)}); the same command '
        'goes on from its last checkpoint'
      ) from error


def home(path: str | os.PathLike) -> epath.Path:
  """Returns the real place of a path: in the bucket, if the path is in a copy."""
  path = pathlib.Path(path).expanduser().absolute()
  for folder, found in _MIRRORS.items():
    if path.is_relative_to(folder):
      return found.home / path.relative_to(folder)
  return epath.Path(path)


def is_bucket(path: str | os.PathLike) -> bool:
  """Returns whether a path is one in a bucket."""
  return str(path).startswith(_PREFIX)


def readable(path: str | os.PathLike) -> str | os.PathLike:
  """Returns the path, or a local copy that lasts as long as the process."""
  if not is_bucket(path):
    return path
  return _readable(str(path).rstrip('/'))


def named(message: str) -> str:
  """Returns the message with the addresses of buckets in place of their copies."""
  for folder, name in _NAMES.items():
    message = message.replace(folder, name)
  return message


@functools.cache
def _readable(address: str) -> pathlib.Path:
  folder = tempfile.TemporaryDirectory(prefix='csrm_jax-')
  atexit.register(folder.cleanup)
  return _copy(epath.Path(address), pathlib.Path(folder.name))


def _cannot(do: str, what: str, error: Exception) -> str:
  fix = 'check the name of the bucket, and log in with gcloud auth application-default login'
  if isinstance(error, ImportError):
    fix = checks.install('gcs')
  return f'cannot {do} {what} ({checks.reason(error)}); {fix}'


def _copy(home: epath.Path, folder: pathlib.Path) -> pathlib.Path:
  """Returns folder/NAME, filled with the files of `home`.

  A listing may name what is gone, or not yet what is there; reading decides.
  """
  path = folder / home.name
  path.mkdir()
  found = _Mirror(home)
  try:
    for name in dict.fromkeys([*_files(home, _NOT_FETCHED), *_ASKED_FOR]):
      try:
        data, num = (home / name).read_bytes(), (home / name).stat().length
      except FileNotFoundError:
        continue
      if len(data) != num:
        raise OSError(f'{name}: {len(data):,} of {num:,} bytes came')
      (path / name).parent.mkdir(parents=True, exist_ok=True)
      (path / name).write_bytes(data)
      found.held[name] = _stamp(path / name)
  except Exception as error:  # Each bucket library has its own errors.
    raise ValueError(_cannot('read', str(home), error)) from error
  _MIRRORS[path], _NAMES[str(path)] = found, str(home)
  return path


def _files(
  folder: epath.Path | pathlib.Path, without: tuple[str, ...], prefix: str = ''
) -> list[str]:
  """Returns the relative names of all files outside some top-level folders."""
  names = []
  if not folder.is_dir():
    return names
  for item in sorted(folder.iterdir()):
    if item.name in without:
      continue
    if item.is_dir():
      names += _files(item, (), f'{prefix}{item.name}/')
    elif item.name:  # A bucket's marker of a folder has no name.
      names.append(prefix + item.name)
  return names


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_mtime_ns, stat.st_size


def _keep_pushing(path: pathlib.Path, done: threading.Event) -> None:
  while not done.wait(_EVERY_S):
    try:
      push(path)
    except OSError as error:
      logging.warning('%s', error)  # If it stays so, the next checkpoint stops the run.
