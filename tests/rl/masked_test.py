import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st

from csrm_jax.rl import objectives


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=4, max_size=4))
def test_matches_numpy(items):
  x = np.array([v for v, _ in items], np.float32)
  mask = np.array([m for _, m in items])
  np.testing.assert_allclose(objectives.masked_sum(jnp.asarray(x), mask), x[mask].sum(), atol=1e-5)
  mean = x[mask].mean() if mask.any() else 0.0
  np.testing.assert_allclose(objectives.masked_mean(jnp.asarray(x), mask), mean, atol=1e-5)


def test_weights_axes_and_broadcasting():
  x = jnp.arange(6.0).reshape(2, 3)
  weight = jnp.array([1.0, 0.0, 3.0])
  np.testing.assert_allclose(objectives.masked_sum(x, weight, axis=1), [6, 18])
  np.testing.assert_allclose(objectives.masked_mean(x, weight, axis=1), [1.5, 4.5])
  np.testing.assert_allclose(objectives.masked_mean(x, weight), 3.0)


def test_excluded_nan_reaches_neither_value_nor_gradient():
  def loss(x):
    return objectives.masked_mean(jnp.log(x), jnp.array([True, False]))

  value, grad = jax.value_and_grad(loss)(jnp.array([2.0, -1.0]))
  np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)
  np.testing.assert_allclose(grad[0], 0.5)


def test_low_precision_is_summed_in_float32():
  x = jnp.ones(1000, jnp.bfloat16)
  total = objectives.masked_sum(x, jnp.ones(1000, jnp.bfloat16))
  assert total.dtype == jnp.float32
  assert total == 1000
  assert objectives.masked_mean(x, jnp.zeros(1000, bool)) == 0
