"""A server on the loopback address, of a model that computes in a millisecond."""

import contextlib
import dataclasses
import http.client
import json
import pathlib
import threading
import time

import numpy as np
import uvicorn

from csrm_jax.models import transformer
from csrm_jax.serve import app as app_lib, engine as engine_lib, http as http_lib, wire
from csrm_jax.serve.policies import Policies
from tests import small

TOKENIZER_FILE, TOKENIZER, SPEC = small.TOKENIZER_FILE, small.TOKENIZER, small.SPEC
LENGTHS = engine_lib.Lengths(prefix=(64, 192), row=(64, 128), max_length=256, call_tokens=256)
LIMITS = wire.Limits(body_bytes=20_000, conversations=64, messages=16, rules=6)
FILM = """\
categories:
- name: Gambling
  guideline: Do not describe poker.
- name: Pets
  guideline: Cats may be mentioned, dogs not.
"""
PETS = 'categories:\n- name: Dogs\n  guideline: No dogs at all.\n'


def params(seed=0):
  found = transformer.init_params(SPEC.model, seed)
  # Attention that says more than at the start of training, so that scores differ.
  for name in ('value', 'out'):
    kernel = found['layers']['attention'][name]
    kernel['kernel'] = kernel['kernel'] * 10
  found['embed']['embedding'] = found['embed']['embedding'] * 4
  return found


_programs = {}


def make_engine(weights, **changes):
  """Returns an engine that has not started; all of them share what was compiled once."""
  options = {'prefix_bytes': 1 << 20, 'wait_s': 0.001, 'deadline_s': 20.0}
  engine = engine_lib.Engine(SPEC, weights, TOKENIZER, LENGTHS, **options | changes)
  compile = engine._compile

  def once(wanted):
    if wanted not in _programs:
      _programs[wanted] = compile(wanted)
    return _programs[wanted]

  engine._compile = once
  return engine


@dataclasses.dataclass
class Server:
  """A running server, and what it serves."""

  port: int
  engine: engine_lib.Engine
  policies: Policies
  folder: pathlib.Path
  score_fn: object  # the offline scores of the same weights

  @property
  def url(self):
    return f'http://127.0.0.1:{self.port}'

  def ask(self, method, path, body=None, headers=None):
    """Returns (status, headers, value) of a request; `body` is a JSON value or bytes."""
    link = http.client.HTTPConnection('127.0.0.1', self.port, timeout=30)
    try:
      if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
      sent = {'Content-Type': 'application/json'} if body is not None else {}
      link.request(method, path, body, sent | (headers or {}))
      response = link.getresponse()
      data, found = response.read(), dict(response.getheaders())
      is_json = found.get('content-type') == 'application/json'
      return response.status, found, json.loads(data) if is_json else data.decode()
    finally:
      link.close()

  def metric(self, name):
    """Returns the value of a metric without labels."""
    text = self.ask('GET', '/metrics')[2]
    return float(next(line for line in text.splitlines() if line.startswith(name + ' ')).split()[1])

  def post(self, path, body, **headers):
    """Returns the answer to a request that must be accepted."""
    status, _, value = self.ask('POST', path, body, headers)
    assert status == 200, value
    return value


@contextlib.contextmanager
def running(folder, weights, engine_options=None, arrives_s=10.0, **settings):
  """Serves; a request must arrive within arrives_s, which a busy machine keeps."""
  engine = make_engine(weights, **engine_options or {})
  policies = Policies(str(folder), 'film' if (folder / 'film.yaml').exists() else '', engine.check)
  options = {'limits': LIMITS, 'threshold': 0.5, 'body_timeout_s': arrives_s, 'reload_s': 0.05}
  app = app_lib.make_app(engine, policies, app_lib.Settings(**options | settings))
  server = uvicorn.Server(
    uvicorn.Config(
      app,
      port=0,
      http=http_lib.protocol(arrives_s),
      access_log=False,
      log_level='error',
      lifespan='on',
    )
  )
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    while not server.started:
      time.sleep(0.01)
    engine.wait_until_ready(120)
    port = server.servers[0].sockets[0].getsockname()[1]
    score_fn = SPEC.make_score_fn(weights, TOKENIZER, LENGTHS.max_length)
    yield Server(port, engine, policies, folder, score_fn)
  finally:
    server.should_exit = True
    thread.join()


def write_policies(folder):
  (folder / 'film.yaml').write_text(FILM)
  (folder / 'pets.yaml').write_text(PETS)
  return folder


def p_unsafe(scores):
  return 1 / (1 + np.exp(np.asarray(scores, np.float64)))
