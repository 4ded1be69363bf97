import dataclasses
import functools
import json
import os
import signal
import time

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from csrm_jax.core import checkpoint, lease, mesh as mesh_lib, preemption
from csrm_jax.data import features, pipeline
from csrm_jax.train import loop as loop_lib, losses, step as training

NUM_TOKENS = 12
POISON = 11  # a batch with this token has no finite loss
OPTIM = {
  'lr': 0.05,
  'warmup_steps': 2,
  'b1': 0.9,
  'b2': 0.95,
  'weight_decay': 0.0,
  'clip_norm': 1.0,
  'end_lr_fraction': 0.1,
  'num_microbatches': 1,
}
SHAPE = features.BatchShape(batch_size=2, row_length=16, max_segments=4)


def _atoms(poisoned=None):
  rng = np.random.default_rng(0)
  prompts = []
  for i in range(80):
    tokens = rng.integers(1, POISON, rng.integers(3, 9)).astype(np.int32)
    if i == poisoned:
      tokens[1] = POISON
    prompts.append(features.Prompt(tokens, -1, str(i)))
  return grain.MapDataset.source(
    [features.Atom((prompt,), 'example') for prompt in prompts]
  ).repeat()


def _batches(poisoned=None):
  return pipeline.batches(_atoms(poisoned), SHAPE)


def _loss_fn(params, batch):
  """A bigram model; its weights differ from batch to batch."""
  table = params['embed']['embedding']
  logits = (table[batch['tokens']] * params['final_norm']['scale']) @ table.T
  total, weight, metrics = losses.lm_loss(logits, batch['tokens'], batch['segment_ids'])
  poison = jnp.where(jnp.any(batch['tokens'] == POISON), jnp.nan, 0.0)
  return total + poison, weight, metrics


def _setup():
  """Returns (step function, first state, mesh)."""
  mesh = mesh_lib.make_mesh()
  params = {
    'embed': {'embedding': jax.random.normal(jax.random.key(0), (NUM_TOKENS, 4))},
    'final_norm': {'scale': jnp.ones(4)},
  }
  return *training.make_step(_loss_fn, params, mesh, num_steps=20, **OPTIM), mesh


def _config(num_steps, log_every, checkpoint_every):
  return ml_collections.ConfigDict(
    {
      'num_steps': num_steps,
      'log_every': log_every,
      'checkpoint_every': checkpoint_every,
      'profile_steps': '',
      'loggers': ('jsonl',),
    }
  )


def _train(
  workdir,
  num_steps,
  log_every=2,
  checkpoint_every=4,
  poisoned=None,
  step_fn=None,
  inputs=None,
  config=None,
  validation=None,
):
  """Returns (last state, step function) of a run in a new set of objects."""
  own_step_fn, state, mesh = _setup()
  step_fn = step_fn or own_step_fn
  batches = _batches(poisoned)
  try:
    state = loop_lib.train(
      loop_lib.Supervised(step_fn, batches, mesh),
      state,
      _config(num_steps, log_every, checkpoint_every) if config is None else config,
      mesh=mesh,
      workdir=workdir,
      meta={'name': 'bigram'},
      inputs=inputs,
      validation=validation,
    )
  finally:
    batches.close()
  return state, step_fn


def _lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _without_time(lines):
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in lines]


def _saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


class _Killed(Exception):
  pass


class _At:
  """A step function whose num-th call begins with another function's."""

  def __init__(self, step_fn, num, act):
    self._step_fn, self._num, self._act = step_fn, num, act
    self._cache_size = step_fn._cache_size

  def __call__(self, *args):
    self._num -= 1
    if not self._num:
      self._act()
    return self._step_fn(*args)


def _killed_at(num):
  def die():
    raise _Killed

  return _At(_setup()[0], num, die)


def _told_at(num):
  """Returns a step function in whose num-th call SIGTERM comes."""
  return _At(_setup()[0], num, lambda: os.kill(os.getpid(), signal.SIGTERM))


