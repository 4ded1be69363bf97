"""SentencePiece and Hugging Face tokenizers behind one protocol.

`encode` takes the text of users, agents and rules, and never returns a control id, whatever the
text holds. `encode_control` takes only text that the template wrote. Neither adds a begin- or
end-of-text token. Both encode their text as the continuation of another text, so the tokens of a
prompt are the tokens of its segments in a row.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import sentencepiece

from csrm_jax.core import checks, files

if TYPE_CHECKING:
  import tokenizers

_WORD_MARK = '\u2581'  # SentencePiece writes a space like this inside a piece
# A text that looks like a control token, even where a vocabulary lists it as plain text.
_TAG = re.compile(r'<[^\s<>]+>|\[[A-Z_]+\]')
# Longer texts are encoded in blocks, cut at a space if there is one near: the tokenizers library
# takes hundreds of bytes for each token.
_BLOCK, _NEAR = 1 << 16, 1 << 10
_SPACE = re.compile(r'(?<=\S) (?=\S)')
# Usual names, for when neither the caller nor tokenizer_config.json gives one.
_EOS = (
  *('<|eot_id|>', '<|im_end|>', '<end_of_turn>', '<|end_of_text|>'),
  *('<eos>', '</s>', '<|endoftext|>'),
)
_PAD = ('<pad>', '[PAD]', '<|pad|>', '<|finetune_right_pad_id|>', '<|endoftext|>')


@runtime_checkable
class Tokenizer(Protocol):
  """The interface of a tokenizer; instances can be pickled."""

  vocab_size: int  # one more than the largest id
  bos_id: int | None
  eos_id: int
  pad_id: int  # fills places that nobody reads; it may equal eos_id
  digest: str  # sha256 (hex) of the model file
  # Whether the model was trained on prompts whose first plain text has an extra space in front.
  # `encode` never adds it; the writer of the beginning of a prompt does.
  opens_with_space: bool
  # What other programs, which parse control tokens from any text, read otherwise in plain text.
  control_texts: tuple[str, ...]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of plain text, never a control id."""

  def encode_control(self, text: str) -> list[int]:
    """Returns the ids of template text; the longest control tokens match first."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids; control ids give no text."""

  def piece(self, token: int) -> str:
    """Returns the vocabulary's own name of an id, for people to read."""


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Returns the tokenizer in a .model (SentencePiece) or tokenizer.json file."""
  path = files.locate(path)
  suffix = path.suffix
  if suffix == '.model':
    return SentencePieceTokenizer(path)
  if suffix == '.json':
    return HFTokenizer(path)
  raise ValueError(
    f'{os.fspath(path)}: unknown suffix {suffix!r}; a tokenizer is a SentencePiece .model or a'
    ' Hugging Face tokenizer.json'
  )


class _WithControl:
  """The handling of control tokens, which both kinds of tokenizers share."""

  def _keep(
    self,
    data: bytes,
    control: Mapping[str, int],
    where: str,
    eats: Mapping[str, tuple[bool, bool]] = types.MappingProxyType({}),
  ) -> None:
    """Keeps the model file and the ids of its control tokens; `eats` is that of _eats_space."""
    self._data, self.digest = data, hashlib.sha256(data).hexdigest()
    self._control, self._pattern = control, _alternatives(control, eats)
    self.control_texts = tuple(control)
    # The template has only a few control texts, and writes them in every prompt.
    self._memo = functools.lru_cache(1024)(self._encode_control)
    # The template separates its blocks by line breaks.
    if self.encode('a\nb') == self.encode('a b'):
      raise ValueError(
        f'{where}: encodes a line break as a space, so that text could forge the lines of the'
        ' template; choose a tokenizer that keeps line breaks'
      )

  def encode_control(self, text: str) -> list[int]:
    return list(self._memo(text))

  def _encode_control(self, text: str) -> list[int]:
    ids, end = [], 0
    for match in self._pattern.finditer(text) if self._pattern else ():
      ids += self.encode(text[end : match.start()])
      token = match.group()
      ids.append(self._control[token if token in self._control else token.strip()])
      end = match.end()
    return ids + self.encode(text[end:])


class SentencePieceTokenizer(_WithControl):
  """A tokenizer from a SentencePiece .model file (its path or its bytes).

  A model that was trained with a dummy prefix puts a space before each segment. Its
  tokenizer.json (HFTokenizer) does not.
  """

  opens_with_space = False

  def __init__(self, model: str | os.PathLike | bytes):
    data, where = _read(model)
    try:
      sp = sentencepiece.SentencePieceProcessor()
      sp.LoadFromSerializedProto(data)
      pieces = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    except (RuntimeError, UnicodeDecodeError):
      raise ValueError(
        f'{where}: not a SentencePiece model; give the .model file that training wrote'
      ) from None
    self._sp = sp
    self.vocab_size = sp.vocab_size()
    self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
    self.eos_id = sp.eos_id()
    if self.eos_id < 0:
      raise ValueError(f'{where}: has no end-of-text piece; train one with it')
    self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
    control = {piece: i for piece, i in pieces.items() if sp.is_control(i)}
    # Some models list chat markers as user-defined pieces: plain text that spells a marker would
    # become the marker.
    tags = {
      piece: i
      for piece, i in pieces.items()
      if _TAG.fullmatch(piece) and piece not in control and sp.encode(piece) == [i]
    }
    self._tags = _alternatives(tags)
    self._mark_ids = [sp.piece_to_id(f'<0x{byte:02X}>') for byte in _WORD_MARK.encode()]
    self._has_bytes = all(sp.is_byte(i) for i in self._mark_ids)
    self._keep(data, control | tags, where)
    self.control_texts += (_WORD_MARK,)

  def __reduce__(self):
    return type(self), (self._data,)

  def encode(self, text: str) -> list[int]:
    if _WORD_MARK in text and self._has_bytes:
      # As bytes the character stays; as a piece it would become a space.
      first, *rest = text.split(_WORD_MARK)
      return self.encode(first) + [i for part in rest for i in self._mark_ids + self.encode(part)]
    if self._tags and self._tags.search(text):
      cuts = [match.start() + 1 for match in self._tags.finditer(text)]
      return [i for part in _split_at(text, cuts) for i in self.encode(part)]
    return self._sp.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._sp.decode([int(i) for i in ids])

  def piece(self, token: int) -> str:
    return self._sp.id_to_piece(int(token))


class HFTokenizer(_WithControl):
  """A tokenizer from a Hugging Face tokenizer.json (its path or its bytes).

  Control tokens are the special tokens, and added tokens that look like tags. The begin of text
  is the token that the file's post-processor puts in front. What the vocabulary has no token for,
  and would leave out, is written as U+FFFD. End and padding are the arguments,
  or else the tokens that tokenizer_config.json names, or else the first of a list of usual
  names.
  """

  def __init__(
    self,
    model: str | os.PathLike | bytes,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
  ):
    data, where = _read(model)
    package = checks.require('tokenizers', f'{where}: a Hugging Face tokenizer.json')
    try:
      spec = json.loads(data)
      control, eats = _mark_control(spec), _eats_space(spec)
      self.opens_with_space = _encode_as_continuation(spec)
      tok = package.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # The Rust library raises plain Exception.
      reason = str(error).splitlines()[0][:120] if str(error) else 'empty'
      raise ValueError(
        f'{where}: not a Hugging Face tokenizer.json ({reason}); give the file that save_pretrained'
        ' wrote'
      ) from None
    # The file may hold settings for batches of its own model.
    tok.no_truncation()
    tok.no_padding()
    # Special tokens in plain text are then encoded as the characters that they are written with.
    tok.encode_special_tokens = True
    settings = {} if isinstance(model, bytes) else read_settings(model)
    eos = eos or named(settings, 'eos_token') or _first(_EOS, control)
    if eos is None:
      raise ValueError(
        f'{where}: no end-of-text token is known; write its text as "eos_token" into '
        'tokenizer_config.json beside that file'
      )
    pad = pad or named(settings, 'pad_token') or _first(_PAD, control) or eos
    bos = bos or _opening_token(tok, settings)
    self._names = {'bos': bos, 'eos': eos, 'pad': pad}
    ids = {key: name and tok.token_to_id(name) for key, name in self._names.items()}
    for key, name in self._names.items():
      if name is not None and ids[key] is None:
        raise ValueError(
          f'{where}: the token {name!r} is not in the vocabulary; name one that is as '
          f'"{key}_token" in tokenizer_config.json beside that file'
        )
    control |= {self._names[key]: i for key, i in ids.items() if i is not None}
    self._tok, self._visible = tok, _find_lost(spec, tok)
    self.bos_id, self.eos_id, self.pad_id = ids['bos'], ids['eos'], ids['pad']
    # Ids may have gaps, so the number of tokens would be too small.
    self.vocab_size = max(tok.get_vocab(with_added_tokens=True).values()) + 1
    self._control_ids = frozenset(control.values())
    self._keep(data, control, where, eats)

  def __reduce__(self):
    # A tokenizer from bytes has no tokenizer_config.json beside it, so the names travel too.
    return functools.partial(type(self), self._data, **self._names), ()

  def encode(self, text: str) -> list[int]:
    if self._visible is not None:
      text = text.translate(self._visible)
    if len(text) > _BLOCK:
      return [i for block in _blocks(text) for i in self.encode(block)]
    encoding = self._tok.encode(text, add_special_tokens=False)
    ids = encoding.ids
    if self._control_ids.isdisjoint(ids):
      return ids
    # Plain text can give a control token if the model's own vocabulary lists it. The text is then
    # cut behind the first character of the token, and its parts are encoded alone.
    offsets = zip(ids, encoding.offsets, strict=True)
    parts = _split_at(text, [start + 1 for i, (start, _) in offsets if i in self._control_ids])
    if len(parts) < 2:
      raise ValueError(
        f'the text {text[:20]!r} can only be encoded as a control token; remove it from the text'
      )
    return [i for part in parts for i in self.encode(part)]

  def decode(self, ids: Sequence[int]) -> str:
    plain = [int(i) for i in ids if int(i) not in self._control_ids]
    return self._tok.decode(plain, skip_special_tokens=False)

  def piece(self, token: int) -> str:
    return self._tok.id_to_token(int(token))


def parse_all(path: str | os.PathLike, text: str) -> list[int]:
  """Returns the ids that other programs read in a text by a tokenizer.json, control tokens too."""
  package = checks.require('tokenizers', f'{os.fspath(path)}: a Hugging Face tokenizer.json')
  return package.Tokenizer.from_file(os.fspath(path)).encode(text, add_special_tokens=False).ids


def _read(model: str | os.PathLike | bytes) -> tuple[bytes, str]:
  """Returns the content of a file or of its bytes, and its name for errors."""
  if isinstance(model, bytes):
    return model, 'the model'
  where = os.fspath(model)
  try:
    return pathlib.Path(model).read_bytes(), where
  except OSError as error:
    raise ValueError(f'{where}: cannot be read ({error.strerror}); check the path') from None


def _alternatives(
  words: Mapping[str, int], eats: Mapping[str, tuple[bool, bool]] = types.MappingProxyType({})
) -> re.Pattern[str] | None:
  """Returns a pattern of the words, some with the white space beside them."""

  def pattern(word: str) -> str:
    before, after = eats.get(word, (False, False))
    return r'\s*' * before + re.escape(word) + r'\s*' * after

  # An alternation takes the first word that matches, so a prefix of another word must come after
  # it.
  longest_first = sorted(words, key=len, reverse=True)
  return re.compile('|'.join(map(pattern, longest_first))) if words else None


def _blocks(text: str) -> Iterable[str]:
  start = 0
  while start < len(text):
    end = start + _BLOCK
    if end < len(text):
      end = max((found.start() for found in _SPACE.finditer(text, end - _NEAR, end)), default=end)
    yield text[start:end]
    start = end


def _split_at(text: str, cuts: Sequence[int]) -> list[str]:
  parts = (text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]))
  return [part for part in parts if part]


# --- What Hugging Face files say -------------------------------------------------------


def read_settings(path: str | os.PathLike) -> Mapping[str, Any]:
  """Returns what special_tokens_map.json and tokenizer_config.json say beside `path`."""
  found = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    file = pathlib.Path(path).with_name(name)
    if file.is_file():
      said = {k: v for k, v in files.read_json(file, dict).items() if v is not None}
      for key in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
        if not isinstance(named(said, key), (str, type(None))):
          raise ValueError(
            f'{file}: {key} is {checks.show(said[key])}, not the text of a token; correct it'
          )
      found |= said
  return found


def named(settings: Mapping[str, Any], key: str) -> str | None:
  """Returns the text of a token that is given as text or as an object."""
  value = settings.get(key)
  return value.get('content') if isinstance(value, Mapping) else value


def _first(names: Iterable[str], control: Mapping[str, int]) -> str | None:
  return next((name for name in names if name in control), None)


def _opening_token(tok: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> str | None:
  encoding = tok.encode('a', add_special_tokens=True)
  if encoding.ids and encoding.special_tokens_mask[0]:
    return encoding.tokens[0]
  return named(settings, 'bos_token') if settings.get('add_bos_token') is True else None


def _mark_control(spec: dict[str, Any]) -> dict[str, int]:
  """Marks the control tokens of a tokenizer.json as special; returns text -> id."""
  model = spec['model']
  unknown = model.get('unk_token')
  if unknown is None and model.get('unk_id') is not None:
    unknown = model['vocab'][model['unk_id']][0]
  control = {}
  for token in spec.get('added_tokens') or ():
    # Chat markers such as <think> are often not listed as special, and then the library parses
    # them from any text. The unknown token is no control token: plain text gives it.
    content = token['content']
    if token['special'] or _TAG.fullmatch(content.strip()):
      token['special'] = True
      if content != unknown:
        control[content] = token['id']
  return control


def _eats_space(spec: Mapping[str, Any]) -> dict[str, tuple[bool, bool]]:
  """Returns {added token: whether white space before it, and behind it, belongs to it}."""
  return {
    token['content']: (bool(token.get('lstrip')), bool(token.get('rstrip')))
    for token in spec.get('added_tokens') or ()
  }


class _Visible(dict):
  """A table for str.translate: characters that a vocabulary cannot write become another one."""

  def __init__(self, is_lost: Callable[[str], bool]):
    super().__init__()
    self._is_lost = is_lost
    self._mark = next((mark for mark in '\ufffd?' if not is_lost(mark)), None)

  def __missing__(self, code: int) -> int | str:
    self[code] = code
    if self._is_lost(chr(code)):
      if self._mark is None:
        raise ValueError(f'the tokenizer has no token for {chr(code)!r}; remove it from the text')
      self[code] = self._mark
    return self[code]


def _find_lost(spec: Mapping[str, Any], tok: tokenizers.Tokenizer) -> _Visible | None:
  """Returns what replaces characters that would vanish; None where none can."""
  model = spec['model']
  # BPE leaves out what it has no token for. Other kinds have one for what is unknown.
  if model.get('type', 'BPE') != 'BPE' or model.get('unk_token'):
    return None
  byte_level = 'ByteLevel' in json.dumps([spec.get('pre_tokenizer'), spec.get('normalizer')])
  if not byte_level and not model.get('byte_fallback'):
    return _Visible(
      lambda text: not text.isspace() and not tok.encode(text, add_special_tokens=False).ids
    )
  names = _BYTE_LEVEL if byte_level else {byte: f'<0x{byte:02X}>' for byte in range(256)}
  lacking = {byte for byte in _UTF8_BYTES if names[byte] not in model['vocab']}
  if not byte_level:  # Characters of the vocabulary need no bytes.
    return (
      _Visible(lambda text: text not in model['vocab'] and not lacking.isdisjoint(text.encode()))
      if lacking
      else None
    )
  return _Visible(lambda text: not lacking.isdisjoint(text.encode())) if lacking else None


def _byte_level() -> dict[int, str]:
  """Returns the characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in shown]
  return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level()
