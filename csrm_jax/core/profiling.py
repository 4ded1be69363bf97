"""A profiler trace of some steps, and reports on a device whose memory is full."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax


def parse_steps(text: str) -> tuple[int, int] | None:
  """Returns (first, last) of 'FIRST:LAST', or None for ''."""
  if not text:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(f"profile_steps={text!r}: give the first and the last step, as in '10:13'")
  return first, last


@contextlib.contextmanager
def trace(
  steps: tuple[int, int] | None, folder: str | os.PathLike
) -> Iterator[Callable[[int, Any], None]]:
  """Yields done(step, state), to call before the first step and after each.

  It traces the steps from the first to the last into the folder, for xprof or TensorBoard's
  profile plugin.
  """
  tracing = False

  def done(step: int, state: Any) -> None:
    nonlocal tracing
    wanted = steps is not None and steps[0] <= step + 1 <= steps[1]
    if wanted == tracing:
      return
    # Steps run asynchronously: the trace must not hold a part of the step before, or lack a part
    # of the last one.
    jax.block_until_ready(state)
    if wanted:
      jax.profiler.start_trace(str(folder))
    else:
      jax.profiler.stop_trace()
    tracing = wanted

  try:
    yield done
  finally:
    if tracing:
      jax.profiler.stop_trace()


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether a device had too little memory."""
  return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def save_memory_profile(folder: pathlib.Path) -> pathlib.Path:
  """Writes a profile of what fills this host's devices; returns its file."""
  path = folder / f'memory_{jax.process_index()}.prof'
  jax.profiler.save_device_memory_profile(str(path))
  return path