@functools.cache
def _reference(num_steps):
  """Returns (metrics of each step, fill rates) by a loop without the runner."""
  step_fn, state, mesh = _setup()
  batches, steps, fills = _batches(), [], []
  for _ in range(num_steps):
    batch = next(batches)
    fills.append(np.mean(batch['segment_ids'] > 0))
    state, metrics = step_fn(state, mesh_lib.to_global(batch, mesh))
    steps.append(jax.device_get(metrics))
  batches.close()
  return steps, fills


def test_a_line_sums_up_the_steps_since_the_last_one(tmp_path):
  _train(tmp_path, num_steps=7)
  lines = _lines(tmp_path)
  assert [line['step'] for line in lines] == [2, 4, 6, 7]
  assert _saved_steps(tmp_path) == [4, 7]  # the last step always
  steps, fills = _reference(7)
  for line, window in zip(lines, ((0, 2), (2, 4), (4, 6), (6, 7)), strict=True):
    cut = slice(*window)
    want = training.mean_metrics(steps[cut])
    assert {k: line[k] for k in want} == pytest.approx(want, rel=1e-6)
    assert line['data/fill_rate'] == pytest.approx(np.mean(fills[cut]))
    assert line['time/num_compilations'] == 1
    assert line['time/step_s'] > 0 and line['time/tokens_per_s'] > 0
  assert lines[0]['train/loss'] > lines[-1]['train/loss']


@functools.cache
def _atom_of_step(step):
  """Returns an atom that is handed out in the batch of that step."""
  for poisoned in range(80):
    batches = _batches(poisoned)
    steps = [np.any(next(batches)['tokens'] == POISON) for _ in range(step)]
    batches.close()
    if steps[-1] and not any(steps[:-1]):
      return poisoned
  raise AssertionError(step)


# The loop looks one step late, and at once where it logs (6) or saves (8).
@pytest.mark.parametrize('step', [5, 6, 8])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, step):
  poisoned = _atom_of_step(step)
  with pytest.raises(ValueError, match=rf'^step {step}: .*nonfinite') as error:
    _train(tmp_path, num_steps=16, poisoned=poisoned)
  assert '\n' not in str(error.value)
  path = tmp_path / f'nonfinite_step_{step}.npz'
  assert str(path) in str(error.value)
  with np.load(path) as saved:
    assert np.any(saved['tokens'] == POISON)
    assert set(saved) >= {'tokens', 'segment_ids', 'positions'}
  lines = _lines(tmp_path)
  assert [line['step'] for line in lines] == list(range(2, step, 2))
  assert all(line['train/finite'] == 1 for line in lines)
  assert _saved_steps(tmp_path) == [4]


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
  whole, step_fn = _train(tmp_path / 'whole', num_steps=10)
  assert step_fn._cache_size() == 1
  with pytest.raises(_Killed):
    _train(tmp_path / 'cut', num_steps=10, step_fn=_killed_at(8))
  assert _saved_steps(tmp_path / 'cut') == [4]
  assert [line['step'] for line in _lines(tmp_path / 'cut')] == [2, 4, 6]
  resumed, step_fn = _train(tmp_path / 'cut', num_steps=10)
  # A restored state lies where a fresh one does.
  assert step_fn._cache_size() == 1
  assert resumed.step == 10
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert _without_time(_lines(tmp_path / 'cut')) == _without_time(_lines(tmp_path / 'whole'))


# Within the steps of a line, at its end, and at the end of the run.
@pytest.mark.parametrize('step', [5, 6, 10])
def test_a_run_told_to_stop_saves_that_step(tmp_path, step):
  before = signal.getsignal(signal.SIGTERM)
  whole, _ = _train(tmp_path / 'whole', num_steps=10)
  with pytest.raises(preemption.Stopped, match=f'SIGTERM after step {step};'):
    _train(tmp_path / 'cut', num_steps=10, step_fn=_told_at(step))
  assert signal.getsignal(signal.SIGTERM) == before
  assert max(_saved_steps(tmp_path / 'cut')) == step
  stopped_s = loop_lib.elapsed_s(tmp_path / 'cut')
  resumed, _ = _train(tmp_path / 'cut', num_steps=10)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  lines = _lines(tmp_path / 'cut')
  assert _without_time(lines) == _without_time(_lines(tmp_path / 'whole'))
  assert lines[-1]['time/elapsed_s'] > stopped_s or step == 10


