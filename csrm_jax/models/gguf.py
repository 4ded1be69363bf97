"""GGUF files, read as what they were made from, a Hugging Face folder, and written from one.

A .gguf file holds config, weights and tokenizer. Read, each becomes what the folder has: the
content of config.json, the tokenizer's files, and tensors under Hugging Face names. Quantised
tensors become float32; the rows of query and key return to the order that llama.cpp changed.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.core import checks, files
from csrm_jax.models import hf_config, shards

# The types of tensors that are read; the values of all become float32.
TYPES = ('F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q4_K', 'Q5_K', 'Q6_K')

# general.architecture -> the architecture in config.json, and whether llama.cpp permuted the rows
# of query and key.
_ARCHITECTURES = {'llama': ('LlamaForCausalLM', True), 'qwen3': ('Qwen3ForCausalLM', False)}
# Keys of the metadata, behind "<architecture>." -> fields of config.json.
_FIELDS = {
  'block_count': 'num_hidden_layers',
  'context_length': 'max_position_embeddings',
  'embedding_length': 'hidden_size',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
}
# What a file may ask for that is not supported; absent and zero are fine.
_UNSUPPORTED = (
  'expert_count',
  'attention.sliding_window',
  'rope.scaling.factor',
  'attention.max_alibi_bias',
  'logit_scale',
)

# How text is cut into pieces before a byte-level BPE merges within each.
_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r'|\s+(?!\S)|\s+'
)
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class _Pre(NamedTuple):
  """How a byte-level BPE prepares text."""

  pattern: str  # matches one piece
  single_digits: bool = False  # each digit is first made a piece of its own
  normalizer: str | None = None  # the Unicode normal form that text is brought into first
  whole_words: bool = False  # a piece that is a token is never merged from parts


# By the names that tokenizer.ggml.pre has for them.
_PRE = {
  'gpt-2': _Pre(_GPT2),
  'smollm': _Pre(_GPT2, single_digits=True),
  'llama-bpe': _Pre(_LLAMA3, whole_words=True),
  # Like Llama 3, but digits stand alone.
  'qwen2': _Pre(_LLAMA3.replace('{1,3}', ''), normalizer='NFC'),
}
# Values of tokenizer.ggml.token_type, which are SentencePiece's.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# The tokens whose ids a file names, and what it calls them.
_TOKENS = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding'}
# What csrm_jax wrote: a reward model's description, and the rope scaling that stands in the file
# only as a tensor of factors.
_OWN = 'csrm_jax'
_ROPE_KEY, _ROPE_FACTORS = 'csrm_jax.rope_scaling', 'rope_freqs.weight'
# The types that are written, by the names of dtypes; vectors stay float32.
WRITTEN = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
# How each pair's wavelength is stretched, and what Llama 3.1 to 3.3 share of the reasons.
_LLAMA3_ROPE = {
  'rope_type': 'llama3',
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
# Bytes of the values in the metadata, by type; texts and lists have lengths of their own.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
# The largest vocabularies have some 300,000 tokens and 600,000 merges.
_MAX_ITEMS = 2**21


class _File(NamedTuple):
  metadata: Mapping[str, Any]
  tensors: tuple[Any, ...]  # gguf.ReaderTensor


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the content of config.json for the model in a .gguf file."""
  file = _read(path)
  arch = file.metadata.get('general.architecture')
  if arch not in _ARCHITECTURES:
    raise ValueError(
      f'{path}: general.architecture is {arch!r}, only {", ".join(_ARCHITECTURES)} is supported; '
      'convert the model to safetensors elsewhere.'
    )
  prefix = f'{arch}.'
  own = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
  names = {tensor.name: tensor for tensor in file.tensors}
  if (parts := file.metadata.get('split.count', 0)) and parts != 1:
    raise ValueError(
      f'{path}: is one of the {parts} files of a split GGUF; merge them with llama-gguf-split '
      '--merge, and give that file.'
    )
  scaling = _own_json(file, _ROPE_KEY, path)
  if bad := [f'{arch}.{key}' for key in _UNSUPPORTED if own.get(key)]:
    raise ValueError(
      f'{path}: has {bad[0]}, which is not supported in a GGUF file; use '
      'the safetensors of the model.'
    )
  missing = [key for key in _FIELDS if not np.isscalar(own.get(key))]
  if missing or 'token_embd.weight' not in names:
    what = f'{arch}.{missing[0]}' if missing else 'token_embd.weight'
    raise ValueError(f'{path}: has no {what} or one for each layer; use another file.')
  spec = {theirs: own[key] for key, theirs in _FIELDS.items()}
  hf_config.check_types(spec, str(path))
  spec['rms_norm_eps'] = _decimal(spec['rms_norm_eps'])
  heads = spec['num_attention_heads']
  spec['head_dim'] = own.get('attention.key_length', spec['hidden_size'] // heads)
  if own.get('rope.dimension_count', spec['head_dim']) != spec['head_dim']:
    raise ValueError(
      f'{path}: {arch}.rope.dimension_count is {own["rope.dimension_count"]}, only the whole head '
      f'({spec["head_dim"]}) is supported; choose another model.'
    )
  if own_spec := _own_json(file, _OWN, path):
    spec[_OWN] = own_spec
  theta = _decimal(own.get('rope.freq_base', 10_000.0))
  if scaling is None and _ROPE_FACTORS in names:
    factors = _dequantize(names[_ROPE_FACTORS], None)
    scaling = _rope_scaling(factors, theta, spec['head_dim'], path)
  return spec | {
    'rope_scaling': scaling,
    'architectures': [_ARCHITECTURES[arch][0]],
    'model_type': arch,
    'num_key_value_heads': own.get('attention.head_count_kv', heads),
    'rope_theta': theta,
    'tie_word_embeddings': 'output.weight' not in names,
    'torch_dtype': 'float32',  # what open_tensors returns
    'vocab_size': int(names['token_embd.weight'].shape[-1]),
    **{f'{name}_token_id': i for name, i in token_ids(path).items()},
  }


def _own_json(file: _File, key: str, path: pathlib.Path) -> Any:
  """Returns the JSON that csrm_jax wrote into the metadata, or None."""
  try:
    return files.parse_json(file.metadata.get(key, 'null'), f'{path}: {key}')
  except (TypeError, json.JSONDecodeError) as error:
    raise ValueError(f'{path}: {key} is not valid JSON ({error}); copy the file again.') from None


def _rope_scaling(
  factors: np.ndarray, theta: float, head_dim: int, path: pathlib.Path
) -> dict[str, Any] | None:
  """Returns config.json's rope_scaling, of which llama.cpp stores what it makes of each pair."""
  if np.all(factors == 1):
    return None
  scaling = _LLAMA3_ROPE | {'factor': float(factors.max())}
  expected = _rope_factors({'rope_scaling': scaling, 'rope_theta': theta, 'head_dim': head_dim})
  if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
    raise ValueError(
      f'{path}: has {_ROPE_FACTORS}, whose factors are not those of Llama 3, which is not '
      'supported in a GGUF file; use the safetensors of the model.'
    )
  return scaling


def open_tensors(path: pathlib.Path, names: Mapping[str, str]) -> dict[str, shards.Tensor]:
  """Returns the tensors under their Hugging Face names, as float32, unread.

  `names` maps the bare names here to those, with {} for the number of the layer.
  """
  spec, tensors = read_config(path), {}
  heads = _permuted_heads(spec['model_type'], spec)
  for tensor in _read(path).tensors:
    if tensor.name == _ROPE_FACTORS:
      continue  # read_config has read it
    kind = tensor.tensor_type.name
    if kind not in TYPES:
      raise ValueError(
        f'{path}: {tensor.name} is stored as {kind}, only {", ".join(TYPES)} are supported; take a '
        'file of another quantisation.'
      )
    match = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.weight', tensor.name)
    theirs = names.get(match[2]) if match else None
    if theirs is None or ('{}' in theirs) != (match[1] is not None):
      raise ValueError(
        f'{path}: the tensor {tensor.name} is of no use to the model; use the safetensors of the '
        'model.'
      )
    name = theirs.format(match[1])
    # GGUF lists the axis that varies fastest first.
    tensors[name] = shards.Tensor(
      tuple(int(size) for size in reversed(tensor.shape)),
      np.dtype(np.float32),
      str(path),
      functools.partial(_dequantize, tensor, heads.get(name.split('.')[-2])),
    )
  return tensors


def _permuted_heads(arch: str, spec: Mapping[str, Any]) -> dict[str, int]:
  """Returns {product: its heads} of those whose rows llama.cpp has in an order of its own."""
  if not _ARCHITECTURES[arch][1]:
    return {}
  return {'q_proj': spec['num_attention_heads'], 'k_proj': spec['num_key_value_heads']}


def token_ids(path: pathlib.Path) -> dict[str, int]:
  """Returns the ids of those of 'bos', 'eos' and 'pad' that the file names."""
  metadata = _read(path).metadata
  ids = {name: metadata.get(f'tokenizer.ggml.{key}_token_id') for name, key in _TOKENS.items()}
  return {name: int(i) for name, i in ids.items() if i is not None}


def tokenizer_files(path: pathlib.Path) -> dict[str, bytes]:
  """Returns the content of tokenizer.json and of tokenizer_config.json with the chat template."""
  metadata = _read(path).metadata
  kind = metadata.get('tokenizer.ggml.model')
  if kind == 'llama':
    return {'tokenizer.model': _sentencepiece(path, metadata)} | _settings(
      metadata, token_ids(path)
    )
  pre = metadata.get('tokenizer.ggml.pre', 'gpt-2')
  if kind != 'gpt2' or pre not in _PRE:
    name, value = ('pre', pre) if kind == 'gpt2' else ('model', kind)
    known = ', '.join(
      _PRE if kind == 'gpt2' else ['gpt2 (byte-level BPE)', 'llama (SentencePiece)']
    )
    raise ValueError(
      f'{path}: tokenizer.ggml.{name} is {value!r}, only {known} is '
      'supported; give the tokenizer.json of the model.'
    )
  tokens = metadata['tokenizer.ggml.tokens']
  ids = token_ids(path)
  spec = _tokenizer_json(
    tokens, metadata['tokenizer.ggml.merges'], metadata['tokenizer.ggml.token_type'], _PRE[pre]
  )
  if metadata.get('tokenizer.ggml.add_bos_token') and 'bos' in ids:
    spec['post_processor'] = _prepend(tokens[ids['bos']], ids['bos'])
  return {'tokenizer.json': json.dumps(spec, ensure_ascii=False).encode()} | _settings(
    metadata, ids
  )


def _settings(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, bytes]:
  """Returns the content of tokenizer_config.json."""
  tokens = metadata['tokenizer.ggml.tokens']
  is_bytes = metadata['tokenizer.ggml.model'] == 'gpt2'
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast' if is_bytes else 'LlamaTokenizer',
    'clean_up_tokenization_spaces': False,
    **{f'{name}_token': tokens[i] for name, i in ids.items()},
  }
  template = metadata.get('tokenizer.chat_template')
  if template is not None:
    settings['chat_template'] = template
  return {'tokenizer_config.json': json.dumps(settings, ensure_ascii=False, indent=2).encode()}


