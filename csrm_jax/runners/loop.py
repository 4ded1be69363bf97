"""The training loop that all runners share: step, log, checkpoint, resume."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
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


def train(step_fn: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
          state: training.TrainState, batches: pipeline.BatchIterator,
          mesh: jax.sharding.Mesh, workdir: pathlib.Path, loop: LoopConfig,
          meta: dict[str, Any]) -> training.TrainState:
  """Returns the state after `loop.num_steps` updates, resuming if it can.

  The newest intact checkpoint in workdir/checkpoints is restored together with
  the position in the data, so that run, kill, run again equals one run. The
  last step is always saved.

  Args:
    step_fn: as from training.make_train_step.
    state: of a fresh run, laid out on the mesh.
    batches: the data; its state is saved with the model's.
    mesh: what batches are spread over.
    workdir: where checkpoints/ and metrics.jsonl go.
    loop: lengths and intervals.
    meta: JSON that describes the model, stored with each checkpoint.

  Raises:
    ValueError: a loss or gradient is not finite; the message names the step
      and the file that holds its batch. Nothing of that step is applied.
  """
  earlier_s = elapsed_s(workdir)
  with checkpoint.Checkpoints(workdir / 'checkpoints', loop.keep) as saved:
    restored = saved.restore_latest(mesh_lib.abstract(state, mesh))
    start = 0
    if restored is not None:
      start, state = restored.step, restored.state
      batches.set_state(restored.data_state)
    with writer_lib.MetricsWriter(
        workdir, resume_step=start if restored else -1) as writer:
      return _run(step_fn, state, batches, mesh, saved, writer, loop, meta,
                  start, workdir, earlier_s)


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


def _run(step_fn, state, batches, mesh, saved, writer, loop, meta, start,
         workdir, earlier_s):
  window = _Window(step_fn, earlier_s)
  pending = None  # (step, batch, metrics) of the step still on the device
  with tqdm.tqdm(total=loop.num_steps, initial=start, desc='train', unit='step',
                 dynamic_ncols=True, mininterval=BAR_INTERVAL_S) as bar:
    for step in range(start + 1, loop.num_steps + 1):
      batch = next(batches)
      state, metrics = step_fn(state, mesh_lib.to_global(batch, mesh))
      # One step late, so that the device is never waited for.
      if pending is not None:
        _check_finite(*pending, workdir)
      pending = (step, batch, metrics)
      window.add(batch, metrics, batches.wait_s)
      bar.update()
      if step % loop.log_every and step != loop.num_steps:
        continue
      _check_finite(*pending, workdir)
      pending = None
      values = window.close()
      values |= {f'data/dropped_{k}': v for k, v in batches.drops.items()}
      values['data/shortened'] = batches.num_shortened
      writer.write(step, values)
      bar.set_postfix(loss=f'{values["train/loss"]:.4f}', refresh=False)
      if step % loop.checkpoint_every == 0 or step == loop.num_steps:
        writer.flush()
        saved.save(step, state, batches.get_state(), meta)
  return state


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
