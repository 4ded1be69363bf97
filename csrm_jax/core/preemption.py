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
  """A run was asked to end, and has saved its state."""

  def __init__(self, step: int):
    super().__init__(f'stopped by SIGTERM after step {step}; the same command goes on')


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
  """Yields asked: step -> whether to save and stop after that step.

  Call it once after every step. If any of several processes gets SIGTERM, all of them stop after
  the same step.
  """
  if jax.distributed.is_initialized():
    # JAX listens to SIGTERM in this case, and agrees on a step among the processes.
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python delivers signals to the main thread only.
    return
  told = threading.Event()

  def listen(number, frame) -> None:
    # Only the first one asks: a second SIGTERM ends the process at once.
    signal.signal(signal.SIGTERM, before)
    told.set()

  before = signal.signal(signal.SIGTERM, listen)
  if before is None:  # It was not set from Python.
    before = signal.SIG_DFL
  try:
    yield lambda step: told.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
