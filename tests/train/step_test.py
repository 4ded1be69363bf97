import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.train import step as training


def _params():
  return {
    'dense': {'kernel': jnp.asarray([[1.0, -2.0], [0.5, 3.0]])},
    'norm': {'scale': jnp.asarray([1.5, 0.5])},
  }


def _loss_fn(params, batch):
  """Weighted squared error, one weight a row."""
  out = (batch['x'] * params['norm']['scale']) @ params['dense']['kernel']
  error = jnp.square(out - batch['y']).sum(-1)
  total, weight = (error * batch['w']).sum(), batch['w'].sum()
  return total, weight, {'loss/error': (total, weight)}


def _batch(rows=8, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'x': rng.standard_normal((rows, 2)).astype(np.float32),
    'y': rng.standard_normal((rows, 2)).astype(np.float32),
    'w': np.float32([5, 0, 0, 1, 0.25, 3, 2, 0])[:rows],
  }


OPTIM = {
  'lr': 0.1,
  'warmup_steps': 2,
  'b1': 0.9,
  'b2': 0.95,
  'weight_decay': 0.0,
  'clip_norm': 1.0,
  'end_lr_fraction': 0.1,
}


def _optimizer(**kwargs):
  return training.make_optimizer(20, **(OPTIM | kwargs))


def _state(optimizer):
  return training.init_state(_params(), optimizer)


def _assert_close(got, want, **kwargs):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **kwargs), got, want)


def test_frozen_parameters_are_used_but_not_trained():
  optimizer = _optimizer(clip_norm=None)
  whole, batch = _params(), _batch()
  frozen, trained = {'norm': whole['norm']}, {'dense': whole['dense']}
  step = training.make_train_step(_loss_fn, optimizer)
  state = training.init_state(trained, optimizer)
  state, metrics = step(state, batch, frozen)
  # Adam treats every element alone: the trained ones move as they would in a
  # step that trains all.
  want, want_metrics = training.make_train_step(_loss_fn, optimizer)(
    training.init_state(_params(), optimizer), batch
  )
  _assert_close(state.params, {'dense': want.params['dense']}, rtol=1e-6)
  _assert_close(metrics['loss/error'], want_metrics['loss/error'], rtol=1e-6)
  assert metrics['train/grad_norm'] < want_metrics['train/grad_norm']
  _assert_close(frozen, {'norm': _params()['norm']}, rtol=0)


