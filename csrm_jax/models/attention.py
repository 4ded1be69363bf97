"""Rotary positions, and attention: causal, within segments, on any device.

Axes are those of transformer.py: B rows, T query length, S key length, N query heads, K kv heads,
G = N/K, H head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models.config import ModelConfig, RopeScaling

# Below every real score, yet finite: for a row whose scores are all -inf, -inf - -inf is NaN.
MASKED = -1e30
# Rows of queries in a chunk, and chunks of a row, tuned on CPU: shorter chunks skip more of what is
# masked, but their products are too small to be fast.
MIN_CHUNK = 128
MAX_CHUNKS = 8
# Rows of queries and keys that a TPU core holds at once, best first; wider heads leave room for
# fewer.
SPLASH_BLOCKS = (1024, 512, 256, 128)
SPLASH_BLOCK_SIZE = 1024 * 128
# A TPU's vector unit has so many lanes: rows and heads are padded to a multiple of them.
LANES = 128
# The widest head that cuDNN's kernel takes, and of what its size must be a multiple.
CUDNN_HEAD_DIM = 128
CUDNN_HEAD_STEP = 8
# Rows are padded to a multiple of it: cuDNN has no gradient where they are odd.
CUDNN_STEP = 8

# An accelerator's kernel computes what attend does from a scaled query [B,T,N,H], key and value
# [B,T,K,H] and segment_ids [B,T], without [T,S] scores in memory. Where prompts share tokens it
# also takes the mask [B,T,T], in place of causality and window. cuDNN's takes key and value
# [B,S,K,H] with a mask [B,T,S] too.
Kernel = Callable[..., jax.Array]


def rope_angles(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos), float32 [B,T,H/2], of the rotation at each position.

  The angle of pair i is position * theta^(-2i/H). The positions, int32 [B,T], count from 0 within
  each segment. Scaling stretches the long wavelengths.

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

  Source: Llama 3.1's reference code, apply_scaling.
  """
  # What turns less than low_freq_factor times within the original context is divided by factor,
  # what turns more than high_freq_factor times is kept; between them the kept share grows linearly.
  turns = scaling.original_length * frequency / (2 * math.pi)
  kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  kept = jnp.clip(kept, 0.0, 1.0)
  return frequency * (kept + (1 - kept) / scaling.factor)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Returns x [B,T,N,H] rotated; pairs are (i, i + H/2), as in Hugging Face's Llama."""
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
  """Returns bool [B,T,S]: whether query t may attend to key s.

  It may where both lie in the same segment and s is not after t and, given a window, less than
  `window` before t. Segment 0 is padding: it attends to nothing and nothing attends to it.

  The queries are segment_ids, int32 [B,T]. Without key_segment_ids, int32 [B,S], they are the keys
  too; with them, the first query has the place `start` among the keys.
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


def make_shared_mask(
  ends: jax.Array, positions: jax.Array, window: int = 0, num_queries: int = 0
) -> jax.Array:
  """Returns bool [B,T,S]: what make_mask does, where prompts share their first tokens.

  Query t may attend to key s where s <= t < ends[s], both places in the row, and, given a window,
  their positions are less than `window` apart. In the row each prompt continues one before it, or
  begins a tree of its own; ends, int32 [B,S], are the places behind the last token that continues
  a token, 0 for padding.

  The queries are the last num_queries places, by default all.

  Source: FlashMask (arXiv 2410.01359), the causal form with one bound for each key.
  """
  S = ends.shape[1]
  first = S - num_queries if num_queries else 0
  key_place = jnp.arange(S)
  query_place = key_place[first:, None]
  mask = (query_place >= key_place) & (query_place < ends[:, None, :])
  if window:
    # Not the distance of places: other continuations may lie between.
    mask &= positions[:, first:, None] - positions[:, None, :] < window
  return mask


def make_cached_mask(positions: jax.Array, key_positions: jax.Array, window: int = 0) -> jax.Array:
  """Returns what make_mask does, for positions int32 [B,T] of queries and [B,S] of a cache's keys.

  They are of one segment, in any order.
  """
  distance = positions[:, :, None] - key_positions[:, None, :]
  near = distance >= 0
  return near & (distance < window) if window else near


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
  """Returns softmax(query·key)·value, [B,T,N,H]; zero where a query may attend to nothing.

  Args:
    query: [B,T,N,H], already scaled; the queries are the last T of the S places.
    key: [B,S,K,H], as is the value; query head n reads kv head n // G.
    mask: bool [B,T,S]; it must be causal.
    cap: Limits the scores as softcap does.
    window: Promises that the mask hides keys `window` or more before their query. 0 promises
      nothing.
  """
  # Queries go in chunks, each against the keys from its window to its own end: most of the products
  # that the mask hides are never computed, nor are [T,S] scores held at once.
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
  """Returns what attend does, for a few queries and a cache's key [B,K,H,S] and value [B,K,S,H]."""
  # These lie as the products want them: no token has to transpose the cache.
  B, T, N, H = query.shape
  K = key.shape[1]
  query = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  bias = jnp.where(mask, 0.0, -jnp.inf)[:, None, None]  # [B,1,1,T,S]
  out = _attend_chunk(query, key, value, bias, cap)  # [B,K,G,T,H]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_chunk(query, key, value, bias, cap):
  """Returns [B,K,G,T,H], given query [B,K,G,T,H], key [B,K,H,S], value [B,K,S,H], bias float32."""
  B, K, G, T, H = query.shape
  # The queries of a group share their keys: one product [G·T,H]·[H,S].
  scores = jnp.einsum(
    'BKQH,BKHS->BKQS', query.reshape(B, K, G * T, H), key, preferred_element_type=jnp.float32
  )
  scores = softcap(scores.reshape(B, K, G, T, -1), cap) + bias
  # A query that may attend to nothing has a maximum of -inf.
  highest = jnp.maximum(scores.max(-1, keepdims=True), MASKED)
  # The shift cancels below, and needs no gradient. The output [T,H] is normalised in place of the
  # probabilities [T,S], which are more.
  probs = jnp.exp(scores - jax.lax.stop_gradient(highest))
  norm = probs.sum(-1, keepdims=True)
  out = jnp.einsum(
    'BKQS,BKSH->BKQH',
    probs.reshape(B, K, G * T, -1).astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  ).reshape(B, K, G, T, H)
  return (out / jnp.where(norm > 0, norm, 1)).astype(value.dtype)


