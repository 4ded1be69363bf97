"""One layer of the decoder.

Axes as in transformer.py.

Everything but attention sees the residual stream as [R,D]: on CPU the gradient
of a kernel is twice as fast when it contracts one axis instead of two.
"""

from __future__ import annotations

import functools

from flax import nnx

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import attention as attention_lib
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.layers import MLP, Dense, RMSNorm


class Attention(nnx.Module):
  """Grouped-query self-attention with rotary positions."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.cfg = cfg
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    make = functools.partial(Dense, cfg, rngs=rngs)
    self.query = make('query', (D,), (N, H), std=D**-0.5)
    self.key = make('key', (D,), (K, H), std=D**-0.5)
    self.value = make('value', (D,), (K, H), std=D**-0.5)
    if cfg.match_init:
      query = self.query.kernel[...]
      self.query.kernel[...] = query.at[:, :: N // K].set(self.key.kernel[...])
    # Residual writes shrink with depth, so that the stream keeps its scale.
    std = (N * H * 2 * cfg.num_layers) ** -0.5
    self.out = make('out', (N, H), (D,), std=std)
    if cfg.qk_norm:
      self.query_norm, self.key_norm = RMSNorm(cfg, H), RMSNorm(cfg, H)

  def __call__(self, x, sin, cos, attend):
    """Returns (what is added to x [R,D], what attend keeps).

    attend takes query [B,T,N,H], key and value [B,T,K,H] and returns the heads'
    output [B,T,N,H] and anything else.
    """
    out, kept = attend(*self._project(x, sin, cos))
    return self.out(out.reshape(-1, *out.shape[2:])), kept

  def _project(self, x, sin, cos):
    """Returns scaled query [B,T,N,H], key and value [B,T,K,H] of x [R,D]."""
    query, key, value = (
      mesh_lib.constrain(
        heads.reshape(*sin.shape[:2], *heads.shape[1:]), mesh_lib.ROWS, None, 'tensor'
      )
      for heads in (self.query(x), self.key(x), self.value(x))
    )
    if self.cfg.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    # The scale rides on the angles: in float32, and at no cost.
    scale = (self.cfg.query_scale or self.cfg.head_dim) ** -0.5
    query = attention_lib.apply_rope(query, scale * sin, scale * cos)
    return query, attention_lib.apply_rope(key, sin, cos), value


class Block(nnx.Module):
  """One pre-norm decoder layer; Gemma 2 also norms what it adds."""

  def __init__(self, cfg: ModelConfig, rngs):
    D = cfg.embed_dim
    self.post_norms = cfg.post_norms
    self.attention_norm = RMSNorm(cfg, D)
    self.attention = Attention(cfg, rngs)
    self.mlp_norm = RMSNorm(cfg, D)
    self.mlp = MLP(cfg, rngs)
    if cfg.post_norms:
      self.attention_post_norm = RMSNorm(cfg, D)
      self.mlp_post_norm = RMSNorm(cfg, D)

  def __call__(self, x, sin, cos, attend):
    x = mesh_lib.constrain(x, mesh_lib.ROWS)
    out, kept = self.attention(self.attention_norm(x), sin, cos, attend)
    x += self.attention_post_norm(out) if self.post_norms else out
    out = self.mlp(self.mlp_norm(x))
    return x + (self.mlp_post_norm(out) if self.post_norms else out), kept
