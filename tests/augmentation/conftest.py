"""Proposers with nothing behind them, and a server that fails on request."""

import contextlib
import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from csrm_jax.augmentation import proposers


@dataclasses.dataclass
class Scripted:
  """Answers with what `reply(request)` gives; a word is a NoReplyError."""

  reply: Callable[[Any], Any]
  name: str = 'scripted'
  concurrency: int = 1

  def __post_init__(self):
    self.asked = []

  def ask(self, request):
    self.asked.append(request)
    reply = self.reply(request)
    if isinstance(reply, str):
      raise proposers.NoReplyError(reply)
    return reply

  def usage(self):
    return {'requests': len(self.asked)}


class FaultServer:
  """An OpenAI-compatible server on a free port that fails on request.

  `script(number, body)` says what request `number` (from 0) gets: a text (the
  reply's content), ('status', code, headers), 'stall', 'cut', 'hangup' or
  'not json', 'drip', 'endless', or bytes, the whole body. `most_at_once` is the
  largest number of requests in progress.
  """

  def __init__(self, script, delay_s=0.0):
    self.script, self.delay_s = script, delay_s
    self.bodies, self.keys, self.times = [], [], []
    self.most_at_once = self._at_once = 0
    self.finish_reason = 'stop'
    self._lock = threading.Lock()
    self._done = threading.Event()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def do_POST(self):
        outer._answer(self)

      def log_message(self, *args):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self._server.daemon_threads = True
    self.url = f'http://127.0.0.1:{self._server.server_address[1]}/v1'

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *unused):
    self._done.set()
    self._server.shutdown()
    self._server.server_close()

  @property
  def num_requests(self):
    return len(self.bodies)

  def _answer(self, handler):
    length = int(handler.headers['Content-Length'])
    body = json.loads(handler.rfile.read(length))
    with self._lock:
      number = len(self.bodies)
      self.bodies.append(body)
      self.keys.append(handler.headers['Authorization'])
      self.times.append(time.monotonic())
      self._at_once += 1
      self.most_at_once = max(self.most_at_once, self._at_once)
    try:
      time.sleep(self.delay_s)
      self._send(handler, self.script(number, body))
    finally:
      with self._lock:
        self._at_once -= 1

  def _send(self, handler, what):
    if what == 'stall':
      self._done.wait(30)
      handler.close_connection = True
      return
    if what == 'hangup':
      handler.close_connection = True
      return
    if what in ('drip', 'endless'):
      handler.send_response(200)
      handler.send_header('Content-Type', 'application/json')
      handler.end_headers()
      handler.close_connection = True
      with contextlib.suppress(OSError):
        while not self._done.wait(0 if what == 'endless' else 0.05):
          handler.wfile.write(b' ' * (2**20 if what == 'endless' else 1))
      return
    if isinstance(what, bytes):
      code, headers, data = 200, {}, what
    elif isinstance(what, tuple):
      _, code, headers = what
      data = json.dumps({'error': {'message': 'as the script says'}}).encode()
    elif what == 'not json':
      code, headers, data = 200, {}, b'{"choices": [{"mess'
    else:
      code, headers = 200, {}
      data = json.dumps(
        {
          'id': 'x',
          'object': 'chat.completion',
          'created': 0,
          'model': 'm',
          'choices': [
            {
              'index': 0,
              'finish_reason': self.finish_reason,
              'message': {'role': 'assistant', 'content': what},
            }
          ],
          'usage': {'prompt_tokens': 10, 'completion_tokens': 5, 'total_tokens': 15},
        }
      ).encode()
    handler.send_response(code)
    handler.send_header('Content-Type', 'application/json')
    handler.send_header('Content-Length', str(len(data)))
    for name, value in headers.items():
      handler.send_header(name, value)
    handler.end_headers()
    if what == 'cut':
      data = data[: len(data) // 2]
      handler.close_connection = True
    with contextlib.suppress(OSError):
      handler.wfile.write(data)


@pytest.fixture
def fault_server():
  return FaultServer


@pytest.fixture
def scripted():
  return Scripted
