"""What a run of online RL works on, and what it carries from step to step."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from csrm_jax.models.config import ModelConfig
from csrm_jax.models.sampling import Sampling
from csrm_jax.rl import algorithms, objectives, rewards, rollout
from csrm_jax.safety.schema import Prompt
from csrm_jax.train import step as training

# (model, parameters) -> {name: a Metric of evals}
LookFn = Callable[[ModelConfig, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of a run; see configs/rl.py for what users choose.

  Attributes:
    num_steps: rollouts in all.
    log_every: steps that one line of metrics.jsonl sums up.
    checkpoint_every: a multiple of log_every.
    samples_every: steps between entries of samples.jsonl; 0 for none.
    num_samples: of each entry.
    num_prompts: of a step.
    num_generations: G, completions of a prompt.
    num_iterations: times that a step's samples are used.
    num_mini_batches: updates of each time.
    num_microbatches: of an update.
    sampling: of completions.
    rollout_dtype: of the copy that is sampled from; '' is the policy's.
    gamma: discount of later tokens' rewards.
    lam: of GAE.
    kl_target: kl/ref that adapts kl_coef; None leaves it as it is.
    kl_horizon: samples within which it adapts.
    normalise_rewards: by mean and spread of all rewards so far.
    mask_truncated: cut-off completions have no part in the loss.
    stop_kl: kl/ref of a log line that ends the run; None: none does.
    stop_reward_drop: below the best log line's reward/mean; None likewise.
    look_every: steps between entries of looks.jsonl; 0 for none.
    seed: of prompts, draws and mini batches.
    profile: first and last step of a trace in workdir/profile; None: none.
  """

  num_steps: int
  log_every: int
  checkpoint_every: int
  samples_every: int
  num_samples: int
  num_prompts: int
  num_generations: int
  num_iterations: int
  num_mini_batches: int
  num_microbatches: int
  sampling: Sampling
  rollout_dtype: str
  gamma: float
  lam: float
  kl_target: float | None
  kl_horizon: int
  normalise_rewards: bool
  mask_truncated: bool
  stop_kl: float | None
  stop_reward_drop: float | None
  look_every: int
  seed: int
  profile: tuple[int, int] | None = None

  def __post_init__(self):
    for name in (
      'num_steps',
      'log_every',
      'checkpoint_every',
      'num_prompts',
      'num_generations',
      'num_iterations',
      'num_mini_batches',
      'num_microbatches',
      'kl_horizon',
    ):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.checkpoint_every % self.log_every:
      raise ValueError(
        f'checkpoint_every={self.checkpoint_every} must be a multiple of log_every={self.log_every}'
      )
    if self.num_rows % (self.num_mini_batches * self.num_microbatches):
      raise ValueError(
        f'num_prompts x num_generations = {self.num_rows} samples do not '
        f'divide into num_mini_batches={self.num_mini_batches} of '
        f'num_microbatches={self.num_microbatches}'
      )
    if not self.sampling.temperature:
      raise ValueError(
        'temperature=0 always draws the same completion, from which nothing '
        'is learnt; give one above 0'
      )

  @property
  def num_rows(self) -> int:
    """N."""
    return self.num_prompts * self.num_generations

  @property
  def chunk(self) -> int:
    """Rows that go through the model at once."""
    return self.num_rows // (self.num_mini_batches * self.num_microbatches)


@dataclasses.dataclass(frozen=True)
class Job:
  """What a run works on.

  Attributes:
    policy: what is trained.
    frozen: its parameters that are not, on the mesh; {} where all are.
    reference: what the KL is measured from, and its parameters.
    algorithm: a row of ALGORITHMS.
    objective: its loss.
    prompts: each step takes the next ones, in an order of each epoch.
    reward_fn: samples -> (total, parts).
    step_fn: as from training.make_train_step.
    mesh: what batches are spread over.
    sampling_mesh: of the same devices, that completions are drawn on.
    workdir: of checkpoints/, metrics.jsonl and samples.jsonl.
    settings: numbers.
    meta: JSON that describes the policy, stored with each checkpoint.
    look_fn: (policy's model, all its parameters) -> metrics of held-out
      prompts; None: nothing measures them.
  """

  policy: rollout.Policy
  frozen: Mapping[str, Any]
  reference: tuple[ModelConfig, Any]
  algorithm: algorithms.Algorithm
  objective: objectives.Objective
  prompts: Sequence[Prompt]
  reward_fn: rewards.TotalFn
  step_fn: training.StepFn
  mesh: jax.sharding.Mesh
  sampling_mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  settings: Settings
  meta: Mapping[str, Any]
  look_fn: LookFn | None = None


@dataclasses.dataclass
class Progress:
  """What a run carries from step to step beside the train state.

  Attributes:
    kl_coef: as adapted so far.
    normaliser: of rewards.
    best_reward: reward/mean of the best log line, None before the first.
    stopped: why the run ended early; '' where it did not.
  """

  kl_coef: float
  normaliser: rewards.Normaliser = dataclasses.field(default_factory=rewards.Normaliser)
  best_reward: float | None = None
  stopped: str = ''

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values."""
    return dataclasses.asdict(self)

  @staticmethod
  def from_dict(obj: Mapping[str, Any]) -> Progress:
    """Returns what to_dict wrote."""
    normaliser = rewards.Normaliser.from_dict(obj['normaliser'])
    return Progress(**{**obj, 'normaliser': normaliser})
