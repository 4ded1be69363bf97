import dataclasses
import functools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from csrm_jax.models import sampling as sampling_lib, transformer
from csrm_jax.models.sampling import Sampling, generate
from tests import small

CFG = small.model(head_dim=8, context_length=64, tie_embeddings=False)
VARIANTS = {
  'llama': {},
  'gemma2': {
    'norm_offset': 1.0,
    'scale_embeddings': True,
    'attention_softcap': 5.0,
    'final_softcap': 9.0,
    'post_norms': True,
    'sliding_window': 4,
    'window_period': 2,
  },
  'mistral': {'sliding_window': 4, 'tie_embeddings': True},
}
PROMPTS = [[1, 2, 3], [7], list(range(4, 24)), [5] * 9, [39, 0, 8, 8]]


@functools.lru_cache
def _params(cfg=CFG):
  # Far from uniform, so that the likeliest token is never a near tie.
  return jax.tree.map(lambda x: 3.0 * x, transformer.init_params(cfg, 0))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _score(cfg, params, tokens, positions, segment_ids, temperature):
  """Returns the log-probability of each token but the first, [B,T-1]."""
  hidden = transformer.hidden(cfg, params, tokens, positions, segment_ids)
  return sampling_lib.hidden_logprobs(cfg, params, hidden[:, :-1], tokens[:, 1:], temperature)


def _padded_logits(cfg, row):
  """Returns logits [T,V] of one row; zeros behind it, which is causal, save compiling."""
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, : len(row)] = row
  positions = np.arange(64, dtype=np.int32)[None]
  found = small.logits(cfg, _params(cfg), tokens, positions, np.ones_like(tokens))
  return np.asarray(found)[0, : len(row)]


def _log_softmax(logits):
  return special.log_softmax(np.asarray(logits, np.float64), axis=-1)


@pytest.mark.parametrize('name', VARIANTS)
def test_greedy_equals_the_full_forward_pass_token_by_token(name):
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  out = generate(cfg, _params(cfg), PROMPTS, Sampling(12, temperature=0.0))
  assert out.tokens.shape == (5, 12) and out.tokens.dtype == np.int32
  assert not out.stopped.any() and (out.lengths == 12).all()
  assert len(np.unique(out.tokens)) > 5
  for i, prompt in enumerate(PROMPTS):
    row = list(prompt)
    for step in range(12):
      logits = _padded_logits(cfg, row)[-1]
      assert out.tokens[i, step] == np.argmax(logits), (i, step)
      row.append(out.tokens[i, step])
    want = _log_softmax(_padded_logits(cfg, row))[len(prompt) - 1 : -1]
    want = want[np.arange(12), out.tokens[i]]
    gap = np.abs(out.logprobs[i] - want).max()
    assert gap < 1e-4, gap


@pytest.mark.parametrize('name', VARIANTS)
def test_logprobs_equal_teacher_forced_ones(name):
  """At a temperature; over the whole vocabulary in spite of top_k."""
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  out = generate(cfg, _params(cfg), PROMPTS, Sampling(12, temperature=1.7, top_k=9))
  shape = (len(PROMPTS), 32)
  tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in '123')
  for i, prompt in enumerate(PROMPTS):
    row = [*prompt, *out.tokens[i]]
    tokens[i, : len(row)] = row
    positions[i, : len(row)] = np.arange(len(row))
    segment_ids[i, : len(row)] = 1
  got = _score(cfg, _params(cfg), tokens, positions, segment_ids, 1.7)
  assert got.dtype == jnp.float32
  for i, prompt in enumerate(PROMPTS):
    forced = got[i, len(prompt) - 1 : len(prompt) + 11]
    gap = np.abs(forced - out.logprobs[i]).max()
    assert gap < 1e-4, gap


@pytest.mark.parametrize('chunk', [1, 7, 2048])
def test_hidden_logprobs_in_chunks(chunk, monkeypatch):
  monkeypatch.setattr(sampling_lib, 'LOGPROB_CHUNK', chunk)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 40, (2, 11)).astype(np.int32)
  hidden = rng.normal(size=(2, 11, CFG.embed_dim)).astype(np.float32)
  weights = rng.normal(size=(2, 11)).astype(np.float32)

  def total(params, hidden):
    scores = sampling_lib.hidden_logprobs(CFG, params, hidden, tokens, 0.5)
    return (weights * scores).sum(), scores

  def plain(params, hidden):
    scores = jax.nn.log_softmax(transformer.logits(CFG, params, hidden) / 0.5)
    scores = jnp.take_along_axis(scores, tokens[..., None], -1)[..., 0]
    return (weights * scores).sum(), scores

  (got, want), (grads, plain_grads) = zip(
    *(
      jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(_params(), hidden)
      for fn in (total, plain)
    ),
    strict=True,
  )
  np.testing.assert_allclose(got[1], want[1], atol=1e-4)

  def check(a, b):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())

  jax.tree.map(check, grads, plain_grads)


