"""Rewards: values, combinations, and what is refused."""

import dataclasses
import json
import math
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.reward import model as reward_model, scoring
from csrm_jax.rl import rewards, verifiers
from csrm_jax.ruleworld import policy as world
from csrm_jax.safety import augment, schema
from csrm_jax.safety.schema import Prompt, Sample
from tests import small

ROOT = pathlib.Path(__file__).parents[2]
RULES = schema.SafetyConfig((schema.Category('Cats', 'No cats.'),))


def make_samples(num, num_tokens=3, stopped=True):
  prompt = Prompt('p', (schema.Message('user', 'Hello.'),), RULES)
  return [Sample(prompt, i, f'Reply {i}.', num_tokens, stopped) for i in range(num)]


def score_fn(values):
  return lambda examples: np.array(values[: len(examples)], np.float32)


def constant(*values):
  return rewards.from_callable(lambda samples: list(values))


def test_safety_and_helpfulness_transform_the_score():
  samples = make_samples(3)
  scores = [0.3, -1.7, 4.0]
  sigmoid = [1 / (1 + math.exp(-(2 * s - 0.5))) for s in scores]
  reward = rewards.safety_reward(score_fn(scores), 2.0, -0.5)(samples)
  assert reward.dtype == np.float32
  np.testing.assert_allclose(reward, sigmoid, rtol=1e-6)
  help_ = rewards.helpfulness_reward(score_fn(scores), 2.0, -0.5)(samples)
  assert help_.dtype == np.float32
  np.testing.assert_allclose(help_, [1 + 4 * p for p in sigmoid], rtol=1e-6)


def test_a_reward_comes_with_the_share_that_was_not_read(monkeypatch):
  num_asked = 0

  def judge(examples):
    nonlocal num_asked
    num_asked += 1
    tokens = np.array([len(e.conversation[-1].content) for e in examples])
    scores, outside = np.zeros(len(tokens), np.float32), small.unmarked(tokens)
    return scoring.Judged(scores, 2 * tokens, tokens, tokens > 0, outside)

  rm = types.SimpleNamespace(score_fn=scoring.ScoreFn(judge), spec=small.SPEC)
  monkeypatch.setattr(reward_model, 'load', lambda *args, **options: rm)
  rewards._load.cache_clear()
  config = config_lib.load_module(ROOT / 'configs' / 'rl.py').get_config('checkpoint=rm')
  scorers = rewards.make_scorers(config)
  prompt = world.prompts(0, 1, 'film club', 'train')[0]
  samples = [dataclasses.replace(s, prompt=prompt) for s in make_samples(2)]
  total, parts = scorers.total(samples)
  # RuleWorld counts violations by the truth, others by the model, which has answered already.
  assert not scorers.violates(samples, parts).any()
  config.data.source, config.reward.helpfulness = 'jsonl', 'none'
  assert rewards.make_scorers(config).violates(samples, parts).all()
  rewards._load.cache_clear()
  assert parts['unread'].tolist() == [0.5, 0.5] and num_asked == 1
  np.testing.assert_allclose(total, parts['safety'] * parts['helpfulness'], rtol=1e-6)


@pytest.mark.parametrize(
  'values',
  [
    [True, 0.5],
    np.array([True, False]),
    [0.5, np.bool_(True)],
    np.ma.masked_array([0.5, 1.0], [True, False]),
    np.array([0.5, 1j]),
    [np.complex64(1), 0.5],
    [[0.5], [1.0]],
    ['1', '2'],
  ],
)
def test_what_is_no_number_is_no_reward(values):
  small.error_of(rewards.check_rewards, values, make_samples(2), 'mine')


def test_the_log_of_a_reward_is_finite_however_low_the_score():
  reward = rewards.safety_reward(score_fn([-1e4, 1e4]), 5.0)(make_samples(2))
  assert np.isfinite(np.log(reward)).all() and reward[1] == 1


