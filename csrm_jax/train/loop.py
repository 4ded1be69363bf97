"""The training loop that all runners share: step, log, checkpoint, resume."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from csrm_jax.core import (
  checkpoint,
  files,
  mesh as mesh_lib,
  preemption,
  profiling,
  remote,
  writer as writer_lib,
)
from csrm_jax.data import packing, pipeline
from csrm_jax.train import step as training, window

# Between updates of a progress bar; a log file needs few of its lines.
BAR_INTERVAL_S = 1.0 if sys.stderr.isatty() else 10.0


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long a run is, and how often it logs and saves.

  Attributes:
    num_steps: updates in all.
    log_every: steps that one line of metrics.jsonl sums up.
    checkpoint_every: steps between checkpoints; a multiple of log_every, so
      that a resumed run logs what an uninterrupted one would.
    keep: checkpoints kept.
    profile: first and last step of a trace in workdir/profile; None: none.
  """

  num_steps: int
  log_every: int
  checkpoint_every: int
  keep: int = 2
  profile: tuple[int, int] | None = None

  def __post_init__(self):
    for name in ('num_steps', 'log_every', 'checkpoint_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.checkpoint_every % self.log_every:
      raise ValueError(
        f'checkpoint_every={self.checkpoint_every} must be a multiple of '
        f'log_every={self.log_every}.'
      )


@dataclasses.dataclass(frozen=True)
class Job:
  """What a training run works on.

  Attributes:
    step_fn: as from training.make_train_step.
    batches: the data; its position is saved with the model.
    mesh: what batches are spread over.
    workdir: where checkpoints/ and metrics.jsonl go.
    loop: lengths and intervals.
    meta: JSON that describes the model, stored with each checkpoint.
    frozen: parameters that are neither trained nor saved, on the mesh.
    setup_s: what reading data and weights has taken.
  """

  step_fn: training.StepFn
  batches: pipeline.BatchIterator
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  loop: LoopConfig
  meta: dict[str, Any]
  frozen: Any = None
  setup_s: float = 0.0


def train(job: Job, state: training.TrainState) -> training.TrainState:
  """Returns the state after `loop.num_steps` updates, resuming if it can.

  The newest intact checkpoint in workdir/checkpoints is restored together with
  the position in the data, so that run, kill, run again equals one run. The
  last step is always saved, and on SIGTERM the one that is being done.

  Args:
    job: what to do.
    state: of a fresh run, laid out on the mesh.

  Raises:
    ValueError: a loss or gradient is not finite; the message names the step
      and the file that holds its batch. Nothing of that step is applied.
    preemption.Stopped: by SIGTERM, after a save.
  """
  loop, began = job.loop, time.perf_counter()
  earlier_s, start, log_state = elapsed_s(job.workdir), 0, None
  with checkpoint.Checkpoints(job.workdir / 'checkpoints', loop.keep) as saved:
    restored = saved.restore_latest(mesh_lib.abstract(state, job.mesh))
    if restored is not None:
      start, state, data_state = restored
      log_state = data_state.pop('window', None)
      job.batches.set_state(data_state)
    setup_s = job.setup_s + time.perf_counter() - began
    log = window.Window(earlier_s, setup_s, log_state)
    with (
      preemption.watch() as asked,
      writer_lib.MetricsWriter(job.workdir, resume_step=start if restored else -1) as writer,
    ):
      for step, new_state, stop in _steps(job, state, start, log, asked):
        state, last = new_state, step == loop.num_steps
        if step % loop.log_every == 0 or last:
          writer.write(step, _log_line(job, log))
        if step % loop.checkpoint_every == 0 or last or stop:
          with log.span('checkpoint'):
            writer.flush()
            remote.push(job.workdir)
            saved.save(step, state, job.batches.get_state() | {'window': log.get_state()}, job.meta)
        if stop:
          raise preemption.Stopped(step)
  return state


def elapsed_s(workdir: pathlib.Path) -> float:
  """Returns the seconds that training has taken so far, in all its starts."""
  rows = files.read_log(workdir / 'metrics.jsonl')
  return next((row[key] for row in reversed(rows) if (key := 'time/elapsed_s') in row), 0.0)


def _steps(
  job: Job, state: training.TrainState, start: int, log: window.Window, asked: Callable[[int], bool]
) -> Iterator[tuple[int, training.TrainState, bool]]:
  """Yields (step, state, whether to stop) after each update, behind a bar.

  Whether a step was finite is looked at one step late, so that the device is
  never waited for; and before a step that is logged or saved is yielded.
  """
  pending = None  # (step, batch, metrics) of the step still on the device
  with (
    profiling.trace(job.loop.profile, job.workdir / 'profile') as done,
    tqdm.tqdm(
      total=job.loop.num_steps,
      initial=start,
      desc='train',
      unit='step',
      dynamic_ncols=True,
      mininterval=BAR_INTERVAL_S,
    ) as bar,
  ):
    done(start, state)
    for step in range(start + 1, job.loop.num_steps + 1):
      with log.span('data_wait'):
        batch = next(job.batches)
      state, metrics = job.step_fn(state, mesh_lib.to_global(batch, job.mesh), job.frozen)
      if pending is not None:
        _check_finite(*pending, job.workdir)
      pending = (step, batch, metrics)
      log.add(
        [metrics],
        filled=int(np.count_nonzero(batch['segment_ids'])),
        places=batch['segment_ids'].size,
      )
      stop = asked(step)
      if step % job.loop.log_every == 0 or step == job.loop.num_steps or stop:
        _check_finite(*pending, job.workdir)
        pending = None
        total, weight = jax.device_get(metrics['train/loss'])
        bar.set_postfix(loss=f'{total / max(weight, 1e-9):.4f}', refresh=False)
      bar.update()
      done(step, state)
      yield step, state, stop


def _log_line(job: Job, log: window.Window) -> dict[str, float]:
  filled, places = log.counts['filled'], log.counts['places']
  values = {
    'data/fill_rate': filled / places,
    'data/shortened': job.batches.num_shortened,
    'time/tokens_per_s': filled / log.seconds,
  }
  values |= {f'data/dropped_{k}': v for k, v in job.batches.drops.items()}
  values |= log.close()
  # Of the step alone: how often its shapes have changed.
  return values | {'time/num_compilations': job.step_fn._cache_size()}


def _check_finite(
  step: int, batch: packing.Batch, metrics: dict[str, Any], workdir: pathlib.Path
) -> None:
  if float(metrics['train/finite']) > 0:
    return
  path = workdir / f'nonfinite_step_{step}.npz'
  np.savez(path, **batch)
  raise ValueError(
    f'step {step}: the loss or a gradient is not finite; its batch is in '
    f'{path}. Lower optim.lr or look at that batch, then run again: the '
    'last checkpoint is intact.'
  )
