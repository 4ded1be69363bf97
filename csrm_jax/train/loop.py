"""The one training loop: step, log, checkpoint, stop, resume.

Reward models, pretraining, offline and online RL are `Work` of it. A run that is
killed and started again gives what an uninterrupted one would, bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

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
from csrm_jax.train import step as training

# Between updates of a progress bar; a log file needs few of its lines.
BAR_INTERVAL_S = 1.0 if sys.stderr.isatty() else 10.0

_COMPILED = '/jax/core/compile/backend_compile_duration'
# What is measured apart; the rest of a step is its computation.
_SPANS = ('data_wait', 'checkpoint', 'compile')

# An update that was begun: its batch, and what the train step says of it.
Update = tuple[Mapping[str, np.ndarray], dict[str, Any]]


class Work(Protocol):
  """What a run does in each step, and what it carries beside the train state."""

  stopped: str  # why the run ends before its last step; '' where it does not

  def begin(self, state: training.TrainState, step: int, carried: Any) -> None:
    """Takes up what get_state returned at that step; None begins afresh."""

  def step(
    self, state: training.TrainState, step: int, log: Window
  ) -> tuple[training.TrainState, Sequence[Update]]:
    """Returns the next state, and the updates that nobody has checked yet."""

  def line(self, log: Window) -> dict[str, float]:
    """Returns a line of metrics.jsonl; closes the window."""

  def get_state(self) -> dict[str, Any]:
    """Returns JSON values, which a checkpoint holds beside the train state."""


@dataclasses.dataclass(frozen=True)
class Supervised:
  """The work of learning from batches, one update each."""

  step_fn: training.StepFn
  batches: Any  # packed rows or pairs without end; count what they drop and shorten
  mesh: jax.sharding.Mesh
  frozen: Any = None  # parameters that are neither trained nor saved, on the mesh
  stopped = ''

  def begin(self, state, step, carried) -> None:
    if carried is not None:
      self.batches.set_state(carried)

  def step(self, state, step, log):
    with log.span('data_wait'):
      batch = next(self.batches)
    state, metrics = self.step_fn(state, mesh_lib.to_global(batch, self.mesh), self.frozen)
    segments = batch['segment_ids']
    log.add([metrics], filled=int(np.count_nonzero(segments)), places=segments.size)
    return state, [(batch, metrics)]

  def line(self, log) -> dict[str, float]:
    filled, places = log.counts['filled'], log.counts['places']
    values = {
      'data/fill_rate': filled / places,
      'data/shortened': self.batches.num_shortened,
      'time/tokens_per_s': filled / log.seconds,
    }
    values |= {f'data/dropped_{reason}': num for reason, num in self.batches.drops.items()}
    values |= log.close()
    # Of the step alone: how often its shapes have changed.
    return values | {'time/num_compilations': self.step_fn._cache_size()}

  def get_state(self) -> dict[str, Any]:
    return self.batches.get_state()


def check_lengths(config: Any) -> None:
  """Checks num_steps, log_every, checkpoint_every and profile_steps of a config.

  Raises:
    ValueError: one is out of range, or a resumed run would not log what an
      uninterrupted one does.
  """
  for name in ('num_steps', 'log_every', 'checkpoint_every'):
    if config[name] < 1:
      raise ValueError(f'{name}={config[name]} must be at least 1.')
  if config.checkpoint_every % config.log_every:
    raise ValueError(
      f'checkpoint_every={config.checkpoint_every} must be a multiple of '
      f'log_every={config.log_every}.'
    )
  profiling.parse_steps(config.profile_steps)


def train(
  work: Work,
  state: training.TrainState,
  config: Any,
  *,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  meta: Mapping[str, Any],
  setup_s: float = 0.0,
  name: str = 'train',
) -> training.TrainState:
  """Returns the state after config.num_steps steps, resuming if it can.

  The newest intact checkpoint in workdir/checkpoints is restored together with
  what the work carries. The last step is always saved, and on SIGTERM the one
  that is being done.

  Args:
    work: what to do.
    state: that of a fresh run, laid out on the mesh.
    config: see check_lengths.
    mesh: what the state lies on.
    workdir: where checkpoints/, profile/ and metrics.jsonl go.
    meta: JSON that describes the model, stored with each checkpoint.
    setup_s: what reading data and weights has taken.
    name: what stands before the progress bar.

  Raises:
    ValueError: a loss or gradient is not finite; the message names the step
      and the file that holds its batch. Nothing of that step is applied.
    preemption.Stopped: by SIGTERM, after a save.
  """
  check_lengths(config)
  began, earlier_s, start = time.perf_counter(), elapsed_s(workdir), 0
  carried, window = None, None
  with checkpoint.Checkpoints(workdir / 'checkpoints') as saved:
    restored = saved.restore_latest(mesh_lib.abstract(state, mesh))
    if restored is not None:
      start, state, carried = restored
      window = carried.pop('window', None)
    work.begin(state, start, carried)
    num_steps = start if work.stopped else config.num_steps
    log = Window(earlier_s, setup_s + time.perf_counter() - began, window)
    with (
      preemption.watch() as asked,
      profiling.trace(profiling.parse_steps(config.profile_steps), workdir / 'profile') as done,
      writer_lib.MetricsWriter(workdir, resume_step=start if restored else -1) as writer,
      tqdm.tqdm(
        total=num_steps,
        initial=start,
        desc=name,
        unit='step',
        dynamic_ncols=True,
        mininterval=BAR_INTERVAL_S,
      ) as bar,
    ):
      done(start, state)
      unchecked = ()
      for step in range(start + 1, num_steps + 1):
        state, updates = work.step(state, step, log)
        # Those of the step before: the device is never waited for.
        check_finite(workdir, step - 1, unchecked)
        unchecked = updates
        stop, last = asked(step), step == num_steps
        is_logged = step % config.log_every == 0 or last
        if is_logged or stop:  # nothing is logged or saved unchecked
          check_finite(workdir, step, unchecked)
          unchecked = ()
          if updates:
            total, weight = jax.device_get(updates[-1][1]['train/loss'])
            bar.set_postfix(loss=f'{total / max(weight, 1e-9):.4f}', refresh=False)
        bar.update()
        done(step, state)
        if is_logged:
          writer.write(step, work.line(log))
        last = last or bool(work.stopped)
        if step % config.checkpoint_every == 0 or last or stop:
          with log.span('checkpoint'):
            writer.flush()
            remote.push(workdir)
            saved.save(step, state, work.get_state() | {'window': log.get_state()}, meta)
        if stop:
          raise preemption.Stopped(step)
        if last:
          break
  if work.stopped:
    print(f'stopped early: {work.stopped}', file=sys.stderr)
  return state


def check_finite(workdir: pathlib.Path, step: int, updates: Sequence[Update]) -> None:
  """Waits for the updates of a step.

  Raises:
    ValueError: one was not applied, because it was not finite; its batch is
      kept in the work directory.
  """
  for batch, metrics in updates:
    if float(metrics['train/finite']) > 0:
      continue
    path = workdir / f'nonfinite_step_{step}.npz'
    np.savez(path, **batch)
    raise ValueError(
      f'step {step}: the loss or a gradient is not finite; its batch is in '
      f'{path}. Lower optim.lr or look at that batch, then run again: the '
      'last checkpoint is intact.'
    )


def elapsed_s(workdir: pathlib.Path) -> float:
  """Returns the seconds that training has taken so far, in all its starts."""
  rows = files.read_log(workdir / 'metrics.jsonl')
  return next((row[key] for row in reversed(rows) if (key := 'time/elapsed_s') in row), 0.0)


class Window:
  """The metrics of the steps since the last line.

  Its state is saved with the model, so that a line whose steps were cut in two
  by a stop is that of a run without one, and so that no second is forgotten.
  """

  def __init__(
    self, earlier_s: float = 0.0, setup_s: float = 0.0, state: Mapping[str, Any] | None = None
  ):
    """Starts the clock; a state of get_state may know of more earlier_s."""
    now = time.perf_counter()
    earlier_s = max(earlier_s, state['elapsed_s'] if state else 0.0)
    self._began = now - earlier_s - setup_s
    self._num_before = _compilations()[0]
    self._good_s = 0.0  # in steps that count, since the first start
    self._clear()
    if state:
      self._metrics = list(state['metrics'])
      self._counts = collections.Counter(state['counts'])
      self._num_steps, self._good_s = state['num_steps'], state['good_s']
      self._spans, self._start = dict(state['spans']), now - state['seconds']

  def _clear(self) -> None:
    self._metrics: list[Mapping[str, Any]] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._spans = dict.fromkeys(_SPANS, 0.0)
    self._num_steps, self._start = 0, time.perf_counter()
    self._compiled_s = _compilations()[1]

  @contextlib.contextmanager
  def span(self, name: str) -> Iterator[None]:
    """Counts the seconds within as those of 'data_wait' or 'checkpoint'."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._spans[name] += time.perf_counter() - start

  def add(self, metrics: Sequence[Mapping[str, Any]], **counts: float) -> None:
    """Adds what one step measured, and counted."""
    self._metrics += metrics
    self._counts.update(counts)
    self._num_steps += 1

  @property
  def counts(self) -> Mapping[str, float]:
    """Sums of what the steps counted."""
    return self._counts

  @property
  def seconds(self) -> float:
    """Since the last line, or the start."""
    return time.perf_counter() - self._start

  def close(self) -> dict[str, float]:
    """Returns the means of the metrics, and times; begins the next window.

    time/step_s is the sum of its parts, each in seconds a step: data_wait_s,
    checkpoint_s, compile_s and compute_s, which is the rest. time/goodput is
    the share of elapsed_s that was compute_s of a step that has not been done
    again. elapsed_s is that of all starts of the run. num_compilations counts
    since this start; after the first steps it should stay where it is.
    """
    values = training.mean_metrics(self._metrics)
    spans, seconds = self._measured(), self.seconds
    compute_s = max(0.0, seconds - sum(spans.values()))
    self._good_s += compute_s
    elapsed_s = time.perf_counter() - self._began
    spans |= {'compute': compute_s, 'step': seconds}
    values |= {f'time/{name}_s': span / self._num_steps for name, span in spans.items()}
    values |= {
      'time/elapsed_s': elapsed_s,
      'time/goodput': self._good_s / elapsed_s,
      'time/num_compilations': _compilations()[0] - self._num_before,
    }
    self._clear()
    return values

  def get_state(self) -> dict[str, Any]:
    """Returns JSON, with null for what is not finite; waits for the device."""
    steps = [
      {name: np.asarray(x, np.float64).tolist() for name, x in step.items()}
      for step in jax.device_get(self._metrics)
    ]
    return {
      'metrics': json.loads(json.dumps(steps), parse_constant=lambda name: None),
      'counts': dict(self._counts),
      'num_steps': self._num_steps,
      'spans': self._measured(),
      'seconds': self.seconds,
      'good_s': self._good_s,
      'elapsed_s': time.perf_counter() - self._began,
    }

  def _measured(self) -> dict[str, float]:
    """Returns the spans, with what was compiled meanwhile."""
    compiled_s = _compilations()[1] - self._compiled_s
    return self._spans | {'compile': self._spans['compile'] + compiled_s}


@functools.cache
def _compilations() -> list[float]:
  """Returns [their number, their seconds] from the first call on."""
  found = [0, 0.0]

  def listen(event: str, duration: float, **unused) -> None:
    if event == _COMPILED:
      found[0] += 1
      found[1] += duration

  jax.monitoring.register_event_duration_secs_listener(listen)
  return found
