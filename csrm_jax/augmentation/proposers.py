"""Who answers requests: RuleWorld's oracle, or a language model.

`Oracle` answers exactly for RuleWorld, `Endpoint` asks a model behind an OpenAI-compatible HTTP
endpoint, `LocalModel` one in this process. All are made from the fields of configs/augment.py,
as in `Endpoint(cache, **config.endpoint)`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from csrm_jax.augmentation import requests
from csrm_jax.core import checks, client as client_lib, files, journal, retry
from csrm_jax.models import hf, sampling
from csrm_jax.reward import backbone
from csrm_jax.ruleworld import alarms, proposer as world
from csrm_jax.safety.schema import Category, Message

# (conversations, a category for each) -> whether each last response violates its category.
Judge = Callable[[Sequence[tuple[Message, ...]], Sequence[Category]], list[bool]]

# Called with (number finished, log lines) after each piece of work.
Progress = Callable[[int, Sequence[Mapping[str, Any]]], None]

JSON_MODES = ('json_schema', 'bounded_json_schema', 'json_object', 'text')
# A rerun may get past these reasons; whatever else failed would fail again.
TRANSIENT = ('timeout', 'rate_limited', 'server_error', 'connection')
# After so many requests in a row that failed for such a reason the run stops.
_MAX_FAILED = 10
# Requests to a model in this process share a batch if they come within this time.
_GATHER_S = 0.02
_LEAST = '{name} is {value}; it must be >= {least}'


class NoReplyError(Exception):
  """No usable reply came; `reason` is one word, to be counted."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(detail or reason)
    self.reason = reason


class Proposer(Protocol):
  """Answers requests.

  Attributes:
    name: The model's name in the data card.
    concurrency: How many requests it takes at once.
  """

  name: str
  concurrency: int

  def ask(self, request: requests.Request) -> Any:
    """Returns the typed reply.

    Raises:
      NoReplyError: There is no usable reply; the item is dropped and counted.
      ValueError: The proposer cannot work at all (a wrong key, a server that is down).
    """

  def usage(self) -> dict[str, Any]:
    """Returns counts since the start: requests, tokens, cache hits, ..."""


