"""Benchmarks: named items, and the suite that measures on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.data import sources
from csrm_jax.safety.schema import Example, Pair

TIES = 'Ties'  # the subset of RewardBench 2 that is scored by its own rules


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Items of one suite. Where data is missing there are no items, and `command` would fetch it.

  Attributes:
    suite: A key of `evals.suites.SUITES`.
    items: What that suite takes: examples, pairs, or variants of examples.
    groups: One id per item, or empty. The bootstrap draws items of one id together, as it does
      those of one conversation.
    tags: Maps a breakdown to the group of each item in it.
    validation: Labelled examples that thresholds and calibration are fitted on; none is an item.
    drops: How many rows of the data were left out, by reason.
    without_rules: Also classify the examples with their rules hidden; the difference is what
      reading them is worth.
    options: Further arguments of the suite.
    error: Why the items cannot be made, such as a package that is missing.
  """

  name: str
  suite: str
  items: Sequence[Any] = ()
  description: str = ''
  groups: Sequence[str] = ()
  tags: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  validation: Sequence[Example] = ()
  command: str = ''
  drops: Mapping[str, int] = dataclasses.field(default_factory=dict)
  without_rules: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  error: str = ''

  def __post_init__(self):
    lengths = {'groups': self.groups} if self.groups else {}
    for what, values in {**lengths, **self.tags}.items():
      if len(values) != len(self.items):
        raise ValueError(
          f'benchmark {self.name}: {len(values)} values of {what!r} for '
          f'{len(self.items)} items; give one for each'
        )

  @property
  def is_skipped(self) -> bool:
    """Whether its data is missing."""
    return not self.items and bool(self.command)

  def take(self, rows: Sequence[int], **fields: Any) -> Benchmark:
    """Returns the benchmark with these of its items; `fields` replace others."""
    return dataclasses.replace(
      self,
      items=[self.items[i] for i in rows],
      groups=[self.groups[i] for i in rows] if self.groups else (),
      tags={k: [v[i] for i in rows] for k, v in self.tags.items()},
      **fields,
    )


@dataclasses.dataclass(frozen=True)
class Choice:
  """One prompt with several responses under the same rules; the correct ones come first.

  Attributes:
    id: In the subset Ties 'ref:<n>' or 'tied:<n>'.
    num_correct: How many of the responses, from the first on, are correct.
    subset: The name that the item is reported under.
  """

  id: str
  responses: tuple[Example, ...]
  num_correct: int
  subset: str = ''

  def __post_init__(self):
    if not 0 < self.num_correct < len(self.responses):
      raise ValueError(
        f'{self.id}: {self.num_correct} correct of {len(self.responses)} '
        'responses; at least one must be correct and one not'
      )
    kind, _, number = self.id.partition(':')
    if self.subset == TIES and not (kind in ('ref', 'tied') and number):
      raise ValueError(f'{self.id}: items of the subset {TIES} have ids ref:<n> or tied:<n>')


def limited(benchmark: Benchmark, max_items: int) -> Benchmark:
  """Returns the benchmark with about `max_items` items, evenly spread; 0 keeps all.

  Examples of one conversation, or of one group, stay together, so the number is not exact.
  Validation rows are limited in the same way.
  """
  held = _spread(benchmark.validation, (), max_items)
  if len(held) < len(benchmark.validation):
    benchmark = dataclasses.replace(benchmark, validation=[benchmark.validation[i] for i in held])
  rows = _spread(benchmark.items, benchmark.groups, max_items)
  if len(rows) < len(benchmark.items):
    about = f'{benchmark.description} {len(rows):,} of {len(benchmark.items):,} items.'
    benchmark = benchmark.take(rows, description=about)
  return benchmark


def _spread(items: Sequence[Any], groups: Sequence[str], max_items: int) -> list[int]:
  if not max_items or len(items) <= max_items:
    return list(range(len(items)))
  sets: dict[Any, list[int]] = {}
  plain = isinstance(items[0], (Example, Pair))
  alone = sources.conversation_keys(items) if plain else range(len(items))
  for i, key in enumerate(alone):
    sets.setdefault((groups and groups[i]) or key, []).append(i)
  # Whole sets are chosen: as many as hold `max_items` at their mean size.
  num = max(max_items * len(sets) // len(items), 1)
  chosen = sources.spread(list(sets.values()), num)
  return sorted(i for rows in chosen for i in rows)
