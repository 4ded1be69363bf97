"""Weights in Hugging Face form: one table of names, in both directions.

A source is a folder as save_pretrained writes it (config.json, safetensors in
one file or in shards), the id of such a folder on the Hugging Face hub
("org/name"), or a .gguf file. Weights go straight to where they are computed
with, tensor by tensor: the host holds one tensor at a time, never a model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from csrm_jax.models import gguf, hf_config, shards, transformer
from csrm_jax.models.config import ModelConfig

_HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?')
_HUB_FILES = ('*.safetensors', '*.json', '*.jinja', 'tokenizer.model')


class Entry(NamedTuple):
  """A parameter's two names.

  Attributes:
    ours: path in the nested dict; under layers/ it has a leading axis L.
    theirs: tensor name, with the number of the layer as {}.
    num_in: leading axes of our kernel that are inputs. Theirs is [out, in],
      each flattened. 0: stored as it is.
    post_norms: the entry is of models whose config says so; None: of all.
  """

  ours: str
  theirs: str
  num_in: int
  post_norms: bool | None = None


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
    Entry('layers/attention/query_norm/scale',
          _LAYER + 'self_attn.q_norm.weight', 0),
    Entry('layers/attention/key_norm/scale',
          _LAYER + 'self_attn.k_norm.weight', 0),
    # One name, two places: before the MLP, and with post_norms after attention.
    Entry('layers/mlp_norm/scale',
          _LAYER + 'post_attention_layernorm.weight', 0, False),
    Entry('layers/attention_post_norm/scale',
          _LAYER + 'post_attention_layernorm.weight', 0, True),
    Entry('layers/mlp_norm/scale',
          _LAYER + 'pre_feedforward_layernorm.weight', 0, True),
    Entry('layers/mlp_post_norm/scale',
          _LAYER + 'post_feedforward_layernorm.weight', 0, True),
    Entry('layers/mlp/gate/kernel', _LAYER + 'mlp.gate_proj.weight', 1),
    Entry('layers/mlp/up/kernel', _LAYER + 'mlp.up_proj.weight', 1),
    Entry('layers/mlp/down/kernel', _LAYER + 'mlp.down_proj.weight', 1),
    Entry('final_norm/scale', 'model.norm.weight', 0),
    Entry('lm_head/kernel', 'lm_head.weight', 1),
    # [D, 1]; in place of the output layer in a sequence classifier.
    Entry('score/kernel', 'score.weight', 1),
)
# Old files list these constants among the weights.
_CONSTANTS = re.compile(r'.*\.rotary_emb\.inv_freq')


class _Slot(NamedTuple):
  """Where a tensor of theirs goes: an entry, its layer, and its shape."""

  entry: Entry
  layer: int | None
  shape: tuple[int, ...]  # of theirs


def resolve(source: str | os.PathLike) -> pathlib.Path:
  """Returns the local path of a source; downloads a hub id if needed.

  Args:
    source: a folder, a .gguf file, or "org/name" or "org/name@revision" on the
      hub. What exists here is never looked for there.

  Raises:
    ImportError: a hub id, and no package huggingface_hub.
    ValueError: no such folder, or it cannot be downloaded.
  """
  text = os.fspath(source)
  path = pathlib.Path(text).expanduser()
  if path.exists():
    return path
  if not _HUB_ID.fullmatch(text):
    raise ValueError(
        f'{text}: does not exist; give a folder with {hf_config.CONFIG_FILE}, '
        'a .gguf file or a hub id (org/name).')
  try:
    import huggingface_hub
  except ImportError:
    raise ImportError(
        f'{text}: is no folder here, and a hub id needs the package '
        'huggingface_hub; run "pip install huggingface_hub", or install '
        'csrm_jax with its extra "hf"') from None
  name, _, revision = text.partition('@')
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        name, revision=revision or None, allow_patterns=list(_HUB_FILES),
        ignore_patterns=['*/*', 'consolidated*']))
  except Exception as error:  # Whatever the network or the hub says.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
        f'{text}: is no folder here and cannot be downloaded ({reason}); '
        'check the name, the network and your access to it.') from None


def load(
    source: str | os.PathLike, **overrides
) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns (cfg, params) of a source; overrides as in load_config."""
  cfg = load_config(source, **overrides)
  return cfg, load_params(source, cfg)


