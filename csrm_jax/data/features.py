"""From examples and pairs to rows of tokens: encoding to atoms, and their packing.

Training, evaluation and serving all turn a rendered template into tokens in one way. In training
a prompt that is too long is shortened: the middle of the history goes first, then the tail of the
response. Whoever gives a verdict uses `read`, which tells what was left out, and may read a long
response in several prompts instead. The rules and what the template itself writes are never
touched.

A packed batch states everything by explicit indices: which tokens belong to which prompt, where
each prompt's verdict is read, and which slots make a pair. No code ever searches for a padding
token.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from csrm_jax.core.checks import at_least, one_of
from csrm_jax.data import sharing
from csrm_jax.safety import schema, templates
from csrm_jax.safety.templates import DEFAULT, Layout
from csrm_jax.text.tokenizer import Tokenizer

# So many tokens of the response must remain: with fewer there is nothing to judge.
MIN_RESPONSE_LENGTH = 16
# What `read` does with a prompt that is too long, see there.
ON_CUT = ('window', 'mark', 'error')
# So many tokens of a response are read again in its next part, so that no sentence is only seen
# cut in two; less where parts are short.
OVERLAP = 64
# These stand where text was cut. They start with a space, so that what follows a cut can never
# begin a line. The line breaks that the template puts behind the response follow the second one.
CUT_MIDDLE = ' ... '
CUT_TAIL = ' ...'
_LINE_BREAKS = re.compile(r'\n{0,2}\Z')
_SPACES = re.compile(r'\s\s\Z')

# Segments whose tokens are kept, and the characters of the longest of these: up to 100 MB.
NUM_KEPT = 2**15
LONGEST_KEPT = 2000

LABEL_IDS = {None: -1, **{name: i for i, name in enumerate(schema.LABELS)}}
_POSITIVE = '{name} is {value}; it must be positive'

T = TypeVar('T')
Batch = dict[str, np.ndarray]

# --- Encoding ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """One encoded prompt; the verdict follows its last token.

  Attributes:
    tokens: int32 [length], with one BOS in front if the tokenizer has one.
    label: 0 safe, 1 unsafe, -1 none.
    loss_weight: float32 [length], each token's weight as a target of next-token prediction.
    offset: What the draw of the example added to the log odds of "safe", in nats.
    weight: What its label and targets count.
    targets: float32 [K], what heads with several targets learn; NaN where nobody rated it.
  """

  tokens: np.ndarray
  label: int
  id: str
  loss_weight: np.ndarray | None = None
  offset: float = 0.0
  weight: float = 1.0
  targets: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Atom:
  """What packing never splits: the two sides (safer, other) of a 'pair', or of kind 'example' one
  example or several that share their conversation or their rules. A 'muted' pair is read, but has
  no loss.

  `num_shortened` counts the tokens that were cut out of the prompts to make them fit. A pair has a
  `weight`, the probability `target` that its order is right (½ for a tie) and a `strength`.
  """

  prompts: tuple[Prompt, ...]
  kind: str
  num_shortened: int = 0
  weight: float = 1.0
  target: float = 1.0
  strength: float = 1.0

  @functools.cached_property
  def length(self) -> int:
    """The number of tokens of all prompts together."""
    return sum(len(prompt.tokens) for prompt in self.prompts)

  @functools.cached_property
  def num_read(self) -> int:
    """The same, where first tokens that prompts have in common count once."""
    return sharing.num_read([prompt.tokens for prompt in self.prompts])


@dataclasses.dataclass(frozen=True)
class Dropped:
  """Why something was not encoded: a reason to count, a detail to read."""

  reason: str
  detail: str = ''


class Reading(NamedTuple):
  """What is read of one example to judge it."""

  prompts: list[np.ndarray]  # tokens, int32 [length]; the verdict is that of the worst
  num_tokens: int  # the length of the one prompt that would hold everything
  num_unread: int  # how many tokens of history and response no prompt holds


class Parts(NamedTuple):
  """The tokens of each segment, with the BOS in the first, and how many were cut to fit."""

  tokens: list[Sequence[int]]
  num_cut: int


@dataclasses.dataclass(frozen=True)
class Encoder:
  """What encoding depends on besides the example.

  Attributes:
    max_length: The most tokens that a prompt may have.
    pair_length: The most tokens that the prompts of an atom may have together; None
      sets no limit but each prompt's own. The length of a packed row makes every pair fit into one.
    share_prefix: Whether tokens that both sides of a pair begin with count once for pair_length.
    label_pairs: Whether the prompts of a pair keep their labels, and so count as examples too.
    muted_pairs: The kinds of pairs that have no loss, but keep their places.
    keep_ties: Whether pairs of which neither side is safer are kept; else they are dropped.
    targets: The ratings that prompts have as targets.
  """

  tokenizer: Tokenizer
  max_length: int
  layout: Layout = DEFAULT
  pair_length: int | None = None
  label_pairs: bool = False
  share_prefix: bool = False
  muted_pairs: tuple[str, ...] = ()
  keep_ties: bool = True
  targets: tuple[str, ...] = ()

  def __post_init__(self):
    at_least(self, ('max_length',), say=_POSITIVE)
    if self.pair_length is not None and self.pair_length < 2:
      raise ValueError(f'pair_length is {self.pair_length}; give at least 2, or None')


def encode_prompt(
  segments: Sequence[templates.Segment], tokenizer: Tokenizer, max_length: int
) -> tuple[np.ndarray, int] | Dropped:
  """Returns the tokens (int32 [length]) and how many were cut to fit `max_length`.

  Control tokens are parsed in 'control' segments only. History messages are cut from the middle
  one outwards (whole messages, then the middle of one), then the tail of the response. The
  result is `Dropped('rules_too_long')` if the rules, the template and the least part of the
  response worth judging do not fit.
  """
  parts = encode_segments(segments, tokenizer, max_length)
  return parts if isinstance(parts, Dropped) else (_join(parts.tokens), parts.num_cut)


def encode_segments(
  segments: Sequence[templates.Segment], tokenizer: Tokenizer, max_length: int
) -> Parts | Dropped:
  """Returns the tokens of each segment; see `encode_prompt`."""
  tokens = _encode_whole(segments, tokenizer)
  total = sum(map(len, tokens))
  if total > max_length:
    unread = _shorten(tokens, segments, tokenizer, max_length)
    if isinstance(unread, Dropped):
      return unread
  return Parts(tokens, total - sum(map(len, tokens)))


def segment_tokens(
  segments: Sequence[templates.Segment], tokenizer: Tokenizer
) -> list[Sequence[int]]:
  """Returns the tokens of each segment, whatever their number, without a BOS."""
  return [_encode_segment(segment, tokenizer) for segment in segments]


def read(example: schema.Example, encoder: Encoder, on_cut: str = 'window') -> Reading | Dropped:
  """Returns the prompts that judge an example, and what of it they leave unread.

  Where one prompt of encoder.max_length cannot hold everything, `on_cut` decides:
    'window': The response is read in parts that overlap, each in a prompt of its own behind the
      same rules and history. Of the history a quarter of the room is kept, and more where the
      response leaves it.
    'mark': One prompt, shortened as in training.
    'error': A ValueError.
  """
  one_of('on_cut', on_cut, ON_CUT)
  segments = templates.render(example.safety, example.conversation, encoder.layout)
  parts = _encode_whole(segments, encoder.tokenizer)
  total, limit = sum(map(len, parts)), encoder.max_length
  if total <= limit:
    return Reading([_join(parts)], total, 0)
  if on_cut == 'error':
    raise ValueError(
      f'{example.id}: the prompt has {total} tokens, the limit is {limit}; shorten the text, raise '
      "max_length, or choose on_cut='window' to read long responses in parts"
    )
  cut = _read_in_parts if on_cut == 'window' else _read_shortened
  found = cut(parts, segments, encoder.tokenizer, limit)
  if isinstance(found, Dropped):
    return Dropped(found.reason, f'{example.id}: {found.detail}')
  prompts, num_unread = found
  return Reading(prompts, total, num_unread)


def encode(item: schema.Example | schema.Pair, encoder: Encoder) -> Atom | Dropped:
  """Returns the example, or the pair (safer, other), as an atom, or why it was dropped.

  Where what is read of a pair exceeds `encoder.pair_length`, the longer one is shortened
  to what the other leaves, or both to half of it. A pair whose prompts come to the same tokens
  teaches nothing and is dropped as 'identical_pair', unless it is a tie.
  """
  is_pair = isinstance(item, schema.Pair)
  is_tie = is_pair and item.is_tie
  if is_tie and not encoder.keep_ties:
    return Dropped('tie', f'{item.id}: neither side is safer, and the pair loss knows no ties')
  sides = (item.safer, item.other) if is_pair else (item,)
  encoded = [_encode(side, encoder, encoder.max_length) for side in sides]
  limit = encoder.pair_length
  lengths = [0 if isinstance(e, Dropped) else len(e[0]) for e in encoded]
  if is_pair and limit and all(lengths) and _num_read([e[0] for e in encoded], encoder) > limit:
    # Each side gets what the other one leaves, but half of the limit in any case.
    half = (limit + 1) // 2
    encoded = [
      _encode(side, encoder, min(encoder.max_length, limit - min(other, half)))
      for side, other in zip(sides, reversed(lengths), strict=True)
    ]
  for one in encoded:
    if isinstance(one, Dropped):
      return one
  if is_pair and not is_tie and np.array_equal(encoded[0][0], encoded[1][0]):
    return Dropped('identical_pair', f'{item.id}: both sides are one prompt')
  is_muted = is_pair and item.kind in encoder.muted_pairs
  has_labels = (encoder.label_pairs and not is_muted) or not is_pair
  prompts = tuple(
    Prompt(
      tokens,
      LABEL_IDS[side.label if has_labels else None],
      side.id,
      weight=side.weight,
      targets=_targets(side, encoder.targets) if encoder.targets and not is_muted else None,
    )
    for side, (tokens, _) in zip(sides, encoded, strict=True)
  )
  kind = 'muted' if is_muted else 'pair' if is_pair else 'example'
  known = {}
  if is_pair:
    target, strength = 0.5 if is_tie else item.soft, item.strength
    known = {'weight': item.weight, 'target': target}
    known['strength'] = 1.0 if strength is None else strength
  return Atom(prompts, kind, sum(cut for _, cut in encoded), **known)


def _targets(example: schema.Example, names: Sequence[str]) -> np.ndarray:
  known = dict(example.ratings)
  return np.array([known.get(name, np.nan) for name in names], np.float32)


def _num_read(prompts: Sequence[np.ndarray], encoder: Encoder) -> int:
  return sharing.num_read(prompts) if encoder.share_prefix else sum(map(len, prompts))


def encode_group(
  items: Sequence[schema.Example], encoder: Encoder, offsets: Sequence[float] = ()
) -> Atom | Dropped:
  """Returns the examples as one atom: those that fit, one after another, into pair_length.

  offsets are those of the examples' prompts, by default 0.
  """
  encoded = [encode(item, encoder) for item in items]
  atoms = [atom for atom in encoded if isinstance(atom, Atom)]
  offsets = {item.id: offset for item, offset in zip(items, offsets, strict=False)}
  limit = encoder.pair_length
  while (
    len(atoms) > 1 and limit and _num_read([a.prompts[0].tokens for a in atoms], encoder) > limit
  ):
    atoms.pop()
  if not atoms:
    return encoded[0]
  prompts = tuple(
    dataclasses.replace(prompt, offset=offsets.get(prompt.id, 0.0))
    for atom in atoms
    for prompt in atom.prompts
  )
  return Atom(prompts, 'example', sum(atom.num_shortened for atom in atoms))


def require(result: T | Dropped) -> T:
  """Returns `result`, or raises ValueError with reason and detail where it is `Dropped`."""
  if isinstance(result, Dropped):
    raise ValueError(f'{result.reason}: {result.detail}')
  return result


def _encode(
  example: schema.Example, encoder: Encoder, max_length: int
) -> tuple[np.ndarray, int] | Dropped:
  segments = templates.render(example.safety, example.conversation, encoder.layout)
  encoded = encode_prompt(segments, encoder.tokenizer, max_length)
  if isinstance(encoded, Dropped):
    return Dropped(encoded.reason, f'{example.id}: {encoded.detail}')
  return encoded


def _encode_whole(
  segments: Sequence[templates.Segment], tokenizer: Tokenizer
) -> list[Sequence[int]]:
  """Returns the tokens of each segment, uncut, with the BOS in the first."""
  tokens = segment_tokens(segments, tokenizer)
  bos = tokenizer.bos_id
  if bos is not None:
    tokens[0] = [bos, *tokens[0]]
    count = sum(part.count(bos) for part in tokens)
    if count != 1:
      raise ValueError(
        f'the prompt holds {count} BOS tokens (id {bos}), it must hold one;'
        ' neither the tokenizer nor the template may write another'
      )
  return tokens


def _join(parts: Sequence[Sequence[int]]) -> np.ndarray:
  return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _encode_segment(segment: templates.Segment, tokenizer: Tokenizer) -> Sequence[int]:
  encode = _encode_kept if len(segment.text) <= LONGEST_KEPT else _encode_kept.__wrapped__
  return encode(tokenizer, segment.text, segment.kind == 'control')


# The same rules are read with many texts, the same texts under many rules and in each epoch: this
# takes most of the time of making batches.
@functools.lru_cache(maxsize=NUM_KEPT)
def _encode_kept(tokenizer: Tokenizer, text: str, is_control: bool) -> Sequence[int]:
  """Returns the tokens of a segment, as an array: a list of integers takes eight times as much."""
  if is_control:
    return array.array('i', tokenizer.encode_control(text))
  if _SPACES.search(text):
    # Some tokenizers cut white space by what follows it, and no segment starts with any: this
    # way the tokens are those of the prompt as one text.
    *ids, last = tokenizer.encode(f'{text}x')
    if (last,) == _encode_marker(tokenizer, 'x'):
      return array.array('i', ids)
  return array.array('i', tokenizer.encode(text))


@functools.lru_cache(maxsize=16)
def _encode_marker(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
  return tuple(tokenizer.encode(text))


def _shorten(
  parts: list[Sequence[int]],
  segments: Sequence[templates.Segment],
  tokenizer: Tokenizer,
  max_length: int,
) -> int | Dropped:
  """Cuts `parts` in place to `max_length`; returns how many tokens went, or why that cannot be."""
  last, tail = _response(segments), _tail(segments, tokenizer)
  if dropped := _does_not_fit(parts, segments, tail, max_length):
    return dropped
  excess = sum(map(len, parts)) - max_length
  num_cut, excess = _cut_history(parts, segments, tokenizer, excess)
  if excess > 0:
    keep = len(parts[last]) - excess - len(tail)
    num_cut += len(parts[last]) - keep
    parts[last] = [*parts[last][:keep], *tail]
  return num_cut


def _read_shortened(parts, segments, tokenizer, max_length):
  """Returns ([the prompt], how many tokens were cut out of it)."""
  num_cut = _shorten(parts, segments, tokenizer, max_length)
  return num_cut if isinstance(num_cut, Dropped) else ([_join(parts)], num_cut)


def _read_in_parts(parts, segments, tokenizer, max_length):
  """Returns (prompts that together hold the whole response, how much of the history was cut)."""
  last, tail = _response(segments), _tail(segments, tokenizer)
  if dropped := _does_not_fit(parts, segments, tail, max_length):
    return dropped
  response = parts[last]
  others = sum(map(len, parts)) - len(response)
  history = sum(
    len(part) for part, segment in zip(parts, segments, strict=True) if segment.kind == 'history'
  )
  room = max_length - (others - history)
  # Each part of the response names its speaker, as the response does.
  speaker = segments[last].text.partition(':')[0]
  head = [*_encode_marker(tokenizer, f'{speaker}:'), *_encode_marker(tokenizer, CUT_TAIL)]
  least = 2 * MIN_RESPONSE_LENGTH + len(head) + len(tail)
  kept = max(room - len(response), min(room // 4, room - least), 0)
  num_cut, _ = _cut_history(parts, segments, tokenizer, history - kept)
  room = max_length - (sum(map(len, parts)) - len(response))
  pieces = []
  if len(response) <= room:
    pieces.append(response)
  else:
    size = room - len(head) - len(tail)
    overlap = min(OVERLAP, size // 4)
    start = room - len(tail)
    pieces.append([*response[:start], *tail])
    while (start := start - overlap) + size + len(tail) < len(response):
      pieces.append([*head, *response[start : start + size], *tail])
      start += size
    # The last part reaches as far back as it has room.
    pieces.append([*head, *response[len(response) - size - len(tail) :]])
  return [_join([*parts[:last], piece, *parts[last + 1 :]]) for piece in pieces], num_cut


def _response(segments: Sequence[templates.Segment]) -> int:
  return [segment.kind for segment in segments].index('response')


def _tail(segments: Sequence[templates.Segment], tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns what stands behind a response that goes on."""
  line_breaks = _LINE_BREAKS.search(segments[_response(segments)].text)[0]
  return _encode_marker(tokenizer, CUT_TAIL + line_breaks)


