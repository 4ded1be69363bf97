"""One decoder in Flax NNX for all families, used through plain nested dicts.

Llama, Mistral, Qwen3 and Gemma 2 differ in fields of ModelConfig only.

Axes: B rows, T query length, S key length, D embed, F mlp, N query heads, K kv heads, G = N/K,
H head dim, V vocab, L layers. The residual stream is x [R,D] with R = B·T.

Flax stays inside this module: callers hold a ModelConfig and a nested dict of arrays, so that
sharding rules, masks, checkpoints and LoRA see plain names such as
'layers/attention/query/kernel'. The layers are stacked along a leading axis L and run by one
lax.scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import attention as attention_lib, products
from csrm_jax.models.config import ModelConfig

# Up to so many rows are those of a loop over tokens, see logits.
FEW_ROWS = 64
# The position of a cache's slot that nothing attends to: it comes after every query.
NOWHERE = 2**30
ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}


class Dense(nnx.Module):
  """A product with one kernel, without bias, and perhaps a LoRA adapter.

  y = x·kernel + (alpha / rank)·(x·a)·b, where b starts at 0.

  Source: Hu et al. 2021, LoRA, eq. 3.
  """

  def __init__(self, cfg: ModelConfig, name, inputs, outputs, *, std, rngs):
    """Makes a kernel [*inputs, *outputs], and an adapter if cfg.lora_targets has its name."""
    self.dtype = cfg.dtype
    self.kernel = nnx.Param(
      std * jax.random.normal(rngs.params(), inputs + outputs, cfg.param_dtype)
    )
    self.lora_scale = 0.0
    if cfg.lora_rank and name in cfg.lora_targets:
      self.lora_scale = cfg.lora_alpha / cfg.lora_rank
      # Adapters have a random stream of their own, so that kernels are the same without them. They
      # are float32 whatever the kernel is, because their updates are too small for bfloat16.
      self.lora_a = nnx.Param(
        math.prod(inputs) ** -0.5 * jax.random.normal(rngs.lora(), (*inputs, cfg.lora_rank))
      )
      self.lora_b = nnx.Param(jnp.zeros((cfg.lora_rank, *outputs)))

  def __call__(self, x):
    if self.lora_scale:
      return products.adapted(
        x, self.kernel[...], self.lora_a[...], self.lora_b[...], self.lora_scale
      )
    return products.dense(x, self.kernel[...].astype(self.dtype))


class RMSNorm(nnx.Module):
  """Divides x by its root mean square and multiplies it by a learned scale, all in float32.

  Source: Zhang & Sennrich 2019, eq. 4.
  """

  def __init__(self, cfg: ModelConfig, size: int):
    self.eps, self.offset = cfg.norm_eps, cfg.norm_offset
    # With the offset the norm multiplies by 1 at first.
    self.scale = nnx.Param(jnp.full(size, 1 - self.offset, cfg.param_dtype))

  def __call__(self, x):
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.eps)
    scale = self.scale[...].astype(jnp.float32) + self.offset
    return (normed * scale).astype(x.dtype)


class MLP(nnx.Module):
  """A gated MLP: SwiGLU or GeGLU.

  Source: Shazeer 2020, eq. 6.
  """

  def __init__(self, cfg: ModelConfig, rngs):
    D, F = cfg.embed_dim, cfg.mlp_dim
    self.activation = cfg.activation
    make = functools.partial(Dense, cfg, rngs=rngs)
    self.gate = make('gate', (D,), (F,), std=D**-0.5)
    self.up = make('up', (D,), (F,), std=D**-0.5)
    # Residual writes shrink with depth, so that the stream keeps its scale.
    self.down = make('down', (F,), (D,), std=(F * 2 * cfg.num_layers) ** -0.5)

  def __call__(self, x):
    gate, up = (mesh_lib.constrain(y, mesh_lib.ROWS, 'tensor') for y in (self.gate(x), self.up(x)))
    return self.down(ACTIVATIONS[self.activation](gate) * up)


class Embed(nnx.Module):
  """The token embedding [V,D]."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.cfg = cfg
    shape = (cfg.vocab_size, cfg.embed_dim)
    self.embedding = nnx.Param(
      cfg.embed_dim**-0.5 * jax.random.normal(rngs.params(), shape, cfg.param_dtype)
    )

  def __call__(self, tokens):
    # One token a row from here on, outside attention: on CPU the gradient of a kernel is twice as
    # fast when it contracts one axis instead of two. Each device looks up its columns for the
    # tokens of all, then rows and columns change places: the table is never gathered.
    tokens = mesh_lib.constrain(tokens.reshape(-1), 'data')
    x = self.embedding[...][tokens].astype(self.cfg.dtype)  # [R,D]
    x = mesh_lib.constrain(x, 'data', 'fsdp')
    x = mesh_lib.constrain(x, mesh_lib.ROWS)
    # The factor is rounded to x's dtype, as in Gemma's own code.
    if self.cfg.scale_embeddings:
      x *= jnp.asarray(self.cfg.embed_dim**0.5, x.dtype)
    return x


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
    self.out = make('out', (N, H), (D,), std=(N * H * 2 * cfg.num_layers) ** -0.5)
    if cfg.qk_norm:
      self.query_norm, self.key_norm = RMSNorm(cfg, H), RMSNorm(cfg, H)

  def __call__(self, x, sin, cos, attend):
    """Returns (what the layer adds to x [R,D], what attend keeps).

    attend takes a scaled query [B,T,N,H], key and value [B,T,K,H]. It returns the heads' output
    [B,T,N,H] and whatever is to be kept.
    """
    query, key, value = (
      mesh_lib.constrain(
        heads.reshape(*sin.shape[:2], *heads.shape[1:]), mesh_lib.ROWS, None, 'tensor'
      )
      for heads in (self.query(x), self.key(x), self.value(x))
    )
    if self.cfg.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    # The query's scale is put into the angles: there it is float32 and costs nothing.
    scale = (self.cfg.query_scale or self.cfg.head_dim) ** -0.5
    query = attention_lib.apply_rope(query, scale * sin, scale * cos)
    out, kept = attend(query, attention_lib.apply_rope(key, sin, cos), value)
    return self.out(out.reshape(-1, *out.shape[2:])), kept


