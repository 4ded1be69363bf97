"""Advantages of sampled completions, and the table of their estimators.

Every row of ADVANTAGES is a function
  (batch, num_generations, gamma=1.0, lam=0.95) -> {'advantages': ...}
of the whole rollout, not of one minibatch of it. batch holds
  rewards float32 [N]: of each completion; a prompt's G = num_generations
    completions lie side by side;
  completion_mask [N,T]: 1 on the completion's tokens, stop token included;
  kl_penalty float32 [N,T]: kl_coef times the k1 estimate of each token where
    the KL is part of the reward, else zeros;
  old_values float32 [N,T]: only for 'ppo'; the critic's value of what precedes
    token t, in units of the reward.
Advantages are float32 [N,T], 0 off the completion; 'ppo' adds 'returns', what
the critic learns. What lies off the completion is never read, so it may be NaN.
A row without completion tokens counts in its group's mean and nowhere else.

gamma (discount per token) and lam do nothing in the rows that give all tokens
of a completion the same advantage; algorithms.check refuses to set them there.

Axes: N completions, G of one prompt, T tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from csrm_jax.core import masked

AdvantageFn = Callable[..., dict[str, jax.Array]]

# Added to a group's standard deviation, as in the implementations users know.
GROUP_EPSILON = 1e-4
# Added to the variance over the tokens of a whole batch.
BATCH_EPSILON = 1e-8


def reinforce_pp(
  batch: Mapping[str, jax.Array], num_generations: int, gamma: float = 1.0, lam: float = 0.95
) -> dict[str, jax.Array]:
  """Returns advantages: returns with the KL inside, normalised over the batch.

  The return of token t is γ^(n−t)·R − Σ_{s≥t} γ^(s−t)·kl_penalty_s. Mean and
  standard deviation are those of all completion tokens of the batch.

  Source: REINFORCE++ (arXiv 2501.03262), eq. of A_t.
  """
  del num_generations, lam
  rewards = _check_rewards(batch, 1)
  return {'advantages': _whiten(_returns(rewards, batch, gamma), batch['completion_mask'])}


def reinforce_pp_baseline(
  batch: Mapping[str, jax.Array], num_generations: int, gamma: float = 1.0, lam: float = 0.95
) -> dict[str, jax.Array]:
  """Returns advantages as reinforce_pp does, of rewards less the group's mean.

  The mean is of the rewards alone; the KL comes in after it, token by token.

  Source: REINFORCE++ (arXiv 2501.03262), the variant with a baseline.
  """
  del lam
  rewards = _check_rewards(batch, num_generations)
  centred = _centre(_group(rewards, num_generations)).reshape(-1)
  return {'advantages': _whiten(_returns(centred, batch, gamma), batch['completion_mask'])}


def grpo(
  batch: Mapping[str, jax.Array], num_generations: int, gamma: float = 1.0, lam: float = 0.95
) -> dict[str, jax.Array]:
  """Returns advantages (R − mean of the group) / (its std + GROUP_EPSILON).

  The standard deviation divides by G − 1. A group whose rewards are all equal
  has advantages of exactly 0. R is less the completion's summed kl_penalty.

  Source: GRPO (arXiv 2402.03300), outcome supervision.
  """
  del gamma, lam
  centred = _centre(_total_rewards(batch, num_generations))
  std = jnp.sqrt(jnp.square(centred).sum(1, keepdims=True) / (num_generations - 1))
  return _broadcast(centred / (std + GROUP_EPSILON), batch)


def dr_grpo(
  batch: Mapping[str, jax.Array], num_generations: int, gamma: float = 1.0, lam: float = 0.95
) -> dict[str, jax.Array]:
  """Returns advantages R − mean of the group, not divided by anything.

  R is less the completion's summed kl_penalty.

  Source: Dr. GRPO (arXiv 2503.20783), §3.2.
  """
  del gamma, lam
  return _broadcast(_centre(_total_rewards(batch, num_generations)), batch)


def rloo(
  batch: Mapping[str, jax.Array], num_generations: int, gamma: float = 1.0, lam: float = 0.95
) -> dict[str, jax.Array]:
  """Returns advantages R − mean of the *other* completions of the group.

  R is less the completion's summed kl_penalty.

  Source: RLOO (arXiv 2402.14740), eq. 8.
  """
  del gamma, lam
  centred = _centre(_total_rewards(batch, num_generations))
  # R − (sum − R)/(G − 1) = (R − mean)·G/(G − 1), which is exactly 0 for a
  # group whose rewards are all equal.
  return _broadcast(centred * (num_generations / (num_generations - 1)), batch)


def ppo(
  batch: Mapping[str, jax.Array], num_generations: int, gamma: float = 1.0, lam: float = 0.95
) -> dict[str, jax.Array]:
  """Returns advantages by GAE(γ, λ), normalised over the batch, and returns.

  δ_t = r_t + γ·V_{t+1} − V_t, A_t = δ_t + γλ·A_{t+1}; r_t = −kl_penalty_t, plus
  R at the last token; V after it is 0. returns_t = A_t + V_t before the
  normalisation.

  Source: GAE (arXiv 1506.02438), eq. 16; PPO (arXiv 1707.06347).
  """
  del num_generations
  rewards = _check_rewards(batch, 1)
  mask = batch['completion_mask']
  values = _clear(batch['old_values'], mask)
  advantages = _gae(_token_rewards(rewards, batch), values, mask, gamma, lam)
  return {'advantages': _whiten(advantages, mask), 'returns': _clear(advantages + values, mask)}


ADVANTAGES: dict[str, AdvantageFn] = {
  'reinforce_pp': reinforce_pp,
  'reinforce_pp_baseline': reinforce_pp_baseline,
  'grpo': grpo,
  'dr_grpo': dr_grpo,
  'rloo': rloo,
  'ppo': ppo,
}


def zero_std_frac(rewards: jax.Array, num_generations: int) -> jax.Array:
  """Returns the fraction of groups whose rewards are all equal, float32 []."""
  groups = _group(rewards, num_generations)
  return (groups.max(1) == groups.min(1)).astype(jnp.float32).mean()


def _check_rewards(batch, num_generations: int) -> jax.Array:
  rewards = jnp.asarray(batch['rewards'])
  # A reward that was rounded to an integer or to 8 bits orders nothing.
  if rewards.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(
      f'rewards have dtype {rewards.dtype}; make them float32 where they are computed.'
    )
  if rewards.shape != batch['completion_mask'].shape[:1]:
    raise ValueError(
      f'rewards of shape {rewards.shape} do not fit completion_mask of shape '
      f'{batch["completion_mask"].shape}; give one reward a completion.'
    )
  if len(rewards) % num_generations:
    raise ValueError(
      f'num_generations={num_generations} must divide the number of completions {len(rewards)}.'
    )
  return rewards


def _total_rewards(batch, num_generations: int) -> jax.Array:
  """Returns rewards less the summed KL penalty, [N/G,G]."""
  rewards = _check_rewards(batch, num_generations)
  penalty = _clear(batch['kl_penalty'], batch['completion_mask']).sum(1)
  return _group(rewards - penalty, num_generations)


def _group(x: jax.Array, num_generations: int) -> jax.Array:
  return jnp.asarray(x).reshape(-1, num_generations)


def _centre(groups: jax.Array) -> jax.Array:
  """Returns groups [N/G,G] less their means; 0 where all G are equal.

  The mean of equal numbers may differ from them in the last place, and the
  division by a standard deviation as small would make an advantage of that.

  Raises:
    ValueError: G is 1.
  """
  if groups.shape[1] < 2:
    raise ValueError(
      f'num_generations={groups.shape[1]} leaves a group baseline nothing to '
      'compare with; sample at least 2 completions a prompt.'
    )
  same = groups.max(1, keepdims=True) == groups.min(1, keepdims=True)
  return jnp.where(same, 0.0, groups - groups.mean(1, keepdims=True))


def _broadcast(values: jax.Array, batch) -> dict[str, jax.Array]:
  """Returns values [N/G,G] as the advantage of each completion token."""
  mask = batch['completion_mask']
  return {'advantages': jnp.where(mask > 0, values.reshape(-1, 1), 0.0)}


def _clear(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask > 0, x, 0.0)


def _token_rewards(rewards: jax.Array, batch) -> jax.Array:
  """Returns −kl_penalty [N,T], plus the reward at a completion's last token."""
  mask = batch['completion_mask'] > 0
  num_left = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
  at_last = jnp.where(mask & (num_left == 1), rewards[:, None], 0.0)
  return at_last - _clear(batch['kl_penalty'], mask)


