"""LoRA adapters: split from the weights that they adapt, merged into them, and in PEFT's form.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from csrm_jax.core import files
from csrm_jax.models import hf, shards, transformer
from csrm_jax.models.config import LORA_TARGETS, ModelConfig

NAMES = ('lora_a', 'lora_b')
CONFIG_FILE = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'
# Hugging Face's names of the products in LORA_TARGETS: q_proj is query, and so on.
_MODULES = {
  entry.theirs.split('.')[-2]: name
  for entry in hf.TABLE
  if (name := entry.ours.split('/')[-2]) in LORA_TARGETS
}
# What an adapter of PEFT may have and ours may not; absent and empty are fine.
_UNSUPPORTED = (
  *('use_rslora', 'use_dora', 'fan_in_fan_out', 'lora_bias', 'rank_pattern', 'alpha_pattern'),
  *('layers_to_transform', 'layer_replication', 'modules_to_save', 'trainable_token_indices'),
  *('target_parameters', 'exclude_modules'),
)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (adapters, base): two nested dicts that together are `params`."""
  parts = ({}, {})
  for path, leaf in flatten_dict(params).items():
    parts[path[-1] not in NAMES][path] = leaf
  return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def init(cfg: ModelConfig, seed: int) -> dict[str, Any]:
  """Returns new float32 adapters, whose product is 0, without making any other weight."""
  _check_has_adapters(cfg)
  # Under jit what is not returned is never computed: the base takes no memory here.
  return jax.jit(lambda: split(transformer.init_params(cfg, seed))[0])()


def merge(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the params of the same model without adapters, given cfg with them.

  Kernels become kernel + alpha / rank · a·b, summed in float32 and rounded to the kernel's dtype:
  in bfloat16, small adapters lose digits here.
  """
  _check_has_adapters(cfg)
  adapters, base = (flatten_dict(part, sep='/') for part in split(params))
  want = {slot.entry.ours for slot in hf.lora_slots(cfg).values()}
  hf.check_names(set(adapters), want, 'adapters')
  scale = cfg.lora_alpha / cfg.lora_rank
  for a in filter(lambda name: name.endswith('/lora_a'), adapters):
    b, kernel = (a.removesuffix('lora_a') + name for name in ('lora_b', 'kernel'))
    base[kernel] = _merge_kernel(base[kernel], adapters[a], adapters[b], scale)
  return unflatten_dict(base, sep='/')


def save_peft(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  adapters: Mapping[str, Any],
  base_name: str,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes the adapters of the weights `base_name` (a folder or hub id) as PEFT reads them."""
  _check_has_adapters(cfg)
  folder = pathlib.Path(folder)
  tensors = hf.to_theirs(flatten_dict(adapters, sep='/'), hf.lora_slots(cfg), 'adapters')
  shards.write_file(folder / WEIGHTS_FILE, tensors, metadata or {})
  shards.write_json(
    folder / CONFIG_FILE,
    {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'base_model_name_or_path': base_name,
      'r': cfg.lora_rank,
      'lora_alpha': cfg.lora_alpha,
      'lora_dropout': 0.0,
      'bias': 'none',
      'target_modules': [theirs for theirs, ours in _MODULES.items() if ours in cfg.lora_targets],
      'inference_mode': True,
    },
  )


def read_peft(folder: str | os.PathLike) -> dict[str, Any]:
  """Returns the fields lora_rank, lora_alpha and lora_targets of ModelConfig."""
  path = pathlib.Path(folder) / CONFIG_FILE
  try:
    spec = files.read_json(path, dict)
    kind, modules = spec['peft_type'], spec['target_modules']
    rank, alpha = int(spec['r']), float(spec['lora_alpha'])
    modules = [modules] if isinstance(modules, str) else modules
    if rank != spec['r'] or not all(isinstance(module, str) for module in modules):
      raise ValueError('r is no whole number, or target_modules no list of texts')
  except (ValueError, LookupError, TypeError, OverflowError) as error:
    raise ValueError(
      f'{path}: cannot be read as the config of a LoRA adapter ({error}); '
      'give a folder that PEFT or csrm_jax wrote.'
    ) from None
  found = {'peft_type': kind, 'bias': spec.get('bias', 'none')}
  for name, value in {'peft_type': 'LORA', 'bias': 'none'}.items():
    if found[name] != value:
      raise ValueError(
        f'{path}: {name} is {found[name]!r}, only {value!r} is supported; give another adapter.'
      )
  for name in _UNSUPPORTED:
    if spec.get(name):
      raise ValueError(
        f'{path}: {name} is {spec[name]!r}, which is not supported; give another adapter.'
      )
  for module in modules:
    if module not in _MODULES:
      raise ValueError(
        f'{path}: the LoRA target {module!r} matches no layer; choose from {", ".join(_MODULES)}.'
      )
  targets = {_MODULES[module] for module in modules}
  return {
    'lora_rank': rank,
    'lora_alpha': alpha,
    'lora_targets': tuple(t for t in LORA_TARGETS if t in targets),
  }


def load_peft(folder: str | os.PathLike, cfg: ModelConfig, shardings: Any = None) -> dict[str, Any]:
  """Returns the float32 adapters that PEFT or save_peft wrote.

  cfg must have the fields that read_peft returns; shardings are those of hf.load_params.
  """
  folder = pathlib.Path(folder)
  for name, value in read_peft(folder).items():
    ours = getattr(cfg, name)
    # Targets are a set, which a config may list in any order.
    if name == 'lora_targets':
      ours = tuple(target for target in LORA_TARGETS if target in ours)
    if ours != value:
      raise ValueError(
        f'{folder}: {name} is {value!r} there and {ours!r} in the model config; make them equal.'
      )
  path = folder / WEIGHTS_FILE
  tensors = shards.open_file(path)
  return hf.fill(hf.lora_slots(cfg), tensors, str(path), jnp.dtype(jnp.float32), shardings)


def digest(folder: str | os.PathLike) -> str:
  """Returns the sha256 (hex) of the adapters that PEFT or save_peft wrote; see shards.digest."""
  return shards.digest(shards.open_file(pathlib.Path(folder) / WEIGHTS_FILE))


def _check_has_adapters(cfg: ModelConfig) -> None:
  if not cfg.lora_rank:
    raise ValueError('lora_rank=0: the model has no adapters; set a rank.')


@jax.jit
def _merge_kernel(kernel, a, b, scale):
  """Returns kernel [L,*in,*out] plus scale · a·b."""
  L, r = a.shape[0], a.shape[-1]
  # By default accelerators multiply float32 with fewer digits.
  product = jnp.einsum(
    'LIR,LRO->LIO', a.reshape(L, -1, r), b.reshape(L, r, -1), precision=jax.lax.Precision.HIGHEST
  )
  merged = kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)
  return merged.astype(kernel.dtype)