def load_config(source: str | os.PathLike, **overrides) -> ModelConfig:
  """Returns the ModelConfig of a source.

  Args:
    source: as in `resolve`.
    **overrides: fields that are no property of the weights: RUN_TIME_FIELDS.

  Raises:
    ValueError: not a model that this decoder computes; names the field.
  """
  path = resolve(source)
  if path.suffix == '.gguf':
    return hf_config.from_hf(gguf.read_config(path), str(path), **overrides)
  return hf_config.from_hf(
      hf_config.read(path), str(path / hf_config.CONFIG_FILE), **overrides)


def load_params(
    source: str | os.PathLike, cfg: ModelConfig, shardings: Any = None
) -> dict[str, Any]:
  """Returns the weights of a source as a nested dict, in cfg.param_dtype.

  The tree is that of transformer.init_params without adapters. A sequence
  classifier has score/kernel [D, 1] and no lm_head.

  Args:
    source: as in `resolve`.
    cfg: of the model; run-time fields may differ from the stored ones.
    shardings: a nested dict of Shardings with at least the leaves of the
      result; None: the default device.

  Raises:
    ValueError: the source holds another backbone than cfg, or a tensor is
      missing, unused or of another shape; names file and tensor.
  """
  path = resolve(source)
  _check_backbone(path, cfg)
  slots = _slots(cfg, _form(path))
  tensors = _check_tensors(open_tensors(path), slots, path)
  stacks = _shapes(cfg)
  places = {} if shardings is None else _flatten(shardings)
  dtype, flat = jnp.dtype(cfg.param_dtype), {}
  for name, tensor in tensors.items():
    entry, layer, _ = slots[name]
    array = _to_ours(tensor.read(), entry, stacks)
    place = places.get(entry.ours)
    if layer is None:
      array = _put(array, place)
      flat[entry.ours] = array.astype(dtype)
      continue
    if entry.ours not in flat:
      flat[entry.ours] = jnp.zeros(stacks[entry.ours], dtype, device=place)
    flat[entry.ours] = _fill(place)(
        flat[entry.ours], _put(array, _within_layer(place)), layer)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def load_metadata(folder: str | os.PathLike) -> dict[str, str]:
  """Returns the strings in the header of a folder's weights."""
  return shards.read_metadata(pathlib.Path(folder))


def open_tensors(source: str | os.PathLike) -> dict[str, shards.Tensor]:
  """Returns the tensors of a source under their Hugging Face names, unread."""
  path = resolve(source)
  if path.suffix == '.gguf':
    return gguf.open_tensors(path)
  return shards.open_folder(path)


def digest(source: str | os.PathLike) -> str:
  """Returns a sha256 (hex) over the weights of a source.

  It covers names, shapes and values, however they are spread over files: a
  .gguf file has the digest of the folder that it was converted to.
  """
  return shards.digest(open_tensors(source))


def save(
    folder: str | os.PathLike, cfg: ModelConfig, params: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None, *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES
) -> None:
  """Writes config.json and the weights; every file appears whole.

  Args:
    folder: made if absent; must not hold other weights.
    cfg: the model's shape.
    params: as from init_params, in any dtype, without adapters. With
      score/kernel [D, 1] in place of lm_head they are written as a sequence
      classifier.
    metadata: strings for the header of the weights, such as how they were
      made.
    extra: more fields of config.json, such as pad_token_id.
    max_shard_bytes: of one file; more is written as shards with an index.

  Raises:
    ValueError: params are not those of cfg, cfg is no model of its family, or
      the folder holds other weights.
  """
  folder = pathlib.Path(folder)
  flat = _flatten(params)
  if any(name.endswith(('/lora_a', '/lora_b')) for name in flat):
    raise ValueError(
        'params hold LoRA adapters, which have no place in a whole model; '
        'merge them first (lora.merge).')
  form = 'causal_lm'
  if 'score/kernel' in flat:
    form = 'sequence_classification'
  spec = hf_config.to_hf(cfg, str(flat['embed/embedding'].dtype), form)
  slots = _slots(cfg, form)
  _check_names(set(flat), {slot.entry.ours for slot in slots.values()},
               'params')
  tensors = {name: _lazy(flat[slot.entry.ours], slot)
             for name, slot in slots.items()}
  folder.mkdir(parents=True, exist_ok=True)
  shards.write(folder, tensors, metadata or {}, max_shard_bytes)
  shards.write_json(folder / hf_config.CONFIG_FILE, spec | dict(extra or {}))


def _form(path: pathlib.Path) -> str:
  if path.suffix == '.gguf':
    return 'causal_lm'
  return hf_config.form(hf_config.read(path), str(path))


def _check_backbone(path: pathlib.Path, cfg: ModelConfig) -> None:
  stored = hf_config.canonical(load_config(path))
  for name, value in hf_config.canonical(cfg).items():
    if stored[name] != value:
      raise ValueError(
          f'{path}: weights of another backbone: {name} is {stored[name]!r} '
          f'there and {value!r} in the model config; make them equal.')