def _does_not_fit(parts, segments, tail, max_length) -> Dropped | None:
  """Returns why rules, template and the least of the response do not fit, if so."""
  least = min(len(parts[_response(segments)]), MIN_RESPONSE_LENGTH + len(tail))
  fixed = sum(
    len(part)
    for part, segment in zip(parts, segments, strict=True)
    if segment.kind not in ('history', 'response')
  )
  if fixed + least <= max_length:
    return None
  return Dropped(
    'rules_too_long',
    f'rules and template take {fixed} tokens and the response needs'
    f' {least}, the limit is {max_length}; shorten the rules, keep the most'
    ' relevant categories, or raise the limit',
  )


def _cut_history(parts, segments, tokenizer, excess: int) -> tuple[int, int]:
  """Cuts `excess` tokens, or all, out of the history; returns (tokens cut, excess that is left)."""
  history = [i for i, segment in enumerate(segments) if segment.kind == 'history']
  middle = _encode_marker(tokenizer, CUT_MIDDLE)
  center, num_cut = (len(history) - 1) / 2, 0
  # From the middle outwards; of two as far, the earlier message goes first: what the response
  # answers to stays longest.
  for place in sorted(range(len(history)), key=lambda k: (abs(k - center), k)):
    if excess <= 0:
      break
    i = history[place]
    before = len(parts[i])
    parts[i] = _cut_middle(parts[i], before - excess, middle)
    excess -= before - len(parts[i])
    num_cut += before - len(parts[i]) + (len(middle) if parts[i] else 0)
  return num_cut, excess


