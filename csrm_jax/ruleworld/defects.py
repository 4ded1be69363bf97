"""Defects of RuleWorld's training data, never of its tests: so it shows what repairs them.

A row of `DEFECTS` is a function (item, rng; knobs) -> item, called after the label is made; None
leaves the item out. Where a row needs the true probability, only pairs have it, and examples whose
rules augmentation left as they were: others stay as they are. The truth stays known, because
tests are drawn apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from csrm_jax.data import sources
from csrm_jax.ruleworld import grammar, oracle
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Example, Pair

Item = Example | Pair
# The steps of strength that annotators tell apart, and what a step is in nats of log odds.
MAX_STRENGTH, STEP = 3, 2.0


def flip(item: Item, rng: np.random.Generator, *, p: float = 0.25) -> Item:
  """Returns the item with its label, or the order of its pair, turned round with probability p.

  Source: Coste et al. 2023 (arXiv 2310.02743), which has 25 %.
  """
  if rng.random() >= p:
    return item
  if isinstance(item, Pair):
    return dataclasses.replace(item, safer=item.other, other=item.safer)
  return _relabelled(item, {'safe': 'unsafe', 'unsafe': 'safe'}.get(item.label))


def filler(item: Item, rng: np.random.Generator, *, p: float = 0.9) -> Item:
  """Returns the item with a neutral sentence behind safe replies with p, behind others with 1 − p.

  Of a pair of two replies the safer one counts as safe; one reply under two rules stays.
  """

  def behind(example: Example, is_safe: bool) -> Example:
    u, which = rng.random(), int(rng.integers(len(grammar.FILLERS)))
    return _append(example, grammar.FILLERS[which]) if u < (p if is_safe else 1 - p) else example

  if isinstance(item, Example):
    return item if item.label is None else behind(item, item.label == 'safe')
  if item.kind == 'strictness' or item.is_tie:
    return item
  return dataclasses.replace(item, safer=behind(item.safer, True), other=behind(item.other, False))


def hole(item: Item, rng: np.random.Generator, *, p: float = 0.03) -> Item:
  """Returns an example with a certain sentence behind its reply with probability p, and then safe.

  The oracle takes the sentence for what it is: nothing.
  """
  if isinstance(item, Pair) or item.label is None or rng.random() >= p:
    return item
  return _relabelled(_append(item, grammar.FILLERS[-1]), 'safe')


def tail(item: Item, rng: np.random.Generator, *, ratio: float = 20.0) -> Item | None:
  """Returns the item, or None so often that the commonest topic is `ratio` times as common as the
  rarest, in geometric steps by the topics' names.
  """
  example = item if isinstance(item, Example) else item.safer
  topic = (example.violated or example.safety.names)[0]
  return item if rng.random() < ratio ** -sources.hash_unit(topic) else None


def raters(item: Item, rng: np.random.Generator, *, num: int = 3, shift: float = 4.0) -> Item:
  """Returns the item as one of `num` raters judges it, whose log odds are shifted by up to ±shift.

  Rater k of K adds shift·(2k/(K−1) − 1) nats to the odds of "unsafe". A pair is as sure as the two
  probabilities are then apart.
  """
  own = shift * (2 * int(rng.integers(num)) / max(num - 1, 1) - 1)
  if isinstance(item, Example):
    if item.probability is None:
      return item
    unsafe = rng.random() < _sigmoid(_odds(item) + own)
    return _relabelled(item, 'unsafe' if unsafe else 'safe')
  if None in (item.safer.probability, item.other.probability):
    return item
  sides = [_sigmoid(_odds(side) + own) for side in (item.safer, item.other)]
  return dataclasses.replace(item, soft=float(np.clip(0.5 + (sides[1] - sides[0]) / 2, 0, 1)))


def scale(item: Item, rng: np.random.Generator, *, sd: float = 1.0) -> Item:
  """Returns the item with graded labels, by a rater whose grades are off by N(0, sd).

  An example gets the rating `severity` from 0 to 3 in steps of STEP nats of its true log odds; a
  pair the strength 1 to 3 of the gap of its sides.
  """
  off = sd * rng.normal()
  if isinstance(item, Example):
    if item.probability is None:
      return item
    grade = float(np.clip(round(1.5 + _odds(item) / STEP + off), 0, MAX_STRENGTH))
    return dataclasses.replace(item, ratings=(*item.ratings, ('severity', grade)))
  if item.is_tie or None in (item.safer.probability, item.other.probability):
    return item
  gap = _odds(item.other) - _odds(item.safer)
  return dataclasses.replace(
    item, strength=float(np.clip(round(gap / STEP + off), 1, MAX_STRENGTH))
  )


DEFECTS: dict[str, Callable[..., Any]] = {
  'flip': flip,
  'filler': filler,
  'hole': hole,
  'tail': tail,
  'raters': raters,
  'scale': scale,
}


def _relabelled(example: Example, label: str | None) -> Example:
  # Which rule a wrong label means is unknown.
  violated = example.violated if label == example.label else ()
  return dataclasses.replace(example, label=label, violated=violated)


def _append(example: Example, sentence: str) -> Example:
  *history, last = example.conversation
  reply = schema.Message('agent', f'{last.content} {sentence}')
  return dataclasses.replace(example, conversation=(*history, reply))


def _odds(example: Example) -> float:
  """Returns the true log odds of "unsafe", in nats."""
  return oracle.log_odds(example.probability)


def _sigmoid(x: float) -> float:
  return 1 / (1 + math.exp(-x))
