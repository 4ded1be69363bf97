"""What many prompts begin with, read once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig


def num_common(prompts: Sequence[Sequence[int]]) -> int:
  """Returns how many first tokens all prompts share.

  The last token of each stays out of it, whatever it is: what is asked of a
  model is read off there.
  """
  size = min(map(len, prompts)) - 1
  heads = np.array([prompt[:size] for prompt in prompts])
  same = (heads == heads[0]).all(axis=0)
  return int(size if same.all() else same.argmin())


@functools.lru_cache(maxsize=32)
def make_reader(cfg: ModelConfig) -> Callable[..., dict]:
  """Returns a jitted (params, tokens, segment_ids) -> transformer's prefix.

  Of tokens and segment_ids int32 [1,P]: 1, or 0 for padding on the right.
  """

  def read(params, tokens, segment_ids):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    _, cache = transformer.prefill(
      cfg, params, tokens, positions, segment_ids, length=tokens.shape[1]
    )
    return cache

  return jax.jit(read)
