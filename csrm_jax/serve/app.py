"""The HTTP side of the server: endpoints, what guards them, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import hmac
import json
import logging
import math
import pathlib
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import fastapi
import numpy as np
import prometheus_client
from fastapi import responses
from prometheus_client import core as prometheus

from csrm_jax.data import domain
from csrm_jax.evals.thresholds import Threshold
from csrm_jax.reward import monitor, scoring
from csrm_jax.safety import schema
from csrm_jax.serve import engine as engine_lib, openapi, wire
from csrm_jax.serve.policies import Policies
from csrm_jax.serve.wire import Ask, RequestError

_PAGE = pathlib.Path(__file__).parent / 'page'
# What a browser shows without a token; the requests that the page makes need one.
_OPEN_PATHS = ('/health', '/ready', '/', '/page.js', '/page.css', '/docs', '/docs.js')
_LOCAL_HOSTS = ('127.0.0.1', 'localhost', '[::1]')
# Longer bodies are read in a thread, so that they hold up no one else.
_LONG_BODY = 16_384
_HEADERS = {
  'X-Content-Type-Options': 'nosniff',
  'Content-Security-Policy': "default-src 'self'; frame-ancestors 'none'",
  'Cache-Control': 'no-store',
}
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the server meets its clients."""

  limits: wire.Limits
  threshold: float  # P(unsafe) from which on a response is flagged
  thresholds: Mapping[str, Threshold] = dataclasses.field(default_factory=dict)  # by rules' digest
  cuts: monitor.Cuts = dataclasses.field(default_factory=monitor.Cuts)  # where streams are judged
  alarms: Mapping[str, Threshold] = dataclasses.field(default_factory=dict)  # of streams
  token: str = ''  # clients must send it as bearer token; '' for none
  allowed_hosts: tuple[str, ...] = ()  # beside this machine's names, where there is no token
  body_timeout_s: float = 10.0  # for a request's body to arrive
  reload_s: float = 2.0  # how often the policies' folder is looked at
  audit_log: str = ''  # JSON lines about each verdict; '' for none

  def __post_init__(self):
    if not 0 < self.threshold < 1:
      raise ValueError(f'threshold is {self.threshold}; it is a P(unsafe) between 0 and 1')


@dataclasses.dataclass(frozen=True)
class Judged:
  """The verdict on one conversation."""

  item: wire.Item
  score: float  # nats
  p_unsafe: float
  reward: float  # 1 - p_unsafe, to all digits
  flagged: bool
  threshold: float  # P(unsafe) from which on it is
  num_cut: int  # tokens of the conversation that were not read
  unread: float  # their share of the prompt's
  outside: str  # what is unlike the training data, see domain.Domain.marks; or ''
  each_rule: dict[str, float]  # P(unsafe) under each rule alone; {} where not asked for
  violated: dict[str, bool]  # whether that is flagged

  @property
  def label(self) -> str:
    return schema.LABELS[self.flagged]


def make_app(engine: engine_lib.Engine, policies: Policies, settings: Settings) -> fastapi.FastAPI:
  """Returns the ASGI application; it starts and closes the engine."""
  server = _Server(engine, policies, settings)
  app = fastapi.FastAPI(
    title='csrm_jax',
    summary='A safety reward model that reads the rules',
    version='1',
    docs_url=None,
    redoc_url=None,
    lifespan=server.lifespan,
  )
  for path, (read, answer) in server.endpoints.items():
    app.post(path, **openapi.ENDPOINTS[path])(server.make_handler(path, read, answer))
  for path, answer in server.pages.items():
    app.get(path, **openapi.PAGES.get(path, {'include_in_schema': False}))(answer)
  app.add_middleware(_Guard, server=server)
  app.state.server = server
  return app