def _sentencepiece(path: pathlib.Path, metadata: Mapping[str, Any]) -> bytes:
  """Returns the SentencePiece model (BPE) of a file."""
  from sentencepiece import sentencepiece_model_pb2

  names = 'tokens', 'scores', 'token_type'
  columns = [metadata.get(f'tokenizer.ggml.{name}') for name in names]
  if None in columns:
    missing = names[columns.index(None)]
    raise ValueError(
      f'{path}: has no tokenizer.ggml.{missing}; give the tokenizer.model of the model.'
    )
  model = sentencepiece_model_pb2.ModelProto()
  for piece, score, kind in zip(*columns, strict=True):
    model.pieces.add(piece=piece, score=float(score), type=int(kind))
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.trainer_spec.byte_fallback = True
  model.trainer_spec.vocab_size = len(columns[0])
  for name, i in token_ids(path).items():
    setattr(model.trainer_spec, f'{name}_piece', columns[0][i])
  normalizer = model.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = bool(metadata.get('tokenizer.ggml.add_space_prefix', True))
  normalizer.remove_extra_whitespaces = False
  return model.SerializeToString()


def _tokenizer_json(
  tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], pre: _Pre
) -> dict[str, Any]:
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': False}
  byte_level |= {'trim_offsets': True, 'use_regex': False}
  steps = [
    {'type': 'Split', 'pattern': {'Regex': pre.pattern}, 'behavior': 'Isolated', 'invert': False},
    byte_level,
  ]
  if pre.single_digits:
    steps.insert(0, {'type': 'Digits', 'individual_digits': True})
  no_flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  added = [
    {'id': i, 'content': tokens[i], **no_flags, 'special': kind == _CONTROL}
    for i, kind in enumerate(kinds)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': pre.normalizer and {'type': pre.normalizer},
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': steps},
    'post_processor': None,
    'decoder': byte_level,
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': None,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': False,
      'ignore_merges': pre.whole_words,
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': list(merges),
    },
  }


