"""Weights in Hugging Face form, in and out.

A source is a folder as save_pretrained writes it (config.json, and safetensors in one file or in
shards), the id of such a folder on the Hugging Face hub ("org/name"), or a .gguf file. Weights go
tensor by tensor straight to the devices that compute with them: the host never holds a model.

Models and LoRA adapters are read and written through slots: a slot says which part of which
parameter of ours a tensor of theirs is. "Theirs" is Hugging Face's form throughout.
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

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from csrm_jax.core import checks, files
from csrm_jax.models import gguf, hf_config, shards, transformer
from csrm_jax.models.config import ModelConfig

_HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?')
_HUB_FILES = ('*.safetensors', '*.json', '*.jinja', 'tokenizer.model')
# Old files have these constants among the weights.
_CONSTANTS = re.compile(r'.*\.rotary_emb\.inv_freq')


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights in Hugging Face form; each part is looked for when first needed, and only once.

  The name is a folder, a .gguf file, or "org/name" or "org/name@revision" on the hub. What exists
  here is never looked for there.
  """

  name: str | os.PathLike

  @functools.cached_property
  def path(self) -> pathlib.Path:
    """The local path; a hub id is downloaded if needed, with the package huggingface_hub."""
    text = os.fspath(self.name)
    path = files.locate(text)
    if path.exists():
      return path
    if not _HUB_ID.fullmatch(text):
      raise ValueError(
        f'{text}: does not exist; give a folder with {hf_config.CONFIG_FILE}, '
        'a .gguf file or a hub id (org/name).'
      )
    hub = checks.require('huggingface_hub', f'{text}: is no folder here, and a hub id')
    name, _, revision = text.partition('@')
    try:
      folder = hub.snapshot_download(
        name,
        revision=revision or None,
        allow_patterns=list(_HUB_FILES),
        # Subfolders and "consolidated" files repeat the weights in other forms.
        ignore_patterns=['*/*', 'consolidated*'],
      )
    except Exception as error:  # Whatever the network or the hub says.
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise ValueError(
        f'{text}: is no folder here and cannot be downloaded ({reason}); '
        'check the name, the network and your access to it.'
      ) from None
    return pathlib.Path(folder)

  @property
  def is_gguf(self) -> bool:
    return self.path.suffix == '.gguf'

  @functools.cached_property
  def spec(self) -> dict[str, Any]:
    """The content of config.json."""
    return gguf.read_config(self.path) if self.is_gguf else hf_config.read(self.path)

  @property
  def where(self) -> str:
    """The file that the spec stands in, for errors."""
    return str(self.path if self.is_gguf else self.path / hf_config.CONFIG_FILE)

  @functools.cached_property
  def tensors(self) -> dict[str, shards.Tensor]:
    """The tensors under their Hugging Face names; none is read yet."""
    if not self.is_gguf:
      return shards.open_folder(self.path)
    return gguf.open_tensors(self.path, _gguf_names())


def open_source(source: str | os.PathLike | Source) -> Source:
  """Returns the source of that name; a source itself is returned as it is."""
  return source if isinstance(source, Source) else Source(source)


