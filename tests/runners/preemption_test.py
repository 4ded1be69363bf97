"""Real processes that are told to stop, and started again."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from csrm_jax.core import preemption
from tests import small

NUM_STEPS = 60

# The command line, with a bigram model as its runner.
_PROGRAM = f"""
import sys, time, types
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1] / 'train')!r})
import loop_test
from csrm_jax import main

class Slow:
  def __init__(self, step_fn):
    self.step_fn, self._cache_size = step_fn, step_fn._cache_size

  def __call__(self, *args):
    time.sleep(0.03)
    return self.step_fn(*args)

def run(config, workdir):
  loop_test._train(workdir, {NUM_STEPS}, log_every=4, checkpoint_every=20,
                   step_fn=Slow(loop_test._setup()[0]))

fake = types.ModuleType('fake_runner')
fake.run = run
sys.modules['fake_runner'] = fake
main.RUNNERS['fake'] = 'fake_runner'
main.main()
"""

_CONFIG = """
import ml_collections


def get_config():
  return ml_collections.ConfigDict({'runner': 'fake'})
"""


@pytest.fixture
def start(tmp_path):
  """Returns a function that starts the command in a work directory."""
  (tmp_path / 'c.py').write_text(_CONFIG)

  def begin(workdir, *flags):
    return subprocess.Popen(
      [sys.executable, '-c', _PROGRAM, '--config=c.py', f'--workdir={workdir}', *flags],
      cwd=tmp_path,
      env=small.env(),
      text=True,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )

  return begin


def _pair(start, workdir):
  flags = f'--coordinator=localhost:{small.free_port()}', '--num_processes=2'
  return [start(workdir, *flags, f'--process_id={i}') for i in range(2)]


def _lines(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def _curve(workdir):
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in _lines(workdir)]


def _stop_in_the_middle(runs, told, workdir):
  """Sends SIGTERM to one of the processes; returns what each said of it."""
  while not _lines(workdir):
    time.sleep(0.02)
    assert not any(run.poll() for run in runs), runs[0].stderr.read()
  told.send_signal(signal.SIGTERM)
  said = []
  for run in runs:
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == preemption.EXIT_CODE, errors
    said.append(
      next(line for line in errors.splitlines() if line.startswith('stopped by SIGTERM after step'))
    )
  return said


def _finish(runs):
  for run in runs:
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors


def test_a_process_told_to_stop_goes_on_as_if_it_had_not_been(start, tmp_path):
  whole = start(tmp_path / 'whole')
  run = start(tmp_path / 'cut')
  (said,) = _stop_in_the_middle([run], run, tmp_path / 'cut')
  assert said.endswith('; the same command goes on')
  saved = max(int(p.name) for p in (tmp_path / 'cut/checkpoints').iterdir())
  assert f'after step {saved};' in said and 4 <= saved < NUM_STEPS
  _finish([start(tmp_path / 'cut')])
  _finish([whole])
  assert len(_curve(tmp_path / 'cut')) == NUM_STEPS / 4
  assert _curve(tmp_path / 'cut') == _curve(tmp_path / 'whole')


@pytest.mark.slow
def test_two_that_are_stopped_then_killed_go_on_as_one(start, tmp_path):
  cut = tmp_path / 'cut'
  whole = start(tmp_path / 'whole')
  runs = _pair(start, cut)
  said = _stop_in_the_middle(runs, runs[1], cut)
  assert said[0] == said[1]  # after the same step
  before = len(_lines(cut))
  first, second = _pair(start, cut)
  while len(_lines(cut)) <= before:
    time.sleep(0.02)
    assert first.poll() is None, first.stderr.read()
  second.kill()
  killed = time.monotonic()
  errors = first.communicate(timeout=60)[1]
  assert time.monotonic() - killed < 60
  assert first.returncode == 2, errors
  assert 'error: another process is gone (' in errors
  assert 'Traceback' not in errors
  second.communicate()
  _finish([whole, start(cut)])
  assert len(_curve(cut)) == NUM_STEPS / 4
  for line, want in zip(_curve(cut), _curve(tmp_path / 'whole'), strict=True):
    assert line == pytest.approx(want, rel=1e-5)