def test_a_loss_that_is_not_finite_is_not_saved_on_a_stop(tmp_path):
  with pytest.raises(ValueError, match=r'^step 5: .*nonfinite'):
    _train(tmp_path, num_steps=8, poisoned=_atom_of_step(5), step_fn=_told_at(5))
  assert _saved_steps(tmp_path) == [4]


def test_a_finished_run_is_left_as_it_is(tmp_path):
  first, _ = _train(tmp_path, num_steps=4)
  lines = _lines(tmp_path)
  again, step_fn = _train(tmp_path, num_steps=4)
  assert step_fn._cache_size() == 0  # no step was taken
  jax.tree.map(np.testing.assert_array_equal, again, first)
  assert _lines(tmp_path) == lines


def test_a_longer_run_continues_a_finished_one(tmp_path):
  _train(tmp_path / 'a', num_steps=4)
  continued, _ = _train(tmp_path / 'a', num_steps=8)
  whole, _ = _train(tmp_path / 'b', num_steps=8)
  jax.tree.map(np.testing.assert_array_equal, continued, whole)


def test_old_lines_of_a_run_without_checkpoint_are_dropped(tmp_path):
  with pytest.raises(_Killed):
    _train(tmp_path, num_steps=4, step_fn=_killed_at(4))
  assert [line['step'] for line in _lines(tmp_path)] == [2]
  _train(tmp_path, num_steps=4)
  assert [line['step'] for line in _lines(tmp_path)] == [2, 4]
  assert '"step": 2' in (tmp_path / 'metrics.jsonl.1').read_text()


def test_inputs_that_have_changed_are_named(tmp_path):
  _train(tmp_path, num_steps=4, inputs={'data a.jsonl': 'a' * 64, 'weights base': 'b' * 64})
  # What is new here, as an old checkpoint's inputs are, is nothing to compare.
  _train(tmp_path, num_steps=6, inputs={'data a.jsonl': 'a' * 64, 'test data': 'c' * 64})
  lines, changed = _lines(tmp_path), {'data a.jsonl': 'd' * 64}
  with pytest.raises(ValueError, match=r'a\.jsonl: a{12} -> d{12}.*--config\.accept_changes=True$'):
    config = _config(8, 2, 4)
    config.accept_changes = False
    _train(tmp_path, num_steps=8, inputs=changed, config=config)
  assert _lines(tmp_path) == lines
  config.accept_changes = True
  _train(tmp_path, num_steps=8, inputs=changed, config=config)
  _train(tmp_path, num_steps=10, inputs=changed)
  assert json.loads((tmp_path / 'manifest.json').read_text())['inputs'] == changed


def test_checkpoints_that_are_gone_are_no_new_beginning(tmp_path):
  _train(tmp_path, num_steps=12)
  (tmp_path / 'checkpoints').rename(tmp_path / 'elsewhere')
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match='reaches step 12, but there is no checkpoint'):
    _train(tmp_path, num_steps=14)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_checkpoints_that_are_gone_after_the_second_was_begun(tmp_path):
  with pytest.raises(_Killed):
    _train(tmp_path, num_steps=12, step_fn=_killed_at(8))
  (tmp_path / 'checkpoints').rename(tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match='reaches step 6, but there is no checkpoint'):
    _train(tmp_path, num_steps=12)


def test_a_newest_checkpoint_that_is_gone_is_named(tmp_path):
  _train(tmp_path, num_steps=8)
  recorded = json.loads((tmp_path / 'manifest.json').read_text())['checkpoint']
  assert recorded == {'whole': 8, 'begun': 8}
  lines = _lines(tmp_path)
  (tmp_path / 'checkpoints' / '8').rename(tmp_path / 'elsewhere')
  config = _config(12, 2, 4)
  config.accept_changes = False
  with pytest.raises(ValueError, match=r'has saved step 8, and .* of step 4; put .*accept_changes'):
    _train(tmp_path, num_steps=12, config=config)
  assert _lines(tmp_path) == lines
  config.accept_changes = True
  with pytest.raises(_Killed):
    _train(tmp_path, num_steps=12, config=config, step_fn=_killed_at(7))
  config.accept_changes = False  # It was said once.
  _train(tmp_path, num_steps=12, config=config)
  assert _saved_steps(tmp_path) == [8, 12]


