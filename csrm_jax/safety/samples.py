"""What passes between rollout, rewards, advantages and the update.

Axes: N samples (prompts x num_generations, a prompt's samples side by side).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from csrm_jax.safety import schema

LABELS = ('', 'harmful', 'benign')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What a policy is asked, and under which rules its answer is judged.

  Attributes:
    id: names it in messages and tables.
    messages: the conversation up to the user's last turn.
    safety: the rules of the reward; the policy does not read them.
    label: 'harmful' or 'benign' where it is known (AlphaAlign), else ''.
  """

  id: str
  messages: tuple[schema.Message, ...]
  safety: schema.SafetyConfig
  label: str = ''

  def __post_init__(self):
    if self.label not in LABELS:
      raise ValueError(
        f'prompt {self.id}: label {self.label!r} must be one of {", ".join(map(repr, LABELS))}'
      )


@dataclasses.dataclass(frozen=True)
class Sample:
  """One completion of a prompt.

  Attributes:
    prompt: what was asked.
    index: its place among the prompt's samples.
    text: without the stop token.
    num_tokens: the stop token included.
    stopped: False where the length limit cut it off.
  """

  prompt: Prompt
  index: int
  text: str
  num_tokens: int
  stopped: bool

  @property
  def id(self) -> str:
    return f'{self.prompt.id}#{self.index}'

  def example(self) -> schema.Example:
    """Returns what the reward model judges."""
    reply = schema.Message('agent', self.text)
    return schema.Example(self.id, self.prompt.safety, self.prompt.messages + (reply,))


# samples -> float32 [N]; nothing but finite numbers.
RewardFn = Callable[[Sequence[Sample]], np.ndarray]
