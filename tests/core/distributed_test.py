import signal
import subprocess
import sys
import textwrap
import time

import jax
import pytest

from csrm_jax.core import distributed
from tests import small


@pytest.mark.parametrize(('args', 'message'), [
  (('localhost:1', None, 0), '--num_processes is missing'),
  (('localhost:1', 2, None), '--process_id is missing'),
  (('', 2, 0), 'need --coordinator'),
])  # fmt: skip
def test_arguments_that_miss_something(args, message):
  with pytest.raises(ValueError, match=message):
    distributed.start(*args)


def test_one_process_agrees_with_itself():
  assert jax.process_count() == 1
  distributed.check_same({'the config': 'x'})


@pytest.mark.parametrize(('error', 'is_gone'), [
  (ValueError('UNKNOWN: Gloo AllGather failed: Connection closed'), True),
  (jax.errors.JaxRuntimeError('UNAVAILABLE: task 1'), True),
  (ValueError('http://localhost:1 does not answer: connection refused'), False),
])  # fmt: skip
def test_an_error_of_a_collective_is_that_of_a_process_gone(monkeypatch, error, is_gone):
  said = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed, '_give_up', said.append)
  distributed.leave_if_alone(error)
  assert [line.startswith('another process is gone') for line in said] == (
    [True] if is_gone else []
  )


def test_who_does_not_come_is_one_line():
  """Process 0 of two, whose other one never starts."""
  process = _start(f'localhost:{small.free_port()}', 0, 'pass', timeout_s=3)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2, errors
  lines = [line for line in errors.splitlines() if line.startswith('error')]
  assert len(lines) == 1, errors
  assert lines[0].startswith('error: no start with localhost')
  assert 'in 3 s: all processes must run' in lines[0]


def test_hosts_must_agree():
  processes = _pair("""
    distributed.check_same({'the code': 'same'})
    distributed.check_same({'the config': str(jax.process_index())})
  """)
  for process in processes:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert 'the config differs between hosts: that of process 1' in errors


@pytest.mark.slow  # waits for a heartbeat
def test_one_that_is_killed_ends_the_other_within_a_minute():
  first, second = _pair("""
    from jax.experimental import multihost_utils
    print('ready', flush=True)
    while True:
      multihost_utils.sync_global_devices('step')
      time.sleep(0.1)
  """)
  assert second.stdout.readline() == 'ready\n'
  second.send_signal(signal.SIGKILL)
  start = time.monotonic()
  _, errors = first.communicate(timeout=60)
  assert time.monotonic() - start < 60
  assert first.returncode != 0
  assert errors.strip()
  second.wait()


def _pair(body):
  address = f'localhost:{small.free_port()}'
  return [_start(address, i, body) for i in range(2)]


def _start(address, process_id, body, timeout_s=60):
  script = textwrap.dedent("""
    import sys, time
    import jax
    from csrm_jax.core import distributed
    try:
      distributed.start({address!r}, 2, {process_id}, {timeout_s})
    {body}
    except ValueError as error:
      print('error:', error, file=sys.stderr)
      sys.stderr.flush()
      import os
      os._exit(2)
  """).format(
    address=address,
    process_id=process_id,
    timeout_s=timeout_s,
    body=textwrap.indent(textwrap.dedent(body).strip(), '  '),
  )
  return subprocess.Popen(
    [sys.executable, '-c', script],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=small.env(),
  )
