"""SentencePiece and Hugging Face tokenizers behind one protocol.

Text of users, agents and rules goes through `encode`, which never returns a
control id, whatever the text holds. Only text that the template wrote goes
through `encode_control`. Neither adds a begin- or end-of-text token, and
both encode their text as the continuation of another text, so that the
tokens of a prompt are those of its segments in a row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import sentencepiece

from csrm_jax.text import hf_json

_WORD_MARK = '\u2581'  # SentencePiece writes a space so, inside a piece


@runtime_checkable
class Tokenizer(Protocol):
  """What the package needs of a tokenizer; instances can be pickled.

  Attributes:
    vocab_size: one more than the largest id.
    bos_id: the id that opens a text, None for models that have none.
    eos_id: the id that closes a text or turn.
    pad_id: fills what nobody reads; may equal eos_id.
    digest: sha256 (hex) of the model file.
    opens_with_space: whether the model was trained on prompts whose first
      plain text has a space in front that nobody wrote. `encode` never adds
      it; who writes the beginning of a prompt does.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int
  digest: str
  opens_with_space: bool

  def encode(self, text: str) -> list[int]:
    """Returns the ids of plain text, never a control id."""

  def encode_control(self, text: str) -> list[int]:
    """Returns the ids of template text, the longest control tokens first."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids; control ids count as no text."""

  def piece(self, token: int) -> str:
    """Returns what the vocabulary calls an id, for people to read."""


class SentencePieceTokenizer:
  """A tokenizer from a SentencePiece .model file (its path or its bytes).

  A model that was trained with a dummy prefix puts a space before each
  segment; its tokenizer.json does not (HFTokenizer).
  """

  opens_with_space = False

  def __init__(self, model: str | os.PathLike | bytes):
    data = model if isinstance(model, bytes) else _read_bytes(model)
    where = 'the model' if isinstance(model, bytes) else os.fspath(model)
    try:
      sp = sentencepiece.SentencePieceProcessor()
      sp.LoadFromSerializedProto(data)
    except RuntimeError:
      raise ValueError(
        f'{where}: not a SentencePiece model; give the .model file that training wrote'
      ) from None
    self._data, self._sp = data, sp
    self.digest = hashlib.sha256(data).hexdigest()
    self.vocab_size = sp.vocab_size()
    self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
    self.eos_id = sp.eos_id()
    if self.eos_id < 0:
      raise ValueError(f'{where}: has no end-of-text piece; train one with it')
    self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
    control = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)}
    # Some models list chat markers as user-defined pieces: plain text that
    # spells one would turn into it.
    tags = {
      piece: i
      for i in range(self.vocab_size)
      if hf_json.TAG.fullmatch(piece := sp.id_to_piece(i))
      and i not in control.values()
      and sp.encode(piece) == [i]
    }
    self._control = control | tags
    self._tags = _alternatives(tags)
    self._pattern = _alternatives(self._control)
    self._memo: dict[str, list[int]] = {}
    mark = [f'<0x{byte:02X}>' for byte in _WORD_MARK.encode()]
    self._mark_ids = [sp.piece_to_id(piece) for piece in mark]
    self._has_bytes = all(sp.is_byte(i) for i in self._mark_ids)
    _check_lines(self, where)

  def __reduce__(self):
    return type(self), (self._data,)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of plain text, never a control id."""
    if _WORD_MARK in text and self._has_bytes:
      # As bytes it stays what it is; as a piece it would become a space.
      first, *rest = text.split(_WORD_MARK)
      ids = self.encode(first)
      for part in rest:
        ids += self._mark_ids
        ids += self.encode(part)
      return ids
    if self._tags and self._tags.search(text):
      cuts = [match.start() + 1 for match in self._tags.finditer(text)]
      return [i for part in _split_at(text, cuts) for i in self.encode(part)]
    return self._sp.encode(text)

  def encode_control(self, text: str) -> list[int]:
    """Returns the ids of template text, the longest control tokens first."""
    return _encode_control(self, text)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids; control ids count as no text."""
    return self._sp.decode([int(i) for i in ids])

  def piece(self, token: int) -> str:
    """Returns what the vocabulary calls an id, for people to read."""
    return self._sp.id_to_piece(int(token))


