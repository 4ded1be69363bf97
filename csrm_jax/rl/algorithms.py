"""The algorithms as rows of a table, and which settings go with which."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from csrm_jax.rl import advantages, objectives
from csrm_jax.rl.objectives import Objective

# Values of the knobs where they are left alone.
GAMMA, LAM = 1.0, 0.95


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What makes an algorithm; what may be set is there as a default.

  Attributes:
    loss: a function of objectives.
    online: samples from the policy that is trained, scores each rollout with
      the rewards; else it learns from pairs of completions of the reference.
    advantage: a row of advantages.ADVANTAGES; None where offline.
    needs_group: compares the completions of one prompt, so needs 2 or more.
    needs_values: has a critic.
    token_returns: a token's advantage depends on its place where gamma < 1 or
      the KL is in the reward.
    kl_place: default of Objective.kl_place.
    kl_estimator: default of Objective.kl_estimator.
    loss_aggregation: default of Objective.loss_aggregation.
  """

  loss: Callable[..., Any]
  online: bool = True
  advantage: advantages.AdvantageFn | None = None
  needs_group: bool = False
  needs_values: bool = False
  token_returns: bool = False
  kl_place: str = 'reward'
  kl_estimator: str = 'k1'
  loss_aggregation: str = 'token-mean'


ALGORITHMS: dict[str, Algorithm] = {
  'distillation': Algorithm(loss=objectives.distillation_loss, online=False, needs_group=True),
  'dpo': Algorithm(loss=objectives.dpo_loss, online=False, needs_group=True),
  'reinforce_pp': Algorithm(
    loss=objectives.policy_loss, advantage=advantages.reinforce_pp, token_returns=True
  ),
  'reinforce_pp_baseline': Algorithm(
    loss=objectives.policy_loss,
    advantage=advantages.reinforce_pp_baseline,
    needs_group=True,
    token_returns=True,
  ),
  'grpo': Algorithm(
    loss=objectives.policy_loss,
    advantage=advantages.grpo,
    needs_group=True,
    kl_place='loss',
    kl_estimator='k3',
    loss_aggregation='seq-mean-token-mean',
  ),
  'dr_grpo': Algorithm(
    loss=objectives.policy_loss,
    advantage=advantages.dr_grpo,
    needs_group=True,
    kl_place='loss',
    kl_estimator='k3',
    loss_aggregation='seq-mean-token-sum-norm',
  ),
  'rloo': Algorithm(loss=objectives.policy_loss, advantage=advantages.rloo, needs_group=True),
  'ppo': Algorithm(
    loss=objectives.policy_loss, advantage=advantages.ppo, needs_values=True, token_returns=True
  ),
}


def get(name: str) -> Algorithm:
  """Returns ALGORITHMS[name].

  Raises:
    ValueError: there is none of this name.
  """
  if name not in ALGORITHMS:
    raise ValueError(f'algorithm={name!r} must be one of {", ".join(ALGORITHMS)}.')
  return ALGORITHMS[name]


def make_objective(name: str, **settings: Any) -> Objective | None:
  """Returns the Objective of an algorithm; None for the offline ones.

  Args:
    name: of the algorithm.
    **settings: fields of Objective; one that is left out or None is as the
      algorithm has it. kl_coef left out at kl_place='none' is 0. A kl_place
      other than the algorithm's takes k1 in the reward and k2 in the loss.

  Raises:
    ValueError: settings that do not go together, or do nothing.
  """
  algorithm = get(name)
  given = {key: value for key, value in settings.items() if value is not None}
  if not algorithm.online:
    if given:
      raise ValueError(
        f'{next(iter(given))}={next(iter(given.values()))} does nothing in '
        f'{name}, which learns from pairs; leave it out.'
      )
    return None
  place = given.get('kl_place', algorithm.kl_place)
  defaults = {
    'kl_place': place,
    'kl_estimator': algorithm.kl_estimator,
    'loss_aggregation': algorithm.loss_aggregation,
  }
  if place != algorithm.kl_place:
    defaults['kl_estimator'] = {'loss': 'k2'}.get(place, 'k1')
  if place == 'none':
    defaults['kl_coef'] = 0.0
  if given.get('ratio') == 'sequence':
    defaults['loss_aggregation'] = 'seq-mean-token-mean'
  return Objective(**(defaults | given))


