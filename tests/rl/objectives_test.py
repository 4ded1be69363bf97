import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import sampling
from csrm_jax.rl import objectives
from csrm_jax.train import step as training

Objective = functools.partial(
  objectives.Objective,
  epsilon=0.2,
  epsilon_high=0.2,
  ratio='token',
  loss_aggregation='token-mean',
  kl_place='reward',
  kl_estimator='k1',
  kl_coef=0.01,
  max_completion_length=None,
)

# (start, length) of each completion: one fills its row, one has no tokens.
SPANS = ((2, 4), (1, 5), (3, 0), (2, 1))
T = 6
OBJECTIVES = {
  'defaults': Objective(),
  'clip-higher': Objective(epsilon=0.15, epsilon_high=0.6),
  'dual clip': Objective(dual_clip=1.7),
  'grpo': Objective(
    loss_aggregation='seq-mean-token-mean', kl_place='loss', kl_estimator='k3', kl_coef=0.3
  ),
  'dr_grpo': Objective(
    loss_aggregation='seq-mean-token-sum-norm',
    max_completion_length=9,
    kl_place='loss',
    kl_estimator='k2',
    kl_coef=0.2,
  ),
  'gspo': Objective(
    ratio='sequence',
    loss_aggregation='seq-mean-token-mean',
    epsilon=0.05,
    epsilon_high=0.05,
    kl_place='none',
    kl_coef=0.0,
  ),
}


def _mask(spans=SPANS):
  mask = np.zeros((len(spans), T), np.float32)
  for row, (start, length) in enumerate(spans):
    mask[row, start : start + length] = 1
  return mask


def _batch(seed=16, dtype=np.float64):  # a seed that meets every branch
  """Returns (logprobs, batch), NaN wherever nothing may be read."""
  rng = np.random.default_rng(seed)
  mask = _mask()
  old = -rng.uniform(0.2, 3.0, mask.shape)
  arrays = {
    'logprobs': old + rng.normal(0, 0.5, mask.shape),
    'old_logprobs': old,
    'ref_logprobs': old + rng.normal(0, 0.4, mask.shape),
    'advantages': rng.normal(0, 1.3, mask.shape),
    'old_values': rng.normal(0, 1, mask.shape),
    'returns': rng.normal(0, 1, mask.shape),
  }
  arrays = {name: np.where(mask > 0, x, np.nan).astype(dtype) for name, x in arrays.items()}
  return arrays.pop('logprobs'), arrays | {'completion_mask': mask}


