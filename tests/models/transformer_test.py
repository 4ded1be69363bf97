import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from csrm_jax.models import attention, config, transformer

CFG = config.ModelConfig(
    vocab_size=40, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=48)


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


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, params, tokens, positions, segment_ids):
  hidden = transformer.hidden(cfg, params, tokens, positions, segment_ids)
  return transformer.logits(cfg, params, hidden)


@functools.lru_cache
def _params(cfg=CFG, seed=0):
  """Returns params whose norm scales are not all one."""
  params = transformer.init_params(cfg, seed)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for i, (name, leaf) in enumerate(flat.items()):
    if name.endswith('scale'):
      noise = jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
      flat[name] = leaf + 0.3 * noise
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _loss(cfg, params, batch):
  used = (batch[2] > 0)[..., None]
  return jnp.where(used, jnp.square(_logits(cfg, params, *batch)), 0).sum()


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
  flat = flax.traverse_util.flatten_dict(
      transformer.init_params(cfg, 0), sep='/')
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


def test_equals_plain_numpy():
  """The whole decoder against a float64 reference written independently."""
  params = _params()
  tokens, positions, segment_ids = _row([7, 5], 14)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * scale

  def rope(x):
    angle = positions[0][:, None] * 1e4 ** (-np.arange(0, 8, 2) / 8)
    turn = np.exp(1j * angle)[:, None] * (x[..., :4] + 1j * x[..., 4:])
    return np.concatenate([turn.real, turn.imag], -1)

  mask = np.asarray(attention.make_mask(segment_ids))[0]
  x = p['embed']['embedding'][tokens[0]]
  for i in range(CFG.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], p['layers'])
    h = norm(x, layer['attention_norm']['scale'])
    q, k, v = (np.einsum('td,dnh->tnh', h, layer['attention'][n]['kernel'])
               for n in ('query', 'key', 'value'))
    q, k = rope(q), rope(k)
    k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
    w = np.exp(np.einsum('tnh,snh->nts', q, k) / np.sqrt(8)) * mask
    w = w / np.maximum(w.sum(-1, keepdims=True), 1e-300)
    out = np.einsum('nts,snh->tnh', w, v)
    x = x + np.einsum('tnh,nhd->td', out, layer['attention']['out']['kernel'])
    h = norm(x, layer['mlp_norm']['scale'])
    gate = h @ layer['mlp']['gate']['kernel']
    up = h @ layer['mlp']['up']['kernel']
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer['mlp']['down']['kernel']
  want = norm(x, p['final_norm']['scale']) @ p['embed']['embedding'].T
  got = _logits(CFG, params, tokens, positions, segment_ids)[0]
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_scan_equals_loop():
  params, batch = _params(), _row([7, 5], 14)
  tokens, positions, segment_ids = batch
  sin, cos = attention.rope_angles(
      positions, CFG.head_dim, CFG.rope_theta)
  mask = attention.make_mask(segment_ids)
  x = params['embed']['embedding'][tokens[0]]
  blocks = nnx.eval_shape(lambda: transformer.Block(CFG, nnx.Rngs(params=0)))
  graphdef = nnx.split(blocks)[0]
  for i in range(CFG.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    x = nnx.merge(graphdef, nnx.State(layer))(x, sin, cos, mask)
  model = nnx.merge(transformer.make_model(CFG), nnx.State(params))
  got = transformer.hidden(CFG, params, *batch)
  np.testing.assert_allclose(got[0], model.final_norm(x), atol=1e-5)


@pytest.mark.parametrize('change', [
    {'remat': 'full'}, {'remat': 'dots'}, {'unroll': 2}])
def test_remat_and_unroll_change_nothing(change):
  params, batch = _params(), _row([7, 5], 14)
  cfg = dataclasses.replace(CFG, **change)
  _assert_close(_logits(cfg, params, *batch), _logits(CFG, params, *batch))
  _assert_close(_grads(cfg, params, batch), _grads(CFG, params, batch))


def test_packed_equals_unpacked():
  params = _params()
  tokens, positions, segment_ids = _row([7, 5, 4], 20)
  packed = _logits(CFG, params, tokens, positions, segment_ids)[0]
  packed_grads = _grads(CFG, params, (tokens, positions, segment_ids))
  grads = jax.tree.map(jnp.zeros_like, params)
  for start, length in ((0, 7), (7, 5), (12, 4)):
    alone = _row([length], 20)  # one shape: compiled once
    alone[0][0, :length] = tokens[0, start:start + length]
    logits = _logits(CFG, params, *alone)[0, :length]
    np.testing.assert_allclose(
        logits, packed[start:start + length], atol=1e-5)
    grads = jax.tree.map(jnp.add, grads, _grads(CFG, params, alone))
  _assert_close(packed_grads, grads)


def _input_gradient(batch, position):
  """Returns d(logits at position)/d(embedded input), [T,D] magnitudes."""
  params = _params()
  tokens, positions, segment_ids = batch
  # One vocabulary row for each place, so that its gradient is the place's.
  place = np.arange(tokens.shape[1], dtype=np.int32)[None]
  table = params['embed']['embedding'][tokens[0]]
  cfg = dataclasses.replace(
      CFG, vocab_size=len(table), tie_embeddings=False)
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
  got, want = (_logits(CFG, params, t, positions, segment_ids)[0, 7:12]
               for t in (changed, tokens))
  np.testing.assert_array_equal(got, want)


def test_padding_side_does_not_matter():
  params = _params()
  tokens, positions, segment_ids = _row([7], 14)
  right = _logits(CFG, params, tokens, positions, segment_ids)[0, :7]
  left = [np.roll(x, 7, axis=1) for x in (tokens, positions, segment_ids)]
  np.testing.assert_allclose(
      _logits(CFG, params, *left)[0, 7:], right, atol=1e-5)


def test_all_padding_is_finite():
  params = _params()
  batch = tuple(np.zeros((2, 8), np.int32) for _ in range(3))
  assert np.all(np.isfinite(_logits(CFG, params, *batch)))

  def everything(params):
    return _logits(CFG, params, *batch).sum()

  for grad in jax.tree.leaves(jax.jit(jax.grad(everything))(params)):
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize('change', [{'rope_theta': 5e5}, {'norm_eps': 0.5}])
def test_config_values_reach_the_computation(change):
  params, batch = _params(), _row([12], 12)
  other = _logits(dataclasses.replace(CFG, **change), params, *batch)
  want = _logits(CFG, params, *batch)
  assert np.abs(other - want).max() > 1e-2
  if 'rope_theta' in change:  # position 0 is not rotated
    np.testing.assert_allclose(other[0, 0], want[0, 0], atol=1e-5)


def test_grouped_query_equals_multi_head_with_repeated_kernels():
  params, batch = _params(), _row([12], 12)
  heads = params['layers']['attention']
  repeated = heads | {
      name: {'kernel': jnp.repeat(heads[name]['kernel'], 2, axis=2)}
      for name in ('key', 'value')}
  wide = params | {'layers': params['layers'] | {'attention': repeated}}
  cfg = dataclasses.replace(CFG, num_kv_heads=CFG.num_heads)
  _assert_close(
      _logits(cfg, wide, *batch), _logits(CFG, params, *batch))


def test_untied_head_is_used():
  cfg = dataclasses.replace(CFG, tie_embeddings=False)
  params, batch = _params(cfg), _row([12], 12)
  hidden = transformer.hidden(cfg, params, *batch)
  np.testing.assert_allclose(
      _logits(cfg, params, *batch), hidden @ params['lm_head']['kernel'],
      atol=1e-4)


def test_bfloat16_is_close_and_logits_are_float32():
  cfg = dataclasses.replace(CFG, dtype='bfloat16', param_dtype='bfloat16')
  params, batch = _params(cfg), _row([12], 12)
  assert params['embed']['embedding'].dtype == jnp.bfloat16
  got = _logits(cfg, params, *batch)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  want = _logits(CFG, wide, *batch)
  assert transformer.hidden(cfg, params, *batch).dtype == jnp.bfloat16
  assert got.dtype == jnp.float32
  assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_match_init_starts_with_query_heads_equal_to_their_key_head():
  cfg = dataclasses.replace(CFG, match_init=True)
  heads = transformer.init_params(cfg, 0)['layers']['attention']
  query, key = (np.asarray(heads[n]['kernel']) for n in ('query', 'key'))
  np.testing.assert_array_equal(query[:, :, ::2], key)
  assert not np.any(query[:, :, 1::2] == key)