class _Server:
  """What the handlers share."""

  def __init__(self, engine: engine_lib.Engine, policies: Policies, settings: Settings):
    self.engine, self.policies, self.settings = engine, policies, settings
    self.reader = wire.Reader(policies, settings.limits)
    self.metrics = _Metrics(engine)
    self.is_draining = False
    self._audit = None
    if settings.audit_log:
      path = pathlib.Path(settings.audit_log).expanduser()
      self._audit = open(path, 'a', encoding='utf-8', buffering=1)  # noqa: SIM115
    self.endpoints = {
      '/v1/moderations': (lambda r, body: self.reader.read_moderation(body), self._moderations),
      '/score': (lambda r, body: self.reader.read_score(body), _scores),
      '/get_reward': (
        lambda r, body: self.reader.read_reward(body, r.query_params.get('policy')),
        _rewards,
      ),
      '/monitor': (lambda r, body: self.reader.read_monitor(body, settings.cuts), self._monitor),
      '/v1/chat/completions': (lambda r, body: self.reader.read_chat(body), self._chat),
    }
    self.pages = {
      '/health': self._health,
      '/ready': self._ready,
      '/metrics': self._metrics_page,
      '/policies': self._policies,
      '/v1/models': self._models,
      **{path: _static(name) for path, name in _FILES.items()},
    }

  @contextlib.asynccontextmanager
  async def lifespan(self, app: fastapi.FastAPI) -> AsyncIterator[None]:
    self.engine.start()
    watcher = asyncio.create_task(self._watch())
    try:
      yield
    finally:
      watcher.cancel()
      # All accepted requests have their answers by now.
      await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
      if self._audit:
        self._audit.close()

  async def _watch(self) -> None:
    loop = asyncio.get_running_loop()
    while True:
      await asyncio.sleep(self.settings.reload_s)
      try:
        await loop.run_in_executor(None, self.policies.refresh)
      except OSError as error:  # The folder is gone for a moment; what was read stays.
        logging.getLogger(__name__).warning('the policies cannot be read: %s', error.strerror)

  # --- One request ---------------------------------------------------------------------

  def make_handler(
    self,
    path: str,
    read: Callable[[fastapi.Request, dict[str, Any]], Ask],
    answer: Callable[[Sequence[Judged], Mapping[str, Any]], Any],
  ) -> Callable[..., Awaitable[responses.Response]]:
    """Returns the handler of an endpoint: a body is read to an ask, verdicts become an answer."""

    async def handle(request: fastapi.Request) -> responses.Response:
      start = time.monotonic()
      body = await self._read_body(request)
      # What will be refused in any case should cost little.
      with _refusals():
        self.engine.check_room()

      def prepare():
        obj = wire.load_json(body)
        ask = read(request, obj)
        return obj, ask, self._rows(ask)

      if len(body) > _LONG_BODY:
        loop = asyncio.get_running_loop()
        obj, ask, rows = await loop.run_in_executor(None, prepare)
      else:
        obj, ask, rows = prepare()
      scores = await self._score(request, [row for group in rows for row in group])
      judged = self._judge(ask, rows, scores)
      self._record(path, judged, time.monotonic() - start)
      return _json(answer(judged, obj))

    handle.__name__ = path.strip('/').replace('/', '_')
    return handle

  async def _read_body(self, request: fastapi.Request) -> bytes:
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
      raise RequestError(415, 'the body must be JSON; send "Content-Type: application/json"')
    most = self.settings.limits.body_bytes
    too_large = RequestError(413, f'the body has more than {most} bytes; send less at once')
    length = request.headers.get('content-length', '')
    if length.isdigit() and int(length) > most:
      raise too_large
    body = bytearray()
    try:
      async with asyncio.timeout(self.settings.body_timeout_s):
        async for chunk in request.stream():
          body += chunk
          if len(body) > most:
            raise too_large
    except TimeoutError:
      raise RequestError(
        408, f'the body did not arrive within {self.settings.body_timeout_s:g} s; send it at once'
      ) from None
    return bytes(body)

  def _rows(self, ask: Ask) -> list[list[engine_lib.Row]]:
    """Returns the rows of each item: its rules together, then, where asked for, each alone."""
    try:
      return [self._rows_of(item, ask) for item in ask.items]
    except engine_lib.TooLongError as error:
      raise RequestError(413, str(error), 'too_long') from None
    except domain.OutOfDomainError as error:
      raise RequestError(422, str(error), 'out_of_domain') from None
    except ValueError as error:
      raise RequestError(400, str(error)) from None

  def _rows_of(self, item: wire.Item, ask: Ask) -> list[engine_lib.Row]:
    rules, alone = item.policy.safety, []
    if (ask.each_rule and len(rules.categories) > 1) or self.engine.per_category:
      alone = [schema.SafetyConfig((category,)) for category in rules.categories]
    together = [] if self.engine.per_category else [rules]
    return [
      self.engine.encode(safety, item.conversation, ask.shorten) for safety in (*together, *alone)
    ]

  async def _score(self, request: fastapi.Request, rows: Sequence[engine_lib.Row]) -> np.ndarray:
    """Returns the scores of rows; a client that goes away takes its rows off the queue."""
    if not rows:
      return np.zeros(0, np.float32)
    with _refusals():
      future = asyncio.wrap_future(self.engine.submit(rows))
    gone = asyncio.ensure_future(request.receive())
    try:
      await asyncio.wait(
        (future, gone), timeout=2 * self.engine.deadline_s + 60, return_when=asyncio.FIRST_COMPLETED
      )
      if not future.done():
        if gone.done():
          raise RequestError(499, 'the client closed the connection', 'cancelled')
        raise RequestError(503, 'the device does not answer', 'stuck')
      return future.result()
    except engine_lib.LateError as error:
      raise RequestError(503, str(error), 'late', Retry_After='1') from None
    finally:
      gone.cancel()
      future.cancel()

  def _judge(
    self, ask: Ask, rows: Sequence[Sequence[engine_lib.Row]], scores: np.ndarray
  ) -> list[Judged]:
    judged, start = [], 0
    # 1 - p loses digits where p is near 1; the sigmoid does not.
    p_all, rewards = scoring.probabilities(scores)
    for item, group in zip(ask.items, rows, strict=True):
      here = slice(start, start + len(group))
      start, own, p_own = here.stop, scores[here], p_all[here]
      # A guard that reads one rule at a time finds an example as unsafe as under its worst rule.
      at = here.start + (int(own.argmin()) if self.engine.per_category else 0)
      whole, p_unsafe, reward = (float(values[at]) for values in (scores, p_all, rewards))
      by_rules = self.settings.alarms if ask.is_stream else self.settings.thresholds
      flagged, threshold = self._flags(item.policy.digest, whole, p_unsafe, by_rules)
      each, violated = {}, {}
      if ask.each_rule:
        first = 0 if self.engine.per_category or len(own) == 1 else 1
        alone, found = own[first:], p_own[first:].tolist()
        each = dict(zip(item.policy.safety.names, found, strict=True))
        rules = zip(item.policy.safety.categories, alone.tolist(), found, strict=True)
        violated = {
          rule.name: self._flags(self._digest_of(rule), score, p, by_rules)[0]
          for rule, score, p in rules
        }
      judged.append(
        Judged(
          item=item,
          score=whole,
          p_unsafe=p_unsafe,
          reward=reward,
          flagged=flagged,
          threshold=threshold,
          num_cut=max(row.num_cut for row in group),
          unread=max(row.unread for row in group),
          outside=group[0].outside,
          each_rule=each,
          violated=violated,
        )
      )
    return judged

  def _flags(
    self, digest: str, score: float, p_unsafe: float, by_rules: Mapping[str, Threshold]
  ) -> tuple[bool, float]:
    """Returns whether a score is flagged under rules, and from which P(unsafe) on it would be."""
    fitted = by_rules.get(digest)
    if fitted:
      return fitted.flags(score), fitted.p_unsafe
    return p_unsafe >= self.settings.threshold, self.settings.threshold

  def _digest_of(self, rule: schema.Category) -> str:
    return _digest_alone(rule) if self.settings.thresholds else ''

  def _record(self, path: str, judged: Sequence[Judged], seconds: float) -> None:
    """Counts the verdicts and writes them into the audit log, which never holds any text."""
    for one in judged:
      policy = one.item.policy
      self.metrics.verdicts.labels(policy.name or 'inline', one.label).inc()
      if self._audit:
        text = json.dumps([message.to_dict() for message in one.item.conversation])
        line = {
          'time': datetime.datetime.now(datetime.UTC).isoformat(),
          'endpoint': path,
          'policy': policy.name,
          'policy_digest': policy.digest,
          'label': one.label,
          'p_unsafe': one.p_unsafe,
          'threshold': one.threshold,
          'num_cut': one.num_cut,
          'unread': one.unread,
          'out_of_domain': one.outside,
          'latency_s': round(seconds, 6),
          'text_sha256': hashlib.sha256(text.encode()).hexdigest(),
        }
        self._audit.write(json.dumps(line) + '\n')

  # --- Answers -------------------------------------------------------------------------

  def _monitor(self, judged: Sequence[Judged], body: Mapping[str, Any]) -> Any:
    fitted = judged and self.settings.alarms.get(judged[0].item.policy.digest)
    return {
      'alarm': any(one.flagged for one in judged),
      'judged': body.get('judged', 0) + len(judged),
      'p_unsafe': judged[-1].p_unsafe if judged else None,
      # The share of safe streams that is alarmed at most; null where nobody has calibrated it.
      'false_alarms': fitted.level if fitted else None,
      'unit': self.settings.cuts.unit,
      'every': self.settings.cuts.every,
      'verdicts': [_details(one) for one in judged],
    }

  def _moderations(self, judged: Sequence[Judged], body: Mapping[str, Any]) -> Any:
    return {
      'id': f'modr-{uuid.uuid4().hex}',
      'model': judged[0].item.policy.name or 'csrm',
      'results': [
        {
          'flagged': one.flagged,
          'categories': one.violated,
          'category_scores': one.each_rule,
          'category_applied_input_types': {name: ['text'] for name in one.each_rule},
          **_details(one),
        }
        for one in judged
      ],
    }

  def _chat(self, judged: Sequence[Judged], body: Mapping[str, Any]) -> Any:
    (one,) = judged
    logprobs = {'safe': _log_sigmoid(one.score), 'unsafe': _log_sigmoid(-one.score)}
    text = one.label
    violated = [f'S{i}' for i, yes in enumerate(one.violated.values(), start=1) if yes]
    if one.flagged and violated:
      text += '\n' + ','.join(violated)

    def token(word):
      return {'token': word, 'logprob': logprobs[word], 'bytes': list(word.encode())}

    best_first = sorted(logprobs, key=logprobs.get, reverse=True)
    listed = {'content': [token(one.label) | {'top_logprobs': [token(w) for w in best_first]}]}
    return {
      'id': f'chatcmpl-{uuid.uuid4().hex}',
      'object': 'chat.completion',
      'created': int(time.time()),
      'model': one.item.policy.name or 'csrm',
      'choices': [
        {
          'index': 0,
          'message': {'role': 'assistant', 'content': text},
          'finish_reason': 'stop',
          'logprobs': listed if body.get('logprobs') else None,
        }
      ],
      'usage': {'prompt_tokens': 0, 'completion_tokens': 0, 'total_tokens': 0},
      'csrm': _details(one),
    }

  # --- Pages ---------------------------------------------------------------------------

  async def _health(self) -> responses.Response:
    broken = self.engine.broken
    return _json({'status': 'broken' if broken else 'ok', 'detail': broken}, 503 if broken else 200)

  async def _ready(self) -> responses.Response:
    ready = self.engine.ready and not self.is_draining
    status = 'ready' if ready else 'draining' if self.is_draining else 'compiling'
    found = {'status': status, 'num_programs': self.engine.stats.num_programs}
    return _json(found, 200 if ready else 503)

  async def _metrics_page(self) -> responses.Response:
    text = prometheus_client.generate_latest(self.metrics.registry)
    return responses.Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def _policies(self) -> responses.Response:
    listed = [
      policy.describe()
      | {'threshold': self._flags(policy.digest, 0.0, 0.0, self.settings.thresholds)[1]}
      for policy in self.policies.list()
    ]
    return _json({'default': self.policies.default or None, 'policies': listed})

  async def _models(self) -> responses.Response:
    names = [policy.name for policy in self.policies.list()]
    data = [{'id': name, 'object': 'model', 'owned_by': 'csrm_jax'} for name in names]
    return _json({'object': 'list', 'data': data})


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
  """Makes answers of what the engine refuses."""
  try:
    yield
  except engine_lib.OverloadedError as error:
    raise RequestError(
      429, str(error), 'overloaded', Retry_After=str(math.ceil(error.retry_s))
    ) from None
  except engine_lib.NotReadyError as error:
    raise RequestError(503, str(error), 'not_ready', Retry_After='5') from None