def _returns(rewards: jax.Array, batch, gamma: float) -> jax.Array:
  token_rewards = _token_rewards(rewards, batch)
  return _gae(
    token_rewards, jnp.zeros_like(token_rewards), batch['completion_mask'], gamma, lam=1.0
  )


def _gae(
  token_rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float
) -> jax.Array:
  """Returns unnormalised advantages [N,T]; all arguments are cleared."""

  def back(after, now):
    next_advantage, next_value = after
    reward, value, active = now
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    # Off the completion time stands still.
    return (
      jnp.where(active, advantage, next_advantage),
      jnp.where(active, value, next_value),
    ), advantage

  zeros = jnp.zeros_like(token_rewards[:, 0])
  _, advantages = jax.lax.scan(
    back, (zeros, zeros), (token_rewards.T, values.T, (mask > 0).T), reverse=True
  )
  return _clear(advantages.T, mask)


def _whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns (x − mean) / std over all completion tokens; 0 if all are equal."""
  mask = mask > 0
  centred = _clear(x - masked.masked_mean(x, mask), mask)
  variance = masked.masked_mean(jnp.square(centred), mask)
  same = jnp.where(mask, x, -jnp.inf).max() == jnp.where(mask, x, jnp.inf).min()
  return jnp.where(same, 0.0, centred / jnp.sqrt(variance + BATCH_EPSILON))
