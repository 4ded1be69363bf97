"""How prompts of many lengths become batches of few shapes.

A plan counts tokens, padding included: prompts under the same rules are read
behind one copy of the rules where that takes clearly fewer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from csrm_jax.models import transformer

# Row lengths that are compiled; from 128 on about a third is padding at most.
BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# Fewer tokens than this are not worth shapes of their own.
MIN_SAVED = 2048

# [(indices of prompts, (rows, row length))]
Plan = list[tuple[list[int], tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Group:
  """Prompts that go together.

  Attributes:
    batches: what their rows hold, behind the tokens that they share.
    num_shared: how many first tokens all of them share; 0: each is whole.
    prefix_length: num_shared, padded.
  """

  batches: Plan
  num_shared: int = 0
  prefix_length: int = 0

  @property
  def num_tokens(self) -> int:
    """Tokens that the model reads, padding included."""
    return self.prefix_length + sum(rows * length for _, (rows, length) in self.batches)


def usable_buckets(buckets: Sequence[int], max_length: int) -> list[int]:
  """Returns the buckets up to max_length, ascending, the last one of it."""
  return sorted({b for b in buckets if b < max_length} | {max_length})


def make_groups(
  prompts: Sequence[np.ndarray],
  keys: Sequence[Hashable],
  lengths: Sequence[int],
  batch_tokens: int,
  window: int = 0,
) -> list[Group]:
  """Returns groups that hold each prompt once.

  Prompts with one key form a group that shares what they begin with, if it
  takes at most three quarters of the tokens and MIN_SAVED fewer.

  Args:
    prompts: tokens [length] of each; not empty.
    keys: of each prompt; equal where a long common beginning is likely.
    lengths: usable_buckets.
    batch_tokens: about how many tokens a batch may have.
    window: of the model's attention; it counts the padding of a prefix.
  """
  by_key = {}
  for i, key in enumerate(keys):
    by_key.setdefault(key, []).append(i)
  groups, others = [], []
  for indices in by_key.values():
    if len(indices) < 2:
      others += indices
      continue
    whole = Group(_plan(prompts, indices, lengths, batch_tokens))
    group = _share(prompts, indices, lengths, batch_tokens)
    length = group.prefix_length + max(length for _, (_, length) in group.batches)
    saved = whole.num_tokens - group.num_tokens
    if saved >= MIN_SAVED and 4 * saved >= whole.num_tokens and (not window or length <= window):
      groups.append(group)
    else:
      others += indices
  if others:
    groups.append(Group(_plan(prompts, sorted(others), lengths, batch_tokens)))
  return groups


def _share(prompts, indices, lengths, batch_tokens) -> Group:
  num_shared = transformer.num_common([prompts[i] for i in indices])
  return Group(
    _plan(prompts, indices, lengths, batch_tokens, num_shared),
    num_shared,
    lengths[np.searchsorted(lengths, num_shared)],
  )


def _plan(
  prompts: Sequence[np.ndarray],
  indices: Sequence[int],
  lengths: Sequence[int],
  batch_tokens: int,
  num_shared: int = 0,
) -> Plan:
  """Returns batches of the indices, shapes repeating.

  Within a bucket chunks are full but for the last, whose rows are the next
  power of two: at most log2(rows) shapes a bucket.
  """
  plan = []
  sizes = np.array([len(prompts[i]) for i in indices], np.int64) - num_shared
  bucket_of = np.searchsorted(lengths, sizes)
  for bucket in np.unique(bucket_of):
    length = lengths[bucket]
    most = most_rows(batch_tokens, length)
    chosen = [indices[i] for i in np.flatnonzero(bucket_of == bucket)]
    for start in range(0, len(chosen), most):
      part = chosen[start : start + most]
      rows = 1 << (len(part) - 1).bit_length()
      plan.append((part, (rows, length)))
  return plan


def most_rows(batch_tokens: int, length: int) -> int:
  """Returns the rows of a full batch, a power of two."""
  return 1 << max(batch_tokens // length, 1).bit_length() - 1


def pad(
  prompts: Sequence[np.ndarray], shape: tuple[int, int], num_shared: int = 0
) -> dict[str, np.ndarray]:
  """Returns a batch with one prompt a row; rows left over are all padding.

  It holds tokens, positions, segment_ids int32 [B,T] of the prompts without
  their first num_shared tokens, and verdict_index int32 [B,1].
  """
  batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'positions', 'segment_ids')}
  batch['verdict_index'] = np.zeros((shape[0], 1), np.int32)
  for row, tokens in enumerate(prompts):
    size = len(tokens) - num_shared
    batch['tokens'][row, :size] = tokens[num_shared:]
    batch['positions'][row, :size] = num_shared + np.arange(size)
    batch['segment_ids'][row, :size] = 1
    batch['verdict_index'][row, 0] = size - 1
  return batch
