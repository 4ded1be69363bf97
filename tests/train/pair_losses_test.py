"""The tables of pair and label losses: where they are the old loss, and gradients by loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.train import losses

RNG = np.random.default_rng(0)
GAPS, STRENGTHS = RNG.normal(size=6) * 3, RNG.uniform(0.5, 3, 6)
TARGETS = np.array([1, 1, 0.5, 0.9, 0.2, 1])


def _sigmoid(x):
  return 1 / (1 + math.exp(-x))


# Each as a function of one pair in float64, with the knobs' defaults or those named.
LOOPS = {
  'bt': lambda g, m, q: -math.log(_sigmoid(g)),
  'margin:step=0.5': lambda g, m, q: -math.log(_sigmoid(g - 0.5 * m)),
  'scaled': lambda g, m, q: -m * math.log(_sigmoid(g)),
  'soft:smoothing=0.2,tie=0.5': lambda g, m, q: (
    (0.5 if q == 0.5 else 1)
    * (-(0.8 * q + 0.1) * math.log(_sigmoid(g)) - (1 - 0.8 * q - 0.1) * math.log(_sigmoid(-g)))
  ),
  'dynamic': lambda g, m, q: -math.log(_sigmoid(max(1 + 0.5 * (1 - math.exp(-0.5 * m)), 1e-3) * g)),
}
LABEL_LOOPS = {
  'nll': lambda p, o: -p,
  'smooth': lambda p, o: -0.95 * p - 0.05 * o,
  'brier': lambda p, o: (1 - math.exp(p) / (math.exp(p) + math.exp(o))) ** 2,
}


def _choose(name, table=losses.PAIR_LOSSES):
  return config_lib.choose('config.loss.pair', table, name)


def _slopes(function, rows):
  """Returns the derivative of each row's loss by its first argument, in float64."""
  eps = 1e-6
  return [(function(x + eps, *rest) - function(x - eps, *rest)) / (2 * eps) for x, *rest in rows]


