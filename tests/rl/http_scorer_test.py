"""The HTTP scorer against a server that fails in every way it can."""

import contextlib
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest

from csrm_jax.rl import rewards
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Prompt, Sample
from tests import small

RULES = schema.SafetyConfig((schema.Category('Cats', 'No cats.'),))
SAMPLES = [
  Sample(Prompt('p', (schema.Message('user', 'Hi.'),), RULES), i, 'x' * i, 3, True)
  for i in range(3)
]
GOOD = '{"rewards": [0.25, -1.5, 2], "extra_logs": {}}'
# How long a slow answer is waited for; a good one comes within it on a busy machine, too.
LIMIT_S = 0.5


@contextlib.contextmanager
def serve(*answers, wrap=None):
  """Yields (URL, bodies); gives these answers in turn, the last for ever.

  An answer is text, (status, text), 'hangup', 'cut', 'stall', 'drip' or 'endless'.
  """
  bodies = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers['Content-Length']))
      bodies.append(json.loads(body))
      answer = answers[min(len(bodies), len(answers)) - 1]
      if answer == 'hangup':
        self.close_connection = True
        return
      if answer == 'stall':
        time.sleep(2 * LIMIT_S)
        return
      if answer in ('drip', 'endless'):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
          while True:
            self.wfile.write(b' ' * (2**20 if answer == 'endless' else 1))
            time.sleep(0 if answer == 'endless' else 0.05)
        return
      status, text = answer if isinstance(answer, tuple) else (200, answer)
      data = (GOOD if text == 'cut' else text).encode()
      self.send_response(status)
      if status == 302:
        self.send_header('Location', '/elsewhere')
      self.send_header('Content-Length', len(data))
      self.end_headers()
      self.wfile.write(data[:9] if text == 'cut' else data)

    def log_message(self, *args):
      del args

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  if wrap:
    server.socket = wrap.wrap_socket(server.socket, server_side=True)
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  try:
    scheme = 'https' if wrap else 'http'
    yield f'{scheme}://127.0.0.1:{server.server_port}/get_reward', bodies
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
  'form, answer, want, sent',
  [
    ('csrm', GOOD, [0.25, -1.5, 2.0], {'samples', 'policy'}),
    ('openrlhf', GOOD, [0.25, -1.5, 2.0], {'query', 'prompts', 'labels', 'policy'}),
    (
      'openai',
      '{"results": [{"category_scores": {"a": 0.25, "b": 0}}, {"category_scores": {"a": 1}}, '
      '{"category_scores": {"a": 0.5}}]}',
      [0.75, 0.0, 0.5],
      {'input', 'model'},
    ),
  ],
)
def test_forms_of_other_servers(form, answer, want, sent):
  with serve(answer) as (url, bodies):
    scorer = settings(url, form=form, policy='pets')
    assert scorer(SAMPLES) == want
  assert set(bodies[0]) == sent
  if form == 'openrlhf':
    assert bodies[0]['prompts'][1] == 'Human: Hi.\n\nAssistant: '
    assert bodies[0]['query'][2] == 'Human: Hi.\n\nAssistant: xx'
  if form == 'openai':
    assert bodies[0] == {'input': ['', 'x', 'xx'], 'model': 'pets'}


@pytest.mark.parametrize(
  'scores', ['{}', '{"a": null}', '{"a": true}', '{"a": NaN}', '{"a": 1.5}', '{"a": "0.1"}', '[]']
)
def test_a_moderation_without_scores_is_no_reward(scores):
  good = '{"category_scores": {"a": 0.5}}'
  answer = f'{{"results": [{good}, {{"category_scores": {scores}}}, {good}]}}'
  with serve(answer) as (url, _):
    reward = rewards.from_callable(settings(url, form='openai'), 'http')
    assert 'p#1: reward http is None' in small.error_of(reward, SAMPLES)


def test_requests_go_side_by_side_in_order():
  answers = [f'{{"rewards": [{i}]}}' for i in range(3)]
  with serve(*answers) as (url, bodies):
    values = settings(url, batch_size=1, connections=3)(SAMPLES)
  assert sorted(values) == [0, 1, 2] and len(bodies) == 3


def test_a_token_is_sent_and_must_be_there(monkeypatch):
  monkeypatch.setenv('SCORER_KEY', 'sesame')
  seen = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      seen.append((self.headers['Authorization'], self.client_address))
      self.rfile.read(int(self.headers['Content-Length']))
      self.send_response(200)
      self.send_header('Content-Length', str(len(GOOD)))
      self.end_headers()
      self.wfile.write(GOOD.encode())

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
      del args

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  try:
    scorer = settings(f'http://127.0.0.1:{server.server_port}', key_variable='SCORER_KEY')
    assert scorer(SAMPLES) == scorer(SAMPLES) == [0.25, -1.5, 2]
  finally:
    server.shutdown()
    server.server_close()
  assert [key for key, _ in seen] == ['Bearer sesame'] * 2
  assert seen[0][1] == seen[1][1]  # one connection
  monkeypatch.delenv('SCORER_KEY')
  assert 'SCORER_KEY is empty' in small.error_of(settings, 'http://x', key_variable='SCORER_KEY')


