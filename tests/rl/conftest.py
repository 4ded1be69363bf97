import pathlib

import jax
import numpy as np
import pytest

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import config, transformer
from csrm_jax.rl import algorithms, online
from csrm_jax.runners import align
from csrm_jax.safety import schema
from csrm_jax.text import tokenizer as tokenizer_lib

SAFETY = schema.SafetyConfig((schema.Category('Wine', 'No wine.'),), 'wine')
RL = config_lib.load_module(pathlib.Path(__file__).parents[2] / 'configs' / 'rl.py')


def make_config(algorithm, **changes):
  """Returns the config of a run with changes such as loss__gamma."""
  config = RL.get_config(f'reward=oracle,algorithm={algorithm}')
  config_lib.set_overrides(
    config, {key.replace('__', '.'): value for key, value in changes.items()}
  )
  return config


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
  return online.Policy(model, tokenizer, ('', '\n'))


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
def make_run_config():
  return make_config


SMALL = {
  'num_steps': 4,
  'checkpoint_every': 2,
  'rollout__samples_every': 2,
  'rollout__num_samples': 3,
  'rollout__num_prompts': 2,
  'rollout__num_generations': 4,
  'loss__num_mini_batches': 1,
  'loss__kl_coef': 0.01,
  'optim__lr': 1e-2,
  'optim__warmup_steps': 0,
  'eval__every': 0,
  'sampling__max_completion_length': 6,
}


@pytest.fixture
def make_work(policy, prompts, tmp_path):
  """Returns (work, first state) of an online run with these changes."""

  def make(
    workdir='run',
    algorithm='reinforce_pp',
    reward_fn=_length_reward,
    # Many stop, so that lengths differ.
    stop_ids=tuple(range(0, 500, 2)),
    **changes,
  ):
    config = make_config(algorithm, **(SMALL | changes))
    params = transformer.init_params(policy.model, 0)
    reference = (policy.model, jax.tree.map(lambda x: x.copy(), params))
    if algorithms.get(algorithm).needs_values:
      params |= online.init_value_head(policy.model)
    mesh = mesh_lib.make_mesh()
    step_fn, state = align.make_step(config, policy, params, mesh)
    folder = tmp_path / workdir
    folder.mkdir(exist_ok=True)
    sampling = align.make_sampling(config, stop_ids)
    work = online.Online(
      config, policy, {}, reference, prompts, reward_fn, step_fn, sampling, mesh, mesh, folder
    )
    work.violates = lambda samples, parts: np.array([s.num_tokens % 2 == 1 for s in samples])
    return work, state

  return make