@functools.lru_cache(maxsize=16)
def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns {our name: shape} of all forms of the model."""
  cfg = dataclasses.replace(cfg, lora_rank=0)
  params = jax.eval_shape(lambda: transformer.init_params(cfg, 0))
  shapes = {name: leaf.shape for name, leaf in _flatten(params).items()}
  return shapes | {'score/kernel': (cfg.embed_dim, 1)}


def _slots(cfg: ModelConfig, form: str) -> dict[str, _Slot]:
  """Returns {their name: slot} of a model, in the order of its layers."""
  shapes = _shapes(cfg)
  unused = {
      'causal_lm': 'score/kernel',
      'sequence_classification': 'lm_head/kernel',
  }[form]
  slots, layers = {}, [{} for _ in range(cfg.num_layers)]
  for entry in TABLE:
    if (entry.ours not in shapes or entry.ours == unused
        or entry.post_norms not in (None, cfg.post_norms)):
      continue
    if not entry.ours.startswith('layers/'):
      slots[entry.theirs] = _Slot(
          entry, None, _their_shape(shapes[entry.ours], entry.num_in))
      continue
    shape = _their_shape(shapes[entry.ours][1:], entry.num_in)
    for i, layer in enumerate(layers):
      layer[entry.theirs.format(i)] = _Slot(entry, i, shape)
  return functools.reduce(lambda a, b: a | b, layers, slots)


def _their_shape(shape: tuple[int, ...], num_in: int) -> tuple[int, ...]:
  if not num_in:
    return shape
  return math.prod(shape[num_in:]), math.prod(shape[:num_in])


def _to_theirs(array: np.ndarray, entry: Entry) -> np.ndarray:
  if not entry.num_in:
    return array
  num_inputs = math.prod(array.shape[:entry.num_in])
  return array.reshape(num_inputs, -1).T


def _to_ours(
    array: np.ndarray, entry: Entry, shapes: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
  """Returns the array (of one layer) in our axes, a view."""
  if not entry.num_in:
    return array
  shape = shapes[entry.ours]
  return array.T.reshape(
      shape[1:] if entry.ours.startswith('layers/') else shape)


def _lazy(param: Any, slot: _Slot) -> shards.Tensor:
  def read() -> np.ndarray:
    part = param if slot.layer is None else param[slot.layer]
    return _to_theirs(np.asarray(part), slot.entry)

  return shards.Tensor(slot.shape, np.dtype(param.dtype), 'params', read)


def _check_tensors(
    tensors: Mapping[str, shards.Tensor], slots: Mapping[str, _Slot],
    path: pathlib.Path
) -> dict[str, shards.Tensor]:
  """Returns the tensors that the model needs, all of them of its shapes."""
  have = {name for name in tensors if not _CONSTANTS.fullmatch(name)}
  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  if head in have - set(slots) and embedding in have:
    # Some write the output layer although it is tied; then it must be.
    if not shards.equal(tensors[head], tensors[embedding]):
      raise ValueError(
          f'{tensors[head].where}: {head} differs from the embedding, but the '
          'config ties them; set tie_word_embeddings to false in config.json.')
    have.remove(head)
  _check_names(have, set(slots), str(path))
  for name in sorted(have):
    if tensors[name].shape != slots[name].shape:
      raise ValueError(
          f'{tensors[name].where}: {name} has shape {tensors[name].shape}, the '
          f'config makes it {slots[name].shape}; take weights and config.json '
          'from the same model.')
  return {name: tensor for name, tensor in tensors.items() if name in have}


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


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(dict(params), sep='/')


def _put(array: np.ndarray, place: Sharding | None) -> jax.Array:
  if place is None:
    return jnp.asarray(array)
  # Every process reads the file; each device takes its own part of it.
  return jax.make_array_from_callback(
      array.shape, place, lambda index: array[index])


def _within_layer(place: Sharding | None) -> Sharding | None:
  """Returns where a layer goes whose stack lies at `place`."""
  if not isinstance(place, NamedSharding):
    return place
  return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


@functools.lru_cache(maxsize=64)
def _fill(place: Sharding | None) -> Callable[..., jax.Array]:
  """Returns a jitted (stack, x, layer) -> stack; the stack is written into."""

  def fill(stack, x, layer):
    return jax.lax.dynamic_update_index_in_dim(
        stack, x.astype(stack.dtype), layer, 0)

  return jax.jit(fill, donate_argnums=0, out_shardings=place)
