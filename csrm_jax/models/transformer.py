"""A Llama-style decoder in Flax NNX, used through plain nested dicts.

Axes: B rows, T query length, S key length, D embed, F mlp, N query heads,
K kv heads, G = N/K, H head dim, V vocab, L layers; R = B·T.

Everything but attention sees the residual stream as [R,D]: on CPU the gradient
of a kernel is twice as fast when it contracts one axis instead of two.

Flax stays inside this module: callers hold a ModelConfig and a nested dict of
arrays, so that sharding rules, masks, checkpoints and LoRA see plain names
such as 'layers/attention/query/kernel'. The layers are stacked along a leading
axis L and run by one lax.scan.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from csrm_jax.models import attention as attention_lib
from csrm_jax.models.config import ModelConfig


class Dense(nnx.Module):
  """A product with one kernel, without bias."""

  def __init__(self, equation, shape, cfg: ModelConfig, *, std, rngs):
    self.equation = equation
    self.dtype = cfg.dtype
    self.kernel = nnx.Param(
        std * jax.random.normal(rngs.params(), shape, cfg.param_dtype))

  def __call__(self, x):
    return jnp.einsum(self.equation, x, self.kernel[...].astype(self.dtype))


class RMSNorm(nnx.Module):
  """x over its root mean square, times a learned scale; float32 statistics.

  Source: Zhang & Sennrich 2019, eq. 4.
  """

  def __init__(self, cfg: ModelConfig):
    self.eps = cfg.norm_eps
    self.scale = nnx.Param(jnp.ones(cfg.embed_dim, cfg.param_dtype))

  def __call__(self, x):
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.eps)
    return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query self-attention with rotary positions."""

  def __init__(self, cfg: ModelConfig, rngs):
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    std = D**-0.5
    self.query = Dense('RD,DNH->RNH', (D, N, H), cfg, std=std, rngs=rngs)
    self.key = Dense('RD,DKH->RKH', (D, K, H), cfg, std=std, rngs=rngs)
    self.value = Dense('RD,DKH->RKH', (D, K, H), cfg, std=std, rngs=rngs)
    if cfg.match_init:
      query = self.query.kernel[...]
      self.query.kernel[...] = query.at[:, ::N // K].set(self.key.kernel[...])
    # Residual writes shrink with depth, so that the stream keeps its scale.
    std = (N * H * 2 * cfg.num_layers) ** -0.5
    self.out = Dense('RNH,NHD->RD', (N, H, D), cfg, std=std, rngs=rngs)

  def __call__(self, x, sin, cos, mask):
    def by_row(heads):  # [R,N,H] -> [B,T,N,H]
      return heads.reshape(*mask.shape[:2], *heads.shape[1:])

    query = attention_lib.apply_rope(by_row(self.query(x)), sin, cos)
    key = attention_lib.apply_rope(by_row(self.key(x)), sin, cos)
    value = by_row(self.value(x))
    out = attention_lib.attend(query, key, value, mask)  # [B,T,N,H]
    return self.out(out.reshape(-1, *out.shape[2:]))


class MLP(nnx.Module):
  """SwiGLU. Source: Shazeer 2020, eq. 6."""

  def __init__(self, cfg: ModelConfig, rngs):
    D, F = cfg.embed_dim, cfg.mlp_dim
    self.gate = Dense('RD,DF->RF', (D, F), cfg, std=D**-0.5, rngs=rngs)
    self.up = Dense('RD,DF->RF', (D, F), cfg, std=D**-0.5, rngs=rngs)
    std = (F * 2 * cfg.num_layers) ** -0.5
    self.down = Dense('RF,FD->RD', (F, D), cfg, std=std, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """One pre-norm decoder layer."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.attention_norm = RMSNorm(cfg)
    self.attention = Attention(cfg, rngs)
    self.mlp_norm = RMSNorm(cfg)
    self.mlp = MLP(cfg, rngs)

  def __call__(self, x, sin, cos, mask):
    x = x + self.attention(self.attention_norm(x), sin, cos, mask)
    return x + self.mlp(self.mlp_norm(x))


class Embed(nnx.Module):
  """The token embedding [V,D]."""

  def __init__(self, cfg: ModelConfig, rngs):
    shape = (cfg.vocab_size, cfg.embed_dim)
    self.embedding = nnx.Param(
        cfg.embed_dim**-0.5
        * jax.random.normal(rngs.params(), shape, cfg.param_dtype))


class Transformer(nnx.Module):
  """Embedding, L stacked blocks, final norm and output layer."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.cfg = cfg
    self.embed = Embed(cfg, rngs)
    make_block = nnx.vmap(
        lambda key: Block(cfg, nnx.Rngs(params=key)), in_axes=0, out_axes=0)
    self.layers = make_block(jax.random.split(rngs.params(), cfg.num_layers))
    self.final_norm = RMSNorm(cfg)
    if not cfg.tie_embeddings:
      self.lm_head = Dense(
          'RD,DV->RV', (cfg.embed_dim, cfg.vocab_size), cfg,
          std=cfg.embed_dim**-0.5, rngs=rngs)

  def hidden(self, tokens, positions, segment_ids):
    cfg = self.cfg
    sin, cos = attention_lib.rope_angles(
        positions, cfg.head_dim, cfg.rope_theta)
    mask = attention_lib.make_mask(segment_ids)
    x = self.embed.embedding[...][tokens.reshape(-1)]  # [R,D]
    graphdef, stacked = nnx.split(self.layers)

    def body(x, layer):
      return nnx.merge(graphdef, layer)(x, sin, cos, mask), None

    body = with_remat(body, cfg.remat)
    x, _ = jax.lax.scan(
        body, x.astype(cfg.dtype), stacked, unroll=cfg.unroll)
    return self.final_norm(x).reshape(*tokens.shape, cfg.embed_dim)

  def logits(self, hidden):
    if self.cfg.tie_embeddings:
      kernel = self.embed.embedding[...].T
    else:
      kernel = self.lm_head.kernel[...]
    logits = jnp.einsum(
        'RD,DV->RV', hidden.reshape(-1, self.cfg.embed_dim),
        kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1)


def with_remat(body, remat: str):
  """Returns the scan body with the rematerialisation of ModelConfig.remat."""
  if remat == 'none':
    return body
  policies = {
      'full': jax.checkpoint_policies.nothing_saveable,
      'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  }
  # Inside a scan nothing can be merged across iterations anyway.
  return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)


@functools.lru_cache(maxsize=64)
def make_model(cfg: ModelConfig) -> nnx.GraphDef:
  """Returns the graph definition; split once per config, then cached.

  Raises:
    ValueError: if the vocabulary size was not set.
  """
  if cfg.vocab_size < 1:
    raise ValueError(
        'vocab_size=0 in the model config; set it to the size of the '
        'tokenizer: preset(name, vocab_size=tokenizer.vocab_size).')
  model = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(params=0)))
  return nnx.split(model)[0]