def _cut_middle(part: Sequence[int], length: int, marker: Sequence[int]) -> Sequence[int]:
  """Returns at most `length` tokens: both ends, or nothing if too few would remain."""
  keep = length - len(marker)
  # A stump must at least keep its speaker and some words on both sides.
  if keep < 2 * MIN_RESPONSE_LENGTH:
    return ()
  head = (keep + 1) // 2
  return [*part[:head], *marker, *part[len(part) - (keep - head) :]]


# --- Packing -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """The fixed shape of a batch.

  Attributes:
    batch_size: The number of rows, B.
    row_length: The number of tokens per row, T.
    max_segments: The most prompts that a row may hold, S; a pair counts as two.
    pad_id: Fills rows up. Nothing depends on it: padding is where segment_ids is 0.
    share_prefix: Whether first tokens that prompts of a row have in common are read once.
    has_offset: Whether batches have the prompts' offsets.
    has_order: Whether batches say how sure and how strong the order of a pair is.
    num_targets: How many targets, K, a prompt has.
  """

  batch_size: int
  row_length: int
  max_segments: int
  pad_id: int = 0
  share_prefix: bool = False
  has_offset: bool = False
  has_order: bool = False
  num_targets: int = 0

  def __post_init__(self):
    at_least(self, ('batch_size', 'row_length', 'max_segments'), say=_POSITIVE)


def pack_rows(atoms: Sequence[Atom], shape: BatchShape) -> tuple[Batch, list[int]]:
  """Returns a batch of the atoms that found a place, and the ascending indices of those left.

  The atoms come oldest first. Each row starts with the oldest one left, so that nothing waits
  long; the subset of the others that fills the row best follows. A batch has B rows of T tokens
  with S slots for prompts:
    tokens, segment_ids (1.. by prompt, 0 is padding), positions (0.. in each prompt): int32 [B, T]
    verdict_index: int32 [B, S], the place of a prompt's last token
    label: int32 [B, S], 0 safe, 1 unsafe, -1 none or unused slot
    label_weight: float32 [B, S], the weight (1) of the example where a prompt with a label stands
    pair_weight: float32 [B, S], at slot s the weight (1) of the pair (safer, other) of s and s + 1
    loss_weight: float32 [B, T], only if the prompts have one
    offset: float32 [B, S], only on request: what the loss adds to the score of a labelled slot
    pair_target, pair_strength: float32 [B, S], only on request and where pair_weight is: the
      probability that the order is right, ½ for a tie, and how much safer the first is
    targets, target_weight: float32 [B, S, K], only on request: what is to be predicted of a prompt
      beside its label, and its weight, 0 where it is not known
    ends: int32 [B, T], only if prompts share tokens: the place behind the last token that continues
      a token. Then segment_ids name the prompt that a token was first read for.
  """
  for atom in atoms:
    misfit = does_not_fit(atom, shape)
    if misfit:
      raise ValueError(misfit.detail)
  left = list(range(len(atoms)))
  batch = _empty_batch(shape)
  # All prompts of a stream have loss weights, or none has: the first one tells.
  if atoms and atoms[0].prompts[0].loss_weight is not None:
    batch['loss_weight'] = np.zeros((shape.batch_size, shape.row_length), np.float32)
  shared_with = _make_shared_with(atoms, shape)
  for row in range(shape.batch_size):
    if not left:
      break
    chosen = _choose_row({i: atoms[i] for i in left}, shape, shared_with)
    _write_row(batch, row, [atoms[i] for i in chosen])
    left = [i for i in left if i not in chosen]
  return batch, left


def row_size(atoms: Sequence[Atom], shape: BatchShape) -> int:
  """Returns how many places of a row the atoms take."""
  if not shape.share_prefix:
    return sum(atom.length for atom in atoms)
  if len(atoms) == 1:
    return atoms[0].num_read
  return sharing.num_read([prompt.tokens for atom in atoms for prompt in atom.prompts])


def does_not_fit(atom: Atom, shape: BatchShape) -> Dropped | None:
  """Returns why no row of this shape could hold the atom, or None."""
  size = row_size([atom], shape)
  if size > shape.row_length:
    return Dropped(
      'longer_than_row',
      f'{atom.prompts[0].id}: a {atom.kind} of {size} tokens does not'
      f' fit into a row of {shape.row_length}; lower max_length (pair_length'
      ' for pairs) or use longer rows',
    )
  if len(atom.prompts) > shape.max_segments:
    return Dropped(
      'too_many_segments',
      f'{atom.prompts[0].id}: a {atom.kind} has {len(atom.prompts)} prompts,'
      f' a row holds {shape.max_segments}; raise max_segments',
    )
  return None


def _make_shared_with(atoms: Sequence[Atom], shape: BatchShape) -> Callable[[int], np.ndarray]:
  """Returns a function: an atom's index -> how many first tokens each atom shares with it."""
  nothing = np.zeros(len(atoms), np.int64)
  if not shape.share_prefix:
    return lambda i: nothing
  # What lies far apart in lexicographic order shares the least of all that lies between.
  prompts = [atom.prompts[0].tokens for atom in atoms]
  order = np.array(sharing.sort(prompts), np.int64)
  common = np.array(sharing.commons(prompts, order), np.int64)
  rank = np.empty_like(order)
  rank[order] = np.arange(len(order))

  def shared_with(i):
    at, shared = rank[i], nothing.copy()
    shared[order[at + 1 :]] = np.minimum.accumulate(common[at + 1 :])
    shared[order[:at]] = np.minimum.accumulate(common[at:0:-1])[::-1]
    return shared

  return shared_with


