"""Rules from one-bit alarms, for who has verdicts and no written policy.

A proposer sees conversations with a bit each, and writes rules; a judge says on which conversations
they fire; the proposer revises the best so far, shown where it is wrong.

Source: EPO-Safe (arXiv 2604.23210), by its abstract: rules found from one danger bit by reflection.
That there, and not here, an agent acts between the rounds is the difference.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from csrm_jax.augmentation import proposers, requests
from csrm_jax.core import journal as journal_lib
from csrm_jax.safety.schema import Category, Example


@dataclasses.dataclass(frozen=True)
class Round:
  """One proposal: where it fires, and the share of bits that it agrees with."""

  rules: tuple[Category, ...]
  fires: tuple[bool, ...]
  agreement: float


def induce(
  examples: Sequence[Example],
  proposer: proposers.Proposer,
  judge: proposers.Judge,
  journal: journal_lib.Journal,
  progress: proposers.Progress,
  *,
  about: Sequence[object],
  num_rounds: int,
  num_shown: int,
  seed: int,
) -> list[Round]:
  """Returns the rounds, at most `num_rounds`; resumable after each.

  Rounds end where nothing changes or nothing is wrong. A label 'unsafe' is an alarm.

  Args:
    about: What the answers depend on besides, such as names of proposer and judge.
    num_shown: How many conversations the proposer sees at once, those first that the rules are
      wrong about, as many of either kind; 0 shows all.
  """
  talks = [e.conversation for e in examples]
  bits = [e.label == 'unsafe' for e in examples]
  best = Round((), (False,) * len(bits), float(np.mean(np.logical_not(bits))))
  rounds: list[Round] = []
  for number in range(num_rounds):
    shown = _shown(bits, best.fires, num_shown, random.Random(f'{seed}/{number}'))
    request = requests.InduceRules(
      tuple(talks[i] for i in shown), tuple(bits[i] for i in shown), best.rules, number
    )
    key = journal_lib.key([*about, requests.digest(request), talks, bits])
    if key not in journal:
      try:
        rules = tuple(proposer.ask(request))
      except proposers.NoReplyError as error:
        progress(1, [{'event': 'no_reply', 'round': number, 'reason': error.reason}])
        continue
      fired = where(rules, talks, judge)
      journal.put(key, [[dataclasses.asdict(rule) for rule in rules], fired])
    stored, fired = journal[key]
    rules = tuple(Category(**rule) for rule in stored)
    rounds.append(Round(rules, tuple(fired), float(np.mean(np.equal(fired, bits)))))
    progress(1, [{'event': 'round', 'round': number, 'agreement': rounds[-1].agreement}])
    if rules == best.rules or rounds[-1].agreement == 1:
      break
    best = max(best, rounds[-1], key=lambda one: one.agreement)
  return rounds


def where(rules: Sequence[Category], talks: Sequence[tuple], judge: proposers.Judge) -> list[bool]:
  """Returns on which conversations any of the rules fires."""
  asked = list(itertools.product(talks, rules))
  fired = judge([talk for talk, _ in asked], [rule for _, rule in asked])
  return np.reshape(fired, (len(talks), len(rules))).astype(bool).any(1).tolist()


def _shown(bits: Sequence[bool], fires: Sequence[bool], num: int, rng: random.Random) -> list[int]:
  """Returns the places of what is shown: missed and false alarms in turn, then others."""
  order = list(range(len(bits)))
  if not 0 < num < len(order):
    return order
  rng.shuffle(order)

  def some(is_one: Callable[[int], bool]) -> Iterator[int]:
    return (i for i in order if is_one(i))

  missed = some(lambda i: bits[i] and not fires[i])
  false = some(lambda i: fires[i] and not bits[i])
  wrong = [i for pair in itertools.zip_longest(missed, false) for i in pair if i is not None]
  # Half shows what is right: a rule is revised, not turned round.
  right = [i for i in order if bits[i] == fires[i]]
  chosen = wrong[: max(num - len(right), (num + 1) // 2)]
  return sorted([*chosen, *right[: num - len(chosen)]])
