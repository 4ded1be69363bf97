import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from csrm_jax.models import attention, config, transformer
from tests import small

CFG = small.model(head_dim=8)


def _row(lengths, total, seed=0):
  """Returns (tokens, positions, segment_ids), int32 [1,total]."""
  rng = np.random.default_rng(seed)
  tokens = np.zeros((1, total), np.int32)
  positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
  start = 0
  for i, length in enumerate(lengths):
    cut = slice(start, start + length)
    tokens[0, cut] = rng.integers(0, CFG.vocab_size, length)
    positions[0, cut] = np.arange(length)
    segment_ids[0, cut] = i + 1
    start += length
  return tokens, positions, segment_ids


@functools.lru_cache
def _params(cfg=CFG, seed=0):
  """Returns params whose norm scales are not all one, nor LoRA's b zero."""
  params = transformer.init_params(cfg, seed)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for i, (name, leaf) in enumerate(flat.items()):
    if name.endswith(('scale', 'lora_b')):
      noise = jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
      flat[name] = leaf + 0.3 * noise
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _loss(cfg, params, batch):
  used = (batch[2] > 0)[..., None]
  return jnp.where(used, jnp.square(small.logits(cfg, params, *batch)), 0).sum()


@functools.partial(jax.jit, static_argnums=0)
def _grads(cfg, params, batch):
  return jax.grad(functools.partial(_loss, cfg))(params, batch)


def _assert_close(got, want, rtol=1e-5):
  def check(a, b):
    scale = max(float(np.abs(b).max()), 1e-6)
    np.testing.assert_allclose(a, b, atol=rtol * scale)

  jax.tree.map(check, got, want)


@pytest.mark.parametrize('tie', [True, False])
def test_names_and_shapes(tie):
  cfg = dataclasses.replace(CFG, tie_embeddings=tie)
  flat = flax.traverse_util.flatten_dict(transformer.init_params(cfg, 0), sep='/')
  expected = {
    'embed/embedding': (40, 32),
    'layers/attention/query/kernel': (2, 32, 4, 8),
    'layers/attention/key/kernel': (2, 32, 2, 8),
    'layers/attention/value/kernel': (2, 32, 2, 8),
    'layers/attention/out/kernel': (2, 4, 8, 32),
    'layers/mlp/gate/kernel': (2, 32, 48),
    'layers/mlp/up/kernel': (2, 32, 48),
    'layers/mlp/down/kernel': (2, 48, 32),
    'layers/attention_norm/scale': (2, 32),
    'layers/mlp_norm/scale': (2, 32),
    'final_norm/scale': (32,),
  }
  if not tie:
    expected['lm_head/kernel'] = (32, 40)
  assert {name: leaf.shape for name, leaf in flat.items()} == expected
  assert type(flat['embed/embedding']).__module__.startswith('jaxlib')