def _choose_row(
  left: dict[int, Atom], shape: BatchShape, shared_with: Callable[[int], np.ndarray]
) -> list[int]:
  """Returns the index of the oldest atom and those of the others that fill its row best."""
  chosen, shared, added = [], 0, [next(iter(left))]
  while added:
    chosen += added
    for i in added:
      shared = np.maximum(shared, shared_with(i))
    others = [i for i in left if i not in chosen]
    # Those that share most come first, among equals the oldest.
    others.sort(key=lambda i: -shared[i])
    lengths = {i: row_size([left[i]], shape) - int(shared[i]) for i in others}
    room = shape.row_length - row_size([left[i] for i in chosen], shape)
    slots = shape.max_segments - sum(len(left[i].prompts) for i in chosen)
    sizes = {i: len(left[i].prompts) for i in others}
    added = _fill(room, slots, lengths, sizes)
    # An atom may share more with those beside it than with the ones that were there: then there
    # is room again.
    if not shape.share_prefix:
      break
  return sorted(chosen + added)


def _fill(room: int, slots: int, lengths: dict[int, int], sizes: dict[int, int]) -> list[int]:
  """Returns the keys of the lengths that fill the room best, the first ones if several do."""
  # Subset sum: bit t of `reach` says that some of the atoms looked at so far have t tokens in all.
  mask = (1 << (room + 1)) - 1
  reach, before, looked_at = 1, [], []
  for i, length in lengths.items():
    if length > room:
      continue
    before.append(reach)
    looked_at.append(i)
    reach |= (reach << length) & mask
    # The row can be filled to its last token.
    if reach >> room:
      break
  total = reach.bit_length() - 1
  chosen = []
  # From the last one back: an atom is taken where the total was out of reach without it.
  for i, reachable in zip(reversed(looked_at), reversed(before), strict=True):
    if not reachable >> total & 1:
      chosen.append(i)
      total -= lengths[i]
  if sum(sizes[i] for i in chosen) > slots:
    # The subset sum counts tokens only; with many short prompts the slots are too few. Then
    # whatever still fits is taken, longest first.
    chosen = []
    for i in sorted(lengths, key=lambda i: -lengths[i]):
      if lengths[i] <= room and sizes[i] <= slots:
        chosen.append(i)
        room -= lengths[i]
        slots -= sizes[i]
  return chosen