def _with_gradient(fn, x):
  """Returns (total, weight, metrics, gradient of the total), float64."""
  with jax.enable_x64(True):

    def total(x):
      total, *rest = fn(x)
      return total, rest

    (total, (weight, metrics)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(
      jnp.asarray(x)
    )
    return (*jax.device_get((total, weight, metrics)), np.asarray(grad))


def _differences(fn, x, mask, h=1e-6):
  """Returns the gradient of a plain function by central differences."""
  grad = np.zeros_like(x)
  for i in zip(*np.nonzero(mask), strict=True):
    above, below = x.copy(), x.copy()
    above[i] += h
    below[i] -= h
    grad[i] = (fn(above) - fn(below)) / (2 * h)
  return grad


def _aggregate(rows, objective):
  """Returns (total, weight) of the losses of tokens, one list a row."""
  rows = [row for row in rows if row]
  if objective.loss_aggregation == 'token-mean':
    return sum(sum(row) for row in rows), sum(len(row) for row in rows)
  if objective.loss_aggregation == 'seq-mean-token-mean':
    return sum(sum(row) / len(row) for row in rows), len(rows)
  length = objective.max_completion_length
  return sum(sum(row) / length for row in rows), len(rows)


def _reference_rows(logprobs, batch, objective):
  """Yields each row's list of (loss without KL, KL estimate, ratio)."""
  for b, (start, length) in enumerate(SPANS):
    columns = range(start, start + length)
    gaps = [logprobs[b, t] - batch['old_logprobs'][b, t] for t in columns]
    row = []
    for t in columns:
      gap = gaps[t - start]
      if objective.ratio == 'sequence':
        gap = sum(gaps) / length
      ratio, advantage = math.exp(gap), batch['advantages'][b, t]
      held = min(max(ratio, 1 - objective.epsilon), 1 + objective.epsilon_high)
      value = min(ratio * advantage, held * advantage)
      if objective.dual_clip is not None and advantage < 0:
        value = max(value, objective.dual_clip * advantage)
      gap = logprobs[b, t] - batch['ref_logprobs'][b, t]
      kl = {'k1': gap, 'k2': gap**2 / 2, 'k3': math.exp(-gap) - 1 + gap}
      row.append((-value, kl, ratio))
    yield row


def _reference_policy(logprobs, batch, objective):
  """Returns (total, weight) by plain loops."""
  coef = objective.kl_coef * (objective.kl_place == 'loss')
  return _aggregate(
    [
      [loss + coef * kl[objective.kl_estimator] for loss, kl, _ in row]
      for row in _reference_rows(logprobs, batch, objective)
    ],
    objective,
  )


@functools.partial(jax.jit, static_argnums=2)
def _policy(logprobs, batch, objective):
  """Returns ((total, (weight, metrics)), gradient), in float32."""

  def total(logprobs):
    total, *rest = objectives.policy_loss(logprobs, batch, objective)
    return total, rest

  return jax.value_and_grad(total, has_aux=True)(logprobs)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_policy_loss_agrees_with_loops_at_float64(name):
  objective = OBJECTIVES[name]
  logprobs, batch = _batch()
  total, weight, metrics, grad = _with_gradient(
    lambda x: objectives.policy_loss(x, batch, objective), logprobs
  )
  want, want_weight = _reference_policy(logprobs, batch, objective)
  assert total.dtype == np.float64 and weight == want_weight
  np.testing.assert_allclose(total, want, rtol=1e-12)
  np.testing.assert_allclose(
    grad,
    _differences(lambda x: _reference_policy(x, batch, objective)[0], logprobs, _mask()),
    rtol=1e-6,
    atol=1e-8,
  )
  rows = list(_reference_rows(logprobs, batch, objective))
  tokens = [token for row in rows for token in row]
  pure = _aggregate([[loss for loss, *_ in row] for row in rows], objective)
  # ref_logprobs, not old_logprobs, must be what kl/ref is about.
  for key, value in {
    'policy/loss': pure,
    'kl/ref': (sum(kl['k3'] for _, kl, _ in tokens), 10),
    'policy/ratio_mean': (sum(ratio for *_, ratio in tokens), 10),
    'policy/ratio_max': (sum(max(ratio for *_, ratio in row) for row in rows if row), 3),
    'policy/entropy': (-logprobs[_mask() > 0].sum(), 10),
  }.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-12, err_msg=key)


def test_every_branch_of_the_clipping_is_in_the_cases_above():
  logprobs, batch = _batch()
  hits = {}
  for name, objective in OBJECTIVES.items():
    (_, (_, metrics)), _ = _policy(logprobs, batch, objective)
    for key, (total, _) in metrics.items():
      hits[name, key] = float(total)
  for name in ('defaults', 'gspo'):
    assert 0 < hits[name, 'policy/clip_frac_low'] < 10
    assert 0 < hits[name, 'policy/clip_frac_high'] < 10
  assert hits['clip-higher', 'policy/clip_frac_high'] < hits['defaults', 'policy/clip_frac_high']
  assert hits['dual clip', 'policy/dual_clip_frac'] > 0
  assert ('defaults', 'policy/dual_clip_frac') not in hits