class Block(nnx.Module):
  """One pre-norm decoder layer; with post_norms, what it adds is normed too (Gemma 2)."""

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


class Transformer(nnx.Module):
  """The embedding, L stacked blocks, the final norm and the output layer."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.cfg = cfg
    self.embed = Embed(cfg, rngs)
    make_block = nnx.vmap(lambda key: Block(cfg, _make_rngs(key)), in_axes=0, out_axes=0)
    self.layers = make_block(jax.random.split(rngs.params(), cfg.num_layers))
    self.final_norm = RMSNorm(cfg, cfg.embed_dim)
    if not cfg.tie_embeddings:
      self.lm_head = Dense(
        cfg, 'lm_head', (cfg.embed_dim,), (cfg.vocab_size,), std=cfg.embed_dim**-0.5, rngs=rngs
      )

  def hidden(self, tokens, positions, segment_ids, prefix=None, ends=None, keep=False):
    """Returns hidden [B,T,D] and, if `keep`, all layers' keys and values as a cache holds them."""
    cfg = self.cfg
    mask_of = _make_mask_of(cfg, _make_mask_fn(segment_ids, prefix, ends, positions))
    # Where prompts share tokens, keys within the window may lie farther away in the row.
    uniform = cfg.sliding_window if cfg.window_period == 1 and ends is None else 0
    kernel = attention_lib.make_kernel(cfg, has_prefix=prefix is not None)

    def attend(query, key, value, has_window, before):
      kept = _to_cache(key, value) if keep else None
      if before:
        key, value = _put_before(key, value, *before)
      if kernel:
        mask = None if ends is None and not before else mask_of(has_window)
        return kernel(query, key, value, segment_ids, has_window, mask), kept
      out = attention_lib.attend(
        query, key, value, mask_of(has_window), cap=cfg.attention_softcap, window=uniform
      )
      return out, kept

    def body(x, xs):
      layer, has_window, *before = xs
      return block(x, layer, functools.partial(attend, has_window=has_window, before=before))

    block = self.make_block(positions)
    before = () if prefix is None else (prefix['key'], prefix['value'])
    x, kept = self.scan(with_remat(body, cfg.remat), self.embed(tokens), *before)
    return self.final_norm(x).reshape(*tokens.shape, cfg.embed_dim), kept

  def make_block(self, positions):
    """Returns a function: (x, layer's parameters, attend) -> (x, what attend keeps)."""
    cfg = self.cfg
    graphdef, _ = nnx.split(self.layers)
    # Computed here, outside the scan: all layers share them.
    sin, cos = attention_lib.rope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return lambda x, layer, attend: nnx.merge(graphdef, layer)(x, sin, cos, attend)

  def scan(self, body, carry, *more):
    """Returns lax.scan's result for body over each layer's (parameters, has_window, *more)."""
    _, stacked = nnx.split(self.layers)
    return jax.lax.scan(
      body, carry, (stacked, _has_window(self.cfg), *more), unroll=self.cfg.unroll
    )


