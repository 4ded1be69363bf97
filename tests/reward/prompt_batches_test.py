import numpy as np
import pytest

from csrm_jax.models import transformer
from csrm_jax.reward import scoring

LENGTHS = [64, 128, 256, 512]


def _prompts(num, shared, sizes, seed=0):
  """Returns prompts that begin with the same `shared` tokens, and no more."""
  rng = np.random.default_rng(seed)
  head = rng.integers(0, 9, shared)
  return [
    np.concatenate([head, [9 + i], rng.integers(0, 9, size - 1)])
    for i, size in zip(range(num), sizes, strict=False)
  ]


def _check(groups, prompts):
  """Asserts that batches hold each prompt once, and all that is shared."""
  held = [i for group in groups for part, _ in group.batches for i in part]
  assert sorted(held) == list(range(len(prompts)))
  for group in groups:
    assert group.num_shared <= group.prefix_length
    for part, (rows, length) in group.batches:
      assert len(part) <= rows
      for i in part:
        assert 0 < len(prompts[i]) - group.num_shared <= length
        np.testing.assert_array_equal(
          prompts[i][: group.num_shared], prompts[part[0]][: group.num_shared]
        )


def test_a_long_common_beginning_is_shared():
  prompts = _prompts(40, 150, [30, 50, 20, 60] * 10)
  groups = scoring.make_groups(prompts, ['a'] * 40, LENGTHS, 1024)
  _check(groups, prompts)
  assert [g.num_shared for g in groups] == [150]
  assert groups[0].prefix_length == 256
  assert {shape for _, shape in groups[0].batches} == {(16, 64), (8, 64)}
  assert groups[0].num_tokens == 256 + 40 * 64


@pytest.mark.parametrize(
  ('prompts', 'keys', 'window'),
  [
    (_prompts(40, 10, [100] * 40), 'a' * 40, 0),  # short
    (_prompts(4, 150, [30] * 4), 'aaaa', 0),  # few
    (_prompts(40, 150, [30] * 40), range(40), 0),  # nothing says that they do
    (_prompts(40, 150, [30] * 40), 'a' * 40, 300),  # the window counts padding
    (_prompts(40, 120, [130] * 40), 'a' * 40, 319),
  ],
)
def test_what_does_not_pay_is_not_shared(prompts, keys, window):
  groups = scoring.make_groups(prompts, list(keys), LENGTHS, 1024, window)
  _check(groups, prompts)
  assert [g.num_shared for g in groups] == [0]


def test_groups_are_apart_and_the_rest_is_together():
  prompts = [
    *_prompts(40, 150, [30] * 40),
    *_prompts(40, 200, [9] * 40, 1),
    *_prompts(3, 200, [9] * 3, 2),
    *_prompts(1, 20, [5], 3),
  ]
  keys = ['a'] * 40 + ['b'] * 40 + ['c'] * 3 + ['d']
  order = np.random.default_rng(0).permutation(len(prompts))
  prompts, keys = [prompts[i] for i in order], [keys[i] for i in order]
  groups = scoring.make_groups(prompts, keys, LENGTHS, 1024)
  _check(groups, prompts)
  assert sorted(g.num_shared for g in groups) == [0, 150, 200]
  plain = scoring.make_groups(prompts, range(len(keys)), LENGTHS, 1024)
  total = sum(g.num_tokens for g in groups)
  assert total < 0.5 * plain[0].num_tokens


def test_no_prompts_no_groups():
  assert scoring.make_groups([], [], LENGTHS, 1024) == []


def test_pad_leaves_out_what_is_shared():
  batch = scoring.pad([np.arange(9), np.arange(6)], (4, 8), 4)
  np.testing.assert_array_equal(
    batch['tokens'][:2], [[4, 5, 6, 7, 8, 0, 0, 0], [4, 5, 0, 0, 0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(batch['positions'][:2], batch['tokens'][:2])
  np.testing.assert_array_equal(batch['segment_ids'].sum(1), [5, 2, 0, 0])
  np.testing.assert_array_equal(batch['verdict_index'][:, 0], [4, 1, 0, 0])


def test_num_common():
  assert transformer.num_common([[1, 2, 3], [1, 2, 4, 5]]) == 2
  assert transformer.num_common([[1, 2, 3], [1, 2, 3]]) == 2  # not the last
  assert transformer.num_common([[1, 2, 3], [1, 2, 3, 4]]) == 2
  assert transformer.num_common([[1, 2], [3, 2]]) == 0
  assert transformer.num_common([[5], [5, 6]]) == 0
