"""A proposer behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import random
import threading
import time
from typing import Any, NoReturn

from csrm_jax.augmentation import replies, requests, schemas
from csrm_jax.augmentation.proposers import NoReplyError
from csrm_jax.core import journal

JSON_MODES = ('json_schema', 'bounded_json_schema', 'json_object', 'text')
# Reasons that a rerun may get past; whatever else failed would fail again.
TRANSIENT = ('timeout', 'rate_limited', 'server_error', 'connection')
_NOBODY = ('timeout', 'connection')
# As many requests in a row that failed for such a reason stop the run.
_MAX_FAILED = 10
_MAX_WAIT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the endpoint is called.

  Attributes:
    base_url: as in http://localhost:8000/v1.
    model: the name that the endpoint knows.
    key_variable: the environment variable that holds the key; the key itself
      is never stored. Local servers need none.
    json_mode: what is asked of the endpoint: replies by the JSON schema
      ('json_schema'); by the schema with the lengths of texts, which keeps a
      small model from going on for ever, but which not all services take
      ('bounded_json_schema'); any JSON object; or nothing ('text').
    temperature: of sampling.
    max_tokens: a reply may have.
    timeout_s: without a sign of the endpoint.
    num_tries: of a request that fails on the way; with back-off.
    num_unparsable: replies that are none, before the request is dropped.
    backoff_s: before the second try; doubles with each further one.
    concurrency: requests at once, at most.
    price_in: of a million prompt tokens, in whatever currency.
    price_out: of a million reply tokens.
  """

  base_url: str
  model: str
  key_variable: str = 'OPENAI_API_KEY'
  json_mode: str = 'json_schema'
  temperature: float = 0.7
  max_tokens: int = 800
  timeout_s: float = 60.0
  num_tries: int = 5
  num_unparsable: int = 3
  backoff_s: float = 1.0
  concurrency: int = 8
  price_in: float = 0.0
  price_out: float = 0.0

  def __post_init__(self):
    for name in ('base_url', 'model'):
      if not getattr(self, name):
        raise ValueError(
          f"the endpoint's {name} is empty; set it, as in --config.endpoint.{name}=..."
        )
    if self.json_mode not in JSON_MODES:
      raise ValueError(f'json_mode is {self.json_mode!r}; use one of {", ".join(JSON_MODES)}')
    for name in ('num_tries', 'num_unparsable', 'concurrency', 'max_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be >= 1')