def init_params(cfg: ModelConfig, seed: int) -> dict:
  """Returns new parameters: a nested dict of cfg.param_dtype arrays.

  Names: embed/embedding [V,D]; layers/attention/{query [L,D,N,H], key and
  value [L,D,K,H], out [L,N,H,D]}/kernel; layers/mlp/{gate, up [L,D,F],
  down [L,F,D]}/kernel; layers/{attention_norm, mlp_norm}/scale [L,D];
  final_norm/scale [D]; lm_head/kernel [D,V] unless tied.
  """
  make_model(cfg)  # validates
  return _make_init(cfg)(jax.random.key(seed))


@functools.lru_cache(maxsize=64)
def _make_init(cfg: ModelConfig):
  """Returns a jitted key -> params; compiled once per config."""

  def init(key):
    return nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(params=key))))

  return jax.jit(init)


def hidden(
    cfg: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array,
    segment_ids: jax.Array
) -> jax.Array:
  """Returns the residual stream after the final norm, cfg.dtype [B,T,D].

  Args:
    cfg: static.
    params: as from init_params.
    tokens: int32 [B,T].
    positions: int32 [B,T], restarting at 0 in every segment.
    segment_ids: int32 [B,T], 1.. for each prompt of a packed row, 0 = padding.
  """
  model = nnx.merge(make_model(cfg), nnx.State(params))
  return model.hidden(tokens, positions, segment_ids)


def logits(cfg: ModelConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """Returns float32 [...,V] for hidden [...,D], any leading shape."""
  return nnx.merge(make_model(cfg), nnx.State(params)).logits(hidden)