@pytest.mark.parametrize(
  'advantage, ratio, moves',
  [
    (1.0, 1.3, False),
    (1.0, 1.1, True),
    (1.0, 0.5, True),
    (-1.0, 0.7, False),
    (-1.0, 0.9, True),
    (-1.0, 2.9, True),
    (-1.0, 3.1, False),
  ],
)
def test_where_the_gradient_stops(advantage, ratio, moves):
  batch = {
    name: np.full((1, 1), value, np.float32)
    for name, value in (
      ('completion_mask', 1.0),
      ('old_logprobs', -2.0),
      ('ref_logprobs', -2.0),
      ('advantages', advantage),
    )
  }
  logprobs = np.full((1, 1), -2.0 + math.log(ratio), np.float32)
  _, grad = _policy(logprobs, batch, Objective(dual_clip=3.0))
  want = -advantage * ratio if moves else 0.0
  np.testing.assert_allclose(grad, [[want]], rtol=1e-5)


def test_gspo_ratio_is_the_geometric_mean_of_the_tokens():
  logprobs = np.float32([[0, 0.3, -0.1, 0.4, 0, 0], [0, 0.2, 0, 0, 0, 0]])
  zeros = np.zeros_like(logprobs)
  mask = np.float32([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]])
  batch = {
    'completion_mask': mask,
    'old_logprobs': zeros - 1,
    'ref_logprobs': zeros,
    'advantages': mask,
  }
  objective = Objective(ratio='sequence', loss_aggregation='seq-mean-token-mean', epsilon_high=0.5)
  (total, (weight, _)), grad = _policy(logprobs - 1, batch, objective)
  np.testing.assert_allclose(total, -2 * math.exp(0.2), rtol=1e-6)
  assert weight == 2
  np.testing.assert_allclose(grad, -math.exp(0.2) * mask / np.float32([[3], [1]]), rtol=1e-5)


def test_temperature_reaches_loss_and_gradient():
  """Logits to loss through the one log-prob function, at temperature 0.7."""
  _, batch = _batch(seed=3)
  objective, temperature = OBJECTIVES['grpo'], 0.7
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 1, (*_mask().shape, 5))
  tokens = rng.integers(5, size=_mask().shape)

  def loss(logits):
    logprobs = sampling.token_logprobs(logits, tokens, temperature)
    return objectives.policy_loss(logprobs, batch, objective)[0]

  total, grad = jax.jit(jax.value_and_grad(loss))(jnp.float32(logits))
  scaled = np.exp(logits / temperature)
  probs = scaled / scaled.sum(-1, keepdims=True)
  chosen = np.take_along_axis(probs, tokens[..., None], -1)[..., 0]
  logprobs = np.log(chosen)
  np.testing.assert_allclose(total, _reference_policy(logprobs, batch, objective)[0], rtol=1e-5)
  by_logprob = _differences(lambda x: _reference_policy(x, batch, objective)[0], logprobs, _mask())
  want = by_logprob[..., None] * (np.eye(5)[tokens] - probs) / temperature
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


# A categorical over five tokens whose probabilities are twentieths, so that 20
# rows hold each token as often as it is expected.
COUNTS = np.array([8, 5, 4, 2, 1])
THETA = np.log(COUNTS / 20)
REF = np.array([0.1, 0.3, 0.15, 0.05, 0.4])


def _kl_gradient():
  """Returns the gradient of KL(p ‖ ref) by the logits of p."""
  p = COUNTS / 20
  kl = sum(p[i] * math.log(p[i] / REF[i]) for i in range(5))
  return np.array([p[i] * (math.log(p[i] / REF[i]) - kl) for i in range(5)])


def _expected(estimator):
  """Returns (value, gradient) of the estimator, expected over its samples."""
  with jax.enable_x64(True):

    def mean(theta):
      logprobs = jax.nn.log_softmax(theta)
      return (COUNTS / 20 * objectives.kl_estimate(logprobs, jnp.log(REF), estimator)).sum()

    value, grad = jax.value_and_grad(mean)(jnp.asarray(THETA))
    return float(value), np.asarray(grad)


