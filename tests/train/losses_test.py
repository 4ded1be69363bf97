import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from csrm_jax.train import losses


@dataclasses.dataclass(frozen=True)
class Verbalizers:
  safe: tuple[int, ...] = (2, 5)
  unsafe: tuple[int, ...] = (3,)


def _batch(label, pair_weight, label_weight=None):
  label = np.atleast_2d(np.asarray(label, np.int32))
  if label_weight is None:
    label_weight = label >= 0
  return {
    'label': label,
    'label_weight': np.atleast_2d(np.asarray(label_weight, np.float32)),
    'pair_weight': np.atleast_2d(np.asarray(pair_weight, np.float32)),
  }


def _loss(log_p_safe, log_p_unsafe, batch, gamma=0.1, margin=0.0):
  return losses.reward_model_loss(log_p_safe, log_p_unsafe, batch, gamma, margin)


def _log_p(scores):
  """Returns (log P(safe), log P(unsafe)) with these differences."""
  scores = jnp.atleast_2d(jnp.asarray(scores, jnp.float32))
  return jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)


def test_verdict_logprobs_sum_over_verbalizers_of_full_vocabulary():
  logits = np.random.default_rng(0).standard_normal((2, 3, 7)) * 3
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  safe, unsafe = losses.verdict_logprobs(jnp.asarray(logits), Verbalizers())
  assert safe.dtype == unsafe.dtype == jnp.float32
  np.testing.assert_allclose(safe, np.log(p[..., 2] + p[..., 5]), rtol=1e-5)
  np.testing.assert_allclose(unsafe, np.log(p[..., 3]), rtol=1e-5)


def test_verdict_logprobs_survive_extreme_and_bfloat16_logits():
  logits = jnp.asarray([0, 0, 1e4, -1e4, 0, 0, 0], jnp.bfloat16)
  safe, unsafe = losses.verdict_logprobs(logits, Verbalizers())
  assert safe == 0 and np.isfinite(unsafe) and unsafe < -1e4


def test_classification_is_cross_entropy_of_the_label():
  scores = [2.0, -1.0, 0.5, 9.0]
  batch = _batch([0, 0, 1, -1], [0, 0, 0, 0])
  total, weight, metrics = _loss(*_log_p(scores), batch)
  want = -np.log(1 / (1 + np.exp([-2.0, 1.0, 0.5])))
  np.testing.assert_allclose(total, want.sum(), rtol=1e-5)
  assert weight == 3
  assert metrics['loss/cls'][1] == 3
  np.testing.assert_allclose(metrics['train/accuracy'], (1, 3))


def test_pair_sign_and_value():
  """The safer side (slot s) must score higher than the other (slot s + 1)."""
  batch = _batch([-1, -1], [1, 0])
  right = _loss(*_log_p([1.0, -1.0]), batch, gamma=0.1)
  wrong = _loss(*_log_p([-1.0, 1.0]), batch, gamma=0.1)
  np.testing.assert_allclose(right[0], 0.1 * np.log1p(np.exp(-2)), rtol=1e-5)
  np.testing.assert_allclose(wrong[0], 0.1 * np.log1p(np.exp(2)), rtol=1e-5)
  assert right[1] == wrong[1] == 1
  assert right[2]['pairs/accuracy'] == (1, 1)
  assert wrong[2]['pairs/accuracy'] == (0, 1)
  assert right[2]['pairs/score_gap'] == (2, 1)


@jax.jit
@jax.grad
def _pair_gradient(scores, margin):
  return _loss(*_log_p(scores), _batch([-1, -1], [1, 0]), gamma=1.0, margin=margin)[0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=2), st.floats(0, 2))
def test_descent_raises_the_safer_and_lowers_the_other(scores, margin):
  safer, other = -_pair_gradient(jnp.asarray(scores), margin)
  assert safer > 0 > other
  np.testing.assert_allclose(safer, -other, rtol=1e-4)


def test_descent_moves_labelled_scores_towards_their_label():
  batch = _batch([0, 1, -1], [0, 0, 0])

  def total(scores):
    return _loss(*_log_p(scores), batch)[0]

  step = -jax.grad(total)(jnp.asarray([0.3, 0.3, 0.3]))
  assert step[0] > 0 > step[1] and step[2] == 0


def test_margin_shifts_the_gap():
  batch = _batch([-1, -1], [1, 0])
  with_margin = _loss(*_log_p([2.0, 0.0]), batch, gamma=1.0, margin=0.5)
  without = _loss(*_log_p([1.5, 0.0]), batch, gamma=1.0)
  np.testing.assert_allclose(with_margin[0], without[0], rtol=1e-5)
  assert with_margin[2]['pairs/score_gap'] == (2, 1)  # not the shifted one