@functools.lru_cache(4096)
def _digest_alone(rule: schema.Category) -> str:
  return schema.SafetyConfig((rule,)).digest()


def _scores(judged: Sequence[Judged], body: Mapping[str, Any]) -> Any:
  return {
    'verdicts': [
      _details(one) | ({'each_rule': one.each_rule} if one.each_rule else {}) for one in judged
    ]
  }


def _rewards(judged: Sequence[Judged], body: Mapping[str, Any]) -> Any:
  rewards = [one.reward for one in judged]
  found = {
    'rewards': rewards,
    'scores': rewards,
    'extra_logs': {
      'score_nats': [one.score for one in judged],
      'num_cut': [float(one.num_cut) for one in judged],
      'unread': [one.unread for one in judged],
    },
  }
  # verl asks about one text and wants one number.
  return found | ({'score': rewards[0]} if isinstance(body.get('solution_str'), str) else {})


def _details(one: Judged) -> dict[str, Any]:
  policy = one.item.policy
  return {
    'label': one.label,
    'p_unsafe': one.p_unsafe,
    'reward': one.reward,
    'score': one.score,
    'threshold': one.threshold,
    'shortened': one.num_cut,
    'unread': one.unread,
    'out_of_domain': one.outside,
    'policy': {'name': policy.name or None, 'digest': policy.digest},
  }


