"""Configurable category augmentation (CCA): proposals of p+ and p-, checked.

A proposal is made once for a conversation and stored with the example (`plus`, `minus`). What is
dropped, inserted and relabelled is drawn anew each epoch by `safety.augment.cca`.

Source: CSRM (arXiv 2605.30487), configurable category augmentation.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from csrm_jax.augmentation import proposers, requests
from csrm_jax.augmentation.proposers import Judge, NoReplyError, Proposer
from csrm_jax.core import journal as journal_lib
from csrm_jax.safety.schema import Category, Example

# Verdicts are given in these words: a rule that holds one may give its verdict away.
VERDICT_WORDS = ('safe', 'unsafe')
# Two guidelines that have more of their words in common, in order, say the same. The order
# matters: "cats, not dogs" and "dogs, not cats" have the same words.
_SAME_TEXT = 0.85
# So many words in a row, taken from the response, are a quotation.
_QUOTED_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Checked:
  """A proposal after its checks; `drops` says in a word each why p+ or p- is missing."""

  plus: Category | None
  minus: Category | None
  drops: tuple[str, ...] = ()

  @property
  def is_transient(self) -> bool:
    """Whether another run may get a proposal where this one did not."""
    return any(f'no_reply: {reason}' in self.drops for reason in proposers.TRANSIENT)

  @staticmethod
  def from_dict(obj: Mapping[str, Any]) -> Checked:
    """Returns the proposal that `dataclasses.asdict` gave."""
    plus, minus = (obj[side] and Category(**obj[side]) for side in ('plus', 'minus'))
    return Checked(plus, minus, tuple(obj['drops']))


def propose_all(
  examples: Sequence[Example],
  work: Callable[[Sequence[Example]], list[Checked]],
  size: int,
  journal: journal_lib.Journal,
  progress: proposers.Progress,
  map_fn: Callable[..., Iterable[list[Checked]]] = map,
) -> list[Checked]:
  """Returns the checked proposal for each example, resumable at any point.

  Args:
    work: Makes the proposals that the journal does not have, as `propose_some` does.
    size: How many examples are a piece of work, after which the journal is written.
    progress: Called as pieces of work are finished.
    map_fn: Maps (work, pieces) to the result of each, in order, as `map` does.
  """
  keys = _keys(examples)
  done = {key: Checked.from_dict(journal[key]) for key in keys if key in journal}
  todo = [(key, e) for key, e in zip(keys, examples, strict=True) if key not in done]
  # Those of an earlier start too: it may have been killed between its journal and its log.
  progress(len(done), _events(examples, [done.get(key) for key in keys]))
  pieces = [todo[i : i + size] for i in range(0, len(todo), size)]
  results = map_fn(work, [[e for _, e in piece] for piece in pieces])
  for piece, checked in zip(pieces, results, strict=True):
    for (key, _), item in zip(piece, checked, strict=True):
      done[key] = item
      # What failed for a passing reason is not written down: the next run tries it again.
      if not item.is_transient:
        journal.put(key, dataclasses.asdict(item))
    progress(len(piece), _events([e for _, e in piece], checked))
  return [done[key] for key in keys]


def _events(examples: Sequence[Example], checked: Sequence[Checked | None]) -> list[dict[str, str]]:
  return [
    {'event': 'dropped', 'id': example.id, 'reason': reason}
    for example, item in zip(examples, checked, strict=True)
    for reason in (item.drops if item else ())
  ]


def _keys(examples: Sequence[Example]) -> list[str]:
  """Returns a hash of each example; equal examples are told apart by number."""
  seen, keys = collections.Counter(), []
  for e in examples:
    key = journal_lib.key([e.safety.digest(), e.conversation, e.label, e.violated])
    seen[key] += 1
    keys.append(f'{key}/{seen[key]}')
  return keys


def propose_some(
  examples: Sequence[Example], proposer: Proposer, judge: Judge | None
) -> list[Checked]:
  """Returns the checked proposal for each example; see `check_all`."""
  proposed = proposers.map_at_once(proposer.concurrency, lambda e: propose(e, proposer), examples)
  return check_all(examples, list(proposed), judge)


def propose(example: Example, proposer: Proposer) -> requests.Categories | NoReplyError:
  """Returns the proposer's p+ and p-, not yet checked, or why there is none."""
  try:
    return proposer.ask(requests.ProposeCategories(example.safety, example.conversation))
  except NoReplyError as error:
    return error


def check_all(
  examples: Sequence[Example],
  proposed: Sequence[requests.Categories | NoReplyError],
  judge: Judge | None = None,
) -> list[Checked]:
  """Returns each proposal without what fails a check, and why that failed.

  The checks of the text are of lengths, verdict words, quotations of the response, and whether
  the rules have it already or p- is like p+. With a judge, p+ must fire on the response and p-
  must not; without one that is taken on trust.
  """
  checked = [check_text(example, reply) for example, reply in zip(examples, proposed, strict=True)]
  if judge is None:
    return checked
  asked = [
    (number, side, category)
    for number, item in enumerate(checked)
    for side, category in (('plus', item.plus), ('minus', item.minus))
    if category is not None
  ]
  verdicts = judge(
    [examples[number].conversation for number, *_ in asked], [category for *_, category in asked]
  )
  for (number, side, _), fires in zip(asked, verdicts, strict=True):
    if fires != (side == 'plus'):
      reason = 'minus_fires' if fires else 'plus_does_not_fire'
      item = checked[number]
      checked[number] = dataclasses.replace(item, **{side: None}, drops=(*item.drops, reason))
  return checked


def check_text(example: Example, reply: requests.Categories | NoReplyError) -> Checked:
  """Returns the proposal without what its own words rule out."""
  if isinstance(reply, NoReplyError):
    return Checked(None, None, (f'no_reply: {reply.reason}',))
  drops, kept = [], []
  others = list(example.safety.categories)
  for side in ('plus', 'minus'):
    category = getattr(reply, side)
    problem = 'not_proposed' if category is None else _problem(category, example, others)
    if problem:
      drops.append(f'{side}_{problem}')
      category = None
    else:
      others.append(category)  # p- must differ from p+ as well.
    kept.append(category)
  return Checked(*kept, tuple(drops))


def attach(example: Example, checked: Checked) -> Example:
  """Returns the example with its proposals; its rules and label stay."""
  return dataclasses.replace(example, plus=checked.plus, minus=checked.minus)


def _problem(category: Category, example: Example, others: Iterable[Category]) -> str | None:
  length = requests.length_problem(category)
  if length:
    return length
  words = _words(f'{category.name} {category.guideline}')
  if not set(VERDICT_WORDS).isdisjoint(words):
    return 'leaks_verdict'
  if _is_quoted(words, _words(example.conversation[-1].content)):
    return 'quotes_response'
  for other in others:
    if _words(category.name) == _words(other.name):
      return 'name_taken'
    if _overlap(category.guideline, other.guideline) >= _SAME_TEXT:
      return 'covered'
  return None


def _words(text: str) -> list[str]:
  # Letters of any script make words; \w alone would join 'un_safe'.
  return re.findall(r'[^\W_]+', text.casefold())


def _overlap(a: str, b: str) -> float:
  """Returns the share of words that two texts have in common, in order."""
  return difflib.SequenceMatcher(None, _words(a), _words(b), autojunk=False).ratio()


def _is_quoted(words: Sequence[str], response: Sequence[str]) -> bool:
  def runs(seq):
    return {tuple(seq[i : i + _QUOTED_WORDS]) for i in range(len(seq) - _QUOTED_WORDS + 1)}

  return not runs(words).isdisjoint(runs(response))
