"""The algorithms as rows of one table: their advantages, and which settings do something.

An advantage is a function (batch, num_generations, gamma, lam) -> {'advantages': ...} of the whole
rollout, not of one minibatch of it. The batch holds
  rewards float32 [N]: the G = num_generations completions of a prompt lie side by side;
  completion_mask [N,T]: 1 on the completion's tokens, stop token included;
  kl_penalty float32 [N,T]: kl_coef times the k1 estimate of each token where the KL is part of the
    reward, else zeros;
  old_values float32 [N,T]: only for 'ppo'; the critic's value of what precedes token t, in units of
    the reward.
Advantages are float32 [N,T], 0 off the completion; 'ppo' adds 'returns', which the critic learns.
Values off the completion are never read, so they may be NaN. A row without completion tokens counts
in its group's mean and nowhere else.

gamma (the discount per token) and lam do nothing where all tokens of a completion have the same
advantage; check_idle refuses to set them there.

Axes: N completions, G completions of one prompt, T tokens of the longest completion.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from csrm_jax import config as config_lib
from csrm_jax.core import checks
from csrm_jax.rl import objectives
from csrm_jax.rl.objectives import Objective

Batch = Mapping[str, jax.Array]
Advantages = dict[str, jax.Array]
AdvantageFn = Callable[[Batch, int, float, float], Advantages]

# Is added to a group's standard deviation, as in the implementations that users know.
GROUP_EPSILON = 1e-4
# Is added to the variance over the tokens of a whole batch.
BATCH_EPSILON = 1e-8


def reinforce_pp(batch: Batch, num_generations: int, gamma: float, lam: float) -> Advantages:
  """Returns as advantages the returns with the KL inside, normalised over all tokens of the batch.

  The return of token t is γ^(n−t)·R − Σ_{s≥t} γ^(s−t)·kl_penalty_s.

  Source: REINFORCE++ (arXiv 2501.03262), eq. of A_t.
  """
  del num_generations, lam
  rewards = _check_rewards(batch, 1)
  return {'advantages': _whiten(_returns(rewards, batch, gamma), batch['completion_mask'])}


def reinforce_pp_baseline(
  batch: Batch, num_generations: int, gamma: float, lam: float
) -> Advantages:
  """Returns advantages as reinforce_pp does, of rewards less the group's mean.

  The mean has no KL in it; the KL is taken off afterwards, token by token.

  Source: REINFORCE++ (arXiv 2501.03262), the variant with a baseline.
  """
  del lam
  rewards = _check_rewards(batch, num_generations)
  centred = _centre(rewards.reshape(-1, num_generations)).reshape(-1)
  return {'advantages': _whiten(_returns(centred, batch, gamma), batch['completion_mask'])}


def grpo(batch: Batch, num_generations: int, gamma: float, lam: float) -> Advantages:
  """Returns advantages (R − mean of the group) / (its std + GROUP_EPSILON).

  The standard deviation divides by G − 1. A group whose rewards are all equal has advantages of
  exactly 0. The completion's summed kl_penalty is taken off R first.

  Source: GRPO (arXiv 2402.03300), outcome supervision.
  """
  del gamma, lam
  centred = _centre(_total_rewards(batch, num_generations))
  std = jnp.sqrt(jnp.square(centred).sum(1, keepdims=True) / (num_generations - 1))
  return _broadcast(centred / (std + GROUP_EPSILON), batch)


def dr_grpo(batch: Batch, num_generations: int, gamma: float, lam: float) -> Advantages:
  """Returns advantages R − mean of the group, not divided by anything; R is as in grpo.

  Source: Dr. GRPO (arXiv 2503.20783), §3.2.
  """
  del gamma, lam
  return _broadcast(_centre(_total_rewards(batch, num_generations)), batch)


def rloo(batch: Batch, num_generations: int, gamma: float, lam: float) -> Advantages:
  """Returns advantages R − mean of the *other* completions of the group; R is as in grpo.

  Source: RLOO (arXiv 2402.14740), eq. 8.
  """
  del gamma, lam
  centred = _centre(_total_rewards(batch, num_generations))
  # R − (sum − R)/(G − 1) = (R − mean)·G/(G − 1). The second form is exactly 0 where all rewards of
  # a group are equal; the first is so up to rounding only.
  return _broadcast(centred * (num_generations / (num_generations - 1)), batch)


def ppo(batch: Batch, num_generations: int, gamma: float, lam: float) -> Advantages:
  """Returns advantages by GAE(γ, λ), normalised over the batch, and returns.

  δ_t = r_t + γ·V_{t+1} − V_t, A_t = δ_t + γλ·A_{t+1}; r_t = −kl_penalty_t, plus R at the last
  token; V after it is 0. returns_t = A_t + V_t before the normalisation.

  Source: GAE (arXiv 1506.02438), eq. 16; PPO (arXiv 1707.06347).
  """
  del num_generations
  rewards = _check_rewards(batch, 1)
  mask = batch['completion_mask']
  values = _clear(batch['old_values'], mask)
  advantages = _gae(_token_rewards(rewards, batch), values, mask, gamma, lam)
  return {'advantages': _whiten(advantages, mask), 'returns': _clear(advantages + values, mask)}


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One algorithm: its advantage or its pair loss, what it needs, and its defaults.

  An online algorithm has an advantage: it samples from the policy that is trained and scores each
  rollout. An offline one has a pair loss: it learns from pairs of the reference's completions.
  """

  advantage: AdvantageFn | None = None
  pair_loss: Callable[..., Any] | None = None
  needs_group: bool = False  # compares the completions of one prompt, so needs 2 or more
  needs_values: bool = False  # has a critic
  # Whether a token's advantage depends on its place: where gamma < 1 or the KL is in the reward.
  token_returns: bool = False
  # Defaults of the Objective's fields.
  kl_place: str = 'reward'
  kl_estimator: str = 'k1'
  loss_aggregation: str = 'token-mean'

  @property
  def online(self) -> bool:
    return self.advantage is not None


