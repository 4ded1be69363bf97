"""What Algorithm 1 is given, and what it finds, in a form that JSON keeps.

Source: CSRM (arXiv 2605.30487), Algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from csrm_jax.safety.schema import Category


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of Algorithm 1.

  Attributes:
    num_subcategories: K, asked for at first (the unconditional ones).
    max_subcategories: no more are added for single conversations; the number
      of candidates grows with its square.
    pool_size: conversations a category is tested on, at most.
    alpha: of the one-sided Clopper–Pearson bound.
    threshold: that the bound must exceed.
    min_extra: conversations that must be unsafe under the strict guideline
      and safe under the lenient one, at least. The paper has no such test
      (0), but dominance alone also passes two guidelines that mean the same.
  """

  num_subcategories: int = 6
  max_subcategories: int = 15
  pool_size: int = 200
  alpha: float = 0.05
  threshold: float = 0.95
  min_extra: int = 1


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A pair of guidelines, `strict` meant to forbid more, and its test.

  Attributes:
    strict: a, written to forbid the `num_strict` most severe subcategories.
    lenient: b, written to forbid the `num_lenient` most severe ones.
    num_strict: j.
    num_lenient: i.
    n: conversations of the pool that the classifier calls unsafe under b.
    k: those of them that it calls unsafe under a, too.
    extra: conversations unsafe under a, and safe under b.
    recall_strict: share of the pool that is unsafe under a.
    recall_lenient: share of the pool that is unsafe under b.
    bound: Clopper–Pearson's lower bound of k / n.
    kept: whether the order shows.
  """

  strict: Category
  lenient: Category
  num_strict: int
  num_lenient: int
  n: int
  k: int
  extra: int
  recall_strict: float
  recall_lenient: float
  bound: float
  kept: bool

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What Algorithm 1 found for one category.

  Attributes:
    category: with its standard guideline.
    pool_size: conversations it was tested on.
    subcategories: in order of severity, the most severe first.
    candidates: all that were written, kept or not.
    drops: what came to nothing, by reason.
  """

  category: Category
  pool_size: int
  subcategories: tuple[Category, ...]
  candidates: tuple[Candidate, ...]
  drops: dict[str, int]

  @property
  def kept(self) -> tuple[Candidate, ...]:
    """The candidates whose order shows."""
    return tuple(c for c in self.candidates if c.kept)

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values."""
    return {
      'category': self.category.to_dict(),
      'pool_size': self.pool_size,
      'subcategories': [c.to_dict() for c in self.subcategories],
      'candidates': [c.to_dict() for c in self.candidates],
      'drops': dict(self.drops),
    }

  @staticmethod
  def from_dict(obj: Mapping[str, Any]) -> Outcome:
    """Returns the outcome that `to_dict` gave."""
    return Outcome(
      Category(**obj['category']),
      obj['pool_size'],
      tuple(Category(**c) for c in obj['subcategories']),
      tuple(
        Candidate(**c | {side: Category(**c[side]) for side in ('strict', 'lenient')})
        for c in obj['candidates']
      ),
      dict(obj['drops']),
    )