def _to_cache(key, value):
  """Returns key [B,K,H,T] and value [B,K,T,H], given [B,T,K,H] each."""
  return key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)


def _put_before(key, value, old_key, old_value):
  """Returns key and value [B,P+T,K,H], given [B,T,K,H] and a cache of [1,P]."""
  old = old_key.transpose(0, 3, 1, 2), old_value.transpose(0, 2, 1, 3)
  return [
    jnp.concatenate([jnp.broadcast_to(first, (last.shape[0], *first.shape[1:])), last], axis=1)
    for first, last in zip(old, (key, value), strict=True)
  ]


def _make_mask_fn(segment_ids, prefix, ends, positions):
  """Returns a function: window -> mask of the tokens, which follow the prefix if there is one."""
  if prefix is not None:
    before = prefix['segment_ids']  # [1,P]
    before = jnp.broadcast_to(before, (segment_ids.shape[0], before.shape[1]))
    P, T = before.shape[1], segment_ids.shape[1]
  if ends is None:
    keys = {}
    if prefix is not None:
      keys['start'] = P
      keys['key_segment_ids'] = jnp.concatenate([before, segment_ids], axis=1)
    return functools.partial(attention_lib.make_mask, segment_ids, **keys)
  if prefix is not None:
    # All tokens of a row continue the prefix.
    first = jnp.where(before > 0, P + T, 0)
    ends = jnp.concatenate([first, jnp.where(ends > 0, P + ends, 0)], axis=1)
    places = jnp.broadcast_to(jnp.arange(P, dtype=positions.dtype), before.shape)
    positions = jnp.concatenate([places, positions], axis=1)
  return functools.partial(
    attention_lib.make_shared_mask, ends, positions, num_queries=segment_ids.shape[1]
  )


def _make_rngs(key) -> nnx.Rngs:
  return nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))


def _has_window(cfg: ModelConfig) -> jax.Array | None:
  """Returns which layers have the window, bool [L], or None where all are alike."""
  if not cfg.sliding_window or cfg.window_period == 1:
    return None
  return jnp.arange(cfg.num_layers) % cfg.window_period == 0


def _make_mask_of(cfg: ModelConfig, make_mask):
  """Returns a function: a layer's entry of _has_window -> its mask, given window -> mask."""
  if _has_window(cfg) is None:
    mask = make_mask(cfg.sliding_window)
    return lambda has_window: mask
  # Both are made once, outside the scan; a layer only selects.
  masks = make_mask(cfg.sliding_window), make_mask(0)
  return lambda has_window: jnp.where(has_window, *masks)


def with_remat(body, remat: str):
  """Returns the scan's body, rematerialised as ModelConfig.remat says."""
  if remat == 'none':
    return body
  policies = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  }
  # prevent_cse would keep the compiler from merging the recomputation with the forward pass; a
  # scan already keeps them apart.
  return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)


@functools.lru_cache(maxsize=64)
def make_model(cfg: ModelConfig) -> nnx.GraphDef:
  """Returns the graph definition; each config's is traced only once."""
  if cfg.vocab_size < 1:
    raise ValueError(
      'vocab_size=0 in the model config; set it to the size of the '
      'tokenizer: preset(name, vocab_size=tokenizer.vocab_size).'
    )
  return nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0))))[0]


