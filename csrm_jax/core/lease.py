"""A lease of a work directory, so that two runs never write into one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from csrm_jax.core import checks, files, remote

NAME = 'lease.json'
# The holder renews its lease so often. One of another host that looks older than EXPIRES_S is
# watched for WATCH_S before it is taken over: clocks differ, and jump.
RENEW_S = 15.0
EXPIRES_S = 180.0
WATCH_S = 45.0
# The leases of this process: folder -> token.
_HELD: dict[str, str] = {}


@contextlib.contextmanager
def held(home: str | os.PathLike) -> Iterator[None]:
  """Holds the lease of a folder of this machine or of a bucket (gs://…).

  A lease outlives a holder that was killed. It is taken over at once if the holder was a process
  of this host that is no more, and after EXPIRES_S if it was on another host and nobody renews it
  while it is watched, for WATCH_S. Of several processes of one run the first holds it.

  Raises:
    ValueError: Another process holds it, or, at the end, it is lost: see `check`.
  """
  if jax.process_index() != 0:
    yield
    return
  home, mine = epath.Path(home), secrets.token_hex(8)
  path = home / NAME
  _take(path, mine)
  done = threading.Event()
  thread = threading.Thread(target=_renew, args=(path, mine, done), name='lease', daemon=True)
  thread.start()
  _HELD[str(home)] = mine
  try:
    yield
    _check(home)
  finally:
    del _HELD[str(home)]
    done.set()
    thread.join()
    # Not that of whoever has taken it over from a process that slept too long.
    if _read(path).get('token') == mine:
      path.unlink(missing_ok=True)


def check(workdir: str | os.PathLike) -> None:
  """Raises ValueError if this process has lost the lease that it holds of a folder, or its copy.

  A volume that vanishes takes the lease with it. A process that slept too long has lost it to
  another one. Either would leave a run in two places.
  """
  _check(remote.home(workdir))


def _check(home: epath.Path) -> None:
  mine = _HELD.get(str(home))
  try:
    found = _read(home / NAME)
  except Exception:  # A fault that may pass; whoever cannot write finds out.
    return
  if mine and found.get('token') != mine:
    what = f'process {found["pid"]} of {found["host"]} has taken it over' if found else 'it is gone'
    raise ValueError(
      f'{home}: this run has lost its work directory ({what}); if it lies on a volume, mount it '
      'again, and run the same command: it goes on from the last checkpoint'
    )


def _take(path: epath.Path, mine: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  _watch(path)
  if remote.is_bucket(path):
    _replace(path, mine)
    # A bucket has no locks: the last of two writers at once is the holder.
    time.sleep(1)
    if _read(path).get('token') != mine:
      raise ValueError(
        f'{path.parent}: another process began to work there at the same moment; give another '
        '--workdir'
      )
  else:
    with _locked(path.parent):
      _replace(path, mine)


def _watch(path: epath.Path) -> None:
  """Raises ValueError if a lease of another host that looks stale is renewed after all."""
  found = _read(path)
  if not found or found['host'] == socket.gethostname() or not _is_stale(found):
    return
  checks.note(f'{path.parent}: host {found["host"]} worked there; is it still? ({WATCH_S:.0f} s)')
  end = time.monotonic() + WATCH_S
  while time.monotonic() < end:
    time.sleep(min(1.0, WATCH_S / 20))
    now = _read(path)
    if now and now != found:
      raise _works_there(path, now)


def _works_there(path: epath.Path, lease: dict) -> ValueError:
  seconds = max(0, time.time() - lease['time'])
  return ValueError(
    f'{path.parent}: another process works there (host {lease["host"]}, process {lease["pid"]}, '
    f'last seen {seconds:.0f} s ago); wait for its end, or give another --workdir'
  )


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
  """Keeps other processes out of the same block, where the system has locks."""
  try:
    fcntl = importlib.import_module('fcntl')
  except ImportError:
    yield
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # Some network file systems have none.
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def _replace(path: epath.Path, mine: str) -> None:
  found = _read(path)
  if found and not _is_stale(found):
    raise _works_there(path, found)
  _write(path, mine)


def _write(path: epath.Path, token: str) -> None:
  # A bucket shows a file only when it is whole.
  write = path.write_text if remote.is_bucket(path) else functools.partial(files.write, path)
  write(_content(token))


def _content(token: str) -> str:
  fields = {'host': socket.gethostname(), 'pid': os.getpid(), 'born': _born(os.getpid())}
  return json.dumps({'token': token, 'time': time.time(), **fields})


def _read(path: epath.Path) -> dict:
  """Returns the lease, or {} where there is none or what is left of one."""
  try:
    lease = json.loads(path.read_text('utf-8'))
    return lease if {'token', 'time', 'host', 'pid', 'born'} <= set(lease) else {}
  except (FileNotFoundError, ValueError, TypeError):
    return {}


def _is_stale(lease: dict) -> bool:
  if lease['host'] != socket.gethostname():
    # A clock that jumped back must not lock the folder for ever.
    return abs(time.time() - lease['time']) > EXPIRES_S
  if os.name == 'nt' and abs(time.time() - lease['time']) > EXPIRES_S:
    return True
  # Process ids are given again: one that was born at another time is another process.
  return _born(lease['pid']) != lease['born']


def _born(pid: int) -> str:
  """Returns when a process of this machine began, or '' if there is none."""
  try:
    # The state stands first behind the name, which may hold anything; a zombie is no process.
    state, *fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return '' if state in 'ZX' else fields[18]
  except OSError:
    pass
  if pathlib.Path('/proc/self/stat').exists():
    return ''
  if os.name == 'nt':
    return 'alive'  # To ask would end it there: a lease holds until its time is over.
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return ''
  except PermissionError:
    pass
  return 'alive'


def _renew(path: epath.Path, mine: str, done: threading.Event) -> None:
  while not done.wait(RENEW_S):
    with contextlib.suppress(Exception):  # Whoever cannot write finds out at the next checkpoint.
      if _read(path).get('token') == mine:
        _write(path, mine)
