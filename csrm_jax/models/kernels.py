"""Attention kernels of accelerators; attention.attend is what they compute.

Axes as in transformer.py. A kernel takes query [B,T,N,H] (scaled), key and
value [B,T,K,H] and segment_ids [B,T], and returns [B,T,N,H]: causal, within
segments, zero at padding (segment 0). The scores [T,S] are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import attention
from csrm_jax.models.config import ModelConfig

# Rows of queries and keys that a TPU core holds at once, best first; wider
# heads leave room for fewer.
SPLASH_BLOCKS = (1024, 512, 256, 128)
SPLASH_BLOCK_SIZE = 1024 * 128
# Of the TPU's vector unit: what rows and heads are padded to.
LANES = 128
# cuDNN's largest head.
CUDNN_HEAD_DIM = 128

# (query, key, value, segment_ids) -> out
Kernel = Callable[..., jax.Array]


def make_splash(window: int = 0, cap: float = 0.0, interpret: bool = False) -> Kernel:
  """Returns splash attention, a Pallas kernel for TPUs.

  Args:
    window: as in attention.make_mask; 0 for none.
    cap: of attention.softcap; 0 for none.
    interpret: run the kernel's program anywhere, slowly: for tests.
  """

  def attend(query, key, value, segment_ids):
    T, H = query.shape[1], query.shape[3]
    pads = [(0, 0), (0, -T % LANES), (0, 0), (0, -H % LANES)]
    query, key, value = (jnp.pad(x, pads) for x in (query, key, value))
    ids = jnp.pad(segment_ids, pads[:2])
    out = _splash_padded(query, key, value, ids, window, cap, interpret)
    # The kernel lets padding attend to padding.
    return jnp.where((segment_ids > 0)[..., None, None], out[:, :T, :, :H], 0)

  return attend


def _splash_padded(query, key, value, segment_ids, window, cap, interpret):
  """Returns [B,T,N,H]; on several devices each its own rows and heads."""
  # Pallas for TPUs takes a second to import: only those who need it wait.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  def local(query, key, value, segment_ids):
    heads_first = [x.swapaxes(1, 2) for x in (query, key, value)]
    T, N, H = query.shape[1:]
    block = next(b for b in SPLASH_BLOCKS if T % b == 0 and b * H <= SPLASH_BLOCK_SIZE)
    mask = splash.CausalMask((T, T))
    if window:
      mask = splash.LocalMask((T, T), (window - 1, 0), 0)
    run = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * N),
      block_sizes=splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
      ),
      attn_logits_soft_cap=cap or None,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    ids = splash.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(run)(*heads_first, ids).swapaxes(1, 2)

  mesh = mesh_lib.current()
  if mesh is None:
    return local(query, key, value, segment_ids)
  # The compiler cannot cut a kernel. Heads are cut only where those of keys
  # can be: a query head has to find its own.
  heads = mesh_lib.fit(P(mesh_lib.ROWS, None, 'tensor'), key.shape, mesh)
  rows = P(heads[0])
  return jax.shard_map(
    local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
  )(query, key, value, segment_ids)


def make_cudnn(window: int = 0, cap: float = 0.0, implementation: str = 'cudnn') -> Kernel:
  """Returns cuDNN's flash attention for GPUs; its mask [B,T,S] is in memory.

  Args:
    window: as in attention.make_mask; 0 for none.
    cap: 0: it has no soft cap.
    implementation: 'xla' computes the same anywhere: for tests.
  """
  assert not cap

  def attend(query, key, value, segment_ids):
    out = jax.nn.dot_product_attention(
      query,
      key,
      value,
      scale=1.0,
      implementation=implementation,
      mask=attention.make_mask(segment_ids, window)[:, None],
    )
    # Where a query may attend to nothing, cuDNN gives an average.
    return jnp.where((segment_ids > 0)[..., None, None], out, 0)

  return attend


def make_kernel(cfg: ModelConfig) -> Callable[..., jax.Array] | None:
  """Returns the kernel of the platform for a model's layers, or None.

  It takes (query, key, value, segment_ids, has_window); has_window is a
  traced bool where layers differ, else None. The platform is that of the mesh
  that jax.set_mesh has set, which need not be there: the programs of a pod are
  compiled without one. None stands for attention.attend.
  """
  platform = mesh_lib.platform()
  if platform == 'tpu':
    make = make_splash
  elif (
    platform in ('gpu', 'cuda')
    and cfg.dtype == 'bfloat16'
    and cfg.head_dim <= CUDNN_HEAD_DIM
    and not cfg.attention_softcap
  ):
    make = make_cudnn
  else:
    return None
  local = make(cfg.sliding_window, cap=cfg.attention_softcap)
  if not cfg.sliding_window or cfg.window_period == 1:
    return lambda *args: local(*args[:-1])
  whole = make(0, cap=cfg.attention_softcap)
  return lambda *args: jax.lax.cond(args[-1], local, whole, *args[:-1])
