"""The config.json of Hugging Face models, read as a ModelConfig and written from one.

What an architecture fixes stands in one table. When a config is read, the table fills fields of
ModelConfig; when one is written, it says which models the architecture can express.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from csrm_jax.core import checks, files
from csrm_jax.models.config import RUN_TIME_FIELDS, ModelConfig, RopeScaling, resolve

CONFIG_FILE = 'config.json'
# What the decoder ends in -> the suffix of the architecture's name.
FORMS = {'causal_lm': 'ForCausalLM', 'sequence_classification': 'ForSequenceClassification'}


class Family(NamedTuple):
  """What one architecture fixes."""

  name: str  # its classes begin with it; a suffix in FORMS follows
  fixed: Mapping[str, Any]  # fields of ModelConfig that config.json cannot change
  silent: Mapping[str, Any] = {}  # the values of fields that a config.json leaves out
  activation: str = 'hidden_act'  # the field of config.json that names the activation
  # ModelConfig.window_period where config.json does not tell it; 0: there is never a window.
  window_period: int = 1
  layer_types: bool = False  # whether config.json may say which layers have the window


_PLAIN = {
  'norm_offset': 0.0,
  'scale_embeddings': False,
  'query_scale': 0.0,
  'attention_softcap': 0.0,
  'final_softcap': 0.0,
  'qk_norm': False,
  'post_norms': False,
}
FAMILIES = {
  'llama': Family('Llama', {**_PLAIN, 'sliding_window': 0}, window_period=0),
  'mistral': Family('Mistral', _PLAIN, {'sliding_window': 4096}),
  'qwen3': Family(
    'Qwen3',
    {**_PLAIN, 'qk_norm': True},
    {'head_dim': 128, 'use_sliding_window': False, 'max_window_layers': 28, 'sliding_window': 4096},
    layer_types=True,
  ),
  'gemma2': Family(
    'Gemma2',
    {'norm_offset': 1.0, 'scale_embeddings': True, 'qk_norm': False, 'post_norms': True},
    {
      'head_dim': 256,
      'query_pre_attn_scalar': 256,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
      'sliding_window': 4096,
      'tie_word_embeddings': True,
      'hidden_activation': 'gelu_pytorch_tanh',
    },
    activation='hidden_activation',
    window_period=2,
    layer_types=True,
  ),
}

# Fields of config.json that are fields of ours.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'num_hidden_layers': 'num_layers',
  'hidden_size': 'embed_dim',
  'num_attention_heads': 'num_heads',
  'num_key_value_heads': 'num_kv_heads',
  'head_dim': 'head_dim',
  'intermediate_size': 'mlp_dim',
  'max_position_embeddings': 'context_length',
  'rms_norm_eps': 'norm_eps',
  'tie_word_embeddings': 'tie_embeddings',
}
# Fields that only some families have; null means 0.
_OPTIONAL = {
  'query_pre_attn_scalar': 'query_scale',
  'attn_logit_softcapping': 'attention_softcap',
  'final_logit_softcapping': 'final_softcap',
}
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}
# The values that this decoder needs where a model has such a field; absent and null are fine.
_REQUIRED = {
  'attention_bias': False,
  'mlp_bias': False,
  'quantization_config': None,
  'use_bidirectional_attention': False,
  'partial_rotary_factor': 1.0,
}
_ROPE_SCALING = {
  'factor': 'factor',
  'low_freq_factor': 'low_freq_factor',
  'high_freq_factor': 'high_freq_factor',
  'original_max_position_embeddings': 'original_length',
}
# The types of foreign JSON, all in one place: (in words, whether a value has it).
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
  'int': ('a whole number', lambda x: isinstance(x, int) and not isinstance(x, bool)),
  'number': (
    'a finite number',
    lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < float('inf'),
  ),
  'bool': ('true or false', lambda x: isinstance(x, bool)),
  'text': ('text', lambda x: isinstance(x, str)),
  'texts': (
    'a list of texts',
    lambda x: isinstance(x, list) and x != [] and all(isinstance(item, str) for item in x),
  ),
  'object': ('an object', lambda x: isinstance(x, Mapping)),
}
_SIZES = ('vocab_size', 'num_hidden_layers', 'hidden_size', 'num_attention_heads')
_SIZES += ('num_key_value_heads', 'head_dim', 'intermediate_size', 'max_position_embeddings')
_LEAST = dict.fromkeys(_SIZES, 1) | {'sliding_window': 0, 'max_window_layers': 0}
_MOST = {'num_hidden_layers': 4096}
_TYPES = {
  **dict.fromkeys(_LEAST, 'int'),
  **dict.fromkeys(('rms_norm_eps', 'rope_theta', *_OPTIONAL), 'number'),
  **dict.fromkeys(('tie_word_embeddings', 'use_sliding_window'), 'bool'),
  **dict.fromkeys(('model_type', 'hidden_act', 'hidden_activation'), 'text'),
  **dict.fromkeys(('architectures', 'layer_types'), 'texts'),
  **dict.fromkeys(('rope_scaling', 'rope_parameters'), 'object'),
}
# Stored dtype -> param_dtype. float32 holds every float16; bfloat16 would lose digits of it.
_DTYPES = {'float32': 'float32', 'bfloat16': 'bfloat16', 'float16': 'float32'}


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a folder's config.json."""
  path = folder / CONFIG_FILE
  try:
    return files.read_json(path, dict)
  except ValueError as error:
    raise ValueError(f'{error}; give a folder that save_pretrained or csrm_jax wrote.') from None


