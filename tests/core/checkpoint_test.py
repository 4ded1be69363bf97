import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from csrm_jax.core import checkpoint
from tests import small

# Orbax closes its event loop while the other reads of a failed restore run.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

DATA = {'next': 7, 'pending': [3, 5], 'dropped': {'too_long': 2}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
  step: jax.Array
  params: dict
  opt_state: tuple


def _state(seed=0, width=8):
  """Returns a small state of several dtypes, with odd bits in it."""
  keys = jax.random.split(jax.random.key(seed), 3)
  w = jax.random.normal(keys[0], (16, width))
  w = w.at[0, :4].set(jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40]))
  return _State(
    step=jnp.int32(seed),
    params={
      'mlp': {'up': w, 'half': w.astype(jnp.bfloat16)},
      'mask': jax.random.bernoulli(keys[1], 0.5, (5,)),
    },
    opt_state=({'mu': {'up': jax.random.normal(keys[2], (16, width))}}, ()),
  )


def _bits(state):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def _save(path, steps, keep=5):
  with checkpoint.Checkpoints(path, keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step), DATA | {'next': step})
  return checkpoint.Checkpoints(path, keep)


def _arrays(path, step):
  """Returns the files of a checkpoint that hold array data, biggest first."""
  files = [f for f in (path / str(step) / 'state').rglob('d/*') if f.is_file()]
  assert files
  return sorted(files, key=lambda f: -f.stat().st_size)


def test_round_trip_is_bit_exact(tmp_path):
  state = _state(3)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(state) is None
    checkpoints.save(3, state, DATA, meta={'model': {'num_layers': 2}})
    checkpoints.wait()
    restored = checkpoints.restore_latest(jax.eval_shape(_state))
  step, result, data_state = restored
  assert (step, data_state) == (3, DATA)
  assert isinstance(result, _State)
  assert jax.tree.structure(result) == jax.tree.structure(state)
  assert _bits(result) == _bits(state)
  assert checkpoint.describe(tmp_path).meta == {'model': {'num_layers': 2}}


def test_a_missing_folder_is_no_checkpoint(tmp_path):
  path = tmp_path / 'none'
  assert checkpoint.Checkpoints(path).restore_latest(_state()) is None
  assert not path.exists()
  with pytest.raises(FileNotFoundError, match='no readable checkpoint'):
    checkpoint.describe(path)


def test_the_newest_are_kept(tmp_path):
  checkpoints = _save(tmp_path, [1, 2, 3, 4], keep=2)
  assert checkpoints.steps() == [3, 4]
  assert checkpoints.restore_latest(_state()).step == 4


def test_what_a_listing_hides_is_asked_for_by_name(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path / 'checkpoints')
  _save(folder, [1, 2])
  iterdir = type(folder).iterdir

  def hide(self):
    return (p for p in iterdir(self) if p != folder / '2')

  monkeypatch.setattr(type(folder), 'iterdir', hide)
  assert checkpoint.describe(folder).step == 1  # Nothing says that there is more.
  for whole in (1, 2):  # killed while the second was written, or after it
    checkpoint.record(tmp_path, whole, 2)
    assert checkpoint.describe(folder).step == 2
    assert checkpoint.Checkpoints(folder).restore_latest(_state()).step == 2
  (tmp_path / 'manifest.json').write_text('{"checkpoint": {"whole": "2"}}')
  with pytest.raises(ValueError, match=r'manifest\.json: checkpoint is .*; remove that entry'):
    checkpoint.describe(folder)


def test_an_older_checkpoint_is_not_taken_for_one_that_is_missing(tmp_path):
  folder = tmp_path / 'checkpoints'
  _save(folder, [1, 2])
  shutil.rmtree(folder / '2')
  checkpoint.record(tmp_path, 1, 2)  # The second was begun, and a kill left nothing of it.
  assert checkpoint.describe(folder).step == 1
  checkpoint.record(tmp_path, 2, 3)
  message = small.error_of(checkpoint.describe, folder)
  assert 'has saved step 2, and the newest' in message and message.endswith('or ask for step=1')
  assert checkpoint.describe(folder, 1).step == 1


