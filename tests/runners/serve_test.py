"""The server as a process: its command, its refusals, and how it ends."""

import concurrent.futures
import dataclasses
import http.client
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import optax
import pytest

from csrm_jax import config as config_lib
from csrm_jax.core import checkpoint
from csrm_jax.reward import backbone
from csrm_jax.runners import serve
from csrm_jax.train import step as training
from tests import small
from tests.serve import serving

ROOT = pathlib.Path(__file__).resolve().parents[2]
BODY = json.dumps({'policy': 'film', 'prompt': 'Hi.', 'response': 'Hello.'})


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory as training leaves it, with a folder of policies."""
  folder = tmp_path_factory.mktemp('run')
  backbone.save_tokenizer(str(serving.TOKENIZER_FILE), folder)
  state = training.init_state(serving.params(), optax.adam(1e-3))
  with checkpoint.Checkpoints(folder / 'checkpoints') as saved:
    saved.save(3, state, {'next': 0}, dataclasses.asdict(serving.SPEC))
  (folder / 'policies').mkdir()
  serving.write_policies(folder / 'policies')
  return folder


def ask(port, timeout=20):
  link = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
  try:
    link.request('POST', '/score', BODY, {'Content-Type': 'application/json'})
    response = link.getresponse()
    return response.status, json.loads(response.read())
  finally:
    link.close()


def is_ready(port):
  link = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
  try:
    link.request('GET', '/ready')
    return link.getresponse().status == 200
  except OSError:
    return False
  finally:
    link.close()


def test_sigterm_under_load_loses_no_accepted_request(run):
  port = small.free_port()
  command = [sys.executable, '-m', 'csrm_jax.main']
  command += [f'--config=configs/serve.py:checkpoint={run},policies={run}/policies,port={port}']
  command += ['--config.batching.rules_lengths=(128,)', '--config.batching.row_lengths=(64,)']
  command += ['--config.batching.call_tokens=128']
  process = subprocess.Popen(command, cwd=ROOT, env=small.env(), stderr=subprocess.PIPE, text=True)
  try:
    for _ in range(1200):
      if process.poll() is not None or is_ready(port):
        break
      time.sleep(0.1)
    assert process.poll() is None, process.stderr.read()
    outcomes = []

    def client(_):
      while True:
        try:
          outcomes.append(ask(port))
        except ConnectionRefusedError:
          return  # It takes no more connections.
        except (OSError, http.client.HTTPException) as error:
          outcomes.append((0, error))
          return

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      clients = [pool.submit(client, i) for i in range(8)]
      time.sleep(1.0)
      process.send_signal(signal.SIGTERM)
      concurrent.futures.wait(clients, 60)
    code, said = process.wait(60), process.stderr.read()
  finally:
    process.kill()
    process.communicate()
  # So uvicorn says that it gives requests up that it has read.
  assert code == 0 and 'Cancel' not in said and 'Traceback' not in said, said
  # A connection that was made but whose request was not read yet is closed unheard: it is reset, or
  # ends without a word. One whose request was read is answered.
  answered = [value for status, value in outcomes if status == 200]
  assert len(answered) > 8
  assert {status for status, _ in outcomes} <= {200, 0}
  unheard = [value for status, value in outcomes if not status]
  closed = ConnectionResetError, BrokenPipeError
  assert all(isinstance(error, closed) for error in unheard), unheard
  assert np.ptp([value['verdicts'][0]['score'] for value in answered]) < 1e-5


def make_config(**changes):
  config = config_lib.load_module(ROOT / 'configs' / 'serve.py').get_config()
  config_lib.set_overrides(config, changes)
  return config


def test_what_is_refused_before_anything_starts(run, monkeypatch, tmp_path):
  monkeypatch.delenv('CSRM_JAX_TOKEN', raising=False)
  given = {'checkpoint': str(run), 'policies': str(run / 'policies')}
  bad = tmp_path / 'bad'
  bad.mkdir()
  (bad / 'long.yaml').write_text(
    f'categories: [{{name: A, guideline: "{"no tea " * 2000}"}}]', 'utf-8'
  )
  for changes, says in (
    ({'checkpoint': ''}, 'config.checkpoint is empty'),
    ({'host': '0.0.0.0'}, 'CSRM_JAX_TOKEN'),
    ({'policies': str(tmp_path / 'none')}, 'no such folder'),
    ({'policies': str(bad)}, r'long.yaml: the rules take'),
    ({'default_policy': 'flim'}, 'did you mean'),
    ({'threshold': 1.0}, 'threshold'),
    ({'batching.row_lengths': ()}, 'row lengths'),
  ):
    with pytest.raises(ValueError, match=says) as error:
      serve.make_server(make_config(**(given | changes)))
    assert '\n' not in str(error.value)


def test_all_devices_by_default(run):
  """The server's parameters lie on every device of the process."""
  script = (
    'from csrm_jax import config; from csrm_jax.runners import serve; '
    f'c = config.load_module({str(ROOT / "configs/serve.py")!r}).get_config("checkpoint={run}"); '
    f'c.policies = {str(run / "policies")!r}; engine, _ = serve._load(c); '
    'import jax; leaf = jax.tree.leaves(engine._params)[0]; print(len(leaf.sharding.device_set))'
  )
  assert small.run_on_devices(3, script).split()[-1] == '3'
