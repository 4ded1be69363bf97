import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import config, products

SHAPES = {'plain': ((24,), (20,)), 'heads': ((24,), (5, 4)), 'out': ((6, 4), (20,))}


def _arrays(inputs, outputs, rows, dtype=jnp.float32, rank=3):
  shapes = [(rows, *inputs), (*inputs, *outputs), (*inputs, rank), (rank, *outputs)]
  keys = jax.random.split(jax.random.key(0), 5)
  x, *weights = (jax.random.normal(key, s) for key, s in zip(keys[1:], shapes, strict=True))
  return keys[0], x.astype(dtype), *weights


def _values(fn, key, *args):
  """Returns (fn(*args), the gradients of a random sum of it)."""
  y, pull = jax.vjp(fn, *args)
  return y, *pull(jax.random.normal(key, y.shape).astype(y.dtype))


def _assert_close(got, want, tolerance):
  for ours, plain in zip(got, want, strict=True):
    ours, plain = (np.asarray(z, np.float32) for z in (ours, plain))
    assert np.abs(ours - plain).max() <= tolerance * np.abs(plain).max()


@pytest.mark.parametrize('rows', [8, products.MIN_FOLDED_ROWS])
@pytest.mark.parametrize('shape', SHAPES)
def test_adapted_is_the_sum_of_both_products(shape, rows):
  key, x, kernel, a, b = _arrays(*SHAPES[shape], rows)

  def plain(x, a, b):
    axes = x.ndim - 1
    return jnp.tensordot(x, kernel, axes) + 0.7 * jnp.tensordot(jnp.tensordot(x, a, axes), b, 1)

  got = _values(lambda x, a, b: products.adapted(x, kernel, a, b, 0.7), key, x, a, b)
  _assert_close(got, _values(plain, key, x, a, b), 1e-6)


def test_adapters_are_not_rounded_to_bfloat16_kernels():
  key, x, kernel, a, b = _arrays((24,), (20,), products.MIN_FOLDED_ROWS, jnp.bfloat16)
  kernel = kernel.astype(jnp.bfloat16)
  small = 1e-4 * b
  zero = products.adapted(x, 0 * kernel, a, small, 1.0)
  got = products.adapted(x, kernel, a, 100 * small, 1.0) - products.adapted(
    x, kernel, a, 0 * b, 1.0
  )
  assert np.abs(np.asarray(zero, np.float32)).max() > 0
  assert np.abs(np.asarray(got, np.float32)).max() > 0
  dx, da, db = _values(lambda x, a, b: products.adapted(x, kernel, a, b, 1.0), key, x, a, b)[1:]
  assert (dx.dtype, da.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_frozen_kernels_have_no_gradient():
  _, x, kernel, a, b = _arrays((24,), (20,), 8)
  grad = jax.grad(lambda kernel: products.adapted(x, kernel, a, b, 1.0).sum())(kernel)
  assert not np.asarray(grad).any()


@pytest.mark.parametrize('shape', SHAPES)
def test_bfloat16_gradients_are_those_of_float32(shape):
  key, x, kernel, _, _ = _arrays(*SHAPES[shape], 64, jnp.bfloat16)
  kernel = kernel.astype(jnp.bfloat16)
  y, pull = jax.vjp(products.dense, x, kernel)
  _, exact_pull = jax.vjp(
    lambda x, kernel: jnp.tensordot(x, kernel, x.ndim - 1, precision='highest'),
    x.astype(jnp.float32),
    kernel.astype(jnp.float32),
  )
  dy = jax.random.normal(key, y.shape).astype(jnp.bfloat16)
  # One rounding to bfloat16. XLA's own x.T·dy may be off by four times as much.
  _assert_close(pull(dy), exact_pull(dy.astype(jnp.float32)), 2**-8)


@pytest.mark.parametrize(('gain', 'dtype'), [(1.1, 'float32'), (1.9, 'bfloat16')])
def test_auto_dtype_is_the_faster_one(gain, dtype, monkeypatch):
  monkeypatch.setattr(products, 'bfloat16_gain', lambda: gain)
  assert config.preset('tiny', 40, dtype='auto').dtype == dtype
  assert config.preset('tiny', 40).dtype == 'float32'


def test_gain_is_measured():
  assert 0.2 < products.bfloat16_gain() < 100
