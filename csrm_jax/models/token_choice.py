"""One token of the next, out of a row of logits.

Axes: B rows, V vocab.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# A row's probabilities are added up in blocks of this many.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen; hashable, compiled once for each value.

  Attributes:
    max_completion_length: the most tokens of a completion.
    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: only the k likeliest tokens are drawn, and ties with the last of
      them; 0 for all.
    top_p: of these, only the likeliest tokens that together reach this
      probability, and ties with the last of them.
    stop_ids: a completion ends with the first of these, which belongs to it.
  """

  max_completion_length: int = 512
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if self.max_completion_length < 1:
      raise ValueError(f'max_completion_length={self.max_completion_length} must be at least 1.')
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be at least 0 and finite.')
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must be at least 0 (0 is all).')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must lie in (0, 1].')
    if not self.temperature and (self.top_k or self.top_p < 1):
      raise ValueError(
        f'top_k={self.top_k} and top_p={self.top_p} do nothing at '
        'temperature=0; leave them out or raise the temperature.'
      )


def choose_tokens(logits: jax.Array, uniform: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns a token id for each row, int32 [B].

  Inverts the cumulative distribution: one random number a row instead of one a
  logit, and no sorting.

  Args:
    logits: float32 [B,V].
    uniform: float32 [B] in [0, 1).
    sampling: its temperature, top_k and top_p.
  """
  highest = logits.max(-1, keepdims=True)
  if not sampling.temperature:
    return _first(logits == highest)
  probs = jnp.exp((logits - highest) / sampling.temperature)  # not normalised
  if 0 < sampling.top_k < logits.shape[-1]:
    ones = jnp.ones_like(probs)
    probs = _keep_highest(probs, ones, jnp.float32(sampling.top_k))
  if sampling.top_p < 1:
    total = probs.sum(-1, keepdims=True)
    probs = _keep_highest(probs, probs, sampling.top_p * total)
  return _invert(probs, uniform)


def _first(hits: jax.Array) -> jax.Array:
  """Returns the first True of each row of [B,V]; argmax is slow on CPU."""
  ids = jnp.arange(hits.shape[-1], dtype=jnp.int32)
  # A row without any has a NaN; its last id keeps the log-prob NaN as well.
  return jnp.where(hits, ids, hits.shape[-1] - 1).min(-1)


def _keep_highest(probs: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
  """Returns probs, 0 but for the highest whose weights reach the target.

  Finds the largest threshold for which Σ weights[probs >= threshold] is at
  least the target, by bisection over the bits of a float, which are ordered as
  the numbers are. 31 passes over [B,V] instead of a sort.

  Args:
    probs: float32 [B,V] in [0, 1].
    weights: float32 [B,V], not negative.
    target: float32 [B,1] or [].
  """

  def as_float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    mass = jnp.where(probs >= as_float(middle), weights, 0.0)
    enough = mass.sum(-1, keepdims=True) >= target
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low = jnp.zeros((probs.shape[0], 1), jnp.int32)
  one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, one + 1)))
  return jnp.where(probs >= as_float(low), probs, 0.0)


def _invert(probs: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns ids drawn with probabilities proportional to probs [B,V].

  Two levels, blocks and within the block, because a cumulative sum over a
  whole vocabulary is slow and less exact.
  """
  B, V = probs.shape
  blocks = jnp.pad(probs, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)

  def find(weights, goal):
    """Returns (place where the sum of weights [B,n] exceeds goal, rest)."""
    ends = jnp.cumsum(weights, axis=-1)
    # Rounding may put the goal at the very end, where no weight is left.
    goal = jnp.minimum(goal, ends[:, -1] * (1 - 2.0**-23))
    place = _first(ends > goal[:, None])
    start = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (1, 0))), place[:, None], axis=1)[:, 0]
    return place, goal - start

  sums = blocks.sum(-1)
  block, rest = find(sums, uniform * sums.sum(-1))
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return jnp.minimum(block * _BLOCK + find(inside, rest)[0], V - 1)


def token_logprobs(logits: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
  """Returns log softmax(logits / temperature) at tokens, float32 [...], nats.

  Over the whole vocabulary, whatever top-k and top-p left out when the token
  was drawn. Temperature 0, which has no distribution, counts as 1.

  Args:
    logits: [...,V].
    tokens: int32 [...].
    temperature: static.
  """
  logits = logits.astype(jnp.float32) / (temperature or 1.0)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