def _prepend(token: str, i: int) -> dict[str, Any]:
  """Returns the post-processor of tokenizer.json that puts a token before each text."""
  first = {'SpecialToken': {'id': token, 'type_id': 0}}
  text, other = ({'Sequence': {'id': name, 'type_id': n}} for n, name in enumerate('AB'))
  return {
    'type': 'TemplateProcessing',
    'single': [first, text],
    'pair': [first, text, other],
    'special_tokens': {token: {'id': token, 'ids': [i], 'tokens': [token]}},
  }


def _dequantize(tensor: Any, num_heads: int | None) -> np.ndarray:
  """Returns float32 values; given num_heads, the rows are put in Hugging Face's order."""
  values = checks.require('gguf', 'a .gguf file').quants.dequantize(tensor.data, tensor.tensor_type)
  values = np.asarray(values, np.float32)
  if num_heads:
    # llama.cpp rotates the pairs (2i, 2i + 1) of a head, this decoder (i, i + H/2).
    pairs = values.reshape(num_heads, -1, 2, values.shape[-1])
    values = pairs.swapaxes(1, 2).reshape(values.shape)
  return values


# --- Writing ---------------------------------------------------------------------------


def write(
  path: pathlib.Path,
  spec: Mapping[str, Any],
  tensors: Mapping[str, shards.Tensor],
  names: Mapping[str, str],
  tokenizer: Mapping[str, Any],
  *,
  dtype: str,
  description: Mapping[str, Any] | None = None,
) -> None:
  """Writes a model as one .gguf file, which appears whole; one tensor at a time is in memory.

  Args:
    spec: The content of config.json.
    tensors: The weights, under their Hugging Face names.
    names: As in open_tensors.
    tokenizer: What tokenizer_fields returns, and perhaps chat_template.
    dtype: One of WRITTEN.
    description: What reward.exported has to say about a reward model.

  Raises:
    ValueError: llama.cpp has another architecture for this family than is written here.
  """
  package = checks.require('gguf', f'{path}: a .gguf file')
  known = {'llama': 'llama', 'mistral': 'llama', 'qwen3': 'qwen3'}
  arch = known.get(spec['model_type'])
  if arch is None or (spec.get('sliding_window') and arch != 'llama'):
    raise ValueError(
      f'{path}: a model of the family {spec["model_type"]!r} (with windows) is not written as '
      f'GGUF, only {", ".join(known)}; export form=causal_lm, and convert that with llama.cpp'
    )
  # Up to its length a window changes nothing.
  window = spec.get('sliding_window') or spec['max_position_embeddings']
  spec = {**spec, 'max_position_embeddings': min(window, spec['max_position_embeddings'])}
  fields: dict[str, Any] = {
    'general.name': path.stem,
    **{f'{arch}.{key}': spec[theirs] for key, theirs in _FIELDS.items()},
    f'{arch}.attention.head_count_kv': spec['num_key_value_heads'],
    f'{arch}.attention.key_length': spec['head_dim'],
    f'{arch}.attention.value_length': spec['head_dim'],
    f'{arch}.rope.dimension_count': spec['head_dim'],
    f'{arch}.rope.freq_base': float(spec['rope_theta']),
    f'{arch}.vocab_size': spec['vocab_size'],
    **{f'tokenizer.{key}': value for key, value in tokenizer.items()},
  }
  if description is not None:
    fields[_OWN] = json.dumps(description)
  heads = _permuted_heads(arch, spec)
  ours = {theirs: name for name, theirs in names.items()}
  parts: dict[str, tuple[tuple[int, ...], Any]] = {}
  for name, tensor in tensors.items():
    layer = re.search(r'\.(\d+)\.', name)
    prefix = f'blk.{layer[1]}.' if layer else ''
    stem = ours[name.replace(f'.{layer[1]}.', '.{}.', 1) if layer else name]
    read = functools.partial(_permuted, tensor, heads.get(name.split('.')[-2]))
    parts[f'{prefix}{stem}.weight'] = tensor.shape, read
  if spec.get('rope_scaling'):
    fields[_ROPE_KEY] = json.dumps(spec['rope_scaling'])
    factors = _rope_factors(spec)
    parts[_ROPE_FACTORS] = factors.shape, lambda: factors
  _write_file(package, path, arch, fields, parts, WRITTEN[dtype])


