"""Strictness augmentation (SA): guidelines in a validated order of strictness.

Source: CSRM (arXiv 2605.30487), Algorithm 1. The order that a proposer means
only proposes candidates; a test on real conversations decides.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats

from csrm_jax.augmentation import requests
from csrm_jax.augmentation.outcomes import Candidate, Outcome, Settings
from csrm_jax.augmentation.proposers import Judge, NoReplyError, Proposer
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Category, Example, Pair


def lower_bound(k: int, n: int, alpha: float = 0.05) -> float:
  """Returns the one-sided Clopper–Pearson lower bound of k of n.

  It is Beta⁻¹(alpha; k, n − k + 1), and 0 where k or n is 0. With k = n it is
  alpha^(1/n): the smallest n whose bound exceeds 0.95 is 59.

  Raises:
    ValueError: k is not in [0, n].
  """
  if not 0 <= k <= n:
    raise ValueError(f'k is {k} of n = {n}; it must be from 0 to n')
  if not k:
    return 0.0
  return float(scipy.stats.beta.ppf(alpha, k, n - k + 1))


def make_pools(examples: Sequence[Example], size: int, seed: int) -> dict[Category, list[Example]]:
  """Returns D_p for each category: up to `size` examples that violate it.

  Categories come in the order of their first example; which of its examples
  stay follows from the seed.
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


