import dataclasses

import pytest

from csrm_jax.rl import algorithms
from csrm_jax.rl.advantages import ADVANTAGES
from csrm_jax.rl.algorithms import ALGORITHMS, check, make_objective

OFFLINE = ('distillation', 'dpo')
ONLINE = tuple(ADVANTAGES)


def test_the_table_has_every_algorithm():
  assert set(ALGORITHMS) == {*OFFLINE, *ONLINE}
  for name, algorithm in ALGORITHMS.items():
    assert algorithm.online == (name in ONLINE)
    assert algorithm.advantage is ADVANTAGES.get(name)
  assert [name for name, row in ALGORITHMS.items() if row.needs_values] == ['ppo']


@pytest.mark.parametrize('name', ALGORITHMS)
def test_defaults_go_together(name):
  objective = make_objective(name, **({'max_completion_length': 32} if name in ONLINE else {}))
  check(name, objective, num_generations=2)
  assert (objective is None) == (name in OFFLINE)


def test_defaults_are_the_algorithm_s():
  assert make_objective('reinforce_pp').kl_place == 'reward'
  assert make_objective('reinforce_pp').kl_estimator == 'k1'
  grpo = make_objective('grpo', kl_coef=None, epsilon_high=0.28)
  assert dataclasses.asdict(grpo) == {
    'epsilon': 0.2,
    'epsilon_high': 0.28,
    'dual_clip': None,
    'ratio': 'token',
    'loss_aggregation': 'seq-mean-token-mean',
    'kl_place': 'loss',
    'kl_estimator': 'k3',
    'kl_coef': 0.01,
    'max_completion_length': None,
  }
  dr_grpo = make_objective('dr_grpo', max_completion_length=64)
  assert dr_grpo.loss_aggregation == 'seq-mean-token-sum-norm'


def test_another_place_of_the_kl_takes_the_estimator_that_is_right_there():
  assert make_objective('reinforce_pp', kl_place='loss').kl_estimator == 'k2'
  assert make_objective('grpo', kl_place='reward').kl_estimator == 'k1'
  assert make_objective('grpo', kl_place='loss').kl_estimator == 'k3'
  assert make_objective('grpo', kl_place='none').kl_coef == 0
  with pytest.raises(ValueError, match=r"kl_estimator='k3'.*'reward'.*k1"):
    make_objective('grpo', kl_place='reward', kl_estimator='k3')


def test_sequence_ratio_takes_the_aggregation_that_is_right_for_it():
  objective = make_objective('rloo', ratio='sequence')
  assert objective.loss_aggregation == 'seq-mean-token-mean'
  check('rloo', objective, 4)


@pytest.mark.parametrize('name', [name for name, row in ALGORITHMS.items() if row.needs_group])
def test_a_group_baseline_needs_a_group(name):
  objective = make_objective(name, **({'max_completion_length': 32} if name in ONLINE else {}))
  with pytest.raises(ValueError, match=f'num_generations=1 .*{name}.* 2, or'):
    check(name, objective, num_generations=1)


@pytest.mark.parametrize(
  'name, objective, settings, match',
  [
    ('reinforce_pp', {}, {'num_generations': 0}, 'at least 1'),
    ('reinforce_pp', {}, {'gamma': 1.1}, r'gamma=1.1 must lie in \(0, 1\]'),
    ('ppo', {}, {'lam': -0.1}, r'lam=-0.1 in \[0, 1\]'),
    ('grpo', {}, {'gamma': 0.9}, 'gamma=0.9 does nothing in grpo'),
    ('reinforce_pp', {}, {'lam': 0.9}, 'lam=0.9 does nothing in reinforce_pp'),
    ('grpo', {}, {'kl_target': 0.1}, "kl_target=0.1.*kl_place='loss'"),
    ('rloo', {'kl_place': 'none'}, {'kl_target': 0.1}, "kl_place='none'"),
    ('distillation', None, {'kl_target': 0.1}, "kl_place='none'"),
    ('rloo', {'kl_coef': 0.0}, {'kl_target': 0.1}, 'kl_coef=0.0'),
    ('rloo', {}, {'kl_target': 0.0}, 'kl_target=0.0.*positive'),
    ('distillation', {}, {}, 'takes no objective'),
    ('grpo', None, {}, 'needs an objective'),
    ('dr_grpo', {'loss_aggregation': 'seq-mean-token-mean'}, {}, 'length bias'),
    ('reinforce_pp', {'ratio': 'sequence'}, {}, 'put the KL into the loss'),
    ('reinforce_pp', {'ratio': 'sequence', 'kl_place': 'loss'}, {'gamma': 0.9}, 'at gamma=1'),
    ('ppo', {'ratio': 'sequence', 'kl_place': 'loss'}, {}, "ratio='token'"),
  ],
)
def test_what_does_not_go_together_is_refused(name, objective, settings, match):
  if objective is not None:
    made = name if ALGORITHMS[name].online else 'rloo'
    objective = make_objective(made, **objective)
  with pytest.raises(ValueError, match=match) as error:
    check(name, objective, **({'num_generations': 4} | settings))
  assert '\n' not in str(error.value)


def test_what_differs_by_one_setting_from_a_refused_run_is_not():
  check('reinforce_pp', make_objective('reinforce_pp'), 1, gamma=0.9)
  check('ppo', make_objective('ppo'), 1, gamma=0.9, lam=0.8, kl_target=0.1)
  check('reinforce_pp', make_objective('reinforce_pp', ratio='sequence', kl_place='loss'), 1)
  check('distillation', None, 100)


def test_unknown_names_and_idle_settings_are_refused():
  with pytest.raises(ValueError, match=r"algorithm='gpro' must be.*grpo"):
    algorithms.get('gpro')
  with pytest.raises(ValueError, match=r'epsilon=0\.1 does nothing in dpo'):
    make_objective('dpo', epsilon=0.1)


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