def init_params(cfg: ModelConfig, seed: int) -> dict:
  """Returns new parameters: a nested dict of cfg.param_dtype arrays.

  The names are embed/embedding [V,D]; layers/attention/{query [L,D,N,H], key and value [L,D,K,H],
  out [L,N,H,D]}/kernel; layers/mlp/{gate, up [L,D,F], down [L,F,D]}/kernel;
  layers/{attention_norm, mlp_norm}/scale [L,D]; final_norm/scale [D]; lm_head/kernel [D,V] unless
  tied. With post_norms there are layers/{attention_post_norm, mlp_post_norm}/scale [L,D], with
  qk_norm layers/attention/{query_norm, key_norm}/scale [L,H]. Beside the kernel [L, inputs,
  outputs] of a LoRA target lie lora_a [L, inputs, r] and lora_b [L, r, outputs], both float32.
  """
  make_model(cfg)  # validates
  return _init(cfg, jax.random.key(seed))


def shapes(cfg: ModelConfig) -> dict:
  """Returns what init_params returns, as ShapeDtypeStructs; computes nothing."""
  return jax.eval_shape(lambda: init_params(cfg, 0))


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg: ModelConfig, key):
  return nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(params=key))))


def hidden(
  cfg: ModelConfig,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  prefix: dict | None = None,
  ends: jax.Array | None = None,
) -> jax.Array:
  """Returns the residual stream after the final norm, cfg.dtype [B,T,D]. cfg is static.

  Args:
    tokens: int32 [B,T].
    positions: int32 [B,T]; they restart at 0 in every segment.
    segment_ids: int32 [B,T]; the prompts of a packed row are 1, 2, …, padding is 0.
    prefix: The cache that make_prefix_reader's function returns: P tokens that come before segment
      1 of every row, whose positions then begin at P.
    ends: int32 [B,T], where prompts of a row share their first tokens; see
      attention.make_shared_mask. A prompt that continues another one also continues its positions.
  """
  return _merge(cfg, params).hidden(tokens, positions, segment_ids, prefix, ends)[0]


def logits(cfg: ModelConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """Returns float32 logits [...,V] of hidden [...,D], whatever the leading shape."""
  # The rows go to the devices that hold the parts of the vocabulary, not these parts to all.
  hidden, model = mesh_lib.constrain(hidden, 'data'), _merge(cfg, params)
  rows = hidden.reshape(-1, cfg.embed_dim)
  kernel = model.embed.embedding[...] if cfg.tie_embeddings else model.lm_head.kernel[...]
  kernel = kernel.astype(hidden.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  if not cfg.tie_embeddings:
    logits = product('RD,DV->RV', rows, kernel)
  elif len(rows) > FEW_ROWS:
    logits = product('RD,DV->RV', rows, kernel.T)
  else:  # the kernel as it lies, and first: in bfloat16 on CPU that is 8 times as fast
    logits = product('VD,RD->VR', kernel, rows).T
  logits = attention_lib.softcap(logits, cfg.final_softcap).reshape(*hidden.shape[:-1], -1)
  between = (None,) * (hidden.ndim - 2)
  return mesh_lib.constrain(logits, 'data', *between, mesh_lib.VOCAB)


def unstack(params: dict) -> dict:
  """Returns parameters whose layers lie apart: params['layers'] is a tuple of each layer's own.

  They are a copy. A loop that adds a token a turn reads them where they lie; out of the stack it
  would copy every layer in every turn.
  """
  leaves, treedef = jax.tree.flatten(params['layers'])
  shardings = treedef.unflatten([_of_layer(x.sharding) for x in leaves])
  cut = jax.jit(_cut_layers, out_shardings=(shardings,) * leaves[0].shape[0])
  return params | {'layers': cut(params['layers'])}


def unstacked_shapes(params: dict) -> dict:
  """Returns the shapes of unstack's result with their shardings, given those of the parameters."""

  def cut(x):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_of_layer(x.sharding))

  num = jax.tree.leaves(params['layers'])[0].shape[0]
  return params | {'layers': (jax.tree.map(cut, params['layers']),) * num}


def _cut_layers(layers):
  num = jax.tree.leaves(layers)[0].shape[0]
  return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(num))


