"""LoRA adapters apart from the weights they adapt.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax

from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig

NAMES = ('lora_a', 'lora_b')


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (adapters, base): two nested dicts whose merge is `params`."""
  flat = flax.traverse_util.flatten_dict(dict(params))
  parts = ({}, {})
  for path, leaf in flat.items():
    parts[path[-1] not in NAMES][path] = leaf
  adapters, base = map(flax.traverse_util.unflatten_dict, parts)
  return adapters, base


def init(cfg: ModelConfig, seed: int) -> dict[str, Any]:
  """Returns new float32 adapters, whose product is 0; no other weight is made.

  Raises:
    ValueError: cfg has no adapters.
  """
  if not cfg.lora_rank:
    raise ValueError('lora_rank=0: the model has no adapters; set a rank.')
  # What is not returned is never computed.
  return jax.jit(lambda: split(transformer.init_params(cfg, seed))[0])()