@pytest.mark.parametrize('left', [b'', b'{"step": 2}\n'])
def test_metrics_that_are_gone_are_not_begun_anew(tmp_path, left):
  _train(tmp_path, num_steps=4)
  whole = (tmp_path / 'metrics.jsonl').read_bytes()
  (tmp_path / 'metrics.jsonl').write_bytes(left)
  config = _config(6, 2, 4)
  config.accept_changes = False
  with pytest.raises(ValueError, match=r'metrics\.jsonl ends at step [02], and .* of step 4; put'):
    _train(tmp_path, num_steps=6, config=config)
  (tmp_path / 'metrics.jsonl').write_bytes(whole)
  _train(tmp_path, num_steps=6, config=config)
  assert [line['step'] for line in _lines(tmp_path)] == [2, 4, 6]


def test_a_volume_that_vanishes_stops_the_run_which_goes_on_when_it_is_back(tmp_path):
  run, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'

  def vanish():
    while not (run / 'checkpoints' / '4').exists():  # An error of that would come first.
      time.sleep(0.01)
    run.rename(elsewhere)

  def start(step_fn=None):
    with lease.held(run):
      _train(run, num_steps=12, step_fn=step_fn)

  with pytest.raises(ValueError, match='has lost its work directory'):
    start(_At(_setup()[0], 6, vanish))
  assert not run.exists()
  elsewhere.rename(run)
  (run / lease.NAME).unlink()  # as if that process were no more
  start()
  _train(tmp_path / 'whole', num_steps=12)
  assert _without_time(_lines(run)) == _without_time(_lines(tmp_path / 'whole'))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ((10, 4, 6), 'checkpoint_every=6 must be a multiple of log_every=4'),
    ((10, 4, 2), 'checkpoint_every=2 must be a multiple of log_every=4'),
    ((0, 1, 1), 'num_steps=0 must be at least 1'),
    ((10, 0, 1), 'log_every=0 must be at least 1'),
  ],
)
def test_bad_lengths_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    loop_lib.check_lengths(_config(*fields))


def _times(values):
  return {name: x for name, x in values.items() if name.startswith('time/')}


def test_the_parts_of_a_step_add_up():
  log = loop_lib.Window(earlier_s=100.0)
  with log.span('data_wait'):
    time.sleep(0.02)
  with log.span('checkpoint'):
    time.sleep(0.04)
  jax.jit(lambda x: x + time.monotonic())(1.0)  # compiles
  time.sleep(0.01)
  for _ in range(2):
    log.add([{'loss': np.float32(1)}], rows=3)
  assert log.counts['rows'] == 6
  values = log.close()
  assert values['time/data_wait_s'] >= 0.01
  assert values['time/checkpoint_s'] >= 0.02
  assert values['time/compile_s'] > 0 and values['time/num_compilations'] >= 1
  parts = sum(
    values[f'time/{name}_s'] for name in ('data_wait', 'checkpoint', 'compile', 'compute')
  )
  assert parts == pytest.approx(values['time/step_s'])
  assert 100 < values['time/elapsed_s'] < 101
  # Two steps, of all the seconds of both starts.
  assert values['time/goodput'] == pytest.approx(
    2 * values['time/compute_s'] / values['time/elapsed_s']
  )
  assert not log.counts


def test_a_window_cut_in_two_is_that_of_no_stop():
  steps = [
    [{'a': jnp.float32(0.1 * i), 'b': (jnp.float32(i), jnp.float32(3))}, {'c': 1 / 3}]
    for i in range(4)
  ]
  whole, first = loop_lib.Window(), loop_lib.Window()
  for step in steps:
    whole.add(step, rows=1)
  for step in steps[:3]:
    first.add(step, rows=1)
  time.sleep(0.02)
  state = json.loads(json.dumps(first.get_state()))
  second = loop_lib.Window(setup_s=7.0, state=state)
  second.add(steps[3], rows=1)
  assert second.counts == whole.counts
  want, found = whole.close(), second.close()
  assert found['time/step_s'] >= 0.02 / 4
  assert {k: v for k, v in found.items() if k not in _times(found)} == {
    k: v for k, v in want.items() if k not in _times(want)
  }
  assert found['time/elapsed_s'] >= 7.02
  assert found['time/goodput'] < 0.1