def test_expected_value_and_gradient_of_the_kl_estimators():
  p = COUNTS / 20
  kl = sum(p[i] * math.log(p[i] / REF[i]) for i in range(5))
  values, grads = zip(*map(_expected, ('k1', 'k2', 'k3')), strict=True)
  np.testing.assert_allclose([values[0], values[2]], kl, rtol=1e-12)
  k2 = sum(p[i] * math.log(p[i] / REF[i]) ** 2 / 2 for i in range(5))
  np.testing.assert_allclose(values[1], k2, rtol=1e-12)
  np.testing.assert_allclose(grads[0], 0, atol=1e-12)
  np.testing.assert_allclose(grads[1], _kl_gradient(), rtol=1e-12)
  np.testing.assert_allclose(grads[2], p - REF, rtol=1e-12)  # of KL(ref ‖ p)
  assert np.abs(grads[2] - _kl_gradient()).max() > 0.05


@pytest.mark.parametrize('place, estimator', [('reward', 'k1'), ('loss', 'k2'), ('loss', 'k3')])
def test_kl_in_either_place_descends_the_kl(place, estimator):
  """The policy gradient with −k1 as the advantage is that of k2 in the loss."""
  tokens = np.repeat(np.arange(5), COUNTS)[:, None]
  objective = Objective(kl_place=place, kl_estimator=estimator, kl_coef=0.5)

  def loss(theta):
    logprobs = jax.nn.log_softmax(theta)[tokens]
    old = jax.lax.stop_gradient(logprobs)
    ref = jnp.log(REF)[tokens]
    penalty = objective.kl_coef * objectives.kl_estimate(old, ref, 'k1')
    total, weight, metrics = objectives.policy_loss(
      logprobs,
      {
        'completion_mask': np.ones((20, 1)),
        'old_logprobs': old,
        'ref_logprobs': ref,
        'advantages': -penalty if place == 'reward' else 0 * old,
      },
      objective,
    )
    return total / weight, None, metrics

  *_, metrics, grad = _with_gradient(loss, THETA)
  want = COUNTS / 20 - REF if estimator == 'k3' else _kl_gradient()
  np.testing.assert_allclose(grad, 0.5 * want, rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(metrics['kl/old'], (0, 20), atol=1e-12)


def _reference_value(values, batch, clip, objective):
  rows = []
  for b, (start, length) in enumerate(SPANS):
    row = []
    for t in range(start, start + length):
      value, old = values[b, t], batch['old_values'][b, t]
      target = batch['returns'][b, t]
      errors = [(value - target) ** 2]
      if clip is not None:
        errors.append((min(max(value, old - clip), old + clip) - target) ** 2)
      row.append((0.5 * max(errors), max(errors) > errors[0]))
    rows.append(row)
  total = _aggregate([[e for e, _ in row] for row in rows], objective)
  return *total, sum(clipped for row in rows for _, clipped in row)


@pytest.mark.parametrize('clip', [None, 0.2])
@pytest.mark.parametrize('name', ['defaults', 'grpo', 'dr_grpo'])
def test_value_loss_agrees_with_loops_at_float64(clip, name):
  _, batch = _batch()
  objective = OBJECTIVES[name]
  values = np.where(_mask() > 0, np.random.default_rng(1).normal(size=(4, T)), np.nan)
  total, weight, metrics, grad = _with_gradient(
    lambda x: objectives.value_loss(x, batch, clip, objective), values
  )

  def reference(x):
    return _reference_value(x, batch, clip, objective)

  want, want_weight, num_clipped = reference(values)
  np.testing.assert_allclose(total, want, rtol=1e-12)
  assert weight == want_weight
  assert metrics['value/clip_frac'] == (num_clipped, 10)
  assert (num_clipped > 0) == (clip is not None)
  np.testing.assert_allclose(
    grad, _differences(lambda x: reference(x)[0], values, _mask()), rtol=1e-6, atol=1e-8
  )


PAIRS = {
  'ref_logprob': np.array([[-9.1, -7.4], [-30.2, -12.9], [-5.5, -6.5]]),
  # The third pair is a tie.
  'reward': np.array([[3.9, 1.2], [0.42, 0.07], [0.3, 0.3]]),
}
SUMS = np.array([[-8.2, -7.9], [-31.6, -11.2], [-5.0, -6.0]])
EVERYWHERE = np.ones((3, 2))


def _reference_pairs(sums, beta, loss):
  total = 0.0
  for i in range(3):
    margin = beta * (
      (sums[i, 0] - PAIRS['ref_logprob'][i, 0]) - (sums[i, 1] - PAIRS['ref_logprob'][i, 1])
    )
    if loss == 'dpo':
      total += math.log(1 + math.exp(-margin))
    else:
      ratio = PAIRS['reward'][i, 0] / PAIRS['reward'][i, 1]
      total += (math.log(ratio) - margin) ** 2
  return total


@pytest.mark.parametrize(
  'name, fn', [('distillation', objectives.distillation_loss), ('dpo', objectives.dpo_loss)]
)
def test_losses_of_pairs_agree_with_loops_at_float64(name, fn):
  total, weight, metrics, grad = _with_gradient(lambda x: fn(x, PAIRS, 0.3), SUMS)
  np.testing.assert_allclose(total, _reference_pairs(SUMS, 0.3, name), rtol=1e-12)
  assert weight == 3
  np.testing.assert_allclose(
    grad, _differences(lambda x: _reference_pairs(x, 0.3, name), SUMS, EVERYWHERE), rtol=1e-6
  )
  assert metrics['pairs/accuracy'] == (1.5, 3)  # right, wrong, a tie
  np.testing.assert_allclose(metrics['pairs/margin'], (0.3 * (1.4 - 3.1 + 0), 3), rtol=1e-10)
  np.testing.assert_allclose(metrics['policy/loss'], (total, 3))


def test_nll_of_the_better_sides_agrees_with_a_loop_at_float64():
  mask = np.float32(
    [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 0, 0, 0]]]
  )
  batch = PAIRS | {'completion_mask': mask}

  def reference(sums):
    return sum(-sums[i, 0] / max(mask[i, 0].sum(), 1) for i in range(len(sums)))

  total, weight, _, grad = _with_gradient(lambda x: (*objectives.better_nll(x, batch), {}), SUMS)
  np.testing.assert_allclose(total, reference(SUMS), rtol=1e-12)
  np.testing.assert_allclose(grad, _differences(reference, SUMS, EVERYWHERE), rtol=1e-6, atol=1e-9)
  assert weight == 3


