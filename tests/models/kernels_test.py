import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import attention, config as model_config

B, T, N, K, H = 2, 24, 4, 2, 8
SEGMENT_IDS = jnp.asarray([[1] * 9 + [2] * 10 + [0] * 5, [1] * T])
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
    ends = jnp.asarray([[19] * 4 + [9] * 5 + [19] * 10 + [0] * 5, [T] * T])
    positions = jnp.asarray([[*range(9), *range(4, 14), *[0] * 5], [*range(T)]])
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
  assert not np.any(fast(*qkv)[0, -5:])  # padding
  grads, want = (jax.grad(functools.partial(loss, f))(qkv) for f in (fast, reference))
  for grad, other in zip(grads, want, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-5 * np.abs(other).max())


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
  assert attention.make_kernel(_cfg(attention_softcap=5.0, **half)) is None


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
