"""Strictness augmentation (SA): guidelines in a validated order of strictness.

The order that a proposer means only makes candidates; a test on real conversations decides.

Source: CSRM (arXiv 2605.30487), Algorithm 1.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from csrm_jax.augmentation import proposers, requests
from csrm_jax.augmentation.proposers import Judge, NoReplyError, Proposer
from csrm_jax.core import checks, journal as journal_lib
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Category, Example, Pair


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of Algorithm 1; configs/augment.py has their values.

  Attributes:
    num_subcategories: How many are asked for at first (K).
    max_subcategories: The most that there may be after single conversations have added theirs;
      the number of candidates grows with its square.
    pool_size: The most conversations that a category is tested on.
    alpha: One minus the confidence of the one-sided Clopper–Pearson bound.
    threshold: The bound must exceed it.
    min_extra: At least so many conversations must be unsafe under the strict guideline and safe
      under the lenient one. The paper has no such test (0), but dominance alone also passes two
      guidelines that mean the same.
  """

  num_subcategories: int
  max_subcategories: int
  pool_size: int
  alpha: float
  threshold: float
  min_extra: int


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A pair of guidelines, a and b, of which a is meant to forbid more, and its test.

  Attributes:
    strict: a, written to forbid the `num_strict` (j) most severe subcategories.
    lenient: b, written to forbid the `num_lenient` (i) most severe ones.
    n: How many conversations of the pool the classifier calls unsafe under b.
    k: How many of those it calls unsafe under a, too.
    extra: How many conversations are unsafe under a and safe under b.
    recall_strict: The share of the pool that is unsafe under a.
    recall_lenient: The share of the pool that is unsafe under b.
    bound: Clopper–Pearson's lower bound of k / n.
    kept: Whether the order shows.
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


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What Algorithm 1 found for one category.

  Attributes:
    pool_size: How many conversations the category was tested on.
    subcategories: The most severe first.
    candidates: All that were written, kept or not.
    drops: How often something came to nothing, by reason.
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

  @staticmethod
  def from_dict(obj: Mapping[str, Any]) -> Outcome:
    """Returns the outcome that `dataclasses.asdict` gave."""
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


def lower_bound(k: int, n: int, alpha: float = 0.05) -> float:
  """Returns the one-sided Clopper–Pearson lower bound of k of n.

  It is Beta⁻¹(alpha; k, n − k + 1), and 0 where k or n is 0. With k = n it is alpha^(1/n): the
  smallest n whose bound exceeds 0.95 is 59.
  """
  if not 0 <= k <= n:
    raise ValueError(f'k is {k} of n = {n}; it must be from 0 to n')
  return float(scipy.stats.beta.ppf(alpha, k, n - k + 1)) if k else 0.0


def make_pools(examples: Sequence[Example], size: int, seed: int) -> dict[Category, list[Example]]:
  """Returns D_p for each category: up to `size` examples that violate it.

  Categories come in the order of their first example; which examples stay follows from the seed.
  """
  pools = collections.defaultdict(list)
  for example in examples:
    by_name = {c.name: c for c in example.safety.categories}
    for name in example.violated:
      pools[by_name[name]].append(example)
  for number, pool in enumerate(pools.values()):
    if len(pool) > size:
      rng = random.Random(f'{seed}/{number}')
      pool[:] = [pool[i] for i in sorted(rng.sample(range(len(pool)), size))]
  return dict(pools)


