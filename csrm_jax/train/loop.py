"""The one training loop: step, log, checkpoint, stop, resume.

Reward models, pretraining, offline and online RL each give it a `Work`. A run that is killed and
started again gives the same result as an uninterrupted one, bit for bit.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from csrm_jax.core import (
  checkpoint,
  checks,
  files,
  lease,
  mesh as mesh_lib,
  preemption,
  profiling,
  progress,
  remote,
  trackers,
  writer as writer_lib,
)
from csrm_jax.train import step as training

_COMPILED = '/jax/core/compile/backend_compile_duration'
# These parts of a step are measured; the rest is its computation.
_SPANS = ('data_wait', 'checkpoint', 'compile')

# An update that may still run on the device: its batch, and the metrics of its train step.
Update = tuple[Mapping[str, np.ndarray], dict[str, Any]]


class Work(Protocol):
  """What a run does in each step, and its state beside the train state."""

  stopped: str  # why the run ends before its last step, or ''

  def begin(self, state: training.TrainState, step: int, carried: Any) -> None:
    """Takes up the state that get_state returned at that step; None begins afresh."""

  def step(
    self, state: training.TrainState, step: int, log: Window
  ) -> tuple[training.TrainState, Sequence[Update]]:
    """Returns the next state, and the updates that nobody has checked yet."""

  def line(self, log: Window) -> dict[str, float]:
    """Returns the values of a line of metrics.jsonl, and closes the window."""

  def get_state(self) -> dict[str, Any]:
    """Returns JSON values for the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Supervised:
  """The work of learning from batches: one update for each batch."""

  step_fn: training.StepFn
  batches: Any  # endless packed rows or pairs, with counts of what is dropped and shortened
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
    log.add(
      [metrics],
      filled=int(np.count_nonzero(segments)),
      places=segments.size,
      judged=num_judged(batch),
    )
    return state, [(batch, metrics)]

  def line(self, log) -> dict[str, float]:
    filled, places = log.counts['filled'], log.counts['places']
    values = {
      'data/fill_rate': filled / places,
      'data/shortened': self.batches.num_shortened,
      'time/tokens_per_s': filled / log.seconds,
    }
    if log.counts['judged']:
      # More than are read where prompts share their first tokens.
      values['time/judged_tokens_per_s'] = log.counts['judged'] / log.seconds
      values['data/judged_per_token'] = log.counts['judged'] / filled
    values |= {f'data/dropped_{reason}': num for reason, num in self.batches.drops.items()}
    values |= log.close()
    # The window counts all compilations; here only those of the train step, when its shapes change.
    return values | {'time/num_compilations': self.step_fn._cache_size()}

  def get_state(self) -> dict[str, Any]:
    return self.batches.get_state()


def num_judged(batch: Mapping[str, np.ndarray]) -> int:
  """Returns the lengths of all prompts of a packed batch together; 0 for other batches."""
  if 'verdict_index' not in batch:
    return 0
  last = batch['verdict_index']
  # A prompt is as long as the position of its last token says.
  lengths = np.take_along_axis(batch['positions'], last, axis=1) + 1
  return int(lengths[last > 0].sum())


def check_lengths(config: Any) -> None:
  """Checks num_steps, log_every, checkpoint_every and profile_steps of a config."""
  checks.at_least(config, ('num_steps', 'log_every', 'checkpoint_every'))
  if config.checkpoint_every % config.log_every:
    raise ValueError(
      f'checkpoint_every={config.checkpoint_every} must be a multiple of '
      f'log_every={config.log_every}.'
    )
  profiling.parse_steps(config.profile_steps)
  trackers.check(config.loggers)


@dataclasses.dataclass(frozen=True)
class Validation:
  """How a run is measured on held-out rows while it trains."""

  measure: Callable[[Any], Mapping[str, float]]  # params -> metrics, of which eval/loss decides
  every: int  # steps; a multiple of checkpoint_every
  keep_best: bool  # the last checkpoint gets the parameters that had the lowest loss
  patience: int  # measurements in a row without a lower loss that end the run; 0 for none

  def check(self, checkpoint_every: int) -> None:
    """Checks the settings against the run's."""
    if self.every < 1 or self.every % checkpoint_every:
      raise ValueError(
        f'eval.every={self.every} must be a multiple of checkpoint_every={checkpoint_every}.'
      )
    if self.patience < 0:
      raise ValueError(f'eval.patience={self.patience} must be at least 0.')