def test_the_state_may_be_donated_once_save_returns(tmp_path):
  @jax.jit
  def make():
    return {'w': jnp.arange(2.0**18)}

  update = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
  state = make()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    for _ in range(3):
      state = update(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored = checkpoints.restore_latest(state)
  assert _bits(restored.state) == _bits(make())


def _truncate(path):
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


@pytest.mark.parametrize(
  'damage',
  [_truncate, _flip, os.unlink, lambda path: path.write_bytes(b'')],
  ids=['truncated', 'flipped', 'deleted', 'empty'],
)
def test_damaged_arrays_fall_back_to_the_one_before(tmp_path, damage, caplog):
  checkpoints = _save(tmp_path, [1, 2])
  damage(_arrays(tmp_path, 2)[0])
  restored = checkpoints.restore_latest(_state())
  assert restored.step == 1
  assert restored.data_state['next'] == 1
  assert _bits(restored.state) == _bits(_state(1))
  assert f'skipping the damaged checkpoint {tmp_path / "2"}' in caplog.text


@pytest.mark.parametrize('damage', [_truncate, os.unlink, _flip])
def test_a_damaged_description_falls_back(tmp_path, damage, caplog):
  checkpoints = _save(tmp_path, [1, 2])
  damage(tmp_path / '2' / 'info' / 'metadata')
  assert checkpoints.restore_latest(_state()).step == 1
  assert str(tmp_path / '2') in caplog.text
  # Whoever does not train is not given an older one.
  with pytest.raises(ValueError, match=r'is damaged .*ask for step=1'):
    checkpoint.describe(tmp_path)
  assert checkpoint.describe(tmp_path, 1).step == 1


@pytest.mark.parametrize('part', ['state', 'info', 'state/d'])
def test_missing_parts_fall_back(tmp_path, part):
  checkpoints = _save(tmp_path, [1, 2])
  path = tmp_path / '2' / part
  shutil.rmtree(path)
  assert checkpoints.restore_latest(_state()).step == 1


def test_every_file_of_a_checkpoint_may_be_cut_short(tmp_path):
  """Whatever the file: the older state, or the right one, never a wrong one."""
  _save(tmp_path / 'good', [1, 2])
  files = [
    f.relative_to(tmp_path / 'good') for f in (tmp_path / 'good' / '2').rglob('*') if f.is_file()
  ]
  for number, file in enumerate(files):
    path = tmp_path / f'bad{number}'
    shutil.copytree(tmp_path / 'good', path)
    _truncate(path / file)
    step, state, data_state = checkpoint.Checkpoints(path).restore_latest(_state())
    assert _bits(state) == _bits(_state(step)), file
    assert data_state['next'] == step, file


def test_saving_goes_on_past_a_damaged_checkpoint(tmp_path):
  checkpoints = _save(tmp_path, [1, 2, 3])
  for step in (2, 3):
    _truncate(_arrays(tmp_path, step)[0])
  with checkpoints:
    assert checkpoints.restore_latest(_state()).step == 1
    checkpoints.save(2, _state(2), DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.restore_latest(_state()).step == 2
  assert (tmp_path / 'damaged-2').is_dir()
  assert (tmp_path / 'damaged-3').is_dir()


def test_damage_to_all_checkpoints_is_no_new_beginning(tmp_path):
  checkpoints = _save(tmp_path, [1, 2])
  for step in (1, 2):
    _truncate(_arrays(tmp_path, step)[0])
  message = small.error_of(checkpoints.restore_latest, _state())
  assert 'all checkpoints there are damaged (1, 2; ' in message and 'begin again' in message
  with pytest.raises(checkpoint.DamagedError, match='ask for step=1'):
    checkpoints.restore(2, _state())


def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
  checkpoints = _save(tmp_path, [1, 2])

  def fail(*args):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(checkpoint.Checkpoints, '_read_state', fail)
  with pytest.raises(OSError, match=r'2: the checkpoint cannot be read .*Permission') as error:
    checkpoints.restore_latest(_state())
  assert '\n' not in str(error.value) and not isinstance(error.value, ValueError)


def test_a_save_that_was_interrupted_leaves_nothing(tmp_path):
  _save(tmp_path, [1])
  unfinished = tmp_path / '2.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / '1', unfinished)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.restore_latest(_state()).step == 1
  with checkpoints:
    checkpoints.save(2, _state(2), DATA)
  assert not unfinished.exists()
  assert checkpoints.steps() == [1, 2]


def test_saving_over_an_intact_checkpoint_is_an_error(tmp_path):
  with _save(tmp_path, [5]) as checkpoints:
    for step in (4, 5):
      with pytest.raises(ValueError, match=f'cannot save step {step}'):
        checkpoints.save(step, _state(), DATA)


def test_data_state_must_be_json(tmp_path):
  with (
    checkpoint.Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match='must be JSON'),
  ):
    checkpoints.save(1, _state(), {'x': object()})


def test_another_model_is_an_error_that_names_the_leaf(tmp_path):
  checkpoints = _save(tmp_path, [1, 2])
  with pytest.raises(ValueError) as error:
    checkpoints.restore_latest(jax.eval_shape(lambda: _state(width=4)))
  message = str(error.value)
  assert str(tmp_path / '2') in message
  assert "'params/mlp/half' is bfloat16[16, 8] there" in message
  assert 'bfloat16[16, 4] here' in message

  more = _state()
  more.params['lora'] = jnp.ones(2)
  with pytest.raises(ValueError, match="has no leaf 'params/lora'"):
    checkpoints.restore_latest(more)
  less = _state()
  del less.params['mask']
  with pytest.raises(ValueError, match="leaf 'params/mask' is unknown"):
    checkpoints.restore_latest(less)
  other = _state()
  other.params['mask'] = other.params['mask'].astype(jnp.int32)
  with pytest.raises(ValueError, match=r'is bool\[5\] there and int32\[5\]'):
    checkpoints.restore_latest(other)


def test_parameters_can_be_read_alone(tmp_path):
  checkpoints = _save(tmp_path, [4])
  params = {'params': jax.eval_shape(_state).params}
  restored = checkpoints.restore_latest(params, partial=True)
  assert _bits(restored.state) == _bits({'params': _state(4).params})


_SHARDED = """
import sys
import jax, numpy as np
import jax.numpy as jnp
from csrm_jax.core import checkpoint, mesh as mesh_lib

def state():
  w = np.arange(64, dtype=np.float32).reshape(2, 8, 4) / 7
  mlp = {'up': w, 'down': w.swapaxes(1, 2) + 1}
  return jax.tree.map(jnp.asarray, {'mlp': mlp, 'step': 9})

mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
shards = mesh_lib.shardings(jax.eval_shape(state), mesh)
x = jax.jit(state, out_shardings=shards)()
assert len(x['mlp']['up'].sharding.device_set) == 8
assert x['mlp']['up'].addressable_shards[0].data.shape == (2, 4, 2)
with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(9, x, {'next': 1})
for num in (4, 2, 8):
  other = mesh_lib.make_mesh(fsdp=num, devices=jax.devices()[:num])
  wanted = mesh_lib.abstract(jax.eval_shape(state), other)
  y = checkpoints.restore_latest(wanted).state
  assert y['mlp']['up'].sharding == wanted['mlp']['up'].sharding
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
"""


def test_saved_on_eight_devices_restored_on_four_two_and_one(tmp_path):
  small.run_on_devices(8, _SHARDED, tmp_path)
  w = np.arange(64, dtype=np.float32).reshape(2, 8, 4) / 7
  expected = {'mlp': {'up': w, 'down': w.swapaxes(1, 2) + 1}, 'step': np.int32(9)}
  checkpoints = checkpoint.Checkpoints(tmp_path)
  restored = checkpoints.restore_latest(jax.eval_shape(lambda: expected))
  assert _bits(restored.state) == _bits(expected)
  assert len(restored.state['mlp']['up'].sharding.device_set) == 1