@pytest.mark.parametrize('num_microbatches', [2, 4, 8])
def test_accumulation_is_exact_with_uneven_weights(num_microbatches):
  optimizer = _optimizer()
  results = []
  for num in (1, num_microbatches):
    step = training.make_train_step(_loss_fn, optimizer, num)
    state = _state(optimizer)
    for i in range(3):
      state, metrics = step(state, _batch(seed=i))
    results.append((state, metrics))
  _assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_step_equals_hand_computed_gradient():
  batch, params = _batch(), _params()

  def mean_loss(params):
    total, weight, _ = _loss_fn(params, batch)
    return total / weight

  loss, grads = jax.value_and_grad(mean_loss)(params)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  assert norm > 1  # so that clipping acts
  optimizer = _optimizer(warmup_steps=0)
  state, metrics = training.make_train_step(_loss_fn, optimizer)(_state(optimizer), batch)
  means = training.mean_metrics([metrics])
  np.testing.assert_allclose(means['train/loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(means['loss/error'], loss, rtol=1e-5)
  np.testing.assert_allclose(means['train/grad_norm'], norm, rtol=1e-5)
  # Adam's first update is the sign of the gradient times the learning rate.
  want = jax.tree.map(lambda p, g: p - 0.1 * np.sign(g), params, grads)
  _assert_close(state.params, want, rtol=1e-4)
  assert state.step == 1


def test_decay_mask_follows_names():
  params = {
    'embed': {'embedding': 0},
    'final_norm': {'scale': 0},
    'layers': {'attention_norm': {'scale': 0}, 'mlp': {'up': {'kernel': 0}}},
  }
  assert training.decay_mask(params) == {
    'embed': {'embedding': True},
    'final_norm': {'scale': False},
    'layers': {'attention_norm': {'scale': False}, 'mlp': {'up': {'kernel': True}}},
  }


def test_clipping_limits_the_moments():
  optimizer = _optimizer(clip_norm=1e-3)
  state, metrics = training.make_train_step(_loss_fn, optimizer)(_state(optimizer), _batch())
  moments = jax.tree.leaves(state.opt_state[1].mu)
  norm = np.sqrt(sum(np.square(m).sum() for m in moments))
  np.testing.assert_allclose(norm, 0.1 * 1e-3, rtol=1e-4)
  assert metrics['train/grad_norm'] > 1  # before clipping


def test_weight_decay_spares_norms():
  optimizer = _optimizer(weight_decay=0.5, warmup_steps=0)

  def flat(params, batch):
    return 0.0 * params['norm']['scale'].sum(), jnp.float32(1), {}

  before = _params()
  state, _ = training.make_train_step(flat, optimizer)(
    training.init_state(before, optimizer), _batch()
  )
  want = 0.95 * np.asarray(_params()['dense']['kernel'])
  np.testing.assert_allclose(state.params['dense']['kernel'], want, rtol=1e-5)
  np.testing.assert_array_equal(state.params['norm']['scale'], _params()['norm']['scale'])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('num_microbatches', [1, 4])
def test_non_finite_loss_changes_nothing(bad, num_microbatches):
  optimizer = _optimizer()
  step = training.make_train_step(_loss_fn, optimizer, num_microbatches)
  state, metrics = step(_state(optimizer), _batch())
  assert metrics['train/finite'] == 1
  before = jax.device_get(state)
  batch = _batch()
  batch['x'][3, 0] = bad
  state, metrics = step(state, batch)
  assert metrics['train/finite'] == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  state, metrics = step(state, _batch())
  assert metrics['train/finite'] == 1 and state.step == 2


def test_non_finite_gradient_of_a_finite_loss_changes_nothing():
  def sharp(params, batch):
    total = jnp.sqrt(jnp.square(params['norm']['scale'] * 0).sum())
    return total, jnp.float32(1), {}

  optimizer = _optimizer()
  state, metrics = training.make_train_step(sharp, optimizer)(_state(optimizer), _batch())
  assert metrics['train/loss'][0] == 0 and metrics['train/finite'] == 0
  _assert_close(state.params, _params())


def test_batch_without_weight_is_finite():
  optimizer = _optimizer()
  batch = _batch()
  batch['w'] = np.zeros_like(batch['w'])
  state, metrics = training.make_train_step(_loss_fn, optimizer)(_state(optimizer), batch)
  assert metrics['train/finite'] == 1 and metrics['train/grad_norm'] == 0
  _assert_close(state.params, _params())
  assert 'train/loss' not in training.mean_metrics([metrics])


def test_schedule_warms_up_and_decays():
  schedule = training.make_schedule(1.0, 4, 20, end_lr_fraction=0.1)
  rates = [float(schedule(step)) for step in range(25)]
  np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-5)
  assert all(a > b for a, b in itertools.pairwise(rates[4:21]))
  np.testing.assert_allclose(rates[12], 0.55, rtol=1e-5)  # half-way
  np.testing.assert_allclose(rates[20:], 0.1, rtol=1e-5)


def test_reported_learning_rate_is_the_one_applied():
  optimizer = _optimizer()
  step = training.make_train_step(_loss_fn, optimizer)
  state, schedule = _state(optimizer), training.make_schedule(0.1, 2, 20, 0.1)
  for i in range(4):
    before = np.asarray(state.params['norm']['scale'])
    state, metrics = step(state, _batch())
    np.testing.assert_allclose(metrics['train/lr'], schedule(i), rtol=1e-6)
    if i == 0:
      change = np.abs(state.params['norm']['scale'] - before)
      np.testing.assert_allclose(change, schedule(0), rtol=1e-4)


def test_resume_from_a_copied_state_is_bit_exact():
  optimizer = _optimizer()
  step = training.make_train_step(_loss_fn, optimizer, 2)
  state = _state(optimizer)
  for i in range(6):
    if i == 3:
      copy = jax.device_get(state)
    state, _ = step(state, _batch(seed=i))
  resumed = jax.tree.map(jnp.asarray, copy)
  for i in range(3, 6):
    resumed, _ = step(resumed, _batch(seed=i))
  jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_state_is_donated_and_compiled_once():
  optimizer = _optimizer()
  step = training.make_train_step(_loss_fn, optimizer)
  first = _state(optimizer)
  state, _ = step(first, _batch())
  step(state, _batch(seed=1))
  assert first.params['dense']['kernel'].is_deleted()
  assert step._cache_size() == 1


def test_compiled_once_for_a_state_laid_out_on_a_mesh():
  """The returned state lies where the first one did, and so on."""
  mesh = mesh_lib.make_mesh()
  params = {'embed': {'embedding': jnp.ones([4, 2])}, 'final_norm': {'scale': jnp.ones([2])}}

  def loss_fn(params, batch):
    renamed = {'dense': {'kernel': params['embed']['embedding'][:2]}, 'norm': params['final_norm']}
    return _loss_fn(renamed, batch)

  optimizer = _optimizer()
  state = training.init_state(params, optimizer)
  shardings = mesh_lib.shardings(state, mesh)
  state = jax.device_put(state, shardings)
  step = training.make_train_step(loss_fn, optimizer, 2, shardings)
  for i in range(3):
    state, _ = step(state, mesh_lib.to_global(_batch(seed=i), mesh))
  assert step._cache_size() == 1
  assert jax.tree.map(lambda x: x.sharding, state) == shardings
  # Names axes of the mesh, so that losing them would be seen.
  assert state.params['embed']['embedding'].sharding.spec == jax.P('tensor', 'fsdp')


def test_bfloat16_params_accumulate_in_float32():
  optimizer = _optimizer()
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), _params())
  state, metrics = training.make_train_step(_loss_fn, optimizer, 4)(
    training.init_state(params, optimizer), _batch()
  )
  assert metrics['train/loss'][0].dtype == jnp.float32
  assert state.params['norm']['scale'].dtype == jnp.bfloat16


