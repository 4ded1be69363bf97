"""Leases: one holder at a time, and none that is dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from csrm_jax.core import lease
from tests import small

_HOLD = """
import sys, time
from csrm_jax.core import lease
with lease.held(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


def _take(folder):
  with lease.held(folder):
    return json.loads((folder / lease.NAME).read_text())


def test_one_holder_at_a_time_and_none_that_was_killed(tmp_path):
  command = [sys.executable, '-c', _HOLD, str(tmp_path)]
  holder = subprocess.Popen(command, env=small.env(), stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == 'held\n'
  said = small.error_of(_take, tmp_path)
  assert f'process {holder.pid}, last seen' in said and 'another --workdir' in said
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  holder.stdout.close()
  assert _take(tmp_path)['pid'] == os.getpid()
  assert not (tmp_path / lease.NAME).exists()


@pytest.mark.parametrize(('age', 'is_taken'), [(10, False), (1000, True), (-10_000, True)])
def test_a_lease_of_another_host_ends(tmp_path, monkeypatch, age, is_taken):
  monkeypatch.setattr(lease, 'WATCH_S', 0.1)
  other = {'token': 'a', 'host': 'elsewhere', 'pid': 1, 'born': '5', 'time': time.time() - age}
  (tmp_path / lease.NAME).write_text(json.dumps(other))
  if is_taken:
    assert _take(tmp_path)['token'] != 'a'
  else:
    assert 'host elsewhere, process 1' in small.error_of(_take, tmp_path)


@pytest.mark.parametrize('ahead', [86_400, -86_400])
def test_a_clock_that_is_off_takes_no_lease_that_is_renewed(tmp_path, monkeypatch, ahead):
  monkeypatch.setattr(lease, 'WATCH_S', 20)
  path = tmp_path / lease.NAME
  other = {'token': 'a', 'host': 'elsewhere', 'pid': 7, 'born': '5', 'time': time.time() + ahead}
  path.write_text(json.dumps(other))
  renew = threading.Timer(0.3, lambda: path.write_text(json.dumps(other | {'time': ahead})))
  renew.start()
  try:
    assert 'host elsewhere, process 7' in small.error_of(_take, tmp_path)
  finally:
    renew.join()


def test_a_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path):
  with lease.held(tmp_path):
    mine = json.loads((tmp_path / lease.NAME).read_text())
  (tmp_path / lease.NAME).write_text(json.dumps(mine | {'born': '1'}))
  assert _take(tmp_path)['born'] == mine['born']


@pytest.mark.parametrize('left', ['', '{', '[]', '5', '{"token": "a"}'])
def test_what_is_left_of_a_lease_is_none(tmp_path, left):
  (tmp_path / lease.NAME).write_text(left)
  assert _take(tmp_path)['pid'] == os.getpid()


def test_a_lease_is_renewed_and_not_taken_back(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, 'RENEW_S', 0.01)
  path = tmp_path / lease.NAME
  with lease.held(tmp_path):
    before = json.loads(path.read_text())['time']
    give_up = time.monotonic() + 20
    while json.loads(path.read_text())['time'] == before and time.monotonic() < give_up:
      time.sleep(0.01)
    assert json.loads(path.read_text())['time'] > before


@pytest.mark.parametrize('how', ['gone', 'taken'])
def test_a_run_that_has_lost_its_folder_does_not_end_well(tmp_path, how):
  def work():
    with lease.held(tmp_path / 'run'):
      lease.check(tmp_path / 'run')
      path = tmp_path / 'run' / lease.NAME
      if how == 'gone':
        (tmp_path / 'run').rename(tmp_path / 'elsewhere')
      else:
        other = {'token': 'b', 'host': 'elsewhere', 'pid': 7}
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
      said.append(small.error_of(lease.check, tmp_path / 'run'))

  said = []
  said.append(small.error_of(work))
  word = 'it is gone' if how == 'gone' else 'process 7 of elsewhere has taken it over'
  assert said[0] == said[1] and word in said[0] and 'run the same command' in said[0]
  lease.check(tmp_path / 'run')  # Nobody holds it any more.


def test_of_many_that_begin_at_once_one_holds_it(tmp_path):
  stale = {'token': 'a', 'host': socket.gethostname(), 'pid': 1, 'born': 'never', 'time': 0}
  (tmp_path / lease.NAME).write_text(json.dumps(stale))
  command = [sys.executable, '-c', _HOLD, str(tmp_path)]
  began = [subprocess.Popen(command, env=small.env(), stdout=subprocess.PIPE) for _ in range(3)]
  try:
    # Those that may not have it end.
    give_up = time.monotonic() + 60
    while sum(p.poll() is None for p in began) > 1 and time.monotonic() < give_up:
      time.sleep(0.05)
    (holder,) = [p for p in began if p.poll() is None]
    assert json.loads((tmp_path / lease.NAME).read_text())['pid'] == holder.pid
  finally:
    for process in began:
      process.kill()
      process.wait()
      process.stdout.close()
