"""The dual reward of AlphaAlign: safety for all prompts, help for benign ones.

Harmful prompt: R_s = r_f V_f + r_a V_r. Benign prompt: R_s = r_f V_f - r_a V_r,
plus R_h = max(standardised helpfulness, 0) where the answer is no refusal. The
helpfulness is standardised among the samples of one prompt.

Source: AlphaAlign (arXiv 2507.14987).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from csrm_jax.rl import rewards, verifiers
from csrm_jax.safety.schema import RewardFn, Sample

# What becomes of the helpfulness: standardised within the prompt's group;
# as it is (the ablation without standardisation); or left out, so that R_s is
# all (AlphaAlign-Zero, the ablation without R_h).
HELPFULNESS = ('standardised', 'raw', 'none')


def dual_reward(
  refusal_fn: verifiers.RefusalFn,
  helpfulness_fn: RewardFn | None,
  helpfulness: str = 'standardised',
  format_weight: float = 1.0,
  answer_weight: float = 1.0,
) -> rewards.TotalFn:
  """Returns a function: samples -> (total, parts), as `rewards.combine` does.

  Parts are 'format' (V_f), 'refusal' (V_r), 'safety' (R_s), and 'helpfulness'
  (R_h; 0 for harmful prompts) unless it is left out. Refusal and helpfulness
  are judged by the answer alone, helpfulness by what is in its box. All samples
  of a prompt must be in one call.

  Args:
    refusal_fn: V_r.
    helpfulness_fn: judges the answers to benign prompts; None with 'none'.
    helpfulness: one of HELPFULNESS.
    format_weight: r_f.
    answer_weight: r_a.

  Raises:
    ValueError: settings that do not fit together; from the function: a prompt
      without a label, or the only sample of its prompt.
  """
  _check(helpfulness_fn, helpfulness, format_weight, answer_weight)

  def score(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    benign = np.array([_is_benign(s) for s in samples], bool)
    answers = [dataclasses.replace(s, text=verifiers.answer_of(s.text)) for s in samples]
    form = rewards.format_reward(samples)
    refuses = np.asarray(refusal_fn(answers))
    if refuses.shape != benign.shape or refuses.dtype != bool:
      raise ValueError(
        f'V_r gives {refuses.dtype} {list(refuses.shape)} for {len(samples)} '
        'samples; it must give one bool each'
      )
    refusal = refuses.astype(np.float32)
    safety = np.float32(format_weight) * form + np.float32(answer_weight) * np.where(
      benign, -refusal, refusal
    )
    parts = {'format': form, 'refusal': refusal, 'safety': safety}
    if helpfulness == 'none':
      return safety, parts
    chosen = np.flatnonzero(benign)
    asked = [
      dataclasses.replace(answers[i], text=verifiers.unboxed(answers[i].text)) for i in chosen
    ]
    help_ = rewards.check_rewards(helpfulness_fn(asked), asked, 'helpfulness')
    if helpfulness == 'standardised':
      help_ = np.maximum(standardise(help_, asked), 0)
    parts['helpfulness'] = np.zeros(len(samples), np.float32)
    parts['helpfulness'][chosen] = help_ * (1 - refusal[chosen])
    return safety + parts['helpfulness'], parts

  return score


def standardise(values: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
  """Returns (value - mean) / std within each prompt's samples, float32 [N].

  0 where all values of a group are equal.

  Raises:
    ValueError: a prompt has one sample only.
  """
  values = np.asarray(values, np.float64)
  result = np.zeros(len(samples), np.float32)
  groups = collections.defaultdict(list)
  for row, sample in enumerate(samples):
    groups[sample.prompt.id].append(row)
  for name, rows in groups.items():
    if len(rows) == 1:
      raise ValueError(
        f'prompt {name} has one sample, and nothing to standardise its '
        'helpfulness with; set num_generations to 2 or more'
      )
    group = values[rows]
    if np.ptp(group) > 0:
      result[rows] = (group - group.mean()) / group.std()
  return result


def _is_benign(sample: Sample) -> bool:
  if not sample.prompt.label:
    raise ValueError(
      f'prompt {sample.prompt.id} has no label; AlphaAlign needs "harmful" '
      'or "benign" on every prompt'
    )
  return sample.prompt.label == 'benign'


def _check(helpfulness_fn, helpfulness, format_weight, answer_weight) -> None:
  if helpfulness not in HELPFULNESS:
    raise ValueError(f'unknown helpfulness {helpfulness!r}; use one of {", ".join(HELPFULNESS)}')
  if (helpfulness == 'none') != (helpfulness_fn is None):
    raise ValueError(
      f'helpfulness is {helpfulness!r}, and '
      + ('there is no' if helpfulness_fn is None else 'there is a')
      + ' helpfulness reward; give one, or "none" without'
    )
  for name, weight in (('format', format_weight), ('answer', answer_weight)):
    if not (math.isfinite(weight) and weight > 0):
      raise ValueError(f'the {name} weight of AlphaAlign is {weight}; it must be above 0')
