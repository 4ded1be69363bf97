"""What one line of metrics.jsonl sums up, and where the time of it went."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from csrm_jax.train import step as training

_COMPILED = '/jax/core/compile/backend_compile_duration'
# What is measured apart; the rest of a step is its computation.
_SPANS = ('data_wait', 'checkpoint', 'compile')


class Window:
  """The metrics of the steps since the last line.

  Its state is saved with the model, so that a line whose steps were cut in two
  by a stop is that of a run without one, and so that no second is forgotten.
  """

  def __init__(
    self, earlier_s: float = 0.0, setup_s: float = 0.0, state: Mapping[str, Any] | None = None
  ):
    """Starts the clock.

    Args:
      earlier_s: that earlier starts of the run took.
      setup_s: that this one has taken.
      state: of get_state, from the checkpoint; it may know of more earlier_s.
    """
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
    values |= {
      f'time/{name}_s': span / self._num_steps
      for name, span in (spans | {'compute': compute_s, 'step': seconds}).items()
    }
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