class HFTokenizer:
  """A tokenizer from a Hugging Face tokenizer.json (its path or its bytes).

  Special tokens and added tokens that look like tags are control tokens. The
  begin of text is what the file's post-processor puts in front. End and
  padding are the arguments, else what tokenizer_config.json beside the file
  names, else the first of a list of usual names.
  """

  def __init__(
    self,
    model: str | os.PathLike | bytes,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
  ):
    data = model if isinstance(model, bytes) else _read_bytes(model)
    where = 'the model' if isinstance(model, bytes) else os.fspath(model)
    tokenizers = _import_tokenizers(where)
    try:
      spec = json.loads(data)
      control = hf_json.mark_control(spec)
      opens_with_space = hf_json.encode_as_continuation(spec)
      tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # The Rust side raises plain Exception.
      reason = str(error).splitlines()[0][:120] if str(error) else 'empty'
      raise ValueError(
        f'{where}: not a Hugging Face tokenizer.json ({reason}); give the file'
        ' that save_pretrained wrote'
      ) from None
    tok.no_truncation()
    tok.no_padding()
    tok.encode_special_tokens = True
    settings = {}
    if not isinstance(model, bytes):
      settings = hf_json.read_settings(model)
    names, ids = hf_json.name_tokens(
      tok, control, settings, {'bos': bos, 'eos': eos, 'pad': pad}, where
    )
    control |= {names[key]: i for key, i in ids.items() if i is not None}
    self._data, self._tok, self._names = data, tok, names
    self.opens_with_space = opens_with_space
    self.bos_id, self.eos_id, self.pad_id = ids['bos'], ids['eos'], ids['pad']
    self.digest = hashlib.sha256(data).hexdigest()
    self.vocab_size = max(tok.get_vocab(with_added_tokens=True).values()) + 1
    self._control = control
    self._control_ids = frozenset(control.values())
    self._pattern = _alternatives(control)
    self._memo: dict[str, list[int]] = {}
    _check_lines(self, where)

  def __reduce__(self):
    return _rebuild_hf, (self._data, self._names)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of plain text, never a control id."""
    encoding = self._tok.encode(text, add_special_tokens=False)
    ids = encoding.ids
    if self._control_ids.isdisjoint(ids):
      return ids
    # A model can spell a control token out of plain text where its own
    # vocabulary lists it. Cut behind its first character.
    cuts = [
      start + 1
      for i, (start, _) in zip(ids, encoding.offsets, strict=True)
      if i in self._control_ids
    ]
    parts = _split_at(text, cuts)
    if len(parts) < 2:
      raise ValueError(
        f'the text {text[:20]!r} can only be encoded as a control token; remove it from the text'
      )
    return [i for part in parts for i in self.encode(part)]

  def encode_control(self, text: str) -> list[int]:
    """Returns the ids of template text, the longest control tokens first."""
    return _encode_control(self, text)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids; control ids count as no text."""
    plain = [int(i) for i in ids if int(i) not in self._control_ids]
    return self._tok.decode(plain, skip_special_tokens=False)

  def piece(self, token: int) -> str:
    """Returns what the vocabulary calls an id, for people to read."""
    return self._tok.id_to_token(int(token))


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Returns the tokenizer in a .model (SentencePiece) or tokenizer.json file.

  Raises:
    ImportError: a tokenizer.json, and no package `tokenizers`.
    ValueError: another suffix, or the file is not what its suffix says.
  """
  suffix = pathlib.Path(path).suffix
  if suffix == '.model':
    return SentencePieceTokenizer(path)
  if suffix == '.json':
    return HFTokenizer(path)
  raise ValueError(
    f'{os.fspath(path)}: unknown suffix {suffix!r}; a tokenizer is a'
    ' SentencePiece .model or a Hugging Face tokenizer.json'
  )


def _encode_control(tokenizer: SentencePieceTokenizer | HFTokenizer, text: str) -> list[int]:
  # The template has a handful of control texts: remember them.
  ids = tokenizer._memo.get(text)
  if ids is None:
    ids, end = [], 0
    if tokenizer._pattern:
      for match in tokenizer._pattern.finditer(text):
        ids += tokenizer.encode(text[end : match.start()])
        ids.append(tokenizer._control[match.group()])
        end = match.end()
    ids += tokenizer.encode(text[end:])
    if len(tokenizer._memo) < 1024:
      tokenizer._memo[text] = ids
  return list(ids)


def _check_lines(tokenizer: Tokenizer, where: str) -> None:
  # The template keeps its blocks apart by line breaks.
  if tokenizer.encode('a\nb') == tokenizer.encode('a b'):
    raise ValueError(
      f'{where}: encodes a line break as a space, so that text could forge'
      ' the lines of the template; choose a tokenizer that keeps line breaks'
    )


def _alternatives(words: Mapping[str, int]) -> re.Pattern[str] | None:
  longest_first = sorted(words, key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, longest_first))) if words else None


def _split_at(text: str, cuts: Sequence[int]) -> list[str]:
  ends = [0, *cuts, len(text)]
  parts = (text[a:b] for a, b in itertools.pairwise(ends))
  return [part for part in parts if part]


def _import_tokenizers(where: str) -> types.ModuleType:
  # Only these files need the package, so it is an extra.
  try:
    import tokenizers
  except ImportError:
    raise ImportError(
      f'{where}: a Hugging Face tokenizer.json needs the package tokenizers;'
      ' run "pip install tokenizers", or install csrm_jax with its extra "hf"'
    ) from None
  return tokenizers


def _rebuild_hf(data: bytes, names: Mapping[str, str | None]) -> HFTokenizer:
  return HFTokenizer(data, **names)


def _read_bytes(path: str | os.PathLike) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(
      f'{os.fspath(path)}: cannot be read ({error.strerror}); check the path'
    ) from None