def _empty_batch(shape: BatchShape) -> Batch:
  by_token = (shape.batch_size, shape.row_length)
  by_slot = (shape.batch_size, shape.max_segments)
  optional = {'ends': np.zeros(by_token, np.int32)} if shape.share_prefix else {}
  if shape.has_offset:
    optional['offset'] = np.zeros(by_slot, np.float32)
  if shape.has_order:
    optional |= {name: np.zeros(by_slot, np.float32) for name in ('pair_target', 'pair_strength')}
  if shape.num_targets:
    optional |= {
      name: np.zeros((*by_slot, shape.num_targets), np.float32)
      for name in ('targets', 'target_weight')
    }
  return optional | {
    'tokens': np.full(by_token, shape.pad_id, np.int32),
    'segment_ids': np.zeros(by_token, np.int32),
    'positions': np.zeros(by_token, np.int32),
    'verdict_index': np.zeros(by_slot, np.int32),
    'label': np.full(by_slot, -1, np.int32),
    'label_weight': np.zeros(by_slot, np.float32),
    'pair_weight': np.zeros(by_slot, np.float32),
  }


def _write_row(batch: Batch, row: int, atoms: Sequence[Atom]) -> None:
  prompts = [prompt for atom in atoms for prompt in atom.prompts]
  read = sharing.walk([prompt.tokens for prompt in prompts], share='ends' in batch)
  sharing.write(batch, row, read)
  if 'loss_weight' in batch:
    weights = np.concatenate([prompt.loss_weight for prompt in prompts])
    batch['loss_weight'][row, : len(read.tokens)] = weights
  slot = 0
  for atom in atoms:
    if atom.kind == 'pair':
      batch['pair_weight'][row, slot] = atom.weight
      if 'pair_target' in batch:
        batch['pair_target'][row, slot] = atom.target
        batch['pair_strength'][row, slot] = atom.strength
    for prompt in atom.prompts:
      batch['label'][row, slot] = prompt.label
      if prompt.label >= 0:
        batch['label_weight'][row, slot] = prompt.weight
      if 'targets' in batch and prompt.targets is not None:
        known = np.isfinite(prompt.targets)
        batch['targets'][row, slot] = np.where(known, prompt.targets, 0.0)
        batch['target_weight'][row, slot] = known * np.float32(prompt.weight)
      if 'offset' in batch:
        batch['offset'][row, slot] = prompt.offset
      slot += 1
