import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.rl import online
from csrm_jax.rl.algorithms import ALGORITHMS

ADVANTAGES = {name: row.advantage for name, row in ALGORITHMS.items() if row.online}
G = 3
# (start, length) of each completion; prompts differ in length, one completion
# has a single token and one none at all.
SPANS = ((2, 3), (2, 5), (2, 1), (1, 6), (1, 0), (1, 2), (3, 4), (3, 2), (3, 4))
# The second group has no variance; nor does its KL penalty.
REWARDS = (0.31, 0.87, 0.305, 0.1, 0.1, 0.1, 2.75, -1.4, 0.6)
T = 8


def _batch(rewards=REWARDS, spans=SPANS, seed=0, dtype=np.float64):
  """Returns a rollout with NaN wherever nothing may be read."""
  rng = np.random.default_rng(seed)
  shape = (len(spans), T)
  mask = np.zeros(shape, np.float32)
  for row, (start, length) in enumerate(spans):
    mask[row, start : start + length] = 1
  arrays = {
    'kl_penalty': 0.3 * rng.standard_normal(shape),
    'old_values': rng.standard_normal(shape),
  }
  arrays['kl_penalty'][G : 2 * G] = 0
  arrays = {name: np.where(mask > 0, x, np.nan).astype(dtype) for name, x in arrays.items()}
  return {'rewards': np.asarray(rewards, dtype), 'completion_mask': mask, **arrays}


@functools.partial(jax.jit, static_argnums=(0, 2))
def _jitted(name, batch, num_generations, gamma=1.0, lam=0.95):
  return ADVANTAGES[name](batch, num_generations, gamma, lam)


def _compute(name, batch, size, gamma, lam):
  """Returns the advantages (and returns) in float64."""
  with jax.enable_x64(True):
    return jax.device_get(_jitted(name, batch, size, gamma, lam))


def _lists(batch, name, spans=SPANS):
  return [
    [float(x) for x in row[start : start + length]]
    for row, (start, length) in zip(batch[name], spans, strict=True)
  ]


def _to_array(rows, spans=SPANS):
  out = np.zeros((len(spans), T))
  for i, (start, _) in enumerate(spans):
    for j, value in enumerate(rows[i]):
      out[i, start + j] = value
  return out


def _reference_whiten(rows):
  values = [x for row in rows for x in row]
  mean = math.fsum(values) / len(values)
  variance = math.fsum((x - mean) ** 2 for x in values) / len(values)
  return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def _reference_returns(reward, penalties, gamma):
  returns = []
  for t in range(len(penalties)):
    value = gamma ** (len(penalties) - 1 - t) * reward
    for s in range(t, len(penalties)):
      value -= gamma ** (s - t) * penalties[s]
    returns.append(value)
  return returns


def _reference_gae(reward, penalties, values, gamma, lam):
  deltas = []
  for t in range(len(values)):
    last = t == len(values) - 1
    after = 0.0 if last else values[t + 1]
    deltas.append((reward if last else 0.0) - penalties[t] + gamma * after - values[t])
  return [
    sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
    for t in range(len(deltas))
  ]


