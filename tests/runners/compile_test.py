import importlib.util
import json
import pathlib

import pytest

from csrm_jax import config as config_lib
from csrm_jax.core import topology
from csrm_jax.runners import compile as compile_lib

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'compile.py'
TARGET = f'target={CONFIG.with_name("rm.py")}'
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='needs libtpu: pip install "csrm_jax[tpu]"')


def _config(arg, **overrides):
  config = config_lib.load_module(CONFIG).get_config(f'{TARGET},{arg}')
  config_lib.set_overrides(config, overrides)
  return config


def test_the_target_is_the_run_that_would_be_started():
  config = _config('topology=v5p-16,model=llama3_8b,lora=4')
  run = config_lib.load_module(CONFIG.with_name('rm.py')).get_config(
      'model=llama3_8b,lora=4,mesh=v5p-16')
  assert config.topology == 'v5p-16'
  assert config_lib.to_json(config.run) == config_lib.to_json(run)
  assert run.mesh.to_dict() == {'data': 1, 'fsdp': -1, 'tensor': 1}
  assert (run.data.batch_size, run.data.row_length) == (128, 2048)


@pytest.mark.parametrize(('arg', 'message'), [
    ('topology=v5e-63', "topology 'v5e-63' does not exist"),
    ('modle=tiny', "'modle' is unknown"),
])
def test_arguments_that_do_not_exist(arg, message):
  with pytest.raises(ValueError, match=message):
    _config(arg)


def _compile(config, monkeypatch):
  """Compiles for as many CPUs as there are: one."""
  import jax

  monkeypatch.setattr(
      topology, 'devices', lambda target: jax.devices('cpu')[:1])
  target = topology.parse(config.topology)
  return [compile_lib.compile_program(name, config, target)
          for name in config.programs]


def test_what_is_reported_of_a_program(monkeypatch, tmp_path):
  config = _config('topology=v5e-1', **{
      'run.data.batch_size': 4, 'run.data.row_length': 64})
  train, score = _compile(config, monkeypatch)
  assert train.fits and score.fits
  # AdamW in float32 holds twice the parameters, and a few scalars.
  assert 0 <= train.opt_state_bytes - 2 * train.param_bytes < 100
  assert train.param_bytes == score.param_bytes > 4e6
  assert train.peak_bytes > 3 * train.param_bytes
  # Forward, again (remat) and two products backward; the score goes forward.
  assert 3.8 < train.flops / score.flops < 4.2
  assert train.tokens == 4 * 64
  assert train.roofline.limit == 'products'
  compile_lib.run(config, tmp_path)
  table = (tmp_path / 'report' / 'report.md').read_text()
  assert '| fits | yes | yes |' in table
  saved = json.loads((tmp_path / 'report' / 'compile.json').read_text())
  assert saved['programs'][0]['param_bytes'] == train.param_bytes


@pytest.mark.slow
def test_what_does_not_fit_is_tried_with_less(monkeypatch, tmp_path):
  config = _config('topology=v5e-1', **{
      'run.data.batch_size': 4, 'run.data.row_length': 64})
  config.programs = ('train',)
  needed = _compile(config, monkeypatch)[0].peak_bytes
  chip = topology.CHIPS['v5e']
  less = type(chip)(**{**vars(chip), 'hbm_bytes': 0.97 * needed})
  monkeypatch.setitem(topology.CHIPS, 'v5e', less)
  compile_lib.run(config, tmp_path)
  advice = json.loads(
      (tmp_path / 'report' / 'compile.json').read_text())['advice']
  assert 'num_microbatches=2' in advice[0]
  assert 'fits' in advice[-1]


@pytest.mark.parametrize(('overrides', 'message'), [
    ({'run.mesh.fsdp': 3}, 'does not fit 1 devices'),
    ({'programs': ('train', 'rollout')}, "'rollout' is unknown"),
])
def test_bad_input(overrides, message, monkeypatch):
  config = _config('topology=v5e-1', **{
      'run.data.batch_size': 4, 'run.data.row_length': 64, **overrides})
  with pytest.raises(ValueError, match=message):
    _compile(config, monkeypatch)


@needs_libtpu
@pytest.mark.slow
def test_a_slice_of_tpus_that_is_not_there():
  config = _config('topology=v5e-4', **{
      'run.data.batch_size': 4, 'run.data.row_length': 256,
      'programs': ('train',)})
  target = topology.parse('v5e-4')
  train = compile_lib.compile_program('train', config, target)
  assert train.fits
  assert train.replicated_fraction < 0.02
  assert train.collective_bytes
  with pytest.raises(ValueError, match='do not divide over'):
    config.run.data.batch_size = 6
    compile_lib.compile_program('train', config, target)
