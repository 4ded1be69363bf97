"""Sums and means over the selected part of an array, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """Returns the float32 sum of x * mask (bool or weight); x may be NaN where mask is 0."""
  x, mask = jnp.broadcast_arrays(x.astype(_dtype(x)), mask)
  # Not x * mask alone: NaN * 0 is NaN, in the sum and in its gradient.
  kept = jnp.where(mask != 0, x, 0.0)
  return jnp.sum(kept * mask.astype(x.dtype), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """Returns the float32 mean of x weighted by mask, and 0 where mask is all 0.

  So a row without tokens adds nothing to a loss. Do not use it where an empty selection is an
  error.
  """
  x, mask = jnp.broadcast_arrays(x.astype(_dtype(x)), mask)
  weight = jnp.sum(mask.astype(x.dtype), axis=axis)
  total = masked_sum(x, mask, axis)
  # The inner where keeps 0 / 0 out of the gradient as well.
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def _dtype(x: jax.Array) -> jnp.dtype:
  # float64 stays float64, so that tests with jax_enable_x64 can compare with exact references.
  return jnp.promote_types(x.dtype, jnp.float32)