def test_microbatches_are_strided():
  got = training.split_microbatches(jnp.arange(6), 2)
  assert got.tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
  'make,message',
  [
    (
      lambda: training.split_microbatches(jnp.arange(6), 4),
      'num_microbatches=4 must divide the batch size 6',
    ),
    (
      lambda: training.make_schedule(1.0, 20, 20, 0.1),
      'warmup_steps=20 must be at least 0 and less than num_steps=20',
    ),
    (lambda: _optimizer(clip_norm=0.0), r'clip_norm=0\.0 must be positive'),
  ],
)
def test_bad_values_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_mean_metrics_weighs_steps():
  steps = [
    {'a': (1.0, 1.0), 'b': 2.0, 'train/finite': 1.0, 'none': (0.0, 0.0)},
    {'a': (9.0, 3.0), 'b': 4.0, 'train/finite': 0.0, 'none': (0.0, 0.0)},
  ]
  assert training.mean_metrics(steps) == {'a': 2.5, 'b': 3.0, 'train/finite': 0.0}


def test_keep_freed_memory_can_be_called_anywhere():
  assert training.keep_freed_memory() in (True, False)


def test_train_state_is_a_pytree_of_its_fields():
  state = _state(_optimizer())
  leaves, structure = jax.tree.flatten(state)
  again = jax.tree.unflatten(structure, leaves)
  assert dataclasses.astuple(again)[0] == 0


def test_muon_moves_kernels_of_layers_along_orthogonal_matrices():
  keys = iter(jax.random.split(jax.random.key(0), 4))
  params = {
    'embed': {'embedding': jax.random.normal(next(keys), (7, 8))},
    'layers': {
      'attention': {'out': {'kernel': jax.random.normal(next(keys), (2, 2, 3, 8))}},
      'mlp': {'up': {'kernel': jax.random.normal(next(keys), (2, 8, 16))}},
    },
  }
  grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
  optimizer = _optimizer(optimizer='muon', clip_norm=None, warmup_steps=0)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  adam = optax.scale_by_adam(b1=OPTIM['b1'], b2=OPTIM['b2'], nesterov=True)
  want, _ = adam.update(grads['embed'], adam.init(params['embed']))
  _assert_close(updates['embed'], jax.tree.map(lambda x: -OPTIM['lr'] * x, want), rtol=1e-5)
  layers = updates['layers']
  for update in (layers['attention']['out']['kernel'], layers['mlp']['up']['kernel']):
    update = np.reshape(update, (2, -1, update.shape[-1]))
    values = np.linalg.svd(update, compute_uv=False)
    # Its iteration leaves singular values between 0.7 and 1.2, here times their scale.
    assert (values.max(-1) < 1.8 * values.min(-1)).all()
    assert np.sqrt(np.square(update).mean()) == pytest.approx(0.2 * OPTIM['lr'], rel=0.3)
  # They go downhill.
  assert (layers['mlp']['up']['kernel'] * grads['layers']['mlp']['up']['kernel']).sum() < 0


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(ValueError, match=r"optim\.optimizer='mion' must be one of adamw, muon"):
    _optimizer(optimizer='mion')
