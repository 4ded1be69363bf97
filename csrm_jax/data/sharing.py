"""Prompts that share their first tokens, laid out so that these are read once.

Prompts are put in lexicographic order, so that each shares most with the one before it, and adds
only what follows their common prefix. That is a depth-first walk through the tree of prefixes: the
tokens that continue a token stand behind it without a gap, and one number for each token, `ends`,
says all that attention has to know.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
  """What is read, in the order of places; all int32."""

  tokens: np.ndarray  # [N]
  positions: np.ndarray  # [N], the place of a token in its prompt
  ends: np.ndarray  # [N], the place behind the last token that continues a token
  owners: np.ndarray  # [N], the prompt that a token was first read for
  last: np.ndarray  # the place of each prompt's last token; several may share one


def walk(prompts: Sequence[np.ndarray], share: bool = True) -> Walk:
  """Returns the prompts, int32 [length] each, as one walk; without `share`, one after another."""
  order = sort(prompts) if share else range(len(prompts))
  common = commons(prompts, order) if share else [0] * len(prompts)
  tokens, positions, owners = [], [], []
  ends = np.zeros(sum(map(len, prompts)), np.int32)
  last = np.zeros(len(prompts), np.int32)
  # The places of the tokens that the latest prompt consists of.
  path, stop = np.zeros(0, np.int32), 0
  for i, shared in zip(order, common, strict=True):
    ends[path[shared:]] = stop
    start, stop = stop, stop + len(prompts[i]) - shared
    path = np.concatenate([path[:shared], np.arange(start, stop, dtype=np.int32)])
    tokens.append(prompts[i][shared:])
    positions.append(np.arange(shared, len(path), dtype=np.int32))
    owners.append(np.full(stop - start, i, np.int32))
    last[i] = path[-1]
  ends[path] = stop
  return Walk(*map(np.concatenate, (tokens, positions)), ends[:stop], np.concatenate(owners), last)


def write(batch: Mapping[str, np.ndarray], row: int, read: Walk, before: int = 0) -> None:
  """Writes a walk into a row of a batch, behind `before` tokens that stand elsewhere.

  The batch has tokens, positions, segment_ids and perhaps ends, int32 [B,T], and verdict_index,
  int32 [B,S], whose first slots get the places of the prompts' last tokens.
  """
  here = slice(0, len(read.tokens))
  batch['tokens'][row, here] = read.tokens
  batch['positions'][row, here] = before + read.positions
  # From 1, because 0 is padding.
  batch['segment_ids'][row, here] = 1 + read.owners
  if 'ends' in batch:
    batch['ends'][row, here] = read.ends
  batch['verdict_index'][row, : len(read.last)] = read.last


def sort(prompts: Sequence[np.ndarray]) -> list[int]:
  """Returns the indices of the prompts in lexicographic order."""
  # Bytes compare as the tokens do if the highest ones come first: ids are not negative.
  return sorted(range(len(prompts)), key=lambda i: prompts[i].astype('>i4').tobytes())


def commons(prompts: Sequence[np.ndarray], order: Sequence[int]) -> list[int]:
  """Returns how many first tokens each prompt shares with the one before it; 0 for the first."""
  pairs = itertools.pairwise(order)
  return [0, *(num_common(prompts[i], prompts[j]) for i, j in pairs)][: len(prompts)]


def num_common(one: np.ndarray, other: np.ndarray) -> int:
  """Returns how many first tokens two prompts share."""
  size = min(len(one), len(other))
  differs = one[:size] != other[:size]
  first = int(differs.argmax()) if size else 0
  return first if size and differs[first] else size


def num_read(prompts: Sequence[np.ndarray]) -> int:
  """Returns how many tokens are read of these prompts when they stand in one walk."""
  return sum(map(len, prompts)) - sum(commons(prompts, sort(prompts)))