def _of_layer(sharding):
  """Returns the sharding of one layer of a stacked array."""
  if isinstance(sharding, jax.NamedSharding):
    return jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
  return sharding


def prefill(
  cfg: ModelConfig,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  prefix: dict | None = None,
) -> tuple[jax.Array, dict]:
  """Returns what hidden does, and a cache of P + T slots.

  The cache holds key, a tuple of each layer's [B,K,H,S], and value, of each layer's [B,K,S,H], in
  cfg.dtype; positions int32 [B,S], NOWHERE where nothing is to be attended to; and length int32
  [], the number of tokens that were put in. The arguments are those of hidden, with one prompt a
  row: segment 1, padded on the left. A window counts the padding between the prefix and the rest
  as tokens.
  """
  out, kept = _merge(cfg, params).hidden(tokens, positions, segment_ids, prefix, keep=True)
  keys, values = (tuple(x) for x in kept)
  places = jnp.where(segment_ids > 0, positions, NOWHERE)
  if prefix is not None:
    B, P = segment_ids.shape[0], prefix['segment_ids'].shape[1]
    keys = _after(prefix['key'], keys, axis=3)
    values = _after(prefix['value'], values, axis=2)
    before = jnp.where(prefix['segment_ids'] > 0, jnp.arange(P, dtype=places.dtype), NOWHERE)
    places = jnp.concatenate([jnp.broadcast_to(before, (B, P)), places], axis=1)
  length = jnp.int32(places.shape[1])
  return out, _lay_out({'key': keys, 'value': values, 'positions': places, 'length': length})


def _after(first, last, axis):
  """Returns arrays of each layer that have those of a prefix, of one row, before them."""
  return tuple(
    jnp.concatenate([jnp.broadcast_to(a, (b.shape[0], *a.shape[1:])), b], axis)
    for a, b in zip(first, last, strict=True)
  )


def resize(cache: dict, length: int) -> dict:
  """Returns a cache of `length` slots, at least as many as it has."""
  # A full cache is a ring: its next slot, the oldest, comes to lie first.
  have = cache['positions'].shape[1]
  shift = jnp.where(cache['length'] < have, 0, -cache['length'] % have)

  def put(x, axis, fill=0):
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, length - have)
    return jnp.pad(jnp.roll(x, shift, axis), pads, constant_values=fill)

  return _lay_out(
    {
      'key': tuple(put(x, 3) for x in cache['key']),
      'value': tuple(put(x, 2) for x in cache['value']),
      'positions': put(cache['positions'], 1, NOWHERE),
      'length': jnp.minimum(cache['length'], have),
    }
  )


def take_rows(cache: dict, rows: jax.Array) -> dict:
  """Returns a cache whose row b is the given cache's row rows[b]."""
  held = {name: x for name, x in cache.items() if name != 'length'}
  taken = jax.tree.map(lambda x: x[rows], held)
  return _lay_out(taken | {'length': cache['length']})


def put_rows(cache: dict, new: dict, rows: jax.Array) -> dict:
  """Returns the cache with another's rows in place of its rows `rows`.

  The other has at most as many slots, all of them filled. Its last slots come to lie just before
  the one that the cache fills next, so that all rows go on together.
  """
  have, more = cache['positions'].shape[1], new['positions'].shape[1]

  def put(x, y, axis, fill=0):
    pads = [(0, 0)] * y.ndim
    pads[axis] = (0, have - more)
    y = jnp.pad(y, pads, constant_values=fill)
    return x.at[rows].set(jnp.roll(y, cache['length'] - more, axis))

  return _lay_out(
    {
      'key': tuple(put(*pair, 3) for pair in zip(cache['key'], new['key'], strict=True)),
      'value': tuple(put(*pair, 2) for pair in zip(cache['value'], new['value'], strict=True)),
      'positions': put(cache['positions'], new['positions'], 1, NOWHERE),
      'length': cache['length'],
    }
  )


def _lay_out(cache: dict) -> dict:
  """Returns the cache, cut over the mesh by rows and heads."""
  heads = {
    name: tuple(mesh_lib.constrain(x, *mesh_lib.CACHE) for x in cache[name])
    for name in ('key', 'value')
  }
  places = mesh_lib.constrain(cache['positions'], mesh_lib.ROWS)
  return cache | heads | {'positions': places}


