"""The dual reward of AlphaAlign, and its ablations."""

import numpy as np
import pytest

from csrm_jax.rl import rewards, verifiers
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Prompt, Sample

RULES = schema.SafetyConfig((schema.Category('Cats', 'No cats.'),))
NO, YES = 'I cannot help.', 'Do it so.'


def sample(label, index, answer, *, formed=True, name=''):
  prompt = Prompt(name or label, (schema.Message('user', 'Hello.'),), RULES, label)
  text = (
    f'<safety_reasoning>I cannot say.</safety_reasoning><answer>{answer}</answer>'
    if formed
    else answer
  )
  return Sample(prompt, index, text, 9, True)


GROUPS = [
  sample('harmful', 0, NO),
  sample('harmful', 1, YES),
  sample('harmful', 2, NO, formed=False),
  sample('benign', 0, NO),
  sample('benign', 1, YES + ' A.'),
  sample('benign', 2, YES + ' B.', formed=False),
  sample('benign', 3, rf'\boxed{{{YES} C.}}'),
]
# Of the answers alone, out of their boxes.
HELP = {NO: 5.0, YES + ' A.': 1.5, YES + ' B.': 2.5, YES + ' C.': 4.0}


def helpfulness(samples):
  return np.array([HELP[s.text] for s in samples], np.float32)


def dual_reward(
  refusal_fn, helpfulness_fn, kind='standardised', format_weight=1.0, answer_weight=1.0
):
  return rewards.dual_reward(refusal_fn, helpfulness_fn, kind, format_weight, answer_weight)


def score(samples=GROUPS, kind='standardised', **kwargs):
  fn = None if kind == 'none' else helpfulness
  return dual_reward(verifiers.REFUSALS['patterns'], fn, kind, **kwargs)(samples)


def test_the_dual_reward_by_hand():
  total, parts = score(format_weight=0.5, answer_weight=2.0)
  assert parts['format'].tolist() == [1, 1, 0, 1, 1, 0, 1]
  assert parts['refusal'].tolist() == [1, 0, 1, 1, 0, 0, 0]
  safety = [2.5, 0.5, 2.0, -1.5, 0.5, 0.0, 0.5]
  np.testing.assert_allclose(parts['safety'], safety)
  # Refusals are in the group that is standardised, and get nothing of it.
  values = np.array([5.0, 1.5, 2.5, 4.0])
  z = (values - values.mean()) / values.std()
  help_ = [0, 0, 0, 0, 0, 0, z[3]]
  np.testing.assert_allclose(parts['helpfulness'], help_, rtol=1e-6)
  np.testing.assert_allclose(total, np.add(safety, help_), rtol=1e-6)
  assert {v.dtype for v in [total, *parts.values()]} == {np.dtype('float32')}


def test_the_ablations():
  total, parts = score(kind='none')
  assert 'helpfulness' not in parts
  assert total.tolist() == parts['safety'].tolist()
  total, parts = score(kind='raw')
  assert parts['helpfulness'].tolist() == [0, 0, 0, 0, 1.5, 2.5, 4.0]


def test_a_batch_without_benign_prompts():
  total, parts = score(GROUPS[:3])
  assert total.tolist() == [2, 1, 1]
  assert parts['helpfulness'].tolist() == [0, 0, 0]


def test_groups_are_standardised_apart_and_equal_ones_to_zero():
  samples = [sample('benign', i, YES, name=name) for name in 'ab' for i in range(3)]
  values = rewards.standardise(np.array([1, 2, 3, 0.1, 0.1, 0.1], np.float32), samples)
  np.testing.assert_allclose(values, [-(1.5**0.5), 0, 1.5**0.5, 0, 0, 0], rtol=1e-6)


def test_bad_input_is_one_line():
  with pytest.raises(ValueError, match='benign has one sample'):
    score(GROUPS[-1:])
  unlabelled = sample('', 0, YES, name='p7')
  with pytest.raises(ValueError, match='p7 has no label'):
    score([unlabelled])
  patterns = verifiers.REFUSALS['patterns']
  with pytest.raises(ValueError, match='standardised, raw, none'):
    dual_reward(patterns, helpfulness, 'scaled')
  with pytest.raises(ValueError, match='there is a helpfulness'):
    dual_reward(patterns, helpfulness, 'none')
  with pytest.raises(ValueError, match='there is no helpfulness'):
    dual_reward(patterns, None)
  with pytest.raises(ValueError, match='answer weight of AlphaAlign is 0'):
    dual_reward(patterns, helpfulness, answer_weight=0)
  with pytest.raises(ValueError, match='benign#1: reward helpfulness is nan'):
    dual_reward(patterns, rewards.from_callable(lambda s: [1.0, np.nan, 1.0, 1.0], 'helpfulness'))(
      GROUPS
    )
  with pytest.raises(ValueError, match='one bool each'):
    dual_reward(lambda s: np.zeros(7), None, 'none')(GROUPS)
