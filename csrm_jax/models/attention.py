"""Rotary positions and segment-aware causal attention.

Axes as in transformer.py: B rows, T query length, S key length, N query heads,
K kv heads, G = N/K, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from csrm_jax.models.config import RopeScaling

# Below every real score, yet finite.
MASKED = -1e30
# Tuned on CPU: shorter chunks skip more, but make products too small.
MIN_CHUNK = 128
MAX_CHUNKS = 8


def rope_angles(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos), float32 [B,T,H/2], of the rotation at each position.

  Args:
    positions: int32 [B,T], counted from 0 within each segment.
    head_dim: H.
    theta: base of the wavelengths; angle = position * theta^(-2i/H).
    scaling: stretches the long wavelengths; None leaves all as they are.

  Source: Su et al. 2021, RoFormer, eq. 34.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = jnp.float32(theta) ** -exponent
  if scaling is not None:
    frequency = _scale_frequency(frequency, scaling)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.sin(angle), jnp.cos(angle)


def _scale_frequency(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
  """Returns the frequencies [H/2] after Llama 3's scaling.

  A frequency that turns less than low_freq_factor times within the original
  context is divided by factor, one that turns more than high_freq_factor times
  is kept, and between the two the share that is kept grows linearly.

  Source: Llama 3.1's reference code, apply_scaling.
  """
  turns = scaling.original_length * frequency / (2 * math.pi)
  kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  kept = jnp.clip(kept, 0.0, 1.0)
  return frequency * (kept + (1 - kept) / scaling.factor)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Returns x [B,T,N,H] rotated; pairs are (i, i + H/2), as in HF Llama."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def make_mask(
  segment_ids: jax.Array,
  window: int = 0,
  key_segment_ids: jax.Array | None = None,
  start: jax.Array | int = 0,
) -> jax.Array:
  """Returns bool [B,T,S]: may query t attend to key s.

  True where both lie in the same segment and s is not after t, nor, given a
  window, `window` or more before t. Segment 0 is padding: it attends to nothing
  and nothing attends to it.

  Args:
    segment_ids: int32 [B,T], of the queries.
    window: 0 for none.
    key_segment_ids: int32 [B,S]; by default the queries' own.
    start: place of the first query among the keys.
  """
  if key_segment_ids is None:
    key_segment_ids = segment_ids
  query_place = start + jnp.arange(segment_ids.shape[1])
  distance = query_place[:, None] - jnp.arange(key_segment_ids.shape[1])
  near = distance >= 0
  if window:
    near &= distance < window
  same = segment_ids[:, :, None] == key_segment_ids[:, None, :]
  return same & near & (segment_ids > 0)[:, :, None]


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """Returns cap·tanh(x/cap), or x itself where cap is 0.

  Source: Gemma 2 (arXiv 2408.00118), §2.
  """
  return cap * jnp.tanh(x / cap) if cap else x


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  cap: float = 0.0,
  window: int = 0,
) -> jax.Array:
  """Returns softmax(query·key)·value, [B,T,N,H], zero where mask is empty.

  Queries go in chunks, each against the keys up to its own end: the products
  above the diagonal are never computed, nor are [T,S] scores held at once.

  Args:
    query: [B,T,N,H], scaled already; the last T of the S places.
    key: [B,S,K,H]; query head n reads kv head n // G.
    value: [B,S,K,H].
    mask: bool [B,T,S], causal.
    cap: of softcap on the scores.
    window: promises that mask hides keys `window` or more before their query;
      products that lie wholly outside are left out. 0 promises nothing.
  """
  B, T, N, H = query.shape
  K = key.shape[2]
  G = N // K
  before = key.shape[1] - T
  query = query.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  key = key.transpose(0, 2, 3, 1)  # [B,K,H,S]
  value = value.transpose(0, 2, 1, 3)  # [B,K,S,H]
  bias = jnp.where(mask, 0.0, -jnp.inf)[:, None, None]  # [B,1,1,T,S]
  chunk = max(MIN_CHUNK, -(-T // MAX_CHUNKS))
  out = []
  for start in range(0, T, chunk):
    rows = slice(start, min(start + chunk, T))
    seen = slice(max(0, before + start - window + 1) if window else 0, before + rows.stop)
    out.append(
      _attend_chunk(
        query[:, :, :, rows], key[..., seen], value[:, :, seen], bias[..., rows, seen], cap
      )
    )
  out = jnp.concatenate(out, axis=3)  # [B,K,G,T,H]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_cached(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, cap: float = 0.0
) -> jax.Array:
  """Returns what attend does, for few queries and a cache's layout.

  Args:
    query: [B,T,N,H], scaled already; T is small.
    key: [B,K,H,S], as the product with a query wants it.
    value: [B,K,S,H].
    mask: bool [B,T,S].
    cap: of softcap on the scores.
  """
  B, T, N, H = query.shape
  K = key.shape[1]
  query = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  bias = jnp.where(mask, 0.0, -jnp.inf)[:, None, None]  # [B,1,1,T,S]
  out = _attend_chunk(query, key, value, bias, cap)  # [B,K,G,T,H]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_chunk(query, key, value, bias, cap):
  """Returns [B,K,G,T,H] for query [B,K,G,T,H], key [B,K,H,S], bias float32."""
  B, K, G, T, H = query.shape
  # The queries of a group share their keys: one product [G·T,H]·[H,S].
  scores = jnp.einsum(
    'BKQH,BKHS->BKQS', query.reshape(B, K, G * T, H), key, preferred_element_type=jnp.float32
  )
  scores = softcap(scores.reshape(B, K, G, T, -1), cap) + bias
  # A query that may attend to nothing has a maximum of -inf.
  highest = jnp.maximum(scores.max(-1, keepdims=True), MASKED)
  probs = jnp.exp(scores - jax.lax.stop_gradient(highest))  # not normalised
  norm = probs.sum(-1, keepdims=True)
  out = jnp.einsum(
    'BKQS,BKSH->BKQH',
    probs.reshape(B, K, G * T, -1).astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  ).reshape(B, K, G, T, H)
  return (out / jnp.where(norm > 0, norm, 1)).astype(value.dtype)