def extend(
  cfg: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array, cache: dict
) -> tuple[jax.Array, dict]:
  """Returns (hidden [B,T,D], cache) of T tokens after those in the cache.

  The parameters are unstacked; tokens and positions are int32 [B,T]. Mostly T is 1. A position of
  NOWHERE marks padding, which is attended to by nothing. A full cache is a ring: the T oldest slots
  are overwritten, which must not be needed any more; the end of the ring must not lie among them.
  """
  layers, start = params['layers'], cache['length'] % cache['positions'].shape[1]
  model = _merge(cfg, params)
  places = jax.lax.dynamic_update_slice(cache['positions'], positions, (0, start))
  mask_of = _make_mask_of(cfg, functools.partial(attention_lib.make_cached_mask, positions, places))

  def attend(query, key, value, layer):
    key, value = _to_cache(key, value)
    keys = jax.lax.dynamic_update_slice(cache['key'][layer], key, (0, 0, 0, start))
    values = jax.lax.dynamic_update_slice(cache['value'][layer], value, (0, 0, start, 0))
    mask = mask_of(None if windows is None else windows[layer])
    out = attention_lib.attend_cached(query, keys, values, mask, cfg.attention_softcap)
    return out, (keys, values)

  block, windows = model.make_block(positions), _has_window(cfg)
  x, kept = model.embed(tokens), []
  for i, layer in enumerate(layers):
    x, one = block(x, nnx.State(layer), functools.partial(attend, layer=i))
    kept.append(one)
  keys, values = zip(*kept, strict=True)
  hidden = model.final_norm(x).reshape(*tokens.shape, cfg.embed_dim)
  length = cache['length'] + tokens.shape[1]
  return hidden, _lay_out({'key': keys, 'value': values, 'positions': places, 'length': length})


def _merge(cfg: ModelConfig, params: dict) -> Transformer:
  layers = params['layers']
  if isinstance(layers, tuple):  # any of them shows how a block is made
    return nnx.merge(make_model(cfg), nnx.State(params | {'layers': layers[0]}))
  # NNX binds leaves by their order alone: another head would be taken for the output layer.
  found, wanted = flatten_dict(params, sep='/'), _leaf_shapes(cfg)
  for name in sorted(set(found) ^ set(wanted)):
    what = 'has no' if name in wanted else 'has an unknown'
    raise ValueError(f'params {what} leaf {name!r}; give those of this model')
  for name, x in found.items():
    if x.shape != wanted[name]:
      raise ValueError(
        f'params: leaf {name!r} is {list(x.shape)}, not {list(wanted[name])}; give those of this '
        'model'
      )
  return nnx.merge(make_model(cfg), nnx.State(params))


@functools.lru_cache(maxsize=32)
def _leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  return {name: x.shape for name, x in flatten_dict(shapes(cfg), sep='/').items()}


def num_common(prompts: Sequence[Sequence[int]]) -> int:
  """Returns how many first tokens all prompts share, the last of each never counted."""
  # What a model is asked for is read at the last token, which must not lie in a shared prefix.
  size = min(map(len, prompts)) - 1
  heads = np.array([prompt[:size] for prompt in prompts])
  same = (heads == heads[0]).all(axis=0)
  return int(size if same.all() else same.argmin())


def read_prefix(
  cfg: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> dict:
  """Returns a prefix of P tokens, as hidden takes it; int32 [1,P] each, segment 0 is padding."""
  _, (key, value) = _merge(cfg, params).hidden(tokens, positions, segment_ids, keep=True)
  return {'key': key, 'value': value, 'segment_ids': segment_ids}


@functools.lru_cache(maxsize=32)
def make_prefix_reader(cfg: ModelConfig) -> Callable[..., dict]:
  """Returns a jitted (params, tokens, segment_ids) -> prefix, as hidden takes it.

  tokens and segment_ids are int32 [1,P]; padding, segment 0, is on the right.
  """

  def read(params, tokens, segment_ids):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return read_prefix(cfg, params, tokens, positions, segment_ids)

  return jax.jit(read)