def make_splash(window: int = 0, cap: float = 0.0, interpret: bool = False) -> Kernel:
  """Returns splash attention, a Pallas kernel for TPUs; `interpret` runs it anywhere, for tests."""

  def attend(query, key, value, segment_ids, mask=None):
    T, H = query.shape[1], query.shape[3]
    pads = [(0, 0), (0, -T % LANES), (0, 0), (0, -H % LANES)]
    query, key, value = (jnp.pad(x, pads) for x in (query, key, value))
    if mask is None:
      seen = jnp.pad(segment_ids, pads[:2])
    else:
      seen = jnp.pad(mask, [(0, 0), pads[1], pads[1]])
    out = _splash_padded(query, key, value, seen, window, cap, interpret)
    # The kernel lets padding attend to padding.
    return jnp.where((segment_ids > 0)[..., None, None], out[:, :T, :, :H], 0)

  return attend


def _splash_padded(query, key, value, seen, window, cap, interpret):
  """Returns [B,T,N,H]; of several devices, each computes its own rows and heads.

  `seen` is segment_ids [B,T] or a mask [B,T,T].
  """
  # Pallas for TPUs takes a second to import: only runs that need it wait.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  def local(query, key, value, seen):
    heads_first = [x.swapaxes(1, 2) for x in (query, key, value)]
    T, N, H = query.shape[1:]
    block = next(b for b in SPLASH_BLOCKS if T % b == 0 and b * H <= SPLASH_BLOCK_SIZE)
    sizes = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
    make = functools.partial(
      splash.make_splash_mha,
      block_sizes=splash.BlockSizes(**dict.fromkeys(sizes, block)),
      attn_logits_soft_cap=cap or None,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    if seen.ndim == 3:
      # One mask for all heads of a row; blocks in which it hides everything are skipped.
      def run(query, key, value, mask):
        kernel = make(mask[None])
        # The library makes an array of this flag and then asks it, which tracing does not allow.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(query, key, value)

      return jax.vmap(run)(*heads_first, seen).swapaxes(1, 2)
    mask = splash.CausalMask((T, T))
    if window:
      mask = splash.LocalMask((T, T), (window - 1, 0), 0)
    run = make(splash.MultiHeadMask([mask] * N))
    return jax.vmap(run)(*heads_first, splash.SegmentIds(seen, seen)).swapaxes(1, 2)

  mesh = mesh_lib.current()
  if mesh is None:
    return local(query, key, value, seen)
  # The compiler cannot cut a kernel, so it is cut by hand. Heads are cut only where those of keys
  # can be: a query head must find its kv head on the same device.
  heads = mesh_lib.fit(P(mesh_lib.ROWS, None, 'tensor'), key.shape, mesh)
  rows = P(heads[0])
  return jax.shard_map(
    local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
  )(query, key, value, seen)


def make_cudnn(window: int = 0, cap: float = 0.0, implementation: str = 'cudnn') -> Kernel:
  """Returns cuDNN's flash attention for GPUs; 'xla' computes the same anywhere, for tests."""
  assert not cap  # cuDNN has no soft cap.

  def attend(query, key, value, segment_ids, mask=None):
    # The scores are never in memory, but the mask [B,T,S] is.
    if mask is None:
      mask = make_mask(segment_ids, window)
    _, T, S = mask.shape
    rows, keys = (0, -T % CUDNN_STEP), (0, -S % CUDNN_STEP)
    query = jnp.pad(query, [(0, 0), rows, (0, 0), (0, 0)])
    key, value = (jnp.pad(x, [(0, 0), keys, (0, 0), (0, 0)]) for x in (key, value))
    mask = jnp.pad(mask, [(0, 0), rows, keys])
    out = jax.nn.dot_product_attention(
      query, key, value, scale=1.0, implementation=implementation, mask=mask[:, None]
    )
    # Where a query may attend to nothing, cuDNN returns an average.
    return jnp.where((segment_ids > 0)[..., None, None], out[:, :T], 0)

  return attend


def make_kernel(cfg: ModelConfig, has_prefix: bool = False) -> Kernel | None:
  """Returns the platform's kernel for the layers of a model, or None where attend is to be used.

  It takes (query, key, value, segment_ids, has_window[, mask]); has_window is a traced bool where
  layers differ, else None. has_prefix says that there are more keys than queries, and a mask.
  """
  # The platform of the mesh that is set, not of this machine: the programs of a pod are compiled
  # without the pod.
  platform = mesh_lib.platform()
  if cfg.attention == 'xla':
    return None
  if platform == 'tpu' and not has_prefix:
    make = make_splash
  elif (
    platform in ('gpu', 'cuda')
    and cfg.dtype == 'bfloat16'
    and cfg.head_dim <= CUDNN_HEAD_DIM
    and cfg.head_dim % CUDNN_HEAD_STEP == 0
    and not cfg.attention_softcap
  ):
    make = make_cudnn
  elif cfg.attention == 'kernel' and not has_prefix:
    raise ValueError(
      f'attention=kernel: on {platform} there is none for this model (TPUs have one; GPUs have one '
      f'for bfloat16, heads of up to {CUDNN_HEAD_DIM} and no soft cap); set attention=auto'
    )
  else:
    return None
  local = make(cfg.sliding_window, cap=cfg.attention_softcap)
  # The scan over layers runs one program for all of them, so it holds both kernels.
  whole = make(0, cap=cfg.attention_softcap)
  alike = not cfg.sliding_window or cfg.window_period == 1

  def attend(query, key, value, segment_ids, has_window, mask=None):
    heads = query, key, value, segment_ids
    if alike or mask is not None:
      return local(*heads, mask)
    return jax.lax.cond(has_window, local, whole, *heads)

  return attend
