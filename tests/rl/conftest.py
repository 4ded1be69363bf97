import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import csrm_jax
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import config, transformer
from csrm_jax.models.sampling import Sampling
from csrm_jax.rl import algorithms, job, learner, rollout
from csrm_jax.safety import schema
from csrm_jax.text import tokenizer as tokenizer_lib
from csrm_jax.train import step as training

SAFETY = schema.SafetyConfig((schema.Category('Wine', 'No wine.'),), 'wine')
SETTINGS = job.Settings(
  num_steps=4,
  log_every=1,
  checkpoint_every=2,
  samples_every=2,
  num_samples=3,
  num_prompts=2,
  num_generations=4,
  num_iterations=1,
  num_mini_batches=1,
  num_microbatches=1,
  # Many stop, so that lengths differ.
  sampling=Sampling(max_completion_length=6, stop_ids=tuple(range(0, 500, 2))),
  rollout_dtype='',
  gamma=1.0,
  lam=0.95,
  kl_target=None,
  kl_horizon=10_000,
  normalise_rewards=False,
  mask_truncated=False,
  stop_kl=None,
  stop_reward_drop=None,
  look_every=0,
  seed=0,
)


@pytest.fixture(scope='session')
def tokenizer():
  package = pathlib.Path(csrm_jax.__file__).parent
  return tokenizer_lib.load_tokenizer(str(package / 'ruleworld' / 'tokenizer.model'))


@pytest.fixture(scope='session')
def policy(tokenizer):
  model = config.ModelConfig(
    vocab_size=tokenizer.vocab_size,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    context_length=96,
  )
  return rollout.Policy(model, tokenizer, ('', '\n'))


@pytest.fixture(scope='session')
def prompts():
  texts = ('Tell me about tea.', 'Hi.', 'What is a steroid, in one line?')
  return [
    schema.Prompt(f'p{i}', (schema.Message('user', text),), SAFETY) for i, text in enumerate(texts)
  ]


def _length_reward(samples):
  """Long texts are better; not integers, and two parts."""
  totals = np.array([len(s.text) / 7 for s in samples], np.float32)
  return totals, {'length': totals, 'stop': np.array([s.stopped for s in samples], np.float32)}


@pytest.fixture(scope='session')
def length_reward():
  return _length_reward


@pytest.fixture(scope='session')
def settings():
  return SETTINGS


@pytest.fixture
def make_job(policy, prompts, tmp_path):
  """Returns (job, first state) of a run with these changes."""

  def make(
    workdir='run',
    algorithm='reinforce_pp',
    reward_fn=_length_reward,
    objective=(),
    lr=1e-2,
    **changes,
  ):
    settings = dataclasses.replace(SETTINGS, **changes)
    row = algorithms.get(algorithm)
    loss = algorithms.make_objective(algorithm, max_completion_length=6, **dict(objective))
    params = transformer.init_params(policy.model, 0)
    reference = (policy.model, jax.tree.map(lambda x: x.copy(), params))
    if row.needs_values:
      params |= rollout.init_value_head(policy.model)
    mesh = mesh_lib.make_mesh()
    optimizer = training.make_optimizer(
      settings.num_steps,
      lr=lr,
      warmup_steps=0,
      b1=0.9,
      b2=0.95,
      weight_decay=0.0,
      clip_norm=1.0,
      end_lr_fraction=0.1,
    )
    state = training.init_state(params, optimizer)
    shardings = mesh_lib.shardings(state, mesh)
    step_fn = training.make_train_step(
      learner.make_loss_fn(
        policy, loss, settings.sampling.temperature, value_clip=0.2, vf_coef=0.1
      ),
      optimizer,
      settings.num_microbatches,
      shardings,
    )
    folder = tmp_path / workdir
    folder.mkdir(exist_ok=True)
    return job.Job(
      policy,
      {},
      reference,
      row,
      loss,
      prompts,
      reward_fn,
      step_fn,
      mesh,
      mesh,
      folder,
      settings,
      {'kind': 'policy'},
    ), jax.device_put(state, shardings)

  return make