def run(
  category: Category, pool: Sequence[Example], proposer: Proposer, judge: Judge, settings: Settings
) -> Outcome:
  """Returns the candidates of one category, tested: Algorithm 1.

  Args:
    category: p, with its standard guideline.
    pool: D_p, examples that violate it.
    proposer: writes subcategories and guidelines.
    judge: the classifier ℓ.
    settings: its numbers.
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
    numbers = range(1, len(found))
    # No pass of the test is possible with fewer conversations.
    if lower_bound(len(pool), len(pool), settings.alpha) <= settings.threshold:
      drops['pool_too_small'] += 1
      numbers = range(0)
    for draft, (i, j) in enumerate(itertools.combinations(numbers, 2)):
      candidate = _write_and_test(
        category, talks, found, (i, j, draft), proposer, judge, settings, drops
      )
      if candidate is not None:
        candidates.append(candidate)
  return Outcome(category, len(pool), tuple(found), tuple(candidates), dict(drops))


def find_subcategories(
  category: Category,
  talks: Sequence[tuple],
  proposer: Proposer,
  judge: Judge,
  settings: Settings,
  drops: collections.Counter,
) -> list[Category]:
  """Returns S_p: those proposed at once, and those a conversation asked for.

  For a conversation that no subcategory fires on, one more is asked for; it
  stands from then on, for the following ones too. Counted in `drops`:
  conversations that stay without one ('uncovered'), and for which none could
  be asked for ('subcategory_limit') or came.

  Raises:
    NoReplyError: there is no first list.
  """
  found = list(proposer.ask(requests.ListSubcategories(category, settings.num_subcategories)))
  covered = np.zeros(len(talks), bool)
  for subcategory in found:
    covered |= _verdicts(judge, talks, subcategory)
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
    # Only what has none yet need be judged.
    rest = np.flatnonzero(~covered)
    covered[rest] |= _verdicts(judge, [talks[i] for i in rest], new)
    if not covered[index]:
      drops['conversation: uncovered'] += 1
  return found


def sort_by_severity(
  category: Category, found: Sequence[Category], proposer: Proposer
) -> list[Category]:
  """Returns the subcategories, the most severe first.

  The proposer picks the most severe of those that remain, again and again.

  Raises:
    NoReplyError: a pick failed; without it there is no order.
  """
  remaining, ordered = list(found), []
  while len(remaining) > 1:
    index = proposer.ask(requests.PickMostSevere(category, tuple(remaining)))
    ordered.append(remaining.pop(index))
  return ordered + remaining


def test_order(
  unsafe_strict: np.ndarray, unsafe_lenient: np.ndarray, settings: Settings
) -> dict[str, Any]:
  """Returns n, k, extra, bound and kept of a candidate, by name.

  Args:
    unsafe_strict: [N] bool, the classifier's verdicts under a.
    unsafe_lenient: [N] bool, those under b.
    settings: alpha, threshold and min_extra.
  """
  n = int(unsafe_lenient.sum())
  k = int((unsafe_lenient & unsafe_strict).sum())
  extra = int((unsafe_strict & ~unsafe_lenient).sum())
  bound = lower_bound(k, n, settings.alpha)
  kept = bound > settings.threshold and extra >= settings.min_extra
  return {'n': n, 'k': k, 'extra': extra, 'bound': bound, 'kept': kept}


def explain(candidate: Candidate, settings: Settings) -> str:
  """Returns '' for a candidate that was kept, else why it was not, in a word.

  'too_few_unsafe': even k = n would not have passed; 'order_not_shown': the
  strict guideline lets too many pass that the lenient one catches;
  'no_difference': it catches no others.
  """
  if candidate.kept:
    return ''
  n = candidate.n
  if lower_bound(n, n, settings.alpha) <= settings.threshold:
    return 'too_few_unsafe'
  if candidate.bound <= settings.threshold:
    return 'order_not_shown'
  return 'no_difference'


def make_pairs(outcome: Outcome, pool: Sequence[Example]) -> Iterator[Pair]:
  """Yields a pair for each kept candidate and each conversation of the pool.

  The safer side is the lenient one; see `augment.strictness_pair`.
  """
  for number, candidate in enumerate(outcome.candidates):
    if not candidate.kept:
      continue
    for example in pool:
      pair = augment.strictness_pair(
        example, outcome.category.name, candidate.strict, candidate.lenient
      )
      name = f'{pair.id}/{outcome.category.name}/{number}'
      yield dataclasses.replace(pair, id=name)


def precision(
  outcomes: Sequence[Outcome], is_ordered: Callable[[Category, Category], bool]
) -> dict[str, int]:
  """Returns how many candidates are truly ordered, of all and of those kept.

  Args:
    outcomes: of some categories.
    is_ordered: (strict, lenient) -> the truth, where it is known.
  """
  counts = collections.Counter(written=0, written_ordered=0, kept=0, kept_ordered=0)
  for candidate in itertools.chain.from_iterable(o.candidates for o in outcomes):
    is_true = is_ordered(candidate.strict, candidate.lenient)
    counts['written'] += 1
    counts['written_ordered'] += is_true
    counts['kept'] += candidate.kept
    counts['kept_ordered'] += candidate.kept and is_true
  return dict(counts)


def _write_and_test(
  category: Category,
  talks: Sequence[tuple],
  ordered: Sequence[Category],
  place: tuple[int, int, int],
  proposer: Proposer,
  judge: Judge,
  settings: Settings,
  drops: collections.Counter,
) -> Candidate | None:
  i, j, draft = place
  guidelines = []
  for number in (j, i):
    try:
      guidelines.append(
        proposer.ask(
          requests.WriteGuideline(category, tuple(ordered[:number]), tuple(ordered[number:]), draft)
        )
      )
    except NoReplyError as error:
      drops[f'candidate: {error.reason}'] += 1
      return None
  strict, lenient = guidelines
  if strict.guideline == lenient.guideline:
    drops['candidate: same_text'] += 1
    return None
  verdicts = [_verdicts(judge, talks, g) for g in guidelines]
  tested = test_order(*verdicts, settings)
  return Candidate(
    strict,
    lenient,
    j,
    i,
    recall_strict=float(verdicts[0].mean()),
    recall_lenient=float(verdicts[1].mean()),
    **tested,
  )


def _verdicts(judge: Judge, talks: Sequence[tuple], category: Category) -> np.ndarray:
  return np.array(judge(talks, [category] * len(talks)), bool)
