"""Plans of scoring: which prompts stand in which row, and which tokens are read only once.

Compilers want few shapes; prompts have all lengths, and many begin alike. Prompts are put in
lexicographic order and cut into rows of one length, in which shared first tokens stand once (see
data.sharing). Where many rows would repeat the same beginning, it is read once for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from csrm_jax.data import sharing
from csrm_jax.models.config import ModelConfig

# Lengths of rows are multiples of it.
STEP = 64
# What all rows continue is padded to one of these lengths: its padding costs a few keys only.
PREFIXES = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
# What is read apart saves at least so many tokens.
_LEAST_SAVED = 64
# A row has a slot for so many of its tokens.
SLOT = 64
# How far ahead a row looks for prompts that fill it.
LOOK_AHEAD = 64
# So many prompts tell which length of row suits all of them.
_SAMPLE = 128
# What compiling a program costs: products of a CPU core in some two seconds, of a GPU in ten.
_COMPILE_FLOPS = {'cpu': 2e11, 'other': 4e15}
# How many tokens a device takes at once: a core's work space should stay in its cache.
CALL_TOKENS = {'cpu': 1024, 'other': 16384}
LONGEST_ROW = 2048  # unless a prompt is longer

Shape = tuple[int, int, int]  # rows, row length, places before each row


class Costs(NamedTuple):
  """What a plan weighs, in the time that a device takes for one token outside attention."""

  keys: float  # to attend to so many takes as long
  program: float  # to compile one
  call_tokens: int  # how many tokens go through the model at once
  longest_row: int = LONGEST_ROW


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows of one length behind one copy of the first tokens that all of their prompts share."""

  rows: list[list[int]]  # the prompts of each row
  shape: Shape  # of a full call
  num_shared: int = 0  # tokens that are read before all rows
  last_rows: int = 0  # rows of the last call, if that is not a full one

  @property
  def prompts(self) -> list[int]:
    return [i for row in self.rows for i in row]

  def calls(self) -> Iterator[tuple[list[list[int]], Shape]]:
    """Yields the rows of each call, and its shape."""
    most, length, before = self.shape
    for start in range(0, len(self.rows), most):
      rows = self.rows[start : start + most]
      num_rows = most if len(rows) == most else self.last_rows or most
      yield rows, (num_rows, length, before)

  @property
  def num_places(self) -> int:
    """How many places the model reads, padding included."""
    return self.shape[2] + sum(rows * length for _, (rows, length, _) in self.calls())


def costs_of(cfg: ModelConfig, platform: str, num_parts: int = 1) -> Costs:
  """Returns the costs of a model, whose rows the mesh cuts into num_parts."""
  heads = cfg.num_heads * cfg.head_dim
  layer = 2 * cfg.embed_dim * (heads + cfg.num_kv_heads * cfg.head_dim)
  layer += 3 * cfg.embed_dim * cfg.mlp_dim
  kind = 'cpu' if platform == 'cpu' else 'other'
  return Costs(
    keys=2 * layer / (4 * heads),
    program=_COMPILE_FLOPS[kind] / (2 * layer * cfg.num_layers),
    call_tokens=CALL_TOKENS[kind] * num_parts,
  )


def make_plan(
  prompts: Sequence[np.ndarray], costs: Costs, known: frozenset[Shape] | set[Shape] = frozenset()
) -> list[Part]:
  """Returns parts that hold each prompt once; shapes that are known cost no compilation."""
  if not prompts:
    return []
  order = np.array(sharing.sort(prompts))
  common = np.array(sharing.commons(prompts, order))
  sizes = np.array([len(prompts[i]) for i in order])
  planner = _Planner(sizes, common, costs, set(known))
  parts, alone = [], []
  for first, stop, num_shared in planner.groups():
    if num_shared:
      parts += planner.lay_out(range(first, stop), num_shared)
    else:
      alone += range(first, stop)
  if alone:
    parts += planner.lay_out(alone)
  return [
    dataclasses.replace(part, rows=[[int(order[i]) for i in row] for row in part.rows])
    for part in parts
  ]