def test_a_reward_model_judges_the_completion_under_the_rules_that_are_given():
  seen = []

  def remember(examples):
    seen.extend(examples)
    return np.zeros(len(examples), np.float32)

  samples = make_samples(1)
  rewards.safety_reward(remember)(samples)
  rewards.helpfulness_reward(remember, safety=augment.NO_RULES)(samples)
  assert [e.safety for e in seen] == [RULES, augment.NO_RULES]
  assert [m.content for m in seen[0].conversation] == ['Hello.', 'Reply 0.']
  assert seen[0].id == 'p#0'


@pytest.mark.parametrize('a, b', [(0, 0), (-1, 0), (math.nan, 0), (1, math.inf)])
def test_transforms_that_mean_nothing_are_refused(a, b):
  with pytest.raises(ValueError, match='slope above 0'):
    rewards.safety_reward(score_fn([]), a, b)


def test_format_reward():
  samples = make_samples(2)
  good = '<safety_reasoning>Fine.</safety_reasoning><answer>Yes.</answer>'
  samples[0] = Sample(samples[0].prompt, 0, good, 9, True)
  reward = verifiers.format_reward(samples)
  assert reward.dtype == np.float32 and reward.tolist() == [1, 0]


def test_the_overlong_penalty_is_in_tokens():
  reward = rewards.overlong_penalty(4, 0.5, 10)
  samples = [s for n in (5, 6, 7, 9, 10) for s in make_samples(1, n)]
  values = reward(samples + make_samples(1, 10, stopped=False))
  assert values.dtype == np.float32
  np.testing.assert_allclose(values, [0, 0, -0.125, -0.375, -0.5, -0.5])


@pytest.mark.parametrize(
  'buffer, penalty, says',
  [
    (0, 1.0, 'leave the penalty out'),
    (11, 1.0, 'from 1 to the 10'),
    (2, 0.0, 'above 0'),
    (2, math.nan, 'above 0'),
  ],
)
def test_overlong_penalties_that_do_nothing_are_refused(buffer, penalty, says):
  with pytest.raises(ValueError, match=says):
    rewards.overlong_penalty(buffer, penalty, 10)


def test_product_with_exponents_and_what_is_added():
  samples = make_samples(2)
  total = rewards.combine(
    {'R': (constant(0.5, 0.25), 1), 'H': (constant(4.0, 2.25), 0.5)},
    added={'long': (constant(-1.0, 0.0), 0.25), 'log': (constant(7, 7), 0)},
  )
  value, parts = total(samples)
  assert value.dtype == np.float32
  np.testing.assert_allclose(value, [0.5 * 2 - 0.25, 0.25 * 1.5], rtol=1e-6)
  assert {name: p.tolist() for name, p in parts.items()} == {
    'R': [0.5, 0.25],
    'H': [4.0, 2.25],
    'long': [-1.0, 0.0],
    'log': [7.0, 7.0],
  }


def test_sum_and_clip():
  parts = {'R': (constant(0.7, -3.0), 2.0), 'H': (constant(0.1, 0.1), -1.0)}
  value, _ = rewards.combine(parts, 'sum', clip=(-1, 1.2))(make_samples(2))
  assert value.dtype == np.float32
  np.testing.assert_allclose(value, [1.2, -1.0], rtol=1e-6)


@pytest.mark.parametrize(
  'kwargs, says',
  [
    ({'parts': {}}, 'at least one'),
    ({'mode': 'mean'}, 'product, sum'),
    ({'mode': 'sum', 'added': {'F': (constant(1), 1)}}, 'among the parts'),
    ({'added': {'R': (constant(1), 1)}}, 'given twice'),
    ({'parts': {'R': (constant(1), math.nan)}}, 'weight nan'),
    ({'clip': (1, 1)}, 'less than'),
  ],
)
def test_combinations_that_mean_nothing_are_refused(kwargs, says):
  with pytest.raises(ValueError, match=says):
    rewards.combine(**({'parts': {'R': (constant(1), 1)}} | kwargs))