def load(source: str | os.PathLike | Source, **overrides) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns (cfg, params) of a source; the overrides are those of load_config."""
  source = open_source(source)
  cfg = load_config(source, **overrides)
  return cfg, load_params(source, cfg)


def load_config(source: str | os.PathLike | Source, **overrides) -> ModelConfig:
  """Returns the ModelConfig of a source; overrides are fields out of RUN_TIME_FIELDS."""
  source = open_source(source)
  return hf_config.from_hf(source.spec, source.where, **overrides)


def load_params(
  source: str | os.PathLike | Source, cfg: ModelConfig, shardings: Any = None
) -> dict[str, Any]:
  """Returns the weights of a source as a nested dict, in cfg.param_dtype.

  The tree is that of transformer.init_params without adapters. A sequence classifier has
  score/kernel [D,1] and no lm_head.

  Args:
    cfg: The model; its run-time fields may differ from those of the source.
    shardings: A nested dict of Shardings that has at least the leaves of the result. By default
      all goes to the default device.

  Raises:
    ValueError: The source holds another backbone than cfg, or a tensor is missing, unused, of
      another shape or not finite.
  """
  source = open_source(source)
  stored = hf_config.canonical(load_config(source))
  for name, value in hf_config.canonical(cfg).items():
    if stored[name] != value:
      raise ValueError(
        f'{source.path}: weights of another backbone: {name} is {stored[name]!r} '
        f'there and {value!r} in the model config; make them equal.'
      )
  places = slots(cfg, hf_config.form(source.spec, source.where))
  tensors = {n: tensor for n, tensor in source.tensors.items() if not _CONSTANTS.fullmatch(n)}
  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  # Some files hold the output layer although it is tied; then it must equal the embedding.
  if (
    head not in places
    and {head, embedding} <= set(tensors)
    and not shards.equal(tensors.pop(head), tensors[embedding])
  ):
    raise ValueError(
      f'{source.tensors[head].where}: {head} differs from the embedding, but the '
      'config ties them; set tie_word_embeddings to false in config.json.'
    )
  return fill(places, tensors, str(source.path), jnp.dtype(cfg.param_dtype), shardings)


def fill(
  slots: Mapping[str, Slot],
  tensors: Mapping[str, shards.Tensor],
  where: str,
  dtype: jnp.dtype,
  shardings: Any = None,
) -> dict[str, Any]:
  """Returns the nested dict that the tensors make.

  Raises:
    ValueError: They do not fill the slots, all and exactly, or hold what is no finite number.
  """
  check_names(set(tensors), set(slots), where)
  for name, tensor in tensors.items():
    if tensor.shape != slots[name].shape:
      raise ValueError(
        f'{tensor.where}: {name} has shape {tensor.shape}, the config makes it '
        f'{slots[name].shape}; take weights and config.json from the same model.'
      )
  # Names and shapes are checked before anything is read. Then each tensor goes to its devices at
  # once, and a layer is written into its stack there: the host never holds a stack.
  places = {} if shardings is None else flatten_dict(shardings, sep='/')
  flat = {}
  for name, tensor in tensors.items():
    slot = slots[name]
    ours, to = slot.entry.ours, places.get(slot.entry.ours)
    array = tensor.read()
    if not np.isfinite(array).all():
      raise ValueError(
        f'{tensor.where}: {name} holds {np.count_nonzero(~np.isfinite(array)):,} values that are '
        f'NaN or infinite, of {array.size:,}; take another copy, or weights of a training that did '
        'not diverge'
      )
    array = to_ours(array, slot)
    if slot.layer is None:
      flat[ours] = _put(array, to).astype(dtype)
      continue
    if ours not in flat:
      flat[ours] = jnp.zeros(slot.whole, dtype, device=to)
    flat[ours] = _fill(to)(flat[ours], _put(array, _within_layer(to)), slot.layer)
  return unflatten_dict(flat, sep='/')


def _put(array: np.ndarray, place: Sharding | None) -> jax.Array:
  if place is None:
    return jnp.asarray(array)
  # Every process reads the file, and each device takes its own part.
  return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _within_layer(place: Sharding | None) -> Sharding | None:
  """Returns where one layer goes if the stack of all lies at `place`."""
  if not isinstance(place, NamedSharding):
    return place
  return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


@functools.lru_cache(maxsize=64)
def _fill(place: Sharding | None) -> Callable[..., jax.Array]:
  """Returns a jitted (stack, x, layer) -> stack, which writes x into the same memory."""

  def fill(stack, x, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, x.astype(stack.dtype), layer, 0)

  return jax.jit(fill, donate_argnums=0, out_shardings=place)


def digest(source: str | os.PathLike | Source) -> str:
  """Returns the sha256 (hex) of the weights of a source, see shards.digest; it reads them all.

  A .gguf file has the digest of the folder that it is converted to.
  """
  return shards.digest(open_source(source).tensors)


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
    params: Parameters as from init_params, in any dtype, without adapters. With score/kernel [D,1]
      in place of lm_head they are written as a sequence classifier.
    metadata: Strings for the header of the weights, such as how they were made.
    extra: Further fields of config.json, such as pad_token_id.
    max_shard_bytes: What one file may hold; larger weights become shards with an index.

  Raises:
    ValueError: params are not those of cfg, cfg is no model of its family, or the folder holds
      other weights.
  """
  folder = pathlib.Path(folder)
  flat = flatten_dict(params, sep='/')
  if any(name.endswith(('/lora_a', '/lora_b')) for name in flat):
    raise ValueError(
      'params hold LoRA adapters, which have no place in a whole model; '
      'merge them first (lora.merge).'
    )
  form = 'sequence_classification' if 'score/kernel' in flat else 'causal_lm'
  spec = hf_config.to_hf(cfg, str(flat['embed/embedding'].dtype), form)
  tensors = to_theirs(flat, slots(cfg, form), 'params')
  shards.write(folder, tensors, metadata or {}, max_shard_bytes)
  # Last, because a folder with a config.json is taken for a model.
  shards.write_json(folder / hf_config.CONFIG_FILE, spec | dict(extra or {}))


