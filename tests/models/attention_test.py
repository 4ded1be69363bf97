import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import attention

B, T, N, K, H = 2, 12, 4, 2, 8


def _qkv(num_kv_heads=K, length=T, seed=0):
  rng = np.random.default_rng(seed)
  return [
      jnp.asarray(rng.standard_normal((B, length, heads, H)), jnp.float32)
      for heads in (N, num_kv_heads, num_kv_heads)]


def _reference(query, key, value, mask):
  """Softmax attention one query and head at a time, in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros_like(query)
  group = query.shape[2] // key.shape[2]
  for b, t, n in np.ndindex(*query.shape[:3]):
    seen = np.flatnonzero(mask[b, t])
    if seen.size:
      scores = key[b, seen, n // group] @ query[b, t, n] / np.sqrt(H)
      weights = np.exp(scores - scores.max())
      out[b, t, n] = weights @ value[b, seen, n // group] / weights.sum()
  return out


@pytest.mark.parametrize('chunk', [4, 5, 64])
@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
def test_attend_equals_reference(chunk, num_kv_heads, monkeypatch):
  monkeypatch.setattr(attention, 'MIN_CHUNK', chunk)
  segment_ids = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
  mask = attention.make_mask(segment_ids)
  qkv = _qkv(num_kv_heads)
  np.testing.assert_allclose(
      attention.attend(*qkv, mask), _reference(*qkv, np.asarray(mask)),
      atol=1e-5)


def test_long_rows_have_a_bounded_number_of_chunks():
  assert attention.MAX_CHUNKS * attention.MIN_CHUNK >= 1024
  length = 3 * attention.MIN_CHUNK + 7
  mask = attention.make_mask(jnp.ones((B, length), jnp.int32))
  qkv = _qkv(length=length)
  np.testing.assert_allclose(
      attention.attend(*qkv, mask), _reference(*qkv, np.asarray(mask)),
      atol=1e-5)


def test_mask_is_causal_and_within_segments():
  mask = np.asarray(attention.make_mask(jnp.asarray([[1, 1, 2, 2, 0]])))[0]
  assert mask.astype(int).tolist() == [
      [1, 0, 0, 0, 0],
      [1, 1, 0, 0, 0],
      [0, 0, 1, 0, 0],
      [0, 0, 1, 1, 0],
      [0, 0, 0, 0, 0],
  ]


def test_padding_gives_zero_with_finite_gradients():
  mask = attention.make_mask(jnp.zeros((B, T), jnp.int32))
  qkv = _qkv()
  assert not np.any(attention.attend(*qkv, mask))
  grads = jax.grad(
      lambda args: (attention.attend(*args, mask) + 1.0).sum() ** 2)(qkv)
  for grad in grads:
    assert not np.any(grad)


def test_huge_scores_do_not_overflow():
  query, key, value = _qkv()
  mask = attention.make_mask(jnp.ones((B, T), jnp.int32))
  out = attention.attend(1e3 * query, 1e3 * key, value, mask)
  assert np.all(np.isfinite(out))


def test_grouped_query_equals_repeated_kv():
  query, key, value = _qkv()
  mask = attention.make_mask(jnp.ones((B, T), jnp.int32))
  repeated = [jnp.repeat(x, N // K, axis=2) for x in (key, value)]
  np.testing.assert_allclose(
      attention.attend(query, key, value, mask),
      attention.attend(query, *repeated, mask), atol=1e-6)


def test_rope_keeps_norms_and_depends_on_distance_only():
  query, key, _ = _qkv(num_kv_heads=N)
  positions = jnp.arange(T)[None].repeat(B, 0)

  def product(shift):
    angles = attention.rope_angles(positions + shift, H, 100.0)
    rotated = [attention.apply_rope(x, *angles) for x in (query, key)]
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated[0], axis=-1),
        jnp.linalg.norm(query, axis=-1), rtol=1e-5)
    return jnp.einsum('BTNH,BSNH->BNTS', *rotated)

  np.testing.assert_allclose(product(0), product(37), atol=1e-4)


def test_rope_rotates_by_position_times_frequency():
  x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0).at[..., 1].set(1.0)
  sin, cos = attention.rope_angles(jnp.asarray([[3]]), 4, 100.0)
  got = attention.apply_rope(x, sin, cos)[0, 0, 0]
  fast, slow = 3.0, 3.0 * 100.0 ** -0.5  # pairs (0, 2) and (1, 3)
  np.testing.assert_allclose(
      got, [np.cos(fast), np.cos(slow), np.sin(fast), np.sin(slow)], atol=1e-6)


def test_rope_angles_stay_exact_at_long_positions():
  sin, _ = attention.rope_angles(jnp.asarray([[8191]]), H, 5e5)
  assert sin.dtype == jnp.float32
  exact = np.sin(8191 * 5e5 ** (-np.arange(0, H, 2) / H))
  np.testing.assert_allclose(sin[0, 0], exact, atol=2e-3)