@pytest.mark.parametrize('name', LOOPS)
def test_a_pair_loss_and_its_gradient_are_those_of_a_loop_in_float64(name):
  rows = list(zip(GAPS, STRENGTHS, TARGETS, strict=True))
  fn, arrays = _choose(name), [jnp.asarray(x, jnp.float32) for x in (GAPS, STRENGTHS, TARGETS)]
  np.testing.assert_allclose(fn(*arrays), [LOOPS[name](*row) for row in rows], rtol=1e-5)
  slopes = jax.grad(lambda gap: fn(gap, *arrays[1:]).sum())(arrays[0])
  np.testing.assert_allclose(slopes, _slopes(LOOPS[name], rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', LABEL_LOOPS)
def test_a_label_loss_and_its_gradient_are_those_of_a_loop_in_float64(name):
  log_p, other = np.log(RNG.uniform(0.05, 0.9, (2, 5)))
  fn = _choose(name, losses.LABEL_LOSSES)
  rows = list(zip(log_p, other, strict=True))
  np.testing.assert_allclose(fn(log_p, other), [LABEL_LOOPS[name](*row) for row in rows], rtol=1e-5)
  slopes = jax.grad(lambda x: fn(x, jnp.asarray(other)).sum())(jnp.asarray(log_p))
  np.testing.assert_allclose(slopes, _slopes(LABEL_LOOPS[name], rows), rtol=1e-3, atol=1e-6)


def test_every_row_is_tested_here_and_named_in_the_config():
  assert {name.partition(':')[0] for name in LOOPS} == set(losses.PAIR_LOSSES)
  assert set(losses.PAIR_READS) == set(losses.PAIR_LOSSES)
  assert set(LABEL_LOOPS) == set(losses.LABEL_LOSSES)
  text = (config_lib.CONFIGS / 'rm.py').read_text()
  for table in (losses.PAIR_LOSSES, losses.LABEL_LOSSES):
    for name, row in table.items():
      known = ', '.join(f'{knob}={value}' for knob, value in config_lib.knobs(row).items())
      assert name in text and (not known or f'({known})' in text)


# The setting at which each is Bradley–Terry.
SAME = ('margin:step=0', 'scaled', 'soft', 'dynamic:weight=0')


def _batch(extra=()):
  batch = {
    'label': np.array([[0, -1, -1, 1]], np.int32),
    'label_weight': np.array([[1, 0, 0, 1]], np.float32),
    'pair_weight': np.array([[0, 1, 0, 0]], np.float32),
  }
  return batch | {name: np.ones((1, 4), np.float32) for name in extra}


@pytest.mark.parametrize('name', SAME)
def test_without_side_information_loss_and_gradients_stay_bit_for_bit(name):
  assert {s.partition(':')[0] for s in SAME} == set(losses.PAIR_LOSSES) - {'bt'}
  scores = jnp.asarray([[0.7, -1.3, 0.4, 2.0]])

  def total(scores, batch, **losses_of):
    log_p = jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)
    return losses.reward_model_loss(*log_p, batch, 0.3, 0.1, **losses_of)[0]

  step = jax.jit(jax.value_and_grad(total), static_argnames=('pair_loss', 'label_loss'))
  was = step(scores, _batch())
  ones = _batch(('pair_strength', 'pair_target'))
  now = step(scores, ones, pair_loss=_choose(name), label_loss=_choose('nll', losses.LABEL_LOSSES))
  for one, other in zip(was, now, strict=True):
    np.testing.assert_array_equal(one, other)


def test_descent_draws_a_tie_together_and_orders_by_the_target():
  batch = _batch(('pair_strength', 'pair_target'))

  def gap_after(target, scores):
    batch['pair_target'] = np.full((1, 4), target, np.float32)

    def total(scores):
      log_p = jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)
      return losses.reward_model_loss(*log_p, batch, 1.0, 0.0, pair_loss=losses.soft)[0]

    descend = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, x: x - jax.grad(total)(x), x))
    scores = descend(scores)
    return float(scores[0, 1] - scores[0, 2])

  scores = jnp.asarray([[0.0, 1.5, -0.5, 0.0]])
  assert abs(gap_after(0.5, scores)) < 1e-3
  assert gap_after(0.9, scores) == pytest.approx(math.log(9), abs=1e-2)


def test_weights_and_targets_scale_as_a_loop_says():
  """Two pairs of other weights in one row, in float64."""
  batch = {
    'label': np.full((1, 4), -1, np.int32),
    'label_weight': np.zeros((1, 4), np.float32),
    'pair_weight': np.array([[2, 0, 0.5, 0]], np.float32),
    'pair_strength': np.array([[3, 0, 1, 0]], np.float32),
    'pair_target': np.array([[1, 0, 1, 0]], np.float32),
  }
  scores = np.array([0.3, -0.2, -1.0, 0.4])
  log_p = jax.nn.log_sigmoid(jnp.asarray([scores])), jax.nn.log_sigmoid(-jnp.asarray([scores]))
  total, weight, metrics = losses.reward_model_loss(
    *log_p, batch, 0.5, 0.0, pair_loss=losses.scaled
  )
  want = 2 * 3 * -math.log(_sigmoid(0.5)) + 0.5 * -math.log(_sigmoid(-1.4))
  np.testing.assert_allclose(total, 0.5 * want, rtol=1e-6)
  assert weight == 2.5
  np.testing.assert_allclose(metrics['pairs/accuracy'], (2, 2.5))


@pytest.mark.parametrize(
  'text, said',
  [
    ('scale', 'must be one of bt, margin, scaled, soft, dynamic'),
    ('soft:smoth=1', "'smoth' is unknown (did you mean smoothing"),
    ('soft:smoothing=much', "'much' is not of type float"),
  ],
)
def test_a_name_or_knob_that_is_unknown_is_one_line(text, said):
  with pytest.raises(ValueError) as error:
    _choose(text)
  assert said in str(error.value) and str(error.value).startswith('config.loss.pair=')
