"""Stopping in time: a machine that will be taken away sends SIGTERM before."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# "Try again later", in sysexits.h.
EXIT_CODE = 75


class Stopped(Exception):
  """A run was asked to end, and has saved what it had."""

  def __init__(self, step: int):
    super().__init__(f'stopped by SIGTERM after step {step}; the same command goes on')


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
  """Yields asked: step -> whether to save and stop after that step.

  Ask once after every step. Of several processes any may be told; all are
  asked to stop after the same step. One process listens while this context
  lasts, to the first SIGTERM only: a second one ends it at once.
  """
  if jax.distributed.is_initialized():
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python tells the main thread only.
    return
  told = threading.Event()

  def listen(number, frame) -> None:
    signal.signal(signal.SIGTERM, before)
    told.set()

  before = signal.signal(signal.SIGTERM, listen)
  if before is None:  # Not set from Python.
    before = signal.SIG_DFL
  try:
    yield lambda step: told.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
