"""Calls of services that may fail on the way: tried again, ever later."""

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

  Waits grow from about `backoff_s`, and are as long as the service asks for in
  Retry-After; none is above a minute.

  Args:
    send: gets the number of the try, from 0.
    num_tries: calls of `send`, at most.
    backoff_s: before the second try.
    errors: those that `reason_of` is asked about; others pass.
    reason_of: says why to try again; raises what another try would not change.

  Raises:
    GaveUpError: no try worked.
  """
  for number in range(num_tries):
    try:
      return send(number)
    except errors as error:
      reason = reason_of(error)
      if number + 1 == num_tries:
        raise GaveUpError(reason) from None
      # Clients that failed together should not come back together.
      wait_s = max(backoff_s * 2**number * random.uniform(0.5, 1.5), _asked_s(error))
    time.sleep(min(wait_s, _MAX_WAIT_S))
  raise AssertionError('num_tries is below 1')


def _asked_s(error: Exception) -> float:
  """Returns the seconds in the Retry-After header of the reply, 0 without."""
  headers = getattr(getattr(error, 'response', error), 'headers', None) or {}
  with contextlib.suppress(ValueError):  # A date: the back-off will do.
    return float(headers.get('retry-after') or 0)
  return 0.0
