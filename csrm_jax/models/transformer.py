"""One decoder in Flax NNX for all families, used through plain nested dicts.

Llama, Mistral, Qwen3 and Gemma 2 differ in fields of ModelConfig only.

Axes: B rows, T query length, S key length, D embed, F mlp, N query heads,
K kv heads, G = N/K, H head dim, V vocab, L layers; R = B·T.

Everything but attention sees the residual stream as [R,D]: on CPU the gradient
of a kernel is twice as fast when it contracts one axis instead of two.

Flax stays inside these modules: callers hold a ModelConfig and a nested dict of
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
from csrm_jax.models.layers import MLP, Dense, Embed, RMSNorm


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
      self.query.kernel[...] = query.at[:, ::N // K].set(self.key.kernel[...])
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
        heads.reshape(*sin.shape[:2], *heads.shape[1:])
        for heads in (self.query(x), self.key(x), self.value(x)))
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
    out, kept = self.attention(self.attention_norm(x), sin, cos, attend)
    x += self.attention_post_norm(out) if self.post_norms else out
    out = self.mlp(self.mlp_norm(x))
    return x + (self.mlp_post_norm(out) if self.post_norms else out), kept


class Transformer(nnx.Module):
  """Embedding, L stacked blocks, final norm and output layer."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.cfg = cfg
    self.embed = Embed(cfg, rngs)
    make_block = nnx.vmap(
        lambda key: Block(cfg, _make_rngs(key)), in_axes=0, out_axes=0)
    self.layers = make_block(jax.random.split(rngs.params(), cfg.num_layers))
    self.final_norm = RMSNorm(cfg, cfg.embed_dim)
    if not cfg.tie_embeddings:
      self.lm_head = Dense(
          cfg, 'lm_head', (cfg.embed_dim,), (cfg.vocab_size,),
          std=cfg.embed_dim**-0.5, rngs=rngs)

  def hidden(self, tokens, positions, segment_ids, keep=False):
    """Returns hidden [B,T,D] and, to keep, keys and values as in a cache."""
    cfg = self.cfg
    mask_of = _make_mask_of(
        cfg, functools.partial(attention_lib.make_mask, segment_ids))
    uniform = cfg.sliding_window if cfg.window_period == 1 else 0

    def attend(query, key, value, has_window):
      out = attention_lib.attend(
          query, key, value, mask_of(has_window), cap=cfg.attention_softcap,
          window=uniform)
      return out, _to_cache(key, value) if keep else None

    def body(x, xs):
      return block(x, xs[0], functools.partial(attend, has_window=xs[1]))

    block = self._make_block(positions)
    x, kept = self._scan(with_remat(body, cfg.remat), self.embed(tokens))
    return self.final_norm(x).reshape(*tokens.shape, cfg.embed_dim), kept

  def extend(self, tokens, positions, segment_ids, cache):
    """Returns hidden [B,T,D] and the cache with T more slots in use."""
    cfg, start = self.cfg, cache['length']
    used = jax.lax.dynamic_update_slice(
        cache['segment_ids'], segment_ids, (0, start))
    mask_of = _make_mask_of(cfg, functools.partial(
        attention_lib.make_mask, segment_ids, key_segment_ids=used,
        start=start))

    def attend(query, key, value, has_window, layer, keys, values):
      key, value = _to_cache(key, value)
      # Written in place: the whole cache is carried through all the layers.
      keys = jax.lax.dynamic_update_slice(
          keys, key[None], (layer, 0, 0, 0, start))
      values = jax.lax.dynamic_update_slice(
          values, value[None], (layer, 0, 0, start, 0))
      out = attention_lib.attend_cached(
          query, keys[layer], values[layer], mask_of(has_window),
          cfg.attention_softcap)
      return out, (keys, values)

    def body(carry, xs):
      x, layer, *cached = carry
      x, cached = block(x, xs[0], lambda *heads: attend(
          *heads, xs[1], layer, *cached))
      return (x, layer + 1, *cached), None

    block = self._make_block(positions)
    (x, _, keys, values), _ = self._scan(
        body, (self.embed(tokens), 0, cache['key'], cache['value']))
    hidden = self.final_norm(x).reshape(*tokens.shape, cfg.embed_dim)
    return hidden, {
        'key': keys, 'value': values, 'segment_ids': used,
        'length': start + tokens.shape[1]}

  def _make_block(self, positions):
    """Returns (x, layer's parameters, attend) -> (x, what attend keeps)."""
    cfg = self.cfg
    graphdef, _ = nnx.split(self.layers)
    sin, cos = attention_lib.rope_angles(
        positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return lambda x, layer, attend: nnx.merge(graphdef, layer)(
        x, sin, cos, attend)

  def _scan(self, body, carry):
    """Runs body over (parameters, entry of _has_window) of each layer."""
    _, stacked = nnx.split(self.layers)
    return jax.lax.scan(
        body, carry, (stacked, _has_window(self.cfg)), unroll=self.cfg.unroll)

  def logits(self, hidden):
    if self.cfg.tie_embeddings:
      kernel = self.embed.embedding[...].T
    else:
      kernel = self.lm_head.kernel[...]
    logits = jnp.einsum(
        'RD,DV->RV', hidden.reshape(-1, self.cfg.embed_dim),
        kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = attention_lib.softcap(logits, self.cfg.final_softcap)
    return logits.reshape(*hidden.shape[:-1], -1)


def _to_cache(key, value):
  """Returns key [B,K,H,T] and value [B,K,T,H], from [B,T,K,H] each."""
  return key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)


def _make_rngs(key) -> nnx.Rngs:
  return nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))


