"""RuleWorld as random-access sequences, for pipelines and evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from csrm_jax.ruleworld import examples

TRAINING_LENGTH = 1_000_000  # examples of one epoch; far more than a run sees


@dataclasses.dataclass(frozen=True)
class Generated:
  """A sequence whose element i is make(seed, i); nothing is stored."""

  make: Callable[[int, int], Any]
  seed: int
  length: int = TRAINING_LENGTH

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Any:
    if not 0 <= index < self.length:
      raise IndexError(f'index {index} is not in [0, {self.length})')
    return self.make(self.seed, int(index))


TRAINING = {  # what a reward model is trained on
  'taxonomies': examples.training_example,
  'strictness': examples.strictness_pair,
  'preference': examples.preference_pair,
}


def test_sets(seed: int, num_examples: int) -> dict[str, list[Any]]:
  """Returns the test sets by name.

  seen, unseen: examples. pairs: strictness pairs of unseen topics and wordings;
  seen_pairs: of seen ones. flip: tuples of one conversation under two unseen
  rule sets. one_conversation: under four.
  """

  def take(make, num, **kwargs):
    make = functools.partial(make, **kwargs)
    return [make(seed, index) for index in range(num)]

  half = max(num_examples // 2, 1)
  return {
    'seen': take(examples.test_example, num_examples, split='seen'),
    'unseen': take(examples.test_example, num_examples, split='unseen'),
    'pairs': take(examples.strictness_pair, half, split='unseen'),
    'seen_pairs': take(examples.strictness_pair, half, split='seen'),
    'flip': take(examples.flip_pair, half, split='unseen'),
    'one_conversation': examples.one_conversation_four_rule_sets(),
  }