def train(
  work: Work,
  state: training.TrainState,
  config: Any,
  *,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  meta: Mapping[str, Any],
  inputs: Mapping[str, str] | None = None,
  setup_s: float = 0.0,
  name: str = 'train',
  validation: Validation | None = None,
) -> training.TrainState:
  """Returns the state after config.num_steps steps, resuming if it can.

  `state` is that of a fresh run, on the mesh. The newest intact checkpoint in workdir/checkpoints
  takes its place, together with the state of the work. The last step is saved, and after SIGTERM
  the step that is being done. `meta` is JSON that describes the model, stored with each checkpoint,
  as `inputs` are: {what the run reads: its digest}. setup_s are the seconds that reading data and
  weights has taken. With a validation the last checkpoint may be that of an earlier step.

  Raises:
    ValueError: A loss or gradient is not finite; the message names the step and the file with
      its batch. That step is not applied. Or an input has changed since the checkpoint, and
      config.accept_changes is False.
    preemption.Stopped: SIGTERM came, and the state is saved.
  """
  check_lengths(config)
  if validation:
    validation.check(config.checkpoint_every)
  began, earlier_s, start = time.perf_counter(), elapsed_s(workdir), 0
  carried, window, inputs = None, None, dict(inputs or {})
  # The lowest loss so far, its step, and how many measurements followed.
  best = {'loss': None, 'step': 0, 'num_since': 0, 'done': False}
  with checkpoint.Checkpoints(workdir / 'checkpoints') as saved:
    _check_newest(config, saved.find_missing())
    restored = saved.restore_latest(mesh_lib.abstract(state, mesh))
    if restored is not None:
      start, state, carried = restored
      # The loop's own entries: the work gets back only what it gave.
      window = carried.pop('window', None)
      _check_metrics(config, workdir, start)
      _check_inputs(config, workdir, carried.pop('inputs', {}), inputs)
      best = carried.pop('best', best)
    else:
      _check_new(config, workdir)
    if inputs:
      writer_lib.update_manifest(workdir, {'inputs': inputs})
    work.begin(state, start, carried)
    # A run that stopped early has nothing left to do when it is started again.
    num_steps = start if work.stopped or best['done'] else config.num_steps
    whole = start  # the newest checkpoint that is saved
    log = Window(earlier_s, setup_s + time.perf_counter() - began, window)
    with (
      preemption.watch() as asked,
      profiling.trace(profiling.parse_steps(config.profile_steps), workdir / 'profile') as done,
      writer_lib.MetricsWriter(
        workdir, resume_step=start if restored else -1, loggers=config.loggers
      ) as writer,
      progress.bar(num_steps, name, 'step', start) as bar,
      checkpoint.Checkpoints(workdir / 'best', keep=1) as kept,
    ):
      done(start, state)
      unchecked = ()
      for step in range(start + 1, num_steps + 1):
        state, updates = work.step(state, step, log)
        # Step - 1, not this one: waiting for this one would let the device run dry.
        check_finite(workdir, step - 1, unchecked)
        unchecked = updates
        stop, last = asked(step), step == num_steps
        is_logged = step % config.log_every == 0 or last
        if is_logged or stop:  # Nothing is logged or saved unchecked.
          check_finite(workdir, step, unchecked)
          unchecked = ()
          if updates:
            total, weight = jax.device_get(updates[-1][1]['train/loss'])
            bar.set_postfix_str(f'loss={total / max(weight, 1e-9):.4f}', refresh=False)
        bar.update()
        done(step, state)
        measured = {}
        if validation and (step % validation.every == 0 or last):
          with log.span('validate'):
            measured = dict(validation.measure(state.params))
            last = _compare(best, measured['eval/loss'], step, validation.patience) or last
            if best['step'] == step and validation.keep_best:
              _keep_best(kept, state, step)
          is_logged = True
        if is_logged:
          writer.write(step, work.line(log) | measured)
        # Only now: closing a line may tell the work to stop.
        last = last or bool(work.stopped)
        if last and validation:
          best['done'] = True
          if validation.keep_best and 0 < best['step'] < step:
            shapes = mesh_lib.abstract({'params': state.params}, mesh)
            kept.wait()
            params = kept.restore(best['step'], shapes).state['params']
            state = dataclasses.replace(state, params=params)
            checks.note(f'step {best["step"]} had the lowest loss on held-out rows, and is kept')
        if step % config.checkpoint_every == 0 or last or stop:
          with log.span('checkpoint'):
            lease.check(workdir)
            saved.wait()
            checkpoint.record(workdir, whole, step)
            # Metrics first: after a kill, metrics.jsonl must reach at least to the checkpoint.
            writer.flush()
            remote.push(workdir)
            own = {'window': log.get_state(), 'inputs': inputs, 'best': best}
            saved.save(step, state, work.get_state() | own, meta)
            whole = step
        if stop:
          raise preemption.Stopped(step)
        if last:
          break
    saved.wait()
    checkpoint.record(workdir, whole, whole)
  if work.stopped:
    print(f'stopped early: {work.stopped}', file=sys.stderr)
  return state


