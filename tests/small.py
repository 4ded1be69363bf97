"""What tests share: a model that computes in milliseconds, devices, and errors of one line."""

import contextlib
import functools
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest

import csrm_jax
from csrm_jax.models import config, transformer
from csrm_jax.reward import model as reward_model
from csrm_jax.safety import templates
from csrm_jax.text import tokenizer as tokenizer_lib

SHAPE = {'vocab_size': 40, 'num_layers': 2, 'embed_dim': 32, 'num_heads': 4, 'num_kv_heads': 2}
SHAPE |= {'head_dim': 16, 'mlp_dim': 48}

TOKENIZER_FILE = pathlib.Path(csrm_jax.__file__).parent / 'ruleworld' / 'tokenizer.model'
TOKENIZER = tokenizer_lib.load_tokenizer(TOKENIZER_FILE)
# A reward model of one layer that reads RuleWorld's words.
SPEC = reward_model.Spec(
  model=config.preset(
    'tiny',
    TOKENIZER.vocab_size,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    unroll=1,
  ),
  layout=templates.Layout(),
  max_length=192,
  safe_words=('safe', ' safe'),
  unsafe_words=('unsafe', ' unsafe'),
  template_hash=templates.template_hash(),
  tokenizer_digest=TOKENIZER.digest,
)


def model(**fields) -> config.ModelConfig:
  """Returns a Llama of SHAPE with these fields."""
  return config.ModelConfig(**{**SHAPE, **fields})


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, tokens, positions, segment_ids):
  """Returns logits [B,T,V]."""
  hidden = transformer.hidden(cfg, params, tokens, positions, segment_ids)
  return transformer.logits(cfg, params, hidden)


def env(**more) -> dict[str, str]:
  """Returns the environment of a process on the CPU that finds what this one imports."""
  path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path} | more


def free_port() -> int:
  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]


@contextlib.contextmanager
def llama_server(script, model):
  """Yields the URL of a llama.cpp server that `script` starts: of a model file, on a port."""
  port = free_port()
  server = subprocess.Popen(
    [sys.executable, '-c', script, model, str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    deadline = time.monotonic() + 300  # a busy machine takes long to load it
    while True:
      try:
        urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5)
        break
      except OSError:
        assert server.poll() is None, 'the server ended'
        assert time.monotonic() < deadline, 'the server does not answer'
        time.sleep(0.25)
    yield f'http://127.0.0.1:{port}'
  finally:
    server.kill()
    server.wait()


def run_on_devices(num, script, *args) -> str:
  """Runs a script in a process of its own with so many CPU devices; returns what it prints."""
  flag = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={num}'
  command = [sys.executable, '-c', script, *map(str, args)]
  result = subprocess.run(command, env=env(XLA_FLAGS=flag), capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-3000:]
  return result.stdout


def error_of(function, *args, **kwargs) -> str:
  """Returns the one line of the ValueError that the function raises."""
  with pytest.raises(ValueError) as caught:
    function(*args, **kwargs)
  message = str(caught.value)
  assert '\n' not in message
  return message


def unmarked(values) -> np.ndarray:
  """Returns the marks (scoring.Judged.outside) of as many verdicts, none of which has one."""
  return np.full(len(values), '')
