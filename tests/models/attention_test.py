import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import attention
from csrm_jax.models.config import RopeScaling

B, T, N, K, H = 2, 12, 4, 2, 8


def _qkv(num_kv_heads=K, length=T, seed=0):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.standard_normal((B, length, heads, H)), jnp.float32)
    for heads in (N, num_kv_heads, num_kv_heads)
  ]


def _reference(query, key, value, mask, cap=0.0):
  """Softmax attention one query and head at a time, in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros_like(query)
  group = query.shape[2] // key.shape[2]
  for b, t, n in np.ndindex(*query.shape[:3]):
    seen = np.flatnonzero(mask[b, t])
    if seen.size:
      scores = key[b, seen, n // group] @ query[b, t, n]
      if cap:
        scores = cap * np.tanh(scores / cap)
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
    attention.attend(*qkv, mask), _reference(*qkv, np.asarray(mask)), atol=1e-5
  )


def test_long_rows_have_a_bounded_number_of_chunks():
  assert attention.MAX_CHUNKS * attention.MIN_CHUNK >= 1024
  length = 3 * attention.MIN_CHUNK + 7
  mask = attention.make_mask(jnp.ones((B, length), jnp.int32))
  qkv = _qkv(length=length)
  np.testing.assert_allclose(
    attention.attend(*qkv, mask), _reference(*qkv, np.asarray(mask)), atol=1e-5
  )


def test_mask_is_causal_and_within_segments():
  mask = np.asarray(attention.make_mask(jnp.asarray([[1, 1, 2, 2, 0]])))[0]
  assert mask.astype(int).tolist() == [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],
  ]


@pytest.mark.parametrize('window', [1, 3, 12])
def test_mask_with_window_is_the_band_next_to_the_diagonal(window):
  segment_ids = jnp.asarray([[1] * 7 + [2] * 5])
  query, key = np.indices((T, T))
  want = np.asarray(attention.make_mask(segment_ids))[0]
  want = want & (query - key < window)
  assert want.any()
  np.testing.assert_array_equal(attention.make_mask(segment_ids, window)[0], want)


@pytest.mark.parametrize('chunk', [2, 4, 64])
def test_a_promised_window_only_leaves_out_hidden_keys(chunk, monkeypatch):
  monkeypatch.setattr(attention, 'MIN_CHUNK', chunk)
  monkeypatch.setattr(attention, 'MAX_CHUNKS', T)
  mask = attention.make_mask(jnp.asarray([[1] * 8 + [2] * 4, [1] * 12]), 3)
  qkv = _qkv()
  np.testing.assert_allclose(
    attention.attend(*qkv, mask, window=3), _reference(*qkv, np.asarray(mask)), atol=1e-5
  )
  # Keys far outside are not even read.
  poisoned = [x.at[:, :2].set(jnp.nan) for x in qkv[1:]]
  out = attention.attend(qkv[0], *poisoned, mask, window=3)
  if chunk < 64:
    assert np.all(np.isfinite(out[:, 4:]))
  else:
    assert np.any(np.isnan(out))


def test_softcap_bounds_scores():
  mask = attention.make_mask(jnp.ones((B, T), jnp.int32))
  qkv = _qkv()
  got = attention.attend(*qkv, mask, cap=1.5)
  np.testing.assert_allclose(got, _reference(*qkv, np.asarray(mask), cap=1.5), atol=1e-5)
  assert np.abs(got - attention.attend(*qkv, mask)).max() > 0.1


def test_rope_scaling_is_llama_3s():
  """The published piecewise form, one wavelength at a time."""
  scaling = RopeScaling(8.0, 1.0, 4.0, 64)
  head_dim, theta, position = 16, 500.0, 50
  want = []
  for i in range(0, head_dim, 2):
    frequency = theta ** (-i / head_dim)
    wavelength = 2 * np.pi / frequency
    if wavelength > 64 / 1.0:
      frequency /= 8.0
    elif wavelength >= 64 / 4.0:
      smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
      frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
    want.append(np.sin(position * frequency))
  angles = jnp.asarray([[position]]), head_dim, theta
  got, _ = attention.rope_angles(*angles, scaling)
  np.testing.assert_allclose(got[0, 0], want, atol=1e-5)
  plain, _ = attention.rope_angles(*angles)
  assert got[0, 0, 0] == plain[0, 0, 0]  # the shortest wavelength stays
  assert np.abs(got - plain).max() > 0.1


def test_padding_gives_zero_with_finite_gradients():
  mask = attention.make_mask(jnp.zeros((B, T), jnp.int32))
  qkv = _qkv()
  assert not np.any(attention.attend(*qkv, mask))
  grads = jax.grad(lambda args: (attention.attend(*args, mask) + 1.0).sum() ** 2)(qkv)
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
    attention.attend(query, key, value, mask), attention.attend(query, *repeated, mask), atol=1e-6
  )


def test_rope_keeps_norms_and_depends_on_distance_only():
  query, key, _ = _qkv(num_kv_heads=N)
  positions = jnp.arange(T)[None].repeat(B, 0)

  def product(shift):
    angles = attention.rope_angles(positions + shift, H, 100.0)
    rotated = [attention.apply_rope(x, *angles) for x in (query, key)]
    np.testing.assert_allclose(
      jnp.linalg.norm(rotated[0], axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-5
    )
    return jnp.einsum('BTNH,BSNH->BNTS', *rotated)

  np.testing.assert_allclose(product(0), product(37), atol=1e-4)


def test_rope_rotates_by_position_times_frequency():
  x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0).at[..., 1].set(1.0)
  sin, cos = attention.rope_angles(jnp.asarray([[3]]), 4, 100.0)
  got = attention.apply_rope(x, sin, cos)[0, 0, 0]
  fast, slow = 3.0, 3.0 * 100.0**-0.5  # pairs (0, 2) and (1, 3)
  np.testing.assert_allclose(
    got, [np.cos(fast), np.cos(slow), np.sin(fast), np.sin(slow)], atol=1e-6
  )


def test_rope_angles_stay_exact_at_long_positions():
  sin, _ = attention.rope_angles(jnp.asarray([[8191]]), H, 5e5)
  assert sin.dtype == jnp.float32
  exact = np.sin(8191 * 5e5 ** (-np.arange(0, H, 2) / H))
  np.testing.assert_allclose(sin[0, 0], exact, atol=2e-3)


@pytest.mark.parametrize('window', [0, 3])
def test_prompts_that_share_nothing_have_the_mask_of_segments(window):
  segment_ids = jnp.asarray([[1] * 4 + [2] * 5 + [0] * 3])
  positions = jnp.asarray([[*range(4), *range(5), 0, 0, 0]])
  ends = jnp.asarray([[4] * 4 + [9] * 5 + [0] * 3])
  got = attention.make_shared_mask(ends, positions, window)
  np.testing.assert_array_equal(got, attention.make_mask(segment_ids, window))
  last = attention.make_shared_mask(ends, positions, window, num_queries=2)
  np.testing.assert_array_equal(last, got[:, -2:])


@pytest.mark.parametrize(('window', 'seen'), [(0, [0, 1, 5, 6]), (3, [1, 5, 6])])
def test_a_continuation_attends_to_what_it_continues(window, seen):
  # Two tokens, and behind them two continuations of three.
  ends, positions = jnp.asarray([[8, 8, 5, 5, 5, 8, 8, 8]]), jnp.asarray([[0, 1, 2, 3, 4, 2, 3, 4]])
  mask = attention.make_shared_mask(ends, positions, window)
  np.testing.assert_array_equal(np.flatnonzero(mask[0, 6]), seen)