def test_a_total_that_is_not_finite_names_the_sample():
  total = rewards.combine({'R': (constant(1.0, -2.0), 0.5)})
  with pytest.raises(ValueError, match='p#1: reward total is nan'):
    total(make_samples(2))


def test_integers_are_refused_and_not_rounded():
  total = rewards.combine({'R': (lambda samples: np.zeros(2, np.int32), 1)})
  with pytest.raises(ValueError, match='R gives int32, not float32'):
    total(make_samples(2))


@pytest.mark.parametrize(
  'values, says',
  [
    ([0.7, None], 'p#1: reward mine is None'),
    ([math.nan, 1.0], 'p#0: reward mine is nan'),
    ([1.0, math.inf], 'p#1: reward mine is inf'),
    ([1.0, 1e39], 'p#1: reward mine is 1e'),
    ([1.0, '0.5'], "p#1: reward mine is '0.5'"),
    (np.array([[1.0], [2.0]]), 'p#0: reward mine is a list of 1'),
    ([1.0], '1 numbers for 2 samples .the first is p#0'),
    ([1.0] * 3, '3 numbers for 2 samples'),
    (None, 'gives None'),
    (0.5, 'gives 0.5'),
    ('no', "gives 'no'"),
    ({0: 1.0, 1: 1.0}, 'gives a dict'),
  ],
  ids=str,
)
def test_what_a_callable_may_not_give(values, says):
  reward = rewards.from_callable(lambda samples: values, 'mine')
  with pytest.raises(ValueError, match=says) as error:
    reward(make_samples(2))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'values', [[0.7, 2], (0.7, 2), np.array([0.7, 2.0]), jnp.array([0.7, 2.0])], ids=str
)
def test_what_a_callable_may_give(values):
  reward = rewards.from_callable(lambda samples: values)(make_samples(2))
  assert reward.dtype == np.float32
  np.testing.assert_allclose(reward, [0.7, 2.0], rtol=1e-6)
  assert rewards.from_each(lambda s: s.index / 2, 'oracle')(make_samples(3)).tolist() == [0, 0.5, 1]


def test_the_normaliser_is_that_of_all_rewards_seen():
  rng = np.random.default_rng(0)
  batches = [rng.normal(100, 0.5, n).astype(np.float32) for n in (3, 50, 1)]
  state = rewards.Normaliser()
  for batch in batches:
    # As through a checkpoint.
    state = rewards.Normaliser(**json.loads(json.dumps(dataclasses.asdict(state.update(batch)))))
  seen = np.concatenate(batches).astype(np.float64)
  assert state.count == 54
  np.testing.assert_allclose([state.mean, state.std], [seen.mean(), seen.std()], rtol=1e-9)
  out = state.apply(batches[1])
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, (batches[1] - seen.mean()) / seen.std(), rtol=1e-5, atol=1e-5)
  assert state.update(np.zeros(0)) == state


def test_equal_rewards_are_normalised_to_zero():
  same = np.full(7, 0.1, np.float32)
  state = rewards.Normaliser().update(same).update(same)
  assert state.apply(same).tolist() == [0] * 7
  assert rewards.Normaliser().apply(same).tolist() == [0] * 7


def test_an_attack_is_rewarded_where_the_model_is_fooled():
  samples, parts = make_samples(3), {}
  parts['safety'] = constant(0.9, 0.8, 0.1), 1.0
  message = small.error_of(rewards.combine, parts, 'attack')
  assert "needs a second judge: RuleWorld's oracle" in message
  parts['true_unsafe'] = constant(0, 1, 1), 0.0
  total, values = rewards.combine(parts, 'attack')(samples)
  np.testing.assert_allclose(total, [0, 0.8, 0.1], rtol=1e-6)
  # With the part that is only logged, the product is what it was.
  np.testing.assert_array_equal(rewards.combine(parts)(samples)[0], values['safety'])