def check_types(spec: Mapping[str, Any], where: str) -> None:
  """Checks the types of the fields of a config.json that are read, and that sizes are sizes."""
  for name, kind in _TYPES.items():
    value = spec.get(name)
    if value is None:
      continue
    what, is_right = _KINDS[kind]
    if not is_right(value):
      raise ValueError(
        f'{where}: {name} is {checks.show(value)}, it must be {what}; copy the file again.'
      )
    if name in _LEAST and not _LEAST[name] <= value <= _MOST.get(name, 2**32):
      raise ValueError(
        f'{where}: {name} is {value}, no model has that; it must be from {_LEAST[name]} to '
        f'{_MOST.get(name, 2**32)}: copy the file again.'
      )


def form(spec: Mapping[str, Any], where: str) -> str:
  """Returns which of FORMS a config.json describes."""
  check_types(spec, where)
  names = spec.get('architectures') or [FORMS['causal_lm']]
  for name, suffix in FORMS.items():
    if names[0].endswith(suffix):
      return name
  raise ValueError(
    f'{where}: the architecture {names[0]!r} is not supported; give a model '
    f'saved as {" or ".join(FORMS.values())}.'
  )


def from_hf(spec: Mapping[str, Any], where: str, **overrides: Any) -> ModelConfig:
  """Returns the ModelConfig that the content of a config.json describes.

  Files of transformers before and since version 5 are read: rope_theta and rope_scaling, or
  rope_parameters; layer_types are optional. The overrides are fields out of RUN_TIME_FIELDS;
  resolve is applied to them.
  """
  for name in overrides:
    if name not in RUN_TIME_FIELDS:
      raise ValueError(
        f'{where}: {name!r} is a property of the weights and cannot be '
        f'overridden; only {", ".join(RUN_TIME_FIELDS)} can.'
      )
  check_types(spec, where)
  family_name = spec.get('model_type')
  if family_name not in FAMILIES:
    raise _unsupported(where, 'model_type', family_name, FAMILIES)
  family = FAMILIES[family_name]
  form(spec, where)  # also checks
  # Mostly null means that the family's default holds; in these fields it means none.
  may_be_null = ('sliding_window', *_OPTIONAL)
  said = {name: v for name, v in spec.items() if v is not None or name in may_be_null}
  spec = {**family.silent, **said}
  for name, value in _REQUIRED.items():
    if spec.get(name, value) != value:
      raise _unsupported(where, name, spec[name], [value])
  fields = {**_read_fields(spec, where), **family.fixed}
  for theirs, ours in _OPTIONAL.items():
    if ours not in family.fixed:
      fields[ours] = float(spec[theirs] or 0.0)
  act = spec.get(family.activation, 'silu')
  if act not in _ACTIVATIONS:
    raise _unsupported(where, family.activation, act, _ACTIVATIONS)
  fields['activation'] = _ACTIVATIONS[act]
  dtype = str(spec.get('dtype', spec.get('torch_dtype', 'float32')))
  if dtype not in _DTYPES:
    raise _unsupported(where, 'dtype', dtype, _DTYPES)
  fields |= {'family': family_name, 'param_dtype': _DTYPES[dtype]}
  fields |= _read_rope(spec, where) | _read_window(spec, family, where)
  try:
    return ModelConfig(**fields | resolve(overrides))
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None


