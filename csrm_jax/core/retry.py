"""Calls of services that may fail, tried again after growing waits."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar('T')
_MAX_WAIT_S = 60.0


class GaveUpError(Exception):
  """All tries failed; the text says why the last one did."""


def call(
  send: Callable[[int], T],
  num_tries: int,
  backoff_s: float,
  errors: tuple[type[Exception], ...],
  reason_of: Callable[[Exception], str],
) -> T:
  """Returns what `send` returns, called again while it fails for a passing reason.

  Waits grow from about `backoff_s`, and obey a longer Retry-After of the reply, up to a minute.
  After the last try it raises GaveUpError. `send` gets the number of the try, from 0; reason_of
  returns why to try again after one of `errors`, or raises where that would not help.
  """
  for number in range(num_tries):
    try:
      return send(number)
    except errors as error:
      reason = reason_of(error)
      if number + 1 == num_tries:
        raise GaveUpError(reason) from None
      # Random, because clients that failed together should not come back together.
      wait_s = max(backoff_s * 2**number * random.uniform(0.5, 1.5), _asked_s(error))
    time.sleep(min(wait_s, _MAX_WAIT_S))
  raise AssertionError('num_tries is below 1')


def _asked_s(error: Exception) -> float:
  """Returns the seconds in the reply's Retry-After header, or 0."""
  headers = getattr(getattr(error, 'response', error), 'headers', None) or {}
  with contextlib.suppress(ValueError):  # It may be a date; then the back-off will do.
    return float(headers.get('retry-after') or 0)
  return 0.0
