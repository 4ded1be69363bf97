"""A guardrail for any-guardrail (mozilla.ai).

guard = guardrail.make(judges.remote('http://127.0.0.1:8000'), rules)
guard.validate('What should I buy?', 'Shares of Acme.').valid
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from csrm_jax.core import checks
from csrm_jax.integrations.judges import Judge, Messages, Rules


def make(judge: Judge, rules: Rules = None, each_rule: bool = True) -> Any:
  """Returns a guardrail of the package any-guardrail.

  Its validate(input_text, output_text=None, rules=None) judges the reply output_text to input_text,
  or, without it, input_text itself: a reply, or a conversation that ends with one.

  Args:
    rules: What judges calls that bring none; None for the judge's own.
    each_rule: Whether a pass for each rule says which one is violated.
  """
  return _guardrail()(judge, rules, each_rule)


@functools.cache
def _guardrail() -> Any:
  checks.require('any_guardrail', 'a guardrail', 'parity')
  from any_guardrail import base, taxonomy, types

  class Csrm(base.Guardrail):
    """A configurable guardrail, which judges replies under rules in natural language."""

    METADATA = taxonomy.GuardrailMetadata(
      description='A configurable guardrail, which judges replies under rules in natural language.',
      display_name='CSRM',
      categories=frozenset(
        {taxonomy.GuardrailCategory.CONTENT_SAFETY, taxonomy.GuardrailCategory.GENERAL_JUDGE}
      ),
      primary_category=taxonomy.GuardrailCategory.CONTENT_SAFETY,
      stages=frozenset({taxonomy.GuardrailStage.OUTPUT}),
      output_shapes=frozenset(taxonomy.OutputShape),
      backend=taxonomy.BackendType.LOCAL_DECODER,
      alternate_backends=frozenset({taxonomy.BackendType.HOSTED_API}),
      optional_validate_kwargs=frozenset({'output_text', 'rules'}),
      vendor='csrm_jax',
      default_license='apache-2.0',
    )

    def __init__(self, judge: Judge, rules: Rules, each_rule: bool):
      self.model_id, self._judge, self._rules, self._each = 'csrm_jax', judge, rules, each_rule

    def validate(
      self,
      input_text: str | Messages,
      output_text: str | None = None,
      rules: Rules = None,
      **kwargs: Any,
    ) -> Any:
      del kwargs
      start = time.monotonic()
      own = self._rules if rules is None else rules
      (verdict,) = self._judge([_talk(input_text, output_text)], [own], self._each)
      parts = [
        types.CategoryResult(name=name, score=p, triggered=p >= 0.5)
        for name, p in verdict.each_rule.items()
      ]
      result = types.GuardrailOutput(
        valid=not verdict.flagged,
        score=verdict.p_unsafe,
        categories=parts,
        extra={'score_nats': verdict.score, 'reward': verdict.reward, 'unread': verdict.unread},
      )
      self._stamp_usage(result, 1000 * (time.monotonic() - start))
      return result

  return Csrm


def _talk(input_text: str | Messages, output_text: str | None) -> Sequence[Any]:
  if output_text is not None:
    asked = [{'role': 'user', 'content': input_text}]
    history = asked if isinstance(input_text, str) else list(input_text)
    return [*history, {'role': 'assistant', 'content': output_text}]
  if isinstance(input_text, str):
    return [{'role': 'assistant', 'content': input_text}]
  return input_text