def _write_file(
  package: Any,
  path: pathlib.Path,
  arch: str,
  fields: Mapping[str, Any],
  parts: Mapping[str, tuple[tuple[int, ...], Any]],
  kind: str,
) -> None:
  types, made = package.GGMLQuantizationType, []
  with files.whole(path) as partial:
    writer = package.GGUFWriter(partial, arch)
    try:
      for key, value in fields.items():
        _add(package, writer, key, value)
      for name, (shape, _) in parts.items():
        made.append(types[kind if len(shape) > 1 else 'F32'])
        size = 4 if made[-1] == types.F32 else 2
        # In bytes, as the package wants shapes of types that numpy does not have.
        in_bytes = (*shape[:-1], shape[-1] * size)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), made[-1])
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for (_, read), number in zip(parts.values(), made, strict=True):
        writer.write_tensor_data(package.quants.quantize(read(), number))
    finally:
      writer.close()


def _add(package: Any, writer: Any, key: str, value: Any) -> None:
  """Adds a field; integers are unsigned, as llama.cpp reads sizes and ids."""
  kinds = package.GGUFValueType
  if isinstance(value, int) and not isinstance(value, bool):
    writer.add_key_value(key, value, kinds.UINT32)
  elif isinstance(value, list):
    writer.add_array(key, value)
  else:
    writer.add_key_value(key, value, kinds.get_type(value))


