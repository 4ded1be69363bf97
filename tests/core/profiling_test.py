import jax
import jax.numpy as jnp
import pytest

from csrm_jax.core import profiling


def test_steps_are_a_range():
  assert profiling.parse_steps('') is None
  assert profiling.parse_steps('10:13') == (10, 13)
  for bad in ('10', '13:10', '0:3', 'a:b', '1:2:3'):
    with pytest.raises(ValueError, match="as in '10:13'"):
      profiling.parse_steps(bad)


@pytest.mark.parametrize(
  ('steps', 'start', 'want'),
  [
    ((2, 3), 0, [('start', 1), ('stop', 3)]),
    ((1, 1), 0, [('start', 0), ('stop', 1)]),
    ((2, 9), 0, [('start', 1), ('stop', 5)]),  # the run ends before
    ((2, 4), 2, [('start', 2), ('stop', 4)]),  # resumed within
    ((2, 4), 4, []),
    (None, 0, []),
  ],
)
def test_only_these_steps_are_traced(monkeypatch, steps, start, want):
  found, now = [], start
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: found.append(('start', now)))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: found.append(('stop', now)))
  with profiling.trace(steps, 'folder') as done:
    for now in range(start, 6):
      done(now, jnp.ones(2))
  assert found == want


def test_a_trace_is_written(tmp_path):
  with profiling.trace((1, 1), tmp_path / 'profile') as done:
    done(0, None)
    done(1, jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
  assert list(tmp_path.rglob('*.xplane.pb'))


def test_running_out_of_memory_is_told_apart():
  with pytest.raises(jax.errors.JaxRuntimeError) as full:
    jnp.zeros(2**50).block_until_ready()
  assert profiling.is_out_of_memory(full.value)
  assert not profiling.is_out_of_memory(jax.errors.JaxRuntimeError('INTERNAL'))
  assert not profiling.is_out_of_memory(ValueError('RESOURCE_EXHAUSTED'))