def test_distillation_rests_where_the_policy_is_the_reward_s():
  """At π ∝ π_ref·R^(1/β) the loss is 0, whatever the scale of the rewards."""
  pairs = {
    'ref_logprob': np.float32([[-9.1, -7.4], [-3.2, -2.9]]),
    'reward': np.float32([[3.9, 1.2], [0.42, 0.07]]),
  }
  sums = pairs['ref_logprob'] + np.log(pairs['reward']) / 0.3 - 4.0
  distill = jax.jit(functools.partial(objectives.distillation_loss, beta=0.3))
  for scale in (1, 7):
    scaled = pairs | {'reward': scale * pairs['reward']}
    total = distill(sums, scaled)[0]
    np.testing.assert_allclose(total, 0, atol=1e-9)


def _train(loss_fn, batch, num_microbatches):
  """Returns (params, metrics) after two steps of a scale for each column."""
  optimizer = training.make_optimizer(
    9,
    lr=0.1,
    warmup_steps=1,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip_norm=None,
    end_lr_fraction=0.1,
  )
  params = {'dense': {'kernel': jnp.linspace(0.8, 1.3, batch['x'].shape[1])}}
  state = training.init_state(params, optimizer)
  step = training.make_train_step(
    lambda params, batch: loss_fn(batch['x'] * params['dense']['kernel'], batch),
    optimizer,
    num_microbatches,
  )
  for _ in range(2):
    state, metrics = step(state, batch)
  assert metrics['train/finite'] == 1
  return jax.device_get((state.params, metrics))


