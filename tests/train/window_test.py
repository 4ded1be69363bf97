import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.train import window


def _times(values):
  return {name: x for name, x in values.items() if name.startswith('time/')}


def test_the_parts_of_a_step_add_up():
  log = window.Window(earlier_s=100.0)
  with log.span('data_wait'):
    time.sleep(0.02)
  with log.span('checkpoint'):
    time.sleep(0.04)
  jax.jit(lambda x: x + time.monotonic())(1.0)  # compiles
  time.sleep(0.01)
  for _ in range(2):
    log.add([{'loss': np.float32(1)}], rows=3)
  assert log.counts['rows'] == 6
  values = log.close()
  assert values['time/data_wait_s'] >= 0.01
  assert values['time/checkpoint_s'] >= 0.02
  assert values['time/compile_s'] > 0 and values['time/num_compilations'] >= 1
  parts = sum(
    values[f'time/{name}_s'] for name in ('data_wait', 'checkpoint', 'compile', 'compute')
  )
  assert parts == pytest.approx(values['time/step_s'])
  assert 100 < values['time/elapsed_s'] < 101
  # Two steps, of all the seconds of both starts.
  assert values['time/goodput'] == pytest.approx(
    2 * values['time/compute_s'] / values['time/elapsed_s']
  )
  assert not log.counts


def test_a_window_cut_in_two_is_that_of_no_stop():
  steps = [
    [{'a': jnp.float32(0.1 * i), 'b': (jnp.float32(i), jnp.float32(3))}, {'c': 1 / 3}]
    for i in range(4)
  ]
  whole, first = window.Window(), window.Window()
  for step in steps:
    whole.add(step, rows=1)
  for step in steps[:3]:
    first.add(step, rows=1)
  time.sleep(0.02)
  state = json.loads(json.dumps(first.get_state()))
  second = window.Window(setup_s=7.0, state=state)
  second.add(steps[3], rows=1)
  assert second.counts == whole.counts
  want, found = whole.close(), second.close()
  assert found['time/step_s'] >= 0.02 / 4
  assert {k: v for k, v in found.items() if k not in _times(found)} == {
    k: v for k, v in want.items() if k not in _times(want)
  }
  assert found['time/elapsed_s'] >= 7.02
  assert found['time/goodput'] < 0.1


def test_good_seconds_are_those_of_the_checkpoint():
  log = window.Window()
  time.sleep(0.03)
  log.add([{'loss': 1.0}])
  log.close()
  state = log.get_state()
  # Killed long after: what was done since then is done again.
  log = window.Window(earlier_s=1000.0, state=state)
  log.add([{'loss': 1.0}])
  values = log.close()
  assert 0.03 / 1001 < values['time/goodput'] < 0.1
  assert values['time/elapsed_s'] >= 1000


def test_what_is_not_finite_is_kept_as_json():
  log = window.Window()
  log.add([{'kl': jnp.float32(jnp.nan), 'entropy': (jnp.inf, 1.0)}])
  state = log.get_state()
  json.dumps(state, allow_nan=False)
  values = window.Window(state=state).close()
  assert np.isnan(values['kl']) and np.isnan(values['entropy'])
