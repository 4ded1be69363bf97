import sys
import types

import jax.numpy as jnp
import ml_collections
import pytest

from csrm_jax import config as config_lib, main
from csrm_jax.core import profiling

CONFIG = {
  'runner': 'fake',
  'data': {'batch_size': 16, 'row_length': 384},
  'optim': {'num_microbatches': 2},
  'model': {'overrides': {'remat': 'none'}},
  'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'num_slices': 1},
}


def test_one_line_says_with_what_and_what_to_change(monkeypatch, tmp_path):
  def run(config, workdir):
    (workdir / 'tokenizer.model').write_text('')
    jnp.zeros(2**50).block_until_ready()

  module = types.ModuleType('fake_runner')
  module.run = run
  monkeypatch.setitem(sys.modules, 'fake_runner', module)
  monkeypatch.setitem(main.RUNNERS, 'fake', 'fake_runner')
  with pytest.raises(ValueError, match=r'^out of memory') as error:
    main.run(ml_collections.ConfigDict(CONFIG), tmp_path / 'run')
  message = str(error.value)
  assert '\n' not in message
  for part in (
    'data.batch_size=16',
    'row_length=384',
    'remat=none',
    '--config.model.overrides.remat=full',
    '--config.optim.num_microbatches=4',
    '--config.data.batch_size=8',
    'configs/compile.py',
  ):
    assert part in message
  profile = tmp_path / 'run' / 'memory_0.prof'
  assert str(profile) in message and profile.stat().st_size


def test_a_run_of_which_little_is_known(tmp_path):
  full = RuntimeError('RESOURCE_EXHAUSTED: full\nmore')
  message = profiling.explain(full, {'runner': 'evaluate'}, tmp_path)
  assert message.startswith('out of memory (RESOURCE_EXHAUSTED: full more); ')
  assert 'try' not in message


def test_many_devices_share_before_rows_are_cut(monkeypatch, tmp_path):
  monkeypatch.setattr(profiling.jax, 'device_count', lambda: 8)
  config = config_lib.flatten(CONFIG)
  full = RuntimeError('RESOURCE_EXHAUSTED')
  assert '--config.mesh.data=1 --config.mesh.fsdp=-1' in profiling.explain(full, config, tmp_path)
  config['mesh.num_slices'] = 2
  assert '--config.mesh.data=2 --config.mesh.fsdp=-1' in profiling.explain(full, config, tmp_path)
  config['mesh.num_slices'], config['mesh.fsdp'] = 1, 8
  assert '--config.mesh.tensor=2' in profiling.explain(full, config, tmp_path)
