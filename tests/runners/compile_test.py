import importlib.util
import json
import pathlib

import jax
import pytest

from csrm_jax import config as config_lib
from csrm_jax.core import program, topology
from csrm_jax.models import transformer
from csrm_jax.runners import compile as compile_lib, programs

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'compile.py'
TARGET = f'target={CONFIG.with_name("rm.py")}'
RL = f'target={CONFIG.with_name("rl.py")},reward=oracle'
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu: pip install -e ".[tpu]"'
)


def _config(arg, target=TARGET, **overrides):
  config = config_lib.load_module(CONFIG).get_config(f'{target},{arg}')
  config_lib.set_overrides(config, overrides)
  return config


def test_the_target_is_the_run_that_would_be_started():
  config = _config('topology=v5p-16,model=llama3_8b,lora=4')
  run = config_lib.load_module(CONFIG.with_name('rm.py')).get_config(
    'model=llama3_8b,lora=4,mesh=v5p-16'
  )
  assert config.topology == 'v5p-16'
  assert config_lib.to_json(config.run) == config_lib.to_json(run)
  assert run.mesh.to_dict() == {'data': 1, 'fsdp': -1, 'tensor': 1, 'num_slices': 1}
  assert (run.data.batch_size, run.data.row_length) == (128, 2048)


@pytest.mark.parametrize(
  ('arg', 'message'),
  [('topology=v5e-63', "topology 'v5e-63' does not exist"), ('modle=tiny', "'modle' is unknown")],
)
def test_arguments_that_do_not_exist(arg, message):
  with pytest.raises(ValueError, match=message):
    _config(arg)


def _compile(config, monkeypatch):
  """Compiles for as many CPUs as there are: one."""
  monkeypatch.setattr(topology, 'devices', lambda target: jax.devices('cpu')[:1])
  target = topology.parse(config.topology)
  return [compile_lib.compile_program(name, config, target) for name in config.programs]


def test_what_is_reported_of_a_program(monkeypatch, tmp_path):
  sizes = {'batch_size': 4, 'row_length': 64, 'max_segments': 12}
  sizes = {f'run.data.{name}': size for name, size in sizes.items()}
  config = _config('topology=v5e-1', **sizes, prefix_length=8, branch_length=8)
  train, score = _compile(config, monkeypatch)
  assert train.fits and score.fits
  # AdamW in float32 holds twice the parameters, and a few scalars.
  assert 0 <= train.opt_state_bytes - 2 * train.param_bytes < 100
  assert train.param_bytes == score.param_bytes > 4e6
  assert train.peak_bytes > 3 * train.param_bytes
  # Forward, again (remat) and two products backward; the score goes forward.
  assert 3.8 < train.flops / score.flops < 4.2
  assert train.tokens == 4 * 64
  # In each row 7 prompts of 16 tokens, 8 of which they share.
  assert train.judged == 4 * 7 * 16
  assert train.roofline.limit == 'products'
  compile_lib.run(config, tmp_path)
  table = (tmp_path / 'report' / 'report.md').read_text()
  assert '| fits | yes | yes |' in table
  assert f'| tokens judged | {4 * 7 * 16} | {4 * 64} |' in table
  saved = json.loads((tmp_path / 'report' / 'compile.json').read_text())
  assert saved['programs'][0]['param_bytes'] == train.param_bytes


@pytest.mark.slow
def test_what_does_not_fit_is_tried_with_less(monkeypatch, tmp_path):
  config = _config('topology=v5e-1', **{'run.data.batch_size': 4, 'run.data.row_length': 64})
  config.programs = ('train',)
  needed = _compile(config, monkeypatch)[0].peak_bytes
  chip = topology.CHIPS['v5e']
  less = type(chip)(**{**vars(chip), 'hbm_bytes': 0.97 * needed})
  monkeypatch.setitem(topology.CHIPS, 'v5e', less)
  compile_lib.run(config, tmp_path)
  advice = json.loads((tmp_path / 'report' / 'compile.json').read_text())['advice']
  assert 'num_microbatches=2' in advice[0]
  assert 'fits' in advice[-1]


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'run.mesh.fsdp': 3}, 'does not fit 1 devices'),
    ({'programs': ('train', 'rollout')}, "'rollout' is unknown; there are"),
    ({'run.mesh.num_slices': 2}, 'does not divide over num_slices=2'),
  ],
)
def test_bad_input(overrides, message, monkeypatch):
  config = _config(
    'topology=v5e-1', **{'run.data.batch_size': 4, 'run.data.row_length': 64, **overrides}
  )
  with pytest.raises(ValueError, match=message):
    _compile(config, monkeypatch)


