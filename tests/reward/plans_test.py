import numpy as np
import pytest

from csrm_jax.data import sharing
from csrm_jax.reward import plans

COSTS = plans.Costs(keys=3000, program=500, call_tokens=1024)


def _draw(num, seed=0):
  return np.random.default_rng(seed).integers(0, 9, num, np.int32)


def _prompts(num, shared, sizes, seed=0):
  """Returns prompts that begin with the same `shared` tokens, and no more."""
  head = _draw(shared, seed)
  rng = np.random.default_rng(seed)
  return [
    np.concatenate([head, [9 + i], rng.integers(0, 9, size - 1)]).astype(np.int32)
    for i, size in zip(range(num), sizes, strict=False)
  ]


def _check(parts, prompts):
  """Asserts that the rows hold each prompt once, behind what is read before; returns the fill."""
  held = [i for part in parts for i in part.prompts]
  assert sorted(held) == list(range(len(prompts)))
  tokens = places = 0
  for part in parts:
    assert part.num_shared <= part.shape[2] and bool(part.num_shared) == bool(part.shape[2])
    for i in part.prompts:
      assert len(prompts[i]) > part.num_shared
      first = prompts[part.prompts[0]][: part.num_shared]
      np.testing.assert_array_equal(prompts[i][: part.num_shared], first)
    for rows, shape in part.calls():
      batch = plans.make_batch(prompts, rows, shape, part.num_shared)
      assert batch['tokens'].shape == shape[:2]
      tokens += np.count_nonzero(batch['segment_ids'])
      places += batch['tokens'].size
      for r, row in enumerate(rows):
        for slot, i in enumerate(row):
          last = batch['verdict_index'][r, slot]
          # All that a verdict sees is its prompt.
          seen = np.arange(last + 1)[batch['ends'][r, : last + 1] > last]
          np.testing.assert_array_equal(batch['tokens'][r, seen], prompts[i][part.num_shared :])
          wanted = np.arange(part.num_shared, len(prompts[i]))
          np.testing.assert_array_equal(batch['positions'][r, seen], wanted)
  return tokens / places


def _sizes(num, seed=0):
  return np.random.default_rng(seed).integers(40, 400, num)


def test_rows_are_filled():
  prompts = _prompts(300, 0, _sizes(300))
  parts = plans.make_plan(prompts, COSTS)
  assert _check(parts, prompts) > 0.95
  assert len({shape for part in parts for _, shape in part.calls()}) <= 4


def test_eleven_prompts_of_one_length_are_not_padded_to_a_power_of_two():
  prompts = _prompts(11, 0, [410] * 11)
  parts = plans.make_plan(prompts, COSTS)
  assert _check(parts, prompts) > 0.8


def test_what_all_rows_begin_with_is_read_once():
  prompts = _prompts(200, 300, _sizes(200))
  (part,) = plans.make_plan(prompts, COSTS)
  assert part.num_shared == 300 and part.shape[2] == 384
  assert _check([part], prompts) > 0.95
  assert part.num_places < 1.06 * sharing.num_read(prompts)


def test_a_row_reads_once_what_its_prompts_share():
  prompts = _prompts(6, 300, [100] * 6)
  (part,) = plans.make_plan(prompts, COSTS)
  assert part.num_shared == 0 and len(part.rows) == 1
  assert part.num_places < 1.2 * sharing.num_read(prompts)
  _check([part], prompts)


def test_every_kind_of_tree():
  """Groups within groups, single prompts, equal ones, and ones that begin others."""
  rng = np.random.default_rng(1)
  prompts = [
    *_prompts(60, 300, _sizes(60, 1)),
    *_prompts(90, 500, _sizes(90, 2), seed=3),
    *(np.concatenate([_draw(200, 3), p]) for p in _prompts(50, 100, _sizes(50), seed=4)),
    *_prompts(20, 0, _sizes(20, 5), seed=6),
  ]
  prompts += [prompts[0], prompts[0][:-30], prompts[70][:510]]
  prompts = [prompts[i] for i in rng.permutation(len(prompts))]
  for program in (0, 500, 10**6):
    parts = plans.make_plan(prompts, COSTS._replace(program=program))
    assert _check(parts, prompts) > 0.9
    read = sum(part.num_places for part in parts)
    assert read < 0.75 * sum(map(len, prompts))
    # Groups are read apart where programs are cheap.
    assert (len([part for part in parts if part.num_shared]) > 1) == (program < 10**6)


def test_known_shapes_are_used_again():
  prompts = _prompts(100, 300, _sizes(100))
  known = {shape for part in plans.make_plan(prompts, COSTS) for _, shape in part.calls()}
  again = plans.make_plan(
    _prompts(7, 0, [50] * 7), COSTS._replace(program=10**5), known | {(1, 704, 0)}
  )
  assert [part.shape for part in again] == [(1, 704, 0)]


def test_a_single_long_prompt_has_a_row_of_its_own_length():
  prompts = [*_prompts(40, 0, [100] * 40), _draw(5000)]
  parts = plans.make_plan(prompts, COSTS)
  _check(parts, prompts)
  assert sorted(part.shape[1] for part in parts)[1] in (5120, 5632)
  assert sum(part.num_places for part in parts) < 10_500


def test_a_device_that_takes_many_tokens_gets_few_calls():
  prompts = _prompts(300, 0, _sizes(300))
  parts = plans.make_plan(prompts, COSTS._replace(call_tokens=16384))
  assert _check(parts, prompts) > 0.85
  assert sum(1 for part in parts for _ in part.calls()) <= 7


@pytest.mark.parametrize('length', [1, 63, 64, 65, 500, 513, 1000, 5000, 40_000])
def test_lengths_of_rows(length):
  rounded = plans.round_up(length)
  assert length <= rounded <= max(64, 1.13 * length + 64)
  assert plans.round_up(rounded) == rounded


def test_nothing_to_plan():
  assert plans.make_plan([], COSTS) == []


def test_batch_of_a_row():
  prompts = [np.array(p, np.int32) for p in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7])]
  batch = plans.make_batch(prompts, [[0, 1, 2]], (2, 192, 1), 1)
  np.testing.assert_array_equal(batch['tokens'][0, :5], [6, 7, 8, 9, 0])
  np.testing.assert_array_equal(batch['positions'][0, :5], [1, 2, 3, 2, 0])
  np.testing.assert_array_equal(batch['ends'][0, :5], [4, 3, 3, 4, 0])
  np.testing.assert_array_equal(batch['verdict_index'][0], [2, 3, 1])
