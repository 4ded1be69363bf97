"""What a Hugging Face tokenizer.json says about its special tokens."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import tokenizers

# Looked for where neither the caller nor tokenizer_config.json names them.
_EOS = (
  '<|eot_id|>',
  '<|im_end|>',
  '<end_of_turn>',
  '<|end_of_text|>',
  '<eos>',
  '</s>',
  '<|endoftext|>',
)
_PAD = ('<pad>', '[PAD]', '<|pad|>', '<|finetune_right_pad_id|>', '<|endoftext|>')
# What looks like a control token, even where a vocabulary lists it as text.
TAG = re.compile(r'<[^\s<>]+>|\[[A-Z_]+\]')


def mark_control(spec: dict[str, Any]) -> dict[str, int]:
  """Marks the control tokens of `spec` as special; returns text -> id.

  Chat markers such as <think> are often listed as no special token, which
  makes the library parse them from any text. The unknown token is none of
  them: it is what plain text gives.
  """
  model = spec['model']
  unknown = model.get('unk_token')
  if unknown is None and model.get('unk_id') is not None:
    unknown = model['vocab'][model['unk_id']][0]
  control = {}
  for token in spec.get('added_tokens') or ():
    content = token['content']
    if token['special'] or TAG.fullmatch(content.strip()):
      token['special'] = True
      if content != unknown:
        control[content] = token['id']
  return control


def encode_as_continuation(spec: dict[str, Any]) -> bool:
  """Turns off what `spec` does to the beginning of a text alone.

  Returns:
    Whether it puts a space in front of plain text that begins a prompt.
  """
  stages = ('normalizer', 'pre_tokenizer')
  opens_with_space = any(_has_prefix(spec.get(stage)) for stage in stages)
  for stage in (*stages, 'decoder'):
    spec[stage] = _without_prefix(spec.get(stage))
  return opens_with_space


def _has_prefix(part: dict[str, Any] | None) -> bool:
  if part is None:
    return False
  items = part.get('normalizers') or part.get('pretokenizers') or ()
  is_open = part.get('prepend_scheme', 'always') != 'never'
  return (
    part['type'] == 'Prepend'
    or (part['type'] == 'ByteLevel' and part.get('add_prefix_space', True))
    or (part['type'] == 'Metaspace' and is_open and part.get('add_prefix_space', True))
    or any(_has_prefix(item) for item in items)
  )


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
  if part is None:
    return None
  kind = part['type']
  if kind == 'Prepend' or (kind == 'Strip' and part.get('start', 0)):
    return None
  if kind == 'Metaspace':
    part['prepend_scheme'] = 'never'
  if kind in ('Metaspace', 'ByteLevel') and 'add_prefix_space' in part:
    part['add_prefix_space'] = False
  for key in ('normalizers', 'pretokenizers', 'decoders'):
    if key in part:
      kept = [_without_prefix(item) for item in part[key]]
      part[key] = [item for item in kept if item is not None]
  return part


def read_settings(path: str | os.PathLike) -> Mapping[str, Any]:
  """Returns the tokenizer_config.json beside `path`, {} if there is none."""
  settings = pathlib.Path(path).with_name('tokenizer_config.json')
  if not settings.is_file():
    return {}
  try:
    obj = json.loads(settings.read_bytes())
  except ValueError:
    raise ValueError(
      f'{settings}: not valid JSON; restore it, or remove it and name the'
      ' tokens with eos=..., pad=...'
    ) from None
  return obj if isinstance(obj, Mapping) else {}


def name_tokens(
  tok: tokenizers.Tokenizer,
  control: Mapping[str, int],
  settings: Mapping[str, Any],
  given: Mapping[str, str | None],
  where: str,
) -> tuple[dict[str, str | None], dict[str, int | None]]:
  """Returns the names and the ids of 'bos' (may be None), 'eos' and 'pad'.

  Raises:
    ValueError: no end-of-text token is known, or a name has no id.
  """
  eos = given['eos'] or named(settings, 'eos_token') or _first(_EOS, control)
  if eos is None:
    raise ValueError(f'{where}: no end-of-text token is known; name it with eos=...')
  pad = given['pad'] or named(settings, 'pad_token') or _first(_PAD, control)
  bos = given['bos'] or _opening_token(tok, settings)
  names = {'bos': bos, 'eos': eos, 'pad': pad or eos}
  ids = {key: name and tok.token_to_id(name) for key, name in names.items()}
  for key, name in names.items():
    if name is not None and ids[key] is None:
      raise ValueError(
        f'{where}: the token {name!r} is not in the vocabulary; name one that is, with {key}=...'
      )
  return names, ids


def _opening_token(tok: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> str | None:
  encoding = tok.encode('a', add_special_tokens=True)
  if encoding.ids and encoding.special_tokens_mask[0]:
    return encoding.tokens[0]
  if settings.get('add_bos_token') is True:
    return named(settings, 'bos_token')
  return None


def named(settings: Mapping[str, Any], key: str) -> str | None:
  """Returns the text of a token that is given as text or as an object."""
  value = settings.get(key)
  return value.get('content') if isinstance(value, Mapping) else value


def _first(names: Iterable[str], control: Mapping[str, int]) -> str | None:
  return next((name for name in names if name in control), None)
