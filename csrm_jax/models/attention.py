"""Rotary positions and segment-aware causal attention.

Axes as in transformer.py: B rows, T query length, S key length, N query heads,
K kv heads, G = N/K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Below every real score, yet finite.
MASKED = -1e30
# Tuned on CPU: shorter chunks skip more, but make products too small.
MIN_CHUNK = 128
MAX_CHUNKS = 8


def rope_angles(
    positions: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos), float32 [B,T,H/2], of the rotation at each position.

  Args:
    positions: int32 [B,T], counted from 0 within each segment.
    head_dim: H.
    theta: base of the wavelengths; angle = position * theta^(-2i/H).

  Source: Su et al. 2021, RoFormer, eq. 34.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = jnp.float32(theta) ** -exponent
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.sin(angle), jnp.cos(angle)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Returns x [B,T,N,H] rotated; pairs are (i, i + H/2), as in HF Llama."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def make_mask(segment_ids: jax.Array) -> jax.Array:
  """Returns bool [B,T,S]: may query t attend to key s.

  True where both lie in the same segment and s is not after t. Segment 0 is
  padding: it attends to nothing and nothing attends to it.
  """
  length = segment_ids.shape[-1]
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return same & causal & (segment_ids > 0)[:, :, None]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
  """Returns softmax(query·key/√H)·value, [B,T,N,H], zero where mask is empty.

  Queries go in chunks, each against the keys up to its own end: the products
  above the diagonal are never computed, nor are [T,S] scores held at once.

  Args:
    query: [B,T,N,H].
    key: [B,T,K,H]; query head n reads kv head n // G.
    value: [B,T,K,H].
    mask: bool [B,T,S], causal, with S = T.
  """
  B, T, N, H = query.shape
  K = key.shape[2]
  G = N // K
  query = (query * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  key = key.transpose(0, 2, 3, 1)  # [B,K,H,S]
  value = value.transpose(0, 2, 1, 3)  # [B,K,S,H]
  bias = jnp.where(mask, 0.0, -jnp.inf)[:, None, None]  # [B,1,1,T,S]
  chunk = max(MIN_CHUNK, -(-T // MAX_CHUNKS))
  out = []
  for start in range(0, T, chunk):
    rows, end = slice(start, start + chunk), min(start + chunk, T)
    out.append(_attend_chunk(
        query[:, :, :, rows], key[..., :end], value[:, :, :end],
        bias[..., rows, :end]))
  out = jnp.concatenate(out, axis=3)  # [B,K,G,T,H]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_chunk(query, key, value, bias):
  """Returns [B,K,G,T,H] for query [B,K,G,T,H], key [B,K,H,S], bias float32."""
  B, K, G, T, H = query.shape
  # The queries of a group share their keys: one product [G·T,H]·[H,S].
  scores = jnp.einsum(
      'BKQH,BKHS->BKQS', query.reshape(B, K, G * T, H), key,
      preferred_element_type=jnp.float32)
  scores = scores.reshape(B, K, G, T, -1) + bias
  # A query that may attend to nothing has a maximum of -inf.
  highest = jnp.maximum(scores.max(-1, keepdims=True), MASKED)
  probs = jnp.exp(scores - jax.lax.stop_gradient(highest))  # not normalised
  norm = probs.sum(-1, keepdims=True)
  out = jnp.einsum(
      'BKQS,BKSH->BKQH', probs.reshape(B, K, G * T, -1).astype(value.dtype),
      value, preferred_element_type=jnp.float32).reshape(B, K, G, T, H)
  return (out / jnp.where(norm > 0, norm, 1)).astype(value.dtype)
