"""Weights on disk in the Hugging Face layout of Llama models.

A folder holds config.json and model.safetensors, as save_pretrained writes
them. One table of names serves both directions.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig

WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'


class Entry(NamedTuple):
  """A parameter's two names.

  Attributes:
    ours: path in the nested dict; under layers/ it has a leading axis L.
    theirs: tensor name, with the number of the layer as {}.
    num_in: leading axes of our kernel that are inputs. Theirs is [out, in],
      each flattened. 0: stored as it is.
  """

  ours: str
  theirs: str
  num_in: int


_LAYER = 'model.layers.{}.'
TABLE = (
    Entry('embed/embedding', 'model.embed_tokens.weight', 0),
    Entry('layers/attention_norm/scale', _LAYER + 'input_layernorm.weight', 0),
    Entry('layers/attention/query/kernel',
          _LAYER + 'self_attn.q_proj.weight', 1),
    Entry('layers/attention/key/kernel', _LAYER + 'self_attn.k_proj.weight', 1),
    Entry('layers/attention/value/kernel',
          _LAYER + 'self_attn.v_proj.weight', 1),
    Entry('layers/attention/out/kernel', _LAYER + 'self_attn.o_proj.weight', 2),
    Entry('layers/mlp_norm/scale',
          _LAYER + 'post_attention_layernorm.weight', 0),
    Entry('layers/mlp/gate/kernel', _LAYER + 'mlp.gate_proj.weight', 1),
    Entry('layers/mlp/up/kernel', _LAYER + 'mlp.up_proj.weight', 1),
    Entry('layers/mlp/down/kernel', _LAYER + 'mlp.down_proj.weight', 1),
    Entry('final_norm/scale', 'model.norm.weight', 0),
    Entry('lm_head/kernel', 'lm_head.weight', 1),
)

# Fields of config.json that are numbers of ours.
_FIELDS = {
    'vocab_size': 'vocab_size',
    'num_hidden_layers': 'num_layers',
    'hidden_size': 'embed_dim',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'head_dim': 'head_dim',
    'intermediate_size': 'mlp_dim',
    'rms_norm_eps': 'norm_eps',
    'tie_word_embeddings': 'tie_embeddings',
}
# What a Llama may have and this decoder has not.
_REQUIRED = {
    'model_type': 'llama', 'hidden_act': 'silu', 'attention_bias': False,
    'mlp_bias': False, 'rope_scaling': None,
}


def save(
    folder: str | os.PathLike, cfg: ModelConfig, params: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None
) -> None:
  """Writes config.json and model.safetensors; the weights appear whole.

  Args:
    folder: made if absent.
    cfg: the model's shape.
    params: as from init_params, in any dtype.
    metadata: strings for the header of the weights, such as how they were
      made.

  Raises:
    ValueError: params are not those of cfg.
  """
  folder = pathlib.Path(folder)
  flat = flax.traverse_util.flatten_dict(dict(params), sep='/')
  _check_names(set(flat), set(_shapes(cfg)), 'params')
  tensors = {}
  for entry in TABLE:
    if entry.ours not in flat:
      continue
    array = np.asarray(flat[entry.ours])
    stacked = entry.ours.startswith('layers/')
    for i, part in enumerate(array if stacked else [array]):
      tensors[entry.theirs.format(i)] = _to_theirs(part, entry.num_in)
  folder.mkdir(parents=True, exist_ok=True)
  dtype = str(flat['embed/embedding'].dtype)
  _replace(folder / CONFIG_FILE, json.dumps(
      to_hf_config(cfg, dtype), indent=2, sort_keys=True).encode() + b'\n')
  _replace(folder / WEIGHTS_FILE, safetensors.numpy.save(
      tensors, metadata={'format': 'pt', **(metadata or {})}))


def load(
    folder: str | os.PathLike, **overrides
) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns (cfg, params) of a folder; overrides as in load_config."""
  cfg = load_config(folder, **overrides)
  return cfg, load_params(folder, cfg)


def load_config(folder: str | os.PathLike, **overrides) -> ModelConfig:
  """Returns the ModelConfig that a folder's config.json describes.

  Args:
    folder: has config.json.
    **overrides: fields that are no property of the weights: dtype,
      param_dtype, remat, match_init, unroll.

  Raises:
    ValueError: not a config of a model that this decoder computes.
  """
  path = pathlib.Path(folder) / CONFIG_FILE
  try:
    spec = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(
        f'{path}: cannot be read as JSON ({error}); give a folder that '
        'save_pretrained or csrm_jax wrote.') from None
  for name, value in _REQUIRED.items():
    if spec.get(name, value) != value:
      raise ValueError(
          f'{path}: {name} is {spec[name]!r}, only {value!r} is supported; '
          'choose another model.')
  spec.setdefault('num_key_value_heads', spec.get('num_attention_heads'))
  spec.setdefault('tie_word_embeddings', False)
  if spec.get('head_dim') is None and 'hidden_size' in spec:
    spec['head_dim'] = spec['hidden_size'] // spec['num_attention_heads']
  missing = [name for name in _FIELDS if name not in spec]
  if missing:
    raise ValueError(
        f'{path}: has no {missing[0]!r}; give the config.json of a Llama.')
  fields = {ours: spec[theirs] for theirs, ours in _FIELDS.items()}
  rope = spec.get('rope_parameters') or {}
  if rope.get('rope_type', 'default') != 'default':
    raise ValueError(
        f'{path}: rope_type is {rope["rope_type"]!r}, only "default" is '
        'supported; choose another model.')
  fields['rope_theta'] = float(
      rope.get('rope_theta', spec.get('rope_theta', 10_000.0)))
  fields['param_dtype'] = spec.get('dtype', spec.get('torch_dtype', 'float32'))
  return ModelConfig(**(fields | overrides))


