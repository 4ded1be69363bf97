"""A scorer for inspect_ai (UK AISI).

Task(dataset=..., solver=generate(), scorer=inspect.compliance(judge)), with a judge of judges.
"""

from __future__ import annotations

import asyncio
from typing import Any

from csrm_jax.core import checks
from csrm_jax.integrations.judges import Judge


def compliance(judge: Judge, each_rule: bool = False) -> Any:
  """Returns a scorer: the probability that the last reply complies with the rules.

  Rules are the judge's own, or a sample's, under "safety" in its metadata.
  """
  package = checks.require('inspect_ai.scorer', 'a scorer of inspect_ai', 'inspect')

  @package.scorer(metrics=[package.mean(), package.stderr()], name='csrm_compliance')
  def csrm_compliance() -> Any:
    async def score(state: Any, target: Any) -> Any:
      del target
      talk = [_plain(message) for message in state.messages]
      rules = (state.metadata or {}).get('safety')
      (verdict,) = await asyncio.to_thread(judge, [talk], [rules], each_rule)
      about: dict[str, Any] = {'score_nats': verdict.score, 'flagged': verdict.flagged}
      about['unread'] = verdict.unread
      if verdict.each_rule:
        about['each_rule'] = verdict.each_rule
      return package.Score(value=verdict.reward, answer=state.output.completion, metadata=about)

    return score

  return csrm_compliance()


def _plain(message: Any) -> dict[str, Any]:
  """Returns a message of inspect's as chat APIs have it; tool calls are kept."""
  calls = [
    {'name': call.function, 'arguments': call.arguments}
    for call in getattr(message, 'tool_calls', None) or ()
  ]
  return {'role': message.role, 'content': message.text} | ({'tool_calls': calls} if calls else {})