@pytest.mark.parametrize('name', ['defaults', 'grpo', 'dr_grpo', 'pairs'])
def test_microbatches_add_up_to_the_batch(name):
  """Rows of very different lengths, one of them without tokens."""
  if name == 'pairs':
    loss_fn = functools.partial(objectives.distillation_loss, beta=0.3)
    pairs = (PAIRS | {'x': SUMS}).items()
    batch = {key: x[[0, 1, 2, 1]].astype(np.float32) for key, x in pairs}
  else:
    loss_fn = functools.partial(objectives.policy_loss, objective=OBJECTIVES[name])
    logprobs, batch = _batch(dtype=np.float32)
    # A product with NaN has a NaN gradient before any loss sees it.
    batch['x'] = np.nan_to_num(logprobs, nan=-1.0)
  want = _train(loss_fn, batch, 1)
  got = _train(loss_fn, batch, 4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_ratios_beyond_exp_are_finite_in_loss_and_gradient():
  batch = {
    name: np.full((1, 2), value, np.float32)
    for name, value in (
      ('completion_mask', 1.0),
      ('old_logprobs', -200.0),
      ('ref_logprobs', -200.0),
    )
  } | {'advantages': np.float32([[1.0, 0.0]])}
  objective = OBJECTIVES['grpo']
  for logprob in (-0.1, -400.0):
    (total, _), grad = _policy(np.full((1, 2), logprob, np.float32), batch, objective)
    assert np.isfinite(total) and np.isfinite(grad).all()


@pytest.mark.parametrize(
  'settings, match',
  [
    ({'kl_place': 'loss'}, r"'k1' does not.*expected gradient.*take k2 or k3"),
    ({'kl_estimator': 'k2'}, r"'k2' does not go.*'reward'.*take k1"),
    ({'kl_estimator': 'k3'}, r"'k3' does not go.*'reward'.*take k1"),
    ({'kl_estimator': 'k4', 'kl_place': 'none', 'kl_coef': 0}, "'k4'.*k2 or"),
    ({'kl_place': 'none'}, 'kl_coef=0.01 does nothing'),
    ({'kl_coef': -0.1}, 'kl_coef=-0.1 must be at least 0'),
    ({'kl_coef': math.nan}, 'kl_coef=nan must be at least 0'),
    ({'kl_place': 'advantage'}, "kl_place='advantage' must be one of none"),
    ({'ratio': 'word'}, "ratio='word' must be one of token, sequence"),
    ({'loss_aggregation': 'mean'}, "'mean' must be one of token-mean"),
    (
      {'loss_aggregation': 'seq-mean-token-sum-norm'},
      'max_completion_length=None must be at least 1',
    ),
    ({'ratio': 'sequence'}, r'take seq-mean-token-mean\.'),
    ({'epsilon': 0.0}, r'epsilon=0.0 must lie in \(0, 1\)'),
    ({'epsilon': 1.0}, r'epsilon=1.0 must lie in \(0, 1\)'),
    ({'epsilon_high': math.nan}, 'epsilon_high=nan'),
    ({'dual_clip': 1.0}, 'dual_clip=1.0 must be above 1'),
  ],
)
def test_illegal_objectives_are_refused(settings, match):
  with pytest.raises(ValueError, match=match) as error:
    Objective(**settings)
  assert '\n' not in str(error.value)


def test_illegal_arguments_are_refused():
  _, batch = _batch()
  with pytest.raises(ValueError, match='value_clip=0 must be positive'):
    objectives.value_loss(batch['returns'], batch, 0, Objective())
  with pytest.raises(ValueError, match='beta=0 must be positive'):
    objectives.dpo_loss(SUMS, PAIRS, 0)
  with pytest.raises(ValueError, match="kl_estimator='kl' must be k1"):
    objectives.kl_estimate(SUMS, SUMS, 'kl')
