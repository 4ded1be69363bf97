"""Calls that are tried again: how often, how late, and what ends them."""

import email.message
import urllib.error

import pytest

from csrm_jax.core import retry


@pytest.fixture
def waits(monkeypatch):
  """Returns the seconds that were waited, without waiting."""
  found = []
  monkeypatch.setattr(retry.time, 'sleep', found.append)
  return found


def fail(*errors, then='done'):
  """Returns a `send` that raises these, one a call, before it returns."""
  left = list(errors)

  def send(number):
    assert number == len(errors) - len(left)
    if left:
      raise left.pop(0)
    return then

  return send


def test_waits_grow_up_to_a_minute(waits):
  assert retry.call(fail(*[OSError()] * 4), 5, 10.0, (OSError,), str) == 'done'
  assert [5 <= waits[0] <= 15, 10 <= waits[1] <= 30, 20 <= waits[2] <= 60] == [True] * 3
  assert waits[3] <= 60


def test_a_wait_that_is_asked_for_is_kept(waits):
  headers = email.message.Message()
  headers['Retry-After'] = '7.5'
  busy = urllib.error.HTTPError('http://x', 429, 'busy', headers, None)
  assert retry.call(fail(busy), 2, 0.0, (OSError,), str) == 'done'
  headers.replace_header('Retry-After', 'Fri, 31 Dec 1999 23:59:59 GMT')
  assert retry.call(fail(busy), 2, 0.0, (OSError,), str) == 'done'
  assert waits == [7.5, 0.0]


def test_what_ends_it(waits):
  with pytest.raises(retry.GaveUpError, match='second'):
    retry.call(fail(OSError('first'), OSError('second')), 2, 0.0, (OSError,), str)
  assert len(waits) == 1  # None after the last try.
  with pytest.raises(KeyError):
    retry.call(fail(KeyError()), 2, 0.0, (OSError,), str)

  def refused(error):
    raise ValueError(f'refused: {error}')

  with pytest.raises(ValueError, match='refused: no'):
    retry.call(fail(OSError('no')), 2, 0.0, (OSError,), refused)
  assert len(waits) == 1
