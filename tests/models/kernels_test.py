import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import attention, config as model_config, transformer

B, T, N, K, H = 2, 25, 4, 2, 8  # an odd length
SEGMENT_IDS = jnp.asarray([[1] * 9 + [2] * 10 + [0] * 6, [1] * T])
MAKERS = {
  'splash': functools.partial(attention.make_splash, interpret=True),
  'cudnn': functools.partial(attention.make_cudnn, implementation='xla'),
}


def _qkv():
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, K, K)]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('window', [0, 5])
@pytest.mark.parametrize(('kernel', 'cap'), [('splash', 0.0), ('splash', 2.0), ('cudnn', 0.0)])
def test_kernels_equal_the_reference(kernel, cap, window, shared):
  mask = attention.make_mask(SEGMENT_IDS, window)
  if shared:
    # In the first row segment 2 continues the first four tokens of segment 1.
    ends = jnp.asarray([[19] * 4 + [9] * 5 + [19] * 10 + [0] * 6, [T] * T])
    positions = jnp.asarray([[*range(9), *range(4, 14), *[0] * 6], [*range(T)]])
    mask = attention.make_shared_mask(ends, positions, window)
  run = MAKERS[kernel](window, cap=cap)

  def loss(attend, qkv):
    return (attend(*qkv) ** 2 * jnp.arange(T)[:, None, None]).sum()

  def reference(*qkv):
    return attention.attend(*qkv, mask, cap=cap)

  def fast(*qkv):
    return run(*qkv, SEGMENT_IDS, mask if shared else None)

  qkv = _qkv()
  jax.eval_shape(fast, *qkv)  # it can be traced
  np.testing.assert_allclose(fast(*qkv), reference(*qkv), atol=2e-6)
  assert not np.any(fast(*qkv)[0, -6:])  # padding
  grads, want = (jax.grad(functools.partial(loss, f))(qkv) for f in (fast, reference))
  for grad, other in zip(grads, want, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-5 * np.abs(other).max())


def test_a_model_for_gpus_reads_as_on_a_cpu(monkeypatch):
  """Packed rows, and shared tokens behind a prefix, through cuDNN's path."""
  cfg = _cfg(dtype='bfloat16', num_layers=1, unroll=1)
  params = transformer.init_params(cfg, 0)
  tokens = jax.random.randint(jax.random.key(1), (B, T), 1, 512)
  places = jnp.broadcast_to(jnp.arange(T), (B, T))
  ends = jnp.full((B, T), T).at[0, 7:12].set(12).at[0, 20:].set(0)
  ids = (ends > 0).astype(jnp.int32)

  @jax.jit
  def read(params):
    prefix = transformer.read_prefix(cfg, params, tokens[:1], places[:1], ids[:1])
    packed = transformer.hidden(cfg, params, tokens, places, ids)
    return packed, transformer.hidden(cfg, params, tokens, T + places, ids, prefix, ends)

  want, used = read(params), []

  def make(*args, **kwargs):
    used.append(args)
    return MAKERS['cudnn'](*args, **kwargs)

  monkeypatch.setattr(attention.mesh_lib, 'platform', lambda: 'gpu')
  monkeypatch.setattr(attention, 'make_cudnn', make)
  jax.clear_caches()
  for found, other in zip(read(params), want, strict=True):
    assert jnp.abs(found - other)[ids > 0].max() < 0.03 * jnp.abs(other).max()
  assert len(used) == 6  # a local and a global one for each of three readings


def _cfg(**fields):
  return model_config.preset('tiny', 512, **fields)


def test_the_kernel_follows_the_platform(monkeypatch):
  half = {'dtype': 'bfloat16'}
  assert attention.make_kernel(_cfg()) is None
  monkeypatch.setattr(attention.mesh_lib, 'platform', lambda: 'tpu')
  assert attention.make_kernel(_cfg())
  monkeypatch.setattr(attention.mesh_lib, 'platform', lambda: 'gpu')
  assert attention.make_kernel(_cfg(**half))
  # What cuDNN does not have is left to XLA.
  assert attention.make_kernel(_cfg()) is None
  assert attention.make_kernel(_cfg(head_dim=256, **half)) is None
  assert attention.make_kernel(_cfg(head_dim=36, **half)) is None
  assert attention.make_kernel(_cfg(attention_softcap=5.0, **half)) is None
  # Or to who says so.
  assert attention.make_kernel(_cfg(attention='xla', **half)) is None
  with pytest.raises(ValueError, match='attention=kernel: on gpu there is none for this model'):
    attention.make_kernel(_cfg(attention='kernel'))


def test_layers_alternate_between_window_and_none(monkeypatch):
  """Gemma 2's layers: which of the two kernels runs is known at run time."""
  monkeypatch.setattr(attention.mesh_lib, 'platform', lambda: 'tpu')
  monkeypatch.setattr(attention, 'make_splash', MAKERS['splash'])
  kernel = attention.make_kernel(_cfg(sliding_window=5, window_period=2))
  qkv = _qkv()
  for has_window in (True, False):
    mask = attention.make_mask(SEGMENT_IDS, 5 if has_window else 0)
    np.testing.assert_allclose(
      kernel(*qkv, SEGMENT_IDS, jnp.bool_(has_window)), attention.attend(*qkv, mask), atol=2e-6
    )
