"""Losses of a policy; each returns (total, weight, metrics) and divides nothing.

As in csrm_jax.train.losses the train step divides once by the global weight, so that the loss does
not depend on how a batch is cut into microbatches.

A batch of sampled completions has one in each row:
  completion_mask [B,T]: 1 on the completion's tokens, stop token included;
  old_logprobs float32 [B,T]: what the policy said at the start of the update;
  ref_logprobs float32 [B,T]: what the reference model says; it may be absent where no KL counts;
  advantages float32 [B,T]; for a critic also returns, old_values float32 [B,T].
The value at position t is about token t. Off the completion any value may stand, even NaN: it
reaches neither a loss nor a gradient. A row without completion tokens has no weight.

Log-probabilities are in nats, all computed by one function at one temperature.

Axes: B rows, T tokens of the longest completion, P preference pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from csrm_jax.core import checks
from csrm_jax.train.losses import Metrics

RATIOS = ('token', 'sequence')
AGGREGATIONS = 'token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum-norm'
# The estimators that are right in each place: in a loss k1 has an expected gradient of 0, and in a
# reward k2 and k3 do not lead to the KL's gradient.
KL_ESTIMATORS = {'none': ('k1', 'k2', 'k3'), 'reward': ('k1',), 'loss': ('k2', 'k3')}
# Log ratios are cut off here before exp, which would overflow float32 at 88.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class Objective:
  """The clipped policy-gradient objective; hashable. Fields are as in config.loss."""

  epsilon: float
  epsilon_high: float
  # 'token'; or 'sequence' (GSPO), which takes the geometric mean of the row's token ratios.
  ratio: str
  # 'token-mean': the mean over all tokens of the batch. 'seq-mean-token-mean': the mean over rows
  # of the mean over their tokens. 'seq-mean-token-sum-norm': the mean over rows of the sum over
  # their tokens, divided by max_completion_length.
  loss_aggregation: str
  # Where the KL to the reference is penalised: 'reward' (the caller hands kl_coef times the
  # estimate to the advantages), 'loss' or 'none'.
  kl_place: str
  kl_estimator: str
  kl_coef: float
  max_completion_length: int
  dual_clip: float | None = None

  def __post_init__(self):
    checks.one_of('ratio', self.ratio, RATIOS)
    checks.one_of('kl_place', self.kl_place, KL_ESTIMATORS)
    checks.one_of('loss_aggregation', self.loss_aggregation, AGGREGATIONS)
    if not (0 < self.epsilon < 1 and 0 < self.epsilon_high < float('inf')):
      raise ValueError(
        f'epsilon={self.epsilon} must lie in (0, 1) and epsilon_high={self.epsilon_high} '
        'be positive and finite.'
      )
    if self.dual_clip is not None and not self.dual_clip > 1:
      raise ValueError(f'dual_clip={self.dual_clip} must be above 1; None is no limit.')
    estimators = KL_ESTIMATORS[self.kl_place]
    if self.kl_estimator not in estimators:
      why = {
        'loss': "k1's expected gradient there is 0",
        'reward': 'only k1 penalises the KL there',
      }.get(self.kl_place, 'unknown')
      raise ValueError(
        f'kl_estimator={self.kl_estimator!r} does not go with kl_place={self.kl_place!r} '
        f'({why}); take {" or ".join(estimators)}.'
      )
    if not 0 <= self.kl_coef < float('inf'):
      raise ValueError(f'kl_coef={self.kl_coef} must be at least 0 and finite.')
    if self.kl_place == 'none' and self.kl_coef:
      raise ValueError(
        f"kl_coef={self.kl_coef} does nothing at kl_place='none'; set it "
        "to 0 or put the KL into 'reward' or 'loss'."
      )
    if self.ratio == 'sequence' and self.loss_aggregation != 'seq-mean-token-mean':
      raise ValueError(
        f"ratio='sequence' with loss_aggregation={self.loss_aggregation!r} "
        'would weigh a sequence by its length; take seq-mean-token-mean.'
      )
    if self.loss_aggregation == 'seq-mean-token-sum-norm' and not (
      self.max_completion_length and self.max_completion_length > 0
    ):
      raise ValueError(
        f'max_completion_length={self.max_completion_length} must be at least 1 with '
        "loss_aggregation='seq-mean-token-sum-norm', which divides by it."
      )


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, estimator: str) -> jax.Array:
  """Returns an estimate of KL(policy ‖ reference) from each token, in nats.

  With d = logprobs − ref_logprobs: k1 = d, k2 = d²/2, k3 = e^−d − 1 + d. For tokens drawn from the
  policy k1 and k3 have the KL as their mean, k2 nearly. But as a *loss* k1 has an expected gradient
  of 0, k2 has the gradient of the KL, and k3 that of KL(reference ‖ policy).

  Source: Schulman, "Approximating KL divergence" (2020).
  """
  gap = _float(logprobs) - ref_logprobs
  if estimator == 'k1':
    return gap
  if estimator == 'k2':
    return 0.5 * jnp.square(gap)
  if estimator == 'k3':
    return _exp(-gap) - 1 + gap
  raise ValueError(f'kl_estimator={estimator!r} must be k1, k2 or k3.')


def policy_loss(
  logprobs: jax.Array, batch: Mapping[str, jax.Array], objective: Objective
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of the clipped policy objective.

  A token's loss is −min(r·A, clip(r, 1 − ε, 1 + ε_high)·A) with r = e^(logprobs − old_logprobs) or
  the sequence's ratio; for A < 0 it is at most −dual_clip·A. kl_coef times the KL estimate is added
  where the KL is in the loss.

  Metrics are token means, but for policy/loss (without the KL, as aggregated) and policy/ratio_max
  (the mean over rows of a row's largest ratio). policy/clip_frac_low and policy/clip_frac_high
  count where the clip stops the gradient; policy/entropy is −logprobs of the drawn tokens; kl/ref,
  where there is a reference, and kl/old are k3.

  Source: PPO (arXiv 1707.06347), eq. 7; dual clip (arXiv 1912.09729), eq. 5; clip-higher (DAPO,
    arXiv 2503.14476), eq. 10; GSPO (2507.18071), eq. 5.
  """
  mask = batch['completion_mask'] > 0
  # These are cleared first: a weight of 0 keeps a NaN out of the loss, but not out of the gradient.
  logprobs, old, advantages = (
    jnp.where(mask, _float(x), 0.0) for x in (logprobs, batch['old_logprobs'], batch['advantages'])
  )
  log_ratio = logprobs - old
  if objective.ratio == 'sequence':
    log_ratio = jnp.where(mask, masked_mean(log_ratio, mask, axis=1)[:, None], 0.0)
  ratio = _exp(log_ratio)
  surrogate, clips = _clipped(ratio, advantages, objective)
  total, weight = _aggregate(-surrogate, mask, objective)
  metrics = {'policy/loss': (total, weight)}
  tokens = {}
  if 'ref_logprobs' in batch:
    ref = jnp.where(mask, _float(batch['ref_logprobs']), 0.0)
    tokens['kl/ref'] = kl_estimate(logprobs, ref, 'k3')
  if objective.kl_place == 'loss' and objective.kl_coef:
    kl = kl_estimate(logprobs, ref, objective.kl_estimator)
    total += objective.kl_coef * _aggregate(kl, mask, objective)[0]
  tokens |= {
    **{f'policy/{name}': hits for name, hits in clips.items()},
    'policy/ratio_mean': ratio,
    'policy/entropy': -logprobs,
    'kl/old': kl_estimate(logprobs, old, 'k3'),
  }
  metrics |= {name: _token_sum(x, mask) for name, x in tokens.items()}
  highest = jnp.where(mask, ratio, 0.0).max(1)
  metrics['policy/ratio_max'] = (highest.sum(), mask.any(1).sum())
  return total, weight, jax.lax.stop_gradient(metrics)


