"""What RuleWorld generates for training and evaluation."""

from __future__ import annotations

import functools
from typing import Any

from csrm_jax.ruleworld import examples

# What a reward model is trained on: source -> make(seed, index).
TRAINING = {
  'ruleworld/taxonomies': examples.training_example,
  'ruleworld/strictness': examples.strictness_pair,
  'ruleworld/preference': examples.preference_pair,
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