def tokenizer_fields(
  path: pathlib.Path, ids: Mapping[str, int | None], size: int
) -> dict[str, Any]:
  """Returns the fields, without "tokenizer.", of a .model (BPE) or tokenizer.json file.

  `ids` has those of 'bos', 'eos' and 'pad'; places up to `size` are filled with unused tokens.

  Raises:
    ValueError: The tokenizer is of a kind that is not read here either.
  """
  make = _fields_of_model if path.suffix == '.model' else _fields_of_json
  fields = make(path)
  for i in range(len(fields['ggml.tokens']), size):
    fields['ggml.tokens'].append(f'[UNUSED{i}]')
    fields['ggml.token_type'].append(_UNUSED)
    if 'ggml.scores' in fields:
      fields['ggml.scores'].append(-1e4)
  fields |= {f'ggml.{_TOKENS[name]}_token_id': i for name, i in ids.items() if i is not None}
  return fields | {'ggml.add_bos_token': ids['bos'] is not None, 'ggml.add_eos_token': False}


def _fields_of_model(path: pathlib.Path) -> dict[str, Any]:
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  if model.trainer_spec.model_type != model.trainer_spec.BPE:
    raise ValueError(f'{path}: a SentencePiece model that is no BPE; llama.cpp reads no other.')
  return {
    'ggml.model': 'llama',
    'ggml.pre': 'default',
    'ggml.tokens': [piece.piece for piece in model.pieces],
    'ggml.scores': [float(piece.score) for piece in model.pieces],
    'ggml.token_type': [int(piece.type) for piece in model.pieces],
    'ggml.add_space_prefix': bool(model.normalizer_spec.add_dummy_prefix),
  }


def _fields_of_json(path: pathlib.Path) -> dict[str, Any]:
  spec = json.loads(path.read_bytes())
  pre = spec.get('pre_tokenizer') or {}
  steps = pre.get('pretokenizers', [pre])
  pattern = next((step['pattern'].get('Regex') for step in steps if 'pattern' in step), None)
  found = _Pre(
    pattern or (_GPT2 if any(step.get('use_regex') for step in steps) else ''),
    any(step.get('individual_digits') for step in steps),
    (spec.get('normalizer') or {}).get('type'),
    bool(spec['model'].get('ignore_merges')),
  )
  name = next((name for name, known in _PRE.items() if known == found), None)
  if spec['model'].get('type', 'BPE') != 'BPE' or name is None:
    raise ValueError(
      f'{path}: text is cut in a way that is not known here under a name of llama.cpp, only those '
      f'of {", ".join(_PRE)} are; export form=causal_lm, and convert that with llama.cpp'
    )
  added = {token['content']: token for token in spec.get('added_tokens') or ()}
  ids = spec['model']['vocab'] | {content: token['id'] for content, token in added.items()}
  tokens = [f'[UNUSED{i}]' for i in range(max(ids.values()) + 1)]
  kinds = [_UNUSED] * len(tokens)
  for content, i in ids.items():
    is_control = content in added and added[content]['special']
    tokens[i] = content
    kinds[i] = _CONTROL if is_control else _USER_DEFINED if content in added else _NORMAL
  merges = spec['model']['merges']
  return {
    'ggml.model': 'gpt2',
    'ggml.pre': name,
    'ggml.tokens': tokens,
    'ggml.token_type': kinds,
    'ggml.merges': [merge if isinstance(merge, str) else ' '.join(merge) for merge in merges],
  }


