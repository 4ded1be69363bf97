"""Weights in Hugging Face form, in and out (the names are in hf_table).

A source is a folder as save_pretrained writes it (config.json, safetensors in
one file or in shards), the id of such a folder on the Hugging Face hub
("org/name"), or a .gguf file. Weights go straight to where they are computed
with, tensor by tensor: the host holds one tensor at a time, never a model.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from csrm_jax.models import gguf, hf_config, hf_table, shards
from csrm_jax.models.config import ModelConfig

_HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?')
_HUB_FILES = ('*.safetensors', '*.json', '*.jinja', 'tokenizer.model')


# Old files list these constants among the weights.
_CONSTANTS = re.compile(r'.*\.rotary_emb\.inv_freq')


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
      'a .gguf file or a hub id (org/name).'
    )
  try:
    import huggingface_hub
  except ImportError:
    raise ImportError(
      f'{text}: is no folder here, and a hub id needs the package '
      'huggingface_hub; run "pip install huggingface_hub", or install '
      'csrm_jax with its extra "hf"'
    ) from None
  name, _, revision = text.partition('@')
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name,
        revision=revision or None,
        allow_patterns=list(_HUB_FILES),
        ignore_patterns=['*/*', 'consolidated*'],
      )
    )
  except Exception as error:  # Whatever the network or the hub says.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f'{text}: is no folder here and cannot be downloaded ({reason}); '
      'check the name, the network and your access to it.'
    ) from None


def load(source: str | os.PathLike, **overrides) -> tuple[ModelConfig, dict[str, Any]]:
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
  return hf_config.from_hf(hf_config.read(path), str(path / hf_config.CONFIG_FILE), **overrides)


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
  slots = hf_table.slots(cfg, _form(path))
  tensors = _check_tensors(open_tensors(path), slots, path)
  return place(tensors, slots, jnp.dtype(cfg.param_dtype), shardings)


def place(
  tensors: Mapping[str, shards.Tensor],
  slots: Mapping[str, hf_table.Slot],
  dtype: jnp.dtype,
  shardings: Any = None,
) -> dict[str, Any]:
  """Returns the nested dict that the tensors fill, read one by one.

  Each goes to its devices at once; stacks of layers are filled in place there.

  Args:
    tensors: those of the slots.
    slots: as from hf_table.
    dtype: of the result.
    shardings: as in load_params.
  """
  places = {} if shardings is None else hf_table.flatten(shardings)
  flat = {}
  for name, tensor in tensors.items():
    slot = slots[name]
    ours, to = slot.entry.ours, places.get(slot.entry.ours)
    array = hf_table.to_ours(tensor.read(), slot)
    if slot.layer is None:
      flat[ours] = _put(array, to).astype(dtype)
      continue
    if ours not in flat:
      flat[ours] = jnp.zeros(slot.whole, dtype, device=to)
    flat[ours] = _fill(to)(flat[ours], _put(array, _within_layer(to)), slot.layer)
  return hf_table.unflatten(flat)


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
  folder: str | os.PathLike,
  cfg: ModelConfig,
  params: Mapping[str, Any],
  metadata: Mapping[str, str] | None = None,
  *,
  extra: Mapping[str, Any] | None = None,
  max_shard_bytes: int = shards.MAX_SHARD_BYTES,
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
  flat = hf_table.flatten(params)
  if any(name.endswith(('/lora_a', '/lora_b')) for name in flat):
    raise ValueError(
      'params hold LoRA adapters, which have no place in a whole model; '
      'merge them first (lora.merge).'
    )
  form = 'causal_lm'
  if 'score/kernel' in flat:
    form = 'sequence_classification'
  spec = hf_config.to_hf(cfg, str(flat['embed/embedding'].dtype), form)
  slots = hf_table.slots(cfg, form)
  hf_table.check_names(set(flat), {slot.entry.ours for slot in slots.values()}, 'params')
  tensors = {name: hf_table.to_theirs(flat[slot.entry.ours], slot) for name, slot in slots.items()}
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
        f'there and {value!r} in the model config; make them equal.'
      )


def _check_tensors(
  tensors: Mapping[str, shards.Tensor], slots: Mapping[str, hf_table.Slot], path: pathlib.Path
) -> dict[str, shards.Tensor]:
  """Returns the tensors that the model needs, all of them of its shapes."""
  kept = {name: tensor for name, tensor in tensors.items() if not _CONSTANTS.fullmatch(name)}
  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  # Some write the output layer although it is tied; then it must be.
  if (
    head not in slots
    and {head, embedding} <= set(kept)
    and not shards.equal(kept.pop(head), kept[embedding])
  ):
    raise ValueError(
      f'{tensors[head].where}: {head} differs from the embedding, but the '
      'config ties them; set tie_word_embeddings to false in config.json.'
    )
  hf_table.check_tensors(kept, slots, str(path))
  return kept


def _put(array: np.ndarray, place: Sharding | None) -> jax.Array:
  if place is None:
    return jnp.asarray(array)
  # Every process reads the file; each device takes its own part of it.
  return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _within_layer(place: Sharding | None) -> Sharding | None:
  """Returns where a layer goes whose stack lies at `place`."""
  if not isinstance(place, NamedSharding):
    return place
  return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


@functools.lru_cache(maxsize=64)
def _fill(place: Sharding | None) -> Callable[..., jax.Array]:
  """Returns a jitted (stack, x, layer) -> stack; the stack is written into."""

  def fill(stack, x, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, x.astype(stack.dtype), layer, 0)

  return jax.jit(fill, donate_argnums=0, out_shardings=place)