def save_gguf(
  path: str | os.PathLike,
  cfg: ModelConfig,
  params: Mapping[str, Any],
  tokenizer: Mapping[str, Any],
  *,
  dtype: str,
  description: Mapping[str, Any] | None = None,
) -> None:
  """Writes one .gguf file of a model, without adapters; see gguf.write for arguments and errors."""
  tensors = to_theirs(flatten_dict(params, sep='/'), slots(cfg), 'params')
  spec = hf_config.to_hf(cfg, 'float32')
  options = {'dtype': dtype, 'description': description}
  gguf.write(pathlib.Path(path), spec, tensors, _gguf_names(), tokenizer, **options)


def _gguf_names() -> dict[str, str]:
  return {entry.gguf: entry.theirs for entry in TABLE if entry.gguf}


# --- The one table of weight names -----------------------------------------------------


class Entry(NamedTuple):
  """A parameter's names."""

  ours: str  # the path in the nested dict; under layers/ there is a leading axis L
  theirs: str  # the tensor's name, with {} for the number of the layer
  # How many leading axes of our kernel are inputs; theirs is [out, in], each flattened. 0 means
  # that the tensor is stored as it is.
  num_in: int
  gguf: str = ''  # the tensor's name in a .gguf file, without 'blk.N.' and '.weight'
  post_norms: bool | None = None  # the entry is for models with or without them; None: for all


_LAYER = 'model.layers.{}.'
TABLE = (
  Entry('embed/embedding', 'model.embed_tokens.weight', 0, 'token_embd'),
  Entry('layers/attention_norm/scale', _LAYER + 'input_layernorm.weight', 0, 'attn_norm'),
  Entry('layers/attention/query/kernel', _LAYER + 'self_attn.q_proj.weight', 1, 'attn_q'),
  Entry('layers/attention/key/kernel', _LAYER + 'self_attn.k_proj.weight', 1, 'attn_k'),
  Entry('layers/attention/value/kernel', _LAYER + 'self_attn.v_proj.weight', 1, 'attn_v'),
  Entry('layers/attention/out/kernel', _LAYER + 'self_attn.o_proj.weight', 2, 'attn_output'),
  Entry('layers/attention/query_norm/scale', _LAYER + 'self_attn.q_norm.weight', 0, 'attn_q_norm'),
  Entry('layers/attention/key_norm/scale', _LAYER + 'self_attn.k_norm.weight', 0, 'attn_k_norm'),
  # One name, two places: before the MLP, and with post_norms after attention.
  Entry('layers/mlp_norm/scale', _LAYER + 'post_attention_layernorm.weight', 0, 'ffn_norm', False),
  Entry(
    'layers/attention_post_norm/scale', _LAYER + 'post_attention_layernorm.weight', 0, '', True
  ),
  Entry('layers/mlp_norm/scale', _LAYER + 'pre_feedforward_layernorm.weight', 0, '', True),
  Entry('layers/mlp_post_norm/scale', _LAYER + 'post_feedforward_layernorm.weight', 0, '', True),
  Entry('layers/mlp/gate/kernel', _LAYER + 'mlp.gate_proj.weight', 1, 'ffn_gate'),
  Entry('layers/mlp/up/kernel', _LAYER + 'mlp.up_proj.weight', 1, 'ffn_up'),
  Entry('layers/mlp/down/kernel', _LAYER + 'mlp.down_proj.weight', 1, 'ffn_down'),
  Entry('final_norm/scale', 'model.norm.weight', 0, 'output_norm'),
  Entry('lm_head/kernel', 'lm_head.weight', 1, 'output'),
  # A sequence classifier has this [D,1] in place of the output layer.
  Entry('score/kernel', 'score.weight', 1),
)
# PEFT puts the first in front of a kernel's name and keeps the second at its end.
_PEFT = ('base_model.model.', '.weight')
_UNUSED = {'causal_lm': 'score/kernel', 'sequence_classification': 'lm_head/kernel'}


