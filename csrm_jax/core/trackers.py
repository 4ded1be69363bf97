"""Where metrics go besides metrics.jsonl: one row for each logger, each of an optional package."""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from csrm_jax.core import checks, files

PROJECT = 'csrm_jax'
_FILE = 'trackers.json'  # the names under which trackers know a run, so that it goes on there


class Tracker(NamedTuple):
  """A place that metrics go to."""

  name: str
  log: Callable[[int, Mapping[str, float]], Any]  # (step, values)
  flush: Callable[[], Any]
  close: Callable[[], Any]


def _tensorboard(workdir: pathlib.Path, resume_step: int | None) -> Tracker:
  # Imported here: it takes a while, and only training needs it.
  import tensorboardX

  board = tensorboardX.SummaryWriter(
    str(workdir), purge_step=None if resume_step is None else resume_step + 1
  )

  def log(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      board.add_scalar(name, value, step)

  return Tracker('tensorboard', log, board.flush, board.close)


def _wandb(workdir: pathlib.Path, resume_step: int | None) -> Tracker:
  wandb = checks.require('wandb', "loggers with 'wandb'", 'loggers')
  run = wandb.init(
    project=os.environ.get('WANDB_PROJECT', PROJECT),
    name=workdir.name,
    id=_known(workdir, 'wandb', lambda: secrets.token_hex(4)),
    resume='allow',
    dir=str(workdir),
    config=_config(workdir),
  )
  return Tracker('wandb', lambda step, values: run.log(values, step=step), _nothing, run.finish)


def _trackio(workdir: pathlib.Path, resume_step: int | None) -> Tracker:
  trackio = checks.require('trackio', "loggers with 'trackio'", 'loggers')
  name = _known(workdir, 'trackio', lambda: f'{workdir.name}-{secrets.token_hex(4)}')
  project = os.environ.get('TRACKIO_PROJECT', PROJECT)
  trackio.init(project=project, name=name, resume='allow', config=_config(workdir))
  return Tracker(
    'trackio', lambda step, values: trackio.log(dict(values), step=step), _nothing, trackio.finish
  )


def _mlflow(workdir: pathlib.Path, resume_step: int | None) -> Tracker:
  mlflow = checks.require('mlflow', "loggers with 'mlflow'", 'loggers')
  if not os.environ.get('MLFLOW_TRACKING_URI'):
    mlflow.set_tracking_uri(f'sqlite:///{workdir.absolute() / "mlflow.db"}')
  mlflow.set_experiment(os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT))
  known = _read(workdir).get('mlflow')
  run = mlflow.start_run(run_id=known, run_name=None if known else workdir.name)
  if not known:
    _known(workdir, 'mlflow', lambda: run.info.run_id)
    mlflow.set_tag('config', str(_config(workdir))[:5000])
  return Tracker(
    'mlflow',
    lambda step, values: mlflow.log_metrics(dict(values), step=step),
    _nothing,
    mlflow.end_run,
  )


# config.loggers -> what opens it; metrics.jsonl is always written: a resumed run reads it.
LOGGERS: dict[str, Callable[[pathlib.Path, int | None], Tracker] | None] = {
  'jsonl': None,
  'tensorboard': _tensorboard,
  'wandb': _wandb,
  'trackio': _trackio,
  'mlflow': _mlflow,
}


def check(loggers: Sequence[str]) -> None:
  """Checks names of loggers."""
  for name in loggers:
    checks.one_of('loggers', name, LOGGERS)


def start(loggers: Sequence[str], workdir: pathlib.Path, resume_step: int | None) -> list[Tracker]:
  """Returns the trackers of these names, which go on with the run of this work directory.

  One that fails later is left alone, with a note: it must not end a run.
  """
  check(loggers)
  opened = [LOGGERS[name](workdir, resume_step) for name in loggers if LOGGERS[name]]
  return [_careful(t) if t.name != 'tensorboard' else t for t in opened]


def _careful(tracker: Tracker) -> Tracker:
  failed = False

  def attempt(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> None:
      nonlocal failed
      if failed:
        return
      try:
        function(*args)
      except Exception as error:  # Whatever a network or a server says.
        failed = True
        checks.note(
          f'{tracker.name} has failed and gets no more metrics ({checks.reason(error)}); '
          'metrics.jsonl has all of them'
        )

    return call

  return Tracker(tracker.name, *map(attempt, tracker[1:]))


def _config(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / 'config.json'
  return files.read_json(path) if path.is_file() else {}


def _read(workdir: pathlib.Path) -> dict[str, str]:
  path = workdir / _FILE
  return files.read_json(path) if path.is_file() else {}


def _known(workdir: pathlib.Path, name: str, make: Callable[[], str]) -> str:
  """Returns the name under which a tracker knows the run; a new one is made and kept."""
  known = _read(workdir)
  if name not in known:
    known[name] = make()
    files.write_json(workdir / _FILE, known)
  return known[name]


def _nothing() -> None:
  pass
