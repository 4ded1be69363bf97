"""The two augmentations over a whole data set, resumable at any point.

What is done is in a journal under a hash of what it was done for: a run that
was killed goes on where it was, and does nothing twice.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from csrm_jax.augmentation import categories, endpoint, strictness
from csrm_jax.augmentation.proposers import Judge, Proposer
from csrm_jax.core.journal import Journal
from csrm_jax.safety.schema import Category, Example

# (number finished, log lines) after each piece of work.
Progress = Callable[[int, Sequence[Mapping[str, Any]]], None]


def propose_some(
  examples: Sequence[Example], proposer: Proposer, judge: Judge | None
) -> list[categories.Checked]:
  """Returns the checked proposal for each of some examples (CCA).

  Args:
    examples: what to propose for; as many at once as the proposer takes.
    proposer: asked for each.
    judge: the classifier; see `categories.check_all`.
  """
  num = proposer.concurrency
  with concurrent.futures.ThreadPoolExecutor(num) as pool:
    proposed = _map(pool, lambda e: categories.propose(e, proposer), examples, num)
  return categories.check_all(examples, proposed, judge)


def propose_categories(
  examples: Sequence[Example],
  work: Callable[[Sequence[Example]], list[categories.Checked]],
  size: int,
  journal: Journal,
  progress: Progress,
  map_fn: Callable[..., Iterable[list[categories.Checked]]] = map,
) -> list[categories.Checked]:
  """Returns the checked proposal for each example (CCA).

  A proposal that failed for a passing reason (`endpoint.TRANSIENT`) is not
  written down: the next run tries it again.

  Args:
    examples: what to propose for.
    work: `propose_some`, for those that the journal does not have.
    size: how many of them are one piece of work, after which the journal is
      written.
    journal: of what is done.
    progress: called as work is finished.
    map_fn: (work, pieces) -> the result of each, in order.
  """
  keys = _keys(examples)
  done: dict[str, categories.Checked] = {}
  todo = []
  for key, example in zip(keys, examples, strict=True):
    if key in journal:
      done[key] = categories.Checked.from_dict(journal[key])
    else:
      todo.append((key, example))
  progress(len(done), ())
  pieces = [todo[i : i + size] for i in range(0, len(todo), size)]
  results = map_fn(work, [[e for _, e in piece] for piece in pieces])
  for piece, checked in zip(pieces, results, strict=True):
    events = []
    for (key, example), item in zip(piece, checked, strict=True):
      done[key] = item
      if not is_transient(item):
        journal.put(key, item.to_dict())
      events += [{'event': 'dropped', 'id': example.id, 'reason': reason} for reason in item.drops]
    progress(len(piece), events)
  return [done[key] for key in keys]


def is_transient(checked: categories.Checked) -> bool:
  """Returns whether another run may get a proposal where this one did not."""
  return any(f'no_reply: {r}' in checked.drops for r in endpoint.TRANSIENT)


def order_strictness(
  pools: Mapping[Category, Sequence[Example]],
  proposer: Proposer,
  judge: Judge,
  settings: strictness.Settings,
  journal: Journal,
  progress: Progress,
) -> list[strictness.Outcome]:
  """Returns Algorithm 1's outcome for each category (SA).

  Verdicts are written down as they come, so that a run that was killed within
  a category does not judge anew. An outcome that lacks something for a passing
  reason is not: the next run completes it.

  Args:
    pools: D_p of each category.
    proposer: asked for categories that the journal does not have, as many at
      once as it takes.
    judge: the classifier; called by one thread at a time.
    settings: the algorithm's numbers.
    journal: of what is done.
    progress: called with each category that is finished.
  """
  remembering = _remember(judge, journal)

  def work(item: tuple[Category, Sequence[Example]]) -> strictness.Outcome:
    category, pool = item
    key = _hash(
      ['outcome', category.to_dict(), [_talk(e) for e in pool], dataclasses.asdict(settings)]
    )
    if key in journal:
      return strictness.Outcome.from_dict(journal[key])
    outcome = strictness.run(category, pool, proposer, remembering, settings)
    if not any(reason.endswith(f': {r}') for reason in outcome.drops for r in endpoint.TRANSIENT):
      journal.put(key, outcome.to_dict())
    return outcome

  outcomes = []
  with concurrent.futures.ThreadPoolExecutor(proposer.concurrency) as pool:
    for outcome in _iterate(pool, work, pools.items(), proposer.concurrency):
      outcomes.append(outcome)
      progress(
        1,
        [
          {
            'event': 'category',
            'category': outcome.category.name,
            'pool_size': outcome.pool_size,
            'num_written': len(outcome.candidates),
            'num_kept': len(outcome.kept),
            'drops': outcome.drops,
          }
        ],
      )
  return outcomes


def _remember(judge: Judge, journal: Journal) -> Judge:
  lock = threading.Lock()

  def remembering(talks, rules):
    key = _hash(
      ['verdicts', [c.to_dict() for c in rules], [[m.to_dict() for m in talk] for talk in talks]]
    )
    with lock:
      if key not in journal:
        fired = judge(talks, rules)
        journal.put(key, ''.join('01'[bool(f)] for f in fired))
      return [c == '1' for c in journal[key]]

  return remembering


def _iterate(
  pool: concurrent.futures.Executor, work: Callable, items: Iterable, concurrency: int
) -> Iterator:
  # Without threads, an error shows where it arose, and work stops at once.
  return map(work, items) if concurrency == 1 else pool.map(work, items)


def _map(
  pool: concurrent.futures.Executor, work: Callable, items: Sequence, concurrency: int
) -> list:
  return list(_iterate(pool, work, items, concurrency))


def _keys(examples: Sequence[Example]) -> list[str]:
  """Returns a hash of each example; equal ones are told apart by number."""
  seen: dict[str, int] = {}
  keys = []
  for example in examples:
    key = _hash([example.safety.digest(), _talk(example), example.label, example.violated])
    seen[key] = seen.get(key, 0) + 1
    keys.append(f'{key}/{seen[key]}')
  return keys


def _talk(example: Example) -> list[dict[str, str]]:
  return [m.to_dict() for m in example.conversation]


def _hash(obj: Any) -> str:
  text = json.dumps(obj, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()
