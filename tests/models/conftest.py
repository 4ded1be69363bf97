"""One small model of every kind, with no number at its default."""

import dataclasses

import jax
import numpy as np
import pytest

from csrm_jax.models import config, transformer
from tests import small

CFG = small.model(num_layers=5, rope_theta=5e5, norm_eps=3e-6, context_length=99)
GEMMA = dataclasses.replace(
  CFG,
  family='gemma2',
  norm_offset=1.0,
  activation='gelu_tanh',
  scale_embeddings=True,
  query_scale=24.0,
  attention_softcap=20.0,
  final_softcap=10.0,
  post_norms=True,
  sliding_window=7,
  window_period=2,
)
MODELS = {
  'llama': CFG,
  'llama3': dataclasses.replace(
    CFG, tie_embeddings=False, rope_scaling=config.RopeScaling(4.0, 1.0, 3.0, 64)
  ),
  'mistral': dataclasses.replace(CFG, family='mistral', sliding_window=7),
  'mistral_all': dataclasses.replace(CFG, family='mistral'),
  'qwen3': dataclasses.replace(CFG, family='qwen3', qk_norm=True),
  'qwen3_window': dataclasses.replace(
    CFG, family='qwen3', qk_norm=True, sliding_window=7, window_period=3
  ),
  'gemma2': GEMMA,
  'gemma2_plain': dataclasses.replace(
    GEMMA,
    attention_softcap=0.0,
    final_softcap=0.0,
    activation='silu',
    sliding_window=0,
    window_period=1,
    query_scale=16.0,
  ),
}


@pytest.fixture(params=MODELS)
def family_cfg(request):
  """The ModelConfig of each of MODELS, in turn."""
  return MODELS[request.param]


@pytest.fixture
def family_cfgs():
  """All of MODELS."""
  return MODELS


@pytest.fixture
def make_params():
  """(cfg, seed) -> parameters of a model, all random, with nothing compiled."""

  def make(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
      lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), transformer.shapes(cfg)
    )

  return make