def test_good_seconds_are_those_of_the_checkpoint():
  log = loop_lib.Window()
  time.sleep(0.03)
  log.add([{'loss': 1.0}])
  log.close()
  state = log.get_state()
  # Killed long after: what was done since then is done again.
  log = loop_lib.Window(earlier_s=1000.0, state=state)
  log.add([{'loss': 1.0}])
  values = log.close()
  assert 0.03 / 1001 < values['time/goodput'] < 0.1
  assert values['time/elapsed_s'] >= 1000


def test_what_is_not_finite_is_kept_as_json():
  log = loop_lib.Window()
  log.add([{'kl': jnp.float32(jnp.nan), 'entropy': (jnp.inf, 1.0)}])
  state = log.get_state()
  json.dumps(state, allow_nan=False)
  values = loop_lib.Window(state=state).close()
  assert np.isnan(values['kl']) and np.isnan(values['entropy'])


def _validation(values, seen, **options):
  """Returns a validation with these losses, which writes down the parameters that it is given."""

  def measure(params):
    seen.append(jax.tree.map(np.asarray, params))
    return {'eval/loss': values[len(seen) - 1]}

  return loop_lib.Validation(measure, every=4, **{'keep_best': True, 'patience': 0} | options)


def _saved(workdir):
  state = _setup()[1]
  with checkpoint.Checkpoints(workdir / 'checkpoints') as saved:
    return saved.restore_latest(state)


def test_the_best_step_is_kept_and_patience_ends_a_run(tmp_path):
  seen = []
  values = [3.0, 1.0, 2.0, 2.5, 0.0]
  state, _ = _train(tmp_path, 20, validation=_validation(values, seen, patience=2))
  assert len(seen) == 4
  kept = _saved(tmp_path)
  assert kept.step == 16
  for found in (state.params, kept.state.params):
    jax.tree.map(np.testing.assert_array_equal, found, seen[1])
  lines = _lines(tmp_path)
  assert [(x['step'], x['eval/loss']) for x in lines if 'eval/loss' in x] == [
    (4, 3.0), (8, 1.0), (12, 2.0), (16, 2.5)
  ]  # fmt: skip
  # It is over: the same command trains no further.
  again, _ = _train(tmp_path, 20, validation=_validation(values, seen, patience=2))
  jax.tree.map(np.testing.assert_array_equal, again.params, seen[1])
  assert len(seen) == 4


def test_the_last_step_stays_where_it_is_the_best_or_nothing_else_is_asked(tmp_path):
  for falling, options in ((True, {}), (False, {'keep_best': False})):
    seen, values = [], [2.0, 1.0 if falling else 3.0]
    validation = _validation(values, seen, **options)
    state, _ = _train(tmp_path / str(falling), 8, validation=validation)
    jax.tree.map(np.testing.assert_array_equal, state.params, seen[-1])
  plain, _ = _train(tmp_path / 'plain', 8)
  jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)


def test_a_run_that_was_stopped_knows_its_best_step(tmp_path):
  values, asked, rest = [3.0, 1.0, 2.0, 2.0], [], []
  expected, _ = _train(tmp_path / 'whole', 16, validation=_validation(values, []))

  def stop(params):
    asked.append(params)
    if len(asked) == 3:
      raise KeyboardInterrupt
    return {'eval/loss': values[len(asked) - 1]}

  with pytest.raises(KeyboardInterrupt):
    _train(tmp_path / 'cut', 16, validation=loop_lib.Validation(stop, 4, True, 0))
  state, _ = _train(tmp_path / 'cut', 16, validation=_validation(values[2:], rest))
  jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
  assert len(rest) == 2


@pytest.mark.parametrize(
  ('options', 'message'),
  [({'every': 6}, 'eval.every=6 must be a multiple'), ({'patience': -1}, 'eval.patience=-1')],
)
def test_bad_validations_are_refused(tmp_path, options, message):
  validation = dataclasses.replace(_validation([], []), **options)
  with pytest.raises(ValueError, match=message):
    _train(tmp_path, 8, validation=validation)
