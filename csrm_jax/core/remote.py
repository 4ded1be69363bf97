"""Work directories in a bucket (gs://…), through copies on this machine.

Weights, journals and event files are written by libraries that need real files,
and a bucket cannot append. So a run works in a folder of its host; what changed
in it is copied to the bucket before each checkpoint, once a minute and at the
end. Checkpoints themselves are written and read in the bucket, by Orbax.
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

_PREFIX = 'gs://'
_EVERY_S = 60.0
# Read and written in the bucket itself.
_IN_BUCKET = ('checkpoints',)
# Large, and never read again.
_NOT_FETCHED = (*_IN_BUCKET, 'profile')


@dataclasses.dataclass
class _Mirror:
  """A bucket's folder, and what of the copy it is known to hold."""

  home: epath.Path
  # Relative name -> (modified, bytes) of the local file.
  held: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


# The copies of this process; a folder of the host -> what it is a copy of.
_MIRRORS: dict[pathlib.Path, _Mirror] = {}
# Where copies were, for messages that outlive them.
_NAMES: dict[str, str] = {}


@contextlib.contextmanager
def local(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields the folder to work in: workdir, or a copy of it if it is gs://….

  A bucket that cannot be written, or an address of another kind, is a ValueError.
  """
  if '://' not in str(workdir):
    yield pathlib.Path(workdir)
    return
  if not str(workdir).startswith(_PREFIX):
    raise ValueError(f'--workdir={workdir}: give a path of this machine or gs://BUCKET/FOLDER')
  home = epath.Path(workdir)
  try:  # Say at once, and not after hours, that nothing can be kept.
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
  """Yields a local copy of a folder; brings back what changes in it."""
  with tempfile.TemporaryDirectory(prefix='csrm_jax-') as folder:
    path = _copy(home, pathlib.Path(folder))
    if jax.process_count() > 1:  # All read before the first one writes.
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices(f'copied {home}')
    done = threading.Event()
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
  """Copies what changed in `path` to the bucket; without one does nothing.

  The first process does it, for all. A bucket that cannot be written is an OSError.
  """
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
          found.held[name] = stamp
      for name in set(found.held) - set(names):
        (found.home / name).unlink(missing_ok=True)
        del found.held[name]
    except Exception as error:  # Each library of buckets has its own.
      raise OSError(
        f'cannot write to {found.home} ({_reason(error)}); the same command '
        'goes on from its last checkpoint'
      ) from error


def home(path: str | os.PathLike) -> epath.Path:
  """Returns where a path really is: in the bucket, if it is of a copy."""
  path = pathlib.Path(path).expanduser().absolute()
  for folder, found in _MIRRORS.items():
    if path.is_relative_to(folder):
      return found.home / path.relative_to(folder)
  return epath.Path(path)


def readable(path: str | os.PathLike) -> str | os.PathLike:
  """Returns the path, or a local copy that lasts as long as the process."""
  if not str(path).startswith(_PREFIX):
    return path
  return _readable(str(path).rstrip('/'))


def named(message: str) -> str:
  """Returns the message with the bucket's names for those of copies."""
  for folder, name in _NAMES.items():
    message = message.replace(folder, name)
  return message


@functools.cache
def _readable(address: str) -> pathlib.Path:
  folder = tempfile.TemporaryDirectory(prefix='csrm_jax-')
  atexit.register(folder.cleanup)
  try:
    return _copy(epath.Path(address), pathlib.Path(folder.name))
  except Exception as error:
    raise ValueError(_cannot('read', address, error)) from error


def _cannot(do: str, what: str, error: Exception) -> str:
  fix = 'check the name of the bucket, and log in with gcloud auth application-default login'
  if isinstance(error, ImportError):
    fix = 'pip install "csrm_jax[gcs]"'
  return f'cannot {do} {what} ({_reason(error)}); {fix}'


def _reason(error: Exception) -> str:
  return ' '.join(str(error).split())[:200] or type(error).__name__


def _copy(home: epath.Path, folder: pathlib.Path) -> pathlib.Path:
  """Returns folder/NAME with the files of `home`."""
  path = folder / home.name
  path.mkdir()
  found = _Mirror(home)
  for name in _files(home, _NOT_FETCHED):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes((home / name).read_bytes())
    found.held[name] = _stamp(path / name)
  _MIRRORS[path], _NAMES[str(path)] = found, str(home)
  return path


def _files(
  folder: epath.Path | pathlib.Path, without: tuple[str, ...], prefix: str = ''
) -> list[str]:
  """Returns the relative names of the files, but those of some folders."""
  names = []
  if not folder.is_dir():
    return names
  for item in sorted(folder.iterdir()):
    if item.name in without:
      continue
    if item.is_dir():
      names += _files(item, (), f'{prefix}{item.name}/')
    elif item.name:  # A folder's own marker has none.
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
      logging.warning('%s', error)  # The next checkpoint stops the run.