def to_hf(cfg: ModelConfig, dtype: str, form: str = 'causal_lm') -> dict[str, Any]:
  """Returns the content of config.json for weights stored in that dtype.

  It has the older of the two styles, which every version of transformers reads, as do the servers
  built on it. A model that cfg.family cannot express raises ValueError.
  """
  family = FAMILIES[cfg.family]
  for name, value in family.fixed.items():
    if getattr(cfg, name) != value:
      raise ValueError(
        f'{name}={getattr(cfg, name)!r} cannot be written as family='
        f'{cfg.family!r}, where it is {value!r}; set the family that has it.'
      )
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  scaling = None
  if cfg.rope_scaling:
    fields = {theirs: getattr(cfg.rope_scaling, ours) for theirs, ours in _ROPE_SCALING.items()}
    scaling = {'rope_type': 'llama3', **fields}
  spec = {
    'architectures': [family.name + FORMS[form]],
    'model_type': cfg.family,
    **{theirs: getattr(cfg, ours) for theirs, ours in _FIELDS.items()},
    'attention_bias': False,
    family.activation: activations[cfg.activation],
    'rope_theta': cfg.rope_theta,
    'rope_scaling': scaling,
    'torch_dtype': dtype,
  }
  if cfg.family == 'llama':
    spec['mlp_bias'] = False
  for theirs, ours in _OPTIONAL.items():
    if ours not in family.fixed:
      spec[theirs] = getattr(cfg, ours) or None
  # Published configs have an int here.
  if 'query_pre_attn_scalar' in spec:
    scale = cfg.query_scale or cfg.head_dim
    spec['query_pre_attn_scalar'] = int(scale) if scale == int(scale) else scale
  if form == 'sequence_classification':
    # A single label is one score, which transformers takes for a regression.
    spec['id2label'], spec['label2id'] = {'0': 'score'}, {'score': 0}
  return spec | _write_window(cfg, family)