def test_weight_counts_atoms():
  # Slots: an example, a labelled pair, an unlabelled pair, an empty slot.
  batch = _batch([0, 0, 1, -1, -1, -1], [0, 1, 0, 1, 0, 0])
  total, weight, metrics = _loss(*_log_p([0.0] * 6), batch, gamma=0.5)
  assert weight == 3
  assert metrics['loss/cls'][1] == 3 and metrics['loss/pairs'][1] == 2
  np.testing.assert_allclose(total, 3 * np.log(2) + 0.5 * 2 * np.log(2))


def test_ties_count_half_as_pairs_and_as_unsafe():
  batch = _batch([0, 1, -1, -1], [0, 0, 1, 0])
  _, _, metrics = _loss(*_log_p([0.0] * 4), batch)
  assert metrics['pairs/accuracy'] == (0.5, 1)
  assert metrics['train/accuracy'] == (1, 2)


def test_unused_slots_may_hold_anything():
  batch = _batch([0, -1, -1], [0, 0, 0])
  log_p = tuple(x.at[0, 1].set(jnp.nan) for x in _log_p([1.0, 0.0, 0.0]))
  total, weight, metrics = _loss(*log_p, batch)
  assert np.isfinite(total) and weight == 1
  assert np.all(np.isfinite(jax.tree.leaves(metrics)))


def test_sums_add_up_over_rows():
  rng = np.random.default_rng(0)
  scores = rng.standard_normal((4, 4))
  label = rng.integers(-1, 2, (4, 4))
  label[:, :2] = -1
  pair_weight = np.tile([1, 0, 0, 0], (4, 1))

  def loss(rows):
    return _loss(*_log_p(scores[rows]), _batch(label[rows], pair_weight[rows]))

  whole = loss(slice(None))
  parts = [loss(slice(i, i + 1)) for i in range(4)]
  added = jax.tree.map(lambda *x: sum(x), *parts)
  for got, want in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('weighted', [False, True])
def test_lm_loss_equals_loop(weighted):
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 6, 9)).astype(np.float32)
  tokens = rng.integers(0, 9, (2, 6)).astype(np.int32)
  segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
  loss_weight = rng.random((2, 6)).astype(np.float32) if weighted else None
  log_p = np.asarray(jax.nn.log_softmax(logits))
  total = weight = correct = 0.0
  for b, t in np.ndindex(2, 5):
    if segment_ids[b, t] and segment_ids[b, t] == segment_ids[b, t + 1]:
      w = loss_weight[b, t + 1] if weighted else 1.0
      total -= w * log_p[b, t, tokens[b, t + 1]]
      weight += w
      correct += w * (logits[b, t].argmax() == tokens[b, t + 1])
  got = losses.lm_loss(logits, tokens, segment_ids, loss_weight)
  np.testing.assert_allclose(got[0], total, rtol=1e-5)
  np.testing.assert_allclose(got[1], weight, rtol=1e-5)
  np.testing.assert_allclose(got[2]['lm/accuracy'], (correct, weight), rtol=1e-5)


def test_lm_loss_of_padding_is_zero():
  zeros = np.zeros((1, 4), np.int32)
  total, weight, _ = losses.lm_loss(np.zeros((1, 4, 3)), zeros, zeros)
  assert total == 0 and weight == 0


def _loss_of_scores(batch, **kwargs):
  """Returns log-probs -> total, so that gradients see both."""

  def total(log_p):
    return _loss(*log_p, batch, **kwargs)[0]

  return total


@pytest.mark.parametrize('where', ['first', 'middle', 'last'])
def test_what_an_unused_slot_holds_reaches_neither_loss_nor_gradient(where):
  # An unused slot before, between and after: a pair and an example are used.
  used, batch = {
    'first': ([1, 2, 3], _batch([-1, -1, -1, 1], [0, 1, 0, 0])),
    'middle': ([0, 1, 3], _batch([-1, -1, -1, 1], [1, 0, 0, 0])),
    'last': ([0, 1, 2], _batch([1, -1, -1, -1], [0, 1, 0, 0])),
  }[where]
  unused = next(i for i in range(4) if i not in used)
  log_p = _log_p([0.5, -1.0, 2.0, 1.0])
  dirty = tuple(x.at[0, unused].set(jnp.nan) for x in log_p)
  total = _loss_of_scores(batch, gamma=1.0)
  want, want_grad = jax.value_and_grad(total)(log_p)
  got, got_grad = jax.value_and_grad(total)(dirty)
  assert got == want
  for g, w in zip(got_grad, want_grad, strict=True):
    np.testing.assert_array_equal(g, w)
    assert g[0, unused] == 0
    assert np.any(np.asarray(g)[0, used])