def _compare(best: dict[str, Any], loss: float, step: int, patience: int) -> bool:
  """Updates what is known of the best step; returns whether patience is at its end."""
  if not np.isfinite(loss):
    raise ValueError(f'step {step}: eval/loss is {loss}; look at the held-out rows')
  if best['loss'] is None or loss < best['loss']:
    best |= {'loss': float(loss), 'step': step, 'num_since': 0}
  else:
    best['num_since'] += 1
  return bool(patience) and best['num_since'] >= patience


def _keep_best(kept: checkpoint.Checkpoints, state: training.TrainState, step: int) -> None:
  # After a kill this step may be there already, as it is now bit for bit.
  if step not in kept.steps():
    kept.save(step, {'params': state.params}, {})


def _check_new(config: Any, workdir: pathlib.Path) -> None:
  """Checks that no checkpoint is missing from a run that has none."""
  last, folder = _last_logged(workdir), remote.home(workdir / 'checkpoints')
  # One checkpoint is on the disk before the next one is begun; the folder is made by the first one
  # (in a bucket with its first file).
  gone = not remote.is_bucket(folder) and not folder.exists()
  if last > (1 if gone else 2) * config.checkpoint_every:
    raise ValueError(
      f'{workdir}: metrics.jsonl reaches step {last}, but there is no checkpoint in checkpoints/; '
      'mount it or put it back, or move metrics.jsonl away to begin again with step 0'
    )


def _check_newest(config: Any, missing: str) -> None:
  """Checks that no checkpoint is newer than the one to go on from."""
  if missing and not config.accept_changes:
    raise ValueError(f'{missing}, or go on from the older one with --config.accept_changes=True')
  if missing:
    checks.note(missing)


def _last_logged(workdir: pathlib.Path) -> int:
  rows = files.read_log(workdir / 'metrics.jsonl')
  return max((row['step'] for row in rows if type(row.get('step')) is int), default=0)


def _check_metrics(config: Any, workdir: pathlib.Path, step: int) -> None:
  """Checks that metrics.jsonl has the lines before the checkpoint, which are written first."""
  last = _last_logged(workdir)
  if jax.process_index() != 0 or last >= step // config.log_every * config.log_every:
    return
  where = f'{workdir}: metrics.jsonl ends at step {last}, and the checkpoint is of step {step}'
  if not config.accept_changes:
    raise ValueError(
      f'{where}; put back the whole file, or go on without it with --config.accept_changes=True'
    )
  checks.note(where)


