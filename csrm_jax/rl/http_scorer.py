"""A reward behind HTTP: POST samples, get as many numbers.

Request: {"samples": [{"id", "conversation": [{"role", "content"}, ...],
"safety": {"categories": [{"name", "guideline"}, ...]}}, ...]}
Reply: {"rewards": [0.7, ...]}, in the order of the samples; other keys are
ignored.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from csrm_jax.safety.schema import Sample

_TRANSIENT = (408, 409, 425, 429)
_NOT_THERE = (401, 403, 404, 405)
_MAX_WAIT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the scorer is called.

  Attributes:
    url: where samples are posted, as in http://localhost:5000/get_reward.
    timeout_s: without a sign of the scorer.
    num_tries: of a request that fails on the way; with back-off.
    backoff_s: before the second try; doubles with each further one.
    batch_size: samples a request.
  """

  url: str
  timeout_s: float = 60.0
  num_tries: int = 3
  backoff_s: float = 1.0
  batch_size: int = 64

  def __post_init__(self):
    if not self.url.startswith(('http://', 'https://')):
      raise ValueError(
        f'the URL of the scorer is {self.url!r}; it must begin with http:// or https://'
      )
    for name in ('num_tries', 'batch_size'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} of the scorer is {getattr(self, name)}; it must be >= 1')
    if not (self.timeout_s > 0 and self.backoff_s >= 0):
      raise ValueError(
        f'timeout_s of the scorer is {self.timeout_s}, backoff_s '
        f'{self.backoff_s}; the first must be above 0, the other not below'
      )


def check_reachable(settings: Settings) -> None:
  """Posts no samples, to see that somebody answers, whatever the reply.

  Raises:
    ValueError: nobody does, or nothing is posted to at that URL.
  """
  try:
    _call(settings, {'samples': []})
  except _RefusedError as error:
    if error.status in _NOT_THERE:
      raise ValueError(str(error)) from None


def ask(settings: Settings, samples: Sequence[Sample]) -> list[Any]:
  """Returns the scorer's values, one a sample; they are not checked here.

  Raises:
    ValueError: it does not answer, refuses, or its reply has not one value for
      each sample.
  """
  values = []
  for start in range(0, len(samples), settings.batch_size):
    chunk = samples[start : start + settings.batch_size]
    text = _call(settings, {'samples': [_describe(s) for s in chunk]})
    values += _read(text, chunk, settings.url)
  return values


class _RefusedError(ValueError):
  """The scorer answers with a status that another try would not change."""

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


def _describe(sample: Sample) -> dict[str, Any]:
  example = sample.example()
  return {
    'id': example.id,
    'conversation': [m.to_dict() for m in example.conversation],
    'safety': example.safety.to_dict(),
  }


def _read(text: bytes, samples: Sequence[Sample], url: str) -> list[Any]:
  try:
    reply = json.loads(text)
  except ValueError:
    raise ValueError(
      f'the scorer at {url} replied what is not JSON to {samples[0].id}; it '
      'must reply {"rewards": [...]}'
    ) from None
  values = reply.get('rewards') if isinstance(reply, dict) else None
  if not isinstance(values, list):
    raise ValueError(
      f'the scorer at {url} replied to {samples[0].id} without a list of '
      '"rewards"; it must reply {"rewards": [...]}'
    )
  if len(values) != len(samples):
    raise ValueError(
      f'the scorer at {url} gave {len(values)} rewards for {len(samples)} '
      f'samples, {samples[0].id} to {samples[-1].id}; it must give one each'
    )
  return values


def _call(settings: Settings, content: Any) -> bytes:
  """Returns the body of the reply; waits and tries again where it helps."""
  request = urllib.request.Request(
    settings.url, json.dumps(content).encode(), {'Content-Type': 'application/json'}
  )
  for number in range(settings.num_tries):
    if number:
      time.sleep(min(settings.backoff_s * 2 ** (number - 1), _MAX_WAIT_S))
    try:
      with urllib.request.urlopen(request, timeout=settings.timeout_s) as response:
        return response.read()
    except urllib.error.HTTPError as error:
      problem = f'status {error.code}'
      with error:
        said = ' '.join(error.read(500).decode(errors='replace').split())
      if error.code < 500 and error.code not in _TRANSIENT:
        raise _RefusedError(
          f'the scorer at {settings.url} refuses the request ({problem}: '
          f'{said[:200]}); check the URL and what it expects',
          error.code,
        ) from None
    except (OSError, http.client.HTTPException) as error:
      problem = str(getattr(error, 'reason', error)) or type(error).__name__
  raise ValueError(
    f'the scorer at {settings.url} does not answer ({problem}; '
    f'{settings.num_tries} tries); start it or correct the URL'
  )