# The bytes that UTF-8 has.
_UTF8_BYTES = (*range(0x00, 0xC0), *range(0xC2, 0xF5))


def _encode_as_continuation(spec: dict[str, Any]) -> bool:
  """Turns off the extra prefix at the beginning of a text; returns whether there was one."""
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


# --- Training --------------------------------------------------------------------------


def train_sentencepiece(
  sentences: Iterable[str],
  path: str | os.PathLike,
  vocab_size: int,
  control_symbols: Sequence[str] = (),
  user_symbols: Sequence[str] = ('\n', '\u2581safe', '\u2581unsafe'),
) -> SentencePieceTokenizer:
  """Returns a BPE tokenizer trained on `sentences`, written to `path`.

  Any Unicode text can be encoded (bytes as the last resort) and comes back unchanged. The same
  input gives the same bytes. The ids are: 0 padding, 1 begin, 2 end, 3 unknown (never used), and
  from 4 on the `control_symbols`.

  Args:
    vocab_size: The number of ids, control and 256 byte pieces included.
    control_symbols: One id each; plain text never gives them.
    user_symbols: Plain text always gives these pieces, whatever the corpus: the line break, and
      the verdict words with their space.
  """
  # SentencePiece takes one line at a time; the line break is a piece of its own.
  lines = (line for text in sentences for line in text.split('\n') if line)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      control_symbols=list(control_symbols),
      user_defined_symbols=list(user_symbols),
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      byte_fallback=True,
      character_coverage=1.0,
      split_digits=True,
      # The next three keep a text as it is, so that segments can be encoded alone.
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      normalization_rule_name='identity',
      # Longer sentences would be left out, silently.
      max_sentence_length=1 << 24,
      # No shuffling and one thread, for the same bytes each time.
      shuffle_input_sentence=False,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).rpartition('] ')[2].rstrip('. ')
    raise ValueError(
      f'vocab_size={vocab_size} does not suit the sentences ({reason}); change it or give more text'
    ) from None
  files.write(path, model.getvalue())
  return SentencePieceTokenizer(path)
