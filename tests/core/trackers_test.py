"""Loggers beside metrics.jsonl; the packages of most are not installed here, and stood in for."""

import sys
import types

import pytest

from csrm_jax.core import trackers, writer

RUN = types.SimpleNamespace(info=types.SimpleNamespace(run_id='r1'))


@pytest.fixture
def calls(monkeypatch):
  """What the packages are asked, in their order."""
  found = []

  def stand_in(name, result):
    def call(*args, **kwargs):
      found.append((name, args, kwargs))
      return result

    return call

  def module(package, names, result=None):
    made = types.ModuleType(package)
    for name in names:
      setattr(made, name, stand_in(f'{package}.{name}', result))
    monkeypatch.setitem(sys.modules, package, made)
    return made

  run = types.SimpleNamespace(log=stand_in('run.log', None), finish=stand_in('run.finish', None))
  module('wandb', ['init'], run)
  module('trackio', ['init', 'log', 'finish'])
  names = 'set_tracking_uri set_experiment start_run set_tag log_metrics end_run'
  module('mlflow', names.split(), RUN)
  return found


def _write(folder, *loggers, resume_step=-1):
  with writer.MetricsWriter(folder, resume_step, loggers) as w:
    w.write(3, {'train/loss': 0.5})


@pytest.mark.parametrize(
  ('name', 'log'),
  [
    ('wandb', ('run.log', ({'train/loss': 0.5},), {'step': 3})),
    ('trackio', ('trackio.log', ({'train/loss': 0.5},), {'step': 3})),
    ('mlflow', ('mlflow.log_metrics', ({'train/loss': 0.5},), {'step': 3})),
  ],
)
def test_metrics_reach_a_tracker_and_a_resumed_run_goes_on_there(tmp_path, calls, name, log):
  _write(tmp_path, 'jsonl', name)
  assert log in calls and 'finish' in calls[-1][0] + calls[-1][0].replace('end_run', 'finish')
  assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 3, "train/loss": 0.5}\n'
  first, known = list(calls), (tmp_path / 'trackers.json').read_text()
  calls.clear()
  _write(tmp_path, 'jsonl', name, resume_step=3)
  assert (tmp_path / 'trackers.json').read_text() == known
  start = {'wandb': 'wandb.init', 'trackio': 'trackio.init', 'mlflow': 'mlflow.start_run'}[name]
  asked = [next(c for c in some if c[0] == start)[2] for some in (first, calls)]
  if name == 'mlflow':
    assert [a['run_id'] for a in asked] == [None, 'r1']
  else:
    assert asked[0] == asked[1] and asked[0]['resume'] == 'allow'


def test_tensorboard_is_written_where_it_is_asked_for(tmp_path):
  _write(tmp_path / 'a', 'jsonl')
  assert [path.name for path in (tmp_path / 'a').iterdir()] == ['metrics.jsonl']
  _write(tmp_path / 'b', 'jsonl', 'tensorboard')
  assert any('tfevents' in path.name for path in (tmp_path / 'b').iterdir())


def test_a_tracker_that_fails_ends_no_run(tmp_path, calls, monkeypatch, capfd):
  def fail(*args, **kwargs):
    raise ConnectionError('no network')

  monkeypatch.setattr(sys.modules['trackio'], 'log', fail)
  _write(tmp_path, 'trackio')
  assert 'trackio has failed' in capfd.readouterr().err
  assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 1


def test_what_is_missing_or_unknown_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r'wandb.*\[loggers\]'):
    trackers.start(('wandb',), tmp_path, -1)
  with pytest.raises(ValueError, match="loggers='wandbb' must be one of jsonl, tensorboard"):
    trackers.check(('jsonl', 'wandbb'))