def _check_inputs(
  config: Any, workdir: pathlib.Path, before: Mapping[str, str], now: Mapping[str, str]
) -> None:
  """Checks that what the run reads is what it has read until its checkpoint."""
  changed = [name for name in now if name in before and before[name] != now[name]]
  if not changed:
    return
  what = '; '.join(f'{name}: {before[name][:12]} -> {now[name][:12]}' for name in changed)
  if not config.accept_changes:
    raise ValueError(
      f'{workdir}: what this run reads has changed since its checkpoint ({what}); put it back, '
      'give another --workdir, or go on with what is there now with --config.accept_changes=True'
    )
  checks.note(f'going on with what has changed: {what}')


def check_finite(workdir: pathlib.Path, step: int, updates: Sequence[Update]) -> None:
  """Waits for the updates of a step; keeps the batch and raises if one is not finite."""
  for batch, metrics in updates:
    if float(metrics['train/finite']) > 0:
      continue
    path = workdir / f'nonfinite_step_{step}.npz'
    # A batch that broke a run is the first thing to look at.
    np.savez(path, **batch)
    raise ValueError(
      f'step {step}: the loss or a gradient is not finite; its batch is in {path}. Lower optim.lr '
      'or look at that batch, then run again: the last checkpoint is intact.'
    )


def elapsed_s(workdir: pathlib.Path) -> float:
  """Returns the seconds of training so far, over all starts of the run."""
  rows = reversed(files.read_log(workdir / 'metrics.jsonl'))
  seconds = (row.get('time/elapsed_s') for row in rows)
  return next((s for s in seconds if isinstance(s, (int, float))), 0.0)


class Window:
  """The metrics of the steps since the last line.

  Its state is saved in checkpoints: a line is the same if a stop cut its steps in two, and no
  second is lost.
  """

  def __init__(
    self, earlier_s: float = 0.0, setup_s: float = 0.0, state: Mapping[str, Any] | None = None
  ):
    """Starts the clock. The larger of `earlier_s` and the time in `state` counts."""
    now = time.perf_counter()
    # Either may know of more: a log line may follow the checkpoint, or the other way round.
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
    """Counts the seconds within as 'data_wait' or 'checkpoint'."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._spans[name] = self._spans.get(name, 0.0) + time.perf_counter() - start

  def add(self, metrics: Sequence[Mapping[str, Any]], **counts: float) -> None:
    """Adds the metrics and the counts of one step."""
    self._metrics += metrics
    self._counts.update(counts)
    self._num_steps += 1

  @property
  def counts(self) -> Mapping[str, float]:
    """The sums of the counts."""
    return self._counts

  @property
  def seconds(self) -> float:
    """The seconds since the last line, or since the start."""
    return time.perf_counter() - self._start

  def close(self) -> dict[str, float]:
    """Returns the means of the metrics, and times; begins the next window.

    time/step_s is the sum of its parts, in seconds per step: data_wait_s, checkpoint_s,
    compile_s and compute_s, which is the rest. time/goodput is the share of elapsed_s that was
    compute_s of steps that were not done again. elapsed_s covers all starts of the run.
    num_compilations counts from this start, and should not grow after the first steps.
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
    """Returns JSON, with null for NaN and infinity; waits for the device."""
    steps = [
      {name: np.asarray(x, np.float64).tolist() for name, x in step.items()}
      for step in jax.device_get(self._metrics)
    ]
    return {
      # JSON has no NaN and infinity; the round trip turns them into null.
      'metrics': json.loads(json.dumps(steps), parse_constant=lambda name: None),
      'counts': dict(self._counts),
      'num_steps': self._num_steps,
      'spans': self._measured(),
      'seconds': self.seconds,
      'good_s': self._good_s,
      'elapsed_s': time.perf_counter() - self._began,
    }

  def _measured(self) -> dict[str, float]:
    """Returns the spans; the seconds of compilation are brought up to date."""
    compiled_s = _compilations()[1] - self._compiled_s
    return self._spans | {'compile': self._spans['compile'] + compiled_s}


@functools.cache
def _compilations() -> list[float]:
  """Returns [number, seconds] of compilations, counted from the first call on."""
  found = [0, 0.0]

  def listen(event: str, duration: float, **unused) -> None:
    if event == _COMPILED:
      found[0] += 1
      found[1] += duration

  # One listener for the whole process; each window takes differences of its counts.
  jax.monitoring.register_event_duration_secs_listener(listen)
  return found
