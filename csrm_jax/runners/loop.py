"""The training loop that all runners share: step, log, checkpoint, resume."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from csrm_jax import training
from csrm_jax.core import checkpoint
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.core import writer as writer_lib
from csrm_jax.data import packing, pipeline

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
  """
  num_steps: int
  log_every: int
  checkpoint_every: int
  keep: int = 2

  def __post_init__(self):
    for name in ('num_steps', 'log_every', 'checkpoint_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.checkpoint_every % self.log_every:
      raise ValueError(
          f'checkpoint_every={self.checkpoint_every} must be a multiple of '
          f'log_every={self.log_every}.')


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
  """
  step_fn: training.StepFn
  batches: pipeline.BatchIterator
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  loop: LoopConfig
  meta: dict[str, Any]
  frozen: Any = None


def train(job: Job, state: training.TrainState) -> training.TrainState:
  """Returns the state after `loop.num_steps` updates, resuming if it can.

  The newest intact checkpoint in workdir/checkpoints is restored together with
  the position in the data, so that run, kill, run again equals one run. The
  last step is always saved.

  Args:
    job: what to do.
    state: of a fresh run, laid out on the mesh.

  Raises:
    ValueError: a loss or gradient is not finite; the message names the step
      and the file that holds its batch. Nothing of that step is applied.
  """
  earlier_s = elapsed_s(job.workdir)
  with checkpoint.Checkpoints(
      job.workdir / 'checkpoints', job.loop.keep) as saved:
    restored = saved.restore_latest(mesh_lib.abstract(state, job.mesh))
    start = 0
    if restored is not None:
      start, state = restored.step, restored.state
      job.batches.set_state(restored.data_state)
    window = _Window(job.step_fn, earlier_s)
    with writer_lib.MetricsWriter(
        job.workdir, resume_step=start if restored else -1) as writer:
      for step, new_state in _steps(job, state, start, window):
        state = new_state
        if step % job.loop.log_every and step != job.loop.num_steps:
          continue
        values = window.close()
        values |= {
            f'data/dropped_{k}': v for k, v in job.batches.drops.items()}
        values['data/shortened'] = job.batches.num_shortened
        writer.write(step, values)
        if step % job.loop.checkpoint_every == 0 or step == job.loop.num_steps:
          writer.flush()
          saved.save(step, state, job.batches.get_state(), job.meta)
  return state


def elapsed_s(workdir: pathlib.Path) -> float:
  """Returns the seconds that training has taken so far, in all its starts."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_bytes().splitlines() if path.exists() else []
  for line in reversed(lines):
    try:
      return json.loads(line)['time/elapsed_s']
    except (ValueError, KeyError):
      continue  # cut short by a kill
  return 0.0


def _steps(job: Job, state: training.TrainState, start: int,
           window: _Window) -> Iterator[tuple[int, training.TrainState]]:
  """Yields (step, state) after each update, behind a progress bar.

  Whether a step was finite is looked at one step late, so that the device is
  never waited for; and before a step that is logged or saved is yielded.
  """
  pending = None  # (step, batch, metrics) of the step still on the device
  with tqdm.tqdm(total=job.loop.num_steps, initial=start, desc='train',
                 unit='step', dynamic_ncols=True,
                 mininterval=BAR_INTERVAL_S) as bar:
    for step in range(start + 1, job.loop.num_steps + 1):
      batch = next(job.batches)
      state, metrics = job.step_fn(
          state, mesh_lib.to_global(batch, job.mesh), job.frozen)
      if pending is not None:
        _check_finite(*pending, job.workdir)
      pending = (step, batch, metrics)
      window.add(batch, metrics, job.batches.wait_s)
      if step % job.loop.log_every == 0 or step == job.loop.num_steps:
        _check_finite(*pending, job.workdir)
        pending = None
        total, weight = jax.device_get(metrics['train/loss'])
        bar.set_postfix(loss=f'{total / max(weight, 1e-9):.4f}', refresh=False)
      bar.update()
      yield step, state


def _check_finite(step: int, batch: packing.Batch, metrics: dict[str, Any],
                  workdir: pathlib.Path) -> None:
  if float(metrics['train/finite']) > 0:
    return
  path = workdir / f'nonfinite_step_{step}.npz'
  np.savez(path, **batch)
  raise ValueError(
      f'step {step}: the loss or a gradient is not finite; its batch is in '
      f'{path}. Lower optim.lr or look at that batch, then run again: the '
      'last checkpoint is intact.')


class _Window:
  """The metrics of the steps since the last log line."""

  def __init__(self, step_fn: Callable[..., Any], earlier_s: float):
    self._step_fn = step_fn
    self._first_start = time.perf_counter() - earlier_s
    self._clear()

  def _clear(self) -> None:
    self._metrics, self._wait_s, self._filled, self._places = [], 0.0, 0, 0
    self._start = time.perf_counter()

  def add(self, batch: packing.Batch, metrics: dict[str, Any],
          wait_s: float) -> None:
    self._metrics.append(metrics)
    self._wait_s += wait_s
    self._filled += int(np.count_nonzero(batch['segment_ids']))
    self._places += batch['segment_ids'].size

  def close(self) -> dict[str, float]:
    """Returns the means, fill rate, rates and the number of compilations."""
    values = training.mean_metrics(self._metrics)
    seconds = time.perf_counter() - self._start
    values |= {
        'data/fill_rate': self._filled / self._places,
        'time/elapsed_s': time.perf_counter() - self._first_start,
        'time/step_s': seconds / len(self._metrics),
        'time/data_wait_frac': self._wait_s / seconds,
        'time/tokens_per_s': self._filled / seconds,
        'time/num_compilations': self._step_fn._cache_size(),
    }
    self._clear()
    return values