def _permuted(tensor: shards.Tensor, num_heads: int | None) -> np.ndarray:
  """Returns float32 values; given num_heads, the rows are put in llama.cpp's order."""
  values = np.asarray(tensor.read(), np.float32)
  if num_heads:
    halves = values.reshape(num_heads, 2, -1, values.shape[-1])
    values = halves.swapaxes(1, 2).reshape(values.shape)
  return np.ascontiguousarray(values)


def _rope_factors(spec: Mapping[str, Any]) -> np.ndarray:
  """Returns what llama.cpp divides frequencies by, float32 [H/2].

  Source: Llama 3.1's reference code (apply_scaling).
  """
  scaling, half = spec['rope_scaling'], np.arange(0, spec['head_dim'], 2, dtype=np.float64)
  length, factor = scaling['original_max_position_embeddings'], max(scaling['factor'], 1e-9)
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  turns = length / (2 * np.pi * spec['rope_theta'] ** (half / spec['head_dim']))
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# --- Parsing ---------------------------------------------------------------------------


def _decimal(value: float) -> float:
  """Returns the decimal number that was meant: float32 holds 1e-5 as 9.9999997e-06."""
  return float(str(np.float32(value)))


def _read(path: pathlib.Path) -> _File:
  try:
    stat = path.stat()
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror}); check the path.') from None
  return _parse(path, stat.st_size, stat.st_mtime_ns)


def _check_header(path: pathlib.Path) -> None:
  """Checks that what the header counts is there: the parser allocates for it, or loops."""
  size = path.stat().st_size
  if size < 24:
    raise ValueError('it has no header')
  with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    order = '<' if data[4:6] != b'\0\0' else '>'

    def take(form: str, at: int) -> int:
      if at + struct.calcsize(form) > size:
        raise ValueError('it ends within its metadata')
      return struct.unpack_from(order + form, data, at)[0]

    def skip(kind: int, at: int) -> int:
      """Returns where a value ends."""
      if kind in _VALUE_BYTES:
        return at + _VALUE_BYTES[kind]
      if kind == _TEXT:
        return at + 8 + take('Q', at)
      if kind != _LIST:
        raise ValueError(f'a value of its metadata has the type {kind}, which there is not')
      item, num = take('I', at), take('Q', at + 4)
      if item == _LIST:
        raise ValueError('a list of its metadata holds lists')
      if num > min(_MAX_ITEMS, size):
        raise ValueError(f'a list of its metadata has {num:,} items')
      at += 12
      if item in _VALUE_BYTES:
        return at + num * _VALUE_BYTES[item]
      for _ in range(num):
        at = skip(item, at)
      return at

    num_tensors, num_values, at = take('Q', 8), take('Q', 16), 24
    if 24 * num_tensors + 13 * num_values > size:
      raise ValueError(f'it is too short for {num_tensors:,} tensors and {num_values:,} values')
    for _ in range(num_values):
      at = skip(_TEXT, at)
      at = skip(take('I', at), at + 4)


@functools.lru_cache(maxsize=4)
def _parse(path: pathlib.Path, size: int, mtime_ns: int) -> _File:
  """Returns the parsed file, parsed once; size and time tell when it has changed."""
  del size, mtime_ns
  package = checks.require('gguf', f'{path}: a .gguf file')
  try:
    _check_header(path)
    reader = package.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
  except Exception as error:  # The parser trips over a damaged file in any way.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f'{path}: cannot be read as GGUF ({reason}); copy the file again.') from None
  return _File(metadata, tuple(reader.tensors))
