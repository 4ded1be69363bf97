"""GGUF files, read as what they were made from: a Hugging Face folder.

A .gguf file holds config, weights and tokenizer. Here each becomes what the folder has: the
content of config.json, the tokenizer's files, and tensors under Hugging Face names. Quantised
tensors become float32; the rows of query and key return to the order that llama.cpp changed.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.core import checks
from csrm_jax.models import shards

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
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4


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
  bad = [f'{arch}.{key}' for key in _UNSUPPORTED if own.get(key)]
  # Llama 3.1's rope scaling comes as a tensor of factors, from which its settings are not read.
  bad += ['rope_freqs.weight'] if 'rope_freqs.weight' in names else []
  if bad:
    raise ValueError(
      f'{path}: has {bad[0]}, which is not supported in a GGUF file; use '
      'the safetensors of the model.'
    )
  missing = [key for key in _FIELDS if not np.isscalar(own.get(key))]
  if missing or 'token_embd.weight' not in names:
    what = f'{arch}.{missing[0]}' if missing else 'token_embd.weight'
    raise ValueError(f'{path}: has no {what} or one for each layer; use another file.')
  spec = {theirs: own[key] for key, theirs in _FIELDS.items()}
  spec['rms_norm_eps'] = _decimal(spec['rms_norm_eps'])
  heads = spec['num_attention_heads']
  spec['head_dim'] = own.get('attention.key_length', spec['hidden_size'] // heads)
  if own.get('rope.dimension_count', spec['head_dim']) != spec['head_dim']:
    raise ValueError(
      f'{path}: {arch}.rope.dimension_count is {own["rope.dimension_count"]}, only the whole head '
      f'({spec["head_dim"]}) is supported; choose another model.'
    )
  return spec | {
    'architectures': [_ARCHITECTURES[arch][0]],
    'model_type': arch,
    'num_key_value_heads': own.get('attention.head_count_kv', heads),
    'rope_theta': _decimal(own.get('rope.freq_base', 10_000.0)),
    'tie_word_embeddings': 'output.weight' not in names,
    'torch_dtype': 'float32',  # what open_tensors returns
    'vocab_size': int(names['token_embd.weight'].shape[-1]),
    **{f'{name}_token_id': i for name, i in token_ids(path).items()},
  }


def open_tensors(path: pathlib.Path, names: Mapping[str, str]) -> dict[str, shards.Tensor]:
  """Returns the tensors under their Hugging Face names, as float32, unread.

  `names` maps the bare names here to those, with {} for the number of the layer.
  """
  spec, tensors = read_config(path), {}
  heads = {}
  if _ARCHITECTURES[spec['model_type']][1]:
    heads = {'q_proj': spec['num_attention_heads'], 'k_proj': spec['num_key_value_heads']}
  for tensor in _read(path).tensors:
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


def token_ids(path: pathlib.Path) -> dict[str, int]:
  """Returns the ids of those of 'bos', 'eos' and 'pad' that the file names."""
  metadata = _read(path).metadata
  keys = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding'}
  ids = {name: metadata.get(f'tokenizer.ggml.{key}_token_id') for name, key in keys.items()}
  return {name: int(i) for name, i in ids.items() if i is not None}


def tokenizer_files(path: pathlib.Path) -> dict[str, bytes]:
  """Returns the content of tokenizer.json and of tokenizer_config.json with the chat template."""
  metadata = _read(path).metadata
  kind = metadata.get('tokenizer.ggml.model')
  pre = metadata.get('tokenizer.ggml.pre', 'gpt-2')
  if kind != 'gpt2' or pre not in _PRE:
    name, value = ('pre', pre) if kind == 'gpt2' else ('model', kind)
    known = ', '.join(_PRE if kind == 'gpt2' else ['gpt2 (byte-level BPE)'])
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
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    **{f'{name}_token': tokens[i] for name, i in ids.items()},
  }
  template = metadata.get('tokenizer.chat_template')
  if template is not None:
    settings['chat_template'] = template
  return {
    'tokenizer.json': json.dumps(spec, ensure_ascii=False).encode(),
    'tokenizer_config.json': json.dumps(settings, ensure_ascii=False, indent=2).encode(),
  }


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


def _decimal(value: float) -> float:
  """Returns the decimal number that was meant: float32 holds 1e-5 as 9.9999997e-06."""
  return float(str(np.float32(value)))


def _read(path: pathlib.Path) -> _File:
  try:
    stat = path.stat()
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror}); check the path.') from None
  return _parse(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _parse(path: pathlib.Path, size: int, mtime_ns: int) -> _File:
  """Returns the parsed file, parsed once; size and time tell when it has changed."""
  del size, mtime_ns
  package = checks.require('gguf', f'{path}: a .gguf file')
  try:
    reader = package.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
  except Exception as error:  # The parser trips over a damaged file in any way.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f'{path}: cannot be read as GGUF ({reason}); copy the file again.') from None
  return _File(metadata, tuple(reader.tensors))
