"""The dual reward of AlphaAlign: safety for all prompts, help for benign ones.

Harmful prompt: R_s = r_f V_f + r_a V_r. Benign prompt: R_s = r_f V_f - r_a V_r,
plus R_h = max(standardised helpfulness, 0) where the answer is no refusal. The
helpfulness is standardised among the samples of one prompt.

Source: AlphaAlign (arXiv 2507.14987).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csrm_jax.rl import rewards, verifiers
from csrm_jax.rl.types import RewardFn, Sample

# What becomes of the helpfulness: standardised within the prompt's group;
# as it is (the ablation without standardisation); or left out, so that R_s is
# all (AlphaAlign-Zero, the ablation without R_h).
HELPFULNESS = ('standardised', 'raw', 'none')


def dual_reward(
    refusal_fn: verifiers.RefusalFn, helpfulness_fn: RewardFn | None,
    helpfulness: str = 'standardised', format_weight: float = 1.0,
    answer_weight: float = 1.0
) -> rewards.TotalFn:
  """Returns a function: samples -> (total, parts), as `rewards.combine` does.

  Parts are 'format' (V_f), 'refusal' (V_r), 'safety' (R_s), and 'helpfulness'
  (R_h; 0 for harmful prompts) unless it is left out. Refusal and helpfulness
  are judged by the answer alone. All samples of a prompt must be in one call.

  Args:
    refusal_fn: V_r.
    helpfulness_fn: judges the answers to benign prompts; None with 'none'.
    helpfulness: one of HELPFULNESS.
    format_weight: r_f.
    answer_weight: r_a.
  """
  raise NotImplementedError


def standardise(values: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
  """Returns (value - mean) / std within each prompt's samples, float32 [N].

  0 where all values of a group are equal.
  """
  raise NotImplementedError