def canonical(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the fields that describe weights; they are equal for models that compute the same."""
  every = dataclasses.asdict(cfg)
  fields = {name: value for name, value in every.items() if name not in RUN_TIME_FIELDS}
  fields['query_scale'] = fields['query_scale'] or float(cfg.head_dim)
  # Longer periods than the depth all put the window on the first layer only.
  period = min(cfg.window_period, cfg.num_layers)
  fields['window_period'] = period if cfg.sliding_window else 1
  return fields


def _read_fields(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
  heads = spec.get('num_attention_heads')
  known = {
    'num_key_value_heads': heads,
    'tie_word_embeddings': False,
    'max_position_embeddings': 2048,
    **spec,
  }
  if 'head_dim' not in known and heads and 'hidden_size' in known:
    known['head_dim'] = known['hidden_size'] // heads
  missing = [name for name in _FIELDS if known.get(name) is None]
  if missing:
    raise ValueError(f'{where}: has no {missing[0]!r}; give the whole config.json of a model.')
  return {ours: known[theirs] for theirs, ours in _FIELDS.items()}


def _read_rope(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields rope_theta and rope_scaling."""
  rope = dict(spec.get('rope_scaling') or {})
  rope |= spec.get('rope_parameters') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  theta = rope.get('rope_theta', spec.get('rope_theta', 10_000.0))
  if any(isinstance(value, Mapping) for value in rope.values()):
    raise ValueError(
      f'{where}: rope_parameters differ between layers, which is not '
      'supported; choose another model.'
    )
  if rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise _unsupported(where, 'partial_rotary_factor', rope['partial_rotary_factor'], [1.0])
  if kind == 'default':
    return {'rope_theta': float(theta), 'rope_scaling': None}
  if kind != 'llama3':
    raise _unsupported(where, 'rope_type', kind, ['default', 'llama3'])
  rope_numbers = {name: rope[name] for name in (*_ROPE_SCALING, 'rope_theta') if name in rope}
  for name, value in rope_numbers.items():
    if not _KINDS['number'][1](value) or value <= 0:
      raise _unsupported(where, name, value, ['a number above 0'])
  missing = [name for name in _ROPE_SCALING if name not in rope]
  if missing:
    raise ValueError(f'{where}: the rope scaling has no {missing[0]!r}; copy the file again.')
  scaling = {ours: float(rope[theirs]) for theirs, ours in _ROPE_SCALING.items()}
  scaling['original_length'] = int(scaling['original_length'])
  return {'rope_theta': float(theta), 'rope_scaling': RopeScaling(**scaling)}


def _read_window(spec: Mapping[str, Any], family: Family, where: str) -> dict[str, int]:
  """Returns the fields sliding_window and window_period."""
  window = spec.get('sliding_window') or 0
  if not family.window_period or not spec.get('use_sliding_window', True):
    window = 0
  num_layers = spec['num_hidden_layers']
  types = spec.get('layer_types') if family.layer_types else None
  if types is not None:
    known = ('full_attention', 'sliding_attention')
    for kind in types:
      if kind not in known:
        raise _unsupported(where, 'layer_types', kind, known)
    if len(types) != num_layers:
      raise ValueError(
        f'{where}: {len(types)} layer_types for {num_layers} layers; copy the file again.'
      )
    flags = [kind == 'sliding_attention' for kind in types]
  elif spec.get('use_sliding_window'):
    flags = [i >= spec['max_window_layers'] for i in range(num_layers)]
  else:
    flags = _every(family.window_period or 1, num_layers)
  if not window or not any(flags):
    return {'sliding_window': 0, 'window_period': 1}
  # In a shallow model several periods fit: the family's own comes first.
  for period in (family.window_period, *range(1, num_layers + 1)):
    if flags == _every(period, num_layers):
      return {'sliding_window': int(window), 'window_period': period}
  name = 'layer_types' if types is not None else 'max_window_layers'
  raise ValueError(
    f'{where}: {name} puts the sliding window on the layers '
    f'{[i for i, flag in enumerate(flags) if flag]}; only every n-th layer '
    'from the first on is supported; choose another model.'
  )


def _every(period: int, num_layers: int) -> list[bool]:
  return [i % period == 0 for i in range(num_layers)]


def _write_window(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  if not family.window_period:
    return {}
  window = cfg.sliding_window
  if not family.layer_types:
    if window and cfg.window_period != family.window_period:
      raise ValueError(
        f'window_period={cfg.window_period} cannot be written as family='
        f'{cfg.family!r}, where it is {family.window_period}.'
      )
    return {'sliding_window': window or None}
  flags = [bool(window) and flag for flag in _every(cfg.window_period, cfg.num_layers)]
  spec = {
    'sliding_window': window or None,
    'layer_types': ['sliding_attention' if flag else 'full_attention' for flag in flags],
  }
  if 'use_sliding_window' in family.silent:
    spec['use_sliding_window'] = bool(window)
    spec['max_window_layers'] = 0 if window else cfg.num_layers
  return spec


def _unsupported(where: str, name: str, value: Any, choices) -> ValueError:
  supported = ', '.join(repr(choice) for choice in choices)
  return ValueError(
    f'{where}: {name} is {value!r}, only {supported} is supported; choose another model.'
  )