def _has_window(cfg: ModelConfig) -> jax.Array | None:
  """Returns bool [L], or None where all layers are alike."""
  if not cfg.sliding_window or cfg.window_period == 1:
    return None
  return jnp.arange(cfg.num_layers) % cfg.window_period == 0


def _make_mask_of(cfg: ModelConfig, make_mask):
  """Returns a layer's entry of _has_window -> its mask.

  Args:
    cfg: the model.
    make_mask: window (0 for none) -> mask.
  """
  if _has_window(cfg) is None:
    mask = make_mask(cfg.sliding_window)
    return lambda has_window: mask
  masks = make_mask(cfg.sliding_window), make_mask(0)
  return lambda has_window: jnp.where(has_window, *masks)


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
  model = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0)))
  return nnx.split(model)[0]


def init_params(cfg: ModelConfig, seed: int) -> dict:
  """Returns new parameters: a nested dict of cfg.param_dtype arrays.

  Names: embed/embedding [V,D]; layers/attention/{query [L,D,N,H], key and
  value [L,D,K,H], out [L,N,H,D]}/kernel; layers/mlp/{gate, up [L,D,F],
  down [L,F,D]}/kernel; layers/{attention_norm, mlp_norm}/scale [L,D];
  final_norm/scale [D]; lm_head/kernel [D,V] unless tied.

  With post_norms also layers/{attention_post_norm, mlp_post_norm}/scale [L,D],
  with qk_norm layers/attention/{query_norm, key_norm}/scale [L,H]. Beside the
  kernel [L, inputs, outputs] of a LoRA target lie lora_a [L, inputs, r] and
  lora_b [L, r, outputs], float32.
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
  return _merge(cfg, params).hidden(tokens, positions, segment_ids)[0]


def logits(cfg: ModelConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """Returns float32 [...,V] for hidden [...,D], any leading shape."""
  return _merge(cfg, params).logits(hidden)


def init_cache(cfg: ModelConfig, batch_size: int, length: int) -> dict:
  """Returns an empty cache of keys and values for `length` tokens a row.

  It holds key [L,B,K,H,S] and value [L,B,K,S,H] in cfg.dtype, segment_ids int32
  [B,S] (0 where nothing is to be attended to) and length int32 [], the number
  of slots in use, which is the same in all rows: pad on the left.
  """
  L, K, H = cfg.num_layers, cfg.num_kv_heads, cfg.head_dim
  return {
      'key': jnp.zeros((L, batch_size, K, H, length), cfg.dtype),
      'value': jnp.zeros((L, batch_size, K, length, H), cfg.dtype),
      'segment_ids': jnp.zeros((batch_size, length), jnp.int32),
      'length': jnp.zeros([], jnp.int32),
  }


def prefill(
    cfg: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array,
    segment_ids: jax.Array, length: int
) -> tuple[jax.Array, dict]:
  """Returns what hidden does, and a cache of `length` slots that begins with T.

  Args as for hidden; a row's one prompt is segment 1, padded on the left.
  """
  out, (key, value) = _merge(cfg, params).hidden(
      tokens, positions, segment_ids, keep=True)
  cache = init_cache(cfg, tokens.shape[0], length)
  return out, {
      'key': cache['key'].at[..., :tokens.shape[1]].set(key),
      'value': cache['value'].at[..., :tokens.shape[1], :].set(value),
      'segment_ids':
          cache['segment_ids'].at[:, :tokens.shape[1]].set(segment_ids),
      'length': cache['length'] + tokens.shape[1],
  }


def extend(
    cfg: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array,
    segment_ids: jax.Array, cache: dict
) -> tuple[jax.Array, dict]:
  """Returns (hidden [B,T,D], cache) of T tokens after those in the cache.

  The caller sees to it that T slots are free: beyond the end the last ones
  would be overwritten.

  Args:
    cfg: static.
    params: as from init_params.
    tokens: int32 [B,T], any T; one token for each row is the usual.
    positions: int32 [B,T], of the tokens in their own segment.
    segment_ids: int32 [B,T]; 0 for a row that is done.
    cache: as from prefill, extend or init_cache.
  """
  return _merge(cfg, params).extend(tokens, positions, segment_ids, cache)


def _merge(cfg: ModelConfig, params: dict) -> Transformer:
  return nnx.merge(make_model(cfg), nnx.State(params))