def _aligned(**overrides):
  return _config(
    'topology=v5e-1',
    RL,
    **{
      'run.rollout.num_prompts': 4,
      'run.rollout.num_generations': 4,
      'run.loss.num_mini_batches': 2,
      'run.optim.num_microbatches': 1,
      'run.policy.overrides.dtype': 'float32',
      'run.rollout.dtype': '',
      'run.sampling.max_completion_length': 8,
      'prompt_length': 32,
      'score_length': 64,
      **overrides,
    },
  )


def test_all_that_an_alignment_run_holds_is_counted(monkeypatch, tmp_path):
  config = _aligned()
  prefill, decode, logprobs, update = _compile(config, monkeypatch)
  assert [r.calls for r in (prefill, decode, logprobs, update)] == [1, 1, 2, 2]
  size = update.param_bytes
  assert logprobs.param_bytes == decode.param_bytes == size
  assert 0 <= update.opt_state_bytes - 2 * size < 100
  # Beside the update: what the KL is measured from. Beside the others also the
  # optimizer, and beside those that sample each layer's weights apart.
  assert update.beside_bytes == size
  assert logprobs.beside_bytes == size + update.opt_state_bytes
  layers = transformer.shapes(programs.model_of(config))['layers']
  layers = 4 * sum(x.size for x in jax.tree.leaves(layers))
  for result in (prefill, decode):
    assert result.beside_bytes == size + update.opt_state_bytes + layers
  assert all(r.held_bytes > 4 * size for r in (decode, logprobs, update))
  # Keys and values of 39 tokens: the last one's are not needed.
  model = programs.model_of(config)
  row = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim
  assert decode.cache_bytes == 16 * (32 + 8 - 1) * row
  # A token a turn: 16 x 7 of them and their logits, against 4 x 32 that
  # prefill reads.
  assert 0.8 < decode.flops / prefill.flops < 3
  assert decode.roofline.memory_s == pytest.approx(7 * (size + decode.cache_bytes) / 0.819e12)
  compile_lib.run(config, tmp_path)
  text = (tmp_path / 'report' / 'report.md').read_text()
  assert 'The run holds most during' in text
  assert 'A step of all calls takes' in text


def test_a_copy_to_sample_from_and_adapters_are_counted(monkeypatch):
  devices = jax.devices()[:1]
  copied = programs.named(_aligned(**{'run.rollout.dtype': 'bfloat16'}), devices)
  plain = programs.named(_aligned(), devices)
  size = program.local_bytes(plain['update']().params)
  beside = program.local_bytes(plain['decode']().beside)
  made = copied['decode']()
  assert program.local_bytes(made.params) == size / 2
  layers = transformer.shapes(programs.model_of(_aligned()))['layers']
  saved = 2 * sum(x.size for x in jax.tree.leaves(layers))  # they lie apart in bfloat16, too
  assert program.local_bytes(made.beside) == beside + size - saved
  # The reference lies under the adapters: once.
  adapted = programs.named(_aligned(**{'run.policy.overrides.lora_rank': 2}), devices)['update']()
  assert program.local_bytes(adapted.beside) == 0
  assert size <= program.local_bytes(adapted.args) < 2 * size


@needs_libtpu
@pytest.mark.slow
def test_a_slice_of_tpus_that_is_not_there():
  config = _config(
    'topology=v5e-4',
    **{'run.data.batch_size': 4, 'run.data.row_length': 256, 'programs': ('train',)},
  )
  target = topology.parse('v5e-4')
  train = compile_lib.compile_program('train', config, target)
  assert train.fits
  assert train.replicated_fraction < 0.02
  assert train.collective_bytes
  with pytest.raises(ValueError, match='do not divide over'):
    config.run.data.batch_size = 6
    compile_lib.compile_program('train', config, target)