def test_only_known_certificates(tmp_path):
  if not shutil.which('openssl'):
    pytest.skip('no openssl')
  key, cert = tmp_path / 'key.pem', tmp_path / 'cert.pem'
  options = '-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost'
  names = ['-addext', 'subjectAltName=IP:127.0.0.1']
  command = ['openssl', 'req', *options.split(), *names, '-keyout', key, '-out', cert]
  subprocess.run(command, check=True, capture_output=True)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(cert, key)
  with serve(GOOD, wrap=context) as (url, _):
    assert settings(url, ca_file=str(cert))(SAMPLES) == [0.25, -1.5, 2]
    with pytest.raises(ValueError, match=r'does not answer .*certificate'):
      settings(url, num_tries=1)(SAMPLES)
  assert 'no certificates' in small.error_of(settings('https://x', ca_file='/none'), SAMPLES)


def settings(url, **kwargs):
  defaults = {'timeout_s': 5.0, 'num_tries': 3, 'backoff_s': 0.01, 'batch_size': 64}
  return rewards.HttpScorer(url, **defaults | kwargs)


def test_rewards_come_in_order_and_in_batches():
  with serve(
    '{"rewards": []}', '{"rewards": [0.25, -1.5]}', '{"rewards": [2], "scores": null}'
  ) as (url, bodies):
    reward = rewards.from_http(settings(url, batch_size=2))(SAMPLES)
  assert reward.dtype == np.float32 and reward.tolist() == [0.25, -1.5, 2]
  assert [len(body['samples']) for body in bodies] == [0, 2, 1]
  assert bodies[1]['samples'][1] == {
    'id': 'p#1',
    'conversation': [{'role': 'user', 'content': 'Hi.'}, {'role': 'agent', 'content': 'x'}],
    'safety': RULES.to_dict(),
  }


@pytest.mark.parametrize(
  'fault', [(429, 'busy'), (500, 'broken'), (503, ''), 'hangup', 'cut', 'stall'], ids=str
)
def test_a_fault_on_the_way_is_tried_again(fault):
  with serve(fault, fault, GOOD) as (url, bodies):
    values = settings(url, timeout_s=LIMIT_S if fault == 'stall' else 5)(SAMPLES)
  assert values == [0.25, -1.5, 2] and len(bodies) == 3


@pytest.mark.parametrize(
  'answer, says, num_requests',
  [
    ((400, 'no\nsuch field'), r'refuses .* \(status 400: no such field\)', 1),
    ((404, ''), 'refuses .*status 404', 1),
    ((500, 'broken'), r'does not answer \(status 500; 3 tries\)', 3),
    ('stall', r'does not answer \(timed out; 3 tries\)', 3),
    ('hangup', 'does not answer .*; 3 tries', 3),
    ('<html>', 'not JSON to p#0', 1),
    ('[0.1, 0.2, 0.3]', 'p#0 without a list of "rewards"', 1),
    ('{"reward": [1, 2, 3]}', 'p#0 without a list of "rewards"', 1),
    ('{"rewards": [1, 2]}', '2 rewards for 3 samples, p#0 to p#2', 1),
    ('{"rewards": [1, null, 3]}', 'p#1: reward http.* is None', 1),
    ('{"rewards": [1, 2, NaN]}', 'p#2: reward http.* is nan', 1),
    ('{"rewards": [-Infinity, 2, 3]}', 'p#0: reward http.* is -inf', 1),
    ('{"rewards": [1, true, 3]}', 'p#1: reward http.* is True', 1),
    ('{"rewards": [1, 2, 3], "error": "out of memory"}', "with error: 'out of memory'", 1),
    ('{"rewards": [1, 2, 3], "ids": ["p#1", "p#0", "p#2"]}', 'other "ids"', 1),
    ('{"rewards": [9, 9, 9], "rewards": [1, 2, 3]}', 'not JSON to p#0', 1),
    ('[' * 200_000, 'not JSON to p#0', 1),
    ((302, ''), 'redirects .status 302', 1),
    ('drip', r'does not answer \(its reply took more than 0.5 s; 3 tries\)', 3),
    ('endless', 'replied with more than 67,108,864 bytes', 1),
  ],
  ids=str,
)
def test_what_stops_it(answer, says, num_requests):
  with serve('{"rewards": []}', answer) as (url, bodies):
    reward = rewards.from_http(
      settings(url, timeout_s=LIMIT_S if answer in ('stall', 'drip') else 9)
    )
    with pytest.raises(ValueError, match=says) as error:
      reward(SAMPLES)
  assert '\n' not in str(error.value) and url in str(error.value)
  assert len(bodies) == 1 + num_requests


def test_a_scorer_that_is_not_there_stops_before_any_sample():
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{unused.getsockname()[1]}/get_reward'
    with pytest.raises(ValueError, match=r'does not answer .*refused.*3 tries'):
      rewards.from_http(settings(url))
  with serve((404, 'not found')) as (url, _), pytest.raises(ValueError, match='status 404'):
    rewards.from_http(settings(url))


def test_a_scorer_may_dislike_an_empty_request():
  with serve((422, 'no samples'), GOOD) as (url, _):
    assert rewards.from_http(settings(url))(SAMPLES).tolist() == [0.25, -1.5, 2]


@pytest.mark.parametrize(
  'kwargs',
  [
    {'url': 'localhost:5000'},
    {'num_tries': 0},
    {'batch_size': 0},
    {'timeout_s': 0},
    {'backoff_s': -1},
  ],
  ids=str,
)
def test_settings_that_cannot_work(kwargs):
  with pytest.raises(ValueError, match='of the scorer'):
    settings(**({'url': 'http://x'} | kwargs))