def order_all(
  pools: Mapping[Category, Sequence[Example]],
  proposer: Proposer,
  judge: Judge,
  settings: Settings,
  journal: journal_lib.Journal,
  progress: proposers.Progress,
) -> list[Outcome]:
  """Returns Algorithm 1's outcome for each category, resumable at any point.

  `pools` maps a category to its D_p. The journal holds what is done, under a hash of what it was
  done for. `progress` is called with each category that is finished.
  """
  # Verdicts are written down as they come: a run that was killed within a category does not
  # judge anew.
  remembering = _remember(judge, journal)

  def work(item: tuple[Category, Sequence[Example]]) -> Outcome:
    category, pool = item
    talks = [e.conversation for e in pool]
    key = journal_lib.key(['outcome', category, talks, settings])
    if key in journal:
      return Outcome.from_dict(journal[key])
    outcome = run(category, pool, proposer, remembering, settings)
    # An outcome that lacks something for a passing reason is not written: the next run completes
    # it.
    if not any(reason.endswith(f': {r}') for reason in outcome.drops for r in proposers.TRANSIENT):
      journal.put(key, dataclasses.asdict(outcome))
    return outcome

  outcomes = []
  for outcome in proposers.map_at_once(proposer.concurrency, work, pools.items()):
    outcomes.append(outcome)
    event = {
      'event': 'category',
      'category': outcome.category.name,
      'pool_size': outcome.pool_size,
      'num_written': len(outcome.candidates),
      'num_kept': len(outcome.kept),
      'drops': outcome.drops,
    }
    progress(1, [event])
  return outcomes


def _remember(judge: Judge, journal: journal_lib.Journal) -> Judge:
  # Held while the classifier works: one thread at a time calls it.
  lock = threading.Lock()

  def remembering(talks, rules):
    key = journal_lib.key(['verdicts', rules, talks])
    with lock:
      if key not in journal:
        journal.put(key, ''.join('01'[bool(fires)] for fires in judge(talks, rules)))
      found = journal[key]
      # Anything else would read as "does not violate".
      if len(found) != len(talks) or set(found) - {'0', '1'}:
        raise ValueError(
          f'the verdicts on {len(talks)} conversations are {checks.show(found)}; there must be one '
          'digit, 0 or 1, for each'
        )
      return [c == '1' for c in found]

  return remembering


def run(
  category: Category, pool: Sequence[Example], proposer: Proposer, judge: Judge, settings: Settings
) -> Outcome:
  """Returns the candidates of one category p, tested: Algorithm 1.

  The pool is D_p, examples that violate p; the judge is the classifier ℓ.
  """
  drops = collections.Counter()
  talks = [example.conversation for example in pool]
  found: list[Category] = []
  candidates: list[Candidate] = []
  try:
    found = find_subcategories(category, talks, proposer, judge, settings, drops)
    found = sort_by_severity(category, found, proposer)
  except NoReplyError as error:
    drops[f'category: {error.reason}'] += 1
  else:
    places = list(itertools.combinations(range(1, len(found)), 2))
    # No pass of the test is possible with fewer conversations.
    if lower_bound(len(pool), len(pool), settings.alpha) <= settings.threshold:
      drops['pool_too_small'] += 1
      places = []
    for draft, (i, j) in enumerate(places):
      try:
        strict, lenient = (
          # The draft makes every candidate a request of its own: its guidelines are written
          # anew.
          proposer.ask(
            requests.WriteGuideline(category, tuple(found[:num]), tuple(found[num:]), draft)
          )
          for num in (j, i)
        )
      except NoReplyError as error:
        drops[f'candidate: {error.reason}'] += 1
        continue
      if strict.guideline == lenient.guideline:
        drops['candidate: same_text'] += 1
        continue
      verdicts = [_verdicts(judge, talks, side) for side in (strict, lenient)]
      recalls = [float(unsafe.mean()) for unsafe in verdicts]
      tested = test_order(*verdicts, settings)
      candidates.append(
        Candidate(
          strict, lenient, j, i, recall_strict=recalls[0], recall_lenient=recalls[1], **tested
        )
      )
  return Outcome(category, len(pool), tuple(found), tuple(candidates), dict(drops))