def load_params(
    folder: str | os.PathLike, cfg: ModelConfig
) -> dict[str, Any]:
  """Returns the folder's weights as a nested dict of cfg.param_dtype arrays.

  Raises:
    ValueError: the folder holds another backbone than cfg, or a tensor is
      missing, unused or of another shape; names file and tensor.
  """
  path = pathlib.Path(folder) / WEIGHTS_FILE
  run_time = {name: getattr(cfg, name)
              for name in ('dtype', 'param_dtype', 'remat', 'match_init',
                           'unroll')}
  stored = load_config(folder, **run_time)
  for name, value in stored.to_dict().items():
    if value != getattr(cfg, name):
      raise ValueError(
          f'{path.parent}: weights of another backbone: {name} is {value!r} '
          f'there and {getattr(cfg, name)!r} in the model config; make them '
          'equal.')
  tensors = _read(path)
  entries = [entry for entry in TABLE if entry.ours in _shapes(cfg)]
  wanted = {entry.theirs.format(i)
            for entry in entries for i in range(cfg.num_layers)}
  _check_names(set(tensors), wanted, str(path))
  flat = {}
  for entry in entries:
    shape, dtype = _shapes(cfg)[entry.ours], np.dtype(cfg.param_dtype)
    if not entry.ours.startswith('layers/'):
      flat[entry.ours] = _to_ours(tensors, entry, 0, shape, path).astype(dtype)
      continue
    flat[entry.ours] = np.stack([
        _to_ours(tensors, entry, i, shape[1:], path).astype(dtype)
        for i in range(cfg.num_layers)])
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def load_metadata(folder: str | os.PathLike) -> dict[str, str]:
  """Returns the strings in the header of a folder's weights."""
  path = pathlib.Path(folder) / WEIGHTS_FILE
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return dict(file.metadata() or {})
  except (OSError, safetensors.SafetensorError) as error:
    raise _unreadable(path, error) from None


def to_hf_config(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of config.json for weights of the given dtype."""
  return {
      'architectures': ['LlamaForCausalLM'],
      **_REQUIRED,
      **{theirs: getattr(cfg, ours) for theirs, ours in _FIELDS.items()},
      'rope_theta': cfg.rope_theta,
      'torch_dtype': dtype,
  }


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  params = jax.eval_shape(lambda: transformer.init_params(cfg, 0))
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return {name: leaf.shape for name, leaf in flat.items()}


def _to_theirs(array: np.ndarray, num_in: int) -> np.ndarray:
  if num_in == 0:
    return np.ascontiguousarray(array)
  num_inputs = int(np.prod(array.shape[:num_in]))
  return np.ascontiguousarray(array.reshape(num_inputs, -1).T)


def _to_ours(tensors, entry, layer, shape, path) -> np.ndarray:
  name = entry.theirs.format(layer)
  expected = shape
  if entry.num_in:
    expected = (int(np.prod(shape[entry.num_in:])),
                int(np.prod(shape[:entry.num_in])))
  tensor = tensors[name]
  if tensor.shape != expected:
    raise ValueError(
        f'{path}: {name} has shape {tensor.shape}, the config makes it '
        f'{expected}; take weights and config.json from the same model.')
  return tensor if not entry.num_in else tensor.T.reshape(shape)


def _check_names(have: set[str], want: set[str], where: str) -> None:
  if want - have:
    raise ValueError(
        f'{where}: {min(want - have)} is missing ({len(want - have)} of '
        f'{len(want)} are); the weights must be those of the model config.')
  if have - want:
    raise ValueError(
        f'{where}: {min(have - want)} is of no use to the model '
        f'({len(have - want)} such); the weights must be those of the model '
        'config.')


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise _unreadable(path, error) from None


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
  reason = str(error).splitlines()[0]
  return ValueError(
      f'{path}: cannot be read ({reason}); write or copy the file again.')


def _replace(path: pathlib.Path, content: bytes) -> None:
  partial = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  partial.write_bytes(content)
  os.replace(partial, path)