def most_rows(call_tokens: int, length: int) -> int:
  """Returns the rows of a full call: the largest power of two that call_tokens allow."""
  return 1 << max(call_tokens // length, 1).bit_length() - 1


def num_slots(length: int) -> int:
  """Returns how many prompts a row of this length may hold."""
  return max(2, length // SLOT)


def round_up(length: int) -> int:
  """Returns the least length of a row that is at least `length`.

  Few lengths make few programs, however many calls there are: four for each power of two, and
  eight where a row holds little but one prompt.
  """
  step = max(STEP, (1 << (length - 1).bit_length()) // (8 if length <= LONGEST_ROW else 16))
  return -(-length // step) * step


@dataclasses.dataclass(frozen=True)
class _Planner:
  """Plans for prompts in lexicographic order: their sizes, and what each shares with the last."""

  sizes: np.ndarray
  common: np.ndarray
  costs: Costs
  known: set[Shape]  # grows with what is planned

  def groups(self) -> list[tuple[int, int, int]]:
    """Returns (first, stop, how many tokens are to be read before all rows) of all prompts."""
    found, by_length = self._groups(0, len(self.sizes))[1], {}
    for group in found:
      length, saved = group[2] and _prefix_length(group[2]), self._saved(*group)
      by_length[length] = by_length.get(length, 0) + saved
    # Each length takes a program for what is shared and one for the rest.
    ready = {before for _, _, before in self.known}
    pays = {p for p, saved in by_length.items() if p in ready or saved > 2 * self.costs.program}
    return [(a, b, num if num and _prefix_length(num) in pays else 0) for a, b, num in found]

  def _groups(self, first, stop, depth=0):
    """Returns (what is saved, groups), without regard to programs."""
    inner = self.common[first + 1 : stop]
    nothing = 0.0, [(first, stop, 0)]
    # What fits into one row is read once in any case.
    if stop - first < 2 or self._num_read(first, stop) <= self.costs.longest_row or depth > 40:
      return nothing
    least = int(inner.min())
    # A prompt is judged at its last token, which must not be among those read before.
    num_shared = min(least, int(self.sizes[first:stop].min()) - 1)
    saved = self._saved(first, stop, num_shared)
    best = (saved, [(first, stop, num_shared)]) if saved > _LEAST_SAVED else nothing
    cuts = [first, *(first + 1 + np.flatnonzero(inner == least)).tolist(), stop]
    if len(cuts) < stop - first + 1:
      below = [self._groups(a, b, depth + 1) for a, b in itertools.pairwise(cuts)]
      saved = sum(saved for saved, _ in below)
      if saved > best[0]:
        best = saved, [group for _, found in below for group in found]
    return best

  def _num_read(self, first, stop):
    return int(self.sizes[first:stop].sum() - self.common[first + 1 : stop].sum())

  def _saved(self, first, stop, num_shared):
    """Returns what is saved where each row but the first would read what is shared again."""
    row = self.costs.longest_row
    rows = (self._num_read(first, stop) - num_shared) / max(row - num_shared, row / 4)
    return (rows - 1) * num_shared

  def lay_out(self, places: Sequence[int], num_shared: int = 0) -> list[Part]:
    """Returns parts of the prompts at these places; their shapes are known then."""
    sizes = self.sizes[list(places)] - num_shared
    longest = int(sizes.max())
    best = self._one_length(places, num_shared)
    # Long prompts may be too few to make all rows long.
    for limit in (longest // 2, longest // 4, longest // 8):
      short = [p for p, size in zip(places, sizes, strict=True) if size <= limit]
      if not short:
        break
      if len(short) == len(places):
        continue
      long = [p for p, size in zip(places, sizes, strict=True) if size > limit]
      (cost, parts), (more, others) = (self._one_length(p, num_shared) for p in (short, long))
      if cost + more < best[0]:
        best = cost + more, parts + others
    self.known.update(shape for part in best[1] for _, shape in part.calls())
    return best[1]

  def _one_length(self, places, num_shared):
    """Returns (cost, [part]) with the best length of rows."""
    sizes, common = self._select(places, num_shared)
    longest, before = int(sizes.max()), num_shared and _prefix_length(num_shared)
    most = max(round_up(longest), self.costs.longest_row)
    most = min(most, round_up(int(sizes.sum() - common.sum())))
    lengths = {min(round_up(int(longest * times)), most) for times in (1, 1.25, 1.5, 2, 3, 4, 6, 8)}
    lengths |= {length for _, length, p in self.known if p == before and length >= longest}

    def cost(part, times=1.0):
      _, length, _ = part.shape
      tokens = part.num_places - before
      cost = tokens * (1 + (before + length / 2) / self.costs.keys)
      new = {shape for _, shape in part.calls()} - self.known
      return times * cost + len(new) * self.costs.program

    def part(length, num):
      most = most_rows(self.costs.call_tokens, length)
      ways = _fill_rows(sizes[:num], common[:num], length), _fill_longest(sizes[:num], length)
      rows = min(ways, key=len)
      # The last call has as many rows as the next power of two, if that is worth a program.
      last = 1 << (len(rows) % most - 1).bit_length() if len(rows) % most else most
      is_ready = len(rows) >= most or (most, length, before) in self.known
      if is_ready and (last, length, before) not in self.known:
        last = last if (most - last) * length > self.costs.program else most
      rows = [[places[i] for i in row] for row in rows]
      return Part(rows, (most, length, before), num_shared, last)

    num = min(_SAMPLE, len(places))
    length = min(sorted(lengths), key=lambda n: cost(part(n, num), len(places) / num))
    whole = part(length, len(places))
    return cost(whole), [whole]

  def _select(self, places, num_shared):
    """Returns sizes and what each shares with the one before it, behind what all share."""
    places = np.array(places)
    common = [0, *(self.common[a + 1 : b + 1].min() for a, b in itertools.pairwise(places))]
    return self.sizes[places] - num_shared, np.maximum(np.array(common) - num_shared, 0)


def _prefix_length(num_shared: int) -> int:
  return next(length for length in PREFIXES if length >= num_shared)


def _fill_longest(sizes: np.ndarray, length: int) -> list[list[int]]:
  """Returns the prompts of each row, where they share nothing: the longest first."""
  rows, rooms, slots = [], [], num_slots(length)
  for i in np.argsort(-sizes, kind='stable').tolist():
    size = int(sizes[i])
    for r, room in enumerate(rooms):
      if size <= room and len(rows[r]) < slots:
        rows[r].append(i)
        rooms[r] -= size
        break
    else:
      rows.append([i])
      rooms.append(length - size)
  return rows


def _fill_rows(sizes: np.ndarray, common: np.ndarray, length: int) -> list[list[int]]:
  """Returns the prompts of each row, in their order."""
  # What two prompts share is the least of what lies between: a row takes them in order, so that
  # each adds only what it does not share with the one taken before it.
  left, shares = list(range(len(sizes))), common.tolist()
  sizes, rows, slots = sizes.tolist(), [], num_slots(length)
  while left:
    row, room, kept, kept_shares = [], length, [], []
    shared, between = 0, length
    for place, i in enumerate(left):
      shared = min(shared, shares[place])
      between = min(between, shares[place])
      extra = sizes[i] - shared
      if extra <= room and len(row) < slots:
        row.append(i)
        room -= extra
        # The next one is compared with this; those left are compared with each other.
        shared = sizes[i]
        continue
      kept.append(i)
      kept_shares.append(between)
      between = length
      if not room or len(row) == slots or len(kept) >= LOOK_AHEAD:
        rest = place + 1
        if rest < len(left):
          kept_shares.append(min(between, shares[rest]))
          kept += left[rest:]
          kept_shares += shares[rest + 1 :]
        break
    rows.append(row)
    left, shares = kept, kept_shares
  return rows


def make_batch(
  prompts: Sequence[np.ndarray],
  rows: Sequence[Sequence[int]],
  shape: Shape,
  num_shared: int = 0,
  always_ends: bool = True,
) -> dict[str, np.ndarray]:
  """Returns a batch for verdict_logprobs, without the num_shared first tokens of each prompt.

  Slot s of row r is for prompt `rows[r][s]`. Where nothing is shared there need be no `ends`.
  """
  num_rows, length, _ = shape
  names = ('tokens', 'positions', 'segment_ids', 'ends')
  batch = {name: np.zeros((num_rows, length), np.int32) for name in names}
  batch['verdict_index'] = np.zeros((num_rows, num_slots(length)), np.int32)
  num_tokens = 0
  for r, row in enumerate(rows):
    sharing.write(batch, r, sharing.walk([prompts[i][num_shared:] for i in row]), num_shared)
    num_tokens += sum(len(prompts[i]) - num_shared for i in row)
  is_plain = not num_shared and num_tokens == np.count_nonzero(batch['segment_ids'])
  if is_plain and not always_ends:
    del batch['ends']
  return batch
