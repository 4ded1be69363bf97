"""The one table of weight names, ours and those of Hugging Face.

Everything that reads or writes weights goes through slots: which part of which
parameter of ours a tensor of theirs is. Models and LoRA adapters alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from csrm_jax.models import shards, transformer
from csrm_jax.models.config import ModelConfig


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
  Entry('layers/attention/query/kernel', _LAYER + 'self_attn.q_proj.weight', 1),
  Entry('layers/attention/key/kernel', _LAYER + 'self_attn.k_proj.weight', 1),
  Entry('layers/attention/value/kernel', _LAYER + 'self_attn.v_proj.weight', 1),
  Entry('layers/attention/out/kernel', _LAYER + 'self_attn.o_proj.weight', 2),
  Entry('layers/attention/query_norm/scale', _LAYER + 'self_attn.q_norm.weight', 0),
  Entry('layers/attention/key_norm/scale', _LAYER + 'self_attn.k_norm.weight', 0),
  # One name, two places: before the MLP, and with post_norms after attention.
  Entry('layers/mlp_norm/scale', _LAYER + 'post_attention_layernorm.weight', 0, False),
  Entry('layers/attention_post_norm/scale', _LAYER + 'post_attention_layernorm.weight', 0, True),
  Entry('layers/mlp_norm/scale', _LAYER + 'pre_feedforward_layernorm.weight', 0, True),
  Entry('layers/mlp_post_norm/scale', _LAYER + 'post_feedforward_layernorm.weight', 0, True),
  Entry('layers/mlp/gate/kernel', _LAYER + 'mlp.gate_proj.weight', 1),
  Entry('layers/mlp/up/kernel', _LAYER + 'mlp.up_proj.weight', 1),
  Entry('layers/mlp/down/kernel', _LAYER + 'mlp.down_proj.weight', 1),
  Entry('final_norm/scale', 'model.norm.weight', 0),
  Entry('lm_head/kernel', 'lm_head.weight', 1),
  # [D, 1]; in place of the output layer in a sequence classifier.
  Entry('score/kernel', 'score.weight', 1),
)
# What PEFT puts around the name of a kernel.
_PEFT = ('base_model.model.', '.weight')
_UNUSED = {'causal_lm': 'score/kernel', 'sequence_classification': 'lm_head/kernel'}


class Slot(NamedTuple):
  """Where a tensor of theirs goes.

  Attributes:
    entry: the names.
    layer: its place on the axis L of our parameter, None without that axis.
    shape: of theirs.
    whole: shape of our parameter, all layers.
  """

  entry: Entry
  layer: int | None
  shape: tuple[int, ...]
  whole: tuple[int, ...]


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'a/b/c': leaf} of a nested dict."""
  return flax.traverse_util.flatten_dict(dict(params), sep='/')


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict that `flatten` took apart."""
  return flax.traverse_util.unflatten_dict(dict(flat), sep='/')


def slots(cfg: ModelConfig, form: str = 'causal_lm') -> dict[str, Slot]:
  """Returns {their name: slot} of a model without adapters, layer by layer.

  Args:
    cfg: the model.
    form: one of hf_config.FORMS.
  """
  shapes = {**_shapes(dataclasses.replace(cfg, lora_rank=0)), 'score/kernel': (cfg.embed_dim, 1)}
  return _make_slots(
    cfg,
    {
      entry: shapes[entry.ours]
      for entry in TABLE
      if entry.ours in shapes
      and entry.ours != _UNUSED[form]
      and entry.post_norms in (None, cfg.post_norms)
    },
  )


def lora_slots(cfg: ModelConfig) -> dict[str, Slot]:
  """Returns {name in a PEFT file: slot} of the adapters of a model.

  PEFT keeps an adapter as two products: lora_A [r, in] and lora_B [out, r].
  """
  shapes, entries = _shapes(cfg), {}
  before, after = _PEFT
  for entry in TABLE:
    path = entry.ours.removesuffix('/kernel')
    stem = before + entry.theirs.removesuffix(after)
    for name, num_in in (('a', entry.num_in), ('b', 1)):
      ours = f'{path}/lora_{name}'
      if ours in shapes:
        theirs = f'{stem}.lora_{name.upper()}{after}'
        entries[Entry(ours, theirs, num_in)] = shapes[ours]
  return _make_slots(cfg, entries)


def to_ours(array: np.ndarray, slot: Slot) -> np.ndarray:
  """Returns a tensor of theirs in our axes, without the axis L: a view."""
  if not slot.entry.num_in:
    return array
  return array.T.reshape(slot.whole if slot.layer is None else slot.whole[1:])


def to_theirs(param: Any, slot: Slot) -> shards.Tensor:
  """Returns the tensor of theirs that a parameter of ours has in this slot.

  Args:
    param: the whole parameter, on any device; read when the tensor is.
    slot: which part of it.
  """

  def read() -> np.ndarray:
    part = np.asarray(param if slot.layer is None else param[slot.layer])
    if not slot.entry.num_in:
      return part
    num_inputs = math.prod(part.shape[: slot.entry.num_in])
    return part.reshape(num_inputs, -1).T

  return shards.Tensor(slot.shape, np.dtype(param.dtype), 'params', read)


def check_names(have: set[str], want: set[str], where: str) -> None:
  """Raises ValueError, with a name, unless both hold the same names."""
  if want - have:
    raise ValueError(
      f'{where}: {min(want - have)} is missing ({len(want - have)} of '
      f'{len(want)} are); the weights must be those of the model config.'
    )
  if have - want:
    raise ValueError(
      f'{where}: {min(have - want)} is of no use to the model '
      f'({len(have - want)} such); the weights must be those of the model '
      'config.'
    )


def check_tensors(
  tensors: Mapping[str, shards.Tensor], slots: Mapping[str, Slot], where: str
) -> None:
  """Raises ValueError unless the tensors fill the slots, all and exactly."""
  check_names(set(tensors), set(slots), where)
  for name, tensor in tensors.items():
    if tensor.shape != slots[name].shape:
      raise ValueError(
        f'{tensor.where}: {name} has shape {tensor.shape}, the config makes '
        f'it {slots[name].shape}; take weights and config.json from the same '
        'model.'
      )


@functools.lru_cache(maxsize=16)
def _shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
  params = jax.eval_shape(lambda: transformer.init_params(cfg, 0))
  return {name: leaf.shape for name, leaf in flatten(params).items()}


def _make_slots(cfg: ModelConfig, entries: Mapping[Entry, tuple[int, ...]]) -> dict[str, Slot]:
  """Returns the slots of the entries, given the shapes of our parameters."""
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