class Endpoint:
  """Asks a language model; threads may share it. See `proposers.Proposer`."""

  def __init__(self, settings: Settings, cache: journal.Cache):
    """Connects to nothing yet.

    Raises:
      ImportError: the client is not installed.
    """
    try:
      import openai
    except ImportError:
      raise ImportError(
        'an endpoint needs the client "openai"; run pip install "csrm_jax[openai]"'
      ) from None
    self.name = settings.model
    self.concurrency = settings.concurrency
    self._openai = openai
    self._settings = settings
    self._cache = cache
    self._client = openai.OpenAI(
      base_url=settings.base_url,
      api_key=os.environ.get(settings.key_variable) or 'none',
      timeout=settings.timeout_s,
      max_retries=0,
    )
    self._slots = threading.BoundedSemaphore(settings.concurrency)
    self._lock = threading.Lock()
    self._counts = collections.Counter()
    self._failed_in_a_row = 0
    self._has_answered = False
    self._stopped = ''

  def usage(self) -> dict[str, Any]:
    """Returns counts of requests, tokens, retries and cache hits; the cost."""
    s = self._settings
    with self._lock:
      counts = dict(self._counts)
    price = (
      counts.get('prompt_tokens', 0) * s.price_in + counts.get('reply_tokens', 0) * s.price_out
    )
    return counts | {'corrupt_cache': self._cache.num_corrupt, 'cost': price / 1e6}

  def ask(self, request: requests.Request) -> Any:
    """Returns the typed reply, from the cache where it is there.

    Raises:
      NoReplyError: 'unparsable', 'refused_request' or one of `TRANSIENT`.
      ValueError: the endpoint cannot be used (down, wrong key, no such
        model).
    """
    s = self._settings
    key = replies.make_key(request, (s.model, s.temperature, s.max_tokens, s.json_mode))
    return replies.ask(request, key, self._cache, self._call, s.num_unparsable, self._count)

  def _call(self, request: requests.Request, seed: int) -> str:
    """Returns the text of one reply; waits and tries again where it helps."""
    rng = random.Random(f'{requests.digest(request)}/{seed}')
    for number in range(self._settings.num_tries):
      if self._stopped:
        raise ValueError(self._stopped)
      if number:
        self._count(retries=1)
      try:
        with self._slots:
          text = self._send(request, seed)
      except (self._openai.APIError, json.JSONDecodeError) as error:
        reason = self._reason(error)
        if number + 1 < self._settings.num_tries:
          time.sleep(self._wait_s(number, error, rng))
        continue
      with self._lock:
        self._failed_in_a_row = 0
        self._has_answered = True
      return text
    self._give_up(reason)

  def _send(self, request: requests.Request, seed: int) -> str:
    s = self._settings
    format = _format(request, s.json_mode)
    extra = {'response_format': format} if format else {}
    self._count(requests=1)
    reply = self._client.chat.completions.create(
      model=s.model,
      messages=requests.make_messages(request),
      temperature=s.temperature,
      max_tokens=s.max_tokens,
      seed=seed,
      **extra,
    )
    # What has no choices or no text, or is no reply of the protocol at all, is
    # as unusable as prose.
    usage = getattr(reply, 'usage', None)
    if usage is not None:
      self._count(prompt_tokens=usage.prompt_tokens or 0, reply_tokens=usage.completion_tokens or 0)
    choices = getattr(reply, 'choices', None)
    if not choices:
      return ''
    if choices[0].finish_reason == 'length':
      self._count(cut_at_max_tokens=1)
    return choices[0].message.content or ''

  def _reason(self, error: Exception) -> str:
    """Returns why to try again.

    Raises:
      NoReplyError: the endpoint refuses this very request.
      ValueError: it refuses all.
    """
    status = getattr(error, 'status_code', None)
    place = f'{self._settings.base_url} (model {self._settings.model!r})'
    if isinstance(error, self._openai.APITimeoutError):
      return 'timeout'
    if status is None:
      return 'connection'
    if status in (408, 409, 429):
      return 'rate_limited' if status == 429 else 'server_error'
    if status >= 500:
      return 'server_error'
    said = ' '.join(str(error).split())[:200]
    if status in (401, 403):
      self._stop(
        f'{place} refuses the key in ${self._settings.key_variable} (status'
        f' {status}: {said}); set that variable to a valid key'
      )
    if status == 404 or not self._has_answered:
      is_bounded = self._settings.json_mode == 'bounded_json_schema'
      simpler = 'json_schema' if is_bounded else 'text'
      self._stop(
        f'{place} refuses the request (status {status}: {said}); check'
        f' base_url and model, and try json_mode="{simpler}"'
      )
    raise NoReplyError('refused_request', said) from None

  def _wait_s(self, number: int, error: Exception, rng: random.Random) -> float:
    wait = self._settings.backoff_s * 2**number * (0.5 + rng.random())
    response = getattr(error, 'response', None)
    asked = response.headers.get('retry-after') if response is not None else ''
    with contextlib.suppress(ValueError):  # A date: the back-off will do.
      wait = max(wait, float(asked or 0))
    return min(wait, _MAX_WAIT_S)

  def _give_up(self, reason: str) -> None:
    with self._lock:
      self._failed_in_a_row += 1
      failed = self._failed_in_a_row
      # Nobody there from the start: no use in trying all.
      is_absent = not self._has_answered and reason in _NOBODY
      is_down = is_absent or failed >= _MAX_FAILED
    if is_down:
      self._stop(
        f'{self._settings.base_url} does not answer ({reason};'
        f' {failed} requests in a row, {self._settings.num_tries} tries each);'
        ' start it or correct base_url, and run the same command again:'
        ' nothing is lost'
      )
    raise NoReplyError(reason)

  def _stop(self, message: str) -> NoReturn:
    # The requests of other threads would only wait for the same.
    self._stopped = message
    raise ValueError(message) from None

  def _count(self, **counts: int) -> None:
    with self._lock:
      self._counts.update(counts)


def _format(request: requests.Request, json_mode: str) -> dict[str, Any]:
  """Returns what a request asks of the form of its reply; {} for nothing."""
  if json_mode == 'text':
    return {}
  if json_mode == 'json_object':
    return {'type': 'json_object'}
  schema = requests.make_schema(request)
  if json_mode == 'json_schema':
    schema = schemas.without_lengths(schema)
  return {
    'type': 'json_schema',
    'json_schema': {'name': type(request).__name__, 'strict': True, 'schema': schema},
  }
