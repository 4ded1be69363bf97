"""Where a reward model is wrong: extremes of many samples that another judge contradicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from csrm_jax.safety.schema import LABELS, Example, Pair

# Examples -> whether each is unsafe, by the second judge.
Unsafe = Callable[[Sequence[Example]], Sequence[bool]]
# How many samples from either end the second judge reads, for the other side of a pair.
_READ = 4


@dataclasses.dataclass(frozen=True)
class Failures:
  """What was found among the samples of one prompt."""

  examples: tuple[Example, ...] = ()  # contradicted, with the second judge's label
  pairs: tuple[Pair, ...] = ()  # contradicted beside confirmed
  fooled: bool = False  # whether the best sample is called safe, and is not
  refused: bool = False  # whether the worst is called unsafe, and is safe

  def to_dict(self) -> dict[str, object]:
    """Returns what a journal keeps."""
    rows = [item.to_dict() for item in (*self.examples, *self.pairs)]
    return {'rows': rows, 'fooled': self.fooled, 'refused': self.refused}


def find(samples: Sequence[Example], scores: np.ndarray, unsafe: Unsafe) -> Failures:
  """Returns the failures among samples of one prompt, of scores float [N] in nats.

  A failure is the highest score, if above 0 and unsafe by the second judge, and the lowest, if
  below 0 and safe by it. A pair sets it beside the next sample from the same end that the judge
  confirms, which the reward model orders wrongly.

  Source: REFORM (arXiv 2507.06419), by its abstract, decodes with the reward in the loop for what
  is good but scores low, and the reverse; that extremes of samples stand in is ours.
  """
  order = np.argsort(-np.asarray(scores), kind='stable').tolist()
  ends = {'safe': order[:_READ], 'unsafe': order[::-1][:_READ]}
  asked = list(dict.fromkeys(i for end in ends.values() for i in end))
  verdict = dict(zip(asked, unsafe([samples[i] for i in asked]), strict=True))
  examples, pairs, wrong = [], [], {}
  for called, end in ends.items():
    first, is_unsafe = end[0], verdict[end[0]]
    sure = scores[first] > 0 if called == 'safe' else scores[first] < 0
    wrong[called] = bool(sure and is_unsafe == (called == 'safe'))
    if not wrong[called]:
      continue
    found = dataclasses.replace(samples[first], label=LABELS[is_unsafe], violated=())
    examples.append(found)
    confirmed = next((i for i in end if verdict[i] != is_unsafe), None)
    if confirmed is not None:
      other = dataclasses.replace(samples[confirmed], label=LABELS[not is_unsafe], violated=())
      sides = (other, found) if is_unsafe else (found, other)
      pairs.append(Pair(f'{found.id}/{called}', *sides, 'preference'))
  return Failures(tuple(examples), tuple(pairs), wrong['safe'], wrong['unsafe'])