def test_stop_tokens_end_a_completion_and_belong_to_it():
  free = generate(CFG, _params(), PROMPTS, Sampling(12, temperature=0.0))
  stop = int(free.tokens[0, 4]), int(free.tokens[1, 2])
  out = generate(CFG, _params(), PROMPTS, Sampling(12, temperature=0.0, stop_ids=stop))
  for i, row in enumerate(free.tokens):
    hits = np.flatnonzero(np.isin(row, stop))
    length = hits[0] + 1 if hits.size else 12
    assert out.lengths[i] == length and out.stopped[i] == bool(hits.size)
    np.testing.assert_array_equal(out.tokens[i, :length], row[:length])
    np.testing.assert_array_equal(out.logprobs[i, :length], free.logprobs[i, :length])
    assert not out.tokens[i, length:].any()
    assert not out.logprobs[i, length:].any()
  assert out.stopped[:2].all() and out.lengths.min() < 12


def test_a_completion_does_not_depend_on_its_batch():
  sampling = Sampling(12, temperature=4.0)
  together = generate(CFG, _params(), PROMPTS, sampling, seed=3)
  apart = generate(CFG, _params(), PROMPTS, sampling, seed=3, batch_size=2)
  np.testing.assert_array_equal(together.tokens, apart.tokens)
  np.testing.assert_allclose(together.logprobs, apart.logprobs, atol=1e-4)
  other = generate(CFG, _params(), PROMPTS, sampling, seed=4)
  assert (other.tokens != together.tokens).any(axis=1).all()
  same = generate(CFG, _params(), [PROMPTS[0]] * 4, sampling)
  assert len({tuple(row) for row in same.tokens.tolist()}) == 4