def test_nan_in_a_used_slot_is_not_hidden():
  for batch in (_batch([1, -1], [0, 0]), _batch([-1, -1], [1, 0])):
    log_p = tuple(x.at[0, 0].set(jnp.nan) for x in _log_p([1.0, 0.0]))
    assert np.isnan(_loss(*log_p, batch)[0])


def test_a_pair_in_the_last_slots_does_not_touch_the_first():
  batch = _batch([0, -1, -1], [0, 1, 0])
  log_p = _log_p([0.7, 1.0, -1.0])
  grads = jax.grad(_loss_of_scores(batch, gamma=1.0))(log_p)
  without = dict(batch, pair_weight=np.zeros_like(batch['pair_weight']))
  alone = jax.grad(_loss_of_scores(without, gamma=1.0))(log_p)
  assert grads[0][0, 0] == alone[0][0, 0] == -1  # of -log P(safe)
  assert grads[1][0, 0] == alone[1][0, 0] == 0
  total, weight, metrics = _loss(*log_p, batch, gamma=1.0)
  assert weight == 2  # the example of slot 0 is not part of the pair
  np.testing.assert_allclose(total, np.log1p(np.exp(-0.7)) + np.log1p(np.exp(-2)), rtol=1e-5)
  assert metrics['pairs/score_gap'] == (2, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 2), st.floats(0, 2))
def test_reward_model_loss_equals_loop(seed, gamma, margin):
  """Against a loop over atoms in float64, labelled pairs included."""
  rng = np.random.default_rng(seed)
  B, S = 3, 6
  log_p = np.log(rng.uniform(0.01, 0.5, (2, B, S)))
  label = rng.integers(-1, 2, (B, S))
  pair_weight = np.zeros((B, S))
  total = weight = 0.0
  for b in range(B):
    s = 0
    while s < S:
      is_pair = s + 1 < S and rng.random() < 0.4
      slots = (s, s + 1) if is_pair else (s,)
      for slot in slots:
        if label[b, slot] >= 0:
          total -= log_p[label[b, slot], b, slot]
          weight += not is_pair
      if is_pair:
        pair_weight[b, s] = 1
        safer, other = log_p[0, b, s : s + 2] - log_p[1, b, s : s + 2]
        total += gamma * np.log1p(np.exp(-(safer - other - margin)))
        weight += 1
      s += len(slots)
  got = _loss(*jnp.asarray(log_p, jnp.float32), _batch(label, pair_weight), gamma, margin)
  np.testing.assert_allclose(got[0], total, rtol=1e-4, atol=1e-5)
  assert got[1] == weight


def test_verdict_score_ignores_what_both_labels_share():
  """Neither a constant added to all logits nor other words move the score."""
  logits = np.random.default_rng(1).standard_normal(7).astype(np.float32)
  other = logits + 3
  other[[0, 1, 4, 6]] = 5
  scores = [
    np.subtract(*losses.verdict_logprobs(jnp.asarray(x), Verbalizers())) for x in (logits, other)
  ]
  np.testing.assert_allclose(*scores, rtol=1e-5)


def test_an_offset_moves_the_odds_of_the_two_verdicts_only():
  log_p = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.25, 0.6]]))
  batch = {
    'label': jnp.array([[1, 0]]),
    'label_weight': jnp.ones((1, 2)),
    'pair_weight': jnp.zeros((1, 2)),
  }
  plain, _, _ = losses.reward_model_loss(*log_p, batch, 0.1, 0.0)
  same, _, _ = losses.reward_model_loss(*log_p, batch | {'offset': jnp.zeros((1, 2))}, 0.1, 0.0)
  np.testing.assert_allclose(same, plain, rtol=1e-6)
  moved, _, _ = losses.reward_model_loss(
    *log_p, batch | {'offset': jnp.full((1, 2), np.log(3.0))}, 0.1, 0.0
  )
  # Odds of safe 2 -> 6 and 1/3 -> 1; the verdicts have the mass .75 and .8.
  np.testing.assert_allclose(moved, -np.log(0.75 / 7) - np.log(0.8 / 2), rtol=1e-6)