def find_subcategories(
  category: Category,
  talks: Sequence[tuple],
  proposer: Proposer,
  judge: Judge,
  settings: Settings,
  drops: collections.Counter,
) -> list[Category]:
  """Returns S_p: the subcategories proposed at once, and those that conversations asked for."""
  found = list(proposer.ask(requests.ListSubcategories(category, settings.num_subcategories)))
  covered = np.zeros(len(talks), bool)
  for subcategory in found:
    covered |= _verdicts(judge, talks, subcategory)
  # For a conversation that no subcategory fires on, one more is asked for, and stands for the
  # following ones too.
  for index in range(len(talks)):
    if covered[index]:
      continue
    if len(found) >= settings.max_subcategories:
      drops['conversation: subcategory_limit'] += 1
      continue
    known = tuple(c.name for c in found)
    try:
      new = proposer.ask(requests.AddSubcategory(category, known, talks[index]))
    except NoReplyError as error:
      drops[f'conversation: {error.reason}'] += 1
      continue
    found.append(new)
    # Only conversations that have none yet need be judged.
    rest = np.flatnonzero(~covered)
    covered[rest] |= _verdicts(judge, [talks[i] for i in rest], new)
    if not covered[index]:
      drops['conversation: uncovered'] += 1
  return found


def sort_by_severity(
  category: Category, found: Sequence[Category], proposer: Proposer
) -> list[Category]:
  """Returns the subcategories, the most severe first, as the proposer picks them one by one."""
  remaining, ordered = list(found), []
  while len(remaining) > 1:
    index = proposer.ask(requests.PickMostSevere(category, tuple(remaining)))
    ordered.append(remaining.pop(index))
  return ordered + remaining


def _verdicts(judge: Judge, talks: Sequence[tuple], category: Category) -> np.ndarray:
  return np.array(judge(talks, [category] * len(talks)), bool)


def test_order(
  unsafe_strict: np.ndarray, unsafe_lenient: np.ndarray, settings: Settings
) -> dict[str, Any]:
  """Returns n, k, extra, bound and kept of a candidate by name, from verdicts (bool [N])."""
  n = int(unsafe_lenient.sum())
  k = int((unsafe_lenient & unsafe_strict).sum())
  extra = int((unsafe_strict & ~unsafe_lenient).sum())
  bound = lower_bound(k, n, settings.alpha)
  kept = bound > settings.threshold and extra >= settings.min_extra
  return {'n': n, 'k': k, 'extra': extra, 'bound': bound, 'kept': kept}


def explain(candidate: Candidate, settings: Settings) -> str:
  """Returns '' for a candidate that was kept, else why it was not, in a word."""
  if candidate.kept:
    return ''
  n = candidate.n
  # Even k = n would not have passed.
  if lower_bound(n, n, settings.alpha) <= settings.threshold:
    return 'too_few_unsafe'
  # The strict guideline lets too many pass that the lenient one catches, or it catches no
  # others.
  return 'order_not_shown' if candidate.bound <= settings.threshold else 'no_difference'


def make_pairs(outcome: Outcome, pool: Sequence[Example]) -> Iterator[Pair]:
  """Yields a pair (lenient, strict) for each kept candidate and each conversation of the pool."""
  for number, candidate in enumerate(outcome.candidates):
    for example in pool if candidate.kept else ():
      name = outcome.category.name
      pair = augment.strictness_pair(example, name, candidate.strict, candidate.lenient)
      yield dataclasses.replace(pair, id=f'{pair.id}/{name}/{number}')


def precision(
  outcomes: Sequence[Outcome], is_ordered: Callable[[Category, Category], bool]
) -> dict[str, int]:
  """Returns how many candidates are truly ordered, of all and of those kept."""
  counts = collections.Counter(written=0, written_ordered=0, kept=0, kept_ordered=0)
  for candidate in itertools.chain.from_iterable(o.candidates for o in outcomes):
    is_true = is_ordered(candidate.strict, candidate.lenient)
    counts['written'] += 1
    counts['written_ordered'] += is_true
    counts['kept'] += candidate.kept
    counts['kept_ordered'] += candidate.kept and is_true
  return dict(counts)
