"""What an alignment run and its compile report make from the same config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from csrm_jax.core import mesh as mesh_lib, profiling
from csrm_jax.models.sampling import Sampling
from csrm_jax.rl import algorithms, job, learner, objectives, rollout
from csrm_jax.train import step as training


def make_meshes(
  config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """Returns the meshes of training and of sampling, over the same devices.

  Completions are drawn from copies of the weights that are cut by heads only:
  what is cut over fsdp would have to come together for every token.

  Args:
    config: as in configs/rl.py.
    devices: or descriptions of them; by default all.

  Raises:
    ValueError: the devices do not divide so.
  """
  return (
    mesh_lib.make_mesh(**config.mesh, devices=devices),
    mesh_lib.make_mesh(
      tensor=config.sampling.tensor, num_slices=config.mesh.num_slices, devices=devices
    ),
  )


def make_sampling(config: ml_collections.ConfigDict, stop_ids: tuple[int, ...]) -> Sampling:
  """Returns how completions are drawn."""
  knobs = config.sampling
  return Sampling(
    knobs.max_completion_length, knobs.temperature, knobs.top_k, knobs.top_p, stop_ids=stop_ids
  )


def make_objective(config: ml_collections.ConfigDict) -> objectives.Objective:
  """Returns the objective; refuses settings that do not go together."""
  loss = config.loss
  names = (
    'epsilon',
    'epsilon_high',
    'dual_clip',
    'ratio',
    'loss_aggregation',
    'kl_place',
    'kl_estimator',
    'kl_coef',
  )
  objective = algorithms.make_objective(
    config.algorithm,
    **{name: loss[name] for name in names},
    max_completion_length=config.sampling.max_completion_length,
  )
  algorithms.check(
    config.algorithm,
    objective,
    config.rollout.num_generations,
    loss.gamma if 'gamma' in loss else algorithms.GAMMA,
    loss.lam if 'lam' in loss else algorithms.LAM,
    loss.kl_target,
  )
  return objective


def make_settings(config: ml_collections.ConfigDict, sampling: Sampling) -> job.Settings:
  """Returns the numbers of an online run."""
  draws, loss = config.rollout, config.loss
  return job.Settings(
    num_steps=config.num_steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    samples_every=draws.samples_every,
    num_samples=draws.num_samples,
    num_prompts=draws.num_prompts,
    num_generations=draws.num_generations,
    num_iterations=loss.num_iterations,
    num_mini_batches=loss.num_mini_batches,
    num_microbatches=config.optim.num_microbatches,
    sampling=sampling,
    rollout_dtype=draws.dtype,
    gamma=loss.gamma if 'gamma' in loss else algorithms.GAMMA,
    lam=loss.lam if 'lam' in loss else algorithms.LAM,
    kl_target=loss.kl_target,
    kl_horizon=loss.kl_horizon,
    normalise_rewards=loss.normalise_rewards,
    mask_truncated=loss.mask_truncated,
    stop_kl=config.stop.kl,
    stop_reward_drop=config.stop.reward_drop,
    look_every=config.eval.every,
    seed=config.seed,
    profile=profiling.parse_steps(config.profile_steps),
  )


def make_loss_fn(
  config: ml_collections.ConfigDict, policy: rollout.Policy, temperature: float
) -> training.LossFn:
  """Returns the loss of an online run, for make_step."""
  critic = ()
  if algorithms.get(config.algorithm).needs_values:
    critic = (config.loss.value_clip, config.loss.vf_coef)
  return learner.make_loss_fn(policy, make_objective(config), temperature, *critic)


def make_step(
  config: ml_collections.ConfigDict, loss_fn: training.LossFn, params: Any, mesh: jax.sharding.Mesh
) -> tuple[training.StepFn, training.TrainState]:
  """Returns the train step, and the first state; of params' shapes, its shapes.

  Args:
    config: as in configs/rl.py.
    loss_fn: what the step minimises.
    params: what is trained of the parameters, or the shapes of it.
    mesh: of the state.
  """
  num_updates = config.num_steps
  if algorithms.get(config.algorithm).online:
    num_updates *= config.loss.num_iterations * config.loss.num_mini_batches
  return training.make_step(loss_fn, params, mesh, num_updates, **config.optim)