def check(
  name: str,
  objective: Objective | None,
  num_generations: int,
  gamma: float = GAMMA,
  lam: float = LAM,
  kl_target: float | None = None,
) -> None:
  """Refuses what does not go together, or does nothing, before a run starts.

  Args:
    name: of the algorithm.
    objective: as from make_objective.
    num_generations: completions a prompt.
    gamma: discount per token.
    lam: λ of GAE.
    kl_target: of adaptive_kl; None where kl_coef stays as it is.

  Raises:
    ValueError: one line that says what to change.
  """
  algorithm = get(name)
  least = 2 if algorithm.needs_group else 1
  if num_generations < least:
    raise ValueError(
      f'num_generations={num_generations} does not go with {name}, which '
      f'compares the completions of a prompt; take at least {least}, or '
      'algorithm=reinforce_pp.'
      if algorithm.needs_group
      else f'num_generations={num_generations} must be at least 1.'
    )
  if not 0 < gamma <= 1 or not 0 <= lam <= 1:
    raise ValueError(f'gamma={gamma} must lie in (0, 1] and lam={lam} in [0, 1].')
  if gamma != GAMMA and not algorithm.token_returns:
    raise ValueError(
      f'gamma={gamma} does nothing in {name}, whose advantage is the same at '
      f'all tokens of a completion; leave it at {GAMMA}.'
    )
  if lam != LAM and not algorithm.needs_values:
    raise ValueError(f'lam={lam} does nothing in {name}, which has no critic; leave it at {LAM}.')
  if kl_target is not None:
    _check_kl_target(kl_target, name, objective)
  if (objective is None) == algorithm.online:
    raise ValueError(
      f'{name} needs an objective; make it by make_objective.'
      if algorithm.online
      else f'{name} learns from pairs and takes no objective; give None.'
    )
  if objective is not None:
    _check_objective(name, algorithm, objective, gamma)


def _check_kl_target(kl_target, name, objective) -> None:
  if objective is None or objective.kl_place != 'reward':
    place = 'none' if objective is None else objective.kl_place
    raise ValueError(
      f'kl_target={kl_target} adapts kl_coef only where the KL is in the '
      f'reward; {name} has kl_place={place!r}: leave kl_target out.'
    )
  if not (0 < kl_target < float('inf') and objective.kl_coef):
    raise ValueError(
      f'kl_target={kl_target} and kl_coef={objective.kl_coef}, from which '
      'it starts, must be positive and finite.'
    )


def _check_objective(name, algorithm, objective, gamma) -> None:
  norm = 'seq-mean-token-sum-norm'
  if name == 'dr_grpo' and objective.loss_aggregation != norm:
    raise ValueError(
      f'loss_aggregation={objective.loss_aggregation!r} brings back the '
      f'length bias that dr_grpo takes out; use {norm!r}, or '
      'algorithm=rloo.'
    )
  if objective.ratio == 'token' or not algorithm.token_returns:
    return
  if algorithm.needs_values or objective.kl_place == 'reward' or gamma != 1:
    fix = (
      "take ratio='token', or algorithm=grpo"
      if algorithm.needs_values
      else "put the KL into the loss at gamma=1, or take ratio='token'"
    )
    raise ValueError(
      f"ratio='sequence' needs one advantage a completion, and {name} has one a token here: {fix}."
    )


def adaptive_kl(
  kl_coef: float, measured_kl: float, target: float, horizon: float, num_samples: int
) -> float:
  """Returns the next kl_coef: larger where the KL lies above its target.

  kl_coef·(1 + clip(measured_kl/target − 1, −0.2, 0.2)·num_samples/horizon).
  Only for a KL in the reward (check refuses it elsewhere).

  Args:
    kl_coef: the present one.
    measured_kl: of the last rollout, in the unit of target (nats a token as
      kl/ref).
    target: what to hold the KL at.
    horizon: in completions; about how many it takes to react.
    num_samples: completions since the last call, at most horizon.

  Raises:
    ValueError: measured_kl is not finite, or a batch is longer than horizon.

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