def test_init_depends_on_seed_only_and_layers_differ():
  first, again, other = (transformer.init_params(CFG, s) for s in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  kernel = first['layers']['mlp']['gate']['kernel']
  assert not np.allclose(kernel, other['layers']['mlp']['gate']['kernel'])
  assert not np.allclose(kernel[0], kernel[1])


def test_vocabulary_must_be_set():
  with pytest.raises(ValueError, match='vocab_size=0'):
    transformer.init_params(config.PRESETS['tiny'], 0)


def test_split_once_per_config():
  copy = dataclasses.replace(CFG)
  assert transformer.make_model(CFG) is transformer.make_model(copy)


def _reference(cfg, params, tokens, positions, mask):
  """One row through the decoder in float64 numpy, written independently.

  Takes mask[has_window] bool [T,S]; returns logits [T,V].
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  half = cfg.head_dim // 2

  def norm(x, layer):
    scale = layer['scale'] + cfg.norm_offset
    mean = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean + cfg.norm_eps) * scale

  def rope(x):
    angle = positions[:, None] * cfg.rope_theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None] * (x[..., :half] + 1j * x[..., half:])
    return np.concatenate([turn.real, turn.imag], -1)

  def dense(x, layer, axes=1):
    y = np.tensordot(x, layer['kernel'], axes)
    if 'lora_a' in layer:
      low = np.tensordot(x, layer['lora_a'], axes)
      y += cfg.lora_alpha / cfg.lora_rank * np.tensordot(low, layer['lora_b'], 1)
    return y

  def cap(x, limit):
    return limit * np.tanh(x / limit) if limit else x

  def gate(x):
    if cfg.activation == 'silu':
      return x / (1 + np.exp(-x))
    cubic = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return x * 0.5 * (1 + np.tanh(cubic))

  x = p['embed']['embedding'][tokens]
  if cfg.scale_embeddings:
    x = x * np.sqrt(cfg.embed_dim)
  for i in range(cfg.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], p['layers'])
    heads, mlp = layer['attention'], layer['mlp']
    h = norm(x, layer['attention_norm'])
    q, k, v = (dense(h, heads[n]) for n in ('query', 'key', 'value'))
    if cfg.qk_norm:
      q, k = norm(q, heads['query_norm']), norm(k, heads['key_norm'])
    group = cfg.num_heads // cfg.num_kv_heads
    q, k, v = rope(q), np.repeat(rope(k), group, 1), np.repeat(v, group, 1)
    scores = np.einsum('tnh,snh->nts', q, k)
    scores = cap(scores / np.sqrt(cfg.query_scale or cfg.head_dim), cfg.attention_softcap)
    has_window = cfg.sliding_window > 0 and i % cfg.window_period == 0
    w = np.exp(scores) * mask[has_window]
    w = w / np.maximum(w.sum(-1, keepdims=True), 1e-300)
    h = dense(np.einsum('nts,snh->tnh', w, v), heads['out'], 2)
    x = x + (norm(h, layer['attention_post_norm']) if cfg.post_norms else h)
    h = norm(x, layer['mlp_norm'])
    h = dense(gate(dense(h, mlp['gate'])) * dense(h, mlp['up']), mlp['down'])
    x = x + (norm(h, layer['mlp_post_norm']) if cfg.post_norms else h)
  x = norm(x, p['final_norm'])
  if cfg.tie_embeddings:
    kernel = p['embed']['embedding'].T
  else:
    kernel = p['lm_head']['kernel']
  return cap(x @ kernel, cfg.final_softcap)


VARIANTS = {
  'llama': {},
  'mistral': {'sliding_window': 3, 'tie_embeddings': False},
  'qwen3': {'qk_norm': True, 'norm_eps': 1e-3, 'rope_theta': 100.0},
  'gemma2': {
    'norm_offset': 1.0,
    'activation': 'gelu_tanh',
    'scale_embeddings': True,
    'query_scale': 5.0,
    'attention_softcap': 0.5,
    'final_softcap': 2.0,
    'post_norms': True,
    'sliding_window': 3,
    'window_period': 2,
  },
  'lora': {'lora_rank': 3, 'lora_alpha': 6.0},
}


@pytest.mark.parametrize('unroll', [1, 2])
@pytest.mark.parametrize('name', VARIANTS)
def test_equals_plain_numpy(name, unroll):
  cfg = dataclasses.replace(CFG, unroll=unroll, **VARIANTS[name])
  params = _params(cfg)
  tokens, positions, segment_ids = _row([7, 5], 14)
  masks = [
    np.asarray(attention.make_mask(segment_ids, window))[0] for window in (0, cfg.sliding_window)
  ]
  want = _reference(cfg, params, tokens[0], positions[0], masks)
  got = small.logits(cfg, params, tokens, positions, segment_ids)[0]
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'field'),
  [
    (name, field)
    for name, fields in VARIANTS.items()
    for field in fields
    if field not in ('tie_embeddings', 'qk_norm', 'post_norms', 'lora_rank')
  ],
)
def test_every_field_of_a_family_matters(name, field):
  """So that the comparison above could fail for each of them."""
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  default = {f.name: f.default for f in dataclasses.fields(cfg)}[field]
  without = dataclasses.replace(cfg, **{field: default})
  tokens, positions, segment_ids = _row([7, 5], 14)
  masks = {
    c: [np.asarray(attention.make_mask(segment_ids, window))[0] for window in (0, c.sliding_window)]
    for c in (cfg, without)
  }
  a, b = (_reference(c, _params(cfg), tokens[0], positions[0], masks[c]) for c in (cfg, without))
  assert np.abs(a - b)[:12].max() > 1e-2


@pytest.mark.parametrize('name', ['mistral', 'gemma2'])
def test_packed_equals_unpacked_with_windows(name):
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  params = _params(cfg)
  tokens, positions, segment_ids = _row([7, 5], 14)
  packed = small.logits(cfg, params, tokens, positions, segment_ids)[0]
  for start, length in ((0, 7), (7, 5)):
    alone = _row([length], 14)
    alone[0][0, :length] = tokens[0, start : start + length]
    np.testing.assert_allclose(
      small.logits(cfg, params, *alone)[0, :length], packed[start : start + length], atol=1e-5
    )


def test_lora_starts_as_the_base_and_trains_every_target():
  cfg = dataclasses.replace(
    CFG, lora_rank=3, lora_targets=('query', 'out', 'down'), param_dtype='bfloat16'
  )
  params = transformer.init_params(cfg, 0)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  adapters = {name: leaf for name, leaf in flat.items() if '/lora_' in name}
  assert {name: leaf.shape for name, leaf in adapters.items()} == {
    'layers/attention/query/lora_a': (2, 32, 3),
    'layers/attention/query/lora_b': (2, 3, 4, 8),
    'layers/attention/out/lora_a': (2, 4, 8, 3),
    'layers/attention/out/lora_b': (2, 3, 32),
    'layers/mlp/down/lora_a': (2, 48, 3),
    'layers/mlp/down/lora_b': (2, 3, 32),
  }
  assert {leaf.dtype for leaf in adapters.values()} == {jnp.dtype('float32')}
  assert 0.8 < np.std(flat['layers/mlp/down/lora_a']) * 48**0.5 < 1.2
  base_cfg = dataclasses.replace(cfg, lora_rank=0)
  base = transformer.init_params(base_cfg, 0)
  for name, leaf in flax.traverse_util.flatten_dict(base, sep='/').items():
    np.testing.assert_array_equal(leaf, flat[name])
  batch = _row([7, 5], 14)
  np.testing.assert_array_equal(
    small.logits(cfg, params, *batch), small.logits(base_cfg, base, *batch)
  )
  grads = flax.traverse_util.flatten_dict(_grads(cfg, params, batch), sep='/')
  for name in adapters:  # a has no gradient while b is 0
    assert np.any(grads[name]) == name.endswith('lora_b'), name


def test_scan_equals_loop():
  params, batch = _params(), _row([7, 5], 14)
  blocks = nnx.eval_shape(lambda: transformer.Block(CFG, nnx.Rngs(params=0)))
  graphdef = nnx.split(blocks)[0]

  @jax.jit
  def loop(params, tokens, positions, segment_ids):
    angles = attention.rope_angles(positions, CFG.head_dim, CFG.rope_theta)
    mask = attention.make_mask(segment_ids)

    def attend(*heads):
      return attention.attend(*heads, mask), None

    x = params['embed']['embedding'][tokens[0]]
    for i in range(CFG.num_layers):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
      x, _ = nnx.merge(graphdef, nnx.State(layer))(x, *angles, attend)
    return nnx.merge(transformer.make_model(CFG), nnx.State(params)).final_norm(x)

  got = jax.jit(transformer.hidden, static_argnums=0)(CFG, params, *batch)
  np.testing.assert_allclose(got[0], loop(params, *batch), atol=1e-5)


@pytest.mark.parametrize('change', [{'remat': 'full'}, {'remat': 'dots'}, {'unroll': 2}])
def test_remat_and_unroll_change_nothing(change):
  params, batch = _params(), _row([7, 5], 14)
  cfg = dataclasses.replace(CFG, **change)
  _assert_close(small.logits(cfg, params, *batch), small.logits(CFG, params, *batch))
  _assert_close(_grads(cfg, params, batch), _grads(CFG, params, batch))


@pytest.mark.parametrize('name', VARIANTS)
def test_cache_equals_one_pass(name):
  """A prompt, four tokens at once, then one by one; rows padded on the left."""
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  params = _params(cfg)
  rng = np.random.default_rng(0)
  lengths, total = np.array([12, 9]), 12
  place = np.arange(total) - (total - lengths)[:, None]
  segment_ids = (place >= 0).astype(np.int32)
  positions = np.maximum(place, 0).astype(np.int32)
  tokens = rng.integers(0, cfg.vocab_size, place.shape, np.int32)
  batch = tokens, positions, segment_ids
  want = jax.jit(transformer.hidden, static_argnums=0)(cfg, params, *batch)

  def cut(start, stop):
    return [x[:, start:stop] for x in batch]

  places = np.where(segment_ids > 0, positions, transformer.NOWHERE)
  apart = transformer.unstack(params)
  extend = jax.jit(transformer.extend, static_argnums=0)
  prefill = jax.jit(transformer.prefill, static_argnums=0)
  out, cache = prefill(cfg, params, *cut(0, 5))
  cache = transformer.resize(cache, total + 3)
  outs = [out]
  for start, stop in ((5, 9), (9, 10), (10, 11), (11, 12)):
    out, cache = extend(cfg, apart, tokens[:, start:stop], places[:, start:stop], cache)
    outs.append(out)
  assert cache['length'] == total
  got = np.concatenate(outs, axis=1)
  gap = np.abs(got - want)[segment_ids > 0].max()
  assert gap < 1e-5, gap


@pytest.mark.parametrize('name', VARIANTS)
def test_a_prefix_that_rows_share_is_computed_once(name, monkeypatch):
  """Against one pass over whole rows; then a token more from the cache."""
  monkeypatch.setattr(attention, 'MIN_CHUNK', 3)  # of queries
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  params = _params(cfg)
  tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 14))
  tokens[:, :6] = tokens[0, :6]
  positions = np.tile(np.arange(14), (3, 1))
  segment_ids = np.ones((3, 14), int)
  segment_ids[1, 11:] = 0  # on the right: the prefix is next to the rest
  batch = tokens, positions, segment_ids
  want = np.array(transformer.hidden(cfg, params, *batch))
  once = [x[:1, :6] for x in batch]
  prefix = transformer.make_prefix_reader(cfg)(params, once[0], once[2])
  rest = [x[:, 6:13] for x in batch]
  out, cache = transformer.prefill(cfg, params, *rest, prefix=prefix)
  assert cache['length'] == 13
  cache = transformer.resize(cache, 14)
  last = [x[:, 13:] for x in (tokens, np.where(segment_ids > 0, positions, transformer.NOWHERE))]
  last, _ = transformer.extend(cfg, transformer.unstack(params), *last, cache)
  got = np.concatenate([out, last], axis=1)
  gap = np.abs(got - want[:, 6:])[segment_ids[:, 6:] > 0].max()
  assert gap < 1e-5, gap
  alone = transformer.hidden(cfg, params, *rest, prefix)
  np.testing.assert_array_equal(alone, out)


def test_packed_equals_unpacked():
  params = _params()
  tokens, positions, segment_ids = _row([7, 5, 4], 20)
  packed = small.logits(CFG, params, tokens, positions, segment_ids)[0]
  packed_grads = _grads(CFG, params, (tokens, positions, segment_ids))
  grads = jax.tree.map(jnp.zeros_like, params)
  for start, length in ((0, 7), (7, 5), (12, 4)):
    alone = _row([length], 20)  # one shape: compiled once
    alone[0][0, :length] = tokens[0, start : start + length]
    logits = small.logits(CFG, params, *alone)[0, :length]
    np.testing.assert_allclose(logits, packed[start : start + length], atol=1e-5)
    grads = jax.tree.map(jnp.add, grads, _grads(CFG, params, alone))
  _assert_close(packed_grads, grads)


def _input_gradient(batch, position):
  """Returns d(logits at position)/d(embedded input), [T,D] magnitudes."""
  params = _params()
  tokens, positions, segment_ids = batch
  # One vocabulary row for each place, so that its gradient is the place's.
  place = np.arange(tokens.shape[1], dtype=np.int32)[None]
  table = params['embed']['embedding'][tokens[0]]
  cfg = dataclasses.replace(CFG, vocab_size=len(table), tie_embeddings=False)
  head = {'kernel': jnp.ones((CFG.embed_dim, len(table)))}

  def out(table):
    tree = params | {'embed': {'embedding': table}, 'lm_head': head}
    hidden = transformer.hidden(cfg, tree, place, positions, segment_ids)
    return jnp.sin(hidden[0, position]).sum()

  return np.abs(jax.jit(jax.grad(out))(table)).sum(-1)


def test_causal_and_no_leak_between_segments():
  batch = _row([7, 5], 14)
  grad = _input_gradient(batch, 9)  # third token of the second segment
  assert np.all(grad[7:10] > 0)
  assert np.all(grad[:7] == 0) and np.all(grad[10:] == 0)


def test_neighbours_and_padding_tokens_do_not_matter_at_all():
  params = _params()
  tokens, positions, segment_ids = _row([7, 5], 14)
  changed = tokens.copy()
  changed[0, :7] = (tokens[0, :7] + 1) % CFG.vocab_size
  changed[0, 12:] = 5
  got, want = (
    small.logits(CFG, params, t, positions, segment_ids)[0, 7:12] for t in (changed, tokens)
  )
  np.testing.assert_array_equal(got, want)


def test_padding_side_does_not_matter():
  params = _params()
  tokens, positions, segment_ids = _row([7], 14)
  right = small.logits(CFG, params, tokens, positions, segment_ids)[0, :7]
  left = [np.roll(x, 7, axis=1) for x in (tokens, positions, segment_ids)]
  np.testing.assert_allclose(small.logits(CFG, params, *left)[0, 7:], right, atol=1e-5)


def test_all_padding_is_finite():
  params = _params()
  batch = tuple(np.zeros((2, 8), np.int32) for _ in range(3))
  assert np.all(np.isfinite(small.logits(CFG, params, *batch)))

  def everything(params):
    return small.logits(CFG, params, *batch).sum()

  for grad in jax.tree.leaves(jax.jit(jax.grad(everything))(params)):
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize('change', [{'rope_theta': 5e5}, {'norm_eps': 0.5}])
def test_config_values_reach_the_computation(change):
  params, batch = _params(), _row([12], 12)
  other = small.logits(dataclasses.replace(CFG, **change), params, *batch)
  want = small.logits(CFG, params, *batch)
  assert np.abs(other - want).max() > 1e-2
  if 'rope_theta' in change:  # position 0 is not rotated
    np.testing.assert_allclose(other[0, 0], want[0, 0], atol=1e-5)


def test_grouped_query_equals_multi_head_with_repeated_kernels():
  params, batch = _params(), _row([12], 12)
  heads = params['layers']['attention']
  repeated = heads | {
    name: {'kernel': jnp.repeat(heads[name]['kernel'], 2, axis=2)} for name in ('key', 'value')
  }
  wide = params | {'layers': params['layers'] | {'attention': repeated}}
  cfg = dataclasses.replace(CFG, num_kv_heads=CFG.num_heads)
  _assert_close(small.logits(cfg, wide, *batch), small.logits(CFG, params, *batch))


def test_untied_head_is_used():
  cfg = dataclasses.replace(CFG, tie_embeddings=False)
  params, batch = _params(cfg), _row([12], 12)
  hidden = transformer.hidden(cfg, params, *batch)
  np.testing.assert_allclose(
    small.logits(cfg, params, *batch), hidden @ params['lm_head']['kernel'], atol=1e-4
  )


def test_bfloat16_is_close_and_logits_are_float32():
  cfg = dataclasses.replace(CFG, dtype='bfloat16', param_dtype='bfloat16')
  params, batch = _params(cfg), _row([12], 12)
  assert params['embed']['embedding'].dtype == jnp.bfloat16
  got = small.logits(cfg, params, *batch)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  want = small.logits(CFG, wide, *batch)
  assert transformer.hidden(cfg, params, *batch).dtype == jnp.bfloat16
  assert got.dtype == jnp.float32
  assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_match_init_starts_with_query_heads_equal_to_their_key_head():
  cfg = dataclasses.replace(CFG, match_init=True)
  heads = transformer.init_params(cfg, 0)['layers']['attention']
  query, key = (np.asarray(heads[n]['kernel']) for n in ('query', 'key'))
  np.testing.assert_array_equal(query[:, :, ::2], key)
  assert not np.any(query[:, :, 1::2] == key)
