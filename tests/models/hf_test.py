import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from csrm_jax.models import config, hf, hf_config, shards, transformer

CFG = config.ModelConfig(
    vocab_size=40, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
    head_dim=16, mlp_dim=48, rope_theta=5e5, norm_eps=1e-6)


@pytest.fixture
def folder(tmp_path):
  hf.save(tmp_path / 'm', CFG, transformer.init_params(CFG, 0), {'seed': '0'})
  return tmp_path / 'm'


def _edit_weights(folder, edit):
  path = folder / shards.WEIGHTS_FILE
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def _edit_config(folder, **fields):
  path = folder / hf_config.CONFIG_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_round_trip_is_exact(tie, param_dtype, tmp_path):
  cfg = dataclasses.replace(
      CFG, tie_embeddings=tie, param_dtype=param_dtype, unroll=2)
  params = transformer.init_params(cfg, 3)
  hf.save(tmp_path, cfg, params)
  got_cfg, got = hf.load(tmp_path, unroll=2)
  assert got_cfg == cfg
  assert jax.tree.structure(got) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert not list(tmp_path.glob('*.tmp'))


def test_every_family_comes_back(family_cfg, tmp_path):
  cfg = family_cfg
  params = transformer.init_params(cfg, 1)
  hf.save(tmp_path, cfg, params)
  got_cfg, got = hf.load(tmp_path)
  assert got_cfg == cfg
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_transformers_takes_every_tensor_and_returns_it(family_cfg, tmp_path):
  """Nothing is missing, left over or misshaped, in either direction."""
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  params = transformer.init_params(family_cfg, 2)
  hf.save(tmp_path / 'ours', family_cfg, params)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not any(info.values()), info
  model.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')
  assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1
  got_cfg, got = hf.load(tmp_path / 'theirs')
  assert got_cfg == family_cfg
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert hf.digest(tmp_path / 'theirs') == hf.digest(tmp_path / 'ours')


def test_layout_is_that_of_llama(folder):
  params = hf.load(folder)[1]
  tensors = safetensors.numpy.load_file(folder / shards.WEIGHTS_FILE)
  assert len(tensors) == 2 + 9 * CFG.num_layers
  heads = params['layers']['attention']
  prefix = 'model.layers.1.self_attn.'
  np.testing.assert_array_equal(
      tensors[prefix + 'k_proj.weight'],
      np.asarray(heads['key']['kernel'][1]).reshape(32, 32).T)
  # [out, in]: the inputs of o_proj are heads, then their dims.
  np.testing.assert_array_equal(
      tensors[prefix + 'o_proj.weight'][:, 16:32],
      np.asarray(heads['out']['kernel'][1, 1]).T)
  spec = json.loads((folder / hf_config.CONFIG_FILE).read_text())
  assert spec['rope_theta'] == 5e5 and spec['head_dim'] == 16


def test_metadata(folder):
  assert hf.load_metadata(folder)['seed'] == '0'


def test_missing_tensor(folder):
  name = 'model.layers.1.mlp.up_proj.weight'
  _edit_weights(folder, lambda tensors: tensors.pop(name))
  with pytest.raises(ValueError, match=rf'm: {name} is missing'):
    hf.load(folder)


def test_unused_tensor(folder):
  _edit_weights(folder, lambda t: t.update(extra=np.zeros(2, np.float32)))
  with pytest.raises(ValueError, match='extra is of no use'):
    hf.load(folder)


def test_misshaped_tensor(folder):
  name = 'model.norm.weight'
  _edit_weights(folder, lambda t: t.update({name: np.zeros(7, np.float32)}))
  with pytest.raises(ValueError, match=rf'{name} has shape \(7,\), .* \(32,\)'):
    hf.load(folder)


def test_other_backbone(folder):
  other = dataclasses.replace(CFG, rope_theta=1e4)
  with pytest.raises(ValueError, match=r'another backbone: rope_theta is 5000'):
    hf.load_params(folder, other)


def test_damaged_file(folder):
  path = folder / shards.WEIGHTS_FILE
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match='cannot be read'):
    hf.load(folder)
  with pytest.raises(ValueError, match='cannot be read'):
    hf.load_metadata(folder)


def test_models_that_are_not_computed(folder):
  _edit_config(folder, hidden_act='gelu')
  with pytest.raises(ValueError, match=r"config\.json: hidden_act is 'gelu'"):
    hf.load_config(folder)


def test_missing_config(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json: cannot be read'):
    hf.load(tmp_path)


def test_save_refuses_params_of_another_model(tmp_path):
  other = dataclasses.replace(CFG, tie_embeddings=False)
  with pytest.raises(ValueError, match='lm_head/kernel is missing'):
    hf.save(tmp_path / 'm', other, transformer.init_params(CFG, 0))
  assert not (tmp_path / 'm').exists()