def value_loss(
  values: jax.Array, batch: Mapping[str, jax.Array], value_clip: float | None, objective: Objective
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of the critic's squared error, halved.

  With value_clip, in units of the reward, it is the larger of two errors: that of the value, and
  that of the value held within value_clip of old_values.

  Source: PPO's reference implementation; see arXiv 2005.12729, §2.
  """
  if value_clip is not None and not value_clip > 0:
    raise ValueError(f'value_clip={value_clip} must be positive; None switches it off.')
  mask = batch['completion_mask'] > 0
  values, old, returns = (
    jnp.where(mask, _float(x), 0.0) for x in (values, batch['old_values'], batch['returns'])
  )
  error = jnp.square(values - returns)
  clipped = jnp.zeros_like(mask)
  if value_clip is not None:
    held = jnp.clip(values, old - value_clip, old + value_clip)
    held_error = jnp.square(held - returns)
    clipped = held_error > error
    error = jnp.maximum(error, held_error)
  total, weight = _aggregate(0.5 * error, mask, objective)
  metrics = {'value/loss': (total, weight), 'value/clip_frac': _token_sum(clipped, mask)}
  return total, weight, jax.lax.stop_gradient(metrics)


def distillation_loss(
  logprob_sums: jax.Array, batch: Mapping[str, jax.Array], beta: float
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of reward distillation.

  A pair's loss is (log(R⁺/R⁻) − β·log(π(y⁺)π_ref(y⁻) / π(y⁻)π_ref(y⁺)))². The paper prints a
  product of rewards; the method it cites has this difference.

  Metrics: pairs/accuracy (π prefers the better side more than π_ref does; a tie counts half),
  pairs/margin (β·log(…)), pairs/target (log(R⁺/R⁻)).

  Args:
    logprob_sums: float32 [P,2], log π of each completion; side 0 is the better.
    batch: Holds reward float32 [P,2], above 0, and ref_logprob float32 [P,2].

  Source: CSRM (arXiv 2605.30487), RL alignment; Fisch et al. (arXiv 2405.19316), eq. 7.
  """
  margin, reward = _margin(logprob_sums, batch, beta), _float(batch['reward'])
  target = jnp.log(reward[:, 0]) - jnp.log(reward[:, 1])
  return _pair_loss(jnp.square(target - margin), margin, {'pairs/target': target})


def dpo_loss(
  logprob_sums: jax.Array, batch: Mapping[str, jax.Array], beta: float
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of direct preference optimisation.

  A pair's loss is −log σ(β·log(π(y⁺)π_ref(y⁻) / π(y⁻)π_ref(y⁺))). Arguments and metrics are as in
  distillation_loss; the rewards only order the pair.

  Source: DPO (arXiv 2305.18290), eq. 7.
  """
  margin = _margin(logprob_sums, batch, beta)
  return _pair_loss(-jax.nn.log_sigmoid(margin), margin, {})


def better_nll(
  logprob_sums: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns (total, weight) of −log π(y⁺) per token: the sum over pairs, and their number.

  A pair loss may fall while both sides lose probability to text that is in no pair; this term keeps
  probability at the better sides. The batch of distillation_loss also has completion_mask [P,2,C].

  Source: Pang et al. (arXiv 2404.19733), eq. 1.
  """
  lengths = (batch['completion_mask'][:, 0] > 0).sum(1)
  nll = -_float(logprob_sums[:, 0]) / jnp.maximum(lengths, 1)
  return nll.sum(), jnp.float32(len(nll))


# --- Parts that the losses share -------------------------------------------------------


def masked_sum(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
  """Returns the float32 sum of x * mask (bool or weight); x may be NaN where mask is 0."""
  x, mask = jnp.broadcast_arrays(_float(x), mask)
  # Not x * mask alone: NaN * 0 is NaN, in the sum and in its gradient.
  kept = jnp.where(mask != 0, x, 0.0)
  return jnp.sum(kept * mask.astype(x.dtype), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
  """Returns the float32 mean of x weighted by mask, and 0 where mask is all 0.

  So a row without tokens adds nothing to a loss. Do not use it where an empty selection is an
  error.
  """
  x, mask = jnp.broadcast_arrays(_float(x), mask)
  weight = jnp.sum(mask.astype(x.dtype), axis=axis)
  total = masked_sum(x, mask, axis)
  # The inner where keeps 0 / 0 out of the gradient as well.
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def _float(x: jax.Array) -> jax.Array:
  """Returns x in float32, or in float64 where it is that: tests compare with exact references."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _exp(x: jax.Array) -> jax.Array:
  return jnp.exp(jnp.clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _clipped(ratio, advantages, objective):
  """Returns the objective of each token and {name: where it is clipped}."""
  low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
  surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
  clips = {
    'clip_frac_low': (ratio < low) & (advantages < 0),
    'clip_frac_high': (ratio > high) & (advantages > 0),
  }
  if objective.dual_clip is not None:
    bound = objective.dual_clip * advantages
    surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, bound), surrogate)
    clips['dual_clip_frac'] = (ratio > objective.dual_clip) & (advantages < 0)
  return surrogate, clips


def _aggregate(x, mask, objective) -> tuple[jax.Array, jax.Array]:
  """Returns (total, weight) of x [B,T] under objective.loss_aggregation."""
  if objective.loss_aggregation == 'token-mean':
    return _token_sum(x, mask)
  num_rows = mask.any(1).sum().astype(x.dtype)
  if objective.loss_aggregation == 'seq-mean-token-mean':
    return masked_mean(x, mask, axis=1).sum(), num_rows
  total = masked_sum(x, mask) / objective.max_completion_length
  return total, num_rows


def _token_sum(x, mask) -> tuple[jax.Array, jax.Array]:
  total = masked_sum(x, mask)
  return total, mask.sum().astype(total.dtype)


def _margin(logprob_sums, batch, beta) -> jax.Array:
  """Returns β times the difference of the sides' log-ratios, [P]."""
  if not 0 < beta < float('inf'):
    raise ValueError(f'beta={beta} must be positive and finite.')
  log_ratio = _float(logprob_sums) - batch['ref_logprob']
  return beta * (log_ratio[:, 0] - log_ratio[:, 1])


def _pair_loss(loss, margin, extra):
  """Returns (total, weight, metrics) of values [P]."""
  total, num_pairs = loss.sum(), jnp.float32(len(loss))
  ordered = 0.5 * ((margin > 0) + (margin >= 0).astype(jnp.float32))
  values = {'pairs/accuracy': ordered, 'pairs/margin': margin, **extra}
  metrics = {name: (x.sum(), num_pairs) for name, x in values.items()}
  metrics['policy/loss'] = (total, num_pairs)
  return total, num_pairs, jax.lax.stop_gradient(metrics)
