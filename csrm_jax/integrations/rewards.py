"""A reward function as TRL and Tunix call it.

reward = rewards.make(judges.remote('http://127.0.0.1:8000', 'bank_support'))
trl.GRPOTrainer(model=..., reward_funcs=reward, ...)
tunix.GRPOLearner(rl_cluster=..., reward_fns=reward, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from csrm_jax.core import checks
from csrm_jax.integrations.judges import Judge, Messages
from csrm_jax.serve import wire

# What a reward is: P(safe), or its log odds, which tell very safe from safe.
VALUES = ('reward', 'score')


def make(judge: Judge, value: str = VALUES[0], rules_column: str = 'safety') -> Callable[..., Any]:
  """Returns a function: (prompts, completions, **columns) -> one finite number for each.

  Prompts and completions are messages, or texts; marks of a known chat template in a prompt's text
  are read as turns. Rules are the judge's own, or each row's, where the data set has the column.
  TRL logs the mean share of tokens that was not read, as csrm/unread.

  Args:
    value: One of VALUES.
    rules_column: The column with each row's rules, or for a server its policy.
  """
  checks.one_of('value', value, VALUES)

  def csrm(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    if len(prompts) != len(completions):
      raise ValueError(f'{len(prompts)} prompts for {len(completions)} completions')
    talks = [
      conversation(prompt, completion)
      for prompt, completion in zip(prompts, completions, strict=True)
    ]
    verdicts = judge(talks, columns.get(rules_column))
    if verdicts and callable(log := columns.get('log_metric')):  # TRL's
      log('csrm/unread', sum(v.unread for v in verdicts) / len(verdicts))
    return [getattr(v, value) for v in verdicts]

  return csrm


def conversation(prompt: Any, completion: Any) -> Messages:
  """Returns prompt and completion as messages; each is text or messages."""
  try:
    history = wire.history(prompt, 0)
  except wire.RequestError as error:
    raise ValueError(str(error)) from None
  if isinstance(completion, str):
    return [*history, {'role': 'assistant', 'content': wire.without_end(completion)}]
  if not isinstance(completion, Sequence) or not all(isinstance(m, Mapping) for m in completion):
    raise ValueError(f'a completion is {checks.show(completion)}; it must be text or messages')
  # What comes before the last turn of a completion, such as tool calls, is history.
  return [*history, *completion]


def split(query: str, prompt: str | None) -> Messages:
  """Returns the messages of a text in which a policy continued its prompt."""
  try:
    return wire.split_query(query, prompt, 'the query')
  except wire.RequestError as error:
    raise ValueError(str(error)) from None