# GRPO's paper has the KL in the loss, as k3, and gives each completion the same weight. Dr. GRPO
# divides by a constant instead: a mean over a completion's own tokens has a length bias.
_GRPO = {'needs_group': True, 'kl_place': 'loss', 'kl_estimator': 'k3'}
ALGORITHMS: dict[str, Algorithm] = {
  'reinforce_pp': Algorithm(reinforce_pp, token_returns=True),
  'reinforce_pp_baseline': Algorithm(reinforce_pp_baseline, needs_group=True, token_returns=True),
  'grpo': Algorithm(grpo, **_GRPO, loss_aggregation='seq-mean-token-mean'),
  'dr_grpo': Algorithm(dr_grpo, **_GRPO, loss_aggregation='seq-mean-token-sum-norm'),
  'rloo': Algorithm(rloo, needs_group=True),
  'ppo': Algorithm(ppo, needs_values=True, token_returns=True),
  'distillation': Algorithm(pair_loss=objectives.distillation_loss),
  'dpo': Algorithm(pair_loss=objectives.dpo_loss),
}


def get(name: str) -> Algorithm:
  """Returns ALGORITHMS[name]; a ValueError names the known ones."""
  checks.one_of('algorithm', name, ALGORITHMS)
  return ALGORITHMS[name]


def _choices(config: Any) -> list[tuple[bool, list[str], str]]:
  """Returns (whether they do nothing, keys or sections of configs/rl.py, why) of each choice."""
  name, row, reward = config.algorithm, get(config.algorithm), config.reward.name
  same = 'whose advantage is the same at all tokens of a completion'
  critic = ['loss.lam', 'loss.value_clip', 'loss.vf_coef']
  parts = 'mode safety_weight helpfulness_weight overlong_buffer overlong_penalty clip'
  own = {
    'csrm': 'checkpoint a b max_length on_cut',
    'http': 'url timeout_s num_tries backoff_s batch_size',
    'python': 'function',
    'alphaalign': 'variant format_weight answer_weight refusal refusal_rules',
  }
  helps = 'helpfulness helpfulness_a helpfulness_b'
  is_zero = reward == 'alphaalign' and config.reward.variant == 'none'
  online = ['rollout', 'loss', 'stop', 'eval.every']
  return [
    (not row.online, online, f'in {name}, which learns from pairs'),
    (row.online, ['pairs'], f'in {name}, which learns from its own samples'),
    (not row.token_returns, ['loss.gamma'], f'in {name}, {same}'),
    (not row.needs_values, critic, f'in {name}, which has no critic'),
    *(
      (reward != owner, _of_reward(keys), f'without reward={owner}') for owner, keys in own.items()
    ),
    (reward == 'alphaalign', _of_reward(parts), 'with reward=alphaalign'),
    (is_zero, _of_reward(helps), 'with variant=zero, which is not rewarded for helping'),
  ]


def _of_reward(keys: str) -> list[str]:
  return [f'reward.{key}' for key in keys.split()]


def idle_keys(config: Any) -> dict[str, str]:
  """Returns {key: why it does nothing in this run}; configs/rl.py leaves these keys empty."""
  idle = {}
  for is_idle, keys, why in _choices(config):
    for key in _inside(config, keys) if is_idle else ():
      idle.setdefault(key, why)
  return idle


