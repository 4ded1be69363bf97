"""JSON over HTTP, asked strictly: limits on time and size, tries, one line for what goes wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Any

from csrm_jax.core import checks, files, retry

MAX_REPLY_BYTES = 2**26


class RefusedError(ValueError):
  """The service refuses the request, which another try would not change; `status` says why."""

  def __init__(self, message: str, status: int = 0):
    super().__init__(message)
    self.status = status


class _PassingError(Exception):
  """The service's status is one that may pass."""

  def __init__(self, response: Any):
    super().__init__(f'status {response.status_code}')
    self.response = response


def bounded(parts: Iterable[bytes], timeout_s: float, start_s: float) -> Iterator[bytes]:
  """Yields the parts of a reply's body as they come; start_s is when they were asked for.

  Raises:
    OverflowError: They are more than MAX_REPLY_BYTES.
    TimeoutError: They take longer. A client's own limit is that of each part, which a body that
      drips never meets.
  """
  num, end = 0, start_s + timeout_s
  for part in parts:
    num += len(part)
    if num > MAX_REPLY_BYTES:
      raise OverflowError(f'more than {MAX_REPLY_BYTES:,} bytes')
    if time.monotonic() > end:
      raise TimeoutError(f'its reply took more than {timeout_s} s')
    yield part


@dataclasses.dataclass(frozen=True)
class Client:
  """A client of one URL, whose connections are kept; threads may share it.

  It follows no redirects, whose page would be taken for an answer.
  """

  url: str
  what: str = 'service'  # its name in errors
  timeout_s: float = 60.0  # from sending to the end of the reply
  num_tries: int = 3  # how often a request is sent that fails on the way
  backoff_s: float = 1.0  # the wait before the second try; it doubles with each further one
  connections: int = 4  # at once
  key_variable: str = ''  # the environment variable with the bearer token; '' sends none
  ca_file: str = ''  # PEM certificates to trust in place of the system's

  def __post_init__(self):
    checks.no_secret(f'the URL of the {self.what}', self.url)
    if not self.url.startswith(('http://', 'https://')):
      raise ValueError(
        f'the URL of the {self.what} is {self.url!r}; it must begin with http:// or https://'
      )
    say = f'{{name}} of the {self.what} is {{value}}; it must be >= {{least}}'
    checks.at_least(self, ('num_tries', 'connections'), say=say)
    if not (self.timeout_s > 0 and self.backoff_s >= 0):
      raise ValueError(
        f'timeout_s of the {self.what} is {self.timeout_s}, backoff_s '
        f'{self.backoff_s}; the first must be above 0, the other not below'
      )
    if self.key_variable and not os.environ.get(self.key_variable):
      raise ValueError(
        f'the environment variable {self.key_variable} is empty; set it to the token of the '
        f'{self.what}, or name none'
      )

  @functools.cached_property
  def _http(self) -> Any:
    httpx = checks.require('httpx2', f'the {self.what} at {self.url}', 'http')
    verify: Any = True
    if self.ca_file:
      try:
        verify = ssl.create_default_context(cafile=os.path.expanduser(self.ca_file))
      except OSError as error:
        raise ValueError(
          f'{self.ca_file}: no certificates to be read ({checks.reason(error)}); give a PEM file'
        ) from None
    headers = {'Content-Type': 'application/json'}
    if self.key_variable:
      headers['Authorization'] = f'Bearer {os.environ[self.key_variable]}'
    return httpx.Client(
      headers=headers,
      timeout=self.timeout_s,
      verify=verify,
      follow_redirects=False,
      limits=httpx.Limits(max_connections=self.connections),
    )

  def post(self, obj: Any) -> bytes:
    """Returns the body of the reply to a JSON value; tries again after errors that may pass.

    Raises:
      RefusedError: The service refuses, redirects or replies with too much.
      ValueError: It does not answer.
    """
    client = self._http
    import httpx2 as httpx

    content = json.dumps(obj).encode()
    errors = (httpx.TransportError, httpx.DecodingError, TimeoutError, _PassingError)
    try:
      return retry.call(
        lambda _: self._send(client, content), self.num_tries, self.backoff_s, errors, checks.reason
      )
    except retry.GaveUpError as error:
      raise ValueError(
        f'the {self.what} at {self.url} does not answer ({error}; '
        f'{self.num_tries} tries); start it or correct the URL'
      ) from None

  def _send(self, client: Any, content: bytes) -> bytes:
    start_s = time.monotonic()
    with client.stream('POST', self.url, content=content) as response:
      try:
        body = b''.join(bounded(response.iter_bytes(), self.timeout_s, start_s))
      except OverflowError as error:
        raise RefusedError(
          f'the {self.what} at {self.url} replied with {error}; ask for less at once'
        ) from None
    code = response.status_code
    if 200 <= code < 300:
      return body
    if 300 <= code < 400:
      raise RefusedError(
        f'the {self.what} at {self.url} redirects (status {code}); give the URL that answers', code
      )
    # Time-outs, conflicts, "too early" and "too many requests" may pass, as a server's faults may.
    if code < 500 and code not in (408, 409, 425, 429):
      said = self._without_key(' '.join(body[:500].decode(errors='replace').split()))
      raise RefusedError(
        f'the {self.what} at {self.url} refuses the request (status {code}: {said[:200]}); check '
        'the URL and what it expects',
        code,
      )
    raise _PassingError(response)

  def parse(self, body: bytes, sent: str) -> dict[str, Any]:
    """Returns the object in a reply; {} for another JSON value. `sent` names what was asked."""
    try:
      reply = json.loads(body, object_pairs_hook=files.unique_keys(self.url))
    except (ValueError, RecursionError):
      raise ValueError(
        f'the {self.what} at {self.url} replied what is not JSON to {sent}; correct the URL'
      ) from None
    reply = reply if isinstance(reply, dict) else {}
    for name in ('error', 'errors'):
      if reply.get(name):
        raise ValueError(
          f'the {self.what} at {self.url} replied to {sent} with {name}: '
          f'{self._without_key(checks.show(reply[name]))}; what cannot be scored has no reward'
        )
    return reply

  def _without_key(self, said: str) -> str:
    """Returns what a service says without the key that it may repeat."""
    key = os.environ.get(self.key_variable) if self.key_variable else ''
    return checks.redact(said.replace(key, '***') if key else said)