def map_at_once(num: int, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
  """Yields fn(item) for each item, in order; `num` of them are at work at once."""
  if num == 1:  # Without threads an error shows where it arose, and work stops at once.
    yield from map(fn, items)
    return
  with concurrent.futures.ThreadPoolExecutor(num) as pool:
    yield from pool.map(fn, items)


@dataclasses.dataclass
class Oracle:
  """Answers for RuleWorld's conversations, exactly and at once.

  Replies follow from the request and the seed alone. `disobey` is the share of rewrites that do
  not heed their lists, as those of language models often do not; for `slip` see
  `ruleworld.proposer.write_guideline`.
  """

  seed: int
  disobey: float
  slip: str
  name: str = 'ruleworld-oracle'
  concurrency: int = 1

  def __post_init__(self):
    self._num_asked = 0

  def ask(self, request: requests.Request) -> Any:
    """Returns the true answer; see `Proposer.ask`."""
    self._num_asked += 1
    rng = random.Random(f'{self.seed}/{requests.digest(request)}')
    match request:
      case requests.ProposeCategories(safety, talk):
        found = world.propose(rng, safety, talk)
        return requests.Categories(*_known(found, 'not_ruleworld'))
      case requests.ListSubcategories(category, count):
        return world.list_subcategories(rng, category, count)
      case requests.AddSubcategory(category, known, talk):
        return _known(world.add_subcategory(category, known, talk), 'no_subcategory')
      case requests.PickMostSevere(category, subcategories):
        return world.pick_most_severe(category, subcategories)
      case requests.WriteGuideline(category, forbidden, allowed):
        return world.write_guideline(rng, category, forbidden, allowed, self.disobey, self.slip)
      case requests.InduceRules(talks, bits):
        return _known(alarms.induce(talks, bits) or None, 'no_alarms')

  def usage(self) -> dict[str, int]:
    """Returns how many requests were answered."""
    return {'requests': self._num_asked}


def _known(reply: Any, reason: str) -> Any:
  if reply is None:
    raise NoReplyError(reason)
  return reply


class _Counts:
  """Numbers by name that threads add to."""

  def __init__(self):
    self._lock = threading.Lock()
    self._numbers = collections.Counter()

  def add(self, **numbers: int) -> None:
    with self._lock:
      self._numbers.update(numbers)

  def to_dict(self) -> dict[str, int]:
    with self._lock:
      return dict(self._numbers)


def _ask_model(
  request: requests.Request,
  sampled: Sequence[Any],
  cache: journal.Cache,
  write: Callable[[requests.Request, int], str],
  num_tries: int,
  counts: _Counts,
) -> Any:
  """Returns the typed reply of a language model, from the cache where it is there."""
  # `sampled` holds all that a reply depends on besides the request.
  key = files.digest([*sampled, requests.make_messages(request)])
  problem = None
  # A text that does not parse is never repaired: another one is asked for.
  for number in range(num_tries):
    entry = f'{key}-{number}' if number else key
    text = cache.get(entry)
    if text is not None:
      counts.add(cache_hits=1)
    else:
      text = write(request, number)
      # What does not parse is cached too, so that a rerun costs nothing. An empty text is not:
      # it may be a slip of the service.
      if text.strip():
        cache.put(entry, text)
    try:
      return requests.parse(request, text)
    except ValueError as error:
      problem = error
      counts.add(unparsable=1)
  raise NoReplyError('unparsable', str(problem))


class _Fields:
  """What a service calls an object; whatever else it sent has no fields."""

  def __init__(self, value: Any):
    self.values = value if isinstance(value, dict) else {}

  def fields(self, name: str) -> _Fields:
    return _Fields(self.values.get(name))

  def count(self, name: str) -> int:
    value = self.values.get(name)
    return value if type(value) is int and 0 <= value < 2**40 else 0


def _bounded_client(timeout_s: float) -> Any:
  """Returns a client whose replies end in time and size, and that follows no redirects."""
  import httpx2 as httpx  # that of openai
  import openai

  class Bounded(httpx.SyncByteStream):
    def __init__(self, stream: Any):
      self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
      try:
        yield from client_lib.bounded(self.stream, timeout_s, time.monotonic())
      except OverflowError as error:
        raise httpx.ReadError(f'a reply of {error}') from None
      except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from None

    def close(self) -> None:
      self.stream.close()

  class Client(openai.DefaultHttpxClient):
    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
      response = super().send(request, stream=True, **options)
      response.stream = Bounded(response.stream)
      if not stream:
        response.read()
      return response

  return Client(follow_redirects=False)


@dataclasses.dataclass(eq=False)
class Endpoint:
  """Asks a language model behind an endpoint; threads may share it.

  The fields after the cache are those of config.endpoint. Nothing is asked until `ask`.
  """

  cache: journal.Cache
  base_url: str
  model: str
  key_variable: str
  json_mode: str
  temperature: float
  max_tokens: int
  timeout_s: float
  num_tries: int
  num_unparsable: int
  backoff_s: float
  concurrency: int
  price_in: float
  price_out: float
  # A file that gets a line for each reply: what was paid for stands there whatever comes after.
  paid: pathlib.Path | None = None

  def __post_init__(self):
    for name in ('base_url', 'model'):
      if not getattr(self, name):
        raise ValueError(
          f"the endpoint's {name} is empty; set it, as in --config.endpoint.{name}=..."
        )
    checks.no_secret("the endpoint's base_url", self.base_url)
    if self.json_mode not in JSON_MODES:
      raise ValueError(f'json_mode is {self.json_mode!r}; use one of {", ".join(JSON_MODES)}')
    counts = ('num_tries', 'num_unparsable', 'concurrency', 'max_tokens')
    checks.at_least(self, counts, say=_LEAST)
    try:
      import openai
    except ImportError:
      raise ImportError(
        f'an endpoint needs the client "openai"; {checks.install("openai")}'
      ) from None
    self.name = self.model
    self._openai = openai
    # The client's own retries are off: they know no `backoff_s`, and do not try again after a
    # body that is no JSON.
    self._client = openai.OpenAI(
      base_url=self.base_url,
      # The client wants some key even where the server wants none.
      api_key=os.environ.get(self.key_variable) or 'none',  # It is never stored.
      timeout=self.timeout_s,
      max_retries=0,
      http_client=_bounded_client(self.timeout_s),
    )
    self._slots = threading.BoundedSemaphore(self.concurrency)
    self._lock = threading.Lock()
    self._counts = _Counts()
    self._failed_in_a_row = 0
    self._has_answered = False
    self._stopped = ''

  def usage(self) -> dict[str, Any]:
    """Returns counts of requests, tokens, retries and cache hits, and the cost."""
    counts = self._counts.to_dict()
    price = counts.get('prompt_tokens', 0) * self.price_in
    price += counts.get('reply_tokens', 0) * self.price_out
    # Prices are per million tokens.
    return counts | {'corrupt_cache': self.cache.num_corrupt, 'cost': price / 1e6}

  def ask(self, request: requests.Request) -> Any:
    """Returns the typed reply, from the cache where it is there; see `Proposer.ask`.

    NoReplyError has the reason 'unparsable', 'refused_request' or one of `TRANSIENT`.
    """
    sampled = (self.model, self.temperature, self.max_tokens, self.json_mode)
    return _ask_model(request, sampled, self.cache, self._write, self.num_unparsable, self._counts)

  def _write(self, request: requests.Request, seed: int) -> str:
    """Returns the text of one reply; waits and tries again where it helps."""
    errors = (self._openai.APIError, json.JSONDecodeError)
    try:
      text = retry.call(
        lambda number: self._send(request, seed, number),
        self.num_tries,
        self.backoff_s,
        errors,
        self._reason,
      )
    except retry.GaveUpError as error:
      self._give_up(str(error))
    with self._lock:
      self._failed_in_a_row = 0
      self._has_answered = True
    return text

  def _send(self, request: requests.Request, seed: int, number: int) -> str:
    if self._stopped:
      raise ValueError(self._stopped)
    if number:
      self._counts.add(retries=1)
    with self._slots:
      self._counts.add(requests=1)
      # Raw: the client's types hold whatever JSON came.
      raw = self._client.chat.completions.with_raw_response.create(
        model=self.model,
        messages=requests.make_messages(request),
        temperature=self.temperature,
        max_tokens=self.max_tokens,
        seed=seed,
        **self._format(request),
      )
    try:
      reply = _Fields(json.loads(raw.http_response.content))
    except (ValueError, RecursionError):
      raise json.JSONDecodeError('no JSON', '', 0) from None
    usage, tokens = reply.fields('usage'), {}
    if usage.values:
      tokens = {
        'prompt_tokens': usage.count('prompt_tokens'),
        'reply_tokens': usage.count('completion_tokens'),
      }
      self._counts.add(**tokens)
    if self.paid:
      with self._lock:
        files.append_log(self.paid, [{'requests': 1, **tokens}])
    # A reply without choices or text, or one that breaks the protocol, is as unusable as prose.
    choices = reply.values.get('choices')
    choice = _Fields(choices[0] if isinstance(choices, list) and choices else None)
    if choice.values.get('finish_reason') == 'length':
      self._counts.add(cut_at_max_tokens=1)
    text = choice.fields('message').values.get('content')
    return text if isinstance(text, str) else ''

  def _format(self, request: requests.Request) -> dict[str, Any]:
    """Returns the argument that asks for a form of the reply, if any."""
    if self.json_mode == 'text':
      return {}
    if self.json_mode == 'json_object':
      return {'response_format': {'type': 'json_object'}}
    schema = requests.make_schema(request)
    if self.json_mode == 'json_schema':
      schema = requests.without_lengths(schema)
    named = {'name': type(request).__name__, 'strict': True, 'schema': schema}
    return {'response_format': {'type': 'json_schema', 'json_schema': named}}

  def _reason(self, error: Exception) -> str:
    """Returns why to try again; raises where this request, or every one, is refused."""
    status = getattr(error, 'status_code', None)
    if isinstance(error, self._openai.APITimeoutError):
      return 'timeout'
    if status is None:
      return 'connection'
    if status == 429:
      return 'rate_limited'
    if status in (408, 409) or status >= 500:
      return 'server_error'
    place = f'{self.base_url} (model {self.model!r})'
    # Services repeat keys that they refuse.
    key = os.environ.get(self.key_variable) or '***'
    said = checks.redact(' '.join(str(error).split()).replace(key, '***'))[:200]
    if status in (401, 403):
      self._stop(
        f'{place} refuses the key in ${self.key_variable} (status'
        f' {status}: {said}); set that variable to a valid key'
      )
    # Before the first answer a refusal is taken to be of every request: the address, the model
    # or the form of the reply is wrong. Later it is of this request only.
    if status == 404 or not self._has_answered:
      simpler = 'json_schema' if self.json_mode == 'bounded_json_schema' else 'text'
      self._stop(
        f'{place} refuses the request (status {status}: {said}); check'
        f' base_url and model, and try json_mode="{simpler}"'
      )
    raise NoReplyError('refused_request', said) from None

  def _give_up(self, reason: str) -> NoReturn:
    with self._lock:
      self._failed_in_a_row += 1
      failed = self._failed_in_a_row
    # Nobody was there from the start: it is of no use to try all requests.
    is_absent = not self._has_answered and reason in ('timeout', 'connection')
    if is_absent or failed >= _MAX_FAILED:
      self._stop(
        f'{self.base_url} does not answer ({reason};'
        f' {failed} requests in a row, {self.num_tries} tries each);'
        ' start it or correct base_url, and run the same command again:'
        ' nothing is lost'
      )
    raise NoReplyError(reason)

  def _stop(self, message: str) -> NoReturn:
    # The requests of other threads would only wait for the same.
    self._stopped = message
    raise ValueError(message) from None


# The ids of a prompt, which draw is asked for, and what will hold the text.
_Asked = tuple[list[int], int, concurrent.futures.Future[str]]


@dataclasses.dataclass(eq=False)
class LocalModel:
  """Asks a chat model of ours, in this process; threads may share it.

  Requests that wait at the same time are answered in one batch. The reply follows from the
  request and the seed, not from what shares the batch (up to rounding). The fields after the
  seed are those of config.model.
  """

  cache: journal.Cache
  seed: int
  init: str
  dtype: str
  temperature: float
  top_p: float
  max_tokens: int
  num_unparsable: int
  concurrency: int

  def __post_init__(self):
    if not self.init:
      raise ValueError(
        "the model's init is empty; give a folder, a hub id or a .gguf file,"
        ' as in --config.model.init=...'
      )
    checks.at_least(self, ('num_unparsable', 'concurrency', 'max_tokens'), say=_LEAST)
    self.name = self.init
    self._digest = hf.digest(self.init)
    self._tokenizer = backbone.load_tokenizer(self.init)
    self._marks = backbone.chat_marks(self.init, self._tokenizer)
    self._sampling = sampling.Sampling(
      max_completion_length=self.max_tokens,
      temperature=self.temperature,
      top_p=self.top_p,
      stop_ids=_stop_ids(self._tokenizer, self._marks[1]),
    )
    self._model, self._params = hf.load(self.init, dtype=self.dtype, param_dtype=self.dtype)
    self._counts = _Counts()
    self._waiting: list[_Asked] = []
    self._lock = threading.Lock()  # Of those that wait.
    self._turn = threading.Lock()  # One batch at a time.

  def usage(self) -> dict[str, int]:
    """Returns counts of requests, batches, tokens and cache hits."""
    return self._counts.to_dict() | {'corrupt_cache': self.cache.num_corrupt}

  def ask(self, request: requests.Request) -> Any:
    """Returns the typed reply, from the cache where it is there; see `Proposer.ask`.

    NoReplyError has the reason 'unparsable', or 'too_long' for the model's context.
    """
    sampled = (self._digest, self.dtype, self.seed, self.temperature, self.top_p, self.max_tokens)
    return _ask_model(request, sampled, self.cache, self._write, self.num_unparsable, self._counts)

  def _write(self, request: requests.Request, number: int) -> str:
    ids = self._encode(request)
    if len(ids) + self.max_tokens > self._model.context_length:
      raise NoReplyError('too_long', f'{len(ids)} tokens')
    # Another draw for each try; the same one whenever it is asked.
    draw = (int(requests.digest(request)[:8], 16) + number) % 2**32
    text = concurrent.futures.Future()
    with self._lock:
      self._waiting.append((ids, draw, text))
    # One of the threads that wait takes its turn and answers for all, so no thread of its own is
    # needed, and none idles.
    while not text.done():
      with self._turn:  # Others gather while a batch is at work.
        if not text.done():
          if self.concurrency > 1:
            time.sleep(_GATHER_S)
          with self._lock:
            batch = self._waiting[: self.concurrency]
            del self._waiting[: self.concurrency]
          self._answer(batch)
    return text.result()

  def _answer(self, batch: Sequence[_Asked]) -> None:
    prompts, draws, texts = zip(*batch, strict=True)
    try:
      done = sampling.generate(
        self._model,
        self._params,
        prompts,
        self._sampling,
        seed=self.seed,
        draws=draws,
        batch_size=self.concurrency,
      )
    except Exception as error:  # Every thread that waits must hear of it.
      for text in texts:
        text.set_exception(error)
      return
    self._counts.add(
      requests=len(batch),
      batches=1,
      prompt_tokens=sum(map(len, prompts)),
      reply_tokens=int(done.lengths.sum()),
    )
    for i, text in enumerate(texts):
      # The token that stopped a reply is no part of it.
      num = done.lengths[i] - done.stopped[i]
      text.set_result(self._tokenizer.decode(done.tokens[i, :num].tolist()))

  def _encode(self, request: requests.Request) -> list[int]:
    # One turn of the user: not every chat template has a system's.
    text = '\n\n'.join(m['content'] for m in requests.make_messages(request))
    tokenizer, (prefix, suffix) = self._tokenizer, self._marks
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode_control(prefix)
    return ids + tokenizer.encode(text) + tokenizer.encode_control(suffix)


def _stop_ids(tokenizer: Any, suffix: str) -> tuple[int, ...]:
  """Returns the ids that end an answer."""
  # Chat models close their own turn with the control token that closes the user's, if there is
  # one; a token that decodes to text is none.
  first = tokenizer.encode_control(suffix.strip())[:1]
  is_control = bool(first) and not tokenizer.decode(first)
  return tuple({tokenizer.eos_id, *(first if is_control else ())})
