import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from csrm_jax.models import config, transformer
from tests import small

CFG = small.model(embed_dim=6, head_dim=8, lora_rank=3, lora_alpha=12.0, lora_targets=('out',))
RNG = np.random.default_rng(0)


def _dense(name, cfg=CFG):
  """Returns a layer from axes [2,3] to [5] whose adapter is not zero."""
  layer = transformer.Dense(cfg, name, (2, 3), (5,), std=1.0, rngs=nnx.Rngs(params=0, lora=1))
  if layer.lora_scale:
    layer.lora_b[...] = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
  return layer


def test_dense_adds_its_adapter():
  layer = _dense('out')
  x = RNG.normal(size=(7, 2, 3)).astype(np.float32)
  kernel, a, b = (
    np.asarray(p[...], np.float64).reshape(size)
    for p, size in ((layer.kernel, (6, 5)), (layer.lora_a, (6, 3)), (layer.lora_b, (3, 5)))
  )
  want = x.reshape(7, 6) @ (kernel + 12.0 / 3 * a @ b)
  np.testing.assert_allclose(layer(x), want, atol=1e-4)


def test_only_targets_have_adapters():
  assert not hasattr(_dense('query'), 'lora_a')
  without = _dense('out', dataclasses.replace(CFG, lora_rank=0))
  assert not hasattr(without, 'lora_a')
  np.testing.assert_array_equal(without.kernel[...], _dense('out').kernel[...])


def test_adapters_stay_float32_beside_a_bfloat16_kernel():
  layer = _dense('out', dataclasses.replace(CFG, dtype='bfloat16', param_dtype='bfloat16'))
  assert layer.kernel.dtype == jnp.bfloat16
  assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32
  assert layer(jnp.ones((1, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('offset', [0.0, 1.0])
def test_norm_starts_at_one_whatever_the_offset(offset):
  norm = transformer.RMSNorm(dataclasses.replace(CFG, norm_offset=offset), 6)
  x = RNG.normal(size=(4, 6)).astype(np.float32)
  want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(norm(x), want, atol=1e-5)
  norm.scale[...] += 0.5
  np.testing.assert_allclose(norm(x), 1.5 * want, atol=1e-5)


def test_gemma_rounds_the_embedding_scale():
  cfg = dataclasses.replace(CFG, scale_embeddings=True, dtype='bfloat16')
  embed = transformer.Embed(cfg, nnx.Rngs(params=0))
  got = embed(jnp.array([[3, 5]]))
  rows = embed.embedding[...][jnp.array([3, 5])].astype(jnp.bfloat16)
  want = rows * jnp.bfloat16(6**0.5)
  assert got.dtype == jnp.bfloat16 and float(jnp.bfloat16(6**0.5)) != 6**0.5
  np.testing.assert_array_equal(got, want)


def test_activations_differ():
  x = jnp.linspace(-3, 3, 7)
  silu, gelu = (transformer.ACTIVATIONS[name](x) for name in config.ACTIVATIONS)
  np.testing.assert_allclose(silu, x * jax.nn.sigmoid(x), atol=1e-6)
  # The tanh form, not the exact one, which is 5e-4 away.
  tanh = 0.5 * x * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
  np.testing.assert_allclose(gelu, tanh, atol=1e-6)