def _log_sigmoid(score: float) -> float:
  return float(-np.logaddexp(0.0, -score))


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
  # ASCII, because half of a surrogate pair may stand in what is quoted.
  text = json.dumps(value, allow_nan=False).encode()
  return responses.Response(text, status, headers, media_type='application/json')


_FILES = {
  '/': 'index.html',
  '/page.js': 'page.js',
  '/page.css': 'page.css',
  '/docs': 'docs.html',
  '/docs.js': 'docs.js',
}


def _static(name: str) -> Callable[[], Awaitable[responses.Response]]:
  kind = {'html': 'text/html', 'js': 'text/javascript', 'css': 'text/css'}[name.partition('.')[2]]
  content = (_PAGE / name).read_bytes()

  async def page() -> responses.Response:
    return responses.Response(content, media_type=f'{kind}; charset=utf-8')

  return page


# --- What stands before every request --------------------------------------------------


class _Guard:
  """Checks host and token, turns errors into answers, and counts requests."""

  def __init__(self, app: Any, server: _Server):
    self._app, self._server = app, server
    self._known = {*server.endpoints, *server.pages, '/openapi.json'}
    self._headers = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    start, status, path = time.monotonic(), 500, scope['path']

    async def send_on(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        message = message | {'headers': [*message['headers'], *self._headers]}
      await send(message)

    try:
      self._check(scope)
      if path not in self._known:
        raise RequestError(404, 'no such page; /openapi.json lists what there is')
      await self._app(scope, receive, send_on)
    except RequestError as error:
      await self._refuse(error, scope, receive, send_on)
    except Exception as error:
      # The message may quote text of the request; where it happened does not.
      places = ''.join(traceback.format_tb(error.__traceback__)[-3:])
      logging.getLogger(__name__).error('%s: %s\n%s', path, type(error).__name__, places)
      await self._refuse(
        RequestError(500, 'the server failed; this text has no verdict', 'internal'),
        *(scope, receive, send_on),
      )
    finally:
      seconds = time.monotonic() - start
      name = path if path in self._known else 'other'
      self._server.metrics.requests.labels(name, str(status)).inc()
      if name in self._server.endpoints:
        self._server.metrics.latency.labels(name).observe(seconds)

  async def _refuse(self, error: RequestError, scope: Any, receive: Any, send: Any) -> None:
    content = {'message': str(error), 'type': error.code, 'param': None, 'code': error.code}
    await _json({'error': content}, error.status, error.headers)(scope, receive, send)

  def _check(self, scope: Any) -> None:
    headers = dict(scope['headers'])
    settings = self._server.settings
    if not settings.token:
      # Else a page of the web could reach this machine by a name that it made up.
      host = headers.get(b'host', b'').decode('latin-1').lower()
      name = host.rpartition(':')[0] if not host.endswith(']') and ':' in host else host
      if name not in (*_LOCAL_HOSTS, *settings.allowed_hosts):
        raise RequestError(403, f'the host {name[:60]!r} is not allowed; add it to allowed_hosts')
    elif scope['path'] not in _OPEN_PATHS:
      given = headers.get(b'authorization', b'')
      if not hmac.compare_digest(given, f'Bearer {settings.token}'.encode()):
        raise RequestError(
          401,
          'no valid token; send "Authorization: Bearer TOKEN"',
          'unauthorized',
          WWW_Authenticate='Bearer',
        )


class _Metrics:
  """What /metrics shows; the engine's numbers are read when they are asked for."""

  def __init__(self, engine: engine_lib.Engine):
    self.registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      'csrm_requests', 'Requests answered.', ('path', 'status'), registry=self.registry
    )
    self.latency = prometheus_client.Histogram(
      'csrm_request_seconds', 'From the first byte to the answer.', ('path',),
      buckets=_LATENCY_S, registry=self.registry,
    )  # fmt: skip
    self.verdicts = prometheus_client.Counter(
      'csrm_verdicts', 'Verdicts given.', ('policy', 'label'), registry=self.registry
    )
    self._engine = engine
    self.registry.register(self)

  def collect(self) -> Iterator[Any]:
    """Yields the engine's metrics."""
    engine, stats = self._engine, self._engine.stats
    fill = stats.num_tokens / max(stats.num_places, 1)
    for name, what, value in (
      ('csrm_rows', 'Rows scored.', stats.num_rows),
      ('csrm_tokens', 'Tokens of the rows, behind the rules.', stats.num_tokens),
      ('csrm_batch_places', 'Tokens that the batches had room for.', stats.num_places),
      ('csrm_batches', 'Batches computed.', stats.num_batches),
      ('csrm_batch_failures', 'Batches that failed.', stats.num_failures),
      ('csrm_late', 'Requests whose deadline passed.', stats.num_late),
      ('csrm_cancelled', 'Rows whose client went away.', stats.num_cancelled),
      ('csrm_prefix_hits', 'Rows whose rules had been read.', stats.num_prefix_hits),
      ('csrm_prefix_reads', 'Rules read.', stats.num_prefixes_read),
      ('csrm_prefix_evictions', 'Rules that were forgotten for want of room.', stats.num_evictions),
      ('csrm_compilations', 'Programs compiled by this process.', engine_lib.num_compilations()),
    ):
      yield prometheus.CounterMetricFamily(name, what, value=value)
    for name, what, value in (
      ('csrm_queue_rows', 'Rows that wait.', engine.num_queued),
      ('csrm_queue_seconds', 'How long the device needs for them.', engine.queued_s),
      ('csrm_prefix_bytes', 'What read rules take on the device.', engine.prefix_cache_bytes),
      ('csrm_programs', 'Programs of the engine.', stats.num_programs),
      ('csrm_ready', 'Whether all programs are compiled.', int(engine.ready)),
      ('csrm_batch_fill', 'Tokens for each place; shared ones count each time.', fill),
    ):  # fmt: skip
      yield prometheus.GaugeMetricFamily(name, what, value=value)
