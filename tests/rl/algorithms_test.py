import dataclasses
import pathlib

import pytest

from csrm_jax import config as config_lib
from csrm_jax.rl import algorithms
from csrm_jax.rl.algorithms import ALGORITHMS

RL = config_lib.load_module(pathlib.Path(__file__).parents[2] / 'configs' / 'rl.py')
OFFLINE = ('distillation', 'dpo')
ONLINE = tuple(name for name in ALGORITHMS if name not in OFFLINE)


def _config(name, **overrides):
  """Returns the run's config with changes such as loss__gamma."""
  config = RL.get_config(f'reward=oracle,algorithm={name}')
  config_lib.set_overrides(
    config, {key.replace('__', '.'): value for key, value in overrides.items()}
  )
  return config


def _made(name, **overrides):
  config = _config(name, **overrides)
  algorithms.check_idle(config)
  return algorithms.make_objective(config)


def test_the_table_has_every_algorithm():
  assert len(ONLINE) == 6
  for name, algorithm in ALGORITHMS.items():
    assert algorithm.online == (name in ONLINE)
    assert (algorithm.pair_loss is None) == algorithm.online
  assert [name for name, row in ALGORITHMS.items() if row.needs_values] == ['ppo']


def test_defaults_are_the_algorithm_s():
  assert _made('reinforce_pp').kl_place == 'reward'
  assert _made('reinforce_pp').kl_estimator == 'k1'
  grpo = _made('grpo', loss__epsilon_high=0.28)
  assert dataclasses.asdict(grpo) == {
    'epsilon': 0.2,
    'epsilon_high': 0.28,
    'dual_clip': None,
    'ratio': 'token',
    'loss_aggregation': 'seq-mean-token-mean',
    'kl_place': 'loss',
    'kl_estimator': 'k3',
    'kl_coef': 0.02,
    'max_completion_length': 44,
  }
  assert _made('dr_grpo').loss_aggregation == 'seq-mean-token-sum-norm'


def test_another_place_of_the_kl_takes_the_estimator_that_is_right_there():
  assert _made('reinforce_pp', loss__kl_place='loss').kl_estimator == 'k2'
  assert _made('grpo', loss__kl_place='reward').kl_estimator == 'k1'
  assert _made('grpo', loss__kl_place='loss').kl_estimator == 'k3'
  assert _made('grpo', loss__kl_place='none', loss__kl_coef=0.0).kl_coef == 0
  with pytest.raises(ValueError, match=r"kl_estimator='k3'.*'reward'.*k1"):
    _made('grpo', loss__kl_place='reward', loss__kl_estimator='k3')


def test_sequence_ratio_takes_the_aggregation_that_is_right_for_it():
  assert _made('rloo', loss__ratio='sequence').loss_aggregation == 'seq-mean-token-mean'


@pytest.mark.parametrize('name', [name for name, row in ALGORITHMS.items() if row.needs_group])
def test_a_group_baseline_needs_a_group(name):
  with pytest.raises(ValueError, match=f'num_generations=1 .*{name}.* 2, or'):
    _made(name, rollout__num_generations=1)


@pytest.mark.parametrize(
  'name, changes, match',
  [
    ('reinforce_pp', {'rollout__num_generations': 0}, 'at least 1'),
    ('reinforce_pp', {'loss__gamma': 1.1}, r'gamma=1.1 must lie in \(0, 1\]'),
    ('reinforce_pp', {'loss__gamma': 0.0}, r'gamma=0.0 must lie in \(0, 1\]'),
    ('ppo', {'loss__lam': -0.1}, r'lam=-0.1 in \[0, 1\]'),
    ('grpo', {'loss__gamma': 0.9}, 'gamma=0.9 does nothing in grpo'),
    ('reinforce_pp', {'loss__lam': 0.9}, 'lam=0.9 does nothing in reinforce_pp'),
    ('grpo', {'loss__kl_target': 0.1}, "kl_target=0.1.*kl_place='loss'"),
    (
      'rloo',
      {'loss__kl_place': 'none', 'loss__kl_coef': 0.0, 'loss__kl_target': 0.1},
      "kl_place='none'",
    ),
    ('distillation', {'loss__kl_target': 0.1}, 'kl_target=0.1 does nothing in distillation'),
    ('dpo', {'loss__epsilon': 0.1}, r'epsilon=0\.1 does nothing in dpo, which learns from pairs'),
    ('rloo', {'loss__kl_coef': 0.0, 'loss__kl_target': 0.1}, 'kl_coef=0.0'),
    ('rloo', {'loss__kl_target': 0.0}, 'kl_target=0.0.*positive'),
    ('dr_grpo', {'loss__loss_aggregation': 'seq-mean-token-mean'}, 'length bias'),
    ('reinforce_pp', {'loss__ratio': 'sequence'}, 'put the KL into the loss'),
    (
      'reinforce_pp',
      {'loss__ratio': 'sequence', 'loss__kl_place': 'loss', 'loss__gamma': 0.9},
      'at gamma=1',
    ),
    ('ppo', {'loss__ratio': 'sequence', 'loss__kl_place': 'loss'}, "ratio='token'"),
    ('grpo', {'pairs__beta': 0.1}, 'pairs.beta=0.1 does nothing in grpo'),
    ('grpo', {'reward__url': 'http://x'}, 'reward.url=http://x does nothing without reward=http'),
    ('grpo', {'algorithm': 'dpo'}, 'does nothing in dpo'),
    ('dpo', {'algorithm': 'grpo', 'pairs': None}, 'rollout is empty: choose the algorithm'),
  ],
)
def test_what_does_not_go_together_is_refused(name, changes, match):
  config = _config(name)
  with pytest.raises(ValueError, match=match) as error:
    if 'pairs' in changes:  # as if all had been emptied
      changes = changes | {f'pairs__{key}': None for key in config.pairs}
      del changes['pairs']
    _made(name, **changes)
  assert '\n' not in str(error.value)


def test_what_differs_by_one_setting_from_a_refused_run_is_not():
  _made('reinforce_pp', rollout__num_generations=1, loss__gamma=0.9)
  _made('ppo', rollout__num_generations=1, loss__gamma=0.9, loss__lam=0.8, loss__kl_target=0.1)
  _made('reinforce_pp', loss__ratio='sequence', loss__kl_place='loss')


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match=r"algorithm='gpro' must be.*grpo"):
    algorithms.get('gpro')


def test_adaptive_kl_by_hand():
  def step(measured):
    return algorithms.adaptive_kl(0.02, measured, 0.1, 1000, 50)

  assert step(0.1) == 0.02
  assert step(0.11) == pytest.approx(0.02 * (1 + 0.1 * 0.05))
  assert step(0.09) == pytest.approx(0.02 * (1 - 0.1 * 0.05))
  assert step(9.0) == pytest.approx(0.02 * 1.01)  # at most 0.2
  assert step(-1.0) == pytest.approx(0.02 * 0.99)


def test_adaptive_kl_refuses_what_it_cannot_use():
  with pytest.raises(ValueError, match='measured_kl=nan'):
    algorithms.adaptive_kl(0.02, float('nan'), 0.1, 1000, 50)
  with pytest.raises(ValueError, match=r'kl_horizon=10.*50 completions'):
    algorithms.adaptive_kl(0.02, 0.1, 0.1, 10, 50)