def _inside(config: Any, keys: Sequence[str]) -> list[str]:
  """Returns the keys that are there or lie in a section that is."""
  return [key for key in config_lib.flatten(config) if {key, key.partition('.')[0]} & {*keys}]


def check_idle(config: Any) -> None:
  """Checks that no knob was turned that does nothing in this run.

  Raises:
    ValueError: One was turned; the message says what would make it do something.
  """
  values = config_lib.flatten(config)
  for key, why in idle_keys(config).items():
    if values[key] is not None:
      raise ValueError(f'config.{key}={values[key]} does nothing {why}; leave it out')
  # The other way round: --config.algorithm=... in place of the argument leaves empty what the
  # argument would have filled in.
  for is_idle, keys, _ in _choices(config):
    if not is_idle and all(values[key] is None for key in _inside(config, keys)):
      raise ValueError(
        f'config.{keys[0]} is empty: choose the algorithm and the reward in the argument of '
        'configs/rl.py, algorithm=... and reward=..., which fills in what they need'
      )
  reward, is_world = config.reward, config.data.source == 'ruleworld'
  known = reward.helpfulness in (None, 'none', 'oracle')
  judge = 'a reward model as reward.helpfulness'
  table = (  # a key, its default, whether it does nothing, what it needs to do something
    ('data.eval_fraction', 0.2, is_world, 'prompts from a file'),
    ('data.eval_seed', 1, not is_world, 'data.source=ruleworld'),
    ('policy.overrides.lora_alpha', 16.0, not config.policy.overrides.lora_rank, 'lora_rank'),
    ('reward.helpfulness_a', 1.0, known, judge),
    ('reward.helpfulness_b', 0.0, known, judge),
    ('reward.overlong_penalty', 1.0, not reward.overlong_buffer, 'reward.overlong_buffer'),
    ('reward.helpfulness_weight', 1.0, reward.helpfulness == 'none', 'reward.helpfulness'),
    ('loss.kl_horizon', 10_000, config.loss.kl_target is None, 'loss.kl_target'),
  )
  for key, value, is_idle, needs in table:
    if is_idle and values[key] not in (None, value):
      raise ValueError(
        f'config.{key}={values[key]} does nothing without {needs}; leave it at {value}'
      )


def make_objective(config: Any) -> Objective:
  """Returns the objective of an online run; None in config.loss takes the algorithm's default.

  A kl_place other than the algorithm's takes k1 in the reward and k2 in the loss.

  Raises:
    ValueError: Settings do not go together; one line says what to change.
  """
  name, loss, num_generations = config.algorithm, config.loss, config.rollout.num_generations
  algorithm, fields = get(name), [field.name for field in dataclasses.fields(Objective)]
  given = {key: value for key, value in loss.items() if key in fields and value is not None}
  defaults = {
    'kl_place': algorithm.kl_place,
    'kl_estimator': algorithm.kl_estimator,
    'loss_aggregation': algorithm.loss_aggregation,
  }
  place = given.get('kl_place', algorithm.kl_place)
  if place != algorithm.kl_place:
    defaults['kl_estimator'] = {'loss': 'k2'}.get(place, 'k1')
  if given.get('ratio') == 'sequence':
    # All tokens of a row have its one ratio: a mean over the batch's tokens would count long rows
    # more.
    defaults['loss_aggregation'] = 'seq-mean-token-mean'
  objective = Objective(
    **(defaults | given), max_completion_length=config.sampling.max_completion_length
  )
  if algorithm.needs_group and num_generations < 2:
    raise ValueError(
      f'num_generations={num_generations} does not go with {name}, which compares the completions '
      'of a prompt; take at least 2, or algorithm=reinforce_pp.'
    )
  checks.at_least(config.rollout, ('num_generations',))
  # They are None where they do nothing.
  gamma, lam = (1.0 if x is None else x for x in (loss.gamma, loss.lam))
  if not 0 < gamma <= 1 or not 0 <= lam <= 1:
    raise ValueError(f'gamma={gamma} must lie in (0, 1] and lam={lam} in [0, 1].')
  if loss.kl_target is not None:
    if objective.kl_place != 'reward':
      raise ValueError(
        f'kl_target={loss.kl_target} adapts kl_coef only where the KL is in the '
        f'reward; {name} has kl_place={objective.kl_place!r}: leave kl_target out.'
      )
    if not (0 < loss.kl_target < float('inf') and objective.kl_coef):
      raise ValueError(
        f'kl_target={loss.kl_target} and kl_coef={objective.kl_coef}, from which '
        'it starts, must be positive and finite.'
      )
  norm = 'seq-mean-token-sum-norm'
  if name == 'dr_grpo' and objective.loss_aggregation != norm:
    raise ValueError(
      f'loss_aggregation={objective.loss_aggregation!r} brings back the length bias that dr_grpo '
      f'takes out; use {norm!r}, or algorithm=rloo.'
    )
  by_token = algorithm.needs_values or objective.kl_place == 'reward' or gamma != 1
  if objective.ratio == 'sequence' and algorithm.token_returns and by_token:
    fix = (
      "take ratio='token', or algorithm=grpo"
      if algorithm.needs_values
      else "put the KL into the loss at gamma=1, or take ratio='token'"
    )
    raise ValueError(
      f"ratio='sequence' needs one advantage a completion, and {name} has one a token here: {fix}."
    )
  return objective