@pytest.mark.tuned
@pytest.mark.parametrize('name', VARIANTS)
def test_rows_that_are_done_make_room(name, monkeypatch):
  """Prompts that wait come in, the cache goes round and grows, and the last rows go on alone."""
  for constant, value in (('CACHE_LENGTH', 32), ('MIN_ROWS', 1), ('REFILL', 2)):
    monkeypatch.setattr(sampling_lib, constant, value)
  cfg = dataclasses.replace(CFG, **VARIANTS[name])
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, 40, num).tolist() for num in (3, 20, 9, 1, 14, 5, 2, 30, 11, 7)]
  sampling = Sampling(30, temperature=2.0, stop_ids=tuple(range(3)))
  want = generate(cfg, _params(cfg), prompts, sampling, seed=5, batch_size=1)
  assert len(set(want.lengths)) > 5 and want.lengths.max() > 16, want.lengths
  reads, starts = _count_reads(monkeypatch), []
  for rows in (4, 16):
    done = []
    got = generate(
      cfg, _params(cfg), prompts, sampling, seed=5, batch_size=rows, progress=done.append
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_array_equal(got.stopped, want.stopped)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    assert sum(done) == len(prompts)
    starts.append({shape[0] for shape in reads})
    reads.clear()
  assert starts == [{2, 4}, {16}]


def test_a_turn_copies_neither_weights_nor_cache():
  """What the loop's body copies on CPU is far smaller than a layer's kernel or cache."""
  cfg = dataclasses.replace(CFG, embed_dim=64, mlp_dim=256, num_layers=2, context_length=512)
  params = _params(cfg)
  start, go_on = sampling_lib.compiled(cfg, Sampling(9))
  batch = sampling_lib.pad_prompts([(1, 2, 3)] * 4, 4, 0, cfg) | {'draw': np.zeros(4, np.uint32)}
  cache, state = start(params, batch, None, 0)
  cache = transformer.resize(cache, 256)
  limits = np.int32(0), np.int32(9)
  run = go_on.lower(transformer.unstack(params), cache, state, np.uint32(0), *limits).compile()
  text = run.as_text()
  kernels = {x.size for x in jax.tree.leaves(transformer.unstack(params)['layers']) if x.ndim > 1}
  least = min(min(kernels), cache['key'][0].size)
  for shape in re.findall(r'= \w+\[([\d,]+)\]\S* (?:copy|dynamic-slice|transpose)\(', text):
    assert np.prod([int(n) for n in shape.split(',')]) < least, shape


def _count_reads(monkeypatch):
  """Returns the list to which the shape of each reading of tokens will be added.

  As it is traced: compilations of other tests are not reused.
  """
  shapes, hidden = [], transformer.Transformer.hidden

  def counted(self, tokens, *args, **kwargs):
    shapes.append(tokens.shape)
    return hidden(self, tokens, *args, **kwargs)

  sampling_lib.compiled.cache_clear()
  transformer.make_prefix_reader.cache_clear()
  monkeypatch.setattr(transformer.Transformer, 'hidden', counted)
  return shapes


def test_equal_prompts_are_read_once(monkeypatch):
  shapes = _count_reads(monkeypatch)
  prompts = [PROMPTS[i] for i in (0, 1, 3, 1, 1, 3, 0, 1)]
  sampling = Sampling(12, temperature=4.0)
  got = generate(CFG, _params(), prompts, sampling, seed=3)
  assert shapes == [(4, 24)]
  want = generate(CFG, _params(), prompts, sampling, seed=3, batch_size=1)
  assert shapes[1:] == [(1, 24)]
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
  assert len({tuple(row) for row in got.tokens.tolist()}) == 8


@pytest.mark.tuned
@pytest.mark.parametrize(
  ('name', 'window', 'shared'), [('llama', 0, True), ('gemma2', 4, False), ('gemma2', 70, True)]
)
def test_a_common_prefix_is_read_once(name, window, shared, monkeypatch):
  """Where no window counts the padding behind it."""
  shapes = _count_reads(monkeypatch)
  cfg = dataclasses.replace(CFG, **VARIANTS[name] | {'sliding_window': window})
  rng = np.random.default_rng(0)
  system = rng.integers(0, 40, 37).tolist()
  prompts = [system + rng.integers(0, 40, num).tolist() for num in (1, 20, 5)]
  prompts = [*prompts, prompts[1]]
  sampling = Sampling(6, temperature=0.0)
  got = generate(cfg, _params(cfg), prompts, sampling)
  rest = [(1, 32), (4, 32)] if shared else [(4, 64)]
  assert shapes == rest
  for i, prompt in enumerate(prompts):
    row = [*prompt, *got.tokens[i]]
    logits = _padded_logits(cfg, row)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(got.tokens[i], logits.argmax(-1))
    want = _log_softmax(logits)[np.arange(6), got.tokens[i]]
    np.testing.assert_allclose(got.logprobs[i], want, atol=1e-4)


@pytest.mark.parametrize(
  'prompts',
  [[[1] * 40, [1] * 40], [[1] * 40, [2, *[1] * 39]], [[1] * 33, [1] * 20], [[1] * 32, [1] * 33]],
)
def test_a_short_or_lone_prefix_is_not_split_off(prompts):
  distinct = list(dict.fromkeys(map(tuple, prompts)))
  assert not sampling_lib._num_shared(CFG, distinct, Sampling(2))


def test_nothing_is_compiled_after_warm_up(monkeypatch):
  monkeypatch.setattr(sampling_lib, 'PROMPT_BUCKETS', (32, 64))
  sampling = Sampling(6, temperature=0.9, stop_ids=(3,))
  rng = np.random.default_rng(0)

  def prompts(num, lengths):
    return [rng.integers(0, 40, rng.integers(*lengths)).tolist() for _ in range(num)]

  compiled = []
  generate(CFG, _params(), prompts(9, (1, 32)), sampling, batch_size=4)
  generate(CFG, _params(), prompts(9, (33, 58)), sampling, batch_size=4)
  with monkeypatch.context() as patch:
    for name in ('_start', '_go_on'):
      patch.setattr(
        sampling_lib, name, lambda *args: compiled.append(args) or pytest.fail('compiled again')
      )
    for num in (3, 4, 9):
      generate(CFG, _params(), prompts(num, (1, 58)), sampling, batch_size=4)
  assert not compiled
  # The same check sees a shape that is new.
  with monkeypatch.context() as patch, pytest.raises(AssertionError):
    patch.setattr(sampling_lib, '_go_on', lambda *args: (_ for _ in ()).throw(AssertionError))
    generate(CFG, _params(), prompts(2, (1, 9)), sampling, batch_size=2)


def test_progress_counts_prompts():
  done = []
  generate(CFG, _params(), PROMPTS, Sampling(1), batch_size=2, progress=done.append)
  assert done == [2, 2, 1]


def test_no_prompts_give_no_completions():
  out = generate(CFG, _params(), [], Sampling(3))
  assert out.tokens.shape == (0, 3) and out.lengths.shape == (0,)


@pytest.mark.parametrize('temperature', [0.0, 0.5, 1.0])
def test_token_logprobs(temperature):
  logits = np.random.default_rng(4).normal(size=(3, 2, 9)).astype(np.float32)
  tokens = np.array([[0, 1], [2, 8], [4, 4]])
  want = np.take_along_axis(_log_softmax(logits / (temperature or 1.0)), tokens[..., None], -1)
  got = sampling_lib.token_logprobs(jnp.asarray(logits, jnp.bfloat16), tokens, temperature)
  assert got.dtype == jnp.float32
  got = sampling_lib.token_logprobs(jnp.asarray(logits), tokens, temperature)
  np.testing.assert_allclose(got, want[..., 0], atol=1e-5)


@pytest.mark.parametrize(
  ('prompts', 'message'),
  [
    ([[1], []], 'prompt 1 is empty; begin it with a BOS'),
    ([[1] * 60], r'prompt 0 has 60 tokens, .*=8 are more than .*=64; shorten'),
    ([[1, 40]], 'prompt 0 has an id outside of vocab_size=40'),
    ([[-1]], 'prompt 0 has an id outside'),
  ],
)
def test_bad_prompts(prompts, message):
  with pytest.raises(ValueError, match=message):
    generate(CFG, _params(), prompts, Sampling(8))


def test_weights_that_are_not_finite_are_an_error():
  params = jax.tree.map(lambda x: x * jnp.nan, _params())
  with pytest.raises(ValueError, match=r'prompt 0: .*not finite'):
    generate(CFG, params, [[1, 2]], Sampling(3))


_MESHES = """
  import jax, numpy as np
  from csrm_jax.core import mesh as m
  from csrm_jax.models import config, sampling, transformer
  from csrm_jax.rl import online

  cfg = config.ModelConfig(
      vocab_size=40, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
      head_dim=8, mlp_dim=48, context_length=96, tie_embeddings=False)
  # All begin with the same tokens, and some are given twice.
  prompts = [[*range(33), i % 2, *range(i % 3)] for i in range(12)]
  options = sampling.Sampling(9, temperature=2.0, stop_ids=tuple(range(12)))

  def draw(sizes):
    mesh = m.make_mesh(*sizes, devices=jax.devices()[:int(np.prod(sizes))])
    params = jax.tree.map(lambda x: 3 * x, transformer.init_params(cfg, 0))
    with jax.set_mesh(m.make_mesh(1, 8)):  # what is trained on
      cut = jax.device_put(params, m.shardings(params, m.make_mesh(1, 8)))
      _, copy = online.sampling_copy(cfg, cut, '', mesh)
      done = sampling.generate(cfg, copy, prompts, options, batch_size=8)
      row = {'tokens': np.array([prompts[2][:8]] * 8)}
      row['segment_ids'] = np.ones_like(row['tokens'])
      row |= {'active': np.ones(8, bool), 'draw': np.zeros(8, np.uint32)}
      with m.of(copy):
        cache, _ = sampling.compiled(cfg, options)[0](copy, row, None, 0)
    return done, cache

  want, _ = draw((1, 1, 1))
  assert len(set(want.lengths)) > 3, want.lengths
  for sizes in ((4, 1, 2), (2, 2, 2), (1, 8, 1)):
    got, cache = draw(sizes)
    np.testing.assert_array_equal(got.tokens, want.tokens, str(sizes))
    np.testing.assert_array_equal(got.stopped, want.stopped)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    for name in ('key', 'value'):  # each layer's [B,K,...]
      shard = cache[name][0].addressable_shards[0].data.shape
      assert shard[:2] == (8 // (sizes[0] * sizes[1]), 2 // sizes[2]), shard
"""


@pytest.mark.tuned
def test_eight_devices_draw_what_one_does():
  small.run_on_devices(8, textwrap.dedent(_MESHES))