def _reference(name, batch, gamma, lam):
  """Returns (advantages, returns or None) by plain loops."""
  penalties = _lists(batch, 'kl_penalty')
  rewards = [float(r) for r in batch['rewards']]
  n = len(rewards)
  if name == 'reinforce_pp':
    return _reference_whiten(
      [_reference_returns(rewards[i], penalties[i], gamma) for i in range(n)]
    ), None
  if name == 'reinforce_pp_baseline':
    means = [sum(rewards[i // G * G : i // G * G + G]) / G for i in range(n)]
    return _reference_whiten(
      [_reference_returns(rewards[i] - means[i], penalties[i], gamma) for i in range(n)]
    ), None
  if name == 'ppo':
    values = _lists(batch, 'old_values')
    rows = [_reference_gae(rewards[i], penalties[i], values[i], gamma, lam) for i in range(n)]
    returns = [[a + v for a, v in zip(rows[i], values[i], strict=True)] for i in range(n)]
    return _reference_whiten(rows), returns
  rows = []
  for i in range(n):
    group = range(i // G * G, i // G * G + G)
    totals = {j: rewards[j] - sum(penalties[j]) for j in group}
    mean = sum(totals.values()) / G
    if name == 'grpo':
      variance = sum((x - mean) ** 2 for x in totals.values()) / (G - 1)
      value = (totals[i] - mean) / (math.sqrt(variance) + 1e-4)
    elif name == 'dr_grpo':
      value = totals[i] - mean
    else:
      value = totals[i] - sum(totals[j] for j in group if j != i) / (G - 1)
    rows.append([value] * len(penalties[i]))
  return rows, None


@pytest.mark.parametrize(
  'name, gamma, lam',
  [
    ('reinforce_pp', 1.0, 0.95),
    ('reinforce_pp', 0.9, 0.95),
    ('reinforce_pp_baseline', 1.0, 0.95),
    ('reinforce_pp_baseline', 0.8, 0.95),
    ('grpo', 1.0, 0.95),
    ('dr_grpo', 1.0, 0.95),
    ('rloo', 1.0, 0.95),
    ('ppo', 1.0, 0.95),
    ('ppo', 0.9, 0.7),
    ('ppo', 0.9, 1.0),
  ],
)
def test_agrees_with_loops_at_float64(name, gamma, lam):
  batch = _batch()
  got = _compute(name, batch, G, gamma, lam)
  want, returns = _reference(name, batch, gamma, lam)
  assert got['advantages'].dtype == np.float64
  np.testing.assert_allclose(got['advantages'], _to_array(want), rtol=1e-9, atol=1e-12)
  assert ('returns' in got) == (returns is not None)
  if returns is not None:
    np.testing.assert_allclose(got['returns'], _to_array(returns), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', ADVANTAGES)
def test_float32_agrees_with_loops_too(name):
  batch = _batch(dtype=np.float32)
  got = _jitted(name, batch, G)['advantages']
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, _to_array(_reference(name, batch, 1.0, 0.95)[0]), atol=2e-5)


@pytest.mark.parametrize(
  'name', ['reinforce_pp', 'reinforce_pp_baseline', 'grpo', 'dr_grpo', 'rloo']
)
def test_equal_rewards_have_no_advantage_at_all(name):
  """0.1 is not exact: its mean over a group may differ from it."""
  for reward in (0.1, 0.7, 4.2, 1e4 / 3):
    batch = _batch([reward] * 9, dtype=np.float32)
    batch['kl_penalty'] = np.zeros_like(batch['kl_penalty'])
    got = _jitted(name, batch, G)['advantages']
    assert not np.any(got), reward


def test_kl_penalises_the_tokens_from_which_it_follows():
  """The k1 penalty at a token counts for it and those before, not after."""
  spans = ((2, 5), (2, 5))
  batch = _batch([0.3, 0.3], spans, dtype=np.float32)
  batch['kl_penalty'] = np.zeros((2, T), np.float32)
  batch['kl_penalty'][0, 4] = 0.5
  got = np.asarray(_jitted('reinforce_pp', batch, 1)['advantages'])[0, 2:7]
  assert got[0] == got[1] == got[2] < 0 < got[3] == got[4]


@pytest.mark.parametrize('name', ['reinforce_pp', 'ppo'])
def test_time_stands_still_off_the_completion(name):
  """A completion in two pieces is one completion."""
  whole = _batch([0.4, 1.3], ((1, 4), (2, 3)))
  split = {name: x.copy() for name, x in whole.items()}
  for key in ('completion_mask', 'kl_penalty', 'old_values'):
    split[key][0, 5:7], split[key][0, 3:5] = (whole[key][0, 3:5], whole[key][0, 5:7])
  want = _compute(name, whole, 1, 0.9, 0.8)['advantages']
  got = _compute(name, split, 1, 0.9, 0.8)['advantages']
  np.testing.assert_allclose(got[0, [1, 2, 5, 6]], want[0, 1:5], rtol=1e-12)
  assert not got[0, [0, 3, 4, 7]].any()
  np.testing.assert_allclose(got[1], want[1], rtol=1e-12)


@pytest.mark.parametrize('name', ADVANTAGES)
def test_a_rollout_without_tokens_is_all_zero(name):
  batch = _batch([0.5, 1.5, 0.25], ((2, 0),) * 3, dtype=np.float32)
  assert not np.any(_jitted(name, batch, G)['advantages'])


@pytest.mark.parametrize('name', ['reinforce_pp_baseline', 'grpo', 'dr_grpo', 'rloo'])
def test_a_group_of_one_is_refused(name):
  with pytest.raises(ValueError, match=r'num_generations=1.*at least 2'):
    ADVANTAGES[name](_batch(dtype=np.float32), 1, 1.0, 0.95)


@pytest.mark.parametrize(
  'change, match',
  [
    ({'rewards': np.arange(9)}, 'dtype int32'),
    ({'rewards': jnp.arange(9, dtype=jnp.bfloat16)}, 'dtype bfloat16'),
    ({'rewards': np.zeros((9, 2), np.float32)}, 'one reward a completion'),
    ({'rewards': np.zeros(8, np.float32)}, 'one reward a completion'),
  ],
)
@pytest.mark.parametrize('name', ['reinforce_pp', 'grpo', 'ppo'])
def test_bad_rewards_are_refused(name, change, match):
  with pytest.raises(ValueError, match=match):
    ADVANTAGES[name](_batch(dtype=np.float32) | change, G, 1.0, 0.95)


def test_groups_must_fit():
  with pytest.raises(ValueError, match=r'num_generations=4 must divide.* 9'):
    ADVANTAGES['grpo'](_batch(dtype=np.float32), 4, 1.0, 0.95)


def test_zero_std_frac_counts_groups():
  got = online.reward_metrics(np.float32(REWARDS), {}, G)['reward/zero_std_frac']
  np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)