def adaptive_kl(
  kl_coef: float, measured_kl: float, target: float, horizon: float, num_samples: int
) -> float:
  """Returns the next kl_coef, which is larger where the KL lies above its target.

  It is kl_coef·(1 + clip(measured_kl/target − 1, −0.2, 0.2)·num_samples/horizon). KLs are in nats
  per token, as kl/ref. num_samples counts the completions since the last call; the horizon says
  after about how many the coefficient has adapted.

  Source: Ziegler et al. (arXiv 1909.08593), §2.2.
  """
  if not math.isfinite(measured_kl):
    raise ValueError(f'measured_kl={measured_kl} is not finite.')
  if not num_samples <= horizon:
    raise ValueError(
      f'kl_horizon={horizon} must be at least the {num_samples} completions of a rollout.'
    )
  error = min(max(measured_kl / target - 1, -0.2), 0.2)
  return kl_coef * (1 + error * num_samples / horizon)


def _check_rewards(batch, num_generations: int) -> jax.Array:
  rewards = jnp.asarray(batch['rewards'])
  # Rewards that were rounded to integers or to 8 bits no longer order completions.
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
  return (rewards - penalty).reshape(-1, num_generations)


def _centre(groups: jax.Array) -> jax.Array:
  """Returns groups [N/G,G] less their means; 0 where all G are equal."""
  if groups.shape[1] < 2:
    raise ValueError(
      f'num_generations={groups.shape[1]} leaves a group baseline nothing to '
      'compare with; sample at least 2 completions a prompt.'
    )
  # The mean of equal numbers may differ from them in the last place, and the division by a standard
  # deviation as small would make an advantage of that.
  same = groups.max(1, keepdims=True) == groups.min(1, keepdims=True)
  return jnp.where(same, 0.0, groups - groups.mean(1, keepdims=True))


def _broadcast(values: jax.Array, batch) -> Advantages:
  """Returns values [N/G,G] as the advantage of each completion token."""
  mask = batch['completion_mask']
  return {'advantages': jnp.where(mask > 0, values.reshape(-1, 1), 0.0)}


def _clear(x: jax.Array, mask: jax.Array) -> jax.Array:
  # Not a product: NaN times 0 is NaN.
  return jnp.where(mask > 0, x, 0.0)


def _token_rewards(rewards: jax.Array, batch) -> jax.Array:
  """Returns −kl_penalty [N,T], plus the reward at a completion's last token."""
  mask = batch['completion_mask'] > 0
  num_left = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
  at_last = jnp.where(mask & (num_left == 1), rewards[:, None], 0.0)
  return at_last - _clear(batch['kl_penalty'], mask)


def _returns(rewards: jax.Array, batch, gamma: float) -> jax.Array:
  rewards = _token_rewards(rewards, batch)
  # With values of 0 and λ = 1 the advantage is the discounted return.
  return _gae(rewards, jnp.zeros_like(rewards), batch['completion_mask'], gamma, lam=1.0)


def _gae(
  token_rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float
) -> jax.Array:
  """Returns unnormalised advantages [N,T]; the arguments are 0 off the completion."""

  def back(after, now):
    next_advantage, next_value = after
    reward, value, active = now
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    # Positions off the completion are no steps in time: they discount nothing.
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
  centred = _clear(x - objectives.masked_mean(x, mask), mask)
  variance = objectives.masked_mean(jnp.square(centred), mask)
  # As in _centre, what rounding leaves of equal values must not be blown up.
  same = jnp.where(mask, x, -jnp.inf).max() == jnp.where(mask, x, jnp.inf).min()
  return jnp.where(same, 0.0, centred / jnp.sqrt(variance + BATCH_EPSILON))
