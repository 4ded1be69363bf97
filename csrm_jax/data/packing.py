"""Packing of atoms into rows of fixed length.

A packed batch states everything by explicit indices: which tokens belong to which prompt, where
each prompt's verdict is read, and which slots make a pair. No code ever searches for a padding
token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from csrm_jax.data.features import Atom, Dropped

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """The fixed shape of a batch.

  Attributes:
    batch_size: The number of rows, B.
    row_length: The number of tokens per row, T.
    max_segments: The most prompts that a row may hold, S; a pair counts as two.
    pad_id: Fills rows up. Nothing depends on it: padding is where segment_ids is 0.
  """

  batch_size: int
  row_length: int
  max_segments: int
  pad_id: int = 0

  def __post_init__(self):
    for name in ('batch_size', 'row_length', 'max_segments'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be positive')


def pack_rows(atoms: Sequence[Atom], shape: BatchShape) -> tuple[Batch, list[int]]:
  """Returns a batch of the atoms that found a place, and the ascending indices of those left.

  The atoms come oldest first. Each row starts with the oldest one left, so that nothing waits
  long; the subset of the others that fills the row best follows. A batch has B rows of T tokens
  with S slots for prompts:
    tokens, segment_ids (1.. by prompt, 0 is padding), positions (0.. in each prompt): int32 [B, T]
    verdict_index: int32 [B, S], the place of a prompt's last token
    label: int32 [B, S], 0 safe, 1 unsafe, -1 none or unused slot
    label_weight: float32 [B, S], 1 where a prompt with a label stands
    pair_weight: float32 [B, S], 1 at slot s where slots s and s + 1 hold a pair (safer, other)
    loss_weight: float32 [B, T], only if the prompts have one
  """
  for atom in atoms:
    misfit = does_not_fit(atom, shape)
    if misfit:
      raise ValueError(misfit.detail)
  lengths = [atom.length for atom in atoms]
  sizes = [len(atom.prompts) for atom in atoms]
  left = list(range(len(atoms)))
  batch = _empty_batch(shape)
  # All prompts of a stream have loss weights, or none has: the first one tells.
  if atoms and atoms[0].prompts[0].loss_weight is not None:
    batch['loss_weight'] = np.zeros((shape.batch_size, shape.row_length), np.float32)
  for row in range(shape.batch_size):
    if not left:
      break
    chosen = _choose_row(left, lengths, sizes, shape)
    _write_row(batch, row, [atoms[i] for i in chosen])
    taken = set(chosen)
    left = [i for i in left if i not in taken]
  return batch, left


def does_not_fit(atom: Atom, shape: BatchShape) -> Dropped | None:
  """Returns why no row of this shape could hold the atom, or None."""
  if atom.length > shape.row_length:
    return Dropped(
      'longer_than_row',
      f'{atom.prompts[0].id}: a {atom.kind} of {atom.length} tokens does not'
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


def fill_rate(batch: Batch) -> float:
  """Returns the share of a batch's token places that hold a prompt."""
  return float(np.mean(batch['segment_ids'] > 0))


def _choose_row(
  left: Sequence[int], lengths: Sequence[int], sizes: Sequence[int], shape: BatchShape
) -> list[int]:
  """Returns the oldest atom and those of the others that fill its row best."""
  # Subset sum: bit t of `reach` says that some of the atoms looked at so far have t tokens in
  # all. They are looked at oldest first, so that older ones are preferred where sums are equal.
  first = left[0]
  room = shape.row_length - lengths[first]
  mask = (1 << (room + 1)) - 1
  reach, before, looked_at = 1, [], []
  for i in left[1:]:
    if lengths[i] > room:
      continue
    before.append(reach)
    looked_at.append(i)
    reach |= (reach << lengths[i]) & mask
    # The row can be filled to its last token.
    if reach >> room:
      break
  total = reach.bit_length() - 1
  chosen = [first]
  # From the last one back: an atom is taken where the total was out of reach without it.
  for i, reachable in zip(reversed(looked_at), reversed(before), strict=True):
    if not reachable >> total & 1:
      chosen.append(i)
      total -= lengths[i]
  # The subset sum counts tokens only; with many short prompts the slots may be too few.
  if sum(sizes[i] for i in chosen) <= shape.max_segments:
    return sorted(chosen)
  return _choose_longest(left, lengths, sizes, shape)


def _choose_longest(
  left: Sequence[int], lengths: Sequence[int], sizes: Sequence[int], shape: BatchShape
) -> list[int]:
  """Returns the oldest atom and, longest first, whatever still fits."""
  first, *others = left
  chosen = [first]
  room = shape.row_length - lengths[first]
  slots = shape.max_segments - sizes[first]
  for i in sorted(others, key=lambda i: -lengths[i]):
    if lengths[i] <= room and sizes[i] <= slots:
      chosen.append(i)
      room -= lengths[i]
      slots -= sizes[i]
  return sorted(chosen)


def _empty_batch(shape: BatchShape) -> Batch:
  by_token = (shape.batch_size, shape.row_length)
  by_slot = (shape.batch_size, shape.max_segments)
  return {
    'tokens': np.full(by_token, shape.pad_id, np.int32),
    'segment_ids': np.zeros(by_token, np.int32),
    'positions': np.zeros(by_token, np.int32),
    'verdict_index': np.zeros(by_slot, np.int32),
    'label': np.full(by_slot, -1, np.int32),
    'label_weight': np.zeros(by_slot, np.float32),
    'pair_weight': np.zeros(by_slot, np.float32),
  }


def _write_row(batch: Batch, row: int, atoms: Sequence[Atom]) -> None:
  start = slot = 0
  count = np.arange(batch['tokens'].shape[1], dtype=np.int32)
  for atom in atoms:
    if atom.kind == 'pair':
      batch['pair_weight'][row, slot] = 1.0
    for prompt in atom.prompts:
      end = start + len(prompt.tokens)
      batch['tokens'][row, start:end] = prompt.tokens
      # From 1, because 0 is padding.
      batch['segment_ids'][row, start:end] = slot + 1
      batch['positions'][row, start:end] = count[: end - start]
      if prompt.loss_weight is not None:
        batch['loss_weight'][row, start:end] = prompt.loss_weight
      batch['verdict_index'][row, slot] = end - 1
      batch['label'][row, slot] = prompt.label
      if prompt.label >= 0:
        batch['label_weight'][row, slot] = 1.0
      start = end
      slot += 1