class Slot(NamedTuple):
  """The place of a tensor of theirs among our parameters."""

  entry: Entry
  layer: int | None  # the index on the axis L of our parameter; None without that axis
  shape: tuple[int, ...]  # the shape of their tensor
  whole: tuple[int, ...]  # the shape of our parameter, with the axis L


def slots(cfg: ModelConfig, form: str = 'causal_lm') -> dict[str, Slot]:
  """Returns {their name: slot} for a model's weights; the form is one of hf_config.FORMS."""
  params = flatten_dict(transformer.shapes(dataclasses.replace(cfg, lora_rank=0)), sep='/')
  params['score/kernel'] = jax.ShapeDtypeStruct((cfg.embed_dim, 1), cfg.param_dtype)
  params.pop(_UNUSED[form], None)
  entries = [entry for entry in TABLE if entry.post_norms in (None, cfg.post_norms)]
  return _make_slots(cfg, {e: params[e.ours].shape for e in entries if e.ours in params})


def lora_slots(cfg: ModelConfig) -> dict[str, Slot]:
  """Returns {name in a PEFT file: slot} for a model's adapters."""
  params, entries = flatten_dict(transformer.shapes(cfg), sep='/'), {}
  before, after = _PEFT
  for entry in TABLE:
    path = entry.ours.removesuffix('/kernel')
    stem = before + entry.theirs.removesuffix(after)
    # PEFT stores lora_A [r, in] and lora_B [out, r].
    for name, num_in in (('a', entry.num_in), ('b', 1)):
      ours = f'{path}/lora_{name}'
      if ours in params:
        theirs = f'{stem}.lora_{name.upper()}{after}'
        entries[Entry(ours, theirs, num_in)] = params[ours].shape
  return _make_slots(cfg, entries)


def to_ours(array: np.ndarray, slot: Slot) -> np.ndarray:
  """Returns a view of their tensor in our axes, without the axis L."""
  if not slot.entry.num_in:
    return array
  return array.T.reshape(slot.whole if slot.layer is None else slot.whole[1:])


def to_theirs(
  flat: Mapping[str, Any], slots: Mapping[str, Slot], where: str
) -> dict[str, shards.Tensor]:
  """Returns their tensors of our parameters {'a/b': array}, which must be those of the slots."""
  check_names(set(flat), {slot.entry.ours for slot in slots.values()}, where)

  # A parameter is fetched from its devices only when the tensor is read.
  def read(param, slot):
    part = np.asarray(param if slot.layer is None else param[slot.layer])
    if not slot.entry.num_in:
      return part
    return part.reshape(math.prod(part.shape[: slot.entry.num_in]), -1).T

  tensors = {}
  for name, slot in slots.items():
    param = flat[slot.entry.ours]
    read_it = functools.partial(read, param, slot)
    tensors[name] = shards.Tensor(slot.shape, np.dtype(param.dtype), where, read_it)
  return tensors


def check_names(have: set[str], want: set[str], where: str) -> None:
  """Raises ValueError, naming one that is missing or too many, unless both are equal."""
  if want - have:
    raise ValueError(
      f'{where}: {min(want - have)} is missing ({len(want - have)} of '
      f'{len(want)} are); the weights must be those of the model config.'
    )
  if have - want:
    raise ValueError(
      f'{where}: {min(have - want)} is of no use to the model ({len(have - want)} such); the '
      'weights must be those of the model config.'
    )


def _make_slots(cfg: ModelConfig, entries: Mapping[Entry, tuple[int, ...]]) -> dict[str, Slot]:
  """Returns the slots of the entries, given the shapes of our parameters."""
  # Layer by layer, so that a shard on disk holds neighbouring layers.
  whole, layers = {}, [{} for _ in range(cfg.num_layers)]
  for entry, shape in entries.items():
    if not entry.ours.startswith('layers/'):
      whole[entry.theirs] = Slot(entry, None, _their_shape(shape, entry.num_in), shape)
      continue
    theirs = _their_shape(shape[1:], entry.num_in)
    for i, layer in enumerate(layers):
      layer[entry.theirs.format(i)] = Slot(entry, i, theirs, shape)
  return functools.reduce(lambda a, b: a | b, layers, whole)


def _their_shape(shape: tuple[int, ...], num_in: int) -> tuple[int, ...]:
  if not num_in:
    return shape
  return math.prod(shape[num_in:]), math.prod(shape[:num_in])
